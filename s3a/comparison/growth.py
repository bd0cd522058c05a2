"""What grows how: time, memory and pairs per token of one image against its side, and where S3A becomes the dearer.

In float32 and not compiled: code would be compiled anew for every model and side.
"""

from collections.abc import Callable, Iterable, Sequence
from functools import cache, partial
from pathlib import Path
from typing import Any

import timm
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from torch import Tensor, nn

from s3a.analysis.cost import Cost, count_channels, count_cost
from s3a.comparison.candidates import Candidate, list_candidates
from s3a.comparison.report import Table
from s3a.comparison.results import Growth
from s3a.comparison.speed import Call, Held, measure_side
from s3a.models.backbone import MIN_IMAGE_SIZE
from s3a.nn.s3a import S3A
from s3a.support.figures import describe_machine_briefly, label_sides
from s3a.support.palette import FAMILY_STYLES, INK, ORANGE, PINK, SKY_BLUE, SOFT_INK
from s3a.support.timing import Row, read_results

# The models of each family that are of the tiny and the small size.
GROWING = (
    "ssvit_tiny",
    "vvt_tiny",
    "swin_tiny_patch4_window7_224",
    "ssvit_small",
    "svit_small",
    "vvt_small",
    "swin_small_patch4_window7_224",
)

COUNTS = ("first_stage_pairs_per_token", "pairs_per_token", "gmacs")  # of a Cost, those that are compared
SIZE_COLORS = (SKY_BLUE, PINK, ORANGE)  # of S3A's other sizes, in the order in which they are met


def list_sized(models: Iterable[str], sizes: Iterable[int]) -> dict[str, Candidate]:
    """The models by their labels, SSViTs with each of S3A's sizes; ValueError for names unknown or given twice."""
    found = []
    for plain in list_candidates(models, (), ()):
        sized = [Candidate(model=plain.model, size=size).drop_defaults() for size in sizes]
        found += sized if has_scans(plain) else [plain]
    return {each.label: each for each in found}


def has_scans(candidate: Candidate) -> bool:
    """Whether there is S3A in the model."""
    with torch.device("meta"):
        return any(isinstance(module, S3A) for module in timm.create_model(candidate.model).modules())


def build_for_side(candidate: Candidate, side: int) -> nn.Module:
    """The model for images of side x side pixels."""
    config = timm.get_pretrained_cfg(candidate.model)
    is_fixed = config is not None and config.fixed_input_size
    return timm.create_model(candidate.model, size=candidate.size, img_size=side if is_fixed else None)


@cache
def count_for_side(candidate: Candidate, side: int) -> Cost:
    """What an image costs; ValueError for a side that the model does not take."""
    with torch.device("meta"):
        model = build_for_side(candidate, side)
    return count_cost(model, side, side)


def prepare_image(candidate: Candidate, device: torch.device, side: int) -> tuple[Call, Held]:
    """A call of one image's inference, and what there is in memory before it; ValueError for a side not taken."""
    count_for_side(candidate, side)
    model = build_for_side(candidate, side).to(device).eval()
    images = torch.randn(1, count_channels(model), side, side, device=device)

    def infer() -> Tensor:
        with torch.no_grad():
            return model(images)

    return infer, (model, images)


def split_name(name: str) -> tuple[str, str]:
    """Family and size by a model's name: ssvit and tiny of ssvit_tiny."""
    family, _, rest = name.partition("_")
    return family, rest.partition("_")[0]


