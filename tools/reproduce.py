"""Measures official checkpoints beside what their papers print:

python tools/reproduce.py --checkpoints DIR --imagenet DIR [--robustness DIR]

Every file is known by its keys and shapes, whatever it is called. The same command again goes on where it was stopped.
"""

import json
import os
import shlex
import shutil
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

# Read when torch loads. Threads that spin while they wait starve each other where anything else runs (LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below shows no traceback

from accelerate import PartialState

from s3a.comparison.report import format_markdown, format_text
from s3a.data.imagenet import ImageNetData
from s3a.robustness.imagenet import (
    RESULTS_NAME,
    Figures,
    list_subsets,
    measure_subsets,
    open_imagenet_results,
)
from s3a.robustness.reproduction import (
    Measured,
    OfficialWeights,
    choose_sizes,
    compare_with_published,
    describe_official,
    find_checkpoints,
    find_sets,
    make_table,
)
from s3a.support.command_line import print_progress, read_rank, run_command
from s3a.support.timing import describe_machine
from s3a.training.evaluation import evaluate_weights
from s3a.training.processes import StopRequests
from s3a.training.recipe import Precision
from s3a.training.run_folder import write_whole
from s3a.training.tasks.imagenet import ImageNetClassification
from s3a.weights.card import build_card
from s3a.weights.folder import CARD_NAME, CONFIG_NAME, save_folder
from s3a.weights.official import convert, find_data_config, find_key_table, read_checkpoint
from s3a.weights.pretrained import load_pretrained, push_folder


@dataclass(frozen=True, kw_only=True)
class Options:
    """Measures official checkpoints on ImageNet and its robustness sets, beside what their papers print."""

    checkpoints: Path
    """The folder of the downloaded checkpoints; those in folders below it count too."""
    imagenet: Path
    """The folder with ImageNet's validation images: CLASS/*, or val/CLASS/*."""
    robustness: Path | None = None
    """The folder with imagenet-a, imagenet-r, imagenetv2-matched-frequency-format-val, sketch and imagenet-c, as far as
    they are there."""
    real: bool = False
    """Evaluate on ImageNet by the labels of ImageNet ReaL too."""
    output_dir: Path = Path("runs/reproduce")
    """Where results.json, results.md and the converted weights go."""
    batch_size: int = 64
    """Images at a time, over all processes."""
    num_workers: int = 0
    """Processes that decode; 0 does it in the main process."""
    precision: Precision = "no"
    """Mixed precision: no, bf16 or fp16."""
    push_to_hub: str | None = None
    """Publish the converted weights, with cards, in repositories of this organisation or user on the Hub."""

    def __post_init__(self) -> None:
        if self.batch_size < 1 or self.num_workers < 0:
            raise ValueError(
                f"--batch-size is {self.batch_size} and --num-workers {self.num_workers}: "
                "the one must be at least 1 and the other at least 0"
            )
        if self.push_to_hub is not None and "/" in self.push_to_hub:
            raise ValueError(
                f"--push-to-hub is {self.push_to_hub!r}: it must be ORG alone; models name the repositories"
            )


