"""Measures S3A beside its peers, in turns and in one process: python tools/benchmark.py operator --output FILE."""

import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

# Read when torch loads. Threads that spin while they wait starve each other where anything else runs (LOG.md).
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below shows no traceback

import timm
import torch
import tyro
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import StrMethodFormatter
from PIL import Image
from timm.data import create_dataset, create_loader, resolve_data_config
from torch import Tensor
from torch.nn.functional import interpolate, scaled_dot_product_attention

import s3a
from s3a.attention.backends import Operands
from s3a.attention.plan import attend_plan, lay_out_scan, plan_scan
from s3a.comparison.growth import (
    GROWING,
    draw_growth,
    find_crossings,
    make_crossing_tables,
    make_growth_tables,
    measure_model_growth,
)
from s3a.comparison.report import format_markdown
from s3a.data import Batch, TrainLoader, load_data
from s3a.data.pixels import PixelNormalizer
from s3a.geometry import FIXED, Neighborhood, Scan, sparse_scan
from s3a.models.backbone import Backbone
from s3a.published import PUBLISHED
from s3a.support.command_line import run_command
from s3a.support.errors import make_unknown_error
from s3a.support.figures import describe_machine_briefly, label_sides
from s3a.support.palette import BLUE, FAMILY_STYLES, INK, PEER, SOFT_INK, VERMILLION
from s3a.support.timing import Row, make_row, read_results, take_turns, write_result
from s3a.training.named_recipes import get_recipe
from s3a.training.tasks.classification import Classification, replace_posterize
from s3a.training.transfers import send_batches

Dtype = Literal["float32", "bfloat16", "float16"]
Call = Callable[[], object]
CAPTION = {"size": 8.5, "color": SOFT_INK, "va": "bottom"}


@dataclass(frozen=True, kw_only=True)
class Common:
    """What every benchmark takes."""

    output: Path
    """The JSON to write."""
    plot: Path | None = None
    """A picture to draw of it."""
    device: str = field(default_factory=lambda: "cuda" if torch.cuda.is_available() else "cpu")
    """Where to measure."""
    turns: int = 9
    """Timed calls of each candidate."""


@dataclass(frozen=True, kw_only=True)
class Operator(Common):
    """Both passes of both scans against unmasked dense attention over the same tokens."""

    sides: tuple[int, ...] = (56,)
    """Maps to measure, in tokens per side."""
    batch_size: int = 4
    """Images."""
    num_heads: int = 2
    """Attention heads."""
    head_dim: int = 32
    """Channels of a head."""
    dtype: Dtype = "float32"
    """Of the tensors."""
    backend: str = "auto"
    """Which backend executes the passes, by its name; auto is the automatic choice."""
    backward: bool = False
    """Time forward and backward."""
    compiled: bool = False
    """Compile every candidate."""
    most_dense_tokens: int = 16_384
    """No dense attention over more tokens than this: it would take minutes."""


@dataclass(frozen=True, kw_only=True)
class Model(Common):
    """Throughput of whole models, ours and timm's."""

    models: tuple[str, ...] = ("ssvit_tiny", "ssvit_small", "swin_tiny_patch4_window7_224", "convnext_tiny")
    """Names in timm's registry; the ratios are against the last Swin among them, or else the last model."""
    batch_size: int = 4
    """Images."""
    image_size: int = 224
    """Pixels per side."""
    dtype: Dtype = "float32"
    """Of weights and images, or of autocast."""
    autocast: bool = False
    """Keep float32 weights and run under autocast of the dtype."""
    eager: bool = False
    """Do not compile."""
    training: bool = False
    """Time forward, backward and an AdamW step."""


@dataclass(frozen=True, kw_only=True)
class Compile(Common):
    """Seconds that the first forward of a compiled model takes, in a fresh process with an empty cache."""

    models: tuple[str, ...] = ("ssvit_tiny", "ssvit_large")
    """Names in timm's registry."""
    batch_size: int = 4
    """Images."""
    image_size: int = 224
    """Pixels per side."""


@dataclass(frozen=True, kw_only=True)
class Plan(Common):
    """Seconds that the plans of a map take to build."""

    sides: tuple[int, ...] = (14, 28, 56, 112, 256)
    """Maps to plan, in tokens per side."""


