"""Side-by-side timing: candidates take turns in one process, so that a drifting machine hits all of them alike."""

import json
import os
import platform
import shlex
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

PACKAGES = ("torch", "torchvision", "timm")

Row = dict[str, Any]
"""A line of a benchmark's result: labels and figures by name, which differ from benchmark to benchmark."""


@dataclass(frozen=True, kw_only=True)
class Sample:
    """The times of one candidate, in milliseconds.

    Attributes:
        median, fastest, slowest: of the turns.
        turns: how many.
    """

    median: float
    fastest: float
    slowest: float
    turns: int


def take_turns(candidates: Mapping[str, Callable[[], object]], turns: int, warm_up: int = 2) -> dict[str, Sample]:
    """Times every candidate `turns` times in the order A B A B ..., after `warm_up` untimed rounds.

    A candidate's turn is one call; on CUDA until its kernels are done.
    """
    for _ in range(warm_up):
        for call in candidates.values():
            call()
    times: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(turns):
        for name, call in candidates.items():
            times[name].append(time_call(call))
    return {
        name: Sample(median=statistics.median(each), fastest=min(each), slowest=max(each), turns=turns)
        for name, each in times.items()
    }


def time_call(call: Callable[[], object]) -> float:
    """Milliseconds that one call takes."""
    settle: Callable[[], object] = torch.cuda.synchronize if torch.cuda.is_available() else int
    settle()
    started = time.perf_counter()
    call()
    settle()
    return 1e3 * (time.perf_counter() - started)


def describe_machine(device: torch.device) -> dict[str, object]:
    """What the figures depend on: processor, cores, threads, accelerator, versions."""
    return {
        "processor": find_processor_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "python": platform.python_version(),
        "packages": {name: version(name) for name in PACKAGES},
    }


def find_processor_name() -> str:
    """The processor's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def make_row(sample: Sample, **labels: object) -> Row:
    """A line of a benchmark's result: the labels, and the times with their unit in the name."""
    return {**labels, **{f"{key}_ms" if key != "turns" else key: value for key, value in asdict(sample).items()}}


def write_result(
    path: Path, benchmark: str, device: torch.device, settings: Mapping[str, object], rows: Sequence[Row]
) -> None:
    """Writes a benchmark's JSON: the command, the machine, the settings and the rows."""
    result = {
        "benchmark": benchmark,
        "command": shlex.join(["python", *sys.argv]),
        "machine": describe_machine(device),
        "settings": settings,
        "rows": rows,
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=2, default=str) + "\n", encoding="utf-8")


def read_results(paths: Sequence[Path]) -> list[dict[str, Any]]:
    """Reads benchmark files that can be compared.

    Raises:
        FileNotFoundError: for a file that is missing.
        ValueError: for a file that is not a benchmark's, and where the machines or the versions differ.
    """
    results = [read_result(path) for path in paths]
    for path, result in zip(paths[1:], results[1:], strict=True):
        differing = [key for key, value in results[0]["machine"].items() if result["machine"].get(key) != value]
        if differing:
            raise ValueError(
                f"{paths[0]} and {path} differ in {', '.join(differing)}: only figures of one machine can be compared; "
                "measure both on the same"
            )
    return results


def read_result(path: Path) -> dict[str, Any]:
    """Reads one benchmark file."""
    if not path.is_file():
        raise FileNotFoundError(f"{path} does not exist: give files that tools/benchmark.py wrote")
    try:
        result = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{path} is no JSON ({error}): give files that tools/benchmark.py wrote") from error
    if not isinstance(result, dict) or not {"command", "machine", "rows"} <= result.keys():
        raise ValueError(f"{path} is no result of a benchmark: give files that tools/benchmark.py wrote")
    return result
