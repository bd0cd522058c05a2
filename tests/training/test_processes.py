"""Several processes, on this machine's CPU: the same run as one, whoever gets a signal, however weights are spread."""

import errno
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers.real_runs import (
    DRIVER,
    ROOT,
    STEPS,
    launch,
    make_launcher,
    make_options,
    read_metrics,
    read_weights,
    run_command,
    run_ranks,
    train,
)
from helpers.small_runs import call_command

from s3a.training import trainer
from s3a.training.processes import StopRequests, configure_kernels, count_own_cores, get_host_group, seed_step

LOSSES = """
import sys
sys.path.insert(0, "recipes")
import train
from s3a.training import trainer
judge_step = trainer.judge_step

def judge_and_say(run, *args):
    outcome = judge_step(run, *args)
    run.say(f"loss {outcome[0].item()!r}")
    return outcome

trainer.judge_step = judge_and_say
train.main()
"""


# Accelerate shards on accelerators alone: this lifts that, and our refusal, for the CPU.
SHARDED = """
from accelerate import state
from accelerate.utils import DistributedType
from s3a.training import build

set_state = state.AcceleratorState.__init__

def initialise(self, *args, fsdp_plugin=None, **kwargs):
    fresh = not self.initialized
    set_state(self, *args, fsdp_plugin=fsdp_plugin, **kwargs)
    if fresh:
        self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin

state.AcceleratorState.__init__ = initialise
build.check_processes = lambda recipe, accelerator: None
"""
# What dynamo traces is what is of interest here: code for it would take a minute of each process.
TRACED = """
import functools, torch
torch.compile = functools.partial(torch.compile, backend="aot_eager")
"""
FSDP = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory) -> Path:
    """Weights whose BatchNorm has seen images, so that they learn with its statistics frozen."""
    folder = tmp_path_factory.mktemp("pretrained") / "run"
    ended = train(*make_options(folder, epochs="3", mixup="0", cutmix="0", batch_size="64", ema_decay="None"))
    assert ended.returncode == 0, ended.stderr
    return folder / "model"


def losses(folder: Path, count: int, *more: str, before: str = "", **environment: str) -> list[float]:
    """The first 20 losses on so many processes; images are not mixed, which they would be on each process alone."""
    folder.mkdir(exist_ok=True)
    changes = {"mixup": "0", "cutmix": "0", "batch_size": "64", "epochs": "1", "warmup_epochs": "0"}
    options = make_options(folder / "run", **changes, ema_decay="None")
    path = folder / "losses.py"
    path.write_text(before + LOSSES)
    ended, *others = run_ranks(count, str(path), *options, *more, ACCELERATE_USE_CPU="true", **environment)
    assert [each.returncode for each in (ended, *others)] == [0] * count, ended.stderr
    return [float(line.split()[1]) for line in ended.stderr.splitlines() if line.startswith("loss ")][:20]


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_two_processes_give_the_losses_of_one(compiled, tmp_path):
    """Batch norms share their statistics, and images keep their branches."""
    one = losses(tmp_path / "one", 1)
    more = ("--compile",) if compiled else ()
    two = losses(tmp_path / "two", 2, *more, before=TRACED if compiled else "")
    check_alike(one, two)


@pytest.mark.slow
def test_two_processes_score_as_one(pretrained, tmp_path):
    """With statistics frozen: the biases in front of batch norms, which have no gradient, drift with rounding."""
    folders = [tmp_path / "one", tmp_path / "two"]
    frozen = ["--freeze-batch-norm", "--weights", str(pretrained)]
    check_alike(*(losses(folder, count, *frozen) for count, folder in enumerate(folders, start=1)))
    last_one, last_two = (read_metrics(folder / "run")[-1] for folder in folders)
    assert last_two["val_loss"] == pytest.approx(last_one["val_loss"], rel=1e-3)


