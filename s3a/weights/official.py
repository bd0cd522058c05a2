"""Conversion of official checkpoints: every key accounted for in both directions. Pickles are read here alone."""

import re
import struct
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError

import torch
from torch import Tensor, nn

from s3a.weights.folder import check_state, shortened


@dataclass(frozen=True)
class KeyTable:
    """How an official checkpoint's keys become ours.

    Attributes:
        renamed: (pattern of the whole official key, our key as `re.sub` takes it), the first match counts.
        dropped: patterns of official keys that hold nothing learned.
    """

    renamed: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]
    dropped: tuple[str, ...] = ()

    def knows(self, key: str) -> bool:
        """Whether a row is for the key."""
        return self.drops(key) or any(re.fullmatch(pattern, key) for pattern, _ in self.renamed)

    def drops(self, key: str) -> bool:
        """Whether the key holds nothing learned."""
        return any(re.fullmatch(pattern, key) for pattern in self.dropped)

    def changes(self, key: str) -> bool:
        """Whether the key is an official one that is not ours too."""
        return self.knows(key) and (self.drops(key) or self.rename(key) != key)

    def rename(self, key: str) -> str:
        """Our key."""
        pattern, ours = next(row for row in self.renamed if re.fullmatch(row[0], key))
        return re.sub(pattern, ours, key)


def convert_state(state: dict[str, Tensor], model: nn.Module, table: KeyTable) -> dict[str, Tensor]:
    """An official state dict under our keys and shapes, every key accounted for on both sides.

    Axes of length 1 come and go: pointwise layers are 1x1 convolutions there and nn.Linear here.

    Raises:
        ValueError: naming the keys that are unknown, missing or of another shape.
    """
    strange = sorted(key for key in state if not table.knows(key))
    if strange:
        raise ValueError(f"the checkpoint has keys that the official model has not: {shortened(strange)}")
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    converted = {table.rename(key): tensor for key, tensor in state.items() if not table.drops(key)}
    for key, tensor in converted.items():
        shape = expected.get(key)
        if shape is not None and [n for n in shape if n > 1] == [n for n in tensor.shape if n > 1]:
            converted[key] = tensor.reshape(shape)
    check_state(converted, expected, "the checkpoint is not of this model")
    return converted


def filter_official(state: dict[str, Tensor], model: nn.Module, table: KeyTable) -> dict[str, Tensor]:
    """For timm: converts official checkpoints, leaves our own as they are; ValueError for quantized ones."""
    if any(key.endswith("._weight_qdata") for key in state):
        family = type(model).__name__
        raise ValueError(f"quantized weights are not for timm: load them with {family}.from_pretrained")
    return convert_state(state, model, table) if any(map(table.changes, state)) else state


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict of a `.pth` file, bare or under "model"; nothing but tensors and trainers' options is unpickled.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it is no checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {str(path)!r} does not exist: give the path of a downloaded .pth file")
    # what the unpickler makes of arbitrary bytes
    broken = (UnpicklingError, RuntimeError, EOFError, ValueError, LookupError, AttributeError, TypeError, struct.error)
    try:
        with torch.serialization.safe_globals([Namespace]):  # DeiT's trainers keep their options beside the weights
            content = torch.load(path, map_location="cpu", weights_only=True)
    except broken as error:
        raise ValueError(f"{path} is no PyTorch checkpoint: it must be a .pth file with a state dict") from error
    state = content.get("model", content) if isinstance(content, dict) else content
    if not isinstance(state, dict) or not state or not all(isinstance(tensor, Tensor) for tensor in state.values()):
        raise ValueError(f'{path} holds no state dict: it must be a dict of tensors, or one under "model"')
    return state