@dataclass(frozen=True, kw_only=True)
class Loader(Common):
    """Images per second that a worker decodes and augments as ssvit_tiny_imagenet has it, in our loader and timm's."""

    num_images: int = 512
    """JPEGs of 500 x 375 pixels to generate; an epoch has as many of them as make whole batches."""
    batch_size: int = 64
    """Images."""
    num_workers: tuple[int, ...] = (0, 2)
    """Workers of a loader; 0 decodes in its own process."""


@dataclass(frozen=True, kw_only=True)
class Growth(Common):
    """Time and memory of one image, and the (query, key) pairs per token, from small images to large ones.

    In float32 and not compiled: code would be compiled anew for every model and side, which takes longer than all
    turns.
    """

    models: tuple[str, ...] = GROWING
    """Names in timm's registry; the ratios are against the Swin of the same size among them."""
    sizes: tuple[int, ...] = (7,)
    """Of S3A, in tokens: each SSViT is measured with every one."""
    image_sizes: tuple[int, ...] = (224, 384, 512, 768, 1024)
    """Sides of the image, in pixels."""


@dataclass(frozen=True, kw_only=True)
class Crossing:
    """From which side of the image on each SSViT costs more than its peers of the same size: by counts, nothing is run.

    Counted at every multiple of the step up to the largest side. JSON has null where the peer costs more there.
    """

    output: Path
    """The JSON to write."""
    models: tuple[str, ...] = GROWING
    """Names in timm's registry."""
    sizes: tuple[int, ...] = (7,)
    """Of S3A, in tokens: each SSViT is counted with every one."""
    largest: int = 4096
    """Largest side, in pixels."""
    step: int = 64
    """Pixels from a side to the next."""
    timed: Path | None = None
    """A result of the benchmark of growth, whose times are compared as well, side by side."""


@dataclass(frozen=True, kw_only=True)
class Compare:
    """Lays result files of one machine beside each other; refuses those of different machines."""

    results: Annotated[tyro.conf.Positional[tuple[Path, ...]], tyro.conf.arg(metavar="FILE ...")]
    """JSON that the other benchmarks wrote."""


@dataclass(frozen=True, kw_only=True)
class Plot:
    """Draws the picture of a result file again; nothing is measured."""

    result: Annotated[tyro.conf.Positional[Path], tyro.conf.arg(metavar="FILE")]
    """JSON that the benchmark of the operator, of models or of growth wrote."""
    output: Path
    """The PNG to write."""


def main(benchmark: Operator | Model | Compile | Plan | Loader | Growth | Crossing | Compare | Plot) -> None:
    """Measures, prints and writes."""
    if isinstance(benchmark, Compare):
        if not benchmark.results:
            raise ValueError("no FILE given: name the results to lay beside each other")
        for result in read_results(list(benchmark.results)):
            print(f"\n{result['command']}")
            show_rows(result.get("benchmark", ""), result["rows"])
        return
    if isinstance(benchmark, Plot):
        draw_again(benchmark)
        return
    check_options(benchmark)
    measure, draw = BENCHMARKS[type(benchmark)]
    plot, device = (benchmark.plot, benchmark.device) if isinstance(benchmark, Common) else (None, "cpu")
    if plot is not None and draw is None:
        raise ValueError(f"--plot is {plot} but this benchmark has no picture: leave it out")
    rows = measure(benchmark)
    name = type(benchmark).__name__.lower()
    write_result(benchmark.output, name, torch.device(device), asdict(benchmark), rows)
    show_rows(name, rows)
    print(f"wrote {benchmark.output}")
    if draw is not None and plot is not None:
        save_picture(draw(*read_results([benchmark.output])), plot)


def draw_again(options: Plot) -> None:
    """Draws a result; ValueError for one that has no picture."""
    (result,) = read_results([options.result])
    drawn = {kind.__name__.lower(): draw for kind, (_, draw) in BENCHMARKS.items() if draw is not None}
    draw = drawn.get(result.get("benchmark", ""))
    if draw is None:
        raise ValueError(f"{options.result} has no picture: give a result of one of {', '.join(drawn)}")
    save_picture(draw(result), options.output)


