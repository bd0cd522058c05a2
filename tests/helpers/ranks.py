"""A process that takes part in a training run, and notes what it does there."""

import dataclasses
import errno
import hashlib
import json
import os
import signal
import socket
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from accelerate import Accelerator

from helpers.fork_server import CONTEXT
from s3a.support.errors import Interrupted
from s3a.training import build, trainer
from s3a.training.recipe import ClassificationRecipe

STOP_AFTER = 3  # optimizer steps, which are an epoch


def take_part(rank: int, port: int, recipe: ClassificationRecipe) -> None:
    """Trains as the process of that rank, and writes what it saw."""
    take_place(rank, port)
    folder, seen = recipe.output_dir.parent, watch(rank, recipe.output_dir.parent)
    try:
        trainer.train(recipe)
    except Interrupted as notice:
        seen["notice"] = str(notice)
    seen["checkpoints"] = sorted(path.name for path in (recipe.output_dir / "checkpoints").iterdir())
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


def take_place(rank: int, port: int) -> None:
    """Makes this process one of two, as their launcher does."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)


def write_nothing(*arguments: object, **options: object) -> None:
    """Fails as a disk does that is full."""
    raise OSError(errno.ENOSPC, "No space left on device")


def resume_apart(
    rank: int, port: int, recipes: list[ClassificationRecipe], report: Path, fails_to_write: bool = False
) -> None:
    """Begins or resumes the run of a recipe for each process, and writes where it stands, or why it ended.

    Args:
        fails_to_write: whether a checkpoint is written then, which fails on the main process.
    """
    take_place(rank, port)
    if rank == 0 and fails_to_write:
        trainer.write_checkpoint = write_nothing
    try:
        run = trainer.build_run(recipes[rank])
        progress = trainer.resume(run)
        if fails_to_write:
            trainer.save(run, progress)
        seen = {"epoch": progress.epoch, "step": progress.step, "weights": hash_tensors(run.bare_model.parameters())}
    except (ValueError, OSError) as error:
        seen = {"error": str(error)}
    except SystemExit as stop:
        seen = {"status": stop.code}
    report.with_suffix(f".{rank}").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


def start_pair(target: Callable[..., None], *arguments: object) -> list[int | None]:
    """Runs `target(rank, port, *arguments)` in two processes that know each other; returns their exit statuses."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [CONTEXT.Process(target=target, args=(rank, port, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
        process.kill()
    return [process.exitcode for process in processes]


def watch(rank: int, folder: Path) -> dict:
    """Has this process note what it does in a run; it is forked, so nothing is put back."""
    names = ("synchronised", "draws", "own_losses", "losses", "weights", "own_statistics", "shared_statistics")
    seen = {name: [] for name in names}
    build_run, train_step, validate = trainer.build_run, trainer.train_step, trainer.validate
    judge_step = trainer.judge_step
    claim_folder, init_trackers = build.claim_folder, Accelerator.init_trackers

    def watched_build(*arguments):
        run = build_run(*arguments)
        seen["wrapping"] = {name: getattr(run.model, name) for name in ("gradient_as_bucket_view", "broadcast_buffers")}
        return dataclasses.replace(run, compute_loss=watch_loss(run.compute_loss, seen))

    def watched_step(run, progress, batches):
        if rank == 1 and trainer.count_steps(run, progress) == STOP_AFTER:
            os.kill(os.getpid(), signal.SIGUSR1)
        seen["cuts_graphs"] = torch._dynamo.config.optimize_ddp
        train_step(run, progress, batches)
        seen["weights"].append(hash_tensors(run.bare_model.parameters()))
        seen["own_statistics"].append(hash_tensors(run.bare_model.buffers()))

    def watched_judgement(run, loss_share, norm):
        outcome = judge_step(run, loss_share, norm)
        seen["own_losses"].append(loss_share.item())
        seen["losses"].append(outcome[0].item())
        return outcome

    def watched_validation(run, progress, model):
        seen["shared_statistics"].append(hash_tensors(model.buffers()))
        return validate(run, progress, model)

    def slow_claim(recipe):
        """Waits for the other process to come by, which it must not."""
        deadline = time.monotonic() + 0.5
        while time.monotonic() < deadline and not (folder / "passed-1").exists():
            time.sleep(0.01)
        seen["overtaken"] = (folder / "passed-1").exists()
        return claim_folder(recipe)

    def watched_trackers(*arguments, **options):
        (folder / f"passed-{rank}").touch()
        init_trackers(*arguments, **options)

    trainer.build_run, trainer.train_step, trainer.validate = watched_build, watched_step, watched_validation
    trainer.judge_step = watched_judgement
    build.claim_folder, Accelerator.init_trackers = slow_claim, watched_trackers
    return seen


def watch_loss(compute_loss, seen):
    """The loss, which notes whether its gradient will be synchronised, and draws a number."""

    def watched_loss(model, batch):
        seen["synchronised"].append(model.require_backward_grad_sync)
        seen["draws"].append(torch.rand(()).item())
        return compute_loss(model, batch)

    return watched_loss


def hash_tensors(tensors: Iterable[torch.Tensor]) -> str:
    """A hash of the numbers in some tensors."""
    return hashlib.sha256(b"".join(tensor.detach().numpy().tobytes() for tensor in tensors)).hexdigest()
