"""tools/predict.py as a user runs it."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from faster_coco_eval.core import mask as mask_api
from helpers.alarm import stop_after
from helpers.command_line import Command, check_refused
from helpers.hub_server import Hub
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torchvision.models.detection.roi_heads import paste_masks_in_image

from s3a import SSViT

NAMES = ["ant", "bee", "cat", "dog", "Eidechse ü", "fox"]
PIXELS = np.add.outer(np.arange(60) * 2, np.arange(90)).astype(np.uint8)


def save_model(folder: Path, names: object = NAMES, model: str = "ssvit_nano", **options: object) -> Path:
    """Weights whose classes differ from image to image."""
    built = timm.create_model(model, num_classes=6, **options).eval()
    torch.nn.init.normal_(built.get_classifier().weight, std=3)
    channels = options.get("in_chans", 3)
    data_config = {"input_size": (channels, 48, 48), "crop_pct": 0.9}
    SSViT.save_pretrained(built, folder, data_config=data_config, config={"label_names": names} if names else None)
    return folder


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    return save_model(tmp_path / "weights")


@pytest.fixture
def photo(tmp_path: Path) -> Path:
    Image.fromarray(np.stack([PIXELS, PIXELS // 2, 255 - PIXELS], -1)).save(tmp_path / "photo.png")
    return tmp_path / "photo.png"


def expected(weights: Path, image: Image.Image) -> dict[str, float]:
    """Class and probability, by plain code."""
    model = timm.create_model(f"local-dir:{weights}", pretrained=True).eval()
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    with torch.no_grad():
        return dict(zip(NAMES, model(transform(image)[None])[0].softmax(-1).tolist(), strict=True))


def predicted(result: tuple[int, str, str]) -> list[dict[str, float]]:
    """For each image, class and probability from the JSON."""
    status, out, err = result
    assert (status, err) == (0, "")
    return [{each["label"]: each["probability"] for each in found["predictions"]} for found in json.loads(out)]


def test_probabilities(command: Command, weights: Path, photo: Path):
    right = expected(weights, Image.open(photo))
    (found,) = predicted(command("predict", "--weights", weights, photo, "--json", "--top", 9))
    assert found == pytest.approx(right, rel=1e-4)
    assert list(found) == sorted(right, key=right.get, reverse=True)

    status, out, err = command("predict", "--weights", weights, photo, photo, "--top", 2)
    assert (status, err) == (0, "")
    best, second = list(found)[:2]
    lines = [f"{100 * found[name]:7.2f} %  {name}" for name in (best, second)]
    assert out.splitlines() == [str(photo), *lines] * 2


def test_files_of_every_kind(command: Command, weights: Path, tmp_path: Path):
    """The same gray picture, however it is stored."""
    gray = Image.fromarray(PIXELS)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = {
        "gray.png": (gray, {}),
        "rgb.png": (gray.convert("RGB"), {}),
        "sixteen.png": (Image.fromarray(PIXELS.astype(np.uint16) * 257), {}),
        "turned.png": (gray.transpose(Image.Transpose.ROTATE_90), {"exif": exif}),
        "rgb.jpg": (gray.convert("RGB"), {"quality": 98}),
        "cmyk.jpg": (gray.convert("CMYK"), {"quality": 98}),
    }
    for name, (image, options) in files.items():
        image.save(tmp_path / name, **options)
    found = predicted(command("predict", "--weights", weights, "--json", *(tmp_path / name for name in files)))
    right = expected(weights, gray.convert("RGB"))
    for name, probabilities in zip(files, found, strict=True):
        tolerance = {"rel": 1e-4} if name.endswith("png") else {"abs": 0.05}
        assert probabilities == pytest.approx({label: right[label] for label in probabilities}, **tolerance), name


def test_networks_with_one_channel(command: Command, tmp_path: Path, photo: Path):
    folder = save_model(tmp_path / "gray", in_chans=1)
    (found,) = predicted(command("predict", "--weights", folder, photo, "--json", "--top", 6))
    assert found == pytest.approx(expected(folder, Image.open(photo).convert("L")), rel=1e-4)


def test_weights_on_the_hub(command: Command, hub: Hub, weights: Path, tmp_path: Path, photo: Path):
    """At a revision too; and one that cannot be had is one line."""
    first = hub.publish("zoo/animals", {path.name: path.read_bytes() for path in weights.iterdir()})
    other = save_model(tmp_path / "other")
    hub.publish("zoo/animals", {path.name: path.read_bytes() for path in other.iterdir()})
    for folder, revision in ((other, ()), (weights, ("--revision", first))):
        (found,) = predicted(command("predict", "--weights", "zoo/animals", *revision, photo, "--json", "--top", 6))
        assert found == pytest.approx(expected(folder, Image.open(photo)), rel=1e-4)
    check_refused(command("predict", "--weights", "zoo/plants", photo), "'zoo/plants'", "does not exist or is private")
    check_refused(command("predict", "--weights", "zoo/animals", "--revision", "v9", photo), "no revision 'v9'")


def test_images_that_cannot_be_read(command: Command, weights: Path, tmp_path: Path, photo: Path):
    """A line each, and the others are predicted all the same."""
    (tmp_path / "text.jpg").write_text("no image")
    (tmp_path / "half.png").write_bytes(photo.read_bytes()[:90])
    bad = [tmp_path / "text.jpg", tmp_path / "half.png", tmp_path / "none.png"]
    check_refused(command("predict", "--weights", weights, bad[0]), str(bad[0]), "cannot be read")
    check_refused(command("predict", "--weights", weights, bad[2]), str(bad[2]), "does not exist")
    bad += [tmp_path / "waits.png", tmp_path / "large.png"]
    os.mkfifo(bad[3])
    Image.new("1", (9500, 9500)).save(bad[4])
    with stop_after(seconds=60):
        status, out, err = command("predict", "--weights", weights, *bad, photo)
    assert (status, out.splitlines()[0]) == (2, str(photo))
    lines = err.splitlines()
    assert len(lines) == 5
    assert all(line.startswith("error: image ") and str(path) in line for line, path in zip(lines, bad, strict=True))


def test_a_folder_means_its_images(command: Command, weights: Path, tmp_path: Path, photo: Path):
    """In the order of their names, beside files that are named; other files and subfolders are left out."""
    folder = tmp_path / "pictures"
    (folder / "more").mkdir(parents=True)
    for name in ("b.PNG", "a.jpg", "more/c.png"):
        Image.open(photo).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    status, out, err = command("predict", "--weights", weights, photo, folder, "--json")
    assert (status, err) == (0, f"{folder}: 2 images\n")
    assert [found["image"] for found in json.loads(out)] == [str(photo), str(folder / "a.jpg"), str(folder / "b.PNG")]
    (tmp_path / "empty").mkdir()
    check_refused(command("predict", "--weights", weights, tmp_path / "empty"), "empty has no image in it", "another")
    (tmp_path / "empty" / "inner").mkdir()
    refused = command("predict", "--weights", weights, tmp_path / "empty")
    check_refused(refused, "its 1 subfolders are not searched")


# --------------------------------------------------------------------------------------------------------
# Label maps and objects
# --------------------------------------------------------------------------------------------------------


def save_dense(folder: Path, name: str, side: tuple[int, int], **options: object) -> Path:
    """Dense weights whose outputs differ from place to place."""
    torch.manual_seed(0)
    model = timm.create_model(name, backbone="ssvit_nano", num_classes=6, pyramid_dim=16, **options)
    torch.nn.init.normal_(model.get_classifier().weight, std=1)
    model.save_pretrained(folder, data_config={"input_size": (3, *side)}, config={"label_names": NAMES})
    return folder


def prepare(image: Image.Image, height: int, width: int) -> torch.Tensor:
    """[1, 3, height, width], by Pillow and plain arithmetic."""
    pixels = torch.from_numpy(np.array(image.resize((width, height), Image.Resampling.BICUBIC))).double() / 255
    mean, std = (torch.tensor(values).double() for values in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    return ((pixels - mean) / std).permute(2, 0, 1)[None].float()


def test_shares_of_the_pixels(command: Command, tmp_path: Path, photo: Path):
    """The image of 60 x 90 is seen at 64 x 96, and its classes are those of its own pixels."""
    folder = save_dense(tmp_path / "fpn", "semantic_fpn", (64, 64))
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    with torch.no_grad():
        logits = model(prepare(Image.open(photo), 64, 96))
    label_map = torch.nn.functional.interpolate(logits, (60, 90), mode="bilinear").argmax(1)
    right = {name: (label_map == index).double().mean().item() for index, name in enumerate(NAMES)}
    right = {name: share for name, share in right.items() if share}
    assert len(right) > 1
    picture = tmp_path / "drawn" / "photo.png"
    status, out, err = command("predict", "--weights", folder, photo, "--json", "--overlay", picture.parent)
    assert (status, err) == (0, "")
    (result,) = json.loads(out)
    found = {each["label"]: each["share"] for each in result["predictions"]}
    assert found == pytest.approx(right, abs=2e-3)  # a pixel or ten between two classes
    assert list(found) == sorted(right, key=right.get, reverse=True)
    assert Image.open(result["overlay"]).width > 500
    status, out, _ = command("predict", "--weights", folder, photo, "--top", 1)
    best = next(iter(found))
    assert out.splitlines() == [str(photo), f"{100 * found[best]:7.2f} %  {best}"]


def test_objects(command: Command, tmp_path: Path, photo: Path):
    """Boxes and masks are in pixels of the image, which is seen at 85 x 128 and padded to 96 x 128."""
    folder = save_dense(tmp_path / "rcnn", "mask_rcnn", (96, 128), box_dim=16, num_proposals=20)
    model = timm.create_model(f"local-dir:{folder}", pretrained=True).eval()
    torch.nn.init.zeros_(model.mask_heads[0].classifier.weight)
    torch.nn.init.ones_(model.mask_heads[0].classifier.bias)  # masks fill their boxes
    model.save_pretrained(folder, data_config={"input_size": (3, 96, 128)}, config={"label_names": NAMES})
    padded = torch.nn.functional.pad(prepare(Image.open(photo), 85, 128), (0, 0, 0, 11))
    with torch.no_grad():
        (right,) = model(padded, [(85, 128)])
    boxes = right["boxes"] * torch.tensor([90 / 128, 60 / 85] * 2)
    assert len(boxes) > 2
    picture = tmp_path / "drawn" / "photo.png"
    least = right["scores"][2].item() - 1e-4
    given = ("predict", "--weights", folder, photo, "--min-score", least)
    status, out, err = command(*given, "--json", "--overlay", picture.parent)
    assert (status, err) == (0, "")
    (result,) = json.loads(out)
    found = result["predictions"]
    assert len(found) == (right["scores"] >= least).sum()
    assert [each["label"] for each in found] == [NAMES[label] for label in right["labels"][: len(found)]]
    assert [each["score"] for each in found] == pytest.approx(right["scores"][: len(found)].tolist(), abs=1e-4)
    corners = torch.tensor([[each[side] for side in ("left", "top", "right", "bottom")] for each in found])
    torch.testing.assert_close(corners, boxes[: len(found)], atol=0.05, rtol=0)
    pasted = paste_masks_in_image(right["masks"][:, None], boxes, (60, 90))[: len(found), 0] >= 0.5
    for each, mask in zip(found, pasted, strict=True):
        decoded = torch.from_numpy(mask_api.decode(each["segmentation"])).bool()
        assert decoded.shape == (60, 90)
        assert (decoded & mask).sum() >= 0.8 * (decoded | mask).sum()  # torchvision rounds boxes to pixels
    assert Image.open(result["overlay"]).size == (90 * 8, 60 * 8)
    status, out, _ = command(*given, "--top", 1)
    assert (status, len(out.splitlines())) == (0, 2)
    assert f"%  {found[0]['label']}  (left {found[0]['left']:.1f}, top {found[0]['top']:.1f}, right" in out


def test_an_image_without_objects(command: Command, tmp_path: Path, photo: Path):
    folder = save_dense(tmp_path / "rcnn", "mask_rcnn", (64, 64), box_dim=16, num_proposals=5)
    status, out, err = command("predict", "--weights", folder, photo, "--min-score", 1, "--overlay", tmp_path / "drawn")
    assert (status, err) == (0, "")
    assert out.splitlines() == [str(photo), "   nothing found", f"   drawn in {tmp_path / 'drawn' / 'photo.png'}"]
    status, out, _ = command("predict", "--weights", folder, photo, "--min-score", 1, "--json")
    assert json.loads(out) == [{"image": str(photo), "predictions": []}]
    check_refused(command("predict", "--weights", folder, photo, "--min-score", 2), "--min-score is 2.0", "0 and 1")


# --------------------------------------------------------------------------------------------------------
# Names
# --------------------------------------------------------------------------------------------------------


def test_classes_without_names(command: Command, tmp_path: Path, photo: Path):
    folder = save_model(tmp_path / "nameless", names=None)
    (found,) = predicted(command("predict", "--weights", folder, photo, "--json", "--top", 6))
    assert sorted(found) == [f"class {index}" for index in range(6)]


def test_names_by_index(command: Command, tmp_path: Path, photo: Path):
    """timm's other way to write them, for classes with gaps."""
    folder = save_model(tmp_path / "indexed", names={"0": "ant", "5": "fox"})
    (found,) = predicted(command("predict", "--weights", folder, photo, "--json", "--top", 6))
    assert sorted(found) == ["ant", "class 1", "class 2", "class 3", "class 4", "fox"]


