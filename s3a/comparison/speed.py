"""The candidates' throughput in turns, their memory, and how time and memory grow with the side of the images.

Models run as the recipe's precision has it, uncompiled: so every size of image costs its own work alone.
"""

import math
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from functools import partial

import psutil
import torch
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.nn.functional import cross_entropy

from s3a.analysis.cost import count_channels
from s3a.comparison.candidates import Contender
from s3a.comparison.results import Growth
from s3a.support.timing import Sample, take_turns
from s3a.training.model import build_model, count_image_cost
from s3a.training.recipe import ClassificationRecipe

Call = Callable[[], object]
Held = tuple[nn.Module | torch.optim.Optimizer | Tensor, ...]
"""Modules, optimizers and tensors that there are before a call."""
MIB = 2**20


def measure_speed(
    contenders: list[Contender], label_names: list[str], device: torch.device, *, batch_size: int, turns: int
) -> dict[str, dict[str, float]]:
    """Throughput and memory of every candidate at the recipe's image size, in inference and in training.

    Returns:
        label -> images per second (the median of the turns, and its fastest and slowest), and MiB of tensors at the
        peak of one call, weights included.
    """
    found: dict[str, dict[str, float]] = {contender.label: {} for contender in contenders}
    for phase, prepare in (("inference", prepare_inference), ("training", prepare_training)):
        calls: dict[str, Call] = {}
        for contender in contenders:
            side = contender.recipe.image_size
            call, held = prepare(contender.recipe, label_names, batch_size, side, device)
            found[contender.label][f"{phase}_mib"] = measure_peak_memory(call, held)
            calls[contender.label] = call
        for label, sample in take_turns(calls, turns).items():
            found[label] |= convert_to_throughput(phase, sample, batch_size)
    return found


def convert_to_throughput(phase: str, sample: Sample, batch_size: int) -> dict[str, float]:
    """A sample's median, fastest and slowest turn in images per second, by the names that the result has for them."""
    times = {"": sample.median, "_fastest": sample.fastest, "_slowest": sample.slowest}
    return {f"{phase}_images_per_second{kind}": 1e3 * batch_size / time for kind, time in times.items()}


def measure_growth(
    contenders: list[Contender],
    label_names: list[str],
    device: torch.device,
    side: int,
    smaller: list[Growth],
    *,
    turns: int,
) -> list[Growth]:
    """A row for each candidate: milliseconds and MiB of one image of side x side pixels; see `measure_side`."""
    prepared = {
        contender.label: partial(prepare_inference, contender.recipe, label_names, 1, device=device)
        for contender in contenders
    }
    return measure_side(prepared, device, side, smaller, turns=turns)


def measure_side(
    prepared: Mapping[str, Callable[[int], tuple[Call, Held]]],
    device: torch.device,
    side: int,
    smaller: list[Growth],
    *,
    turns: int,
) -> list[Growth]:
    """A row for each label: milliseconds and MiB of a call for images of side x side pixels, or why there are none.

    Args:
        prepared: makes the call for a side, and says what there is in memory before it; ValueError where there is none.
        smaller: the rows of smaller sides. What they needed says whether this one would still fit.
    """
    calls: dict[str, Call] = {}
    rows: list[Growth] = []
    for label, prepare in prepared.items():
        row: Growth = {"label": label, "image_size": side}
        rows.append(row)
        needed = extrapolate_memory([each for each in smaller if each["label"] == label], side)
        if needed > (free := find_free_memory(device)):
            row["skipped"] = f"about {needed:,.0f} MiB would be needed, {free:,.0f} are free"
            continue
        try:
            call, held = prepare(side)
        except ValueError as error:  # the model does not take this size
            row["skipped"] = str(error)
            continue
        row["mib"] = measure_peak_memory(call, held)
        calls[label] = call
    samples = take_turns(calls, turns, warm_up=1)
    for row in rows:
        if row["label"] in samples:
            sample = samples[row["label"]]
            row |= {"ms": sample.median, "fastest_ms": sample.fastest, "slowest_ms": sample.slowest}
    return rows


def extrapolate_memory(rows: list[Growth], side: int) -> float:
    """MiB that a side will need, if memory goes on growing as between the last two; 0 where less is known.

    From 10 MiB at 100 px and 40 at 200, which is growth by the square, 160 at 400 px.
    """
    known = [(row["image_size"], row["mib"]) for row in rows if "mib" in row]
    if len(known) < 2:
        return 0.0
    (small, less), (large, more) = known[-2:]
    return more * (side / large) ** (math.log(more / less) / math.log(large / small))


def find_free_memory(device: torch.device) -> float:
    """MiB that a new process could have."""
    free = torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else psutil.virtual_memory().available
    return free / MIB


def prepare_inference(
    recipe: ClassificationRecipe, label_names: list[str], batch_size: int, side: int, device: torch.device
) -> tuple[Call, Held]:
    """A call of one forward, and what there is in memory before it."""
    model, images, _ = make_model_and_batch(recipe, label_names, batch_size, side, device)
    model.eval()

    def call() -> Tensor:
        with torch.no_grad(), make_autocast(recipe, device):
            return model(images)

    return call, (model, images)


def prepare_training(
    recipe: ClassificationRecipe, label_names: list[str], batch_size: int, side: int, device: torch.device
) -> tuple[Call, Held]:
    """A call of one forward, backward and AdamW step, and what there is in memory before it."""
    model, images, labels = make_model_and_batch(recipe, label_names, batch_size, side, device)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def call() -> None:
        with make_autocast(recipe, device):
            loss = cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    call()  # the optimizer's state exists from the first step on
    return call, (model, optimizer, images)


def make_model_and_batch(
    recipe: ClassificationRecipe, label_names: list[str], batch_size: int, side: int, device: torch.device
) -> tuple[nn.Module, Tensor, Tensor]:
    """The model on the device, with noise for images, and labels; ValueError where it takes no images of that side."""
    model = build_model(replace(recipe, image_size=side), len(label_names)).to(device)
    count_image_cost(model, side, side)
    images = torch.randn(batch_size, count_channels(model), side, side, device=device)
    return model, images, torch.arange(batch_size, device=device) % len(label_names)


def make_autocast(recipe: ClassificationRecipe, device: torch.device) -> AbstractContextManager[object]:
    """A context of the recipe's mixed precision."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    return nullcontext() if recipe.precision == "no" else torch.autocast(device.type, dtypes[recipe.precision])


def measure_peak_memory(call: Call, held: Held) -> float:
    """MiB of all tensors at the peak of one call.

    Counted, not asked of the system: so it is the same on every machine, and leaves out what kernels need inside.

    Args:
        held: modules, optimizers and tensors that there are before.
    """
    tracker = MemTracker()
    tracker.track_external(*held)
    with tracker:
        call()
    return sum(kinds["Total"] for kinds in tracker.get_tracker_snapshot("peak").values()) / MIB
