"""Repositories of the Hub: found by the types of their columns; what is missing is said in one line."""

import json
import re
import shutil

import pytest
from datasets import Value
from datasets.exceptions import DatasetNotFoundError
from helpers.numbered_images import NAMES, check_numbers, make_dataset, show_number

import s3a.data.hub
from s3a.data import EvalLoader, TrainLoader, load_data

NUM_TRAIN, NUM_VAL = 31, 11


def make_repository(folder, split="validation", described=True, **features):
    """A folder as a dataset repository is: parquet files, and a card that says what they hold."""
    counts = {"train": NUM_TRAIN, split: NUM_VAL}
    for name, numbers in (("train", range(NUM_TRAIN)), (split, range(NUM_TRAIN, NUM_TRAIN + NUM_VAL))):
        rows = make_dataset(numbers).rename_columns({"image": "picture", "label": "species"})
        for column, feature in features.items():
            rows = rows.cast_column(column, feature)
        (folder / "data").mkdir(parents=True, exist_ok=True)
        rows.to_parquet(folder / "data" / f"{name}-00000-of-00001.parquet")
    if described:
        card = {"dataset_info": {"splits": [{"name": name, "num_examples": n} for name, n in counts.items()]}}
        (folder / "README.md").write_text(f"---\n{json.dumps(card)}\n---\n")
    return folder


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_repository_is_loaded_by_the_types_of_its_columns(tmp_path, streaming, split):
    repository = make_repository(tmp_path / "birds", split)
    data = load_data("hub", dataset=str(repository), streaming=streaming)
    assert data.label_names == NAMES
    check_numbers(data, NUM_TRAIN, NUM_VAL)
    assert data.val.name_of(3) == "row 3 of val"


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_streamed_repository_gives_every_worker_its_share(tmp_path, num_workers):
    data = load_data("hub", dataset=str(make_repository(tmp_path / "birds")), streaming=True)
    loader = TrainLoader(data.train, show_number, channels=3, batch_size=5, seed=0, num_workers=num_workers)
    for epoch in range(2):
        numbers = [int(number) for [batch] in loader.epoch(epoch) for number in batch.images.flatten()]
        assert len({*numbers}) == 30
    batches = EvalLoader(data.val, show_number, channels=3, batch_size=2, num_workers=num_workers)
    assert [int(n) for batch in batches for n in batch.images.flatten()] == [*range(NUM_TRAIN, NUM_TRAIN + NUM_VAL)]


def test_a_streamed_repository_keeps_nothing_behind(tmp_path):
    data = load_data("hub", dataset=str(make_repository(tmp_path / "birds")), streaming=True)
    loader = TrainLoader(data.train, show_number, channels=3, batch_size=10, seed=0, process_index=1, num_processes=2)
    list(loader.epoch(0))
    assert not loader._loader.dataset.batches.images._walk.kept


def test_labels_without_names_are_counted_where_they_can_be(tmp_path):
    repository = str(make_repository(tmp_path / "birds", species=Value("int16")))
    data = load_data("hub", dataset=repository)
    assert data.label_names == ["0", "1", "2"]
    check_numbers(data, NUM_TRAIN, NUM_VAL)
    with pytest.raises(ValueError, match=r"'species' of .* numbers without names.*leave --streaming out"):
        load_data("hub", dataset=repository, streaming=True)


def test_a_stream_of_unknown_length_is_refused(tmp_path):
    repository = str(make_repository(tmp_path / "birds", described=False))
    with pytest.raises(ValueError, match="does not say how many images 'train' has"):
        load_data("hub", dataset=repository, streaming=True)
    assert load_data("hub", dataset=repository).train.num_images == NUM_TRAIN


def test_a_missing_split_of_a_repository_is_named(tmp_path):
    repository = make_repository(tmp_path / "birds", described=False)
    (repository / "data" / "validation-00000-of-00001.parquet").unlink()
    with pytest.raises(ValueError, match="has the splits train: for val it must have one called validation or val"):
        load_data("hub", dataset=str(repository))


def test_an_unknown_configuration_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"'large' not found.*ORG/NAME:CONFIG"):
        load_data("hub", dataset=f"{make_repository(tmp_path / 'birds')}:large")


def test_a_configuration_is_named_behind_a_colon(monkeypatch):
    asked = []
    monkeypatch.setattr(s3a.data.hub, "load_dataset_builder", lambda *names: asked.append(names) or 1 / 0)
    for dataset in ("org/birds", "org/birds:large"):
        with pytest.raises(ZeroDivisionError):
            load_data("hub", dataset=dataset)
    assert asked == [("org/birds", None), ("org/birds", "large")]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (
            DatasetNotFoundError("Dataset 'org/birds' is a gated dataset on the Hub. You must be authenticated."),
            "--dataset org/birds is gated: accept its terms at https://huggingface.co/datasets/org/birds, then log in",
        ),
        (
            DatasetNotFoundError("Dataset 'org/birds' doesn't exist on the Hub or cannot be accessed."),
            "--dataset org/birds is not on the Hub, or is private: check the name",
        ),
        (
            ConnectionError("Couldn't reach 'org/birds' on the Hub\n(LocalEntryNotFoundError)"),
            "--dataset org/birds is not in the cache and the Hub cannot be reached (Couldn't reach 'org/birds' on the "
            "Hub (LocalEntryNotFoundError))",
        ),
        (FileNotFoundError("Couldn't find any data file"), "--dataset org/birds has no files that datasets can load"),
    ],
)
def test_what_is_out_of_reach_is_said_in_one_line(monkeypatch, error, message):
    def fail(*_):
        raise error

    monkeypatch.setattr(s3a.data.hub, "load_dataset_builder", fail)
    with pytest.raises(FileNotFoundError, match=re.escape(message)) as raised:
        load_data("hub", dataset="org/birds")
    assert "\n" not in str(raised.value)


def test_fingerprints_change_with_a_repository(tmp_path):
    repository = str(make_repository(tmp_path / "birds"))
    first = load_data("hub", dataset=repository).fingerprint
    assert load_data("hub", dataset=repository, streaming=True).fingerprint == first
    shutil.copy(
        tmp_path / "birds" / "data" / "train-00000-of-00001.parquet", tmp_path / "birds" / "data" / "train-1.parquet"
    )
    (tmp_path / "birds" / "README.md").unlink()
    assert load_data("hub", dataset=repository).fingerprint != first
