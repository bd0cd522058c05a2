"""Exported models, executed in processes of their own that cannot import this library."""

import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from helpers.exported import TINY, TINY_BACKBONE, make_confident, make_dense
from torch import nn

from s3a import export as exports
from s3a.export import FORMATS, ExportError, check_format, export, verify
from s3a.quantization.convert import quantize
from s3a.quantization.schemes import Quantization, mark_quantized

SMALL = {"pyramid_dim": 16, "backbone_args": TINY_BACKBONE}

BLOCK_IMPORTS = """
import sys
sys.modules |= {name: None for name in ("s3a", "timm", "torchao")}
import numpy as np
_, path, inputs, outputs = sys.argv
"""
RUNS = {
    "pt2": "import torch\nloaded = torch.export.load(path).module()\n"
    "run = lambda images: loaded(torch.from_numpy(images)).detach().numpy()",
    "aoti": "import torch\nloaded = torch._inductor.aoti_load_package(path)\n"
    "run = lambda images: loaded(torch.from_numpy(images)).numpy()",
    "onnx": "import onnxruntime\nloaded = onnxruntime.InferenceSession(path)\n"
    "run = lambda images: loaded.run(None, {'images': images})[0]",
}
RUN_ALL = "np.savez(outputs, **{name: run(images) for name, images in np.load(inputs).items()})"


def run_alone(path: Path, format: str, *batches: torch.Tensor) -> list[np.ndarray]:
    """What a file gives in a fresh process, outside of this repository and without this library."""
    inputs, outputs = path.with_name("images.npz"), path.with_name("logits.npz")
    np.savez(inputs, *(images.numpy() for images in batches))
    command = [sys.executable, "-c", "\n".join([BLOCK_IMPORTS, RUNS[format], RUN_ALL]), path, inputs, outputs]
    subprocess.run(command, cwd="/", check=True, capture_output=True, text=True)
    return list(np.load(outputs).values())


def check_alone(model: nn.Module, path: Path, format: str, sizes: tuple[int, ...], side: tuple[int, int]) -> None:
    """Compares a file with the eager model at some batch sizes."""
    batches = [torch.randn(size, 3, *side) for size in sizes]
    for found, images in zip(run_alone(path, format, *batches), batches, strict=True):
        with torch.no_grad():
            right = model(images).numpy()
        assert right.std() > 0.1
        np.testing.assert_allclose(found, right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("format", "options"), [pytest.param("pt2", {}, marks=pytest.mark.slow), ("onnx", TINY)])
def test_any_batch(tmp_path: Path, format: str, options: dict):
    model, path = make_confident(**options), tmp_path / f"model{FORMATS[format].suffix}"
    assert export(model, path, format, height=64, width=48, dynamic_batch=True) < 1e-4
    check_alone(model, path, format, (1, 7), (64, 48))
    assert [each.name for each in tmp_path.iterdir() if each.suffix != ".npz"] == [path.name]


@pytest.mark.slow
@pytest.mark.parametrize(("name", "format"), [("vvt_nano", "onnx"), ("svit_nano", "pt2")])
def test_one_batch(tmp_path: Path, name: str, format: str):
    """A file with a fixed batch is verified at that size, and refuses others."""
    model, path = make_confident(name), tmp_path / f"model{FORMATS[format].suffix}"
    export(model, path, format, height=64, width=64, batch_size=3)
    check_alone(model, path, format, (3,), (64, 64))
    with pytest.raises(Exception, match=r"Got: 2 Expected: 3|size\(\)\[0\] == 3"):
        FORMATS[format].load(path)(torch.randn(2, 3, 64, 64))


@pytest.mark.slow
def test_label_maps(tmp_path: Path):
    """A whole model, with a resizing to the image's size."""
    model, path = make_dense(**SMALL), tmp_path / "model.onnx"
    assert export(model, path, "onnx", height=64, width=96) < 1e-4
    check_alone(model, path, "onnx", (1,), (64, 96))


@pytest.mark.parametrize("format", ["pt2", "aoti", "onnx"])
@pytest.mark.parametrize(
    "name",
    [pytest.param("semantic_fpn", marks=pytest.mark.slow), pytest.param("upernet", marks=pytest.mark.exhaustive)],
)
def test_every_label_map_in_every_format(tmp_path: Path, name: str, format: str):
    options = SMALL if name == "semantic_fpn" else {"head_dim": 16, "auxiliary_dim": 8}
    model, path = make_dense(name, **options), tmp_path / f"model{FORMATS[format].suffix}"
    export(model, path, format, height=64, width=96, dynamic_batch=True)
    check_alone(model, path, format, (1, 7), (64, 96))


