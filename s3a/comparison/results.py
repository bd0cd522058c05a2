"""The result of a comparison as a file that is written whenever a part is done, and read when it goes on."""

import json
import os
import shlex
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, TypedDict

import torch

from s3a.support.timing import describe_machine
from s3a.training.run_folder import write_whole

RESULTS_NAME = "results.json"


class Spread(TypedDict):
    """A figure of several runs: its mean, its deviation, and each seed's, in their order.

    The deviation is that of a sample, divided by one less than the count; None for one seed.
    """

    mean: float
    deviation: float | None
    seeds: list[float]


class Difference(Spread):
    """A figure's differences from the reference, seed by seed; with the standard error of their mean."""

    error: float | None


class Differences(TypedDict, total=False):
    """How far a candidate's scores lie above the reference's; none for the reference itself."""

    top1_difference: Difference
    val_loss_difference: Difference


class Score(Differences):
    """A candidate: what it is, what it costs, and what its runs reached after the last epoch, or at their best."""

    label: str
    model: str
    scan: str | None
    size: int | None
    epochs: int
    training_gmacs: int
    parameters: int
    published_gmacs: float
    gmacs: float
    top1: Spread
    best_top1: Spread
    val_loss: Spread


class GrowthFigures(TypedDict, total=False):
    """Time and memory of one image, or why they were not measured."""

    mib: float
    ms: float
    fastest_ms: float
    slowest_ms: float
    skipped: str


class Growth(GrowthFigures):
    """A candidate's time and memory at one side of the image."""

    label: str
    image_size: int


@dataclass
class Results:
    """All that was found so far.

    Attributes:
        command: that wrote it last. settings: what the comparison is of, for the reader.
        machine: where times are measured. timing: what they are of; where that changes they are measured anew.
        scores: one for each candidate, once all its runs are done.
        speed: label -> images per second and MiB by name, for each phase, inference and training:
            PHASE_images_per_second (median), PHASE_images_per_second_fastest, ..._slowest and PHASE_mib.
        growth: one for each candidate and side.
    """

    machine: dict[str, Any]
    timing: dict[str, Any]
    settings: dict[str, Any] = field(default_factory=dict)
    command: str = ""
    scores: list[Score] = field(default_factory=list)
    speed: dict[str, dict[str, float]] = field(default_factory=dict)
    growth: list[Growth] = field(default_factory=list)

    @property
    def sides(self) -> list[int]:
        """The sides of images that the candidates were measured at, the smallest first."""
        return sorted({row["image_size"] for row in self.growth})

    def write(self, folder: Path) -> None:
        """Writes the file, which a reader finds whole at any time."""
        self.command = shlex.join(["python", *sys.argv])
        write_whole(folder / RESULTS_NAME, json.dumps(asdict(self), indent=2, default=str) + "\n")


def open_results(folder: Path, timing: dict[str, object], device: torch.device) -> Results:
    """The result in a folder to go on with, or an empty one, which replaces a result of other timing options.

    Raises:
        ValueError: where the folder cannot be written, the file is no result, or its times are another machine's.
    """
    fresh = Results(machine=convert_to_json(describe_machine(device)), timing=convert_to_json(timing))
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


def convert_to_json(values: dict[str, object]) -> dict[str, Any]:
    """The values as a file would give them back: lists for tuples, strings for paths."""
    return dict(json.loads(json.dumps(values, default=str)))


def read_results(path: Path) -> Results:
    """Reads a result file.

    Raises:
        FileNotFoundError: where there is no such file.
        ValueError: where it is none.
    """
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give the --output-dir of a comparison")
    try:
        return Results(**json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(
            f"{path} is no result of tools/compare.py ({error}): delete it, or give another --output-dir"
        ) from error
