"""A folder of shards: which files they are, and what is known of all of them."""

import os
from collections.abc import Sequence
from pathlib import Path

from tqdm.auto import tqdm

from s3a.data.local import fingerprint
from s3a.data.parts import SPLIT_NAMES


def find_shards(data_dir: Path, ending: str) -> dict[str, list[Path]]:
    """The shards of both splits, sorted: SPLIT*.ENDING in the folder, or *.ENDING in its folder SPLIT.

    Raises:
        FileNotFoundError: where a split has none.
    """
    shape = f"it must hold train*.{ending} and val*.{ending}, or folders train and val of them"
    if not data_dir.is_dir():
        raise FileNotFoundError(f"data folder {str(data_dir)!r} does not exist: {shape}")
    shards = {split: first_shards(data_dir, names, ending) for split, names in SPLIT_NAMES.items()}
    for split, found in shards.items():
        if not found:
            raise FileNotFoundError(f"data folder {str(data_dir)!r} has no {ending} shards of {split!r}: {shape}")
    return shards


def first_shards(data_dir: Path, names: Sequence[str], ending: str) -> list[Path]:
    """The shards under the first of these names that has some."""
    everything = sorted(path for path in data_dir.iterdir() if path.name.endswith(f".{ending}") and path.is_file())
    for name in names:
        if found := [path for path in everything if path.name.startswith(name)]:
            return found
        if found := sorted(path for path in (data_dir / name).glob(f"*.{ending}") if path.is_file()):
            return found
    return []


def shards_fingerprint(data_dir: Path, shards: dict[str, list[Path]], names: list[str]) -> str:
    """Changes with the names and sizes of the shards, and with the classes."""
    files = [path for paths in shards.values() for path in paths]
    return fingerprint([*((path.relative_to(data_dir), path.stat().st_size) for path in files), *names])


def names_in_file(data_dir: Path) -> list[str] | None:
    """The classes of classes.txt, one a line in label order; None where there is no such file."""
    path = data_dir / "classes.txt"
    return [line.strip() for line in path.read_text().splitlines() if line.strip()] if path.is_file() else None


def tqdm_shards(paths: list[Path], split: str) -> tqdm:
    """The shards, with a bar in the first process where looking through them takes long."""
    return tqdm(paths, f"counting {split}", delay=2, leave=False, disable=os.environ.get("RANK", "0") != "0")
