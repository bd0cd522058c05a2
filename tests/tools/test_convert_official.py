"""tools/convert_official.py: official checkpoints become weights folders that give the official logits."""

from argparse import Namespace
from pathlib import Path

import pytest
import timm
import torch
from helpers import golden
from helpers.command_line import Command, check_refused
from torch import Tensor

import s3a


def write_checkpoint(path: Path, state: dict[str, Tensor]) -> Path:
    """As the official trainers write it."""
    torch.save({"model": state, "epoch": 299, "args": Namespace(lr=5e-4)}, path)
    return path


def with_classes(state: dict[str, Tensor], num_classes: int) -> dict[str, Tensor]:
    return {**state, **{key: state[key][:num_classes].clone() for key in ("head.weight", "head.bias")}}


@pytest.mark.parametrize(
    ("family", "size", "parameters"), [("svit", "small", "25,495,624"), ("vvt", "tiny", "12,882,440")]
)
def test_other_families_convert(command: Command, tmp_path: Path, family: str, size: str, parameters: str) -> None:
    source = write_checkpoint(tmp_path / "official.pth", golden.official_state(size, family))
    folder = tmp_path / "converted"
    status, out, err = command("convert_official", source, "--model", f"{family}_{size}", "--output", folder)
    loader = {"svit": s3a.SViT, "vvt": s3a.VVT}[family]
    assert (status, err, out.count("\n")) == (0, "", 1)
    assert all(said in out for said in (parameters, "1000 classes", f"s3a.{loader.__name__}.from_pretrained"))
    with torch.inference_mode():
        logits = loader.from_pretrained(folder)(golden.images(0, (2, 3, 224, 224)))
    recorded = golden.recorded("baselines_logits")[f"{family}_{size}_224x224"]
    assert golden.error(logits, recorded) <= 1e-5


@pytest.mark.parametrize(
    ("family", "given", "side", "crop_pct"),
    [("svit", (), 384, 1.0), ("vvt", (), 384, 0.875), ("vvt", ("--image-size", 320), 320, 0.875)],
)
def test_the_image_size_of_the_training_is_kept(
    command: Command, tmp_path: Path, family: str, given: tuple[object, ...], side: int, crop_pct: float
) -> None:
    """Above 224 px SViT's code resizes to the network's size, and VVT's cuts 0.875 at all sizes."""
    size = {"svit": "small", "vvt": "tiny"}[family]
    content = {"model": golden.official_state(size, family), "args": Namespace(input_size=384)}
    torch.save(content, tmp_path / "official.pth")
    folder = tmp_path / "converted"
    command("convert_official", tmp_path / "official.pth", "--model", f"{family}_{size}", "--output", folder, *given)
    config = timm.create_model(f"local-dir:{folder}", pretrained=True).pretrained_cfg
    assert (config["input_size"], config["crop_pct"]) == ((3, side, side), crop_pct)


@pytest.mark.parametrize("wrong", ["vvt_small", "ssvit_tiny", "svit_small"])
def test_conversion_names_the_family_that_fits(command: Command, tmp_path: Path, wrong: str) -> None:
    source = write_checkpoint(tmp_path / "official.pth", golden.official_state("tiny", "vvt"))
    result = command("convert_official", source, "--model", wrong, "--output", tmp_path / "folder")
    check_refused(result, f"does not fit {wrong}: it fits vvt_tiny; pass --model vvt_tiny")


def test_converted_folder_gives_the_official_logits(command: Command, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "official.pth", golden.official_state("tiny"))
    folder = tmp_path / "new" / "tiny"
    status, out, err = command("convert_official", source, "--model", "ssvit_tiny", "--output", folder)
    assert (status, err, out.count("\n")) == (0, "", 1)
    assert all(said in out for said in ("15,095,688", "1000 classes", f's3a.SSViT.from_pretrained("{folder}")'))

    model = s3a.SSViT.from_pretrained(folder)
    with torch.no_grad():
        logits = model(golden.images(0, (2, 3, 224, 224)))
    assert golden.error(logits, golden.recorded("ssvit_logits")["tiny_224x224"]) <= 1e-5


def test_number_of_classes_is_the_checkpoints(command: Command, tmp_path: Path) -> None:
    state = with_classes(golden.official_state("tiny"), 7)
    torch.save(state, tmp_path / "bare.pth")
    status, out, _ = command("convert_official", tmp_path / "bare.pth", "--model", "ssvit_tiny", "--output", tmp_path)
    assert status == 0
    assert "7 classes" in out
    model = timm.create_model(f"local-dir:{tmp_path}", pretrained=True)
    assert model.num_classes == 7
    assert torch.equal(model.head.weight, state["head.weight"].flatten(1))


def test_conversion_names_the_size_that_fits(command: Command, tmp_path: Path) -> None:
    source = write_checkpoint(tmp_path / "small.pth", with_classes(golden.official_state("small"), 10))
    result = command("convert_official", source, "--model", "ssvit_tiny", "--output", tmp_path / "folder")
    check_refused(result, "ssvit_tiny", "pass --model ssvit_small")
    assert not (tmp_path / "folder").exists()


@pytest.mark.parametrize("content", [b"", b"hello", b"no checkpoint", bytes(range(256)) * 8, b"PK\x03\x04" + bytes(99)])
def test_conversion_refuses_other_files(command: Command, tmp_path: Path, content: bytes) -> None:
    source = tmp_path / "source.pth"
    source.write_bytes(content)
    result = command("convert_official", source, "--model", "ssvit_tiny", "--output", tmp_path / "folder")
    check_refused(result, "source.pth", "no PyTorch checkpoint")


def test_conversion_refuses(command: Command, tmp_path: Path) -> None:
    def convert(state: dict[str, Tensor], model: str = "ssvit_tiny", output: Path = tmp_path / "folder"):
        source = write_checkpoint(tmp_path / "source.pth", state)
        return command("convert_official", source, "--model", model, "--output", output)

    state = {"head.weight": torch.zeros(3, 4)}
    headless = golden.official_state("tiny")
    del headless["head.weight"]
    check_refused(convert(headless), "ssvit_tiny", "missing: head.weight")
    check_refused(convert({"fc.weight": torch.zeros(2)}), "ssvit_tiny", "fc.weight")
    check_refused(convert({}), "no state dict")
    check_refused(convert(state, model="ssvit_tiney"), "'ssvit_tiney'", "did you mean 'ssvit_tiny'?")
    check_refused(convert(state, model="resnet50"), "'resnet50' has no official checkpoints", "ssvit_tiny")
    check_refused(convert(golden.official_state("tiny"), output=tmp_path / "source.pth" / "folder"), "source.pth")

    arguments = ("--model", "ssvit_tiny", "--output", tmp_path / "folder")
    check_refused(command("convert_official", tmp_path / "nothing.pth", *arguments), "nothing.pth", "does not exist")
    check_refused(command("convert_official", tmp_path / "source.pth", *arguments[:2]), "--output")
    assert not (tmp_path / "folder").exists()
