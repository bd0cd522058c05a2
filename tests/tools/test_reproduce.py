"""tools/reproduce.py: official checkpoints, found by what they hold, beside what the papers print."""

import dataclasses
import json
import math
import shutil
from argparse import Namespace

import pytest
import torch
from helpers import golden
from helpers.command_line import check_refused
from helpers.hub_server import TOKEN
from helpers.imagenet import WORDNET_IDS, make_classifier, write_classes
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

import s3a.training.evaluation
from s3a.data.imagenet import SETS
from s3a.published import PUBLISHED
from s3a.robustness.reproduction import (
    Measured,
    OfficialWeights,
    choose_sizes,
    compute_allowance,
    find_checkpoints,
    find_sets,
)
from s3a.weights.official import convert, find_key_table

pytestmark = pytest.mark.filterwarnings("ignore:.*the scores are of these alone")


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """As people have them after downloads: folders, names of their own, and files that are something else."""
    folder = tmp_path_factory.mktemp("downloads")
    (folder / "onedrive").mkdir()
    vvt = golden.official_state("tiny", "vvt")
    torch.save({"model": vvt, "epoch": 299, "args": Namespace(input_size=224)}, folder / "onedrive" / "best (1).pth")
    torch.save(golden.official_state("small", "svit"), folder / "b-384.pth")
    few = {**vvt, **{key: vvt[key][:10].clone() for key in ("head.weight", "head.bias")}}
    torch.save({"model": few}, folder / "cifar.pth")
    (folder / "page.pth").write_text("<html>log in</html>")
    torch.save({"model": {"weight": torch.ones(3)}}, folder / "other.pt")
    (folder / "readme.txt").write_text("read me")
    return folder


@pytest.fixture
def nanos(tmp_path):
    """Two checkpoints of small models under official keys, which are those of a large one as far as they go."""
    folder = tmp_path / "nanos"
    folder.mkdir()
    own = make_classifier("vvt_nano").state_dict()
    table = find_key_table("vvt_nano")
    shapes = golden.official_shapes("small", "vvt")
    names = {key: table.rename(key) for key in shapes if not table.drops(key)}
    state = {key: own[name] for key, name in names.items() if name in own}
    assert len(state) == len(own)
    torch.save(state, folder / "a.pth")
    torch.save({**state, "head.bias": state["head.bias"] + torch.arange(1000) % 7}, folder / "b.pth")
    return folder


def predict(name, family, size, side, crop_pct, paths):
    """The classes that a model with official weights gives images, by timm alone."""
    model = convert(golden.official_state(size, family), name, find_key_table(name))
    config = {**resolve_model_data_config(model), "input_size": (3, side, side), "crop_pct": crop_pct}
    transform = create_transform(**config, is_training=False)
    with torch.inference_mode():
        return model(torch.stack([transform(Image.open(path).convert("RGB")) for path in paths]))


@pytest.fixture
def imagenet(tmp_path):
    """Three validation images, of which the VVT takes the first for its class; and an ImageNet-A of two images."""
    paths = write_classes(tmp_path / "imagenet" / "val", WORDNET_IDS[:3], per_class=1)
    predicted = predict("vvt_tiny", "vvt", "tiny", 224, 0.875, paths[:1]).argmax(1).tolist()
    for path, number in zip(paths[:1], predicted, strict=True):
        (tmp_path / "imagenet" / "val" / WORDNET_IDS[number]).mkdir(exist_ok=True)
        path.rename(tmp_path / "imagenet" / "val" / WORDNET_IDS[number] / path.name)
    write_classes(tmp_path / "robustness" / "imagenet-a", ["n01498041", "n02007558"], per_class=1, seed=9)
    return tmp_path / "imagenet"


def run(command, checkpoints, imagenet, tmp_path, *options):
    return command(
        "reproduce", "--checkpoints", checkpoints, "--imagenet", imagenet, "--output-dir", tmp_path / "out", *options
    )


def read_table(out):
    """The lines of the printed table, by model and set."""
    lines = [line.split("  ") for line in out.splitlines() if "top-1" in line]
    cells = [[cell.strip() for cell in line if cell.strip()] for line in lines]
    return {(line[1], line[3]): line for line in cells}


