"""Quantized weights: codes and scales by hand, folders that come back bit by bit, and what is refused."""

import dataclasses
import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from accelerate.state import AcceleratorState
from helpers.image_folder import make_image_folder
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from timm.data import create_transform, resolve_model_data_config
from torch import nn

import s3a
from s3a import VVT, SSViT, SViT
from s3a.analysis.cost import count_cost
from s3a.data import load_data
from s3a.nn.compilation import region_code
from s3a.quantization import convert as quantize
from s3a.quantization import int8, schemes, storage
from s3a.quantization.convert import choose_layers
from s3a.quantization.schemes import SCHEMES, Quantization, check_scheme, check_trainable
from s3a.quantization.storage import pack, unpack
from s3a.training.checkpoints import read_newest
from s3a.training.evaluation import evaluate_weights
from s3a.training.named_recipes import get_recipe
from s3a.training.recipe import Recipe
from s3a.training.trainer import train
from s3a.weights.card import model_card

ON_CPUS = ["int8-weight-only", "int8-dynamic", "int8-activations-int4-weights", "float8-weight-only"]
RECIPE = Path(__file__).parents[2] / "recipes" / "quantize.py"
SHAPE = (3, 3, 40, 56)


def trained(name: str = "ssvit_nano", **options: object) -> nn.Module:
    """A model whose statistics and weights differ from a fresh one's."""
    model = timm.create_model(name, num_classes=5, **options)
    for key, tensor in model.state_dict().items():
        if key.endswith(("running_var", "norm1.weight", "norm2.weight")):
            tensor.uniform_(0.5, 1.5)
        elif key.endswith(("running_mean", "bias")):
            tensor.normal_(std=0.1)
    nn.init.normal_(model.get_classifier().weight, std=1)
    return model.eval()


def logits(model: nn.Module, images: torch.Tensor) -> torch.Tensor:
    with torch.inference_mode():
        return model(images)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A nano in int8-dynamic."""
    quantize.quantize(trained(), "int8-dynamic").save_pretrained(tmp_path / "quantized")
    return tmp_path / "quantized"


# --------------------------------------------------------------------------------------------------------
# Numbers
# --------------------------------------------------------------------------------------------------------


def dequantized(folder: Path, layer: str) -> np.ndarray:
    """A layer's weight from the file alone, by hand."""
    state = load_file(folder / "model.safetensors")
    codes, scale = state[f"{layer}._weight_qdata"], state[f"{layer}._weight_scale"].double().numpy()
    if codes.dtype == torch.uint8:  # two to a byte, low bits first
        low, high = codes.numpy() & 15, codes.numpy() >> 4
        nibbles = np.stack([low, high], -1).reshape(len(codes), -1).astype(int)
        values = np.where(nibbles > 7, nibbles - 16, nibbles)
    else:
        values = codes.double().numpy()
    return (values.reshape(*scale.shape, -1) * scale[..., None]).reshape(values.shape)


@pytest.mark.parametrize(("scheme", "steps", "group"), [("int8", 127.5, None), ("int4", 7.5, 32)])
def test_codes_are_the_nearest(tmp_path: Path, scheme: str, steps: float, group: int | None):
    """Every weight is within half a step of its group's range, by the file alone; a bfloat16 rounding comes on top."""
    model = trained()
    name = {"int8": "int8-dynamic", "int4": "int8-activations-int4-weights"}[scheme]
    quantize.quantize(model, name).save_pretrained(tmp_path)
    for layer in ("stages.1.blocks.0.attn.qkv", "stages.2.blocks.1.mlp.fc2", "head"):
        weight = model.get_submodule(layer).weight.detach().double().numpy()
        groups = weight.reshape(len(weight), -1, group or weight.shape[1])
        most = np.abs(groups).max(-1, keepdims=True)
        error = np.abs(dequantized(tmp_path, layer).reshape(groups.shape) - groups)
        assert (error <= 0.5 * most / steps + most / 128).all(), layer
        assert error.max() > 0.3 * most.max() / steps / 2  # it is quantized


def test_int4_codes_lie_two_to_a_byte():
    codes = torch.randint(-8, 8, (5, 12), dtype=torch.int8)
    packed = pack(codes)
    assert (packed.dtype, packed.shape) == (torch.uint8, (5, 6))
    assert torch.equal(unpack(packed), codes)
    assert packed[0, 0] == (int(codes[0, 0]) % 16) + 16 * (int(codes[0, 1]) % 16)


