"""The result of a comparison as a file that is written whenever a part is done, and read when it goes on."""

import json
import os
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from s3a.support.timing import machine
from s3a.training.run_folder import write_whole

RESULTS_NAME = "results.json"


@dataclass
class Results:
    """All that was found so far.

    Attributes:
        command: that wrote it last. settings: what the comparison is of, for the reader.
        machine: where times are measured. timing: what they are of; where that changes they are measured anew.
        scores: a row for each candidate, once all its runs are done.
        speed: label -> throughput and memory. growth: a row for each candidate and side.
    """

    machine: dict[str, Any]
    timing: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    scores: list[dict[str, Any]] = field(default_factory=list)
    speed: dict[str, dict[str, float]] = field(default_factory=dict)
    growth: list[dict[str, Any]] = field(default_factory=list)

    @property
    def rows(self) -> list[dict[str, Any]]:
        """A row for each candidate: its scores, and its speed where that is measured."""
        return [row | self.speed.get(row["label"], {}) for row in self.scores]

    @property
    def sides(self) -> list[int]:
        """The sides of images that the candidates were measured at, the smallest first."""
        return sorted({row["image_size"] for row in self.growth})

    def write(self, folder: Path) -> None:
        """Writes the file anew, whole."""
        self.command = " ".join(["python", *sys.argv])
        write_whole(folder / RESULTS_NAME, json.dumps(asdict(self), indent=2, default=str) + "\n")


def open_results(folder: Path, timing: dict[str, Any], device: torch.device) -> Results:
    """The result in a folder to go on with, or a new one, which takes the place of one with other times.

    Raises:
        ValueError: where the folder cannot be written, the file is no result, or its times are another machine's.
    """
    fresh = Results(machine=as_json(machine(device)), timing=as_json(timing))
    path = folder / RESULTS_NAME
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(0, "Permission denied")
    except OSError as error:
        raise ValueError(f"--output-dir {folder} cannot be written ({error.strerror}): give another") from error
    if not path.exists():
        return fresh
    found = read_results(path)
    if found.timing != fresh.timing or not (found.speed or found.growth):
        return fresh
    differing = [key for key, value in fresh.machine.items() if found.machine.get(key) != value]
    if differing:
        raise ValueError(
            f"{path} was measured with another {', '.join(differing)}: times of two machines cannot be compared; "
            "go on there, or give another --output-dir here, with the same --runs-dir to keep the runs"
        )
    return found


def as_json(value: Any) -> Any:
    """The value as a file gives it back."""
    return json.loads(json.dumps(value, default=str))


def read_results(path: Path) -> Results:
    """A result file; ValueError where it is none."""
    try:
        return Results(**json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(
            f"{path} is no result of tools/compare.py ({error}): delete it, or give another --output-dir"
        ) from error
