"""ImageNet's sets: how their folders lie, which classes they have, and what is refused."""

import json
import pkgutil
import warnings

import datasets
import pytest
from datasets import ClassLabel, Dataset, Features, Value
from helpers.imagenet import WORDNET_IDS, write_classes, write_image

from s3a.data.imagenet import SETS, find_corruption_folders, list_classes
from s3a.data.imagenet_images import load_imagenet, number_names

FEW = "ignore:.*the scores are of these alone"
pytestmark = pytest.mark.filterwarnings(FEW)


def read_rows(data):
    """File names and labels, in the order of the rows."""
    rows = data.val.read_rows(list(range(data.val.num_images)))
    return [(row.encoded.name, row.label) for row in rows]


@pytest.mark.parametrize(("name", "letter"), [("imagenet-a", "a"), ("imagenet-r", "r")])
def test_the_classes_of_a_set_are_those_that_timm_names(name, letter):
    synsets = pkgutil.get_data("timm.data", f"_info/imagenet_{letter}_synsets.txt").decode().split()
    assert len(synsets) == 200
    assert [WORDNET_IDS[number] for number in list_classes(name)] == synsets


@pytest.mark.parametrize("inside", ["", "imagenet-r"])
def test_a_folder_is_read_as_distributed_or_from_the_one_around_it(tmp_path, inside):
    names = ["n02056570", "n01443537"]  # in ImageNet-R; written in another order than ImageNet's
    write_classes(tmp_path / inside, names)
    (tmp_path / inside / "README.txt").write_text("read me")
    data = load_imagenet("imagenet-r", tmp_path)
    assert data.classes == list_classes("imagenet-r")
    number = {name: WORDNET_IDS.index(name) for name in names}
    assert read_rows(data) == [(f"{name}_{i}.jpg", number[name]) for name in sorted(names) for i in range(2)]


def test_folders_that_are_numbers_are_in_the_order_of_numbers(tmp_path):
    """As text 10 would come before 2, and class 2 would be taken for class 10."""
    write_classes(tmp_path / "imagenetv2-matched-frequency-format-val", ["10", "2", "0", "999", "100"], per_class=1)
    found = read_rows(load_imagenet("imagenet-v2", tmp_path))
    assert found == [(f"{number}_0.jpg", number) for number in (0, 2, 10, 100, 999)]


@pytest.mark.parametrize("inside", ["", "val", "validation"])
def test_the_validation_images_need_no_training_images(tmp_path, inside):
    write_classes(tmp_path / inside, WORDNET_IDS[:3], per_class=1)
    assert [label for _, label in read_rows(load_imagenet("imagenet", tmp_path))] == [0, 1, 2]


def test_images_of_some_classes_are_taken_alone(tmp_path):
    write_classes(tmp_path, WORDNET_IDS[:9], per_class=1)
    data = load_imagenet("imagenet", tmp_path, classes=list_classes("imagenet-a"))
    assert [label for _, label in read_rows(data)] == [6]  # 11 is the next of ImageNet-A
    assert data.classes == list_classes("imagenet-a")


