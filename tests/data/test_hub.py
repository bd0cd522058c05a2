"""Repositories of the Hub: found by the types of their columns; what is missing is said in one line."""

import json
import re
import shutil
from contextlib import nullcontext

import datasets
import httpx2
import numpy as np
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from datasets.exceptions import DatasetNotFoundError
from helpers.hub_server import STRANGER, TOKEN
from helpers.numbered_images import NAMES, check_numbers, encode_number, make_dataset, show_number

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
    assert data.val.name_of(3) == (f"row 3 of {split}-00000-of-00001.parquet" if streaming else "row 3 of val")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_streamed_repository_gives_every_worker_its_share(tmp_path, num_workers):
    data = load_data("hub", dataset=str(make_repository(tmp_path / "birds")), streaming=True)
    loader = TrainLoader(data.train, show_number, channels=3, batch_size=5, seed=0, num_workers=num_workers)
    for epoch in range(2):
        numbers = [int(number) for [batch] in loader.epoch(epoch) for number in batch.images.flatten()]
        assert len({*numbers}) == 30
    batches = list(EvalLoader(data.val, show_number, channels=3, batch_size=2, num_workers=num_workers))
    numbers = [int(n) for batch in batches for n in batch.images[batch.indices >= 0].flatten()]
    assert numbers == [*range(NUM_TRAIN, NUM_TRAIN + NUM_VAL)]


def test_labels_without_names_are_counted_where_they_can_be(tmp_path):
    repository = str(make_repository(tmp_path / "birds", species=Value("int16")))
    data = load_data("hub", dataset=repository)
    assert data.label_names == ["0", "1", "2"]
    check_numbers(data, NUM_TRAIN, NUM_VAL)
    with pytest.raises(ValueError, match=r"'species' of .* numbers without names.*leave --streaming out"):
        load_data("hub", dataset=repository, streaming=True)


def test_a_repository_with_coarse_and_fine_labels_has_the_fine_ones(tmp_path):
    """As that of CIFAR-100 has them, coarse ones last; a stream is not looked through for it."""
    repository = make_repository(tmp_path / "birds")
    for path in (repository / "data").glob("*.parquet"):
        rows = Dataset.from_parquet(str(path))
        coarse = [min(label, 1) for label in rows["species"]]
        rows.add_column("coarse", coarse, feature=ClassLabel(names=["cat", "other"])).to_parquet(path)
    data = load_data("hub", dataset=str(repository))
    assert data.label_names == NAMES
    check_numbers(data, NUM_TRAIN, NUM_VAL)
    with pytest.raises(ValueError, match=r"2 label columns \(species, coarse\): .* --data hub without --streaming"):
        load_data("hub", dataset=str(repository), streaming=True)


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
def test_what_is_out_of_reach_is_said_in_one_line(hub, monkeypatch, error, message):
    """Also where the Hub let it be read at first."""

    def fail(*_):
        raise error

    hub.publish("org/birds", {})
    monkeypatch.setattr(s3a.data.hub, "load_dataset_builder", fail)
    with pytest.raises(FileNotFoundError, match=re.escape(message)) as raised:
        load_data("hub", dataset="org/birds")
    assert "\n" not in str(raised.value)


# --------------------------------------------------------------------------------------------------------
# Over the network
# --------------------------------------------------------------------------------------------------------


def fail_to_connect(error):
    """A session whose requests fail with the error."""

    class Session:
        def request(self, **options):
            raise error

    return Session