@pytest.mark.slow
def test_backbones_of_detectors(tmp_path: Path):
    """The maps of strides 4, 8 and 16; what the whole detector finds has no shape."""
    model, path = make_dense("retinanet", **SMALL), tmp_path / "model.onnx"
    with pytest.raises(ValueError, match=r"a RetinaNet finds another number of objects.*model\.backbone"):
        export(model, path, "onnx", height=64, width=96)
    assert export(model.backbone, path, "onnx", height=64, width=96, dynamic_batch=True) < 1e-4
    images = torch.randn(3, 3, 64, 96)
    session = onnxruntime.InferenceSession(path)
    assert [each.name for each in session.get_outputs()] == ["map_0", "map_1", "map_2"]
    maps = session.run(None, {"images": images.numpy()})
    with torch.no_grad():
        for found, right, stride in zip(maps, model.backbone(images), (4, 8, 16), strict=True):
            assert found.shape[2:] == (64 // stride, 96 // stride) or found.shape[1:3] == (64 // stride, 96 // stride)
            np.testing.assert_allclose(found, right.numpy(), atol=1e-4, rtol=1e-4)


@pytest.mark.slow
def test_compiled_packages(tmp_path: Path):
    model, path = make_confident(**TINY), tmp_path / "model.pt2"
    assert export(model, path, "aoti", height=64, width=64, dynamic_batch=True) < 1e-4
    check_alone(model, path, "aoti", (1, 7), (64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["pt2", "aoti", "onnx"])
@pytest.mark.parametrize("name", ["ssvit_nano", "svit_nano", "vvt_nano"])
def test_every_family_in_every_format(tmp_path: Path, name: str, format: str):
    model, path = make_confident(name), tmp_path / f"model{FORMATS[format].suffix}"
    export(model, path, format, height=64, width=96, dynamic_batch=True)
    check_alone(model, path, format, (1, 7), (64, 96))


@pytest.mark.slow
@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-activations-int4-weights"])
def test_quantized_programs(tmp_path: Path, scheme: str):
    """The same operators on the same codes, without torchao."""
    model, path = quantize(make_confident(**TINY), scheme), tmp_path / "model.pt2"
    assert export(model, path, "pt2", height=64, width=64, dynamic_batch=True) == 0
    images = torch.randn(7, 3, 64, 64)
    (found,) = run_alone(path, "pt2", images)
    with torch.no_grad():
        np.testing.assert_allclose(found, model(images).numpy(), rtol=0.02, atol=0.02)
    for format, name in (("onnx", "model.onnx"), ("aoti", "model.pt2")):
        with pytest.raises(ValueError, match=rf"quantized, by '{scheme}': '{format}' takes float32 weights"):
            export(model, tmp_path / name, format, height=64, width=64)


# --------------------------------------------------------------------------------------------------------
# Refused
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("format", ["aoti", "onnx"])
def test_quantized_weights_are_for_programs_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, format: str):
    model, suffix = make_confident(**TINY), FORMATS[format].suffix
    mark_quantized(model, Quantization("int8-dynamic", ()))
    monkeypatch.setattr(exports, "export_program", None)
    with pytest.raises(ValueError, match=rf"quantized, by 'int8-dynamic': '{format}' takes float32 weights"):
        export(model, tmp_path / f"model{suffix}", format, height=64, width=64)


def test_formats_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"format 'onxx' is unknown: .* did you mean 'onnx'"):
        check_format("onxx", Path("model.onnx"))
    with pytest.raises(ValueError, match=r"'model\.pt2': for 'onnx' its name must end in \.onnx"):
        check_format("onnx", Path("model.pt2"))
    monkeypatch.setattr(exports, "find_spec", lambda name: None if name.startswith("onnxr") else name)
    with pytest.raises(ValueError, match=r"format 'onnx' needs onnxruntime: pip install onnxruntime$"):
        check_format("onnx", Path("model.onnx"))
    check_format("aoti", Path("model.pt2"))


def test_wrong_outcomes_are_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """Each file is run and compared before it replaces an older one."""
    model, path = make_confident(**TINY), tmp_path / "model.pt2"
    path.write_text("of old")
    right = FORMATS["pt2"]
    wrong = replace(right, load=lambda path: lambda images: right.load(path)(images) + 2e-3)
    monkeypatch.setitem(FORMATS, "pt2", wrong)
    with pytest.raises(ExportError, match=r"is off by 2\.0e-03 for 1 images: it must be within 0\.0001"):
        export(model, path, "pt2", height=64, width=64)
    assert [each.name for each in tmp_path.iterdir()] == ["model.pt2"]
    assert path.read_text() == "of old"
    with pytest.raises(ExportError, match=r"gives \(2, 4\): the model itself gives \(2, 5\)"):
        verify(model, lambda images: model(images)[:, 1:], torch.randn(2, 3, 64, 64))


@pytest.mark.parametrize("size", [1, 7])
def test_a_file_for_any_batch_is_run_at_more_than_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, size: int):
    """One that is wrong at a single size: of one image, where axes broadcast, or of more than it was traced for."""
    model = make_confident(**TINY)

    def load(path: Path):
        return lambda images: model(images) + (0.1 if len(images) == size else 0.0)

    monkeypatch.setattr(exports, "export_program", lambda *_: None)  # nothing has to be traced for it
    monkeypatch.setitem(FORMATS, "pt2", replace(FORMATS["pt2"], write=lambda _, path: path.touch(), load=load))
    with pytest.raises(ExportError, match=rf"is off by 1\.0e-01 for {size} images"):
        export(model, tmp_path / "model.pt2", "pt2", height=64, width=64, dynamic_batch=True)


def test_sizes_that_the_model_does_not_take(tmp_path: Path):
    with pytest.raises(ValueError, match="16 x 64 pixels"):
        export(make_confident(**TINY), tmp_path / "model.pt2", "pt2", height=16, width=64)