@pytest.mark.parametrize(("scheme", "most"), [*zip(ON_CPUS, (0.03, 0.04, 0.3, 0.1), strict=True)])
def test_quantized_models_do_nearly_the_same(scheme: str, most: float):
    model, images = trained(), torch.randn(SHAPE)
    found = quantize.quantize(model, scheme)
    right, got = logits(model, images), logits(found, images)
    assert got.dtype == torch.float32
    assert 0 < (got - right).norm() / right.norm() < most
    kinds = {type(module.weight).__name__ for module in found.modules() if isinstance(module, nn.Linear)}
    assert kinds <= {"Int8Tensor", "IntxUnpackedToInt8Tensor", "Float8Tensor"}
    assert type(model.head.weight) is nn.Parameter  # the model itself stays


@pytest.mark.parametrize(("scheme", "most"), [("int8-weight-only", 0.32), ("int8-dynamic", 0.32), (ON_CPUS[2], 0.24)])
@pytest.mark.parametrize("name", ["ssvit_nano", "ssvit_small", "svit_nano", "vvt_nano"])
def test_size_on_disk(tmp_path: Path, name: str, scheme: str, most: float):
    with torch.device("meta"):
        model = timm.create_model(name)
    floats = sum(tensor.nbytes for tensor in model.state_dict().values())
    layers, _ = choose_layers(model, scheme)
    quantize.cast(model)
    state = storage.expected_parts(model, Quantization(scheme, tuple(layers)))
    save_file({key: torch.zeros(tensor.shape, dtype=tensor.dtype) for key, tensor in state.items()}, tmp_path / "file")
    assert (tmp_path / "file").stat().st_size / floats < most


# --------------------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("scheme", ON_CPUS)
@pytest.mark.parametrize(("name", "family"), [("ssvit_nano", SSViT), ("svit_nano", SViT), ("vvt_nano", VVT)])
def test_round_trip(tmp_path: Path, name: str, family: type, scheme: str):
    """Bit-equal logits; and what was loaded is saved as the same bytes."""
    model = quantize.quantize(trained(name), scheme)
    model.save_pretrained(tmp_path / "one")
    loaded = family.from_pretrained(tmp_path / "one")
    images = torch.randn(SHAPE)
    assert torch.equal(logits(loaded, images), logits(model, images))
    assert loaded.quantization == model.quantization
    loaded.save_pretrained(tmp_path / "two")
    for file in ("model.safetensors", "config.json"):
        assert (tmp_path / "one" / file).read_bytes() == (tmp_path / "two" / file).read_bytes()


FRESH = """
import sys, numpy, torch, s3a
model = s3a.SSViT.from_pretrained(sys.argv[1])
with torch.inference_mode():
    found = model(torch.from_numpy(numpy.load(sys.argv[2])))
numpy.save(sys.argv[3], found.numpy())
"""


def test_a_fresh_process_gives_the_same_bits(tmp_path: Path):
    model, images = quantize.quantize(trained(), "int8-dynamic"), torch.randn(SHAPE)
    model.save_pretrained(tmp_path)
    np.save(tmp_path / "images.npy", images.numpy())
    files = [str(tmp_path), str(tmp_path / "images.npy"), str(tmp_path / "logits.npy")]
    code = f"import torch; torch.set_num_threads(1)\n{FRESH}"
    run = subprocess.run([sys.executable, "-c", code, *files], capture_output=True, text=True, check=True)
    assert run.stderr == ""
    assert np.array_equal(np.load(tmp_path / "logits.npy"), logits(model, images).numpy())


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-activations-int4-weights"])
def test_compiled(tmp_path: Path, graphs, scheme: str):
    """One graph per region; attention sums in another order there, and a code may fall to its neighbor."""
    quantize.quantize(trained(), scheme).save_pretrained(tmp_path)
    model, images = SSViT.from_pretrained(tmp_path), torch.randn(SHAPE)
    right = logits(model, images)
    region_code.cache_clear()
    int8.PACKED.clear()
    assert (logits(s3a.compile_model(model), images) - right).norm() < 0.03 * right.norm()
    assert graphs["compiled"] > 0
    assert len(int8.PACKED) == (24 if scheme == "int8-dynamic" and int8.CAN_MULTIPLY else 0)  # the blocks' layers