def save_picture(figure: Figure, path: Path) -> None:
    """Writes a picture, and says so."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")


def check_options(options: Common | Crossing) -> None:
    """Raises ValueError for an empty or negative option, or a device that is not there."""
    for name, value in vars(options).items():
        given = value if isinstance(value, tuple) else (value,)
        least = 0 if name == "num_workers" else 1
        if not given or any(type(number) is int and number < least for number in given):
            shown = " ".join(map(str, given)) or "empty"
            rule = ("positive" if least else "0 or more") if given else "one name or number at least"
            raise ValueError(f"--{name.replace('_', '-')} is {shown}: it must be {rule}")
    if isinstance(options, Common):
        check_device(options.device)


def check_device(device: str) -> None:
    """Raises ValueError for a device that is not there."""
    kind, _, index = device.partition(":")
    if kind not in ("cpu", "cuda") or not (index or "0").isdecimal():
        raise ValueError(f"--device is {device}: it must be cpu, cuda or cuda:N")
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device is {device} but there is no GPU: run the same command where one is")
    if kind == "cuda" and int(index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device is {device} but there are {torch.cuda.device_count()} GPUs, from cuda:0 on")


def show_rows(benchmark: str, rows: list[Row]) -> None:
    """Prints the rows of a result as a table, and in markdown what a page shows of them."""
    print_table(rows)
    for table in TABLES[benchmark](rows) if benchmark in TABLES else ():
        print(f"\n{format_markdown(table)}")


def print_table(rows: list[Row]) -> None:
    """Prints the rows of a result as a table."""
    shown = [
        {key: f"{value:,.2f}" if isinstance(value, float) else str(value) for key, value in row.items()} for row in rows
    ]
    widths = {key: max(len(key), *(len(row.get(key, "")) for row in shown)) for row in shown for key in row}
    print("  ".join(f"{key:>{width}}" for key, width in widths.items()))
    for each in shown:
        print("  ".join(f"{each.get(key, ''):>{width}}" for key, width in widths.items()))


# --------------------------------------------------------------------------------------------------------
# The operator
# --------------------------------------------------------------------------------------------------------


def measure_operator(options: Operator) -> list[Row]:
    """A row per map and pass: milliseconds, and how many times faster than dense attention."""
    rows = []
    for side in options.sides:
        samples = take_turns(make_operator_calls(options, side), options.turns)
        dense = samples.get("dense")
        for name, sample in samples.items():
            ratio = {"times_dense": dense.median / sample.median} if dense else {}
            rows.append(make_row(sample, side=side, tokens=side**2, candidate=name, **ratio))
    return rows


def make_operator_calls(options: Operator, side: int) -> dict[str, Call]:
    """Dense attention and the passes of both scans, on the same queries, keys and values; on CUDA NATTEN's too."""
    torch._dynamo.reset()  # a size's candidates are compiled code of a few functions: fewer than dynamo's limit
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    shape = (options.batch_size, side * side, options.num_heads, options.head_dim)
    tensors = [torch.randn(shape, device=device, dtype=dtype, requires_grad=options.backward) for _ in range(3)]

    def dense() -> Tensor:
        query, key, value = (tensor.transpose(1, 2) for tensor in tensors)
        return scaled_dot_product_attention(query, key, value)

    calls = {} if side * side > options.most_dense_tokens else {"dense": add_backward(dense, tensors, options)}
    neighborhoods = [neighborhood for fixed in FIXED for neighborhood in sparse_scan(side, side, 7, fixed)]
    for neighborhood in dict.fromkeys(neighborhoods):
        name = name_pass(neighborhood)
        calls[name] = add_backward(make_scan_call(options, (neighborhood,), side, tensors), tensors, options)
        if device.type == "cuda" and find_spec("natten"):
            call = make_natten_call(neighborhood, side, tensors, options.backward)
            calls[f"natten {name}"] = add_backward(call, tensors, options)
    return calls


def make_scan_call(options: Operator, scan: Scan, side: int, tensors: list[Tensor]) -> Callable[[], Tensor]:
    """A call that attends the tensors by a scan, with the chosen backend."""
    query = tensors[0]
    operands = Operands(query.device, query.dtype, options.head_dim, options.backward)
    plan = plan_scan(scan, side, side, operands, None if options.backend == "auto" else options.backend)
    return lambda: attend_plan(*tensors, plan)


