"""Exports models to files that run without this library: torch.export programs, AOTInductor packages, ONNX.

A file is for images of one size, because plans are; its batch size is fixed or open. Files are made on the CPU, for it.
Models for classes and label maps are exported whole; what a detector finds has no fixed shape, so its backbone alone.
"""

import logging
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from s3a.analysis.cost import count_channels, count_cost
from s3a.models.detection import Detector
from s3a.quantization.schemes import get_quantization
from s3a.support.compiler import raise_compilation_errors
from s3a.support.errors import make_unknown_error

TOLERANCE = 1e-4  # of a logit, absolute and relative
OPEN_BATCHES = (1, 7)  # the sizes at which a file with an open batch is verified

Predictor = Callable[[Tensor], Tensor | list[Tensor]]  # from images to logits, or a backbone's to maps, on the CPU


class ExportError(ValueError):
    """The outputs of an exported model differ from those of the model."""


# --------------------------------------------------------------------------------------------------------
# Formats
# --------------------------------------------------------------------------------------------------------


def write_pt2(program: ExportedProgram, path: Path) -> None:
    """Writes a program for `torch.export.load`."""
    torch.export.save(program, path)


def load_pt2(path: Path) -> Predictor:
    """The model that such a file holds."""
    return torch.export.load(path).module()


def write_aoti(program: ExportedProgram, path: Path) -> None:
    """Writes compiled code and weights for `torch._inductor.aoti_load_package` and for C++."""
    with raise_compilation_errors(instead="use the format pt2, which needs no compiler"):
        torch._inductor.aoti_compile_and_package(program, package_path=str(path))


def load_aoti(path: Path) -> Predictor:
    """The model that such a file holds."""
    return torch._inductor.aoti_load_package(str(path))


def write_onnx(program: ExportedProgram, path: Path) -> None:
    """Writes an ONNX graph from `images` to `logits`, or to `map_0`, `map_1`, ..., with the weights inside."""
    num_outputs = len(program.graph_signature.user_outputs)
    names = ["logits"] if num_outputs == 1 else [f"map_{index}" for index in range(num_outputs)]
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)  # conversions of opsets that it does not need
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        graph = torch.onnx.export(program, (), dynamo=True, verbose=False, input_names=["images"], output_names=names)
    assert graph is not None
    graph.save(path, external_data=False)


def load_onnx(path: Path) -> Predictor:
    """The model that such a file holds, in ONNX Runtime."""
    import onnxruntime  # noqa: PLC0415  an extra of the installation

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def run(images: Tensor) -> Tensor | list[Tensor]:
        outputs = [torch.from_numpy(each) for each in session.run(None, {"images": images.numpy()})]
        return outputs[0] if len(outputs) == 1 else outputs

    return run


@dataclass(frozen=True, kw_only=True)
class ExportFormat:
    """A kind of file.

    Attributes:
        suffix: how names of its files end.
        packages: those that writing and verifying needs beside PyTorch.
        write: writes a program to a path.
        load: reads the model from a path again.
        usage: how users run a file; "{capability}" stands for this processor's instructions.
    """

    suffix: str
    packages: tuple[str, ...] = ()
    write: Callable[[ExportedProgram, Path], None]
    load: Callable[[Path], Predictor]
    usage: str


FORMATS: dict[str, ExportFormat] = {
    "pt2": ExportFormat(
        suffix=".pt2",
        write=write_pt2,
        load=load_pt2,
        usage="torch.export.load(FILE).module()(images), with PyTorch alone",
    ),
    "aoti": ExportFormat(
        suffix=".pt2",
        write=write_aoti,
        load=load_aoti,
        usage="torch._inductor.aoti_load_package(FILE)(images), with PyTorch alone, or from C++; on processors that "
        "have what this one has ({capability})",
    ),
    "onnx": ExportFormat(
        suffix=".onnx",
        packages=("onnx", "onnxscript", "onnxruntime"),
        write=write_onnx,
        load=load_onnx,
        usage='onnxruntime.InferenceSession(FILE).run(None, {{"images": images}})',
    ),
}


