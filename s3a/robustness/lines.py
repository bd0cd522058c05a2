"""Lines of the tables: weights that differ in their seed alone are one line, under a label as short as can be."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from s3a.comparison.results import Difference, Spread
from s3a.comparison.scores import subtract_seeds, summarise_seeds
from s3a.robustness.images import Part
from s3a.robustness.results import Results
from s3a.training.run_folder import WEIGHTS

SEED = re.compile(r"seed-(\d+)")


@dataclass(frozen=True, kw_only=True)
class Line:
    """Weights of one or several seeds.

    Attributes:
        paths: in the order of their seeds.
    """

    label: str
    paths: tuple[str, ...]

    def score(self, results: Results, parts: Sequence[Part]) -> Spread:
        """Each seed's mean top-1 over parts that are measured, and their mean and deviation, as fractions of 1."""
        seeds = [[results.get(results.weights[path], part) for part in parts] for path in self.paths]
        return summarise_seeds([fmean(top1 for top1 in each if top1 is not None) for each in seeds])


def make_lines(paths: Sequence[str]) -> list[Line]:
    """The lines of weights, in the order in which they are named.

    `runs/a/seed-0/model`, `runs/a/seed-1/model` and `runs/b/seed-0/model` are the lines `a`, of two seeds, and `b`.

    Raises:
        ValueError: where weights are named twice.
    """
    lines: dict[tuple[str, ...], list[str]] = {}
    places = [Path(path) for path in paths]
    for path in paths:
        if places.count(Path(path)) > 1:
            raise ValueError(f"--weights {path} is given twice: give it once")
        parts = Path(path).parts or (path,)
        kept = tuple(part for part in parts if not SEED.fullmatch(part)) or parts
        lines.setdefault(kept, []).append(path)
    labels = choose_labels(list(lines))
    sort = [tuple(sorted(own, key=read_seeds)) for own in lines.values()]
    return [Line(label=label, paths=own) for label, own in zip(labels, sort, strict=True)]


def read_seeds(path: str) -> list[int]:
    """The seeds that a path names."""
    return [int(found[1]) for part in Path(path).parts if (found := SEED.fullmatch(part))]


def choose_labels(lines: Sequence[tuple[str, ...]]) -> list[str]:
    """A label for each line: the part of its path that tells it from all others, or several where none does alone.

    Args:
        lines: the parts of each path, without seeds; all different.
    """
    if len(lines) == 1:
        named = [part for part in lines[0] if part not in WEIGHTS] or lines[0]
        return [named[-1]]
    shortest = min(map(len, lines))
    columns = [[parts[-place] for parts in lines] for place in range(1, shortest + 1)]  # from the last part on
    telling = [column for column in columns if len(set(column)) == len(lines)]
    if telling:
        return min(telling, key=lambda column: sum(map(len, column)))
    begin = next((place for place in range(shortest) if len({parts[place] for parts in lines}) > 1), shortest)
    end = next((place for place, column in enumerate(columns) if len(set(column)) > 1), shortest)
    labels = ["/".join(parts[begin : len(parts) - end]) for parts in lines]
    return labels if len({*labels, ""}) > len(lines) else ["/".join(parts) for parts in lines]


def subtract_lines(own: Spread, reference: Spread) -> Difference:
    """How far a line lies above another: seed by seed where both have as many, and else the means alone."""
    if len(own["seeds"]) == len(reference["seeds"]):
        return subtract_seeds(own, reference)
    difference = own["mean"] - reference["mean"]
    return {"mean": difference, "deviation": None, "seeds": [difference], "error": None}
