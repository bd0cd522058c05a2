"""The quantization schemes by name, and what each needs of a model and of a machine; does not import torchao."""

import itertools
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch
from packaging.version import Version
from torch import nn

from s3a.support.errors import make_unknown_error

SchemeName = Literal[
    "int8-weight-only",
    "int8-dynamic",
    "int4-weight-only",
    "int8-activations-int4-weights",
    "float8-weight-only",
    "float8-dynamic",
]


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """One way to quantize linear layers, and what it needs.

    Attributes:
        weights: the type of number that weights are stored in; "int4" takes half a byte each.
        group_size: how many inputs share a scale; must divide a layer's inputs. None: one scale for all of them.
        capability: the least CUDA compute capability; None for schemes that run on a CPU too.
        packages: those needed beside PyTorch, each with its least version.
        trains: whether training can simulate the rounding.
    """

    weights: Literal["int8", "int4", "float8"]
    group_size: int | None = None
    capability: tuple[int, int] | None = None
    packages: tuple[tuple[str, str], ...] = (("torchao", "0.18"),)
    trains: bool = False


@dataclass(frozen=True)
class Quantization:
    """How a model is quantized: the attribute `model.quantization`, and the entry of that name in `config.json`.

    Attributes:
        scheme: a name of SCHEMES.
        layers: names of the linear layers that are quantized.
    """

    scheme: str
    layers: tuple[str, ...]


SCHEMES: dict[str, Scheme] = {
    "int8-weight-only": Scheme(weights="int8", trains=True),
    "int8-dynamic": Scheme(weights="int8", trains=True),
    "int4-weight-only": Scheme(
        weights="int4", group_size=32, capability=(9, 0), packages=(("torchao", "0.18"), ("mslk", "1.0"))
    ),
    "int8-activations-int4-weights": Scheme(weights="int4", group_size=32, trains=True),
    "float8-weight-only": Scheme(weights="float8"),
    "float8-dynamic": Scheme(weights="float8", capability=(8, 9)),
}


def check_scheme(name: str) -> Scheme:
    """The scheme of that name; ValueError if it is unknown or cannot run on this machine."""
    if name not in SCHEMES:
        raise make_unknown_error("scheme", name, SCHEMES)
    scheme = SCHEMES[name]
    needs = [find_missing_gpu(scheme.capability), *(find_missing_package(*package) for package in scheme.packages)]
    missing = [need for need in needs if need is not None]
    if missing:
        anywhere = [other for other, each in SCHEMES.items() if each.capability is None]
        raise ValueError(f"scheme {name!r} {'; it '.join(missing)}; without a GPU: {', '.join(anywhere)}")
    return scheme


def check_trainable(name: str) -> Scheme:
    """The scheme of that name; ValueError if it cannot run on this machine, or training cannot simulate it."""
    scheme = check_scheme(name)
    if not scheme.trains:
        able = [other for other, each in SCHEMES.items() if each.trains]
        raise ValueError(f"scheme {name!r} cannot be trained for: use one of {', '.join(able)}")
    return scheme


def find_missing_gpu(capability: tuple[int, int] | None) -> str | None:
    """What a scheme needs of a GPU, in words; None if this machine has it."""
    if capability is None:
        return None
    needed = f"needs a CUDA GPU of compute capability {capability[0]}.{capability[1]} or more"
    if not torch.cuda.is_available():
        return f"{needed}, and there is none here"
    found = torch.cuda.get_device_capability()
    return None if found >= capability else f"{needed}, and the one here has {found[0]}.{found[1]}"


def find_missing_package(name: str, least: str) -> str | None:
    """What a scheme needs of a package, in words; None if it is installed in that version or a newer one."""
    try:
        found = version(name)
    except PackageNotFoundError:
        return f"needs {name} {least} or newer, which is not installed (pip install '{name}>={least}')"
    if Version(found) < Version(least):
        return f"needs {name} {least} or newer, and {found} is installed (pip install '{name}>={least}')"
    return None


def check_float(model: nn.Module) -> None:
    """Raises ValueError for a model that is quantized already."""
    quantization = get_quantization(model)
    if quantization is not None:
        raise ValueError(
            f"the weights are quantized already, by {quantization.scheme!r}: give those they were made from"
        )


def get_quantization(model: nn.Module) -> Quantization | None:
    """How a model is quantized; None if it is not."""
    return getattr(model, "quantization", None)


def mark_quantized(model: nn.Module, quantization: Quantization) -> None:
    """Stores on a model how it is quantized, and silences a warning of the compiler that is meant for torchao alone."""
    model.quantization = quantization  # type: ignore[assignment]  # torch's stubs know tensors and modules alone
    # the compiler warns once for each class of torchao's tensors that it cannot cache well
    warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")


@contextmanager
def quiet_import() -> Iterator[None]:
    """Around imports of torchao: keeps its filters of warnings out, and a warning about its enumerations quiet."""
    logger = logging.getLogger("torch.utils._pytree")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            yield
    finally:
        logger.setLevel(level)


def group_names(names: Sequence[str]) -> str:
    """Names that differ in their last number as one, with the numbers as ranges: `stages.0.blocks.0-2.attn.qkv`."""
    kinds: dict[str, list[int]] = {}
    for name in names:
        parts = name.split(".")
        numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
        number = int(parts[numbers[-1]]) if numbers else 0
        if numbers:
            parts[numbers[-1]] = "{}"
        kinds.setdefault(".".join(parts), []).append(number)
    return ", ".join(kind.format(format_ranges(numbers)) for kind, numbers in kinds.items())


def format_ranges(numbers: list[int]) -> str:
    """Rising numbers, those without gaps as first and last: 0, 1, 2 and 5 become `0-2,5`."""
    by_gap = itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])
    ranges = [[number for _, number in group] for _, group in by_gap]
    return ",".join(str(each[0]) if len(each) == 1 else f"{each[0]}-{each[-1]}" for each in ranges)