def check_format(format: str, path: Path) -> ExportFormat:
    """The format of that name; ValueError if it is unknown, lacks a package here, or the file has another suffix."""
    if format not in FORMATS:
        raise make_unknown_error("format", format, FORMATS)
    found = FORMATS[format]
    missing = [package for package in found.packages if find_spec(package) is None]
    if missing:
        raise ValueError(f"format {format!r} needs {', '.join(missing)}: pip install {' '.join(missing)}")
    if path.suffix != found.suffix:
        raise ValueError(f"the file is {str(path)!r}: for {format!r} its name must end in {found.suffix}")
    return found


# --------------------------------------------------------------------------------------------------------
# Export
# --------------------------------------------------------------------------------------------------------


def export(
    model: nn.Module,
    path: Path,
    format: str,
    *,
    height: int,
    width: int,
    batch_size: int = 1,
    dynamic_batch: bool = False,
) -> float:
    """Writes a model to a file, runs the file, and returns the largest difference of its outputs from the model's.

    Args:
        model: of float32; or quantized, for "pt2". Its output is a tensor, or a list of maps as that of a backbone.
        path: of the file; an older one is replaced once the new one is verified.
        format: a key of FORMATS.
        height, width: of the images, in pixels.
        batch_size: images at a time.
        dynamic_batch: whether the file takes any number of images at a time instead.

    Raises:
        ValueError: for a format, size or model that cannot be exported; `ExportError` if the file's outputs are wrong.
        CompilationError: if "aoti" finds no working compiler.
    """
    target, quantization = check_format(format, path), get_quantization(model)
    if format != "pt2" and quantization:
        raise ValueError(
            f"the weights are quantized, by {quantization.scheme!r}: {format!r} takes float32 weights, "
            "and 'pt2' both; export the weights that they were made from"
        )
    if isinstance(model, Detector):
        raise ValueError(
            f"a {type(model).__name__} finds another number of objects in each image, which no such file can hold: "
            "export its backbone, model.backbone or tools/export.py --backbone"
        )
    count_cost(model, height, width)  # raises for a size that the model does not take
    sizes = OPEN_BATCHES if dynamic_batch else (batch_size,)
    shape = (count_channels(model), height, width)
    model = model.cpu().eval().requires_grad_(False)
    program = export_program(model, torch.randn(2 if dynamic_batch else batch_size, *shape), dynamic_batch)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".partial-{path.name}")
    try:
        target.write(program, partial)
        difference = max(verify(model, target.load(partial), torch.randn(size, *shape)) for size in sizes)
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return difference


def export_program(model: nn.Module, images: Tensor, dynamic_batch: bool) -> ExportedProgram:
    """torch.export's program of a model for images of that size; with a dynamic batch, for any number of them."""
    dynamic = ({0: Dim("batch", min=1)},) if dynamic_batch else None
    with torch.no_grad():
        if get_quantization(model) is None:
            return torch.export.export(model, (images,), dynamic_shapes=dynamic)
        from s3a.quantization import convert  # noqa: PLC0415  torchao is slow to import, and most models are not quantized

        return convert.export_program(model, images, dynamic_shapes=dynamic)


@torch.no_grad()
def verify(model: nn.Module, exported: Predictor, images: Tensor) -> float:
    """The largest difference of an exported model's outputs on some images; ExportError if it is beyond TOLERANCE."""
    all_right, all_found = list_outputs(model(images)), list_outputs(exported(images))
    shapes, own = (", ".join(str(tuple(each.shape)) for each in outputs) for outputs in (all_found, all_right))
    if shapes != own:
        raise ExportError(f"the exported model gives {shapes}: the model itself gives {own}")
    pairs = list(zip(all_found, all_right, strict=True))
    difference = max((found - right).abs().max().item() for found, right in pairs)
    if not all(torch.allclose(found, right, rtol=TOLERANCE, atol=TOLERANCE) for found, right in pairs):
        raise ExportError(
            f"the exported model is off by {difference:.1e} for {len(images)} images: it must be within {TOLERANCE}; "
            "report it, with the versions of PyTorch and of the format's packages"
        )
    return difference


def list_outputs(outputs: Tensor | list[Tensor]) -> list[Tensor]:
    """What a model gives, as a list: its logits alone, or its maps."""
    return [outputs] if isinstance(outputs, Tensor) else list(outputs)
