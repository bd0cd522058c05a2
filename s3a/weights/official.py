"""Converts official checkpoints; every key must be known on both sides. No other module reads pickles."""

import logging
import re
import struct
import sys
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, NamedTuple

import timm
import torch
from torch import Tensor, nn

from s3a.support.errors import make_unknown_error
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


# --------------------------------------------------------------------------------------------------------
# Which model a checkpoint is of
# --------------------------------------------------------------------------------------------------------


def list_key_tables() -> dict[str, KeyTable]:
    """The names of all models with official checkpoints, each with its family's table of their keys."""
    modules = {name: sys.modules[timm.model_entrypoint(name).__module__] for name in timm.list_models()}
    return {name: module.OFFICIAL_KEYS for name, module in modules.items() if hasattr(module, "OFFICIAL_KEYS")}


def find_key_table(name: str) -> KeyTable:
    """The table of a model's family; ValueError for an unknown model, or one without official checkpoints."""
    tables = list_key_tables()
    if name in tables:
        return tables[name]
    if timm.is_model(name):
        raise ValueError(
            f"model {name!r} has no official checkpoints to convert: it must be one of {', '.join(tables)}"
        )
    raise make_unknown_error("model", name, tables)


def convert(state: dict[str, Tensor], name: str, table: KeyTable) -> nn.Module:
    """The model of that name with the weights of an official state dict, and with as many classes.

    Raises:
        ValueError: if the weights are of another model; it is named if it is known.
    """
    model = build_on_meta(name, state, table)
    try:
        converted = convert_state(state, model, table)
    except ValueError as error:
        fitting = list_fitting(state)
        remedy = f": it fits {' and '.join(fitting)}; pass --model {fitting[0]}" if fitting else f" ({error})"
        raise ValueError(f"the checkpoint does not fit {name}{remedy}") from error
    model.load_state_dict(converted, assign=True)
    return model.eval()


def build_on_meta(name: str, state: dict[str, Tensor], table: KeyTable) -> nn.Module:
    """The model without memory for its weights, with as many classes as an official state dict has."""
    config = timm.get_pretrained_cfg(name)
    assert config is not None  # every model with a table of keys has one
    classifier = f"{config.classifier}.weight"
    known = (key for key in state if table.knows(key) and not table.drops(key))
    key = next((key for key in known if table.rename(key) == classifier), None)
    classes: dict[str, Any] = {} if key is None else {"num_classes": len(state[key])}
    with torch.device("meta"):
        return timm.create_model(name, **classes)


def find_data_config(name: str, image_size: int) -> dict[str, Any]:
    """timm's preprocessing keys with which the official code evaluates a model at that side in pixels.

    Up to 224 px all resize the shorter side to 256 / 224 of it and cut the centre, as DeiT does. Above, SSViT's and
    SViT's code resizes to the side itself; VVT's does the same as below.
    """
    crop_pct = 0.875 if image_size <= 224 or name.startswith("vvt") else 1.0
    return {"input_size": (3, image_size, image_size), "crop_pct": crop_pct}


def list_fitting(state: dict[str, Tensor]) -> list[str]:
    """The names of the models whose weights an official state dict holds, by its keys and shapes."""
    return [name for name, table in list_key_tables().items() if fits(state, name, table)]


def fits(state: dict[str, Tensor], name: str, table: KeyTable) -> bool:
    """Whether an official state dict holds the weights of that model."""
    if not all(map(table.knows, state)):
        return False
    try:
        convert_state(state, build_on_meta(name, state, table), table)
    except ValueError:
        return False
    return True


# --------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------


class Checkpoint(NamedTuple):
    """What an official checkpoint holds."""

    state: dict[str, Tensor]
    """under official keys"""
    image_size: int | None
    """side in pixels that its trainer was told with --input-size; None where the file does not say"""


def read_checkpoint(path: Path) -> Checkpoint:
    """Reads a `.pth` file: a state dict, bare or under "model"; only tensors and a trainer's options are unpickled.

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
    options = content.get("args") if state is not content else None
    image_size = getattr(options, "input_size", None)
    return Checkpoint(state, image_size if isinstance(image_size, int) else None)
