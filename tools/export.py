"""Exports weights to run without this library: python tools/export.py --weights FOLDER --format onnx --output FILE."""

import os
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path

# Read when torch loads. Threads that spin while they wait starve each other where anything else runs (LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from s3a import CompilationError, compile_model
from s3a.export import Format, check_format, export, load
from s3a.support.command_line import run_command
from s3a.support.timing import take_turns
from s3a.weights.card import format_table
from s3a.weights.pretrained import load_pretrained

RUNS = {
    "pt2": "torch.export.load(FILE).module()(images), with PyTorch alone",
    "aoti": "torch._inductor.aoti_load_package(FILE)(images), with PyTorch alone, or from C++; on processors that have "
    "what this one has ({capability})",
    "onnx": 'onnxruntime.InferenceSession(FILE).run(None, {{"images": images}})',
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Writes a model as a torch.export program, an AOTInductor package or ONNX, checks it, and times it."""

    weights: str
    """A weights folder, or ORG/NAME on the Hub."""
    format: Format
    """pt2 for a torch.export program, aoti for an AOTInductor package, or onnx."""
    output: Path
    """The file to write: .pt2 for the first two, .onnx for the last."""
    dynamic_batch: bool = False
    """Take any number of images at a time."""
    batch_size: int = 4
    """Images at a time; with --dynamic-batch only for the timing."""
    height: int | None = None
    """Of the images, in pixels; None is the weights' own."""
    width: int | None = None
    """Of the images, in pixels; None is the weights' own."""
    revision: str | None = None
    """Branch, tag or commit of the Hub repository."""
    turns: int = 9
    """Timed calls beside the compiled model's; 0 for none."""

    def __post_init__(self) -> None:
        check_format(self.format, self.output)
        if self.batch_size < 1 or self.turns < 0:
            raise ValueError(
                f"--batch-size is {self.batch_size} and --turns {self.turns}: the one must be at least 1, the other 0"
            )


def main(options: Options) -> None:
    model = load_pretrained(options.weights, options.revision)
    channels, height, width = resolve_model_data_config(model)["input_size"]
    height, width = options.height or height, options.width or width
    batch = {"batch_size": options.batch_size, "dynamic_batch": options.dynamic_batch}
    difference = export(model, options.output, options.format, height=height, width=width, **batch)
    count = "any number of" if options.dynamic_batch else options.batch_size
    print(
        f"wrote {options.output}: {options.output.stat().st_size / 1e6:.1f} MB, for {count} images of "
        f"{height} x {width} pixels; logits within {difference:.1e} of the model's"
    )
    print("runs by " + RUNS[options.format].format(capability=torch.backends.cpu.get_cpu_capability()))
    if options.turns:
        images = torch.randn(options.batch_size, channels, height, width)
        print("\n" + speeds(model, options, images))


def speeds(model: nn.Module, options: Options, images: Tensor) -> str:
    """A table of the exported, the compiled and the eager model's throughput, in turns."""
    candidates = {
        options.format: load(options.output, options.format),
        "compiled": compiled(model, images),
        "eager": model,
    }
    calls = {name: inference(run, images) for name, run in candidates.items() if run is not None}
    samples = take_turns(calls, options.turns)
    peer = samples.get("compiled", samples["eager"]).median
    rows = [
        (name, f"{each.median:.1f}", f"{1e3 * len(images) / each.median:.1f}", f"{peer / each.median:.2f}")
        for name, each in samples.items()
    ]
    return format_table(
        ["model", "ms a batch", "images/s", f"against {'compiled' if 'compiled' in samples else 'eager'}"], rows
    )


def compiled(model: nn.Module, images: Tensor) -> nn.Module | None:
    """The model compiled; None, and the reason said, where this machine cannot."""
    model = compile_model(deepcopy(model))
    try:
        inference(model, images)()
    except CompilationError as error:
        print(f"not timed beside the compiled model: {error}", file=sys.stderr)
        return None
    return model


def inference(run: Callable[[Tensor], Tensor], images: Tensor) -> Callable[[], Tensor]:
    """A forward on the images; AOTInductor's code does not run in inference mode."""

    def infer() -> Tensor:
        with torch.no_grad():
            return run(images)

    return infer


if __name__ == "__main__":
    run_command(Options, main)
