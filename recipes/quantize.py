"""Quantizes weights: `python recipes/quantize.py --weights FOLDER_OR_REPO --scheme NAME --output FOLDER [--data ...]`.

Prints the quantized layers, and a table that compares the float and the quantized model: the score of its task (top-1,
mIoU or box AP), size, memory, latency, and how often both predict the same class of an image or of a pixel.
"""

import json
import os
import signal
import subprocess
import sys
from copy import deepcopy
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

# Read when torch loads. Threads that spin while they wait starve each other where anything else runs (LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below shows no traceback

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from s3a import compile_model
from s3a.data import DataOptions, Source
from s3a.models.detection import Detector
from s3a.quantization.schemes import check_float, check_scheme, group_names
from s3a.support.command_line import run_command
from s3a.support.timing import describe_machine, take_turns, write_result
from s3a.training.evaluation import choose_task, evaluate_weights
from s3a.training.tasks.dense_transforms import choose_bucket
from s3a.training.tasks.task import ClassTask
from s3a.weights.card import format_table
from s3a.weights.folder import CONFIG_NAME, WEIGHTS_NAME, save_folder
from s3a.weights.pretrained import load_pretrained, read_card
from s3a.weights.quantized_card import Measurement, build_quantized_card, parse_card

COLUMNS = {  # behind the score of the task
    "agreement": "agreement",
    "megabytes": "MB on disk",
    "memory_megabytes": "MB of memory",
    "compiled_ms": "ms compiled",
    "eager_ms": "ms eager",
}
PIXEL_STEP = 8  # of label maps, every eighth pixel of every eighth row is compared


@dataclass(frozen=True, kw_only=True)
class Options(DataOptions):
    """Quantizes the linear layers of weights with torchao, and compares both models."""

    weights: str
    """A weights folder, or ORG/NAME on the Hub; of floating-point numbers."""
    scheme: str
    """int8-weight-only, int8-dynamic, int4-weight-only, int8-activations-int4-weights, float8-weight-only or
    float8-dynamic."""
    output: Path
    """The folder for the quantized weights."""
    layers: tuple[str, ...] = ("*",)
    """The linear layers to quantize: shell patterns of their names, such as "stages.2.*" or "*.mlp.fc1"."""
    skip: tuple[str, ...] = ()
    """Patterns of layers not to quantize, such as head."""
    data: Source | None = None
    """Where images come from to evaluate both models on; None evaluates neither."""
    revision: str | None = None
    """Branch, tag or commit of the Hub repository with the weights."""
    ignore_zero: bool = False
    """For label maps of one's own: 0 is no class, and the number n is class n - 1."""
    batch_size: int = 64
    """Images at a time in the evaluation."""
    num_workers: int = 0
    """Processes that decode images; 0 decodes in the main process."""
    latency_batch: int = 4
    """Images at a time for latency and memory."""
    turns: int = 9
    """Timed calls of each model; 0 times none and compiles nothing."""
    results: Path | None = None
    """A JSON file to write the table, the machine and the command to."""

    def __post_init__(self) -> None:
        check_scheme(self.scheme)
        if min(self.batch_size, self.latency_batch) < 1 or min(self.num_workers, self.turns) < 0:
            raise ValueError(
                f"--batch-size is {self.batch_size}, --latency-batch {self.latency_batch}, --num-workers "
                f"{self.num_workers} and --turns {self.turns}: the first two must be at least 1, the others 0"
            )
        if self.data is None and (self.dataset or self.data_dir):
            option, value = ("--dataset", self.dataset) if self.dataset else ("--data-dir", self.data_dir)
            raise ValueError(f"{option} is {value} and there is no --data: say what kind of images these are")
        if self.output.resolve() == Path(self.weights).resolve():
            raise ValueError(f"--output {self.output} is the folder of the weights: give another")


