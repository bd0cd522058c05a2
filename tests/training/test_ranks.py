"""What each of two processes does in one run: facts that a run compared with another run does not show."""

import json
import socket
from pathlib import Path

import pytest
from helpers.fork_server import CONTEXT
from helpers.ranks import STOP_AFTER, take_part

from s3a.training.recipe import Recipe


@pytest.fixture(scope="module")
def facts(images: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict, dict]:
    """What two processes saw in a run of accumulated steps, which a signal to the second of them ends."""
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
    processes = [CONTEXT.Process(target=take_part, args=(rank, port, recipe)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0, 0]
    first, second = (json.loads((folder / f"rank-{rank}.json").read_text()) for rank in range(2))
    return first, second


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
