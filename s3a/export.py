"""Models as files that run without this library: torch.export programs, AOTInductor packages, ONNX.

A program belongs to one image size, since plans do; its batch is fixed or open. All are made on the CPU, for it.
"""

import logging
import warnings
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from s3a.analysis.cost import count_channels, count_cost
from s3a.quantization.schemes import get_quantization
from s3a.support.compiler import raise_compilation_errors
from s3a.support.errors import unknown

Format = Literal["pt2", "aoti", "onnx"]
SUFFIXES: dict[str, str] = {"pt2": ".pt2", "aoti": ".pt2", "onnx": ".onnx"}
NEEDS = {"pt2": (), "aoti": (), "onnx": ("onnx", "onnxscript", "onnxruntime")}
TOLERANCE = 1e-4  # of a logit, absolute and relative
OPEN_BATCHES = (1, 7)  # sizes at which an open batch is verified

Run = Callable[[Tensor], Tensor]


class ExportError(ValueError):
    """An exported model does not do what the model does."""


def check_format(format: str, path: Path) -> None:
    """Raises ValueError for a format that is unknown or lacks a package here, and for a file of another ending."""
    if format not in SUFFIXES:
        raise unknown("format", format, SUFFIXES)
    missing = [package for package in NEEDS[format] if find_spec(package) is None]
    if missing:
        raise ValueError(f"format {format!r} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if path.suffix != SUFFIXES[format]:
        raise ValueError(f"the file is {str(path)!r}: for {format!r} its name must end in {SUFFIXES[format]}")


def export(
    model: nn.Module,
    path: Path,
    format: Format,
    *,
    height: int,
    width: int,
    batch_size: int = 1,
    dynamic_batch: bool = False,
) -> float:
    """Writes a model as a file of the format, runs what was written, and returns how far its logits are off at most.

    Args:
        model: of float32; or quantized, for "pt2".
        path: replaced where it exists, once the file is verified.
        height, width: of the images, in pixels.
        batch_size: images at a time, if that is fixed.
        dynamic_batch: any number of images at a time.

    Raises:
        ValueError: for a format, size or model that cannot be exported; `ExportError` where the outcome is wrong.
        CompilationError: where "aoti" finds no working compiler.
    """
    check_format(format, path)
    if format != "pt2" and get_quantization(model):
        raise ValueError(
            f"the weights are quantized, by {model.quantization.scheme!r}: {format!r} takes float32 weights, "
            "and 'pt2' both; export the weights that they were made from"
        )
    count_cost(model, height, width)  # says what is wrong with the size
    sizes = OPEN_BATCHES if dynamic_batch else (batch_size,)
    shape = (count_channels(model), height, width)
    model = model.cpu().eval().requires_grad_(False)
    program = trace(model, torch.randn(2 if dynamic_batch else batch_size, *shape), dynamic_batch)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    try:
        WRITE[format](program, partial)
        difference = max(verify(model, load(partial, format), torch.randn(size, *shape)) for size in sizes)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return difference


def trace(model: nn.Module, images: Tensor, dynamic_batch: bool) -> ExportedProgram:
    """The model's program for images of that size."""
    dynamic = ({0: Dim("batch", min=1)},) if dynamic_batch else None
    with torch.no_grad():
        if get_quantization(model) is None:
            return torch.export.export(model, (images,), dynamic_shapes=dynamic)
        from s3a.quantization import convert  # noqa: PLC0415  torchao is slow to import, and most models are not quantized

        return convert.export_program(model, images, dynamic_shapes=dynamic)


def write_pt2(program: ExportedProgram, path: Path) -> None:
    """A program for `torch.export.load`."""
    torch.export.save(program, path)


def write_aoti(program: ExportedProgram, path: Path) -> None:
    """Compiled code and weights for `torch._inductor.aoti_load_package` and for C++."""
    with raise_compilation_errors(instead="use the format pt2, which needs no compiler"):
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def write_onnx(program: ExportedProgram, path: Path) -> None:
    """An ONNX graph from `images` to `logits`, weights inside."""
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # opset conversions that it does not need
    with warnings.catch_warnings(action="ignore"):
        graph = torch.onnx.export(
            program, (), dynamo=True, verbose=False, input_names=["images"], output_names=["logits"]
        )
    graph.save(path, external_data=False)


WRITE = {"pt2": write_pt2, "aoti": write_aoti, "onnx": write_onnx}


def load(path: Path, format: Format) -> Run:
    """What was written, as a function of images; on the CPU."""
    if format == "pt2":
        return torch.export.load(path).module()
    if format == "aoti":
        return torch._inductor.aoti_load_package(str(path))
    import onnxruntime  # noqa: PLC0415  an extra of the installation

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    return lambda images: torch.from_numpy(session.run(None, {"images": images.numpy()})[0])


@torch.no_grad()
def verify(model: nn.Module, run: Run, images: Tensor) -> float:
    """How far an exported model is off on some images, at most; ExportError where that is too far."""
    right, found = model(images), run(images)
    if found.shape != right.shape:
        raise ExportError(f"the exported model gives {tuple(found.shape)}: the model itself gives {tuple(right.shape)}")
    difference = (found - right).abs().max().item()
    if not torch.allclose(found, right, rtol=TOLERANCE, atol=TOLERANCE):
        raise ExportError(
            f"the exported model is off by {difference:.1e} for {len(images)} images: it must be within {TOLERANCE}; "
            "report it, with the versions of PyTorch and of the format's packages"
        )
    return difference
