"""Checkpoints that are whole or not there.

They are written beside the last one, flushed, hashed, renamed into place, and verified on reading. A checkpoint
is a folder with `tensors.safetensors`, `tree.json` (everything that is no tensor, and where the tensors belong)
and `manifest.json` (size and SHA-256 of the two). Nothing is pickled.
"""

import hashlib
import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

TENSORS, TREE, MANIFEST = "tensors.safetensors", "tree.json", "manifest.json"


def write_checkpoint(folder: Path, state: Any, keep: int) -> None:
    """Writes `state` to `folder`, and then deletes all but the `keep` newest of the checkpoints beside it.

    Args:
        folder: named epoch-NUMBER; does not show under this name before it is whole and flushed.
        state: nested dicts and lists of tensors and JSON values; tuples come back as lists.
    """
    partial = folder.with_name(f".partial-{folder.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    tree = pack(state, tensors)
    save_file(tensors, partial / TENSORS)
    (partial / TREE).write_text(json.dumps(tree), encoding="utf-8")
    manifest = {name: fingerprint(partial / name) for name in (TENSORS, TREE)}
    (partial / MANIFEST).write_text(json.dumps(manifest, indent=2), encoding="utf-8")
    for path in (*partial.iterdir(), partial):
        flush(path)
    if folder.exists():
        shutil.rmtree(folder)
    partial.rename(folder)
    flush(folder.parent)
    for old in checkpoints(folder.parent)[keep:]:
        shutil.rmtree(old)


def read_newest(parent: Path, say: Callable[[str], None]) -> Any | None:
    """The state of the newest whole checkpoint in `parent`; None where there is none.

    Args:
        say: told of every checkpoint that is torn or altered and so is passed over.
    """
    for folder in checkpoints(parent):
        fault = find_fault(folder)
        if fault is None:
            return unpack(json.loads((folder / TREE).read_text(encoding="utf-8")), load_file(folder / TENSORS))
        say(f"checkpoint {folder} is damaged ({fault}): passing over it")
    return None


def checkpoints(parent: Path) -> list[Path]:
    """The folders epoch-NUMBER in `parent`, newest first; all else there is the user's own."""
    return sorted((path for path in parent.glob("epoch-[0-9]*") if path.is_dir()), reverse=True)


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


def rng_state() -> dict[str, Any]:
    """The states of every generator that training draws from, in this process."""
    kind, keys, position, has_gauss, gauss = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": [kind, keys.tolist(), position, has_gauss, gauss],
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
    }


def set_rng_state(state: dict[str, Any]) -> None:
    """Puts the generators back to what `rng_state` returned."""
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    kind, keys, *rest = state["numpy"]
    np.random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(state["torch"])
    if state["cuda"]:
        torch.cuda.set_rng_state_all(state["cuda"])
