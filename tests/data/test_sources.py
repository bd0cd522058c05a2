"""Sources: the right images with the right labels from each, and one line where something is missing."""

import gzip
import io
import json
import re
import shutil
import tarfile
from typing import get_args

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import sklearn.datasets
import torch
from datasets import ClassLabel, Dataset, Features, Value
from datasets.exceptions import DatasetNotFoundError
from helpers.image_folder import make_image_folder
from helpers.numbered_images import (
    NAMES,
    NUM_CLASSES,
    add_noise,
    encode_number,
    make_dataset,
    make_images,
    show_number,
    write_shards,
)
from sklearn.model_selection import train_test_split
from timm.data import create_transform

import s3a.data.hub
from s3a.data import EvalLoader, Source, TrainLoader, load_data
from s3a.data.local import FASHION_MNIST_FOLDER
from s3a.data.sources import SOURCES
from s3a.data.webdataset import split_key

NUM_TRAIN, NUM_VAL = 31, 11
IMAGE = encode_number(0)


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    """Datasets' copies do not outlive a test."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


@pytest.fixture
def image_folder(tmp_path):
    return make_image_folder(tmp_path / "images")


def evaluated(images, transform=show_number):
    """Everything a split shows, in order: image tensors, labels, unreadable names."""
    batches = list(EvalLoader(images, transform, channels=3, batch_size=8))
    names = [name for batch in batches for name in batch.unreadable]
    return torch.cat([batch.images for batch in batches]), torch.cat([batch.labels for batch in batches]), names


def assert_numbered(data, num_train=NUM_TRAIN, num_val=NUM_VAL):
    """Both splits hold the images that `numbered_images` writes, in its order."""
    for images, start, count in ((data.train, 0, num_train), (data.val, num_train, num_val)):
        pixels, labels, unreadable = evaluated(images)
        assert images.num_images == count
        assert pixels.flatten().tolist() == [*range(start, start + count)]
        assert labels.tolist() == [number % NUM_CLASSES for number in range(start, start + count)]
        assert not unreadable


def array_of(image):
    return torch.from_numpy(np.asarray(image).copy())


# --------------------------------------------------------------------------------------------------------
# Digits and Fashion-MNIST
# --------------------------------------------------------------------------------------------------------


def test_digits_are_those_of_scikit_learn():
    data, source = load_data("digits"), sklearn.datasets.load_digits()
    assert data.label_names == [str(digit) for digit in range(10)]
    parts = train_test_split(np.arange(1797), test_size=360, random_state=0)
    for images, part in zip((data.train, data.val), parts, strict=True):
        loader = EvalLoader(images, array_of, channels=1, batch_size=100)
        assert torch.cat([batch.labels for batch in loader]).tolist() == source.target[part].tolist()
        expected = np.round(source.images[part] * 255 / 16).astype(np.uint8)
        assert np.array_equal(torch.cat([batch.images for batch in loader]), expected)


def write_idx(folder, num_train=12, num_val=5, ending=".gz"):
    """Fashion-MNIST's files, small: image i is full of i."""
    folder.mkdir(parents=True, exist_ok=True)
    pack = gzip.compress if ending else bytes
    start = 0
    for name, count in (("train", num_train), ("t10k", num_val)):
        numbers = np.arange(start, start + count, dtype=np.uint8)
        images = np.array([0x803, count, 28, 28], ">u4").tobytes() + numbers.repeat(28 * 28).tobytes()
        labels = np.array([0x801, count], ">u4").tobytes() + (numbers % 10).tobytes()
        (folder / f"{name}-images-idx3-ubyte{ending}").write_bytes(pack(images))
        (folder / f"{name}-labels-idx1-ubyte{ending}").write_bytes(pack(labels))
        start += count
    return folder


@pytest.mark.parametrize("ending", [".gz", ""])
def test_fashion_mnist_is_read_from_idx_files(tmp_path, ending):
    data = load_data("fashion-mnist", write_idx(tmp_path, ending=ending))
    assert data.label_names[:2] == ["T-shirt/top", "Trouser"]
    for images, start, count in ((data.train, 0, 12), (data.val, 12, 5)):
        [batch] = EvalLoader(images, array_of, channels=1, batch_size=100)
        assert batch.images.shape == (count, 28, 28)
        assert batch.images[:, 3, 4].tolist() == [*range(start, start + count)]
        assert batch.labels.tolist() == [i % 10 for i in range(start, start + count)]