@pytest.mark.slow
def test_every_checkpoint_is_measured_beside_its_paper(command, checkpoints, imagenet, tmp_path, monkeypatch):
    monkeypatch.setitem(SETS, "imagenet", dataclasses.replace(SETS["imagenet"], num_images=3))
    status, out, err = run(command, checkpoints, imagenet, tmp_path, "--robustness", tmp_path / "robustness")
    assert status == 0, err
    table = read_table(out)
    assert {*table} == {(m, f"ImageNet{s}, top-1") for m in ("vvt_tiny", "svit_small") for s in ("", "-A")}
    paths = sorted(imagenet.glob("val/*/*.jpg"))
    labels = torch.tensor([WORDNET_IDS.index(path.parent.name) for path in paths])
    for model, family, size, side, crop, published in (
        ("vvt_tiny", "vvt", "tiny", 224, 0.875, 79.2),
        ("svit_small", "svit", "small", 384, 1.0, 85.0),
    ):
        top1 = 100 * float((predict(model, family, size, side, crop, paths).argmax(1) == labels).float().mean())
        line = table[model, "ImageNet, top-1"]
        assert line[2:] == [
            str(side), "ImageNet, top-1", f"{top1:.2f}", f"{published}", f"{top1 - published:+.2f}",
            f"BEYOND ± {compute_allowance(3):.2f}",
        ]  # fmt: skip
        assert table[model, "ImageNet-A, top-1"][5:] == ["-", "-", "not published"]
    assert float(table["vvt_tiny", "ImageNet, top-1"][4]) >= 33
    assert all(
        f"{name}" in err for name in ("cifar.pth is vvt_tiny with 10 classes", "page.pth is no PyTorch", "other.pt")
    )

    folder = tmp_path / "out" / "weights" / "svit_small_384"
    config = json.loads((folder / "config.json").read_text())["pretrained_cfg"]
    assert (config["input_size"], config["crop_pct"]) == ([3, 384, 384], 1.0)
    card = (folder / "README.md").read_text()
    assert "b-384.pth" in card and PUBLISHED["svit_small"].source in card
    assert "| ImageNet, top-1 |" in card and "| ImageNet-A, top-1 |" not in card  # that set is not whole

    def fail(*arguments, **options):
        raise AssertionError("everything is measured")

    monkeypatch.setattr(s3a.training.evaluation, "evaluate_weights", fail)
    again = run(command, checkpoints, imagenet, tmp_path, "--robustness", tmp_path / "robustness")
    assert again[:2] == (0, out)


def test_a_stopped_call_goes_on(command, nanos, tmp_path, monkeypatch):
    """Weights that were measured are not measured again."""
    write_classes(tmp_path / "val", WORDNET_IDS[:2])
    measured = []
    original = s3a.training.evaluation.evaluate_weights

    def stop_at_second(model, task, **options):
        measured.append(float(model.head.bias.detach().sum()))
        if len(measured) == 2:
            options["stop"] = lambda: "a test"
        return original(model, task, **options)

    monkeypatch.setattr(s3a.training.evaluation, "evaluate_weights", stop_at_second)
    status, out, err = run(command, nanos, tmp_path, tmp_path)
    assert (status, out) == (75, "")
    assert "stopped by a test" in err
    status, out, err = run(command, nanos, tmp_path, tmp_path)
    assert status == 0
    assert len(measured) == 3
    assert measured[1] == measured[2] != measured[0]


def test_weights_of_the_other_size_are_not_kept(command, nanos, tmp_path, monkeypatch):
    """A checkpoint that does not say its image size leaves the folder of the size that was chosen."""
    published = dataclasses.replace(PUBLISHED["vvt_tiny"], top1={64: 0.0, 96: 100.0})
    monkeypatch.setitem(PUBLISHED, "vvt_nano", published)
    (nanos / "b.pth").unlink()
    write_classes(tmp_path / "val", WORDNET_IDS[:2])
    for _ in range(2):
        status, out, _ = run(command, nanos, tmp_path, tmp_path)
        assert status == 0 and "a.pth does not say its image size: 64 px is nearest" in out
        assert [folder.name for folder in (tmp_path / "out" / "weights").iterdir()] == ["vvt_nano"]


def test_other_images_are_measured_anew(command, nanos, tmp_path):
    """Where more of ImageNet has been unpacked since, nothing is kept of what was measured on less."""
    for count in (1, 3):
        write_classes(tmp_path / "val", WORDNET_IDS[:count], per_class=1)
        assert run(command, nanos, tmp_path, tmp_path)[0] == 0
        (figures,) = {
            each["imagenet"]["imagenet"]["images"]
            for each in json.loads((tmp_path / "out" / "results.json").read_text())["figures"].values()
        }
        assert figures == count


def test_sets_are_checked_before_anything_is_measured(command, nanos, tmp_path):
    write_classes(tmp_path / "val", WORDNET_IDS[:1])
    write_classes(tmp_path / "imagenet-c" / "fog" / "1", WORDNET_IDS[:1])
    result = run(command, nanos, tmp_path, tmp_path, "--robustness", tmp_path)
    check_refused(result, "fog has no folder 2")
    assert not (tmp_path / "out" / "results.json").exists()


