"""Checkpoints, which are whole or not there, when one is due, and the states of models and optimizers in them.

A checkpoint is a folder `step-NUMBER...` with `tensors.safetensors`, `tree.json` (everything that is no tensor, and
where the tensors belong) and `manifest.json` (size and SHA-256 of the two). It is written under another name, flushed,
renamed into place, and verified when it is read. Nothing is pickled.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

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


# --------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------


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
        raise DiskFullError(describe_full_disk(folder, tensors, tree)) from error
    partial.rename(folder)
    flush(folder.parent)
    for old in list_checkpoints(folder.parent)[keep:]:
        shutil.rmtree(old)


def write_files(folder: Path, tensors: dict[str, Tensor], tree: str) -> None:
    """Writes the files of a checkpoint; they are on the disk when this returns."""
    folder.mkdir(parents=True)
    save_file(tensors, folder / TENSORS)
    (folder / TREE).write_text(tree, encoding="utf-8")
    manifest = {name: hash_file(folder / name) for name in (TENSORS, TREE)}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    for path in (*folder.iterdir(), folder):
        flush(path)


def describe_full_disk(folder: Path, tensors: dict[str, Tensor], tree: str) -> str:
    """How much room a checkpoint needs, how much is free, and which checkpoint the run can resume from."""
    needed = sum(tensor.nbytes for tensor in tensors.values()) + len(tree)
    free = shutil.disk_usage(folder.parent).free
    good = next(iter(list_checkpoints(folder.parent)), None)
    left = f"it goes on from {good.name}" if good else "none was written yet"
    return (
        f"the disk of {folder.parent} is full: a checkpoint needs {needed / 1e6:.1f} MB and {free / 1e6:.1f} MB are "
        f"free; make room and run the same command again ({left})"
    )


# --------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------


class Checkpoint(NamedTuple):
    """A checkpoint, wherever it lies: the name of its folder, and the manifest, which no other one has."""

    name: str
    manifest: dict[str, Any]


def find_newest(parent: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """The newest whole checkpoint in `parent`; None where there is none.

    Args:
        say: called with a message for every newer checkpoint that is torn or altered.

    Raises:
        ValueError: where there are checkpoints and every one is damaged.
    """
    found = list_checkpoints(parent)
    for folder in found:
        fault = find_fault(folder)
        if fault is None:
            return Checkpoint(folder.name, json.loads((folder / MANIFEST).read_text(encoding="utf-8")))
        say(f"checkpoint {folder} is damaged ({fault}): skipping it")
    if found:
        raise ValueError(f"every checkpoint in {parent} is damaged: restore one, or delete the folder to start anew")
    return None


def read_state(folder: Path) -> Any:
    """The state in a whole checkpoint."""
    tree = json.loads((folder / TREE).read_text(encoding="utf-8"))
    # cloned: left mapped, the file would take up the disk until the run ends, deleted or not
    tensors = {name: tensor.clone() for name, tensor in load_file(folder / TENSORS).items()}
    return unpack(tree, tensors)


def list_checkpoints(parent: Path) -> list[Path]:
    """The folders step-NUMBER... in `parent`, newest first; everything else there is the user's own."""
    return sorted((path for path in parent.glob("step-[0-9]*") if path.is_dir()), reverse=True)


def find_fault(folder: Path, expected: dict[str, Any] | None = None) -> str | None:
    """What is wrong with a checkpoint; None if nothing is.

    Args:
        expected: the manifest that it must have; None takes any.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, json.JSONDecodeError, UnicodeDecodeError) as error:
        return f"{MANIFEST}: {error}"
    if not isinstance(manifest, dict) or set(manifest) != {TENSORS, TREE}:
        return f"{MANIFEST} does not name its two files"
    if expected not in (None, manifest):
        return f"{MANIFEST} is that of another checkpoint"
    for name, written in manifest.items():
        if not (folder / name).is_file():
            return f"{name} is missing"
        try:
            if hash_file(folder / name) != written:
                return f"{name} is not as it was written"
        except OSError as error:
            return f"{name}: {error.strerror}"
    return None


# --------------------------------------------------------------------------------------------------------
# Files and trees
# --------------------------------------------------------------------------------------------------------


def hash_file(path: Path) -> dict[str, Any]:
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
    """The JSON form of a nested state, with names in place of tensors, which are added to `tensors`.

    {"weight": tensor, "shape": (2, 3)} becomes {"dict": [["weight", {"tensor": "0"}], ["shape", {"list": [2, 3]}]]}.
    """
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
    """The nested state that `pack` made this tree and these tensors of."""
    if not isinstance(tree, dict):
        return tree
    ((kind, content),) = tree.items()
    if kind == "tensor":
        return tensors[content]
    if kind == "dict":
        return {key: unpack(value, tensors) for key, value in content}
    return [unpack(value, tensors) for value in content]


# --------------------------------------------------------------------------------------------------------
# When a checkpoint is due
# --------------------------------------------------------------------------------------------------------


class CheckpointClock:
    """Says when a checkpoint is due, by `--checkpoint-every`: every so many steps (500) or minutes (10m), or never."""

    def __init__(self, every: str | None) -> None:
        self.seconds: int | None = None
        self.steps: int | None = None
        if every is not None and every.endswith("m"):
            self.seconds = 60 * int(every.removesuffix("m"))
        elif every is not None:
            self.steps = int(every)
        self.written = time.monotonic()

    def is_due(self, step: int) -> bool:
        """Whether a checkpoint is due after this step."""
        if self.steps is not None:
            return step % self.steps == 0
        return self.seconds is not None and time.monotonic() - self.written >= self.seconds

    def restart(self) -> None:
        """Begins the minutes anew: a checkpoint was written."""
        self.written = time.monotonic()


# --------------------------------------------------------------------------------------------------------
# States of models and optimizers, whole or sharded
# --------------------------------------------------------------------------------------------------------


WHOLE_ON_MAIN = StateDictOptions(full_state_dict=True, cpu_offload=True)
WHOLE = StateDictOptions(full_state_dict=True)


def gather_model_state(model: nn.Module) -> dict[str, Tensor]:
    """The model's whole state dict; where it is sharded, on the main process alone, and an empty one on the others."""
    state: dict[str, Any] = get_model_state_dict(model, options=WHOLE_ON_MAIN)
    return state


def gather_optimizer_state(model: nn.Module, optimizer: Optimizer) -> dict[str, Any] | None:
    """The optimizer's whole state dict by names of parameters, on the processes that `gather_model_state` has one on.

    None before the first step: torch would take a step in order to have a state.
    """
    if not optimizer.state:
        return None
    return get_optimizer_state_dict(model, optimizer, options=WHOLE_ON_MAIN)


def load_states(
    model: nn.Module, optimizer: Optimizer, model_state: dict[str, Any], optimizer_state: dict[str, Any] | None
) -> None:
    """Loads whole states, which every process has; where the model is sharded, each takes its part of them.

    How the optimizer computes a step is not a state: it stays as it was built.
    """
    if optimizer_state is not None:
        computes = {name: optimizer.defaults[name] for name in ("fused", "foreach") if name in optimizer.defaults}
        groups = [group | computes for group in optimizer_state["param_groups"]]
        optimizer_state = {**optimizer_state, "param_groups": groups}
        set_optimizer_state_dict(model, optimizer, optimizer_state, options=WHOLE)  # takes a step of learning rate 0
    set_model_state_dict(model, model_state, options=WHOLE)
