"""Quantizes weights: `python recipes/quantize.py --weights FOLDER_OR_REPO --scheme NAME --output FOLDER [--data ...]`.

Prints the layers chosen, and one table of the float and the quantized model: top-1, size, memory, latency, and how
often both predict the same.
"""

import itertools
import json
import os
import subprocess
import sys
from collections.abc import Callable
from copy import deepcopy
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

# Read when torch loads. Threads that spin while they wait starve each other where anything else runs (LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

import torch
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from s3a import compile_model
from s3a.data import ImageData, Source, load_data
from s3a.quantization.convert import choose_layers, quantize
from s3a.quantization.schemes import check_float, check_scheme
from s3a.support.command_line import run_command
from s3a.support.timing import take_turns, write_result
from s3a.training.evaluation import evaluate_weights
from s3a.weights.card import build_card, format_table
from s3a.weights.folder import CONFIG_NAME, WEIGHTS_NAME, save_folder
from s3a.weights.pretrained import load_pretrained

COLUMNS = {
    "top1": "top-1",
    "agreement": "agreement",
    "megabytes": "MB on disk",
    "memory_megabytes": "MB of memory",
    "compiled_ms": "ms compiled",
    "eager_ms": "ms eager",
}


@dataclass(frozen=True, kw_only=True)
class Options:
    """Quantizes the linear layers of weights with torchao, and compares both models."""

    weights: str
    """A weights folder, or ORG/NAME on the Hub; of floating-point numbers."""
    scheme: str
    """int8-weight-only, int8-dynamic, int4-weight-only, int8-activations-int4-weights, float8-weight-only or
    float8-dynamic."""
    output: Path
    """Where to write the quantized weights folder."""
    layers: tuple[str, ...] = ("*",)
    """Shell patterns of the names of linear layers to quantize, such as "stages.2.*" or "*.mlp.fc1"."""
    skip: tuple[str, ...] = ()
    """Patterns of those to leave, such as head."""
    data: Source | None = None
    """Where images come from to evaluate both models on; None evaluates neither."""
    data_dir: Path | None = None
    """The folder of an imagefolder (train/CLASS/*, val/CLASS/*), or of parquet or webdataset shards."""
    dataset: str | None = None
    """For hub: ORG/NAME or ORG/NAME:CONFIG."""
    revision: str | None = None
    """Branch, tag or commit of the Hub repository."""
    batch_size: int = 64
    """Images at a time, in the evaluation."""
    num_workers: int = 0
    """Processes that decode; 0 does it in the main process."""
    latency_batch: int = 4
    """Images at a time, for latency and memory."""
    turns: int = 9
    """Timed calls of each model; 0 times none and compiles nothing."""
    results: Path | None = None
    """A JSON file for the table, the machine and the command."""

    def __post_init__(self) -> None:
        check_scheme(self.scheme)
        if min(self.batch_size, self.latency_batch) < 1 or min(self.num_workers, self.turns) < 0:
            raise ValueError(
                f"--batch-size is {self.batch_size}, --latency-batch {self.latency_batch}, --num-workers "
                f"{self.num_workers} and --turns {self.turns}: the first two must be at least 1, the others 0"
            )
        if self.output.resolve() == Path(self.weights).resolve():
            raise ValueError(f"--output {self.output} is the folder of the weights: give another")


def main(options: Options) -> None:
    model = load_pretrained(options.weights, options.revision)
    check_float(model)
    layers, left = choose_layers(model, options.scheme, layers=options.layers, skip=options.skip)
    data = load_data(options.data, options.data_dir, dataset=options.dataset) if options.data else None
    make_folder(options.output)
    print(f"{options.scheme}: {len(layers)} linear layers: {grouped(layers)}")
    if left:
        print(f"left in bfloat16, for their inputs are not in whole groups: {grouped(left)}")
    quantized = quantize(model, options.scheme, layers)
    save_folder(quantized, options.output, card=build_card(quantized))
    models = {"float32": model, options.scheme: quantized}
    rows = compare(options, models, data)
    text = result_table(rows)
    save_folder(quantized, options.output, card=f"{build_card(quantized)}\n## Quantization\n\n{text}\n")
    print(f"\n{text}\n\nwrote {options.output}")
    if options.results:
        write_result(options.results, "quantize", torch.device("cpu"), asdict(options), rows)


