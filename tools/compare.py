"""Trains models under one recipe with several seeds and lays them beside each other: python tools/compare.py MODEL ...

Every option of a recipe is one here too: `--epochs 10 --data fashion-mnist`. The same command again goes on where it
was stopped.
"""

import os
import signal
import sys
from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

# Read when torch loads. Threads that spin while they wait starve each other where anything else runs (LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below shows no traceback

import torch
import tyro

from s3a.comparison.candidates import Contender, Equal, list_candidates, list_equal_scans, make_contenders
from s3a.comparison.report import (
    draw_comparison,
    format_markdown,
    format_text,
    list_cautions,
    list_skipped,
    make_tables,
)
from s3a.comparison.results import RESULTS_NAME, Results, Score, open_results, read_results
from s3a.comparison.scores import add_differences, make_score, train_run
from s3a.comparison.speed import measure_growth, measure_speed
from s3a.data import ImageData, load_data
from s3a.support.command_line import one_line_errors, parse_options, print_progress, read_rank
from s3a.support.errors import Interrupted
from s3a.training.named_recipes import FINE_TUNING, get_recipe, parse_recipe
from s3a.training.processes import StopRequests, count_own_cores
from s3a.training.recipe import ClassificationRecipe, spell_option
from s3a.training.run_folder import INCIDENTAL, write_whole


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """Trains models under one recipe with several seeds, and lays scores, costs, speed and memory beside each other.

    Every option of recipes/train.py is one here too, but for those of a single run.
    """

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="MODEL ...")] = ()
    """Names in timm's registry, ours or timm's; the first one is what the others are compared with."""
    scan: tuple[str, ...] = ()
    """Train every model with each of these scans: alternate (as published), window-first, anchors-first, local-only,
    anchor-only, dense."""
    size: tuple[int, ...] = ()
    """Train every model with each of these sizes of its scans."""
    recipe: str = "digits"
    """The named recipe that all are trained by."""
    seeds: int = 5
    """Runs of every model, with the seeds 0, 1, 2 and so on."""
    equal: Equal = "epochs"
    """What all get the same of: epochs, or compute, counted whole; the reference has the recipe's epochs."""
    reference: str | None = None
    """The model, or the line of the table, that the others are compared with; None is the first."""
    growth: tuple[int, ...] = (224, 384, 512, 768, 1024)
    """Sides of images at which time and memory of one image are measured; none measures no growth."""
    speed_batch_size: int = 32
    """Images at a time where throughput is measured."""
    turns: int = 9
    """Timed calls of each model."""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """Where time and memory are measured."""
    output_dir: Path = Path("runs/comparison")
    """Where results.json, results.md and comparison.png go."""
    report_only: bool = False
    """Write the tables and the picture of OUTPUT_DIR/results.json again; nothing is trained or measured."""
    runs_dir: Path | None = None
    """Where the training runs lie, which comparisons can share; None is OUTPUT_DIR/runs."""

    def __post_init__(self) -> None:
        for field in ("seeds", "speed_batch_size", "turns"):
            if getattr(self, field) < 1:
                raise ValueError(f"{spell_option(field)} is {getattr(self, field)}: it must be at least 1")
        if any(side < 1 for side in self.growth):
            raise ValueError(f"--growth is {' '.join(map(str, self.growth))}: sides must be above 0")

    @property
    def runs(self) -> Path:
        """Where the training runs lie."""
        return self.runs_dir or self.output_dir / "runs"


# Options of a single run, which a comparison decides itself.
DECIDED = ("name", "model", "seed", "weights", "push_to_hub")


def parse_arguments(arguments: Sequence[str]) -> tuple[Comparison, ClassificationRecipe]:
    """The comparison's own options, and the recipe with the others."""
    ours = {spell_option(field.name) for field in fields(Comparison)} | {"--help", "-h"}
    own: list[str] = []
    rest: list[str] = []
    part = own
    for word in arguments:
        if word.startswith("--") or word == "-h":
            name = word.partition("=")[0]
            if name in map(spell_option, DECIDED):
                raise ValueError(f"{name} is for a single run: a comparison takes MODEL ... and --seeds")
            part = own if name in ours else rest
        part.append(word)
    comparison = parse_options(Comparison, own)
    if comparison.recipe in FINE_TUNING or get_recipe(comparison.recipe).weights is not None:
        raise ValueError(
            f"--recipe {comparison.recipe} starts from weights of one model: take one from scratch, such as photos"
        )
    return comparison, parse_recipe(comparison.recipe, rest)


