"""What each of two processes does in one run: facts that a run compared with another run does not show."""

import dataclasses
import json
import os
import shutil
import socket
from pathlib import Path

import pytest
from accelerate.state import AcceleratorState
from helpers.ranks import STOP_AFTER, resume_apart, start_pair, take_part

from s3a.training import trainer
from s3a.training.recipe import ClassificationRecipe


@pytest.fixture(scope="module")
def facts(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """What two processes saw in a run of accumulated steps, which a signal to the second of them ends."""
    folder = tmp_path_factory.mktemp("ranks")
    recipe = ClassificationRecipe(
        model="ssvit_nano",
        data="imagefolder",
        data_dir=images,
        image_size=32,
        batch_size=16,
        accumulate=2,
        epochs=2,
        learning_rate=4e-3,
        sync_batch_norm=False,
        cpu_threads=1,
        output_dir=folder / "run",
    )
    assert start_pair(take_part, recipe) == [0, 0]
    first, second = (json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2))
    return first, second


def test_gradients_are_synchronised_in_the_last_micro_batch_alone(facts):
    for seen in facts:
        assert seen["synchronised"] == [False, True] * (STOP_AFTER + 1)


def test_gradients_are_summed_where_they_lie_and_statistics_are_not_sent_in_every_step(facts):
    for seen in facts:
        assert seen["wrapping"] == {"gradient_as_bucket_view": True, "broadcast_buffers": False}


def test_graphs_are_not_cut_where_gradients_are_sent(facts):
    """Dynamo would cut a block of more than a MiB of parameters; a region is one graph."""
    assert all(seen["cuts_graphs"] is False for seen in facts)


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
    """Where batch norms have statistics of their own in training."""
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


# --------------------------------------------------------------------------------------------------------
# Machines that share no folder
# --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shared(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[ClassificationRecipe, Path]:
    """A recipe, and its folder with checkpoints after the first and the second step."""
    recipe = ClassificationRecipe(
        model="ssvit_nano",
        data="imagefolder",
        data_dir=images,
        image_size=32,
        batch_size=16,
        epochs=2,
        learning_rate=4e-3,
        cpu_threads=1,
        output_dir=tmp_path_factory.mktemp("shared") / "run",
    )
    AcceleratorState._reset_state(reset_partial_state=True)
    run = trainer.build_run(recipe)
    with run.lock:
        for step in (1, 2):
            trainer.save(run, trainer.Progress(step=step))
    return recipe, recipe.output_dir


def begin_apart(
    shared: tuple[ClassificationRecipe, Path], tmp_path: Path, change_other
) -> tuple[list[dict], list[Path]]:
    """What two processes do that have a copy of the folder each, of which the second one's is changed."""
    recipe, folder = shared
    folders = [shutil.copytree(folder, tmp_path / f"machine-{rank}" / "run") for rank in range(2)]
    change_other(folders)
    recipes = [dataclasses.replace(recipe, output_dir=folder) for folder in folders]
    assert start_pair(resume_apart, recipes, tmp_path / "report") == [0, 0]
    return [json.loads((tmp_path / f"report.{rank}").read_text()) for rank in range(2)], folders


def drop_all(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints")


def drop_newest(folder: Path) -> None:
    shutil.rmtree(folder / "checkpoints" / "step-000000002-epoch-00000")


def alter_newest(folder: Path) -> None:
    """Another run's, as it were: whole, and not the same."""
    newest, older = (folder / "checkpoints" / f"step-00000000{step}-epoch-00000" for step in (2, 1))
    shutil.rmtree(newest)
    shutil.copytree(older, newest)


@pytest.mark.parametrize("change", [drop_all, drop_newest, alter_newest])
def test_a_process_that_cannot_read_the_checkpoint_of_the_main_one_ends_both(shared, tmp_path, change):
    seen, folders = begin_apart(shared, tmp_path, lambda folders: change(folders[1]))
    assert seen[1] == {"status": 2}
    message = seen[0]["error"]
    assert f"process 1 on {socket.gethostname()} cannot read {folders[1]}/checkpoints/step-000000002" in message
    assert "all machines must share" in message
    assert "\n" not in message


def test_a_process_that_has_a_checkpoint_alone_begins_as_the_main_one(shared, tmp_path):
    seen, _ = begin_apart(shared, tmp_path, lambda folders: drop_all(folders[0]))
    assert (seen[0]["epoch"], seen[0]["step"]) == (0, 0)
    assert seen[0] == seen[1]


def test_all_processes_go_on_from_the_checkpoint_of_the_main_one(shared, tmp_path):
    """Not from a newer one that another has, as a disk does that was slow to show a deletion."""
    seen, _ = begin_apart(shared, tmp_path, lambda folders: drop_newest(folders[0]))
    assert (seen[0]["epoch"], seen[0]["step"]) == (0, 1)
    assert seen[0] == seen[1]


def test_where_every_checkpoint_of_the_main_process_is_damaged_both_end(shared, tmp_path):
    def damage(folders: list[Path]) -> None:
        for path in (folders[0] / "checkpoints").glob("*/tree.json"):
            os.truncate(path, 10)

    seen, folders = begin_apart(shared, tmp_path, damage)
    assert f"every checkpoint in {folders[0]}/checkpoints is damaged" in seen[0]["error"]
    assert seen[1] == {"status": 2}


def test_where_the_main_process_cannot_write_both_end(shared, tmp_path):
    """The other one would wait for it."""
    recipe, _ = shared
    recipes = [dataclasses.replace(recipe, output_dir=tmp_path / "run")] * 2
    assert start_pair(resume_apart, recipes, tmp_path / "report", True) == [0, 0]
    seen = [json.loads((tmp_path / f"report.{rank}").read_text()) for rank in range(2)]
    assert "No space left on device" in seen[0]["error"]
    assert seen[1] == {"status": 2}


def test_processes_with_other_images_are_refused(shared, tmp_path):
    recipe, _ = shared
    images = shutil.copytree(recipe.data_dir, tmp_path / "images")
    next((images / "train").glob("*/*")).unlink()
    recipes = [
        dataclasses.replace(recipe, output_dir=tmp_path / "run", data_dir=folder)
        for folder in (recipe.data_dir, images)
    ]
    assert start_pair(resume_apart, recipes, tmp_path / "report") == [0, 0]
    seen = [json.loads((tmp_path / f"report.{rank}").read_text()) for rank in range(2)]
    assert f"process 1 on {socket.gethostname()} has 47 and 18 images" in seen[0]["error"]
    assert "the main one 48 and 18" in seen[0]["error"]
    assert seen[1] == {"status": 2}
    assert not (tmp_path / "run").exists()
