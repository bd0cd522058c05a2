"""What each of two processes does in one run: facts that a run compared with another run does not show."""

import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import socket
import time
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from s3a.support.errors import Interrupted
from s3a.training import build, trainer
from s3a.training.recipe import Recipe

STOP_AFTER = 3  # optimizer steps, which are an epoch


@pytest.fixture(scope="module")
def facts(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """What two forked processes saw in a run of accumulated steps, which a signal to the second of them ends."""
    folder = tmp_path_factory.mktemp("ranks")
    recipe = Recipe(
        model="ssvit_nano",
        data="imagefolder",
        data_dir=images,
        image_size=32,
        batch_size=16,
        accumulate=2,
        epochs=2,
        learning_rate=4e-3,
        cpu_threads=1,
        output_dir=folder / "run",
    )
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    context = multiprocessing.get_context("fork")  # which has imported everything
    processes = [context.Process(target=take_part, args=(rank, port, recipe)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2))
    return first, second


def take_part(rank: int, port: int, recipe: Recipe) -> None:
    """Trains as the process of that rank, and writes what it saw."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    AcceleratorState._reset_state(reset_partial_state=True)
    folder, seen = recipe.output_dir.parent, watch(rank, recipe.output_dir.parent)
    try:
        trainer.train(recipe)
    except Interrupted as notice:
        seen["notice"] = str(notice)
    seen["checkpoints"] = sorted(path.name for path in (recipe.output_dir / "checkpoints").iterdir())
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


def watch(rank: int, folder: Path) -> dict:
    """Has this process note what it does in a run; it is forked, so nothing is put back."""
    names = ("synchronised", "draws", "own_losses", "losses", "weights", "own_statistics", "shared_statistics")
    seen = {name: [] for name in names}
    build_run, train_step, validate = trainer.build_run, trainer.train_step, trainer.validate
    exchange = trainer.exchange
    claim_folder, init_trackers = build.claim_folder, Accelerator.init_trackers

    def watched_build(*arguments):
        run = build_run(*arguments)
        return dataclasses.replace(run, compute_loss=watch_loss(run.compute_loss, seen))

    def watched_step(run, progress, batches):
        if rank == 1 and trainer.count_steps(run, progress) == STOP_AFTER:
            os.kill(os.getpid(), signal.SIGUSR1)
        train_step(run, progress, batches)
        seen["weights"].append(hash_tensors(run.bare_model.parameters()))
        seen["own_statistics"].append(hash_tensors(run.bare_model.buffers()))

    def watched_exchange(run, progress, loss_share, *rest):
        news = exchange(run, progress, loss_share, *rest)
        seen["own_losses"].append(loss_share.item())
        seen["losses"].append(news.loss)
        return news

    def watched_validation(run, progress, model):
        seen["shared_statistics"].append(hash_tensors(model.buffers()))
        return validate(run, progress, model)

    def slow_claim(recipe):
        """Waits for the other process to come by, which it must not."""
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline and not (folder / "passed-1").exists():
            time.sleep(0.01)
        seen["overtaken"] = (folder / "passed-1").exists()
        return claim_folder(recipe)

    def watched_trackers(*arguments, **options):
        (folder / f"passed-{rank}").touch()
        init_trackers(*arguments, **options)

    trainer.build_run, trainer.train_step, trainer.validate = watched_build, watched_step, watched_validation
    trainer.exchange = watched_exchange
    build.claim_folder, Accelerator.init_trackers = slow_claim, watched_trackers
    return seen


def watch_loss(compute_loss, seen):
    """The loss, which notes whether its gradient will be synchronised, and draws a number."""

    def watched_loss(model, batch):
        seen["synchronised"].append(model.require_backward_grad_sync)
        seen["draws"].append(torch.rand(()).item())
        return compute_loss(model, batch)

    return watched_loss


def hash_tensors(tensors: Iterable[torch.Tensor]) -> str:
    """A hash of the numbers in some tensors."""
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()


def test_gradients_are_synchronised_in_the_last_micro_batch_alone(facts):
    for seen in facts:
        assert seen["synchronised"] == [False, True] * (STOP_AFTER + 1)


def test_all_processes_have_the_same_weights_after_every_step(facts):
    first, second = facts
    assert first["weights"] == second["weights"]
    assert len(set(first["weights"])) == STOP_AFTER


def test_the_loss_of_a_step_is_the_mean_of_the_processes(facts):
    first, second = facts
    means = [(one + other) / 2 for one, other in zip(first["own_losses"], second["own_losses"], strict=True)]
    assert first["losses"] == second["losses"] == pytest.approx(means, rel=1e-6)


def test_every_process_draws_for_itself(facts):
    first, second = facts
    assert all(one != other for one, other in zip(first["draws"], second["draws"], strict=True))


def test_all_processes_validate_with_the_same_statistics(facts):
    first, second = facts
    assert first["own_statistics"][STOP_AFTER - 1] != second["own_statistics"][STOP_AFTER - 1], "each saw other images"
    assert first["shared_statistics"] == second["shared_statistics"] == first["own_statistics"][STOP_AFTER - 1 :][:1]


def test_the_main_process_claims_the_folder_before_the_others_go_on(facts):
    assert facts[0]["overtaken"] is False
    assert "overtaken" not in facts[1], "one alone claims it"


def test_a_signal_to_one_process_stops_both_after_the_same_step(facts):
    for seen, reason in zip(facts, ("another process", "SIGUSR1"), strict=True):
        assert seen["notice"].startswith(f"stopped by {reason} at epoch 2, step 1 of 3")
        assert seen["checkpoints"] == ["step-000000003-epoch-00001", "step-000000004-epoch-00001"]
