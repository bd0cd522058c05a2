"""Converts official checkpoints; every key must be known on both sides. No other module reads pickles."""

import logging
import re
import struct
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from s3a.weights.folder import check_state, shorten_list, warn_of_new_head

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class KeyTable:
    """Which key of ours an official checkpoint's key becomes.

    Attributes:
        renamed: (pattern of the whole official key, our key as `re.sub` takes it); the first match counts.
        dropped: patterns of official keys that hold nothing learned.
    """

    renamed: tuple[tuple[str, str | Callable[[re.Match[str]], str]], ...]
    dropped: tuple[str, ...] = ()

    def knows(self, key: str) -> bool:
        """Whether some row matches the key."""
        return self.drops(key) or any(re.fullmatch(pattern, key) for pattern, _ in self.renamed)

    def drops(self, key: str) -> bool:
        """Whether the key is dropped."""
        return any(re.fullmatch(pattern, key) for pattern in self.dropped)

    def changes(self, key: str) -> bool:
        """Whether the key is dropped or renamed, so that it can only be an official one."""
        return self.knows(key) and (self.drops(key) or self.rename(key) != key)

    def rename(self, key: str) -> str:
        """Our key for an official one that is not dropped."""
        pattern, ours = next(row for row in self.renamed if re.fullmatch(row[0], key))
        return re.sub(pattern, ours, key)


def convert_state(state: dict[str, Tensor], model: nn.Module, table: KeyTable) -> dict[str, Tensor]:
    """The state dict of a model from an official one, under our keys and in our shapes.

    Shapes may differ in axes of length 1: pointwise layers are 1x1 convolutions there and nn.Linear here.

    Raises:
        ValueError: with the keys that are unknown, missing or of another shape.
    """
    foreign = sorted(key for key in state if not table.knows(key))
    if foreign:
        raise ValueError(f"the checkpoint has keys that the official model has not: {shorten_list(foreign)}")
    expected = {key: tuple(tensor.shape) for key, tensor in model.state_dict().items()}
    converted = {table.rename(key): tensor for key, tensor in state.items() if not table.drops(key)}
    for key, tensor in converted.items():
        shape = expected.get(key)
        if shape is not None and [n for n in shape if n > 1] == [n for n in tensor.shape if n > 1]:
            converted[key] = tensor.reshape(shape)
    check_state(converted, expected, "the checkpoint is not of this model")
    return converted


def filter_official(state: dict[str, Tensor], model: nn.Module, table: KeyTable) -> dict[str, Tensor]:
    """For timm: official state dicts converted, our own unchanged, with a warning where timm will change more.

    Raises:
        ValueError: for a quantized one.
    """
    if any(key.endswith("._weight_qdata") for key in state):
        family = type(model).__name__
        raise ValueError(f"quantized weights are not for timm: load them with {family}.from_pretrained")
    if any(map(table.changes, state)):
        return convert_state(state, model, table)
    warn_of_changes(state, model)
    return state


def warn_of_changes(state: dict[str, Tensor], model: nn.Module) -> None:
    """Logs a warning where timm, which only whispers, will make a new head or adapt the first convolution."""
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    head, stem = (state.get(f"{cfg[layer]}.weight") for layer in ("classifier", "first_conv"))
    if head is not None and model.num_classes not in (0, len(head)):
        warn_of_new_head(model, len(head), "the checkpoint")
    if stem is not None and stem.shape[1] != model.in_chans:
        logger.warning(
            "%s.weight was adapted from %d to %d channels by timm, since the model has in_chans=%d. "
            "Train the model before you use it for predictions.",
            cfg["first_conv"],
            stem.shape[1],
            model.in_chans,
            model.in_chans,
        )


def read_checkpoint(path: Path) -> dict[str, Tensor]:
    """The state dict of a `.pth` file, bare or under "model"; only tensors and a trainer's options are unpickled.

    Raises:
        FileNotFoundError: if there is no such file.
        ValueError: if it is no checkpoint.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint {str(path)!r} does not exist: give the path of a downloaded .pth file")
    # what the unpickler raises for arbitrary bytes
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