def test_fashion_mnist_is_found_where_debian_puts_it(tmp_path, monkeypatch):
    monkeypatch.setattr(s3a.data.local, "FASHION_MNIST_FOLDER", write_idx(tmp_path))
    assert load_data("fashion-mnist").train.num_images == 12
    assert str(FASHION_MNIST_FOLDER) == "/usr/share/datasets/fashion-mnist"


def test_fashion_mnist_that_is_absent_says_where_to_get_it(tmp_path, monkeypatch):
    monkeypatch.setattr(s3a.data.local, "FASHION_MNIST_FOLDER", tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="apt install dataset-fashion-mnist"):
        load_data("fashion-mnist")


@pytest.mark.parametrize("damage", [lambda content: content[:-9], lambda content: b"no gzip", lambda content: b""])
def test_damaged_idx_files_are_named(tmp_path, damage):
    path = write_idx(tmp_path) / "train-images-idx3-ubyte.gz"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"train-images-idx3-ubyte\.gz .*damaged"):
        load_data("fashion-mnist", tmp_path)


def test_idx_files_that_do_not_belong_together_are_named(tmp_path):
    write_idx(tmp_path)
    shutil.copy(tmp_path / "t10k-labels-idx1-ubyte.gz", tmp_path / "train-labels-idx1-ubyte.gz")
    with pytest.raises(ValueError, match="do not belong together"):
        load_data("fashion-mnist", tmp_path)


# --------------------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------------------


def test_image_folder_has_classes_and_labels(image_folder):
    data = load_data("imagefolder", image_folder)
    assert data.label_names == ["dark", "light"]
    assert (data.train.num_images, data.val.num_images) == (48, 18)
    pixels, labels, _ = evaluated(data.val, array_of)
    assert ((pixels.float().mean((1, 2, 3)) > 120).long() == labels).all()
    assert data.val.name_of(17) == str(image_folder / "val" / "light" / "008.jpg")


def test_an_image_that_is_cut_off_is_named_by_its_path(image_folder):
    path = image_folder / "val" / "light" / "003.jpg"
    path.write_bytes(path.read_bytes()[:-100])
    _, labels, unreadable = evaluated(load_data("imagefolder", image_folder).val, create_transform((3, 32, 32)))
    assert unreadable == [str(path)]
    assert labels.tolist() == [0] * 9 + [1, 1, 1, -1, 1, 1, 1, 1, 1]


def test_images_in_deeper_folders_belong_to_their_class(image_folder):
    deeper = image_folder / "train" / "light" / "more"
    deeper.mkdir()
    (image_folder / "train" / "light" / "000.jpg").rename(deeper / "000.jpg")
    (image_folder / "train" / "light" / "metadata.csv").write_text("file_name,label\n")
    data = load_data("imagefolder", image_folder)
    assert data.label_names == ["dark", "light"]
    assert evaluated(data.train, array_of)[1].tolist().count(1) == 24


def test_names_with_brackets_and_spaces_are_fine(image_folder):
    data = load_data("imagefolder", image_folder.rename(image_folder.with_name("a [b] ü")))
    assert data.train.num_images == 48
    assert not evaluated(data.train, array_of)[2]


def test_a_missing_folder_is_named(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere' does not exist.*train/CLASS"):
        load_data("imagefolder", tmp_path / "nowhere")


@pytest.mark.parametrize("split", ["train", "val"])
def test_a_missing_split_is_named(image_folder, split):
    shutil.rmtree(image_folder / split)
    with pytest.raises(FileNotFoundError, match=f"no folder '{split}'"):
        load_data("imagefolder", image_folder)


@pytest.mark.parametrize("split", ["train", "val"])
def test_an_empty_split_is_named(image_folder, split):
    shutil.rmtree(image_folder / split)
    (image_folder / split / "dark").mkdir(parents=True)
    with pytest.raises(FileNotFoundError, match=f"{split}' has no images"):
        load_data("imagefolder", image_folder)


@pytest.mark.parametrize(("split", "other"), [("val", "train"), ("train", "val")])
def test_a_class_missing_from_a_split_is_named(image_folder, split, other):
    shutil.rmtree(image_folder / split / "light")
    with pytest.raises(ValueError, match=rf"class light of .*{other} has no images in .*{split}"):
        load_data("imagefolder", image_folder)


def test_a_class_folder_without_images_is_named(image_folder):
    shutil.rmtree(image_folder / "val" / "light")
    (image_folder / "val" / "light").mkdir()
    with pytest.raises(ValueError, match=r"class light of .*train has no images in .*val"):
        load_data("imagefolder", image_folder)


# --------------------------------------------------------------------------------------------------------
# Shards
# --------------------------------------------------------------------------------------------------------

SHARDS = [("parquet", "parquet"), ("webdataset", "tar")]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("source", "kind"), SHARDS)
def test_shards_hold_what_was_written(tmp_path, source, kind, streaming):
    data = load_data(source, write_shards(tmp_path, kind, NUM_TRAIN, NUM_VAL), streaming=streaming)
    assert data.label_names == ["0", "1", "2"]
    assert_numbered(data)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("source", "kind"), SHARDS)
