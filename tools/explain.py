"""Says how a map is attended and why: python tools/explain.py --height 56 --width 56."""

import signal
from dataclasses import dataclass
from typing import Literal

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below shows no traceback

import torch

from s3a.analysis.explain import explain
from s3a.support.command_line import run_command


@dataclass(frozen=True, kw_only=True)
class Options:
    """Says, per pass, which backend, tiles and token order are chosen for a map, and why the others lost."""

    height: int = 56
    """Of the map, in tokens."""
    width: int = 56
    """Of the map, in tokens."""
    device: str = "cpu"
    """Where the tensors would be; it need not be at hand."""
    dtype: Literal["float32", "bfloat16", "float16", "float64"] = "float32"
    """Of the tensors."""
    size: int = 7
    """Of the scans: tokens per axis of what is fixed."""
    scan: str = "alternate"
    """Which scans: alternate (as published), window-first, anchors-first, local-only, anchor-only or dense."""
    head_dim: int = 32
    """Of the heads."""
    training: bool = False
    """Gradients are needed."""


def main(options: Options) -> None:
    """Prints the explanation."""
    print(
        explain(
            options.height,
            options.width,
            device=options.device,
            dtype=getattr(torch, options.dtype),
            size=options.size,
            scan=options.scan,
            head_dim=options.head_dim,
            training=options.training,
        )
    )


if __name__ == "__main__":
    run_command(Options, main)