def check_alike(one: list[float], two: list[float]) -> None:
    assert len(one) == len(two) == 20
    assert sum(one[-5:]) < 0.9 * sum(one[:5]), "it learns"
    assert two == pytest.approx(one, rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("compiled", [False, True])
def test_sharded_weights_train_stop_and_resume_as_whole_ones(compiled, tmp_path):
    """FSDP2, of which a checkpoint and the weights folders hold the whole weights, as those of any run."""
    before, more = (TRACED + SHARDED, ["--compile"]) if compiled else (SHARDED, [])
    check_alike(losses(tmp_path / "whole", 1), losses(tmp_path / "sharded", 2, *more, before=before, **FSDP))
    options = [*make_options(tmp_path / "run", epochs="1", warmup_epochs="0", ema_decay="None"), *more]
    driver = tmp_path / "driver.py"
    driver.write_text(before + DRIVER)
    for count, status in (("6", 1), ("1000", 0)):
        stop = [str(driver), "training.trainer:forward_backward", count, str(int(signal.SIGTERM)), "0"]
        command = [*make_launcher(2), *stop, *options]
        ended = run_command(command, ACCELERATE_USE_CPU="true", PYTHONPATH=str(ROOT), **FSDP)
        assert ended.returncode == status, ended.stderr
    assert f"at step 6 of {STEPS}" in ended.stderr
    options[options.index("--output-dir") + 1] = str(tmp_path / "undisturbed")
    ended = run_command([*make_launcher(2), *stop, *options], ACCELERATE_USE_CPU="true", PYTHONPATH=str(ROOT), **FSDP)
    assert ended.returncode == 0, ended.stderr
    assert read_weights(tmp_path / "run") == read_weights(tmp_path / "undisturbed")


# In the third step the second process alone has a gradient, or a part of one, with an infinite number.
SPOILED = """
import os, sys
sys.path.insert(0, "recipes")
import train
from s3a.training import trainer
forward_backward, judge_step, calls = trainer.forward_backward, trainer.judge_step, 0
clip_gradient = trainer.clip_gradient

def clip_and_compare(run):
    whole = [each.grad.full_tensor() if hasattr(each.grad, "full_tensor") else each.grad
             for each in run.model.parameters()]
    right = sum(each.double().square().sum() for each in whole).sqrt()
    norm = clip_gradient(run)
    print("norms", float(norm), float(right), file=sys.stderr)
    return norm

def spoil(run, batches, seed):
    global calls
    loss, calls = forward_backward(run, batches, seed), calls + 1
    gradients = [each.grad for each in run.model.parameters()]
    own = [each.to_local() if hasattr(each, "to_local") else each for each in gradients]
    if calls == 3 and os.environ["RANK"] == "1":
        next(each for each in own if each.numel()).fill_(float("inf"))
    return loss

def judge_and_say(run, *args):
    outcome = judge_step(run, *args)
    print("verdict", calls, outcome[2].item(), type(outcome).__name__, file=sys.stderr)
    return outcome

trainer.forward_backward, trainer.judge_step, trainer.clip_gradient = spoil, judge_and_say, clip_and_compare
train.main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("sharded", [False, True], ids=["whole", "sharded"])
@pytest.mark.parametrize("clip", ["None", "1.0"])
def test_a_gradient_that_is_infinite_on_one_process_alone_is_so_for_all(tmp_path, sharded, clip):
    options = make_options(tmp_path / "run", epochs="1", warmup_epochs="0", ema_decay="None", clip_grad=clip)
    path = tmp_path / "spoiled.py"
    path.write_text((SHARDED if sharded else "") + SPOILED)
    environment = {"ACCELERATE_USE_CPU": "true", **(FSDP if sharded else {})}
    ended = run_ranks(2, str(path), *options, "--on-non-finite", "skip", **environment)
    assert [each.returncode for each in ended] == [0, 0], ended[0].stderr + ended[1].stderr
    verdicts = [[line for line in each.stderr.splitlines() if line.startswith("verdict ")] for each in ended]
    assert verdicts[0] == verdicts[1]
    assert verdicts[0] == [f"verdict {step} {float(step == 3)} Tensor" for step in range(1, STEPS + 1)]
    norms = [line.split()[1:] for line in ended[0].stderr.splitlines() if line.startswith("norms ")]
    assert all(float(ours) == pytest.approx(float(right), rel=1e-5) for ours, right in norms[:2]), "of whole weights"
    assert read_metrics(tmp_path / "run")[0]["skipped_steps"] == 1
    assert "skipped step 3: the loss is" in ended[0].stderr
    options[options.index("--output-dir") + 1] = str(tmp_path / "stopped")
    ended = run_ranks(2, str(path), *options, **environment)
    assert [each.returncode for each in ended] == [2, 2]
    assert re.search(r"error: the loss is \d\.\d+ and the gradient's norm inf at step 3 \(epoch 1", ended[0].stderr)
    names = (tmp_path / "stopped" / "non_finite.txt").read_text().splitlines()
    assert len(names) == 128, "of all processes"


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all_and_both_resume(tmp_path):
    options = make_options(tmp_path / "run", epochs="1", warmup_epochs="0")
    driver = ("training.trainer:forward_backward", "6", str(int(signal.SIGUSR1)), "1")  # the second process gets it
    ended = launch(2, *options, driver=driver)
    assert ended.returncode != 0
    assert f"at epoch 1, step 6 of {STEPS}" in ended.stderr
    assert "exitcode  : 75" in ended.stderr
    assert (tmp_path / "run" / "checkpoints" / "step-000000006-epoch-00000").is_dir()
    ended = launch(2, *options)
    assert ended.returncode == 0, ended.stderr
    whole = launch(2, *make_options(tmp_path / "whole", epochs="1", warmup_epochs="0"))
    assert whole.returncode == 0, whole.stderr
    assert read_weights(tmp_path / "run") == read_weights(tmp_path / "whole")


@pytest.mark.slow
def test_processes_without_their_launcher_checkpoint_and_end(tmp_path):
    """`accelerate launch` dies of SIGTERM and passes it on to nobody."""
    command = [sys.executable, "-m", "accelerate.commands.launch", "recipes/train.py", *make_options(tmp_path / "run")]
    with subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True) as started:
        for line in started.stderr:
            if line.startswith(("beginning", "resuming")):
                break
        started.terminate()
        rest = started.stderr.read()  # to its end, when the last process has ended
    assert started.returncode == -signal.SIGTERM
    assert "stopped by the end of its launcher at epoch 1, step" in rest
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


def test_drawing_does_not_depend_on_the_steps_before():
    """What makes a resumed run equal to an undisturbed one."""
    draws = []
    for burnt in (0, 100):
        seed_step(3, step=7, process=0)
        draws.append((torch.rand(4).tolist(), np.random.rand(4).tolist()))
        torch.rand(burnt), np.random.rand(burnt)
    assert draws[0] == draws[1]
    others = [(3, 8, 0), (3, 7, 1), (4, 7, 0)]
    for seed, step, process in others:
        seed_step(seed, step=step, process=process)
        assert torch.rand(4).tolist() != draws[0][0]


@pytest.mark.parametrize(
    ("handling", "number", "reason"),
    [
        (signal.SIG_DFL, signal.SIGHUP, "SIGHUP"),
        (signal.SIG_IGN, signal.SIGHUP, None),  # as nohup has it
        (signal.SIG_DFL, signal.SIGTERM, "SIGTERM"),
    ],
)
def test_signals_ask_to_stop_unless_nohup_ignores_them(handling, number, reason):
    before = signal.signal(number, handling)
    try:
        with StopRequests() as requests:
            os.kill(os.getpid(), number)
            assert requests.reason == reason
        assert signal.getsignal(number) == handling
    finally:
        signal.signal(number, before)


def test_ctrl_c_is_answered_at_once_and_interrupts_the_second_time(capfd, monkeypatch):
    for launched in (False, True):
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none") if launched else monkeypatch.delenv("ACCELERATE", False)
        with StopRequests() as requests:
            os.kill(os.getpid(), signal.SIGINT)
            assert requests.reason == "SIGINT"
            said = capfd.readouterr().err
            assert "ending as soon as all is saved" in said
            assert ("whatever the launcher prints" in said) == launched
            with pytest.raises(KeyboardInterrupt):
                os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGTERM)
        assert requests.reason == "SIGTERM", "a scheduler may repeat its own"


def test_signals_that_end_a_command_early_are_left_to_it_until_the_run_begins(capfd):
    """And again after the run; in between nothing else is woken."""
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer)
    try:
        with StopRequests() as requests:
            os.kill(os.getpid(), signal.SIGINT)
            assert os.read(reader, 10) == bytes([signal.SIGINT])
            assert capfd.readouterr().err == "", "nothing is to be saved"
            requests.begin()
            os.kill(os.getpid(), signal.SIGTERM)
            with pytest.raises(BlockingIOError):
                os.read(reader, 10)
    finally:
        assert signal.set_wakeup_fd(-1) == writer
        os.close(reader)
        os.close(writer)


def test_the_first_ctrl_c_after_another_request_interrupts_nothing():
    """A user who waits for a command whose reader has ended may press it once."""
    pressed = 0
    with StopRequests() as requests:
        requests.note_end_of_reader()
        with pytest.raises(KeyboardInterrupt):
            while pressed < 2:
                pressed += 1
                os.kill(os.getpid(), signal.SIGINT)
    assert pressed == 2


def test_workers_leave_ctrl_c_to_their_run(capfd):
    """They inherit the handler, and a terminal sends the signal to all processes: one of them answers."""
    with StopRequests() as requests:
        child = os.fork()
        if child == 0:
            for _ in range(2):
                os.kill(os.getpid(), signal.SIGINT)
            os._exit(0 if requests.reason is None else 1)
        assert os.waitpid(child, 0)[1] == 0
    assert capfd.readouterr().err == ""


def test_the_end_of_a_reader_asks_the_inner_run_to_stop(monkeypatch):
    """As of a comparison, whose runs have contexts of their own."""

    class Unread(io.StringIO):
        def write(self, text: str) -> int:
            raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys, "stdout", io.StringIO())
    for name in ("stdout", "stderr"):
        monkeypatch.setattr(sys, name, Unread())
        with StopRequests() as outer:
            with StopRequests() as inner:
                assert inner.reason is None
                print("lost", file=getattr(sys, name))
            assert inner.reason == "the end of the reader of its output"
            assert outer.reason is None
        assert isinstance(getattr(sys, name), Unread)
        monkeypatch.setattr(sys, name, io.StringIO())


@pytest.mark.parametrize(("processes", "cores"), [(None, 8), ("1", 8), ("3", 2), ("100", 1)])
def test_processes_share_the_cores(monkeypatch, processes, cores):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: range(8), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    if processes:
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
    assert count_own_cores() == cores


def read_kernels() -> dict[str, object]:
    """What torch's kernels are chosen by."""
    return {
        "tf32": (torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32),
        "benchmark": torch.backends.cudnn.benchmark,
        "deterministic": (torch.are_deterministic_algorithms_enabled(), torch.backends.cudnn.deterministic),
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


@pytest.mark.parametrize("tf32", [False, True])
@pytest.mark.parametrize("benchmark", [False, True])
@pytest.mark.parametrize("deterministic", [False, True])
def test_kernels_are_chosen_for_the_time_of_a_run(monkeypatch, tf32, benchmark, deterministic):
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    before = read_kernels()
    with (
        pytest.raises(ZeroDivisionError),
        configure_kernels(tf32=tf32, cudnn_benchmark=benchmark, deterministic=deterministic),
    ):
        assert read_kernels() == {
            "tf32": (tf32, tf32),
            "benchmark": benchmark and not deterministic,
            "deterministic": (deterministic, deterministic),
            "workspace": ":4096:8" if deterministic else None,
        }
        raise ZeroDivisionError
    assert read_kernels() == before


def test_a_workspace_that_is_given_stays(monkeypatch):
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":16:8")
    with configure_kernels(tf32=True, cudnn_benchmark=True, deterministic=True):
        assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"


def test_hosts_count_by_gloo_whatever_the_devices_use(monkeypatch):
    """Not on the device: that would have to finish its work first."""
    made = []
    monkeypatch.setattr(torch.distributed, "get_backend", lambda world: world)
    monkeypatch.setattr(torch.distributed, "new_group", lambda *, backend: made.append(backend) or "a new group")
    for world, group in (("gloo", "gloo"), ("nccl", "a new group"), ("nccl", "a new group")):
        assert get_host_group(world) == group
    assert made == ["gloo"], "once"
    get_host_group.cache_clear()


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1", "SIGINT"])
def test_a_signal_is_noted_and_the_handlers_are_put_back(name):
    """Without its handler each of them would end this process, or raise here."""
    numbers = [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT]
    before = [signal.getsignal(number) for number in numbers]
    with StopRequests() as requests:
        assert all(signal.getsignal(number) == requests.handle_signal for number in numbers)
        signal.raise_signal(signal.Signals[name])
        assert requests.reason == name
    assert [signal.getsignal(number) for number in numbers] == before


def test_the_command_that_a_signal_stops_ends_with_75(images, tmp_path, monkeypatch, capsys):
    """By its schedulers' meaning: the same command goes on."""
    step = trainer.train_step

    def interrupted_step(*arguments):
        signal.raise_signal(signal.SIGTERM)
        step(*arguments)

    monkeypatch.setattr(trainer, "train_step", interrupted_step)
    options = {"--data-dir": images, "--image-size": 32, "--batch-size": 16, "--output-dir": tmp_path / "run"}
    arguments = [word for pair in options.items() for word in pair]
    with pytest.raises(SystemExit) as stop:
        call_command("train.py", "digits", "--data", "imagefolder", *arguments)
    assert stop.value.code == 75
    assert "stopped by SIGTERM at epoch 1, step 1 of 3: the checkpoint is written" in capsys.readouterr().err


def test_the_end_of_a_launcher_asks_to_stop(monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    requests = StopRequests()
    assert requests.reason is None
    monkeypatch.setattr(os, "getppid", lambda: 1)
    assert requests.reason == "the end of its launcher"
    monkeypatch.delenv("TORCHELASTIC_RUN_ID")
    assert StopRequests().reason is None
    monkeypatch.undo()
    assert StopRequests().reason is None, "without a launcher a parent may go, as a shell does under nohup"
