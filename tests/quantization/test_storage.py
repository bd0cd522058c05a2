"""Quantized weights folders: codes and scales by hand, models that come back bit by bit, and what is refused."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers.fork_server import run_python
from helpers.quantized import ON_CPUS, SHAPE, compute_logits, make_trained
from safetensors.torch import load_file, save_file

from s3a import VVT, SSViT, SViT
from s3a.quantization.convert import cast_model, choose_layers, quantize
from s3a.quantization.schemes import Quantization
from s3a.quantization.storage import build_expected_state, pack_int4, unpack_int4


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A nano in int8-dynamic."""
    quantize(make_trained(), "int8-dynamic").save_pretrained(tmp_path / "quantized")
    return tmp_path / "quantized"


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
    model = make_trained()
    name = {"int8": "int8-dynamic", "int4": "int8-activations-int4-weights"}[scheme]
    quantize(model, name).save_pretrained(tmp_path)
    for layer in ("stages.1.blocks.0.attn.qkv", "stages.2.blocks.1.mlp.fc2", "head"):
        weight = model.get_submodule(layer).weight.detach().double().numpy()
        groups = weight.reshape(len(weight), -1, group or weight.shape[1])
        most = np.abs(groups).max(-1, keepdims=True)
        error = np.abs(dequantized(tmp_path, layer).reshape(groups.shape) - groups)
        assert (error <= 0.5 * most / steps + most / 128).all(), layer
        assert error.max() > 0.3 * most.max() / steps / 2  # it is quantized


def test_int4_codes_lie_two_to_a_byte():
    codes = torch.randint(-8, 8, (5, 12), dtype=torch.int8)
    packed = pack_int4(codes)
    assert (packed.dtype, packed.shape) == (torch.uint8, (5, 6))
    assert torch.equal(unpack_int4(packed), codes)
    assert packed[0, 0] == (int(codes[0, 0]) % 16) + 16 * (int(codes[0, 1]) % 16)


@pytest.mark.parametrize(("scheme", "most"), [("int8-weight-only", 0.32), ("int8-dynamic", 0.32), (ON_CPUS[2], 0.24)])
@pytest.mark.parametrize("name", ["ssvit_nano", "ssvit_small", "svit_nano", "vvt_nano"])
def test_size_on_disk(tmp_path: Path, name: str, scheme: str, most: float):
    with torch.device("meta"):
        model = timm.create_model(name)
    floats = sum(tensor.nbytes for tensor in model.state_dict().values())
    layers, _ = choose_layers(model, scheme)
    cast_model(model)
    state = build_expected_state(model, Quantization(scheme, tuple(layers)))
    save_file({key: torch.zeros(tensor.shape, dtype=tensor.dtype) for key, tensor in state.items()}, tmp_path / "file")
    assert (tmp_path / "file").stat().st_size / floats < most


@pytest.mark.parametrize("scheme", ON_CPUS)
@pytest.mark.parametrize(("name", "family"), [("ssvit_nano", SSViT), ("svit_nano", SViT), ("vvt_nano", VVT)])
def test_round_trip(tmp_path: Path, name: str, family: type, scheme: str):
    """Bit-equal logits; and what was loaded is saved as the same bytes."""
    model = quantize(make_trained(name), scheme)
    model.save_pretrained(tmp_path / "one")
    loaded = family.from_pretrained(tmp_path / "one")
    images = torch.randn(SHAPE)
    assert torch.equal(compute_logits(loaded, images), compute_logits(model, images))
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
    model, images = quantize(make_trained(), "int8-dynamic"), torch.randn(SHAPE)
    model.save_pretrained(tmp_path)
    np.save(tmp_path / "images.npy", images.numpy())
    files = [str(tmp_path), str(tmp_path / "images.npy"), str(tmp_path / "logits.npy")]
    code = f"import torch; torch.set_num_threads(1)\n{FRESH}"
    run = run_python(["-c", code, *files], tmp_path, dict(os.environ))
    assert (run.returncode, run.stderr) == (0, "")
    assert np.array_equal(np.load(tmp_path / "logits.npy"), compute_logits(model, images).numpy())


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