@pytest.mark.parametrize(
    ("rights", "token", "words"),
    [
        ({"gated": True}, None, ["is gated: accept its terms at https://huggingface.co/datasets/", "hf auth login"]),
        ({"gated": True}, STRANGER, ["the account that is logged in has no access: accept its terms at https://hugg"]),
        (
            {"disabled": True},
            TOKEN,
            ["is disabled by the Hub: https://huggingface.co/datasets/ILSVRC/imagenet-1k"],
        ),
        ({"private": True}, STRANGER, ["is not on the Hub, or is private: check the name, or log in"]),
        (
            {},
            "hf_unknown",
            ["the Hub does not know the token (401): log in with hf auth login again, or unset HF_TOKEN"],
        ),
    ],
)
def test_what_the_hub_refuses_is_answered_after_one_request(hub, monkeypatch, rights, token, words):
    hub.publish("ILSVRC/imagenet-1k", {"README.md": b""}, **rights)
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    check_answer(words + ([] if "private" in rights else ["(more than 150 GB)", "--data imagefolder", "--streaming"]))
    assert hub.requests == ["GET /api/datasets/ILSVRC/imagenet-1k/auth-check"]


@pytest.mark.parametrize(("status", "requests"), [(403, 1), (407, 1), (429, 4), (503, 4)])
def test_a_status_in_place_of_an_answer_is_said(hub, monkeypatch, status, requests):
    """At once where it will not change, and after a few requests where the Hub is busy."""
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    hub.failing = status
    check_answer([f"answers {status}", "--data imagefolder --data-dir DIR", "(more than 150 GB)", "it is gated, too"])
    assert len(hub.requests) == requests


def test_a_hub_that_was_busy_for_a_moment_is_no_obstacle(hub, monkeypatch):
    hub.publish("org/birds", {"README.md": b""})
    hub.failing = 503

    def recover(seconds: float) -> None:
        hub.failing = None

    monkeypatch.setattr("time.sleep", recover)
    assert s3a.data.hub.find_obstacle("org/birds") is None
    assert len(hub.requests) == 2


@pytest.mark.parametrize(
    "error",
    [
        httpx2.ConnectError("[Errno -2] Name or service not known"),
        httpx2.ConnectTimeout("timed out"),
        httpx2.ProxyError("403 Forbidden"),
    ],
)
def test_a_network_that_is_not_there_is_said_without_another_try(hub, monkeypatch, error):
    monkeypatch.setattr("huggingface_hub.utils._http.get_session", fail_to_connect(error))
    check_answer([f"the Hub cannot be reached ({error}): check the network", "--data imagefolder --data-dir DIR"])
    assert hub.requests == []


def test_nothing_is_asked_offline(hub, monkeypatch):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    check_answer(["HF_HUB_OFFLINE or HF_DATASETS_OFFLINE forbids to ask the Hub: unset it"])
    assert hub.requests == []


def check_answer(words):
    """ImageNet is refused in one line with all the words, and datasets may ask again afterwards."""
    before = datasets.config.HF_HUB_OFFLINE
    with pytest.raises(FileNotFoundError) as refusal:
        load_data("hub", dataset="ILSVRC/imagenet-1k")
    assert all(word in str(refusal.value) for word in words), refusal.value
    assert "\n" not in str(refusal.value)
    assert before == datasets.config.HF_HUB_OFFLINE


