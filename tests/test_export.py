"""Exported models, executed in processes of their own that cannot import this library."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from command_line import Command, check_refused
from torch import nn

from s3a import CompilationError, quantize
from s3a import export as exports
from s3a.export import ExportError, check_format, export, verify

BLOCK_IMPORTS = """
import sys
sys.modules |= {name: None for name in ("s3a", "timm", "torchao")}
import numpy as np
_, path, images = sys.argv
images = np.load(images)
"""
RUNS = {
    "pt2": "import torch\nfound = torch.export.load(path).module()(torch.from_numpy(images)).detach().numpy()",
    "aoti": "import torch\nfound = torch._inductor.aoti_load_package(path)(torch.from_numpy(images)).numpy()",
    "onnx": "import onnxruntime\nfound, = onnxruntime.InferenceSession(path).run(None, {'images': images})",
}
# One block, for formats that compile.
TINY = {"dims": (16,), "depths": (1,), "num_heads": (2,), "mlp_ratios": (2,), "layer_scale": (None,)}


def trained(name: str = "ssvit_nano", **options: object) -> nn.Module:
    """A model whose logits are far apart."""
    model = timm.create_model(name, num_classes=5, **options).eval()
    for key, tensor in model.state_dict().items():
        if "head" in key or key.endswith("bias"):
            tensor.normal_(std=1 if "head" in key else 0.1)
        elif key.endswith("weight") and tensor.ndim == 2:
            tensor.normal_(std=tensor.shape[1] ** -0.5)
    return model


def run_alone(path: Path, format: str, images: torch.Tensor) -> np.ndarray:
    """What a file gives in a fresh process, outside of this repository and without this library."""
    inputs, outputs = path.with_name("images.npy"), path.with_name("logits.npy")
    np.save(inputs, images.numpy())
    code = f"{BLOCK_IMPORTS}\n{RUNS[format]}\nnp.save({str(outputs)!r}, found)"
    subprocess.run(
        [sys.executable, "-c", code, str(path), str(inputs)], cwd="/", check=True, capture_output=True, text=True
    )
    return np.load(outputs)


def check_alone(model: nn.Module, path: Path, format: str, sizes: tuple[int, ...], side: tuple[int, int]) -> None:
    """Compares a file with the eager model, in one process for all sizes that a batch may have."""
    for size in sizes:
        images = torch.randn(size, 3, *side)
        with torch.no_grad():
            right = model(images).numpy()
        assert right.std() > 0.1
        np.testing.assert_allclose(run_alone(path, format, images), right, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(("name", "format"), [("ssvit_nano", "pt2"), ("svit_nano", "onnx"), ("ssvit_nano", "onnx")])
def test_any_batch(tmp_path: Path, name: str, format: str):
    model, path = trained(name), tmp_path / f"model{exports.SUFFIXES[format]}"
    assert export(model, path, format, height=64, width=48, dynamic_batch=True) < 1e-4
    check_alone(model, path, format, (1, 7), (64, 48))
    assert [each.name for each in tmp_path.iterdir() if each.suffix != ".npy"] == [path.name]


@pytest.mark.parametrize("format", ["pt2", "onnx"])
def test_one_batch(tmp_path: Path, format: str):
    """A fixed batch is verified, and taken, at its size alone."""
    model, path = trained("vvt_nano"), tmp_path / f"model{exports.SUFFIXES[format]}"
    export(model, path, format, height=64, width=64, batch_size=3)
    check_alone(model, path, format, (3,), (64, 64))
    with pytest.raises(subprocess.CalledProcessError):
        run_alone(path, format, torch.randn(2, 3, 64, 64))


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


@pytest.mark.parametrize("scheme", ["int8-dynamic", "int8-activations-int4-weights"])
def test_quantized_programs(tmp_path: Path, scheme: str):
    """The same operators on the same codes, without torchao."""
    model, path = quantize.quantize(trained(**TINY), scheme), tmp_path / "model.pt2"
    assert export(model, path, "pt2", height=64, width=64, dynamic_batch=True) == 0
    images = torch.randn(7, 3, 64, 64)
    with torch.no_grad():
        np.testing.assert_allclose(run_alone(path, "pt2", images), model(images).numpy(), rtol=0.02, atol=0.02)
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


def test_no_compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("CXX", "/nowhere/g++")
    with torch._inductor.config.patch({"cpp.cxx": (None, "/nowhere/g++")}):
        torch._inductor.cpp_builder.get_cpp_compiler.cache_clear()
        with pytest.raises(CompilationError, match="no working C\\+\\+ compiler.*use the format pt2"):
            export(trained(**TINY), tmp_path / "model.pt2", "aoti", height=64, width=64)
    torch._inductor.cpp_builder.get_cpp_compiler.cache_clear()
    assert list(tmp_path.iterdir()) == []


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
    assert run_alone(tmp_path / "model.pt2", "pt2", torch.randn(3, 3, 64, 96)).shape == (3, 5)


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
