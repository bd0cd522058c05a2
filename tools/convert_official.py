"""Converts an official checkpoint: python tools/convert_official.py SOURCE.pth --model NAME --output FOLDER."""

import signal
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below shows no traceback

import timm
import torch
import tyro
from torch import Tensor, nn

from s3a.support.command_line import run_command
from s3a.support.errors import make_unknown_error
from s3a.weights.folder import save_folder
from s3a.weights.official import KeyTable, convert_state, read_checkpoint


@dataclass(frozen=True, kw_only=True)
class Options:
    """Converts an official checkpoint into a weights folder; every key must be known on both sides."""

    source: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="SOURCE.pth")]
    """The official checkpoint: a state dict, bare or under "model"."""
    model: str
    """The model that the weights are of, such as ssvit_tiny."""
    output: Path
    """The folder to write; created where it does not exist."""


def main(options: Options) -> None:
    """Reads the checkpoint, converts it and writes the folder."""
    table = find_key_table(options.model)
    model = convert(read_checkpoint(options.source), options.model, table)
    save_folder(model, options.output)

    folder, parameters = str(options.output), sum(parameter.numel() for parameter in model.parameters())
    print(
        f"wrote {options.model} with {parameters:,} parameters and {model.num_classes} classes to {folder}; load it "
        f'with s3a.{type(model).__name__}.from_pretrained("{folder}") '
        f'or timm.create_model("local-dir:{folder}", pretrained=True)'
    )


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
        fitting = [other for other, its_table in list_key_tables().items() if fits(state, other, its_table)]
        remedy = f": it fits {' and '.join(fitting)}; pass --model {fitting[0]}" if fitting else f" ({error})"
        raise ValueError(f"the checkpoint does not fit {name}{remedy}") from error
    model.load_state_dict(converted, assign=True)
    return model.eval()


def build_on_meta(name: str, state: dict[str, Tensor], table: KeyTable) -> nn.Module:
    """The model without memory for its weights, with as many classes as an official state dict has."""
    classifier = f"{timm.get_pretrained_cfg(name).classifier}.weight"
    known = (key for key in state if table.knows(key) and not table.drops(key))
    key = next((key for key in known if table.rename(key) == classifier), None)
    with torch.device("meta"):
        return timm.create_model(name, **({} if key is None else {"num_classes": len(state[key])}))


def fits(state: dict[str, Tensor], name: str, table: KeyTable) -> bool:
    """Whether an official state dict holds the weights of that model."""
    if not all(map(table.knows, state)):
        return False
    try:
        convert_state(state, build_on_meta(name, state, table), table)
    except ValueError:
        return False
    return True


if __name__ == "__main__":
    run_command(Options, main)
