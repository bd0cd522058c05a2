"""A training run under way: what it consists of, how far it has come, and how both are kept.

A checkpoint knows its place to the step. Nothing random is in it, since everything random is a function of
(seed, step, process) or (seed, epoch, image).
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from accelerate import Accelerator
from filelock import FileLock
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from s3a.data import EvalLoader, ImageData, TrainLoader
from s3a.support.errors import Interrupted
from s3a.training.checkpoints import (
    CheckpointClock,
    model_state,
    optimizer_state,
    read_newest,
    restore,
    write_checkpoint,
)
from s3a.training.recipe import Recipe
from s3a.training.run_folder import CHECKPOINT_FOLDER, draw_curves, write_metrics
from s3a.training.signals import StopRequests


@dataclass
class Progress:
    """How far a run has come; all of it is in its checkpoints.

    Attributes:
        epoch: epochs done, their evaluation included. step: optimizer steps done in the epoch under way.
        loss_sum: of those steps. skipped: those of them that were skipped as not finite, and have no loss.
        history: a line of metrics per epoch done. unreadable: names of training images that cannot be read.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    skipped: int = 0
    history: list[dict[str, Any]] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)


@dataclass
class Run:
    """A run under way: what the recipe built, and how far it has come.

    Attributes:
        lock: of the folder, held by the main process.
        shell: the model without memory, and neither compiled nor spread over processes: its weights are saved in it.
    """

    recipe: Recipe
    folder: Path
    lock: FileLock | None
    accelerator: Accelerator
    data: ImageData
    data_config: dict[str, Any]
    shell: nn.Module
    model: nn.Module
    optimizer: Optimizer
    scheduler: Scheduler
    criterion: nn.Module
    mixup: Mixup | None
    ema: ModelEmaV3 | None
    train_loader: TrainLoader
    val_loader: EvalLoader
    requests: StopRequests
    clock: CheckpointClock
    progress: Progress = field(default_factory=Progress)

    @property
    def bare_model(self) -> nn.Module:
        """The model as the recipe built it, without Accelerate's wrapping."""
        return self.accelerator.unwrap_model(self.model)

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch."""
        return self.train_loader.steps_per_epoch

    @property
    def steps_done(self) -> int:
        """Optimizer steps since the beginning of the run."""
        return self.progress.epoch * self.steps_per_epoch + self.progress.step

    def say(self, message: str) -> None:
        """Tells the user, once for all processes, without tearing the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(message, file=sys.stderr)


def save(run: Run) -> None:
    """Writes a checkpoint of everything, and after an epoch metrics and curves."""
    progress = run.progress
    model, optimizer = model_state(run.model), optimizer_state(run.model, run.optimizer.optimizer)
    if run.accelerator.is_main_process:
        scaler = run.accelerator.scaler
        state = {
            "data": data_summary(run.data),
            "recipe": run.recipe.to_json(),
            "progress": vars(progress),
            "model": model,
            "ema": run.ema.module.state_dict() if run.ema else None,
            "optimizer": optimizer,
            "scaler": scaler.state_dict() if scaler else None,
        }
        # an epoch's last step and its evaluation are two places
        name = f"step-{run.steps_done:09d}-epoch-{progress.epoch:05d}"
        write_checkpoint(run.folder / CHECKPOINT_FOLDER / name, state, keep=run.recipe.keep_checkpoints)
        if progress.step == 0:
            show_history(run)
    run.accelerator.wait_for_everyone()
    run.clock.restart()


def stop(run: Run) -> NoReturn:
    """Writes a checkpoint and ends the run, all processes together."""
    save(run)
    progress = run.progress
    signal = run.requests.received or "another process"
    raise Interrupted(
        f"stopped by {signal} at epoch {progress.epoch + 1}, step {progress.step} of {run.steps_per_epoch}: "
        "the checkpoint is written, the same command goes on from it"
    )


def show_history(run: Run) -> None:
    """Writes what a user watches: metrics and curves."""
    write_metrics(run.folder, run.progress.history)
    if run.progress.history:
        draw_curves(run.folder, run.progress.history)


def resume(run: Run) -> None:
    """Puts the run back to its newest whole checkpoint, if it has one."""
    state = read_newest(run.folder / CHECKPOINT_FOLDER, run.say)
    if state is None:
        return
    if state["data"] != data_summary(run.data):
        raise ValueError(
            f"the data is not that of the run in {run.folder}: it had {described(state['data'])}, now there are "
            f"{described(data_summary(run.data))}; give this run its own --output-dir"
        )
    if run.accelerator.scaler and state["scaler"]:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    restore(run.model, run.optimizer.optimizer, state)
    if run.ema is not None:
        run.ema.module.load_state_dict(state["ema"])
    run.progress = progress = Progress(**state["progress"])
    if run.accelerator.is_main_process:
        show_history(run)
    if progress.epoch == run.recipe.total_epochs:
        run.say(f"{run.folder} is finished: {progress.epoch} epochs, nothing left to train")
    else:
        where = f", at step {progress.step} of {run.steps_per_epoch}" if progress.step else ""
        run.say(f"resuming {run.folder} after epoch {progress.epoch} of {run.recipe.total_epochs}{where}")


def data_summary(data: ImageData) -> dict[str, Any]:
    """What must not change between the parts of a run."""
    return {
        "train": data.train.num_images,
        "val": data.val.num_images,
        "label_names": data.label_names,
        "fingerprint": data.fingerprint,
    }


def described(summary: dict[str, Any]) -> str:
    """A data summary for a person."""
    return (
        f"{summary['train']} and {summary['val']} images of {len(summary['label_names'])} classes "
        f"(fingerprint {summary['fingerprint'][:12]})"
    )