def measure_model_growth(
    models: Sequence[str], sizes: Sequence[int], sides: Sequence[int], *, device: torch.device, turns: int
) -> list[Row]:
    """A row per side and model: milliseconds and MiB of an image, the counts, and the ratio to the Swin of its size.

    Args:
        models: names in timm's registry.
        sizes: of S3A, in tokens: each SSViT is measured with every one.
        sides: of the image, in pixels.
    """
    candidates = list_sized(models, sizes)
    prepared = {label: partial(prepare_image, candidate, device) for label, candidate in candidates.items()}
    measured: list[Growth] = []
    for side in sorted(sides):
        measured += measure_side(prepared, device, side, measured, turns=turns)
    times = {(each["label"], each["image_size"]): each["ms"] for each in measured if "ms" in each}
    rows = []
    for each in measured:
        label, side = each["label"], each["image_size"]
        row: Row = {"model": label, "image_size": side}
        if "skipped" in each:
            rows.append(row | {"skipped": each["skipped"]})
            continue
        spread = {"median_ms": each["ms"], "fastest_ms": each["fastest_ms"], "slowest_ms": each["slowest_ms"]}
        size = split_name(candidates[label].model)[1]
        swin = next((name for name in models if name.startswith("swin") and split_name(name)[1] == size), None)
        ratio = {} if swin is None or (swin, side) not in times else {"times_peer": times[swin, side] / each["ms"]}
        cost = count_for_side(candidates[label], side)
        counts = {name: getattr(cost, name) for name in COUNTS}
        rows.append(row | spread | {"turns": turns} | ratio | {"mib": each["mib"]} | counts)
    return rows


def find_crossings(
    models: Sequence[str], sizes: Sequence[int], *, largest: int, step: int, timed: Path | None = None
) -> list[Row]:
    """A row per SSViT and peer: for each figure the side from which on the SSViT's is larger, None if it is not.

    Args:
        models, sizes: see `measure_model_growth`.
        largest, step: the figures are counted at every multiple of the step up to the largest side, in pixels.
        timed: a result of growth, whose times are compared as well.

    Raises:
        ValueError: where no SSViT has a peer of its size, no side is large enough, or the file is another result.
    """
    candidates = list_sized(models, sizes)
    times = {} if timed is None else read_times(timed)
    pairs = []
    for label, candidate in candidates.items():
        family, size = split_name(candidate.model)
        peers = [name for name in models if split_name(name)[1] == size and split_name(name)[0] != family]
        pairs += [(label, peer) for peer in peers] if has_scans(candidate) else []
    sides = [side for side in range(step, largest + 1, step) if side >= MIN_IMAGE_SIZE]
    if not pairs or not sides:
        wrong = f"--largest is {largest} and --step {step}" if pairs else "--models has no such pair"
        raise ValueError(
            f"{wrong}: give an SSViT and a peer of its size, and sides of {MIN_IMAGE_SIZE} pixels at least"
        )
    counted = {label: {side: count_for_side(candidates[label], side) for side in sides} for label in {*sum(pairs, ())}}
    rows = []
    for label, peer in pairs:
        row: Row = {"model": label, "peer": peer}
        for name in COUNTS:
            own, its = ({side: getattr(cost, name) for side, cost in counted[each].items()} for each in (label, peer))
            row[name] = find_crossing(own, its)
        if label in times and peer in times:
            row["median_ms"] = find_crossing(times[label], times[peer])
        rows.append(row)
    return rows


def find_crossing(own: dict[int, float], peer: dict[int, float]) -> int | None:
    """The smallest side from which on a figure is larger than the peer's, None if it is not at the largest side."""
    crossing = None
    for side in sorted(own.keys() & peer.keys(), reverse=True):
        if own[side] <= peer[side]:
            break
        crossing = side
    return crossing


def read_times(path: Path) -> dict[str, dict[int, float]]:
    """The milliseconds of a result of growth, by model and side; ValueError for a result of another benchmark."""
    (result,) = read_results([path])
    if result.get("benchmark") != "growth":
        raise ValueError(f"--timed is {path}, which is no result of growth: give one that `growth` wrote")
    times: dict[str, dict[int, float]] = {}
    for row in result["rows"]:
        if "median_ms" in row:
            times.setdefault(row["model"], {})[row["image_size"]] = row["median_ms"]
    return times


