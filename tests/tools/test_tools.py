"""The small commands: conversion, cost, and the picture of a scan."""

import json
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import timm
import torch
from helpers import golden
from helpers.command_line import Command, check_refused
from torch import Tensor

import s3a
from s3a.analysis.cost import count_cost
from s3a.geometry import FIXED

# --------------------------------------------------------------------------------------------------------
# Cost
# --------------------------------------------------------------------------------------------------------

# dims, depths, FFN ratios; parameters, published and whole GMACs at 224 x 224
SIZES = {
    "ssvit_tiny": ((64, 128, 256, 512), (2, 2, 9, 2), 15_095_688, 2.42, 2.79),
    "ssvit_small": ((64, 128, 256, 512), (3, 5, 18, 4), 27_175_240, 4.38, 5.04),
    "ssvit_base": ((80, 160, 320, 512), (4, 9, 25, 9), 57_138_736, 9.60, 10.94),
    "ssvit_large": ((112, 224, 448, 640), (4, 9, 25, 9), 100_234_112, 18.21, 20.44),
}
RATIOS = (4, 4, 3, 3)


def meta_model(name: str, **model_args: object) -> torch.nn.Module:
    with torch.device("meta"):
        return timm.create_model(name, **model_args)


def maps(height: int, width: int) -> list[tuple[int, int]]:
    """Halved five times, rounded up."""
    sizes = [(height, width)]
    for _ in range(5):
        sizes.append(tuple((side + 1) // 2 for side in sizes[-1]))
    return sizes


def layer_macs(dims: tuple[int, ...], depths: tuple[int, ...], height: int, width: int) -> int:
    """The convolutions and pointwise layers of an SSViT with 1000 classes, added up by hand."""
    _, half, *stages = [rows * columns for rows, columns in maps(height, width)]
    first = dims[0]
    total = half * 9 * (3 * first // 2 + (first // 2) ** 2) + stages[0] * 9 * (first // 2 * first + first**2)
    for index, (tokens, dim, depth, ratio) in enumerate(zip(stages, dims, depths, RATIOS, strict=True)):
        attention = 3 * dim**2 + 25 * dim + dim**2
        total += depth * tokens * (9 * dim + attention + 2 * ratio * dim**2 + 9 * ratio * dim)
        total += tokens * 9 * dims[index - 1] * dim if index else 0
    return total + stages[-1] * dims[-1] * 1024 + 1024 * 1000


def scan_macs(dims: tuple[int, ...], depths: tuple[int, ...], height: int, width: int) -> int:
    """Scores and values of every pair that the dense masks of the scans let through."""
    total = 0
    for (rows, columns), dim, depth in zip(maps(height, width)[2:], dims, depths, strict=True):
        for block in range(depth):
            passes = golden.scan_table(rows, columns, FIXED[block % 2])
            total += 2 * dim * sum(int(golden.dense_mask(rows, columns, *step).sum()) for step in passes)
    return total


@pytest.mark.parametrize("name", SIZES)
def test_cost_is_the_published_one(name: str) -> None:
    *_, parameters, published, whole = SIZES[name]
    cost = count_cost(meta_model(name), 224, 224)
    assert cost.parameters == parameters
    assert cost.published_gmacs == pytest.approx(published, abs=0.0055)  # small is 4.3749, published as 4.38
    assert round(cost.gmacs, 2) == whole


@pytest.mark.parametrize(
    ("name", "side", "printed"),
    [
        ("svit_small", 224, 4.4),
        ("svit_small", 384, 14.1),
        ("svit_base", 224, 9.9),
        ("svit_large", 224, 15.6),
        ("svit_large", 384, 49.7),
        ("vvt_large", 224, 10.8),
        ("vvt_large", 384, 31.8),
    ],
)
def test_whole_cost_is_the_published_one_of_other_papers(name: str, side: int, printed: float) -> None:
    """They count norms as well, under 1 %, and round to a digit. Layers alone are far from it."""
    cost = count_cost(meta_model(name), side, side)
    assert printed - 0.05 <= 1.01 * cost.gmacs and cost.gmacs <= printed + 0.05
    assert cost.published_gmacs < 0.9 * printed


def svit_macs(height: int, width: int) -> tuple[int, int]:
    """Layers and products of `svit_small`, added up by hand; the zeros that fill the last cells count."""
    dims, depths, sizes = (64, 128, 320, 512), (3, 5, 9, 3), (8, 4, 1, 1)
    _, (rows, columns), *stages = maps(height, width)
    layers = rows * columns * 9 * (3 * 32 + 32**2) + stages[0][0] * stages[0][1] * 9 * (32 * 64 + 64**2)
    products = 0
    for index, ((rows, columns), dim, depth, size) in enumerate(zip(stages, dims, depths, sizes, strict=True)):
        tokens, cells = rows * columns, -(-rows // size) * -(-columns // size)
        layers += depth * (tokens * (9 * dim + 8 * dim**2 + 36 * dim) + cells * 4 * dim**2)
        products += depth * (2 * cells**2 * dim + (3 * 9 * cells * size**2 * dim if size > 1 else 0))
        layers += tokens * 9 * dims[index - 1] * dim if index else 0
    return layers + tokens * 512 * 1024 + 1024 * 1000, products


def vvt_macs(height: int, width: int) -> tuple[int, int]:
    """Layers and products of `vvt_tiny`, added up by hand: keys times values, queries times that, and their norm."""
    layers = products = 0
    stages = zip(maps(height, width)[2:], (96, 160, 320, 512), (1, 2, 5, 8), (8, 8, 4, 4), strict=True)
    before = None
    for (rows, columns), dim, heads, ratio in stages:
        tokens, head_dim = rows * columns, dim // 2 // heads
        layers += tokens * (9 * before if before else 49 * 3) * dim
        layers += 2 * (tokens * (2 * dim**2 + 2 * ratio * dim**2 + 9 * ratio * dim) + 2 * dim**2)
        products += 2 * tokens * heads * (2 * 4 * head_dim**2 + 4 * head_dim)
        before = dim
    return layers + 512 * 1000, products


@pytest.mark.parametrize(("name", "by_hand"), [("svit_small", svit_macs), ("vvt_tiny", vvt_macs)])
@pytest.mark.parametrize(("height", "width"), [(224, 224), (250, 131)])
def test_cost_of_other_families_equals_a_count_by_hand(name: str, by_hand: Callable, height: int, width: int) -> None:
    layers, products = by_hand(height, width)
    cost = count_cost(meta_model(name), height, width)
    assert cost.published_gmacs * 2**30 == layers
    assert round(cost.gmacs * 1e9) == layers + products


@pytest.mark.parametrize("name", ["svit_nano", "vvt_nano"])
def test_nanos_cost_alike(name: str) -> None:
    """Within 10 % of `ssvit_nano`, on ten classes of 64 px: parameters, and cost by both counts."""
    ours, peer = (count_cost(meta_model(each, num_classes=10), 64, 64) for each in (name, "ssvit_nano"))
    for count in ("parameters", "published_gmacs", "gmacs"):
        assert getattr(ours, count) == pytest.approx(getattr(peer, count), rel=0.1), count


@pytest.mark.parametrize(("height", "width"), [(96, 160), (250, 131)])
def test_cost_equals_a_count_by_hand(height: int, width: int) -> None:
    dims, depths, *_ = SIZES["ssvit_tiny"]
    cost = count_cost(meta_model("ssvit_tiny"), height, width)
    layers = layer_macs(dims, depths, height, width)
    assert cost.published_gmacs * 2**30 == layers
    assert round(cost.gmacs * 1e9) == layers + scan_macs(dims, depths, height, width)


@pytest.mark.parametrize("backend", ["flex", "reference"])
def test_cost_leaves_the_model_alone(backend: str) -> None:
    model = timm.create_model("ssvit_nano", backend=backend).train()
    model.stages[0].blocks[0].compile()
    before = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    assert count_cost(model, 64, 96) == count_cost(meta_model("ssvit_nano"), 64, 96)
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert {module.backend for module in model.modules() if isinstance(module, s3a.S3A)} == {backend}
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())


def test_cost_of_other_models() -> None:
    tokens, dim = 197, 192
    layers = 196 * 768 * dim + 12 * tokens * 12 * dim**2 + dim * 1000
    cost = count_cost(meta_model("vit_tiny_patch16_224"), 224, 224)
    assert cost.published_gmacs * 2**30 == layers
    assert round(cost.gmacs * 1e9) == layers + 12 * 2 * tokens**2 * dim

    convolutional = count_cost(meta_model("resnet18"), 224, 224)
    assert convolutional.gmacs == pytest.approx(1.814073344)  # torchvision's count
    assert convolutional.published_gmacs * 2**30 == pytest.approx(convolutional.gmacs * 1e9)


def test_cost_counts_functional_layers() -> None:
    """BEiT hands its weights to F.linear: they are a layer nonetheless."""
    with torch.device("meta"):
        beit = timm.create_model("beit_base_patch16_224", depth=1)
    layers = 196 * 768 * 768 + 197 * 12 * 768**2 + 768 * 1000
    assert count_cost(beit, 224, 224).published_gmacs * 2**30 == layers


def test_cost_command(command: Command) -> None:
    status, out, err = command("cost", "ssvit_tiny", "ssvit_base", "--height", 256, "--width", 320, "--json")
    tiny, base = json.loads(out)
    assert (status, err) == (0, "")
    expected = {"model": "ssvit_tiny", "height": 256, "width": 320, "parameters": 15_095_688}
    assert expected.items() <= tiny.items()
    assert tiny["published_gmacs"] * 2**30 == layer_macs(*SIZES["ssvit_tiny"][:2], 256, 320)
    assert base["gmacs"] > base["published_gmacs"] > tiny["gmacs"]


def test_cost_command_for_people(command: Command) -> None:
    status, out, _ = command("cost")
    rows = [line.split() for line in out.splitlines()]
    assert status == 0
    assert ["ssvit_tiny", "15,095,688", "2.42", "2.79"] in rows
    assert ["ssvit_large", "100,234,112", "18.21", "20.44"] in rows
    assert ["svit_small", "25,495,624", "3.80", "4.34"] in rows
    assert ["vvt_large", "61,848,520", "9.47", "10.79"] in rows
    assert "2^30" in out
    assert "10^9" in out


def test_cost_command_refuses(command: Command) -> None:
    check_refused(command("cost", "ssvit_tini"), "'ssvit_tini'", "did you mean 'ssvit_tiny'?")
    check_refused(command("cost", "resnet5"), "did you mean 'resnet50'?")
    check_refused(command("cost", "ssvit_tiny", "--height", 31), "31 x 224")
    check_refused(command("cost", "ssvit_tiny", "--width", -1), "224 x -1")
    check_refused(command("cost", "vit_tiny_patch16_224", "--width", 100), "VisionTransformer", "224 x 100")
    check_refused(command("cost", "ssvit_tiny", "--hight", 224), "--hight")


# --------------------------------------------------------------------------------------------------------
# Conversion
# --------------------------------------------------------------------------------------------------------


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
