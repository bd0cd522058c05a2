"""Runs on a stream: they go on exactly with as many readers, and say what they do with others."""

import dataclasses
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import timm
from helpers.image_folder import CLASSES
from helpers.real_runs import read_metrics, read_weights

import s3a.data.stream
from s3a.data import load_data
from s3a.data.images import DataError
from s3a.training import trainer
from s3a.training.build import build_run
from s3a.training.evaluation import evaluate, evaluate_weights
from s3a.training.tasks.classification import Classification
from s3a.training.trainer import train


@pytest.fixture(scope="module")
def shards(images: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The images of the folder in four and two parquet files."""
    folder = tmp_path_factory.mktemp("shards")
    for split, count in (("train", 4), ("val", 2)):
        paths = sorted((images / split).glob("*/*"))
        for shard in range(count):
            rows = paths[shard::count]
            table = {
                "image": [path.read_bytes() for path in rows],
                "label": [[*CLASSES].index(path.parent.name) for path in rows],
            }
            pq.write_table(pa.table(table), folder / f"{split}-{shard}.parquet")
    return folder


@pytest.fixture
def streamed(digits_recipe, shards):
    """Two epochs of six steps, with everything that could break a resume."""
    return dataclasses.replace(
        digits_recipe,
        data="parquet",
        data_dir=shards,
        streaming=True,
        epochs=2,
        batch_size=8,
        repeats=2,
        mixup=0.8,
        random_erasing=0.3,
        ema_decay=0.9,
        checkpoint_every="1",
    )


def interrupt(recipe, monkeypatch, step: int) -> None:
    """Ends a run hard in the middle of a step, counted from 1."""
    forward_backward, calls = trainer.forward_backward, []

    def end_hard(*args):
        calls.append(args)
        if len(calls) == step:
            raise KeyboardInterrupt
        return forward_backward(*args)

    with monkeypatch.context() as context:
        context.setattr(trainer, "forward_backward", end_hard)
        with pytest.raises(KeyboardInterrupt):
            train(recipe)


@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_a_stream_that_was_killed_ends_with_the_same_bytes(streamed, tmp_path, monkeypatch, capsys, num_workers):
    monkeypatch.setattr(s3a.data.stream, "SHUFFLE_ROWS", 7)
    recipe = dataclasses.replace(streamed, num_workers=num_workers)
    for step in (4, 5):
        interrupt(recipe, monkeypatch, step)
    train(recipe)
    assert "at step 1 of 6" in capsys.readouterr().err
    train(dataclasses.replace(recipe, output_dir=tmp_path / "whole"))
    assert set(read_weights(tmp_path / "run")) == {"model", "best", "ema", "ema-best"}
    assert read_weights(tmp_path / "run") == read_weights(tmp_path / "whole")
    assert read_metrics(tmp_path / "run") == read_metrics(tmp_path / "whole")


def test_other_readers_go_on_and_say_what_is_seen_again(streamed, monkeypatch, capsys):
    interrupt(streamed, monkeypatch, 10)  # in the second epoch, behind three steps of six
    capsys.readouterr()
    train(dataclasses.replace(streamed, num_workers=3))
    said = capsys.readouterr().err
    assert "the stream was read by 1 x 1 readers, and now by 1 x 3 (of each process)" in said
    assert "epoch 2 may show images again that its first 50% had" in said
    assert [line["epoch"] for line in read_metrics(streamed.folder)] == [1, 2]


def test_between_epochs_other_readers_change_nothing(streamed, monkeypatch, capsys):
    interrupt(dataclasses.replace(streamed, checkpoint_every=None), monkeypatch, 8)
    capsys.readouterr()
    train(dataclasses.replace(streamed, num_workers=2))
    assert "the stream was read by" not in capsys.readouterr().err


def test_workers_without_shards_are_said(streamed, capsys):
    train(dataclasses.replace(streamed, num_workers=9, epochs=1, warmup_epochs=0))
    said = capsys.readouterr().err
    assert "train has 4 shards for 1 process: 4 of --num-workers 9 can read; write 9 or more to use all" in said


def test_images_that_can_be_read_in_any_order_have_no_place(recipe):
    assert build_run(recipe).train_loader.state_dict() == {}


def test_a_split_with_other_images_than_it_said_is_refused(streamed, shards, tmp_path):
    run = build_run(streamed)
    run.val_loader.num_images += 1
    with pytest.raises(DataError, match=r"^val has 18 images, and had 19 when it was loaded: .* put those back"):
        trainer.validate(run, trainer.Progress(), run.bare_model)


def test_a_split_with_other_images_than_a_card_says_is_scored(streamed):
    run = build_run(streamed)
    run.val_loader.num_images, run.val_loader.is_counted = 17, False
    with pytest.warns(UserWarning, match=r"^val has 18 images, and its card says 17: those that it has were scored"):
        found = evaluate(run.bare_model, run.task, run.val_loader, run.accelerator)
    assert found.images == 18


def test_workers_without_shards_are_said_by_an_evaluation(shards):
    data = load_data("parquet", shards, streaming=True)
    model = timm.create_model("ssvit_nano", num_classes=2)
    with pytest.warns(UserWarning, match=r"^val has 2 shards for 1 process: 2 of --num-workers 3 can read; write 3 or"):
        found = evaluate_weights(model, Classification(data), batch_size=8, num_workers=3)
    assert found.images == 18