def test_products_of_bytes():
    """oneDNN's, and by hand in whole numbers."""
    codes = torch.randint(0, 256, (5, 16), dtype=torch.uint8)
    weight, scale = torch.randint(-127, 128, (7, 16), dtype=torch.int8), torch.rand(7)
    right = (codes.long() - 128) @ weight.long().T * scale.double()
    torch.testing.assert_close(int8.multiply_bytes(codes, weight, scale).double(), right, rtol=1 / 128, atol=0)


def test_products_of_bytes_follow_their_weight():
    """Whose layout is kept as long as it stays the same, and only then."""
    codes, scale = torch.randint(0, 256, (5, 16), dtype=torch.uint8), torch.rand(7)
    weight, other = (torch.randint(-127, 128, (7, 16), dtype=torch.int8) for _ in range(2))
    before = int8.multiply_bytes(codes, weight, scale)
    assert int8.packed(weight) is int8.packed(weight)
    weight.copy_(other)
    after = int8.multiply_bytes(codes, weight, scale)
    assert not torch.equal(after, before)
    assert torch.equal(after, int8.multiply_bytes(codes, other, scale))
    with torch.inference_mode():
        weight = other.clone()
        int8.multiply_bytes(codes, weight, scale)
        weight.zero_()
        assert not int8.multiply_bytes(codes, weight, scale).any()


def test_compiled_linear_layers():
    """Tokens of very different sizes have scales of their own; one of zeros gives the bias."""
    layer = nn.Sequential(nn.Linear(32, 8)).bfloat16()
    quantize.quantize_(layer, quantize.CONFIGS["int8-dynamic"](SCHEMES["int8-dynamic"]))
    weight, bias = layer[0].weight.detach(), layer[0].bias.detach()
    x = (torch.randn(2, 3, 4, 32) * 10.0 ** torch.arange(-3, 1)[:, None]).bfloat16()
    x[0, 0, 0] = 0
    found, right = int8.int8_linear(x, weight, bias), nn.functional.linear(x.float(), weight.dequantize().float())
    assert torch.equal(found[0, 0, 0], bias)
    error = (found.float() - bias - right).abs().amax(-1)
    assert (error <= 0.02 * x.float().norm(dim=-1) + 2**-9).all()


def test_costs_and_card_are_of_the_model(folder: Path):
    model = SSViT.from_pretrained(folder)
    assert count_cost(model, 64, 64) == count_cost(trained(), 64, 64)
    text = model_card(model)
    parameters = sum(parameter.numel() for parameter in trained().parameters())
    assert f"| parameters | {parameters:,} |" in text
    assert "| quantization | int8-dynamic, 26 linear layers; the rest bfloat16 |" in text
    assert "SSViT.from_pretrained" in text
    assert "timm.create_model" not in text
    assert ModelCard(text).data.library_name == "s3a"


# --------------------------------------------------------------------------------------------------------
# Layers
# --------------------------------------------------------------------------------------------------------


def test_layers_are_chosen_by_name(tmp_path: Path):
    model = trained()
    chosen, left = choose_layers(model, "int8-dynamic", layers=("stages.2.*", "head"), skip=("*.fc2",))
    assert left == []
    assert {name.split(".")[0] for name in chosen} == {"stages", "head"}
    assert len(chosen) == 2 * 3 + 1
    found = quantize.quantize(model, "int8-dynamic", chosen)
    kinds = {name: type(m.weight).__name__ for name, m in found.named_modules() if isinstance(m, nn.Linear)}
    assert {name for name, kind in kinds.items() if kind == "Int8Tensor"} == set(chosen)
    found.save_pretrained(tmp_path)
    images = torch.randn(SHAPE)
    assert torch.equal(logits(SSViT.from_pretrained(tmp_path), images), logits(found, images))


def test_layers_without_whole_groups_are_left():
    with torch.device("meta"):
        model = timm.create_model("ssvit_base")
    chosen, left = choose_layers(model, "int8-activations-int4-weights")
    widths = {name: model.get_submodule(name).in_features % 32 for name in chosen + left}
    assert {name for name, rest in widths.items() if rest} == set(left) != set()
    assert choose_layers(model, "int8-dynamic")[1] == []
    with pytest.raises(ValueError, match=r"no linear layer.*groups of 32"):
        choose_layers(model, "int8-activations-int4-weights", layers=("stages.0.blocks.0.attn.qkv",))


