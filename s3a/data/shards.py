"""A folder of shards: which files they are, and what can be said of any kind of them."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from tqdm.auto import tqdm

from s3a.data.local import hash_content
from s3a.support.command_line import read_rank

SPLIT_NAMES = {"train": ("train",), "val": ("validation", "val", "valid", "test")}
"""What others may call our two splits; the first that is there is taken."""


def find_shards(data_dir: Path, ending: str) -> dict[str, list[Path]]:
    """The shards of both splits, sorted: SPLIT*.ENDING in the folder, or *.ENDING in its folder SPLIT.

    Raises:
        FileNotFoundError: where a split has none.
    """
    shape = f"it must hold train*.{ending} and val*.{ending}, or folders train and val of them"
    if not data_dir.is_dir():
        raise FileNotFoundError(f"data folder {str(data_dir)!r} does not exist: {shape}")
    shards = {split: find_split_shards(data_dir, names, ending) for split, names in SPLIT_NAMES.items()}
    for split, found in shards.items():
        if not found:
            raise FileNotFoundError(f"data folder {str(data_dir)!r} has no {ending} shards of {split!r}: {shape}")
    return shards


def find_split_shards(data_dir: Path, names: Sequence[str], ending: str) -> list[Path]:
    """The shards of a split, under the first of its possible names that has some."""
    in_folder = sorted(path for path in data_dir.iterdir() if path.name.endswith(f".{ending}") and path.is_file())
    for name in names:
        if found := [path for path in in_folder if path.name.startswith(name)]:
            return found
        if found := sorted(path for path in (data_dir / name).glob(f"*.{ending}") if path.is_file()):
            return found
    return []


def hash_shards(data_dir: Path, shards: dict[str, list[Path]], class_names: list[str]) -> str:
    """A fingerprint that changes with the names and sizes of the shards, and with the classes."""
    files = [path for paths in shards.values() for path in paths]
    return hash_content([*((path.relative_to(data_dir), path.stat().st_size) for path in files), *class_names])


def read_class_names(data_dir: Path) -> list[str] | None:
    """The classes of classes.txt, one a line in label order; None where there is no such file."""
    path = data_dir / "classes.txt"
    return [line.strip() for line in path.read_text().splitlines() if line.strip()] if path.is_file() else None


@contextmanager
def hide_bars_in_logs() -> Iterator[None]:
    """Lets datasets show its progress bars on a terminal alone, and in the first process."""
    import datasets  # noqa: PLC0415  slow, and streams do without

    on_terminal = sys.stderr is not None and sys.stderr.isatty() and read_rank() == 0
    hide = not on_terminal and not datasets.are_progress_bars_disabled()
    if hide:
        datasets.disable_progress_bars()
    try:
        yield
    finally:
        if hide:
            datasets.enable_progress_bars()


def show_progress(paths: list[Path], split: str) -> tqdm:
    """Iterates the shards, with a bar in the first process, on a terminal, where looking through them takes long."""
    return tqdm(paths, f"counting {split}", delay=2, leave=False, disable=None if read_rank() == 0 else True)


def shorten_error(error: BaseException) -> str:
    """An error's cause or message, cut to a single line."""
    return " ".join(str(error.__cause__ or error).split())[:200]