def main(options: Options) -> None:
    """Finds, converts, measures, prints and writes; what an earlier call has done is kept."""
    found, skipped = find_checkpoints(options.checkpoints)
    sets = {"imagenet": options.imagenet}
    sets |= {"imagenet-real": options.imagenet} if options.real else {}
    sets |= find_sets(options.robustness) if options.robustness else {}
    for line in skipped:
        print_progress(f"left out: {line}")
    results = open_imagenet_results(options.output_dir, options.precision)
    results.machine = describe_machine(PartialState().device)
    subsets = {name: list_subsets(name, folder) for name, folder in sets.items()}  # which checks the folders
    rows, chosen, notes = [], found, []
    with StopRequests() as requests:
        for name, of_set in subsets.items():  # ImageNet comes first, and decides which size a checkpoint is for
            evaluators = {weights.key: make_evaluator(options, weights, requests) for weights in chosen}
            measure_subsets(results, name, of_set, evaluators, options.output_dir)
            measured = [compare_with_published(each, name, results.get_figures(each.key, name)) for each in chosen]
            if name == "imagenet":
                chosen, notes = choose_sizes(measured)
            rows += [row for row in measured if row.weights in chosen]
    for weights in chosen:
        convert_weights(options, weights)  # where its folder was lost since it was measured
    rows.sort(key=lambda row: chosen.index(row.weights))
    if read_rank() == 0:
        for folder in (get_folder(options, weights) for weights in found if weights not in chosen):
            if folder.is_dir():
                shutil.rmtree(folder)
        write_report(options, rows, notes)
        for weights in chosen:
            write_card(options, weights, rows)
            if options.push_to_hub is not None:
                check_complete(weights, rows)
                folder = get_folder(options, weights)
                print(f"published {push_folder(folder, f'{options.push_to_hub}/{weights.name}')}", flush=True)


def get_folder(options: Options, weights: OfficialWeights) -> Path:
    """Where converted weights lie."""
    return options.output_dir / "weights" / weights.name


def convert_weights(options: Options, weights: OfficialWeights) -> None:
    """Writes the weights folder of a checkpoint, unless it is there."""
    folder = get_folder(options, weights)
    with PartialState().main_process_first():
        config = folder / CONFIG_NAME
        if config.is_file() and json.loads(config.read_text(encoding="utf-8")).get("official_sha256") == weights.sha256:
            return
        print_progress(f"converting {weights.path}, which is {weights.model} for {weights.image_size} px")
        model = convert(read_checkpoint(weights.path).state, weights.model, find_key_table(weights.model))
        data_config = find_data_config(weights.model, weights.image_size)
        save_folder(model, folder, data_config=data_config, config={"official_sha256": weights.sha256})


def make_evaluator(
    options: Options, weights: OfficialWeights, requests: StopRequests
) -> Callable[[ImageNetData], Figures]:
    """What evaluates converted weights."""

    def evaluate(data: ImageNetData) -> Figures:
        convert_weights(options, weights)
        print_progress(f"evaluating {weights.name}")
        evaluation = evaluate_weights(
            load_pretrained(get_folder(options, weights)),
            ImageNetClassification(data),
            batch_size=options.batch_size,
            precision=options.precision,
            num_workers=options.num_workers,
            stop=lambda: requests.reason,
        )
        return evaluation.to_json()

    return evaluate


def write_report(options: Options, rows: Sequence[Measured], notes: Sequence[str]) -> None:
    """Prints the table, and writes it beside the results."""
    table = make_table(rows)
    print("\n\n".join([format_text(table), *notes]))
    command = shlex.join(["python", *sys.argv])
    write_whole(options.output_dir / "results.md", "\n\n".join([f"`{command}`", format_markdown(table), *notes]) + "\n")
    print(f"\nwrote {options.output_dir / RESULTS_NAME}, results.md and weights/ beside it", flush=True)


def write_card(options: Options, weights: OfficialWeights, rows: Sequence[Measured]) -> None:
    """Writes the model card with the scores into a weights folder."""
    folder = get_folder(options, weights)
    card = build_card(load_pretrained(folder), official=describe_official(weights, rows), place=folder)
    write_whole(folder / CARD_NAME, card)


def check_complete(weights: OfficialWeights, rows: Sequence[Measured]) -> None:
    """Raises ValueError where weights were not measured on all of ImageNet's validation images."""
    if not any(row.weights == weights and row.name == "imagenet" and row.is_complete for row in rows):
        raise ValueError(
            f"--push-to-hub: {weights.name} was not measured on all 50,000 images of ImageNet, and its card would not "
            "say what it scores; give them all with --imagenet"
        )


if __name__ == "__main__":
    run_command(Options, main)