def test_layers_that_are_not_there():
    model = trained()
    for options in ({"layers": ("stages.7.*",)}, {"skip": ("haed",)}):
        with pytest.raises(ValueError, match=r"layer pattern '(stages.7.\*|haed)' is unknown: it must be one of"):
            choose_layers(model, "int8-dynamic", **options)
    with pytest.raises(ValueError, match="the patterns leave none"):
        choose_layers(model, "int8-dynamic", skip=("*",))
    with pytest.raises(ValueError, match=r"layer of scheme 'int8-dynamic' 'stages.0.blocks.0.attn.lepe' is unknown"):
        quantize.quantize(model, "int8-dynamic", ["stages.0.blocks.0.attn.lepe"])


# --------------------------------------------------------------------------------------------------------
# Refused
# --------------------------------------------------------------------------------------------------------


def test_unknown_schemes():
    with pytest.raises(ValueError, match=r"'int8-dynamc' is unknown.*did you mean 'int8-dynamic'"):
        check_scheme("int8-dynamc")


def test_schemes_that_the_machine_cannot_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match=r"'float8-dynamic' needs a CUDA GPU of compute capability 8\.9.*there is none"
    ):
        check_scheme("float8-dynamic")
    with pytest.raises(ValueError, match=r"capability 9\.0 .*none here; it needs mslk 1\.0.*pip install 'mslk>=1\.0'"):
        check_scheme("int4-weight-only")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ValueError, match=r"capability 8\.9 or more, and the one here has 8\.0"):
        check_scheme("float8-dynamic")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert check_scheme("float8-dynamic").capability == (8, 9)


def test_old_torchao(monkeypatch: pytest.MonkeyPatch, folder: Path):
    monkeypatch.setattr(schemes, "version", lambda name: "0.9.2")
    for call in (lambda: check_scheme("int8-dynamic"), lambda: SSViT.from_pretrained(folder)):
        with pytest.raises(ValueError, match=r"needs torchao 0\.18 or newer, and 0\.9\.2 is installed \(pip install"):
            call()


def test_schemes_that_cannot_be_trained():
    assert check_trainable("int8-dynamic").trains
    with pytest.raises(ValueError, match="'float8-weight-only' cannot be trained for: use one of int8-weight-only"):
        check_trainable("float8-weight-only")


def test_quantized_models_stay_as_they_are(folder: Path):
    model = SSViT.from_pretrained(folder)
    with pytest.raises(ValueError, match="quantized already, by 'int8-dynamic'"):
        quantize.quantize(model, "int8-weight-only")
    with pytest.raises(ValueError, match=r"num_classes is 7: .* is quantized with 5 classes"):
        SSViT.from_pretrained(folder, num_classes=7)
    with pytest.raises(ValueError, match=r"not for timm: load them with SSViT\.from_pretrained"):
        timm.create_model(f"local-dir:{folder}", pretrained=True)
    model.reset_classifier(7)
    with pytest.raises(ValueError, match="layer 'head' was replaced"):
        model.save_pretrained(folder)


def change(folder: Path, config: dict | None = None, drop: str | None = None, **tensors: torch.Tensor) -> None:
    state = load_file(folder / "model.safetensors")
    state.pop(drop, None)
    save_file(state | tensors, folder / "model.safetensors")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | (config or {})))


QKV = "stages.0.blocks.0.attn.qkv"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drop": f"{QKV}._weight_scale"}, rf"missing: {QKV}\._weight_scale"),
        ({f"{QKV}.weight": torch.zeros(96, 32)}, rf"surplus: {QKV}\.weight"),
        ({f"{QKV}._weight_qdata": torch.zeros(96, 31, dtype=torch.int8)}, r"_weight_qdata is \(96, 31\), must be"),
        ({f"{QKV}._weight_qdata": torch.zeros(96, 32)}, rf"another kind of numbers: {QKV}\._weight_qdata"),
        ({"config": {"quantization": {"scheme": "int8-weight-onyl", "layers": [QKV]}}}, "did you mean 'int8-weight-on"),
        ({"config": {"quantization": {"scheme": "int8-dynamic", "layers": [QKV]}}}, "missing: .*surplus: "),
        ({"config": {"quantization": {"scheme": "int8-dynamic", "layers": ["qkv"]}}}, "'qkv' is unknown"),
        ({"config": {"quantization": {"scheme": ON_CPUS[2], "layers": [QKV]}}}, "does not hold the ssvit_nano"),
        ({"config": {"quantization": {"scheme": "float8-dynamic", "layers": [QKV]}}}, "needs a CUDA GPU"),
        ({"config": {"quantization": "int8"}}, "quantization is 'int8': it must name a scheme and layers"),
        ({"config": {"quantization": {"scheme": "int8-dynamic", "layers": []}}}, "must name a scheme and layers"),
    ],
)
def test_tampered_folders(folder: Path, changes: dict, message: str):
    change(folder, **changes)
    with pytest.raises(ValueError, match=message) as error:
        SSViT.from_pretrained(folder)
    assert "\n" not in str(error.value)


