"""One optimizer step, and what the processes have to tell each other after it."""

import math
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from accelerate.utils import gather_object, send_to_device
from torch import Tensor

from s3a.data import Batch
from s3a.training.build import seed_step
from s3a.training.checkpoints import checkpoints
from s3a.training.evaluation import NonFiniteLossError, UnreadableImagesError
from s3a.training.processes import fail_together
from s3a.training.recipe import option
from s3a.training.run import Run, save, stop
from s3a.training.run_folder import CHECKPOINT_FOLDER, write_unreadable


def train_step(run: Run, micro_batches: list[Batch]) -> None:
    """One optimizer step on this process' share of a batch, and what the processes have to tell each other after it."""
    recipe, progress = run.recipe, run.progress
    seed_step(recipe.seed, run.steps_done, run.accelerator.process_index)
    statistics = batch_norm_statistics(run) if recipe.on_non_finite == "skip" else {}
    loss = forward_backward(run, micro_batches)
    most = math.inf if recipe.clip_grad is None else recipe.clip_grad
    norm = run.accelerator.clip_grad_norm_(run.model.parameters(), most)
    unreadable = [name for batch in micro_batches for name in batch.unreadable]
    told = tell(run, loss, unreadable)
    # with a scaler an infinite gradient is its business: it skips the step and scales less
    finite = math.isfinite(told.loss) and (run.accelerator.scaler is not None or math.isfinite(norm))
    if finite:
        run.optimizer.step()
        progress.loss_sum += told.loss
        if run.ema is not None:
            run.ema.update(run.bare_model)
    elif recipe.on_non_finite == "stop":
        fail_together(run.accelerator, non_finite_error(run, told.loss, float(norm), micro_batches))
    else:
        progress.skipped += 1
        if run.accelerator.scaler is not None:
            run.accelerator.scaler.update()  # it has looked at this step's gradient, and must forget it
        run.say(f"skipped step {run.steps_done + 1}: the loss is {told.loss}, the gradient's norm {float(norm)}")
        for name, buffer in statistics.items():
            run.bare_model.get_buffer(name).copy_(buffer)
    run.optimizer.zero_grad()
    progress.step += 1
    if told.unreadable:
        note_unreadable(run, unreadable)
    if told.stop:
        stop(run)
    if told.checkpoint:
        save(run)


def forward_backward(run: Run, micro_batches: list[Batch]) -> Tensor:
    """Accumulates the gradient of the step's loss; returns this process' share of the loss."""
    total = torch.zeros((), device=run.accelerator.device)
    for index, batch in enumerate(micro_batches, start=1):
        images, targets = send_to_device((batch.images, batch.labels), run.accelerator.device, non_blocking=True)
        if run.mixup is not None:
            images, targets = run.mixup(images, targets)
        last = index == len(micro_batches)
        with nullcontext() if last else run.accelerator.no_sync(run.model):
            with run.accelerator.autocast():
                logits = run.model(images)
            loss = run.criterion(logits.float(), targets) / len(micro_batches)
            run.accelerator.backward(loss)
        total += loss.detach()
    return total


@dataclass(frozen=True)
class Told:
    """What the processes told each other after a step.

    Attributes:
        loss: mean over them. stop: one got a signal. checkpoint: one is due. unreadable: how many images are new.
    """

    loss: float
    stop: bool
    checkpoint: bool
    unreadable: int


def tell(run: Run, loss: Tensor, unreadable: list[str]) -> Told:
    """One exchange between the processes."""
    due = run.accelerator.is_main_process and run.clock.due(run.steps_done + 1)
    wishes = [run.requests.received is not None, due, len(set(unreadable) - set(run.progress.unreadable))]
    mine = torch.cat([loss.reshape(1), torch.tensor(wishes, dtype=loss.dtype, device=loss.device)])
    total, stop, checkpoint, new = run.accelerator.reduce(mine, reduction="sum").tolist()
    return Told(total / run.accelerator.num_processes, stop > 0, checkpoint > 0, int(new))


def batch_norm_statistics(run: Run) -> dict[str, Tensor]:
    """Copies of the model's buffers, which a forward that is not finite would spoil for good."""
    return {name: buffer.clone() for name, buffer in run.bare_model.named_buffers()}


def non_finite_error(run: Run, loss: float, norm: float, micro_batches: list[Batch]) -> NonFiniteLossError:
    """What happened, where, on which images, and what is still good."""
    indices = [index for batch in micro_batches for index in batch.indices.tolist()]
    names = [run.data.train.name_of(index) for index in gather_object(indices)]
    path = run.folder / "non_finite.txt"
    if run.accelerator.is_main_process:
        path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    newest = next(iter(checkpoints(run.folder / CHECKPOINT_FOLDER)), "none yet")
    rate = run.optimizer.param_groups[0]["lr"]
    return NonFiniteLossError(
        f"the loss is {loss} and the gradient's norm {norm} at step {run.steps_done + 1} (epoch "
        f"{run.progress.epoch + 1}, learning rate {rate:.2e}), on {names[0]} and {len(names) - 1} other images listed "
        f"in {path}: lower --learning-rate, or use --on-non-finite skip; last good checkpoint: {newest}"
    )


def note_unreadable(run: Run, names: list[str]) -> None:
    """Lists unreadable images in the run's folder; stops the run where there are more than the recipe allows."""
    progress, most = run.progress, int(run.recipe.max_bad_images * run.data.train.num_images)
    progress.unreadable = sorted({*progress.unreadable, *gather_object(names)})
    if run.accelerator.is_main_process:
        write_unreadable(run.folder, "train", progress.unreadable)
    if len(progress.unreadable) > most:
        fail_together(run.accelerator, unreadable_error(run, "train", progress.unreadable, most))


def unreadable_error(run: Run, split: str, names: Sequence[str], most: int) -> UnreadableImagesError:
    """How many images cannot be read, where they are listed, and what helps."""
    kind, field = {"train": ("training", "max_bad_images"), "val": ("validation", "max_bad_val_images")}[split]
    return UnreadableImagesError(
        f"{len(names)} {kind} images cannot be read, {most} are allowed ({option(field)} "
        f"{getattr(run.recipe, field)}): mend those listed in {run.folder / f'unreadable_{split}.txt'}, such as "
        f"{names[0]}, or allow more"
    )