@pytest.mark.parametrize("loose", [False, True])
def test_real_labels_go_by_the_names_of_the_files(tmp_path, loose):
    known = json.loads(pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json"))
    without = known.index([]) + 1
    several = next(number for number, labels in enumerate(known, 1) if len(labels) > 1)
    for number, wordnet_id in ((several, WORDNET_IDS[7]), (without, WORDNET_IDS[7]), (3, WORDNET_IDS[2])):
        name = f"ILSVRC2012_val_{number:08d}.JPEG"
        write_image(tmp_path / name if loose else tmp_path / "val" / wordnet_id / name, number)
    data = load_imagenet("imagenet-real", tmp_path)
    numbers = [int(name[15:23]) for name, _ in read_rows(data)]
    assert {*numbers} == {3, several}
    assert data.real_labels == [known[number - 1] for number in numbers]
    assert data.has_labels == (not loose)
    if not loose:
        assert [label for _, label in read_rows(data)] == [{3: 2, several: 7}[number] for number in numbers]


def test_a_set_that_is_not_whole_is_said_to_be(tmp_path):
    write_classes(tmp_path, ["n01498041"])
    with pytest.warns(UserWarning, match=r"ImageNet-A has 7,500 images and .* has 2: the scores are of these alone"):
        load_imagenet("imagenet-a", tmp_path)
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("error")
        patch.setitem(SETS, "imagenet-a", SETS["imagenet-a"].__class__("ImageNet-A", 2, (), "imagenet_a_indices.txt"))
        load_imagenet("imagenet-a", tmp_path)


def write_nothing(folder):
    folder.mkdir()


def write_empty_class(folder):
    (folder / "val" / "n01440764").mkdir(parents=True)


@pytest.mark.parametrize(
    ("name", "write", "said"),
    [
        ("imagenet-a", lambda folder: None, "does not exist: it must hold a folder for each class"),
        ("imagenet-a", write_nothing, "has no class folders, nor a folder imagenet-a of them"),
        ("imagenet-a", lambda folder: write_classes(folder, ["n01498041", "cats"]), "'cats' of .* none of the 200"),
        ("imagenet-a", lambda folder: write_classes(folder, ["n01440764"]), "'n01440764' of .* is none of the 200"),
        ("imagenet", lambda folder: write_classes(folder, ["0", "n01440764"]), "'0' and 'n01440764' of .* one class"),
        ("imagenet-v2", lambda folder: write_classes(folder, ["7", "1000"]), "'1000' of .* is none of the 1,000"),
        (
            "imagenet",
            lambda folder: (folder / "val" / "n01440764").mkdir(parents=True),
            "no images in its class folders",
        ),
        ("imagenet-real", lambda folder: write_classes(folder, ["n01440764"]), "is not called ILSVRC2012_val_00000001"),
        (
            "imagenet-real",
            lambda folder: write_image(folder / "ILSVRC2012_val_00050001.JPEG", 0),
            "is not called ILSVRC2012_val_00000001",
        ),
    ],
)
def test_other_folders_are_refused(tmp_path, name, write, said):
    write(tmp_path / "data")
    with pytest.raises((ValueError, FileNotFoundError), match=said) as refused:
        load_imagenet(name, tmp_path / "data")
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize("around", ["", "ImageNet-C", "noise"])
def test_corruptions_are_found_where_their_archives_are_unpacked(tmp_path, around):
    for severity in range(1, 6):
        write_image(tmp_path / around / "fog" / str(severity) / "n01440764" / "a.JPEG", severity)
    found = find_corruption_folders(tmp_path, ["snow", "fog"])
    assert found == {("fog", severity): tmp_path / around / "fog" / str(severity) for severity in range(1, 6)}


def test_corruptions_of_other_sets_are_left_alone(tmp_path):
    for around in ("Tiny-ImageNet-C", "imagenet-c"):
        for severity in range(1, 6):
            write_image(tmp_path / around / "fog" / str(severity) / "n01440764" / "a.JPEG", severity)
    found = find_corruption_folders(tmp_path, ["fog"])
    assert {path.parent.parent.name for path in found.values()} == {"imagenet-c"}


def test_a_corruption_without_a_severity_is_refused(tmp_path):
    for severity in (1, 2, 4, 5):
        write_image(tmp_path / "fog" / str(severity) / "n01440764" / "a.JPEG", severity)
    with pytest.raises(FileNotFoundError, match="fog has no folder 3"):
        find_corruption_folders(tmp_path, ["fog"])


# --------------------------------------------------------------------------------------------------------
# The Hub
# --------------------------------------------------------------------------------------------------------


def make_repository(folder, labels, feature, tmp_path, label="label", split="test"):
    """A dataset repository of one split, whose images come from files."""
    images = []
    for index in range(len(labels)):
        path = write_image(tmp_path / "images" / f"ILSVRC2012_val_{index + 1:08d}.JPEG", index)
        images.append({"bytes": path.read_bytes(), "path": path.name})
    features = Features({"image": datasets.Image(), label: feature})
    rows = Dataset.from_dict({"image": images, label: labels}, features)
    (folder / "data").mkdir(parents=True)
    rows.to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")
    return str(folder)


A_NAMES = ["stingray", "goldfinch, Carduelis carduelis"]  # ImageNet's numbers 6 and 11


@pytest.mark.parametrize(
    ("labels", "feature"),
    [
        ([1, 0, 1], ClassLabel(names=A_NAMES)),
        ([1, 0, 1], ClassLabel(names=["n01498041", "n01531178"])),
        ([1, 0, 1], ClassLabel(names=["n01498041 stingray", "n01531178 goldfinch"])),
        ([11, 6, 11], Value("int64")),
        ([0, 1, 0], ClassLabel(names=["11", "6"])),
        (["n01531178", "n01498041", "n01531178"], Value("string")),
    ],
)
def test_labels_of_the_hub_are_numbered_as_in_imagenet(tmp_path, labels, feature):
    repository = make_repository(tmp_path / "hub", labels, feature, tmp_path)
    data = load_imagenet("imagenet-a", dataset=repository)
    rows = data.val.read_rows([0, 1, 2])
    assert [row.label for row in rows] == [11, 6, 11]
    assert [row.encoded["path"] for row in rows] == [f"ILSVRC2012_val_{i:08d}.JPEG" for i in (1, 2, 3)]


def test_real_labels_of_the_hub_go_by_the_names_within_its_rows(tmp_path):
    known = json.loads(pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json"))
    repository = make_repository(tmp_path / "hub", [5, 6, 7], Value("int64"), tmp_path, split="validation")
    assert load_imagenet("imagenet-real", dataset=repository).real_labels == [each for each in known[:3] if each]


@pytest.mark.parametrize(
    ("labels", "feature", "said"),
    [
        ([7], Value("int64"), "has the label 7 without a name: it must be one of the 200 numbers"),
        ([0], ClassLabel(names=["tench, Tinca tinca"]), "'tench, Tinca tinca', which is none of the 200 classes"),
        (["n01440764"], Value("string"), "'n01440764', which is none of the 200 classes"),
    ],
)
def test_labels_of_other_classes_are_refused(tmp_path, labels, feature, said):
    repository = make_repository(tmp_path / "hub", labels, feature, tmp_path)
    with pytest.raises(ValueError, match=said):
        load_imagenet("imagenet-a", dataset=repository)


def test_two_classes_of_one_name_are_told_apart_by_the_order_alone():
    info = pkgutil.get_data("timm.data", "_info/imagenet_synset_to_lemma.txt").decode().splitlines()
    words = dict(line.split("\t") for line in info)
    names = [words[wordnet_id] for wordnet_id in WORDNET_IDS]
    assert names[134] == names[517] == "crane"
    assert number_names(names, range(1000), "these") == list(range(1000))
    with pytest.raises(ValueError, match="'crane', which is 2 of the 1,000 classes"):
        number_names(names[:200], range(1000), "these")


@pytest.mark.parametrize("given", [{}, {"data_dir": "here", "dataset": "there"}])
def test_a_set_is_in_one_place(given):
    with pytest.raises(ValueError, match="needs --data-dir DIR, with its class folders, or --dataset ORG/NAME"):
        load_imagenet("imagenet-a", **given)