def test_names_that_do_not_fit(command: Command, tmp_path: Path, photo: Path):
    folder = save_model(tmp_path / "short", names=NAMES[:5])
    check_refused(command("predict", "--weights", folder, photo), "5 label_names for 6 classes")


def test_weights_without_classes(command: Command, tmp_path: Path, photo: Path):
    timm.create_model("ssvit_nano", num_classes=0).save_pretrained(tmp_path / "body")
    check_refused(command("predict", "--weights", tmp_path / "body", photo), "num_classes is 0")


# --------------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------------


def test_a_picture_for_every_image(command: Command, weights: Path, tmp_path: Path, photo: Path):
    """Numbered where two have the same name; the probabilities stay the same."""
    (tmp_path / "more").mkdir()
    for name in ("photo.jpg", "photo-2.png"):
        Image.open(photo).save(tmp_path / "more" / name)
    images = [photo, tmp_path / "more" / "photo.jpg", tmp_path / "more" / "photo-2.png"]
    folder = tmp_path / "new" / "pictures"
    without = predicted(command("predict", "--weights", weights, *images, "--json"))
    status, out, err = command("predict", "--weights", weights, *images, "--json", "--overlay", folder)
    assert (status, err) == (0, "")
    results = json.loads(out)
    names = ["photo.png", "photo-2.png", "photo-2-2.png"]
    assert [result["overlay"] for result in results] == [str(folder / name) for name in names]
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)
    for result, plain in zip(results, without, strict=True):
        found = {each["label"]: each["probability"] for each in result["predictions"]}
        assert found == pytest.approx(plain, rel=1e-4)
        assert Image.open(result["overlay"]).width > 1000
    status, out, _ = command("predict", "--weights", weights, photo, "--overlay", folder)
    assert out.splitlines()[-1].endswith(f"drawn in {folder / 'photo.png'}")