def main(options: Options) -> None:
    from s3a.quantization.convert import choose_layers, quantize  # noqa: PLC0415  torchao is slow to import

    model = load_pretrained(options.weights, options.revision)
    check_float(model)
    original = parse_card(options.weights, read_card(options.weights, options.revision))
    layers, left = choose_layers(model, options.scheme, layers=options.layers, skip=options.skip)
    kind = choose_task(model)
    task = kind.load(options) if options.data else None
    make_folder(options.output)
    print(f"{options.scheme}: {len(layers)} linear layers: {group_names(layers)}")
    if left:
        print(f"left in bfloat16, for their inputs are not in whole groups: {group_names(left)}")
    quantized = quantize(model, options.scheme, layers)
    build = partial(build_quantized_card, quantized, original, place=options.output)
    save_folder(quantized, options.output, card=build())
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = compare(options, {"float32": model.to(device), options.scheme: quantized.to(device)}, kind, task)
    text = format_results(rows, kind)
    save_folder(quantized, options.output, card=build(describe_measurement(options, rows, kind, device)))
    print(f"\n{text}\n\nwrote {options.output}")
    if options.results:
        write_result(options.results, "quantize", device, asdict(options), rows)


def describe_measurement(
    options: Options, rows: list[dict[str, Any]], kind: type[ClassTask], device: torch.device
) -> Measurement:
    """What the card says of the figures, the last of which are those of the quantized model."""
    score = rows[-1][kind.best]
    machine = describe_machine(device)
    note = (
        f"`float32` is the model before the quantization. {'Time and memory are' if options.turns else 'Memory is'} of "
        f"{options.latency_batch} images on {machine['accelerator'] or machine['processor']}, with "
        f"{machine['threads']} threads."
    )
    return Measurement(
        table=f"{format_results(rows, kind)}\n\n{note}",
        dataset=options.dataset or options.data,
        scores={} if score is None else {f"{kind.title}, {options.scheme}": score},
    )


def make_folder(folder: Path) -> None:
    """Creates the output folder; ValueError if that fails, or if it would replace float weights."""
    config = folder / CONFIG_NAME
    if config.is_file() and "quantization" not in json.loads(config.read_text(encoding="utf-8")):
        raise ValueError(f"--output {folder} holds weights that are not quantized: give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {folder} cannot be made ({error.strerror}): give another folder") from error


# --------------------------------------------------------------------------------------------------------
# Comparing
# --------------------------------------------------------------------------------------------------------


def compare(
    options: Options, models: dict[str, nn.Module], kind: type[ClassTask], task: ClassTask | None
) -> list[dict[str, Any]]:
    """A row of figures for each model; None for those that were not asked for."""
    places = [(options.weights, options.revision), (str(options.output), None)]
    evaluated = [evaluate(model, task, options) for model in models.values()]
    latencies = measure_latency(models, options) if options.turns else {}
    size = find_input_size(next(iter(models.values())))
    rows = []
    for name, (weights, revision), (score, classes) in zip(models, places, evaluated, strict=True):
        row = {
            "model": name,
            kind.best: score,
            "agreement": None if classes is None else (classes == evaluated[0][1]).double().mean().item(),
            "megabytes": count_bytes(models[name], weights) / 1e6,
            "memory_megabytes": measure_peak_memory(weights, revision, (options.latency_batch, *size)),
        }
        rows.append(row | {f"{kind}_ms": latencies.get((name, kind)) for kind in ("compiled", "eager")})
    return rows


def evaluate(model: nn.Module, task: ClassTask | None, options: Options) -> tuple[float | None, Tensor | None]:
    """The score on the validation images, and the predicted class of each or of some pixels; None without data.

    The classes are None of a detector too, whose objects need not be the same ones.
    """
    if task is None:
        return None, None
    predicted: list[Tensor] = []

    def note(module: nn.Module, images: Any, logits: Tensor) -> None:
        predicted.append(logits[..., ::PIXEL_STEP, ::PIXEL_STEP] if logits.ndim == 4 else logits)
        predicted[-1] = predicted[-1].argmax(1).flatten().cpu()

    task.check_weights(model)
    hooks = [] if isinstance(model, Detector) else [model.register_forward_hook(note)]
    found = evaluate_weights(model, task, batch_size=options.batch_size, num_workers=options.num_workers)
    for hook in hooks:
        hook.remove()
    return found.scores[task.best], torch.cat(predicted) if predicted else None