def main() -> None:
    """Trains, measures, prints and writes; what an earlier call has done is kept."""
    with one_line_errors(), StopRequests() as requests:
        options, recipe = parse_arguments(sys.argv[1:])
        if options.report_only:
            write_report(options, read_results(options.output_dir / RESULTS_NAME))
            return
        candidates = list_candidates(options.models, options.scan, options.size)
        device = check_device(options.device)
        torch.set_num_threads(recipe.cpu_threads or count_own_cores())  # as training does: times depend on it
        data = load_data(recipe.data, recipe.data_dir, dataset=recipe.dataset, streaming=recipe.streaming)
        contenders = make_contenders(
            candidates, recipe, data.label_names, equal=options.equal, reference=options.reference
        )
        for line in list_equal_scans(contenders):
            print_progress(line)
        results = open_results(options.output_dir, describe_timing(options, contenders, data), device)
        results.settings = describe_settings(options, recipe, data)
        results.scores = train_all(options, contenders, data, requests)
        if read_rank() == 0:
            measure_all(options, contenders, data, results, device, requests)
            write_report(options, results)


def check_device(name: str) -> torch.device:
    """The device; ValueError where it is not there."""
    kind = name.partition(":")[0]
    if kind not in ("cpu", "cuda") or (kind == "cuda" and not torch.cuda.is_available()):
        raise ValueError(f"--device is {name}: it must be cpu, or cuda where there is a GPU")
    return torch.device(name)


def describe_timing(options: Comparison, contenders: list[Contender], data: ImageData) -> dict[str, object]:
    """What times depend on; as long as it stays the same, measured times are kept."""
    recipe = contenders[0].recipe
    return {
        "labels": [contender.label for contender in contenders],
        "classes": len(data.label_names),
        "image_size": recipe.image_size,
        "precision": recipe.precision,
        "batch_size": options.speed_batch_size,
        "turns": options.turns,
        "device": options.device,
    }


def describe_settings(options: Comparison, recipe: ClassificationRecipe, data: ImageData) -> dict[str, object]:
    """The options of the comparison, for whoever reads the result."""
    own = {key: getattr(options, key) for key in ("models", "scan", "size", "seeds", "equal", "reference")}
    shared = {key: value for key, value in vars(recipe).items() if key not in (*INCIDENTAL, *DECIDED, "scan", "size")}
    images = {"train": data.train.num_images, "val": data.val.num_images, "fingerprint": data.fingerprint}
    return {**own, "recipe": {"name": options.recipe, **shared}, "data": images}


def train_all(options: Comparison, contenders: list[Contender], data: ImageData, requests: StopRequests) -> list[Score]:
    """Trains every run, seed after seed, so that an early stop leaves whole comparisons of fewer seeds."""
    histories: dict[str, list[list[dict[str, Any]]]] = {contender.label: [] for contender in contenders}
    runs = [(seed, contender) for seed in range(options.seeds) for contender in contenders]
    for index, (seed, contender) in enumerate(runs, start=1):
        raise_on_stop(requests)
        print_progress(f"run {index} of {len(runs)}: {contender.label}, seed {seed}")
        histories[contender.label].append(train_run(contender.make_recipe(options.runs, seed), data))
    scores = [make_score(each, histories[each.label], data.train.num_images) for each in contenders]
    add_differences(scores, options.reference)
    return scores


def measure_all(
    options: Comparison,
    contenders: list[Contender],
    data: ImageData,
    results: Results,
    device: torch.device,
    requests: StopRequests,
) -> None:
    """Measures what is not measured yet, and writes the result after each part."""
    results.write(options.output_dir)
    names, turns = data.label_names, options.turns
    if not results.speed:
        print_progress("measuring throughput and memory, in turns")
        batch_size = options.speed_batch_size
        results.speed = measure_speed(contenders, names, device, batch_size=batch_size, turns=turns)
        results.write(options.output_dir)
    for side in sorted(set(options.growth) - set(results.sides)):
        raise_on_stop(requests)
        print_progress(f"measuring images of {side} px")
        results.growth += measure_growth(contenders, names, device, side, results.growth, turns=turns)
        results.write(options.output_dir)


def raise_on_stop(requests: StopRequests) -> None:
    """Raises Interrupted between two parts if a signal asked to stop; a run in progress handles signals itself."""
    if requests.reason:
        raise Interrupted(f"stopped by {requests.reason}: the same command goes on with the comparison")


def write_report(options: Comparison, results: Results) -> None:
    """Prints the tables, and writes them and the picture beside the results."""
    tables, notes = make_tables(results), [*list_cautions(results), *list_skipped(results)]
    print("\n\n".join([*map(format_text, tables), *notes]))
    text = "\n\n".join([f"`{results.command}`", *map(format_markdown, tables), *notes]) + "\n"
    write_whole(options.output_dir / "results.md", text)
    draw_comparison(results, options.output_dir / "comparison.png")
    names = [*([] if options.report_only else [RESULTS_NAME]), "results.md", "comparison.png"]
    print("\nwrote " + ", ".join(str(options.output_dir / name) for name in names))


if __name__ == "__main__":
    main()
