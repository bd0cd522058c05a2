"""Evaluates weights on corrupted images: python tools/robustness.py --weights A B ... --data DATA --corruptions all.

The validation images are corrupted as they are read. The same command again goes on where it was stopped, and with more
weights, corruptions or severities it measures what is missing.
"""

import os
import signal
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

# Read when torch loads. Threads that spin while they wait starve each other where anything else runs (LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below shows no traceback

from accelerate import Accelerator
from timm.data import ImageNetInfo

from s3a.comparison.report import format_markdown
from s3a.data import ImageData, Source, load_data
from s3a.data.imagenet import SEVERITIES
from s3a.robustness.corruptions import expand_corruptions
from s3a.robustness.evaluation import (
    Candidate,
    Conditions,
    evaluate_part,
    group_by_preprocessing,
    load_candidate,
)
from s3a.robustness.imagenet import list_subsets
from s3a.robustness.images import LIBRARY, choose_rows, get_library_version
from s3a.robustness.lines import make_lines
from s3a.robustness.report import draw_report, format_report, make_report
from s3a.robustness.results import RESULTS_NAME, Results, open_results, read_results
from s3a.support.command_line import print_progress, run_command
from s3a.support.errors import Interrupted
from s3a.support.timing import describe_machine
from s3a.training.processes import StopRequests, set_cpu_threads
from s3a.training.recipe import Precision
from s3a.training.run_folder import write_whole


@dataclass(frozen=True, kw_only=True)
class Options:
    """Evaluates classifiers on validation images that are corrupted on the fly.

    `accelerate launch tools/robustness.py ...` shares the images among several processes.
    """

    weights: tuple[str, ...] = ()
    """Weights folders, or ORG/NAME on the Hub. Paths that differ in a part seed-N alone are seeds of one line."""
    data: Source | Literal["imagenet"] | None = None
    """Where the images come from; imagenet is ImageNet's validation images alone."""
    data_dir: Path | None = None
    """The folder of an imagefolder (train/CLASS/*, val/CLASS/*), of parquet or webdataset shards, of Fashion-MNIST."""
    dataset: str | None = None
    """For hub: ORG/NAME or ORG/NAME:CONFIG."""
    corruptions: tuple[str, ...] = ("common",)
    """Names, and groups: common (the 15 of the mean corruption error), noise, blur, weather, digital, extra, all."""
    severities: tuple[int, ...] = SEVERITIES
    """From 1 to 5."""
    num_images: int | None = None
    """So many of the validation images, evenly spaced; None is all."""
    seed: int = 0
    """Of the noise."""
    batch_size: int = 256
    """Images at a time, over all processes."""
    precision: Precision = "no"
    """Mixed precision: no, bf16 or fp16."""
    num_workers: int = 0
    """Processes that corrupt; 0 does it in the main process."""
    max_bad_images: float = 0.0
    """Share of the images that may be unreadable; they are left out of the figures and named."""
    other_label_names: bool = False
    """Let the data call the classes otherwise than the weights do, in the same order."""
    output_dir: Path = Path("runs/robustness")
    """Where results.json, results.md and robustness.png go."""
    report_only: bool = False
    """Write the tables and the picture of OUTPUT_DIR/results.json again; nothing is measured."""

    def __post_init__(self) -> None:
        if not self.report_only and (not self.weights or self.data is None):
            raise ValueError("--weights and --data must be given, or --report-only")
        wrong = [severity for severity in self.severities if severity not in SEVERITIES]
        if wrong or not self.severities:
            raise ValueError(
                f"--severities is {' '.join(map(str, self.severities)) or 'empty'}: give some of 1 2 3 4 5"
            )
        if self.batch_size < 1 or self.num_workers < 0 or self.seed < 0:
            raise ValueError(
                f"--batch-size is {self.batch_size}, --num-workers {self.num_workers} and --seed {self.seed}: the "
                "first must be at least 1, the others at least 0"
            )
        if not 0 <= self.max_bad_images <= 1:
            raise ValueError(f"--max-bad-images is {self.max_bad_images}: it must be between 0 and 1")