def find_input_size(model: nn.Module) -> tuple[int, int, int]:
    """Channels, height and width of an image of the size that the model is for, as its forward takes it."""
    channels, height, width = resolve_model_data_config(model)["input_size"]
    return (channels, *choose_bucket(height, width, [])) if isinstance(model, Detector) else (channels, height, width)


def measure_latency(models: dict[str, nn.Module], options: Options) -> dict[tuple[str, str], float]:
    """Median milliseconds of a batch for each model, eager and compiled, timed in turns."""
    device = next(models[options.scheme].parameters()).device
    size = find_input_size(models[options.scheme])
    images = torch.randn(options.latency_batch, *size, device=device)
    calls = {}
    for name, model in models.items():
        calls[name, "eager"] = partial(predict, model, images)
        calls[name, "compiled"] = partial(predict, compile_model(deepcopy(model)), images)
    return {name: sample.median for name, sample in take_turns(calls, options.turns).items()}


@torch.inference_mode()
def predict(model: nn.Module, images: Tensor) -> Tensor:
    """Logits, or what a detector finds."""
    return model(images)


def count_bytes(model: nn.Module, weights: str) -> int:
    """Bytes of the weights file of a folder; for a repository, those of the model's tensors."""
    path = Path(weights) / WEIGHTS_NAME
    return path.stat().st_size if path.is_file() else sum(tensor.nbytes for tensor in model.state_dict().values())


# Each model has a process of its own, because processes do not return memory. Writing 5 to clear_refs resets the peak.
PEAK_MEMORY = """
import json, re, sys, torch, s3a, s3a.quantization.storage
from pathlib import Path
from s3a.weights.pretrained import load_pretrained
def kilobytes(field):
    return int(re.search(field + r":\\s+(\\d+) kB", Path("/proc/self/status").read_text())[1])
weights, revision, shape = json.loads(sys.argv[1])
gpu = torch.cuda.is_available()
if not gpu:
    Path("/proc/self/clear_refs").write_text("5")
    before = kilobytes("VmRSS")
model = load_pretrained(weights, revision).to("cuda" if gpu else "cpu")
with torch.inference_mode():
    model(torch.randn(shape, device="cuda" if gpu else "cpu"))
print(torch.cuda.max_memory_allocated() if gpu else 1024 * (kilobytes("VmHWM") - before))
"""


def measure_peak_memory(weights: str, revision: str | None, shape: tuple[int, ...]) -> float | None:
    """Megabytes at the peak of loading weights and one eager forward, on the GPU if there is one; None if unknown.

    On a CPU it is the memory of the process beyond that of its imports, which Linux alone reports.
    """
    if not (torch.cuda.is_available() or Path("/proc/self/clear_refs").exists()):
        return None
    arguments = json.dumps([weights, revision, shape])
    run = subprocess.run([sys.executable, "-c", PEAK_MEMORY, arguments], capture_output=True, text=True, check=True)
    return int(run.stdout.splitlines()[-1]) / 1e6


def format_results(rows: list[dict[str, Any]], kind: type[ClassTask]) -> str:
    """The rows as a table in Markdown."""
    columns = {kind.best: kind.title, **COLUMNS}
    cells = [[row["model"], *(format_figure(key, row[key]) for key in columns)] for row in rows]
    return format_table(["model", *columns.values()], cells)


def format_figure(key: str, value: float | None) -> str:
    """A figure as text, "-" for one that was not measured."""
    if value is None:
        return "-"
    return f"{value:,.2f}" if key.endswith(("megabytes", "_ms")) else f"{100 * value:.2f} %"


if __name__ == "__main__":
    run_command(Options, main)