def make_growth_tables(rows: list[Row]) -> list[Table]:
    """For the page: time beside Swin's, memory, and pairs per token; a line for each model, a column for each side."""
    cells: dict[str, Callable[[Row], str]] = {
        "ms (times faster than Swin)": lambda row: (
            f"{row['median_ms']:,.0f}" + (f" ({row['times_peer']:.2f})" if "times_peer" in row else "")
        ),
        "MiB at the peak": lambda row: f"{row['mib']:,.0f}",
        "pairs per token: first stage / all": lambda row: (
            f"{row['first_stage_pairs_per_token']:,.0f} / {row['pairs_per_token']:,.0f}"
        ),
    }
    sides = sorted({row["image_size"] for row in rows})
    by_model: dict[str, dict[int, Row]] = {}
    for row in rows:
        by_model.setdefault(row["model"], {})[row["image_size"]] = row
    return [
        [
            [title, *(f"{side} px" for side in sides)],
            *(
                [model, *("skipped" if "skipped" in own[side] else cell(own[side]) for side in sides)]
                for model, own in by_model.items()
            ),
        ]
        for title, cell in cells.items()
    ]


def make_crossing_tables(rows: list[Row]) -> list[Table]:
    """For the page: from which side on; "never" up to the largest, "-" where nothing was timed."""
    titles = ("pairs per token, first stage", "pairs per token", "GMACs", "time")
    table = [["model", "dearer than", *titles]]
    for row in rows:
        found = (row.get(name, "-") for name in (*COUNTS, "median_ms"))
        shown = ("never" if side is None else f"{side}" + " px" * (side != "-") for side in found)
        table.append([row["model"], f"`{row['peer']}`", *shown])
    return [table]


def draw_growth(result: dict[str, Any]) -> Figure:
    """Time, memory and pairs per token against the side of the image."""
    rows = [row for row in result["rows"] if "skipped" not in row]
    figure = Figure(figsize=(9.5, 8), layout="constrained")
    panels = {
        "median_ms": "milliseconds of one image",
        "mib": "MiB of tensors at the peak",
        "first_stage_pairs_per_token": "(query, key) pairs per token, first stage",
        "pairs_per_token": "(query, key) pairs per token, whole network",
    }
    for axes, (name, title) in zip(figure.subplots(2, 2).flat, panels.items(), strict=True):
        draw_growth_panel(axes, rows, name)
        axes.set_title(title, loc="left", fontsize=10.5, color=INK)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=3, frameon=False)
    where = describe_machine_briefly(result["machine"])
    figure.suptitle(f"What grows how: one image, float32, not compiled; {where}", fontsize=9.5, color=SOFT_INK)
    return figure


def draw_growth_panel(axes: Axes, rows: list[Row], name: str) -> None:
    """A figure of all models: a colour for each family and size of S3A; tiny models dashed."""
    sizes: list[str] = []
    for label in dict.fromkeys(row["model"] for row in rows):
        model, _, size = label.partition(" size ")
        if size and size not in sizes:
            sizes.append(size)
        family, grade = split_name(model)
        color, marker = FAMILY_STYLES.get(family, (INK, "o"))
        color = SIZE_COLORS[sizes.index(size) % len(SIZE_COLORS)] if size else color
        own = [row for row in rows if row["model"] == label and row[name] > 0]
        is_tiny = grade == "tiny"
        axes.plot(
            [row["image_size"] for row in own],
            [row[name] for row in own],
            linestyle="--" if is_tiny else "-",
            color=color,
            marker=marker,
            markersize=7 if is_tiny else 4,  # so that equal curves show below each other
            markerfacecolor="none" if is_tiny else color,
            label=label.replace("_patch4_window7_224", ""),
        )
    axes.set(xscale="log", yscale="log", xlabel="side of the image (px)")
    label_sides(axes, sorted({row["image_size"] for row in rows}))
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