# --------------------------------------------------------------------------------------------------------
# The command
# --------------------------------------------------------------------------------------------------------


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    """recipes/quantize.py: exit status, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["recipes/quantize.py", *map(str, arguments)])
    status = 0
    try:
        runpy.run_path(str(RECIPE), run_name="__main__")
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A float nano of two classes that answers at random."""
    model = timm.create_model("ssvit_nano", num_classes=2)
    nn.init.normal_(model.head.weight, std=3)
    model.save_pretrained(tmp_path / "float", data_config={"input_size": (3, 48, 48), "crop_pct": 1.0})
    return tmp_path / "float"


def predicted(folder: Path, images: Path) -> tuple[list[int], list[int]]:
    """Predictions and labels, image by image, by plain code."""
    model = SSViT.from_pretrained(folder)
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    files = [
        (label, path) for label, name in enumerate(("dark", "light")) for path in (images / "val" / name).iterdir()
    ]
    found = [logits(model, transform(Image.open(path).convert("RGB"))[None]).argmax().item() for _, path in files]
    return found, [label for label, _ in files]


def test_the_command(monkeypatch, capsys, graphs, weights: Path, tmp_path: Path):
    """One table, whose every figure is found again by other means."""
    images, output, results = make_image_folder(tmp_path / "images"), tmp_path / "out", tmp_path / "results.json"
    given = ("--weights", weights, "--scheme", "int8-activations-int4-weights", "--output", output, "--turns", 1)
    more = ("--data", "imagefolder", "--data-dir", images, "--skip", "head", "--latency-batch", 2, "--results", results)
    status, out, _ = command(monkeypatch, capsys, *given, *more)
    assert status == 0
    assert "int8-activations-int4-weights: 25 linear layers: stages.0.blocks.0-1.attn.qkv, " in out
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in re.findall(r"\|.*", out)]
    assert header == ["model", "top-1", "agreement", "MB on disk", "MB of memory", "ms compiled", "ms eager"]
    (before, labels), (after, _) = predicted(weights, images), predicted(output, images)
    assert [row[1] for row in rows] == [f"{100 * np.mean(np.equal(found, labels)):.2f} %" for found in (before, after)]
    assert [row[2] for row in rows] == ["100.00 %", f"{100 * np.mean(np.equal(before, after)):.2f} %"]
    sizes = [(folder / "model.safetensors").stat().st_size / 1e6 for folder in (weights, output)]
    assert [row[3] for row in rows] == [f"{size:,.2f}" for size in sizes]
    assert all(float(cell) > 0 for row in rows for cell in row[4:])
    written = json.loads(results.read_text())["rows"]
    assert [row["model"] for row in written] == ["float32", "int8-activations-int4-weights"]
    assert written[1]["agreement"] == pytest.approx(np.mean(np.equal(before, after)))
    assert "| float32 | " in (output / "README.md").read_text()


def test_what_the_command_refuses(monkeypatch, capsys, weights: Path, folder: Path, tmp_path: Path):
    """In one line, before anything is written."""
    out, precious = tmp_path / "out", shutil.copytree(weights, tmp_path / "precious")
    for arguments, words in (
        ((weights, "int8-dynamc", out), ("'int8-dynamc'", "did you mean 'int8-dynamic'?")),
        ((weights, "float8-dynamic", out), ("needs a CUDA GPU of compute capability 8.9",)),
        ((folder, "int8-dynamic", out), ("quantized already",)),
        ((weights, "int8-dynamic", weights), ("is the folder of the weights",)),
        ((weights, "int8-dynamic", precious), ("precious holds weights that are not quantized",)),
        ((weights, "int8-dynamic", out, "--layers", "stage.*"), ("'stage.*' is unknown",)),
        ((weights, "int8-dynamic", out, "--batch-size", 0), ("--batch-size is 0",)),
        ((tmp_path / "none", "int8-dynamic", out), ("neither a local folder nor",)),
        ((weights, "int8-dynamic", weights / "config.json" / "x"), ("cannot be made",)),
    ):
        given = ("--weights", arguments[0], "--scheme", arguments[1], "--output", *arguments[2:])
        status, printed, err = command(monkeypatch, capsys, *given)
        assert (status, printed, err.count("\n")) == (2, "", 1), err
        assert all(word in err for word in words), err
        assert not out.exists()


