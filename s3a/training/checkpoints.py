"""Checkpoints that are whole or not there.

They are written beside the last one, flushed, hashed, renamed into place, and verified on reading. A checkpoint
is a folder with `tensors.safetensors`, `tree.json` (everything that is no tensor, and where the tensors belong)
and `manifest.json` (size and SHA-256 of the two). Nothing is pickled.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from s3a.support.errors import DiskFullError, is_disk_full

TENSORS, TREE, MANIFEST = "tensors.safetensors", "tree.json", "manifest.json"


def write_checkpoint(folder: Path, state: Any, keep: int) -> None:
    """Writes `state` to `folder`, and then deletes all but the `keep` newest of the checkpoints beside it.

    Args:
        folder: named step-NUMBER...; does not show under this name before it is whole and flushed.
        state: nested dicts and lists of tensors and JSON values; tuples come back as lists.

    Raises:
        DiskFullError: where there is no room; says how much is needed. What was there before is left alone.
    """
    partial = folder.with_name(f".partial-{folder.name}")
    for torn in folder.parent.glob(".partial-step-*"):  # of a run that was killed while it wrote
        shutil.rmtree(torn)
    if folder.exists():
        if find_fault(folder) is None:
            return  # the run was here before: the same place has the same state
        shutil.rmtree(folder)
    tensors: dict[str, Tensor] = {}
    tree = json.dumps(pack(state, tensors))
    try:
        write_files(partial, tensors, tree)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not is_disk_full(error):
            raise
        raise DiskFullError(disk_full_message(folder, tensors, tree)) from error
    partial.rename(folder)
    flush(folder.parent)
    for old in checkpoints(folder.parent)[keep:]:
        shutil.rmtree(old)


def write_files(folder: Path, tensors: dict[str, Tensor], tree: str) -> None:
    """The files of a checkpoint, on the disk when this returns."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / TENSORS)
    (folder / TREE).write_text(tree, encoding="utf-8")
    manifest = {name: fingerprint(folder / name) for name in (TENSORS, TREE)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        flush(path)


def disk_full_message(folder: Path, tensors: dict[str, Tensor], tree: str) -> str:
    """How much a checkpoint needs, what there is, and what is still good."""
    needed = sum(tensor.nbytes for tensor in tensors.values()) + len(tree)
    free = shutil.disk_usage(folder.parent).free
    good = next(iter(checkpoints(folder.parent)), None)
    left = f"it goes on from {good.name}" if good else "none was written yet"
    return (
        f"the disk of {folder.parent} is full: a checkpoint needs {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are "
        f"free; make room and run the same command again ({left})"
    )


def read_newest(parent: Path, say: Callable[[str], None]) -> Any | None:
    """The state of the newest whole checkpoint in `parent`; None where there is none.

    Args:
        say: told of every checkpoint that is torn or altered and so is passed over.

    Raises:
        ValueError: where there are checkpoints and every one is damaged.
    """
    found = checkpoints(parent)
    for folder in found:
        fault = find_fault(folder)
        if fault is None:
            return unpack(json.loads((folder / TREE).read_text(encoding="utf-8")), read_tensors(folder / TENSORS))
        say(f"checkpoint {folder} is damaged ({fault}): passing over it")
    if found:
        raise ValueError(f"every checkpoint in {parent} is damaged: restore one, or delete the folder to start anew")
    return None


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file in memory: left mapped, it would take up the disk until the run ends, deleted or not."""
    return {name: tensor.clone() for name, tensor in load_file(path).items()}


def checkpoints(parent: Path) -> list[Path]:
    """The folders step-NUMBER... in `parent`, newest first; all else there is the user's own."""
    return sorted((path for path in parent.glob("step-[0-9]*") if path.is_dir()), reverse=True)


def find_fault(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None."""
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError, UnicodeDecodeError) as error:
        return f"{MANIFEST}: {error}"
    if not isinstance(manifest, dict) or set(manifest) != {TENSORS, TREE}:
        return f"{MANIFEST} does not name its two files"
    for name, expected in manifest.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        if fingerprint(folder / name) != expected:
            return f"{name} is not as it was written"
    return None


def fingerprint(path: Path) -> dict[str, Any]:
    """Size in bytes and SHA-256 of a file."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


def flush(path: Path) -> None:
    """Waits until a file's content or a folder's entries are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def pack(node: Any, tensors: dict[str, Tensor]) -> Any:
    """The JSON form of a nested state; its tensors go into `tensors`, their names into the tree."""
    if isinstance(node, Tensor):
        name = str(len(tensors))
        tensors[name] = node.detach().cpu().contiguous().clone()
        return {"tensor": name}
    if isinstance(node, dict):  # pairs, because JSON would turn the integer keys of optimizers into strings
        return {"dict": [[key, pack(value, tensors)] for key, value in node.items()]}
    if isinstance(node, list | tuple):
        return {"list": [pack(value, tensors) for value in node]}
    return node


def unpack(tree: Any, tensors: dict[str, Tensor]) -> Any:
    """The inverse of `pack`."""
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unpack(value, tensors) for key, value in content}
    return [unpack(value, tensors) for value in content]


class CheckpointClock:
    """When a checkpoint is due, by `--checkpoint-every`: so many steps, so many minutes (10m), or never (None)."""

    def __init__(self, every: str | None) -> None:
        minutes = every is not None and every.endswith("m")
        self.seconds = 60 * int(every[:-1]) if minutes else None
        self.steps = int(every) if every is not None and not minutes else None
        self.written = time.monotonic()

    def due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        if self.steps is not None:
            return step % self.steps == 0
        return self.seconds is not None and time.monotonic() - self.written >= self.seconds

    def restart(self) -> None:
        """A checkpoint was written."""
        self.written = time.monotonic()


GATHERED = StateDictOptions(full_state_dict=True, cpu_offload=True)
SPREAD = StateDictOptions(full_state_dict=True)


def model_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's state dict; where it is sharded, the main process alone gets it and the others an empty one."""
    return get_model_state_dict(model, options=GATHERED)


def optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any] | None:
    """The optimizer's state dict by names of parameters, as `model_state` for the main process alone.

    None before its first step, which torch would take in order to have a state.
    """
    if not optimizer.state:
        return None
    return get_optimizer_state_dict(model, optimizer, options=GATHERED)


def restore(model: nn.Module, optimizer: Optimizer, states: dict[str, Any]) -> None:
    """Gives every process its part of whole states, which each of them has.

    Args:
        states: "model" and "optimizer", as `model_state` and `optimizer_state` returned them.
    """
    if states["optimizer"] is not None:
        set_optimizer_state_dict(model, optimizer, states["optimizer"], options=SPREAD)  # takes a step of rate 0
    set_model_state_dict(model, states["model"], options=SPREAD)