def test_shards_train_alike_with_any_workers(tmp_path, source, kind, streaming):
    data = load_data(source, write_shards(tmp_path, kind, NUM_TRAIN, NUM_VAL), streaming=streaming)
    options = {"channels": 3, "batch_size": 10, "seed": 1}
    seen = [
        torch.cat([batch.images for [batch] in TrainLoader(data.train, add_noise, num_workers=n, **options).epoch(0)])
        for n in (0, 2)
    ]
    assert torch.equal(*seen)
    assert len(seen[0].unique(dim=0)) == 30


@pytest.mark.parametrize(("source", "kind"), SHARDS)
def test_augmentation_is_the_same_streamed_or_not(tmp_path, source, kind):
    write_shards(tmp_path, kind, NUM_TRAIN, NUM_VAL)
    seen = []
    for streaming in (False, True):
        loader = TrainLoader(
            load_data(source, tmp_path, streaming=streaming).train, add_noise, channels=3, batch_size=31, seed=1
        )
        [[batch]] = loader.epoch(3)
        seen.append(batch.images[batch.indices.argsort()])
    assert torch.equal(*seen)


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize(("source", "kind"), SHARDS)
def test_unreadable_images_of_shards_are_named(tmp_path, source, kind, streaming):
    write_shards(tmp_path, kind, NUM_TRAIN, NUM_VAL, broken=(20,))
    _, labels, unreadable = evaluated(load_data(source, tmp_path, streaming=streaming).train)
    assert (labels < 0).nonzero().flatten().tolist() == [20]
    assert [name.split(" (")[0] for name in unreadable] == ["row 20 of train"]
    if streaming or kind == "tar":
        assert unreadable[0].endswith(f"(row 5 of train-0002.{kind})")


@pytest.mark.parametrize("name", ["validation", "val", "valid", "test"])
@pytest.mark.parametrize(("source", "kind"), SHARDS)
def test_the_held_out_split_goes_by_several_names(tmp_path, source, kind, name):
    folder = write_shards(tmp_path, kind, NUM_TRAIN, NUM_VAL)
    (folder / "val").rename(folder / name)
    assert load_data(source, folder, streaming=True).val.num_images == NUM_VAL
    (folder / name / f"0.{kind}").rename(folder / f"{name}-00000-of-00001.{kind}")
    assert load_data(source, folder, streaming=True).val.num_images == NUM_VAL


@pytest.mark.parametrize(("source", "kind"), SHARDS)
def test_classes_are_named_by_a_file(tmp_path, source, kind):
    write_shards(tmp_path, kind, NUM_TRAIN, NUM_VAL)
    (tmp_path / "classes.txt").write_text("cat\ndog\nhorned owl\n")
    assert load_data(source, tmp_path, streaming=True).label_names == ["cat", "dog", "horned owl"]
    (tmp_path / "classes.txt").write_text("cat\ndog\n")
    with pytest.raises(ValueError, match=r"10 images of train .* no label of the 2 classes, the first is row 2 with 2"):
        load_data(source, tmp_path, streaming=True)


