"""Exported models, executed in processes of their own that cannot import this library."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers.command_line import Command, check_refused
from torch import nn

from s3a import export as exports
from s3a.export import ExportError, check_format, export, verify
from s3a.quantization import convert as quantize

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
# One block, for formats that compile.
TINY = {"dims": (16,), "depths": (1,), "num_heads": (2,), "mlp_ratios": (2,), "layer_scale": (None,)}


def trained(name: str = "ssvit_nano", **options: object) -> nn.Module:
    """A model whose logits are far apart."""
    model = timm.create_model(name, num_classes=5, **options).eval()
    for key, tensor in model.state_dict().items():
        if key.endswith("bias"):
            tensor.normal_(std=0.1)
        elif key.endswith("weight") and tensor.ndim == 2:
            tensor.normal_(std=tensor.shape[1] ** -0.5)
    return model


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


@pytest.mark.parametrize(("format", "options"), [("pt2", {}), ("onnx", TINY)])
def test_any_batch(tmp_path: Path, format: str, options: dict):
    model, path = trained(**options), tmp_path / f"model{exports.SUFFIXES[format]}"
    assert export(model, path, format, height=64, width=48, dynamic_batch=True) < 1e-4
    check_alone(model, path, format, (1, 7), (64, 48))
    assert [each.name for each in tmp_path.iterdir() if each.suffix != ".npz"] == [path.name]


@pytest.mark.parametrize(("name", "format"), [("vvt_nano", "onnx"), ("svit_nano", "pt2")])
def test_one_batch(tmp_path: Path, name: str, format: str):
    """A fixed batch is verified, and taken, at its size alone."""
    model, path = trained(name), tmp_path / f"model{exports.SUFFIXES[format]}"
    export(model, path, format, height=64, width=64, batch_size=3)
    check_alone(model, path, format, (3,), (64, 64))
    with pytest.raises(Exception, match=r"Got: 2 Expected: 3|size\(\)\[0\] == 3"):
        exports.load(path, format)(torch.randn(2, 3, 64, 64))


def test_compiled_packages(tmp_path: Path):
    model, path = trained(**TINY), tmp_path / "model.pt2"
    assert export(model, path, "aoti", height=64, width=64, dynamic_batch=True) < 1e-4
    check_alone(model, path, "aoti", (1, 7), (64, 64))


@pytest.mark.slow
@pytest.mark.parametrize("format", ["pt2", "aoti", "onnx"])
@pytest.mark.parametrize("name", ["ssvit_nano", "svit_nano", "vvt_nano"])
def test_every_family_in_every_format(tmp_path: Path, name: str, format: str):
    model, path = trained(name), tmp_path / f"model{exports.SUFFIXES[format]}"
    export(model, path, format, height=64, width=96, dynamic_batch=True)
    check_alone(model, path, format, (1, 7), (64, 96))


@pytest.mark.parametrize(
    "scheme", ["int8-dynamic", pytest.param("int8-activations-int4-weights", marks=pytest.mark.slow)]
)
def test_quantized_programs(tmp_path: Path, scheme: str):
    """The same operators on the same codes, without torchao."""
    model, path = quantize.quantize(trained(**TINY), scheme), tmp_path / "model.pt2"
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


def test_formats_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(ValueError, match=r"format 'onxx' is unknown: .* did you mean 'onnx'"):
        check_format("onxx", Path("model.onnx"))
    with pytest.raises(ValueError, match=r"'model\.pt2': for 'onnx' its name must end in \.onnx"):
        check_format("onnx", Path("model.pt2"))
    monkeypatch.setattr(exports, "find_spec", lambda name: None if name.startswith("onnxr") else name)
    with pytest.raises(ValueError, match=r"format 'onnx' needs onnxruntime: pip install onnxruntime$"):
        check_format("onnx", Path("model.onnx"))
    check_format("aoti", Path("model.pt2"))


def test_no_compiler(tmp_path: Path):
    """In a process of its own: PyTorch remembers for good what it found of compilers."""
    trained(**TINY).save_pretrained(tmp_path / "weights", data_config={"input_size": (3, 64, 64)})
    tool, out = Path(__file__).parents[1] / "tools" / "export.py", tmp_path / "out"
    given = ["--weights", tmp_path / "weights", "--format", "aoti", "--output", out / "model.pt2"]
    environment = os.environ | {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    run = subprocess.run([sys.executable, tool, *given], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert re.search(r"error: .*no working C\+\+ compiler.*use the format pt2", run.stderr), run.stderr
    assert list(out.iterdir()) == []


def test_wrong_outcomes_are_not_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """What is written is run again, and compared."""
    model, path = trained(**TINY), tmp_path / "model.pt2"
    path.write_text("of old")
    load = exports.load
    monkeypatch.setattr(exports, "load", lambda *where: lambda images: load(*where)(images) + 2e-3)
    with pytest.raises(ExportError, match=r"is off by 2\.0e-03 for 1 images: it must be within 0\.0001"):
        export(model, path, "pt2", height=64, width=64)
    assert [each.name for each in tmp_path.iterdir()] == ["model.pt2"]
    assert path.read_text() == "of old"
    with pytest.raises(ExportError, match=r"gives \(2, 4\): the model itself gives \(2, 5\)"):
        verify(model, lambda images: model(images)[:, 1:], torch.randn(2, 3, 64, 64))


def test_sizes_that_the_model_does_not_take(tmp_path: Path):
    with pytest.raises(ValueError, match="16 x 64 pixels"):
        export(trained(**TINY), tmp_path / "model.pt2", "pt2", height=16, width=64)


# --------------------------------------------------------------------------------------------------------
# The tool
# --------------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    trained(**TINY).save_pretrained(tmp_path / "weights", data_config={"input_size": (3, 64, 64)})
    return tmp_path / "weights"


def test_the_tool(command: Command, graphs, weights: Path, tmp_path: Path):
    given = ("--weights", weights, "--format", "pt2", "--output", tmp_path / "model.pt2", "--dynamic-batch")
    status, out, _ = command("export", *given, "--width", 96, "--turns", 1, "--batch-size", 2)
    assert status == 0
    assert "for any number of images of 64 x 96 pixels; logits within" in out
    assert "runs by torch.export.load(FILE).module()(images)" in out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    assert rows[0] == ["model", "ms a batch", "images/s", "against compiled"]
    assert [row[0] for row in rows[2:]] == ["pt2", "compiled", "eager"]
    for _, milliseconds, speed, _ in rows[2:]:
        assert float(speed) == pytest.approx(2e3 / float(milliseconds), rel=0.2)


def test_what_the_tool_refuses(command: Command, weights: Path, tmp_path: Path):
    good = {"--weights": weights, "--format": "pt2", "--output": tmp_path / "model.pt2"}
    for changes, words in (
        ({"--output": tmp_path / "model.bin"}, ("must end in .pt2",)),
        ({"--weights": tmp_path / "none"}, ("neither a local folder",)),
        ({"--height": 8}, ("8 x 64 pixels",)),
        ({"--batch-size": 0}, ("--batch-size is 0",)),
        ({"--format": "tflite"}, ("--format",)),
    ):
        arguments = [word for pair in ({**good, **changes}).items() for word in pair]
        check_refused(command("export", *arguments), *words)
    assert not (tmp_path / "model.pt2").exists()