def main(options: Options) -> None:
    """Measures what is not measured yet, prints and writes."""
    if options.report_only:
        write_report(options.output_dir, read_results(options.output_dir / RESULTS_NAME))
        return
    with StopRequests() as requests:
        corruptions = expand_corruptions(options.corruptions)
        make_lines(options.weights)  # refuses weights that are given twice
        library_version = get_library_version()
        data = load_images(options)
        conditions = Conditions(
            data=data,
            rows=choose_rows(data.val.num_images, options.num_images),
            seed=options.seed,
            batch_size=options.batch_size,
            num_workers=options.num_workers,
            max_bad_images=options.max_bad_images,
        )
        results = open_results(options.output_dir, describe_conditions(options, conditions, library_version))
        load = [load_candidate(path, data, other_label_names=options.other_label_names) for path in options.weights]
        accelerator = Accelerator(mixed_precision=options.precision)
        set_cpu_threads(accelerator, threads=None)
        candidates = [replace(each, model=each.model.to(accelerator.device)) for each in load]
        note_other_weights(results, candidates)
        results.weights = {each.path: each.digest for each in candidates}
        results.corruptions, results.severities = list(corruptions), sorted(set(options.severities))
        results.machine = describe_machine(accelerator.device)
        measure_missing(options, candidates, conditions, accelerator, results, requests)
        if accelerator.is_main_process:
            results.write(options.output_dir)
            write_report(options.output_dir, results)


def load_images(options: Options) -> ImageData:
    """The source of the options, or ImageNet's validation images."""
    if options.data == "imagenet":
        (subset,) = list_subsets("imagenet", options.data_dir, dataset=options.dataset)
        return subset.load()
    assert options.data is not None  # see __post_init__
    return load_data(options.data, options.data_dir, dataset=options.dataset)


def describe_conditions(options: Options, conditions: Conditions, library_version: str) -> dict[str, object]:
    """What a score depends on beside the weights: where it is another one, nothing measured before can be kept."""
    data = conditions.data
    return {
        "data": options.dataset or options.data,
        "fingerprint": data.fingerprint,
        "images": len(conditions.rows),
        "seed": options.seed,
        "precision": options.precision,
        "library": LIBRARY,
        "library_version": library_version,
        "knows_imagenet": knows_imagenet(data),
    }


def knows_imagenet(data: ImageData) -> bool:
    """Whether the classes are ImageNet's 1,000 in their order, by the names of its folders or in words."""
    info = ImageNetInfo("imagenet-1k")
    return data.label_names in (info.label_names(), info.label_descriptions())


def note_other_weights(results: Results, candidates: Sequence[Candidate]) -> None:
    """Says where a path holds other weights than it did when the command ran before."""
    for candidate in candidates:
        if results.weights.get(candidate.path, candidate.digest) != candidate.digest:
            print_progress(f"{candidate.path} holds other weights than before: they are measured anew")


def measure_missing(
    options: Options,
    candidates: Sequence[Candidate],
    conditions: Conditions,
    accelerator: Accelerator,
    results: Results,
    requests: StopRequests,
) -> None:
    """Measures every part that some candidates lack, and writes the result after each.

    Raises:
        Interrupted: where a signal asked to stop; what the part under way has found is lost.
    """
    parts = results.parts
    for index, part in enumerate(parts, start=1):
        lacking = [candidate for candidate in candidates if results.get(candidate.digest, part) is None]
        for group in group_by_preprocessing(lacking):
            called = f"{part.corruption}, severity {part.severity}" if part.severity else "clean images"
            print_progress(f"part {index} of {len(parts)}: {called}, {len(group)} weights")
            scores = evaluate_part(group, part, conditions, accelerator, stop=lambda: requests.reason is not None)
            if scores is None:
                raise Interrupted(
                    f"stopped by {requests.reason}: the same command goes on with the parts that are missing"
                )
            results.add(part, scores)
            if accelerator.is_main_process:
                results.write(options.output_dir)


def write_report(folder: Path, results: Results) -> None:
    """Prints the tables, and writes them and the picture beside the results."""
    report = make_report(results)
    print(format_report(report))
    write_whole(folder / "results.md", format_report(report, format_markdown) + "\n")
    draw_report(report, folder / "robustness.png")
    print("\nwrote " + ", ".join(str(folder / name) for name in (RESULTS_NAME, "results.md", "robustness.png")))


if __name__ == "__main__":
    run_command(Options, main)