@pytest.mark.parametrize("split", ["train", "val"])
@pytest.mark.parametrize(("source", "kind"), SHARDS)
def test_missing_shards_are_named(tmp_path, source, kind, split):
    write_shards(tmp_path, kind, NUM_TRAIN, NUM_VAL)
    for path in (*tmp_path.glob(f"{split}*.{kind}"), *tmp_path.glob(f"{split}/*")):
        path.unlink()
    with pytest.raises(FileNotFoundError, match=f"has no {kind} shards of '{split}'"):
        load_data(source, tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere' does not exist"):
        load_data(source, tmp_path / "nowhere")


@pytest.mark.parametrize(("source", "kind"), SHARDS)
@pytest.mark.parametrize("damage", [lambda content: b"neither", lambda content: content[: len(content) // 2 + 100]])
def test_damaged_shards_are_named(tmp_path, source, kind, damage):
    path = write_shards(tmp_path, kind, NUM_TRAIN, NUM_VAL) / f"train-0001.{kind}"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"train-0001.{kind} is no \w+ .*that can be read"):
        load_data(source, tmp_path)


@pytest.mark.parametrize("rows_at_once", [1, 3, 7])
def test_parquet_streams_in_chunks_of_any_size(tmp_path, monkeypatch, rows_at_once):
    monkeypatch.setattr(s3a.data.parquet, "ROWS_AT_ONCE", rows_at_once)
    images = load_data("parquet", write_shards(tmp_path, "parquet", NUM_TRAIN, NUM_VAL), streaming=True).train
    for process in range(3):
        loader = TrainLoader(
            images, show_number, channels=3, batch_size=30, seed=0, process_index=process, num_processes=3
        )
        [[batch]] = loader.epoch(0)
        assert batch.images.flatten().tolist() == batch.indices.tolist()


def test_parquet_by_datasets_keeps_the_names_of_classes(tmp_path):
    for split, numbers in (("train", range(NUM_TRAIN)), ("test", range(NUM_TRAIN, NUM_TRAIN + NUM_VAL))):
        make_dataset(numbers).to_parquet(tmp_path / f"{split}-00000-of-00001.parquet")
    for streaming in (False, True):
        data = load_data("parquet", tmp_path, streaming=streaming)
        assert data.label_names == NAMES
        assert_numbered(data)


def parquet_with(tmp_path, **columns):
    for split in ("train", "val"):
        pq.write_table(pa.table(columns), tmp_path / f"{split}.parquet")
    return tmp_path


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"image": [IMAGE]}, "has no label column"),
        ({"label": [1]}, "has no image column"),
        ({"image": [IMAGE], "fine": [1], "coarse": [0]}, r"has 2 label columns \(fine, coarse\)"),
        (
            {"left": [IMAGE], "right": [IMAGE], "label": [1]},
            r"has 2 image columns \(left, right\)",
        ),
        ({"image": [IMAGE], "label": pa.array([None], pa.int64())}, "has no images|no label of the"),
        ({"image": [IMAGE] * 2, "label": [0, -1]}, "first is row 1 with -1"),
        ({"image": pa.array([], pa.binary()), "label": pa.array([], pa.int64())}, "has no images"),
    ],
)
def test_columns_that_do_not_fit_are_refused(tmp_path, columns, message):
    with pytest.raises(ValueError, match=message):
        load_data("parquet", parquet_with(tmp_path, **columns), streaming=True)


def test_of_several_columns_the_one_called_label_is_taken(tmp_path):
    folder = parquet_with(tmp_path, image=[IMAGE] * 2, width=[2, 2], label=[0, 1])
    assert load_data("parquet", folder, streaming=True).label_names == ["0", "1"]


def test_classes_numbered_otherwise_in_the_other_split_are_refused(tmp_path):
    for split, names in (("train", ["cat", "dog"]), ("val", ["dog", "cat"])):
        features = Features(image=datasets.Image(), label=ClassLabel(names=names))
        cells = [{"bytes": IMAGE, "path": None}]
        Dataset.from_dict({"image": cells, "label": [0]}, features).to_parquet(tmp_path / f"{split}.parquet")
    with pytest.raises(ValueError, match="both splits must number the same classes alike"):
        load_data("parquet", tmp_path, streaming=True)


def write_members(path, members):
    with tarfile.open(path, "w") as tar:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))


@pytest.mark.parametrize(
    ("members", "message"),
    [
        (
            [("0.png", IMAGE), ("1.png", IMAGE), ("1.cls", b"0")],
            r"train.tar: 0 has the files png",
        ),
        ([("0.cls", b"0")], r"train.tar: 0 has the files cls: it must have one image"),
        ([("0.png", IMAGE), ("0.jpg", IMAGE), ("0.cls", b"0")], "must have one image"),
        ([("0.png", IMAGE), ("0.cls", b"0")] * 2, "has the files png, cls, png, cls"),
        ([("0.png", IMAGE), ("0.cls", b"dog")], "has the label b'dog'"),
        ([("0.png", IMAGE), ("0.cls", b"-1")], "has the label b'-1'"),
    ],
)
def test_samples_that_are_not_whole_are_named(tmp_path, members, message):
    for split in ("train", "val"):
        write_members(tmp_path / f"{split}.tar", members)
    with pytest.raises(ValueError, match=message):
        load_data("webdataset", tmp_path)


