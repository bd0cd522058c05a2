"""The processes of a run and the cores they share."""

import os
from typing import NoReturn

import torch
from accelerate import Accelerator


def use_cores(accelerator: Accelerator, threads: int | None) -> None:
    """Shares the cores among the processes of this machine: `accelerate launch` leaves each with a single thread."""
    if accelerator.device.type == "cpu":
        torch.set_num_threads(threads or core_share())


def core_share() -> int:
    """The cores that this process may take for itself."""
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, cores // processes)


def agreed(accelerator: Accelerator, wish: bool) -> bool:
    """Whether any process wishes it; all of them call this together."""
    if accelerator.num_processes == 1:
        return wish
    return bool(accelerator.reduce(torch.tensor(float(wish), device=accelerator.device), reduction="sum") > 0)


def fail_together(accelerator: Accelerator, error: Exception) -> NoReturn:
    """Raises an error that every process found: the main one says it, the others end quietly."""
    if accelerator.is_main_process:
        raise error
    raise SystemExit(2)
