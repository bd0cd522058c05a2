"""Exports models to files that run without this library:

python tools/export.py --weights FOLDER --format onnx --output FILE.onnx
"""

import os
import signal
import sys
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Literal

# Read when torch loads. Threads that spin while they wait starve each other where anything else runs (LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below shows no traceback

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from s3a import CompilationError, compile_model
from s3a.export import FORMATS, Predictor, check_format, export
from s3a.models.dense import DenseModel
from s3a.support.command_line import run_command
from s3a.support.timing import take_turns
from s3a.weights.card import format_table
from s3a.weights.pretrained import load_pretrained


@dataclass(frozen=True, kw_only=True)
class Options:
    """Exports a model as a torch.export program, an AOTInductor package or ONNX; verifies the file and times it."""

    weights: str
    """A weights folder, or ORG/NAME on the Hub."""
    format: Literal[tuple(FORMATS)]
    """pt2 for a torch.export program, aoti for an AOTInductor package, or onnx."""
    output: Path
    """The file to write: .pt2 for the first two, .onnx for the last."""
    backbone: bool = False
    """Of weights for segmentation or detection, export the backbone alone: its maps, the largest one first."""
    dynamic_batch: bool = False
    """Make a file that takes any number of images at a time."""
    batch_size: int = 4
    """Images at a time; with --dynamic-batch only for the timing."""
    height: int | None = None
    """Of the images, in pixels; None for the size that the weights are for."""
    width: int | None = None
    """Of the images, in pixels; None for the size that the weights are for."""
    revision: str | None = None
    """Branch, tag or commit of the Hub repository."""
    turns: int = 9
    """Timed calls of the file, the compiled and the eager model each; 0 for none."""

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
    if options.backbone:
        if not isinstance(model, DenseModel):
            raise ValueError(f"--backbone is for dense models, and {options.weights} is a classifier: leave it out")
        model = model.backbone
    batch = {"batch_size": options.batch_size, "dynamic_batch": options.dynamic_batch}
    difference = export(model, options.output, options.format, height=height, width=width, **batch)
    count = "any number of" if options.dynamic_batch else options.batch_size
    print(
        f"wrote {options.output}: {options.output.stat().st_size / 1e6:.1f} MB, for {count} images of "
        f"{height} x {width} pixels; {'maps' if options.backbone else 'logits'} within {difference:.1e} of the model's"
    )
    usage = FORMATS[options.format].usage.format(capability=torch.backends.cpu.get_cpu_capability())
    print(f"runs by {usage}")
    if options.turns:
        images = torch.randn(options.batch_size, channels, height, width)
        print("\n" + compare_speed(model, options, images))


def compare_speed(model: nn.Module, options: Options, images: Tensor) -> str:
    """A table of the throughput of the exported, the compiled and the eager model, timed in turns."""
    candidates = {
        options.format: FORMATS[options.format].load(options.output),
        "compiled": compile_copy(model, images),
        "eager": model,
    }
    calls = {name: partial(predict, each, images) for name, each in candidates.items() if each is not None}
    samples = take_turns(calls, options.turns)
    peer = samples.get("compiled", samples["eager"]).median
    rows = [
        (name, f"{each.median:.1f}", f"{1e3 * len(images) / each.median:.1f}", f"{peer / each.median:.2f}")
        for name, each in samples.items()
    ]
    return format_table(
        ["model", "ms a batch", "images/s", f"against {'compiled' if 'compiled' in samples else 'eager'}"], rows
    )


def compile_copy(model: nn.Module, images: Tensor) -> nn.Module | None:
    """A compiled copy of the model; None, after printing the reason, if this machine cannot compile."""
    model = compile_model(deepcopy(model))
    try:
        predict(model, images)
    except CompilationError as error:
        print(f"not timed beside the compiled model: {error}", file=sys.stderr)
        return None
    return model


def predict(model: Predictor, images: Tensor) -> Tensor | list[Tensor]:
    """Logits or maps, without gradients; AOTInductor's code does not run in inference mode."""
    with torch.no_grad():
        return model(images)


if __name__ == "__main__":
    run_command(Options, main)
