"""The quantization schemes by name, and what each needs of a model and of a machine; torchao itself is not imported."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Literal

import torch
from packaging.version import Version
from torch import nn

from s3a.support.errors import unknown

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
    """What a scheme does, and what it needs.

    Attributes:
        weights: the numbers that a weight is kept in; "int4" lies two to a byte.
        group_size: inputs that share a scale; the inputs of a layer must be a multiple. None: one scale for all.
        capability: CUDA compute capability; None also runs on a CPU.
        packages: beyond PyTorch, with the version.
        trains: whether it can be trained for.
    """

    weights: Literal["int8", "int4", "float8"]
    group_size: int | None = None
    capability: tuple[int, int] | None = None
    packages: tuple[tuple[str, str], ...] = (("torchao", "0.18"),)
    trains: bool = False


@dataclass(frozen=True)
class Quantization:
    """How a model is quantized; `model.quantization`, and the entry of that name in `config.json`.

    Attributes:
        scheme: a name of SCHEMES.
        layers: the linear layers that are quantized.
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
    """The scheme of that name; ValueError for an unknown one, and for one that cannot run on this machine."""
    if name not in SCHEMES:
        raise unknown("scheme", name, SCHEMES)
    scheme = SCHEMES[name]
    lacking = [missing_package(*package) for package in scheme.packages]
    lacking = [*filter(None, [missing_gpu(scheme.capability), *lacking])]
    if lacking:
        anywhere = [other for other, each in SCHEMES.items() if each.capability is None]
        raise ValueError(f"scheme {name!r} {'; it '.join(lacking)}; without a GPU: {', '.join(anywhere)}")
    return scheme


def check_trainable(name: str) -> Scheme:
    """`check_scheme`, and ValueError for a scheme without fake quantization."""
    scheme = check_scheme(name)
    if not scheme.trains:
        able = [other for other, each in SCHEMES.items() if each.trains]
        raise ValueError(f"scheme {name!r} cannot be trained for: use one of {', '.join(able)}")
    return scheme


def missing_gpu(capability: tuple[int, int] | None) -> str | None:
    """What is asked of a GPU, where the one at hand does not have it."""
    if capability is None:
        return None
    needed = f"needs a CUDA GPU of compute capability {capability[0]}.{capability[1]} or more"
    if not torch.cuda.is_available():
        return f"{needed}, and there is none here"
    found = torch.cuda.get_device_capability()
    return None if found >= capability else f"{needed}, and the one here has {found[0]}.{found[1]}"


def missing_package(name: str, least: str) -> str | None:
    """What is asked of a package, where it is not installed so."""
    try:
        found = version(name)
    except PackageNotFoundError:
        return f"needs {name} {least} or newer, which is not installed (pip install '{name}>={least}')"
    if Version(found) < Version(least):
        return f"needs {name} {least} or newer, and {found} is installed (pip install '{name}>={least}')"
    return None


def check_float(model: nn.Module) -> None:
    """Raises ValueError for a model that is quantized already."""
    done = quantization_of(model)
    if done is not None:
        raise ValueError(f"the weights are quantized already, by {done.scheme!r}: give those they were made from")


def quantization_of(model: nn.Module) -> Quantization | None:
    """How a model is quantized; None if it is not."""
    return getattr(model, "quantization", None)


@contextmanager
def quiet_import() -> Iterator[None]:
    """Around imports of torchao, which registers its enumerations in a way that PyTorch warns every user of."""
    logger = logging.getLogger("torch.utils._pytree")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)
