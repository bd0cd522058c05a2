"""recipes/segment.py and recipes/detect.py as real processes, and every recipe of theirs that has a name."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from helpers.dense_runs import get_dense_signal, make_driver, write_ade20k, write_many_classes
from helpers.real_runs import MOMENTS, ROOT, kill_at_random, read_metrics, read_weights, run_command, run_ranks
from safetensors.torch import load_file

from s3a.training.named_recipes import DETECTION_RECIPES, SEGMENTATION_RECIPES

TABLES = {"segment": SEGMENTATION_RECIPES, "detect": DETECTION_RECIPES}
SIDE = 128


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """COCO and ADE20K, with few images."""
    folder = tmp_path_factory.mktemp("data")
    return {"coco": write_many_classes(folder / "coco"), "ade20k": write_ade20k(folder / "ade20k")}


# --------------------------------------------------------------------------------------------------------
# Every named recipe
# --------------------------------------------------------------------------------------------------------


def list_options(command: str, name: str, data: dict[str, Path]) -> list[str]:
    """What makes a recipe quick: two small images a step, no weights and workers; of detectors few proposals.

    With 512 samples of an image a step of the cascade computes a minute on two cores.
    """
    recipe = TABLES[command][name]()
    options = ["--weights", "None", "--batch-size", "2", "--num-workers", "0", "--cpu-threads", "1"]
    options += ["--warmup-steps", "2"]  # the run has few
    options += ["--data-dir", str(data[recipe.data])] if recipe.data in data else []
    if command == "segment":
        return [*options, "--image-size", str(SIDE)]
    options += ["--num-proposals", "100", "--num-samples", "16"]
    return [*options, "--short-sides", str(SIDE), "--long-side", str(2 * SIDE)]


def list_recipes() -> list[object]:
    """All named recipes. The first of those that differ by the size of the model is slow, the others are exhaustive."""
    seen: set[str] = set()
    recipes: list[object] = []
    for command, table in TABLES.items():
        for name in table:
            kind = re.sub("_(tiny|small|medium|base|large)_", "_", name)
            mark = pytest.mark.exhaustive if kind in seen else pytest.mark.slow
            recipes.append(pytest.param(command, name, marks=mark))
            seen.add(kind)
    return recipes


@pytest.mark.parametrize(("command", "name"), list_recipes())
def test_a_named_recipe_takes_steps_stops_and_goes_on(tmp_path, data, command, name):
    """Full-size models, on small images."""
    folder = tmp_path / "run"
    options = [name, *list_options(command, name, data), "--output-dir", str(folder)]
    for times, step in ((3, 3), (1, 4)):
        ended = get_dense_signal(command, "training.trainer:forward_backward", times, signal.SIGTERM, *options)
        assert ended.returncode == 75, ended.stderr
        assert f"stopped by SIGTERM at epoch 1, step {step} of" in ended.stderr
    assert f"resuming {folder} after epoch 0 of" in ended.stderr
    assert ", at step 3 of" in ended.stderr
    [*_, newest] = sorted((folder / "checkpoints").iterdir())
    assert all(tensor.isfinite().all() for tensor in load_file(newest / "tensors.safetensors").values())
    shutil.rmtree(folder)


# --------------------------------------------------------------------------------------------------------
# Real processes that die, get signals, or are two
# --------------------------------------------------------------------------------------------------------


def make_small_options(command: str, folder: Path, data: dict[str, Path], **changes: str) -> list[str]:
    """A run of some epochs of three steps with everything that could break a resume."""
    options = {
        "epochs": "8",
        "warmup_steps": "4",
        "batch_size": "4",
        "num_workers": "1",
        "drop_path": "0.2",
        "ema_decay": "0.9",
        "horizontal_flip": "0.5",
        "checkpoint_every": "2",
        "cpu_threads": "1",
        "pyramid_dim": "16",
        "output_dir": str(folder),
    }
    if command == "segment":
        options |= {"data": "ade20k", "data_dir": str(data["ade20k"]), "image_size": "64", "head_dim": "16"}
    else:
        options |= {"data": "coco", "data_dir": str(data["coco"]), "short_sides": "64", "long_side": "96"}
        options |= {"steps": "None", "box_dim": "32", "mask_convs": "1", "num_proposals": "20", "num_samples": "8"}
    pairs = (options | changes).items()
    return [word for name, value in pairs for word in (f"--{name.replace('_', '-')}", value)]


def compare_runs(folder: Path, other: Path) -> None:
    """Asserts that two runs ended with the same bytes."""
    assert set(read_weights(folder)) == {"model", "best", "ema", "ema-best"}
    assert read_weights(folder) == read_weights(other)
    assert read_metrics(folder) == read_metrics(other)


@pytest.mark.parametrize("kills", MOMENTS)
@pytest.mark.parametrize("command", TABLES)
def test_random_kills_change_no_byte(tmp_path, data, command, kills):
    killed, whole = (
        make_small_options(command, tmp_path / name, data, epochs="16", num_workers="0") for name in ("killed", "whole")
    )
    line = [sys.executable, f"recipes/{command}.py"]
    ended = run_command([*line, *whole])
    assert ended.returncode == 0, ended.stderr
    kill_at_random([*line, *killed], tmp_path / "killed", kills, seconds=2.5)
    ended = run_command([*line, *killed])
    assert ended.returncode == 0, ended.stderr
    compare_runs(tmp_path / "killed", tmp_path / "whole")
    if command == "detect":
        predictions = [(tmp_path / name / "predictions.json").read_bytes() for name in ("killed", "whole")]
        assert predictions[0] == predictions[1]


LAUNCHERS = {
    "python": [sys.executable],
    "accelerate": [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "1", "--num_machines", "1"],
}


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
@pytest.mark.parametrize("command", TABLES)
def test_sigterm_ends_with_a_checkpoint_and_status_75(tmp_path, data, command, launcher):
    """To the whole process group, as terminals and schedulers send it. `accelerate launch` has a status of its own."""
    options = make_small_options(command, tmp_path / "run", data, epochs="500", num_workers="0")
    line = [*LAUNCHERS[launcher], f"recipes/{command}.py", *options]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true", "PYTHONPATH": str(ROOT)}
    log = tmp_path / "said.txt"
    with log.open("w") as output:
        process = subprocess.Popen(line, cwd=ROOT, env=environment, stderr=output, start_new_session=True)
    deadline = time.monotonic() + 300
    while "epoch   1:" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGTERM)
    status = process.wait(60)
    if launcher == "python":
        assert status == 75
    while "the checkpoint is written" not in log.read_text() and time.monotonic() < deadline:
        time.sleep(0.05)  # the launcher is gone before its process
    assert "stopped by SIGTERM at epoch" in log.read_text()
    assert "Traceback" not in log.read_text()
    assert list((tmp_path / "run" / "checkpoints").glob("step-*"))


@pytest.mark.slow
@pytest.mark.parametrize("command", TABLES)
def test_two_processes_train_as_one_and_go_on_as_if_never_stopped(tmp_path, data, command):
    """As one up to rounding, since the images are of one size. A signal to one of them stops both."""
    alone, whole, stopped = (
        make_small_options(command, tmp_path / name, data, epochs="2", num_workers="0")
        for name in ("alone", "whole", "stopped")
    )
    script = f"recipes/{command}.py"
    driver = ["-c", make_driver(command), "training.trainer:forward_backward", "4", str(int(signal.SIGTERM)), "1"]
    for count, arguments, status in (
        (1, [script, *alone], 0),
        (2, [script, *whole], 0),
        (2, [*driver, *stopped], 75),
        (2, [script, *stopped], 0),
    ):
        ended = run_ranks(count, *arguments, ACCELERATE_USE_CPU="true")
        assert [each.returncode for each in ended] == [status] * count, ended[0].stderr
    compare_runs(tmp_path / "stopped", tmp_path / "whole")
    first, other = (read_metrics(tmp_path / name)[0]["train_loss"] for name in ("alone", "whole"))
    assert other == pytest.approx(first, rel=1e-3)