def make_natten_call(
    neighborhood: Neighborhood, side: int, tensors: list[Tensor], backward: bool
) -> Callable[[], Tensor]:
    """NATTEN's own path through FlexAttention, compiled (`pip install natten`), on the same tensors."""
    import natten  # noqa: PLC0415  only where it is installed and there is a GPU

    natten.allow_flex_compile()
    if backward:
        natten.allow_flex_compile_backprop()
    maps = [tensor.unflatten(1, (side, side)) for tensor in tensors]
    kernel_size, dilation = neighborhood.kernel_size, neighborhood.dilation
    return lambda: natten.na2d(
        *maps, kernel_size=kernel_size, dilation=dilation, backend="flex-fna", torch_compile=True
    )


def add_backward(call: Callable[[], Tensor], tensors: list[Tensor], options: Operator) -> Call:
    """The call as the options have it: forward, or forward and backward; compiled or not."""
    if options.compiled:
        call = torch.compile(call, fullgraph=True)

    def forward() -> Tensor:
        with torch.no_grad():
            return call()

    def forward_backward() -> None:
        for tensor in tensors:
            tensor.grad = None
        call().sum().backward()

    return forward_backward if options.backward else forward


def name_pass(neighborhood: Neighborhood) -> str:
    """A pass in tables: (kernel, dilation)."""
    return f"({neighborhood.kernel_size[0]}, {neighborhood.dilation[0]})"


def draw_operator(result: dict[str, Any]) -> Figure:
    """Time against tokens: dense attention, and what S3A's two passes take together."""
    rows, settings = result["rows"], result["settings"]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    dense = [(each["tokens"], each["median_ms"]) for each in rows if each["candidate"] == "dense"]
    if dense:
        axes.plot(*zip(*dense, strict=True), "o-", color=PEER, label="dense attention")
    for fixed, color, marker in (("window", BLUE, "s"), ("anchors", VERMILLION, "^")):
        points = []
        for side in sorted({each["side"] for each in rows}):
            names = [name_pass(neighborhood) for neighborhood in sparse_scan(side, side, 7, fixed)]
            times = [each["median_ms"] for each in rows if each["side"] == side and each["candidate"] in names]
            points.append((side**2, sum(times)))
        axes.plot(*zip(*points, strict=True), f"{marker}-", color=color, label=f'S3A, both passes, fixed="{fixed}"')
    axes.set(xscale="log", yscale="log", xlabel="tokens of the map", ylabel="milliseconds")
    label_sides(axes, sorted({each["side"] for each in rows}), power=2)
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
    what = "forward and backward" if settings["backward"] else "forward"
    how = "compiled" if settings["compiled"] else "not compiled"
    heads = f"{settings['num_heads']} heads of {settings['head_dim']}"
    conditions = f"batch {settings['batch_size']}, {heads}, {settings['dtype']}, {what}, {how}"
    finish_axes(axes, "Time of one attention layer", conditions, result["machine"])
    axes.legend(frameon=False)
    return figure


def finish_axes(axes: Axes, title: str, conditions: str, machine: dict[str, Any]) -> None:
    """Adds a title, what was measured and where, and a grid."""
    axes.set_title(title, loc="left", weight="bold", color=INK, pad=22)
    where = f"{conditions}; {describe_machine_briefly(machine)}"
    axes.annotate(where, (0, 1), xytext=(0, 8), xycoords="axes fraction", textcoords="offset points", **CAPTION)
    axes.grid(alpha=0.25)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


# --------------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------------

# Top-1 on ImageNet-1k at 224 px as the papers have it, in percent.
PUBLISHED_TOP1 = {
    **{name: published.top1[224] for name, published in PUBLISHED.items()},
    "swin_tiny_patch4_window7_224": 81.3,
    "swin_small_patch4_window7_224": 83.0,
    "swin_base_patch4_window7_224": 83.5,
    "convnext_tiny": 82.1,
    "convnext_small": 83.1,
    "convnext_base": 83.8,
}