def test_converted_weights_are_published(command, nanos, tmp_path, hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    write_classes(tmp_path / "val", WORDNET_IDS[:2])
    status, _, err = run(command, nanos, tmp_path, tmp_path, "--push-to-hub", "lab")
    assert status == 2 and "vvt_nano was not measured on all 50,000 images of ImageNet" in err
    assert not hub.repositories
    monkeypatch.setitem(SETS, "imagenet", dataclasses.replace(SETS["imagenet"], num_images=4))
    status, out, _ = run(command, nanos, tmp_path, tmp_path, "--push-to-hub", "lab")
    assert status == 0
    first, second = sorted(hub.repositories)
    assert first == "lab/vvt_nano" and second.startswith("lab/vvt_nano-")
    assert out.count("\npublished ") == 2
    loaded = [s3a.VVT.from_pretrained(repo).head.bias for repo in (first, second)]
    assert torch.allclose(loaded[1] - loaded[0], torch.arange(1000) % 7.0, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "options", "said"),
    [
        ("--checkpoints", ("missing",), "--checkpoints missing does not exist"),
        ("--push-to-hub", ("a/b",), "must be ORG alone"),
        ("--batch-size", ("0",), "must be at least 1"),
    ],
)
def test_wrong_options_are_refused(command, tmp_path, change, options, said):
    given = {"--checkpoints": tmp_path, "--imagenet": tmp_path, change: options[0]}
    check_refused(command("reproduce", *(word for pair in given.items() for word in pair)), said)


def test_a_folder_without_checkpoints_is_refused(command, tmp_path):
    (tmp_path / "page.pth").write_text("<html>log in</html>")
    result = command("reproduce", "--checkpoints", tmp_path, "--imagenet", tmp_path)
    check_refused(result, "has no official checkpoint of SSViT, SViT or VVT", "page.pth is no PyTorch checkpoint")


def make_measured(score, size=224, sha256="a", images=50_000, name="imagenet", published=83.6):
    weights = OfficialWeights(path=None, sha256=sha256, model="svit_small", image_size=size, name="svit_small")
    return Measured(
        weights=weights,
        name=name,
        images=images,
        is_complete=images == SETS[name].num_images,
        score=score,
        published=published,
    )


def test_the_nearest_published_figure_tells_the_image_size():
    rows = [make_measured(82.9), make_measured(84.9, size=384, published=85.0), make_measured(83.5, sha256="b")]
    chosen, notes = choose_sizes(rows)
    assert [(each.sha256, each.image_size) for each in chosen] == [("a", 384), ("b", 224)]
    assert len(notes) == 1 and "224 px 82.90 % (83.6 %), 384 px 84.90 % (85.0 %)" in notes[0]


def test_a_difference_is_judged_by_how_many_images_there_are():
    """0.05 for rounding, and twice the deviation of n decisions, of which 2 % change: by plus or minus 1 / n."""
    for images, name in ((50_000, "imagenet"), (10_000, "imagenet-v2"), (7_500, "imagenet-a")):
        allowed = 0.05 + 200 * math.sqrt(0.02 * images) / images
        assert compute_allowance(images) == pytest.approx(allowed)
        for off, word in ((0.99, "within"), (1.01, "BEYOND")):
            for sign in (1, -1):
                row = make_measured(83.6 + sign * off * allowed, images=images, name=name)
                assert row.verdict.startswith(word)
    assert compute_allowance(50_000) == pytest.approx(0.1765, abs=1e-4)
    assert make_measured(90.0, images=49_999).verdict.startswith("not the whole set")
    assert dataclasses.replace(make_measured(90.0), published=None).verdict == "not published"


def test_sets_are_found_by_the_names_that_they_come_with(tmp_path):
    for name in ("ImageNet-A", "imagenet-r", "imagenetv2-matched-frequency-format-val", "sketch", "noise"):
        (tmp_path / name).mkdir()
    names = {name: path.name for name, path in find_sets(tmp_path).items()}
    assert names == {
        "imagenet-a": "ImageNet-A",
        "imagenet-r": "imagenet-r",
        "imagenet-v2": "imagenetv2-matched-frequency-format-val",
        "imagenet-sketch": "sketch",
        "imagenet-c": tmp_path.name,
    }
    with pytest.raises(FileNotFoundError, match="has none of the folders imagenet-a"):
        find_sets(tmp_path / "noise")


def test_equal_files_are_one_and_equal_names_are_told_apart(tmp_path):
    state = golden.official_state("tiny", "vvt")
    torch.save(state, tmp_path / "a.pth")
    shutil.copy(tmp_path / "a.pth", tmp_path / "b.pth")
    state["head.bias"] = state["head.bias"] + 1
    torch.save({"model": state, "args": Namespace(input_size=224)}, tmp_path / "c.pth")
    found, skipped = find_checkpoints(tmp_path)
    assert [(each.path.name, each.image_size) for each in found] == [("a.pth", 224), ("a.pth", 384), ("c.pth", 224)]
    assert [each.name for each in found] == ["vvt_tiny", "vvt_tiny_384", f"vvt_tiny-{found[2].sha256[:8]}"]
    assert len(skipped) == 1 and "b.pth is the same file as" in skipped[0]