@pytest.mark.parametrize(
    ("member", "expected"),
    [
        ("0001.jpg", ("0001", "jpg")),
        ("a.b/0001.JPEG", ("a.b/0001", "jpeg")),
        ("0001.left.png", ("0001", "left.png")),
        ("folder.v2/README", ("folder.v2/README", "")),
    ],
)
def test_file_names_are_cut_as_webdataset_does(member, expected):
    assert split_key(member) == expected


# --------------------------------------------------------------------------------------------------------
# The Hub
# --------------------------------------------------------------------------------------------------------


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
    assert_numbered(data)
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
    assert_numbered(data)
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


# --------------------------------------------------------------------------------------------------------
# Names, options, fingerprints
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "options", "message"),
    [
        ("image-folder", {}, "did you mean 'imagefolder'"),
        ("imagefolder", {}, "--data imagefolder needs --data-dir DIR, a folder with train/CLASS"),
        ("webdataset", {}, r"needs --data-dir DIR, a folder with train\*.tar"),
        ("digits", {"data_dir": "pictures"}, "--data-dir is 'pictures' but the digits .* --data imagefolder"),
        ("hub", {"data_dir": "pictures", "dataset": "a/b"}, "--data-dir is 'pictures' but"),
        ("hub", {}, "needs --dataset ORG/NAME"),
        ("digits", {"dataset": "org/birds"}, "--dataset is 'org/birds' but --data is digits: use --data hub"),
        ("digits", {"streaming": True}, "--streaming is for --data hub, parquet, webdataset"),
    ],
)
def test_options_that_do_not_fit_the_source_are_refused(source, options, message):
    with pytest.raises(ValueError, match=message):
        load_data(source, **options)


def test_every_source_can_be_named_in_a_recipe():
    assert set(get_args(Source)) == set(SOURCES)


def test_fingerprints_are_stable(tmp_path):
    assert load_data("digits").fingerprint == load_data("digits").fingerprint
    assert re.fullmatch("[0-9a-f]{64}", load_data("digits").fingerprint)
    folder = make_image_folder(tmp_path / "images")
    before = load_data("imagefolder", folder).fingerprint
    assert load_data("imagefolder", folder.rename(tmp_path / "elsewhere")).fingerprint == before


def test_fingerprints_change_with_a_folder(image_folder):
    seen = {load_data("imagefolder", image_folder).fingerprint}
    (image_folder / "val" / "dark" / "000.png").rename(image_folder / "val" / "dark" / "100.png")
    seen.add(load_data("imagefolder", image_folder).fingerprint)
    (image_folder / "train" / "dark" / "000.png").rename(image_folder / "train" / "light" / "000.png")
    seen.add(load_data("imagefolder", image_folder).fingerprint)
    (image_folder / "train" / "dark" / "001.png").write_bytes(b"longer or shorter")
    seen.add(load_data("imagefolder", image_folder).fingerprint)
    assert len(seen) == 4


@pytest.mark.parametrize(("source", "kind"), SHARDS)
def test_fingerprints_change_with_shards(tmp_path, source, kind):
    def fingerprint(streaming=True):
        return load_data(source, tmp_path, streaming=streaming).fingerprint

    write_shards(tmp_path, kind, NUM_TRAIN, NUM_VAL)
    first = fingerprint()
    assert fingerprint(streaming=False) == first
    (tmp_path / "classes.txt").write_text("cat\ndog\nowl\n")
    second = fingerprint()
    write_shards(tmp_path, kind, NUM_TRAIN + 30, NUM_VAL)
    assert len({first, second, fingerprint()}) == 3


def test_fingerprints_change_with_a_repository(tmp_path):
    repository = str(make_repository(tmp_path / "birds"))
    first = load_data("hub", dataset=repository).fingerprint
    assert load_data("hub", dataset=repository, streaming=True).fingerprint == first
    shutil.copy(
        tmp_path / "birds" / "data" / "train-00000-of-00001.parquet", tmp_path / "birds" / "data" / "train-1.parquet"
    )
    (tmp_path / "birds" / "README.md").unlink()
    assert load_data("hub", dataset=repository).fingerprint != first


def test_what_is_named_by_row_says_the_split():
    assert make_images(4, split="val").name_of(3) == "row 3 of val"