def measure_models(options: Model) -> list[Row]:
    """A row per model: milliseconds a batch, images per second, memory, and the ratio to the peer."""
    for name in options.models:
        if not timm.is_model(name):
            raise make_unknown_error("model", name, timm.list_models())
    calls, memory = {}, {}
    for name in options.models:
        calls[name] = make_model_call(options, name)
        if options.device.startswith("cuda"):
            memory[name] = measure_peak_memory(calls[name])
    samples = take_turns(calls, options.turns, warm_up=3)
    swins = [name for name in options.models if name.startswith("swin")]
    peer = samples[swins[-1] if swins else options.models[-1]].median
    return [
        make_row(
            sample,
            model=name,
            images_per_second=1e3 * options.batch_size / sample.median,
            times_peer=peer / sample.median,
            **({"peak_gib": memory[name]} if memory else {}),
        )
        for name, sample in samples.items()
    ]


def make_model_call(options: Model, name: str) -> Call:
    """A call of one inference, or one training step, of a model as the options have it."""
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    weights = torch.float32 if options.autocast else dtype
    model = timm.create_model(name).to(device, weights).train(options.training)
    images = torch.randn(options.batch_size, 3, options.image_size, options.image_size, device=device, dtype=weights)
    labels = torch.arange(options.batch_size, device=device)
    if not options.eager:
        model = s3a.compile_model(model) if isinstance(model, Backbone) else torch.compile(model)

    def make_autocast() -> AbstractContextManager[object]:
        return torch.autocast(device.type, dtype) if options.autocast else nullcontext()

    if not options.training:

        def infer() -> Tensor:
            with torch.inference_mode(), make_autocast():
                return model(images)

        return infer
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)

    def step() -> None:
        with make_autocast():
            loss = torch.nn.functional.cross_entropy(model(images).float(), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()

    return step


def measure_peak_memory(call: Call) -> float:
    """GiB on the GPU that one call needs at its peak, weights included."""
    call()
    torch.cuda.reset_peak_memory_stats()
    call()
    return torch.cuda.max_memory_allocated() / 2**30


def draw_models(result: dict[str, Any]) -> Figure:
    """Measured throughput against published top-1."""
    rows, settings = result["rows"], result["settings"]
    figure = Figure(figsize=(7, 4.2), layout="constrained")
    axes = figure.subplots()
    for family, (color, marker) in FAMILY_STYLES.items():
        points = [
            (each["images_per_second"], PUBLISHED_TOP1[each["model"]], each["model"])
            for each in rows
            if each["model"].startswith(family) and each["model"] in PUBLISHED_TOP1
        ]
        if points:
            speeds, accuracies, names = zip(*points, strict=True)
            axes.plot(speeds, accuracies, f"{marker}-", color=color)
            for name, speed, accuracy in zip(names, speeds, accuracies, strict=True):
                text = name.removesuffix("_patch4_window7_224")
                axes.annotate(text, (speed, accuracy), xytext=(6, 6), textcoords="offset points", color=INK)
    axes.set(xlabel="images per second, measured", ylabel="ImageNet top-1, published (%)")
    axes.margins(x=0.25, y=0.15)
    dtype = f"autocast to {settings['dtype']}" if settings["autocast"] else settings["dtype"]
    what = "training" if settings["training"] else "inference"
    how = "not compiled" if settings["eager"] else "compiled"
    conditions = f"batch {settings['batch_size']}, {settings['image_size']} px, {dtype}, {what}, {how}"
    finish_axes(axes, "Speed and accuracy", conditions, result["machine"])
    return figure


# --------------------------------------------------------------------------------------------------------
# Compilation and plans
# --------------------------------------------------------------------------------------------------------

COLD_START = """
import json, sys, time, timm, torch, s3a
name, batch_size, image_size, device = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
model = s3a.compile_model(timm.create_model(name).eval().to(device))
images = torch.randn(batch_size, 3, image_size, image_size, device=device)
started = time.perf_counter()
with torch.inference_mode():
    model(images).sum().item()
seconds = time.perf_counter() - started
graphs = torch._dynamo.utils.counters["stats"]["unique_graphs"]
print(json.dumps({"seconds": seconds, "graphs": graphs}))
"""


def measure_compilation(options: Compile) -> list[Row]:
    """A row per model: seconds of the first compiled forward, and how many graphs it compiled; models take turns."""
    starts: dict[str, list[ColdStart]] = {name: [] for name in options.models}
    for _, name in itertools.product(range(options.turns), options.models):
        starts[name].append(time_cold_start(options, name))
    rows: list[Row] = []
    for name, own in starts.items():
        seconds = sorted(start.seconds for start in own)
        spread = {"median_s": seconds[len(seconds) // 2], "fastest_s": seconds[0], "slowest_s": seconds[-1]}
        rows.append({"model": name, "graphs": own[0].graphs, **spread, "turns": len(own)})
    return [each | {"times_first": each["median_s"] / rows[0]["median_s"]} for each in rows]


@dataclass(frozen=True, kw_only=True)
class ColdStart:
    """A first forward: its seconds, and how many graphs it compiled."""

    seconds: float
    graphs: int


def time_cold_start(options: Compile, name: str) -> ColdStart:
    """Times one first forward in a fresh process whose compiler cache is empty."""
    arguments = [name, str(options.batch_size), str(options.image_size), options.device]
    with tempfile.TemporaryDirectory() as cache:
        process = subprocess.run(
            [sys.executable, "-c", COLD_START, *arguments],
            env=os.environ | {"TORCHINDUCTOR_CACHE_DIR": cache},
            check=True,
            capture_output=True,
            text=True,
        )
    return ColdStart(**json.loads(process.stdout.splitlines()[-1]))


def measure_plans(options: Plan) -> list[Row]:
    """A row per map and backend: milliseconds to build the plans of both scans."""
    rows = []
    for side, backend in itertools.product(options.sides, ("tiled", "flex")):
        call = partial(build_plans, side, backend, torch.device(options.device))
        sample = take_turns({backend: call}, options.turns, warm_up=1)[backend]
        rows.append(make_row(sample, side=side, tokens=side**2, backend=backend))
    return rows


def build_plans(side: int, backend: str, device: torch.device) -> None:
    """Builds the plans of both scans anew."""
    s3a.clear_caches()
    for fixed in FIXED:
        scan = sparse_scan(side, side, 7, fixed)
        lay_out_scan(scan, side, side, device, (backend,) * len(scan))


# --------------------------------------------------------------------------------------------------------
# Loaders
# --------------------------------------------------------------------------------------------------------

PHOTO_SIZE = (375, 500)  # the median of ImageNet's, rows and columns
GRAIN = ((4, 60), (12, 40), (40, 25), (120, 22), (375, 15))  # noise of so many values a side, and how strong it is


def measure_loaders(options: Loader) -> list[Row]:
    """A row per loader, number of workers and product: images per second, also of one worker, and timm's as a unit.

    Products are "pixels", uint8 batches as workers hand them over, and "input", those normalised and erased on the
    device. Each process has one thread, as workers always have.
    """
    if options.num_images < options.batch_size:
        raise ValueError(
            f"--num-images is {options.num_images}: it must be at least --batch-size ({options.batch_size})"
        )
    num_images = options.num_images // options.batch_size * options.batch_size
    rows, num_threads = [], torch.get_num_threads()
    with tempfile.TemporaryDirectory() as folder:
        write_photographs(Path(folder), options.num_images)
        torch.set_num_threads(1)
        try:
            for num_workers in options.num_workers:
                calls = make_loader_calls(options, Path(folder), num_workers)
                samples = take_turns({"/".join(key): call for key, call in calls.items()}, options.turns, warm_up=1)
                del calls  # ends the workers
                for name, sample in samples.items():
                    loader, product = name.split("/")
                    speed = 1e3 * num_images / sample.median
                    rows.append(
                        make_row(
                            sample,
                            workers=num_workers,
                            product=product,
                            loader=loader,
                            images_per_second=speed,
                            per_worker=speed / max(num_workers, 1),
                            times_timm=samples[f"timm/{product}"].median / sample.median,
                        )
                    )
        finally:
            torch.set_num_threads(num_threads)
    return rows


def write_photographs(folder: Path, num_images: int) -> None:
    """Writes an image folder of two classes: noise of several scales, as JPEGs of quality 90, 93 kB each."""
    generator = torch.Generator().manual_seed(0)
    for split, label, number in [("train", i % 2, i) for i in range(num_images)] + [("val", i, i) for i in range(2)]:
        path = folder / split / f"class {label}" / f"{number}.jpg"
        path.parent.mkdir(parents=True, exist_ok=True)
        pixels = torch.full((1, 3, *PHOTO_SIZE), 128.0)
        for side, strength in GRAIN:
            noise = strength * torch.randn(1, 3, side, side, generator=generator)
            pixels += interpolate(noise, PHOTO_SIZE, mode="bicubic")
        levels = pixels[0].clamp(0, 255).to(torch.uint8).permute(1, 2, 0)  # [height, width, channels]
        Image.fromarray(levels.numpy()).save(path, quality=90)


def make_loader_calls(options: Loader, folder: Path, num_workers: int) -> dict[tuple[str, str], Call]:
    """An epoch of each loader, as pixels and as the model's input.

    timm's `create_loader` has its prefetcher, so its workers hand bytes over too, and both loaders normalise and erase
    on the device. What is erased is drawn by our workers, and by timm on the device. The augmentation is the same, with
    our posterization in both, since timm's fails with the Pillow of today.
    """
    recipe, device = get_recipe("ssvit_tiny_imagenet"), torch.device(options.device)
    config = resolve_data_config(pretrained_cfg=timm.get_pretrained_cfg(recipe.model).to_dict())
    data = load_data("imagefolder", folder)
    task = Classification(data)
    common = {"batch_size": options.batch_size, "num_workers": num_workers, "pin_memory": device.type == "cuda"}
    ours = TrainLoader(
        data.train,
        task.make_train_transform(recipe, config),
        erasing=task.make_erasing(recipe),
        normalizer=PixelNormalizer(config["mean"], config["std"]),
        channels=3,
        seed=0,
        **common,
    )
    peer = create_loader(
        create_dataset("", root=str(folder / "train")),
        config["input_size"],
        is_training=True,
        scale=recipe.crop_scale,
        ratio=recipe.crop_ratio,
        hflip=recipe.horizontal_flip,
        color_jitter=recipe.color_jitter,
        auto_augment=recipe.auto_augment,
        interpolation=config["interpolation"],
        mean=config["mean"],
        std=config["std"],
        re_prob=recipe.random_erasing,
        re_mode="pixel",
        device=device,
        **common,
    )
    replace_posterize(peer.dataset.transform)
    epochs = itertools.count()

    def read_ours() -> Iterator[Batch]:
        return itertools.chain.from_iterable(ours.epoch(next(epochs)))

    return {
        ("s3a", "pixels"): lambda: exhaust(read_ours()),
        ("timm", "pixels"): lambda: exhaust(peer.loader),
        ("s3a", "input"): lambda: exhaust(map(ours.normalizer, send_batches(read_ours(), device))),
        ("timm", "input"): lambda: exhaust(peer),
    }


def exhaust(batches: Iterable[object]) -> None:
    """Makes all batches, and keeps none."""
    for _ in batches:
        pass


# --------------------------------------------------------------------------------------------------------
# Growth
# --------------------------------------------------------------------------------------------------------


def measure_image_growth(options: Growth) -> list[Row]:
    """A row per side and model; see `measure_model_growth`."""
    device = torch.device(options.device)
    return measure_model_growth(options.models, options.sizes, options.image_sizes, device=device, turns=options.turns)


def count_crossings(options: Crossing) -> list[Row]:
    """A row per SSViT and peer; see `find_crossings`."""
    return find_crossings(
        options.models, options.sizes, largest=options.largest, step=options.step, timed=options.timed
    )


BENCHMARKS: dict[type, tuple[Callable[..., list[Row]], Callable[[dict[str, Any]], Figure] | None]] = {
    Operator: (measure_operator, draw_operator),
    Model: (measure_models, draw_models),
    Compile: (measure_compilation, None),
    Plan: (measure_plans, None),
    Loader: (measure_loaders, None),
    Growth: (measure_image_growth, draw_growth),
    Crossing: (count_crossings, None),
}
# What a page shows of the rows, by the benchmark's name.
TABLES = {"growth": make_growth_tables, "crossing": make_crossing_tables}

if __name__ == "__main__":
    run_command(Operator | Model | Compile | Plan | Loader | Growth | Crossing | Compare | Plot, main)