def test_no_image_is_replaced(command: Command, weights: Path, photo: Path):
    before = photo.read_bytes()
    check_refused(
        command("predict", "--weights", weights, photo, "--overlay", photo.parent), f"would replace the image {photo}"
    )
    assert photo.read_bytes() == before


def test_other_families_have_no_anchors(command: Command, tmp_path: Path, photo: Path):
    """They predict, and are refused a picture before anything is written."""
    folder = save_model(tmp_path / "resnet", model="resnet10t")
    (found,) = predicted(command("predict", "--weights", folder, photo, "--json", "--top", 6))
    assert found == pytest.approx(expected(folder, Image.open(photo)), rel=1e-4)
    result = command("predict", "--weights", folder, photo, "--overlay", tmp_path / "pictures")
    check_refused(result, "ResNet has no sparse scans, so no anchors to show")
    assert not (tmp_path / "pictures").exists()


def test_options_that_make_no_sense(command: Command, weights: Path, tmp_path: Path, photo: Path):
    check_refused(command("predict", "--weights", weights), "IMAGE")
    check_refused(command("predict", photo), "--weights")
    check_refused(command("predict", "--weights", weights, photo, "--top", 0), "--top is 0")
    check_refused(command("predict", "--weights", weights, photo, "--overley", "x"), "--overlay")
    check_refused(command("predict", "--weights", tmp_path / "none", photo), f"{tmp_path / 'none'}", "folder")
    check_refused(command("predict", "--weights", weights, photo, "--overlay", photo), f"--overlay {photo} cannot be")
