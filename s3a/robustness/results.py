"""What was measured under corruption, as a file that is written after each part, and read when the command goes on."""

import json
import os
import shlex
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from s3a.robustness.evaluation import PartScores
from s3a.robustness.images import CLEAN, Part
from s3a.training.run_folder import write_whole

RESULTS_NAME = "results.json"


@dataclass
class Results:
    """All that was found so far.

    Attributes:
        conditions: what scores are of; those of other conditions are refused. Among them are `library` and
            `library_version`, `images`, of how many a score is, and `knows_imagenet`, whether the classes are
            ImageNet's.
        command: that wrote it last; weights, corruptions and severities are what it asked for.
        weights: path -> the digest of what lies there.
        corruptions: in the paper's order.
        severities: rising, without the 0 of clean images.
        machine: where it was measured, and with which versions of packages.
        top1: the digest of weights -> corruption -> severity -> fraction of 1, of all that was ever measured; clean
            images are the corruption `clean` at the severity 0.
        unreadable: names of images that could not be read, and that no score counts.
    """

    conditions: dict[str, Any]
    command: str = ""
    weights: dict[str, str] = field(default_factory=dict)
    corruptions: list[str] = field(default_factory=list)
    severities: list[int] = field(default_factory=list)
    machine: dict[str, Any] = field(default_factory=dict)
    top1: dict[str, dict[str, dict[str, float]]] = field(default_factory=dict)
    unreadable: list[str] = field(default_factory=list)

    @property
    def parts(self) -> list[Part]:
        """All that is asked for: clean images, then corruption after corruption."""
        return [CLEAN, *(Part(name, severity) for name in self.corruptions for severity in self.severities)]

    def get(self, digest: str, part: Part) -> float | None:
        """The top-1 of weights on a part; None where that is not measured yet."""
        return self.top1.get(digest, {}).get(part.corruption, {}).get(str(part.severity))

    def add(self, part: Part, scores: PartScores) -> None:
        """Adds what weights scored on a part."""
        for digest, top1 in scores.top1.items():
            self.top1.setdefault(digest, {}).setdefault(part.corruption, {})[str(part.severity)] = top1
        self.unreadable = sorted({*self.unreadable, *scores.unreadable})

    def write(self, folder: Path) -> None:
        """Writes the file, which a reader finds whole at any time."""
        self.command = shlex.join(["python", *sys.argv])
        write_whole(folder / RESULTS_NAME, json.dumps(asdict(self), indent=2, default=str) + "\n")


def open_results(folder: Path, conditions: dict[str, Any]) -> Results:
    """The result in a folder to go on with, or an empty one where there is none.

    Raises:
        ValueError: where the folder cannot be written, or its result is none, or one of other conditions.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not os.access(folder, os.W_OK):
            raise PermissionError(0, "Permission denied")
    except OSError as error:
        raise ValueError(f"--output-dir {folder} cannot be written ({error.strerror}): give another") from error
    path = folder / RESULTS_NAME
    if not path.exists():
        return Results(conditions=conditions)
    found = read_results(path)
    changed = [key for key in conditions if found.conditions.get(key) != conditions[key]]
    if changed:
        key, before = changed[0], found.conditions.get(changed[0])
        raise ValueError(
            f"{path} was measured with the {key.replace('_', ' ')} {before} (now {conditions[key]}): scores "
            "of both cannot be compared; give another --output-dir, or delete that file"
        )
    return found


def read_results(path: Path) -> Results:
    """The result that a file holds; FileNotFoundError or ValueError where it holds none."""
    try:
        return Results(**json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path} does not exist: measure without --report-only first") from error
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"{path} is no result of corruptions ({error}): delete it, or give another --output-dir"
        ) from error