def test_every_scheme_has_a_config():
    assert SCHEMES.keys() == quantize.CONFIGS.keys()


# --------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------


def test_fake_quantization_rounds_and_passes_gradients():
    layer = nn.Sequential(nn.Linear(64, 8))
    layer[0].weight.data[:, 0] = 0.2  # the largest: it is cut at 127
    weight, x = layer[0].weight.detach().clone(), torch.randn(3, 4, 4, 64)
    quantize.fake_quantize(layer, "int8-weight-only")
    scale = weight.abs().amax(1, keepdim=True) / 127.5
    rounded = (weight / scale).round().clamp(-128, 127) * scale
    found = layer(x)
    torch.testing.assert_close(found, nn.functional.linear(x, rounded, layer[0].bias))
    found.sum().backward()
    inside = (weight / scale).abs() < 127  # beyond it the gradient is cut
    expected = x.sum((0, 1, 2)).expand(8, 64)
    torch.testing.assert_close(layer[0].weight.grad[inside], expected[inside], rtol=1e-4, atol=1e-4)
    assert list(layer.state_dict()) == ["0.weight", "0.bias"]


@pytest.fixture
def recipe(tmp_path: Path) -> Recipe:
    AcceleratorState._reset_state(reset_partial_state=True)
    return dataclasses.replace(
        get_recipe("digits"),
        data="imagefolder",
        data_dir=make_image_folder(tmp_path / "images"),
        image_size=32,
        batch_size=16,
        epochs=2,
        warmup_epochs=0,
        cpu_threads=1,
        ema_decay=0.5,
        quantize="int8-dynamic",
        output_dir=tmp_path / "run",
    )


def test_a_run_leaves_quantized_weights(recipe: Recipe):
    """All of its folders; what it trains is float. Gone back an epoch, it ends with the same bytes."""
    run = train(recipe)
    for name in ("model", "best", "ema", "ema-best"):
        assert SSViT.from_pretrained(run / name).quantization.scheme == "int8-dynamic"
    state = read_newest(run / "checkpoints", print)["model"]
    plain = timm.create_model("ssvit_nano", num_classes=2).eval()
    plain.load_state_dict(state)
    images = torch.randn(2, 3, 32, 32)
    right = logits(quantize.quantize(plain, "int8-dynamic"), images)
    assert torch.equal(logits(SSViT.from_pretrained(run / "model"), images), right)

    written = (run / "model" / "model.safetensors").read_bytes()
    shutil.rmtree(next((run / "checkpoints").glob("*epoch-00002")))
    shutil.rmtree(run / "model")
    AcceleratorState._reset_state(reset_partial_state=True)
    train(recipe)
    assert (run / "model" / "model.safetensors").read_bytes() == written


def test_runs_that_cannot_be_trained_for_a_scheme(recipe: Recipe, folder: Path):
    with pytest.raises(ValueError, match="'float8-weight-only' cannot be trained for"):
        train(dataclasses.replace(recipe, quantize="float8-weight-only"))
    with pytest.raises(ValueError, match="quantized already, by 'int8-dynamic'"):
        train(dataclasses.replace(recipe, quantize=None, weights=str(folder)))
    assert not recipe.folder.exists()


@pytest.mark.slow
def test_digits_lose_next_to_nothing(tmp_path: Path):
    """At most one image of 360 in int8, and four in int4."""
    AcceleratorState._reset_state(reset_partial_state=True)
    run = train(dataclasses.replace(get_recipe("digits"), output_dir=tmp_path / "run"))
    model, data = SSViT.from_pretrained(run / "model"), load_data("digits", None)
    right = round(360 * evaluate_weights(model, data, batch_size=64).scores["top1"])
    for scheme, most in (("int8-weight-only", 1), ("int8-dynamic", 1), ("int8-activations-int4-weights", 4)):
        found = evaluate_weights(quantize.quantize(model, scheme), data, batch_size=64).scores["top1"]
        assert right - round(360 * found) <= most, scheme
