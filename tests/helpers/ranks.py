"""A process that takes part in a training run, and notes what it does there."""

import dataclasses
import hashlib
import json
import os
import signal
import time
from collections.abc import Iterable
from pathlib import Path

import torch
from accelerate import Accelerator

from s3a.support.errors import Interrupted
from s3a.training import build, trainer
from s3a.training.recipe import Recipe

STOP_AFTER = 3  # optimizer steps, which are an epoch


def take_part(rank: int, port: int, recipe: Recipe) -> None:
    """Trains as the process of that rank, and writes what it saw."""
    place = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in place.items()}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    folder, seen = recipe.output_dir.parent, watch(rank, recipe.output_dir.parent)
    try:
        trainer.train(recipe)
    except Interrupted as notice:
        seen["notice"] = str(notice)
    seen["checkpoints"] = sorted(path.name for path in (recipe.output_dir / "checkpoints").iterdir())
    (folder / f"rank-{rank}.json").write_text(json.dumps(seen))
    torch.distributed.destroy_process_group()


def watch(rank: int, folder: Path) -> dict:
    """Has this process note what it does in a run; it is forked, so nothing is put back."""
    names = ("synchronised", "draws", "own_losses", "losses", "weights", "own_statistics", "shared_statistics")
    seen = {name: [] for name in names}
    build_run, train_step, validate = trainer.build_run, trainer.train_step, trainer.validate
    exchange = trainer.exchange
    claim_folder, init_trackers = build.claim_folder, Accelerator.init_trackers

    def watched_build(*arguments):
        run = build_run(*arguments)
        return dataclasses.replace(run, compute_loss=watch_loss(run.compute_loss, seen))

    def watched_step(run, progress, batches):
        if rank == 1 and trainer.count_steps(run, progress) == STOP_AFTER:
            os.kill(os.getpid(), signal.SIGUSR1)
        train_step(run, progress, batches)
        seen["weights"].append(hash_tensors(run.bare_model.parameters()))
        seen["own_statistics"].append(hash_tensors(run.bare_model.buffers()))

    def watched_exchange(run, progress, loss_share, *rest):
        news = exchange(run, progress, loss_share, *rest)
        seen["own_losses"].append(loss_share.item())
        seen["losses"].append(news.loss)
        return news

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
    trainer.exchange = watched_exchange
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