def test_a_copied_repository_needs_no_network_and_no_token(hub, tmp_path, monkeypatch):
    folder = make_repository(tmp_path / "birds")
    files = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*.*")}
    hub.publish("org/birds", files, gated=True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    copied = load_data("hub", dataset="org/birds")
    streamed = load_data("hub", dataset="org/birds", streaming=True)
    check_numbers(streamed, NUM_TRAIN, NUM_VAL)
    hub.requests.clear()
    monkeypatch.delenv("HF_TOKEN")
    for prepare in (nullcontext, hub.down):
        with prepare():
            again = load_data("hub", dataset="org/birds")
            with pytest.raises(FileNotFoundError, match="--dataset org/birds is"):
                load_data("hub", dataset="org/birds", streaming=True)
        check_numbers(again, NUM_TRAIN, NUM_VAL)
        assert again.fingerprint == copied.fingerprint
    assert {*hub.requests} == {"GET /api/datasets/org/birds/auth-check"}


def test_two_processes_of_three_workers_are_sent_every_byte_once(hub, tmp_path):
    """In pieces, from the servers of the Hub; labels, sizes and names come before, from little."""
    noise = np.random.default_rng(0)
    features = Features(image=datasets.Image(), label=ClassLabel(names=NAMES))
    counts, files = {"train": 6, "validation": 1}, {}
    for split, num_shards in counts.items():
        for shard in range(num_shards):
            images = [{"bytes": encode_number(row) + noise.bytes(64_000), "path": None} for row in range(60)]
            rows = Dataset.from_dict({"image": images, "label": [row % 3 for row in range(60)]}, features)
            rows.to_parquet(tmp_path / "shard.parquet", batch_size=20)
            files[f"data/{split}-{shard:05d}-of-{num_shards:05d}.parquet"] = (tmp_path / "shard.parquet").read_bytes()
    splits = [{"name": name, "num_examples": 60 * count, "num_bytes": 0} for name, count in counts.items()]
    hub.publish(
        "org/birds", files | {"README.md": f"---\n{json.dumps({'dataset_info': {'splits': splits}})}\n---\n".encode()}
    )
    size = sum(len(content) for name, content in files.items() if "train" in name)
    before = hub.num_sent
    images = load_data("hub", dataset="org/birds", streaming=True).train
    assert hub.num_sent - before < 0.01 * size
    options = {"channels": 3, "batch_size": 12, "seed": 0, "num_processes": 2, "num_workers": 3}
    loaders = [TrainLoader(images, show_number, process_index=index, **options) for index in range(2)]
    before = hub.num_sent
    indices = [index for loader in loaders for [batch] in loader.epoch(0) for index in batch.indices.tolist()]
    assert sorted(indices) == list(range(360))
    assert size * 0.95 < hub.num_sent - before < size * 1.05


def test_another_configuration_than_that_of_the_cache_needs_the_hub(hub, monkeypatch):
    """datasets finds one configuration there, and calls the other one unknown."""
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)

    def find_no_configuration(*names):
        raise ValueError("Couldn't find cache for org/birds for config 'big'")

    monkeypatch.setattr(s3a.data.hub, "load_dataset_builder", find_no_configuration)
    with pytest.raises(FileNotFoundError, match="--dataset org/birds:big is not in the cache, and HF_HUB_OFFLINE"):
        load_data("hub", dataset="org/birds:big")


def test_a_mirror_that_cannot_be_asked_is_read(hub, monkeypatch):
    """Old servers have no endpoint that says what a token may read."""
    asked = []
    monkeypatch.setattr(s3a.data.hub, "load_dataset_builder", lambda *names: asked.append(names) or 1 / 0)
    monkeypatch.setattr(hub, "failing", 404)
    with pytest.raises(ZeroDivisionError):
        load_data("hub", dataset="org/birds")
    assert asked == [("org/birds", None)]


def test_copying_draws_no_bars_in_a_log(tmp_path, capsys):
    load_data("hub", dataset=str(make_repository(tmp_path / "birds")))
    capsys.readouterr()
    shutil.rmtree(datasets.config.HF_DATASETS_CACHE)
    load_data("hub", dataset=str(tmp_path / "birds"))
    assert "Generating" not in capsys.readouterr().err
    assert not datasets.are_progress_bars_disabled()


def test_fingerprints_change_with_a_repository(tmp_path):
    repository = str(make_repository(tmp_path / "birds"))
    first = load_data("hub", dataset=repository).fingerprint
    assert load_data("hub", dataset=repository, streaming=True).fingerprint == first
    shutil.copy(
        tmp_path / "birds" / "data" / "train-00000-of-00001.parquet", tmp_path / "birds" / "data" / "train-1.parquet"
    )
    (tmp_path / "birds" / "README.md").unlink()
    assert load_data("hub", dataset=repository).fingerprint != first