def make_folder(folder: Path) -> None:
    """Makes the output folder; ValueError where there can be none, or other weights would be lost."""
    config = folder / CONFIG_NAME
    if config.is_file() and "quantization" not in json.loads(config.read_text(encoding="utf-8")):
        raise ValueError(f"--output {folder} holds weights that are not quantized: give another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"--output {folder} cannot be made ({error.strerror}): give another folder") from error


def grouped(names: list[str]) -> str:
    """Names with their numbers written as ranges: `stages.0.blocks.0-2.attn.qkv`."""
    kinds: dict[str, list[int]] = {}
    for name in names:
        parts = name.split(".")
        numbers = [index for index, part in enumerate(parts) if part.isdecimal()]
        number = int(parts[numbers[-1]]) if numbers else 0
        if numbers:
            parts[numbers[-1]] = "{}"
        kinds.setdefault(".".join(parts), []).append(number)
    return ", ".join(kind.format(ranges(numbers)) for kind, numbers in kinds.items())


def ranges(numbers: list[int]) -> str:
    """Rising numbers, runs of them as first and last: `0-2,5`."""
    runs = [[n for _, n in run] for _, run in itertools.groupby(enumerate(numbers), lambda pair: pair[1] - pair[0])]
    return ",".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in runs)


# --------------------------------------------------------------------------------------------------------
# Comparing
# --------------------------------------------------------------------------------------------------------


def compare(options: Options, models: dict[str, nn.Module], data: ImageData | None) -> list[dict[str, Any]]:
    """A row per model; what was not asked for is None."""
    places = [(options.weights, options.revision), (str(options.output), None)]
    evaluated = [evaluation(model, data, options) for model in models.values()]
    latencies = measure_latency(models, options) if options.turns else {}
    size = resolve_model_data_config(next(iter(models.values())))["input_size"]
    rows = []
    for name, (weights, revision), (top1, classes) in zip(models, places, evaluated, strict=True):
        row = {
            "model": name,
            "top1": top1,
            "agreement": None if classes is None else (classes == evaluated[0][1]).double().mean().item(),
            "megabytes": file_size(models[name], weights, revision) / 1e6,
            "memory_megabytes": peak_memory(weights, revision, (options.latency_batch, *size)),
        }
        rows.append(row | {f"{kind}_ms": latencies.get((name, kind)) for kind in ("compiled", "eager")})
    return rows


def evaluation(model: nn.Module, data: ImageData | None, options: Options) -> tuple[float | None, Tensor | None]:
    """Top-1 on the validation images, and the class predicted for each."""
    if data is None:
        return None, None
    predicted: list[Tensor] = []
    hook = model.register_forward_hook(lambda module, images, logits: predicted.append(logits.argmax(1).cpu()))
    found = evaluate_weights(model, data, batch_size=options.batch_size, num_workers=options.num_workers)
    hook.remove()
    return found.scores["top1"], torch.cat(predicted)


def measure_latency(models: dict[str, nn.Module], options: Options) -> dict[tuple[str, str], float]:
    """Median milliseconds of a batch for each model, eager and compiled, all of them in turns."""
    device = next(models[options.scheme].parameters()).device
    size = resolve_model_data_config(models[options.scheme])["input_size"]
    images = torch.randn(options.latency_batch, *size, device=device)
    calls = {}
    for name, model in models.items():
        calls[name, "eager"] = inference(model, images)
        calls[name, "compiled"] = inference(compile_model(deepcopy(model)), images)
    return {name: sample.median for name, sample in take_turns(calls, options.turns).items()}


def inference(model: nn.Module, images: Tensor) -> Callable[[], Tensor]:
    """A forward on the images."""

    def infer() -> Tensor:
        with torch.inference_mode():
            return model(images)

    return infer


def file_size(model: nn.Module, weights: str, revision: str | None) -> int:
    """Bytes of the weights file; a repository's is that of the same model saved."""
    path = Path(weights) / WEIGHTS_NAME
    return path.stat().st_size if path.is_file() else sum(tensor.nbytes for tensor in model.state_dict().values())


# A process of its own for each model: memory is not given back. Writing 5 to clear_refs forgets the imports' peak.
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


def peak_memory(weights: str, revision: str | None, shape: tuple[int, ...]) -> float | None:
    """Megabytes of loading weights and an uncompiled forward, at the peak, on the GPU if there is one; None if unknown.

    On a CPU it is what the process takes beyond its imports, which Linux alone tells.
    """
    if not (torch.cuda.is_available() or Path("/proc/self/clear_refs").exists()):
        return None
    arguments = json.dumps([weights, revision, shape])
    run = subprocess.run([sys.executable, "-c", PEAK_MEMORY, arguments], capture_output=True, text=True, check=True)
    return int(run.stdout.splitlines()[-1]) / 1e6


def result_table(rows: list[dict[str, Any]]) -> str:
    """The rows for a person, in Markdown."""
    return format_table(
        ["model", *COLUMNS.values()], [[row["model"], *(shown(key, row[key]) for key in COLUMNS)] for row in rows]
    )


def shown(key: str, value: float | None) -> str:
    """A figure for a person; "-" for one that was not measured."""
    if value is None:
        return "-"
    return f"{100 * value:.2f} %" if key in ("top1", "agreement") else f"{value:,.2f}"


if __name__ == "__main__":
    run_command(Options, main)
