"""The training loop, on Accelerate.

Everything random is a function of (seed, step, process) or (seed, epoch, image), and a checkpoint knows its place to
the step: so a run that was stopped anywhere ends with the same weights, byte for byte, as one that never was.
"""

import copy
import math
import sys
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.utils import gather_object, send_to_device
from timm.data import Mixup
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from s3a.build import build, seed_step
from s3a.checkpoint import checkpoints, read_newest, write_checkpoint
from s3a.data import Batch, EvalLoader, ImageData, TrainLoader
from s3a.evaluation import Metrics, NonFiniteLossError, UnreadableImagesError, evaluate
from s3a.interrupts import CheckpointClock, Interrupted, StopRequests
from s3a.machine import fail_together
from s3a.quantize import quantize
from s3a.recipe import Recipe, option
from s3a.run_folder import (
    CHECKPOINT_FOLDER,
    WEIGHTS,
    all_scores,
    draw_curves,
    headline_weights,
    save_weights,
    write_metrics,
    write_unreadable,
)
from s3a.state import model_state, optimizer_state, restore
from s3a.weights import push_folder


@dataclass
class Progress:
    """How far a run has come; all of it is in its checkpoints.

    Attributes:
        epoch: epochs done, their evaluation included. step: optimizer steps done in the epoch under way.
        loss_sum: of those steps. skipped: steps of the whole run that were skipped as not finite.
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
        shell: the model without memory, and neither compiled nor spread over processes: its weights are saved in it.
    """

    recipe: Recipe
    folder: Path
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


def train(recipe: Recipe) -> Path:
    """Trains a recipe to its end, from its newest checkpoint if there is one; returns the run's folder.

    Raises:
        ValueError, FileNotFoundError: for a recipe that cannot run here, see the message.
        NonFiniteLossError: where a loss or gradient becomes NaN or infinite; names step, images and checkpoint.
        UnreadableImagesError: where more images cannot be read than the recipe allows.
        Interrupted: where a signal asked the run to stop; its checkpoint is written.
    """
    with StopRequests() as requests:
        run = Run(**build(recipe), requests=requests, clock=CheckpointClock(recipe.checkpoint_every))
        resume(run)
        with tqdm(
            total=recipe.total_epochs * run.steps_per_epoch,
            initial=run.steps_done,
            unit="step",
            smoothing=0.05,
            disable=run.progress.epoch == recipe.total_epochs or not run.accelerator.is_main_process,
        ) as bar:
            while run.progress.epoch < recipe.total_epochs:
                run_epoch(run, bar)
        finish(run)
        run.accelerator.end_training()
    return run.folder


# --------------------------------------------------------------------------------------------------------
# Epochs
# --------------------------------------------------------------------------------------------------------


def run_epoch(run: Run, bar: Any) -> None:
    """What is left of an epoch: trains, evaluates, writes metrics, curves, the best weights and a checkpoint."""
    speed = train_epoch(run, bar)
    share_buffers(run)
    metrics = validate(run, run.bare_model)
    averaged = {"ema_top1": validate(run, run.ema.module).top1} if run.ema else {}
    progress = run.progress
    line = {
        "epoch": progress.epoch + 1,
        "train_loss": progress.loss_sum / max(run.steps_per_epoch, 1),
        "val_loss": metrics.loss,
        "val_top1": metrics.top1,
        "val_top5": metrics.top5,
        **averaged,
        "learning_rate": run.optimizer.param_groups[0]["lr"],
        **speed,
        **({"skipped_steps": progress.skipped} if progress.skipped else {}),
        **({"unreadable_val": len(metrics.unreadable)} if metrics.unreadable else {}),
    }
    progress.history.append(line)
    progress.epoch, progress.step, progress.loss_sum = progress.epoch + 1, 0, 0.0
    run.say(epoch_report(line))
    run.accelerator.log({key: value for key, value in line.items() if key != "epoch"}, step=run.steps_done)
    save_best(run)
    save(run)


def epoch_report(line: dict[str, Any]) -> str:
    """An epoch for a person, and which side of the machine held it up."""
    averaged = f", with EMA {100 * line['ema_top1']:.2f} %" if "ema_top1" in line else ""
    waiting = line["loader_wait"]
    slow = "the loader is the bottleneck: raise --num-workers" if waiting > 0.2 else "the model is the bottleneck"
    return (
        f"epoch {line['epoch']:>3}: train loss {line['train_loss']:.4f}, val loss {line['val_loss']:.4f}, "
        f"top-1 {100 * line['val_top1']:.2f} %{averaged}, {line['images_per_second']:.0f} images/s, "
        f"{100 * waiting:.0f} % of the time waiting for them: {slow}"
    )


def train_epoch(run: Run, bar: Any) -> dict[str, float]:
    """The steps left of an epoch; returns its speed, and the share of its time spent waiting for images."""
    recipe, progress = run.recipe, run.progress
    run.model.train()
    if recipe.freeze_batch_norm:
        freeze_batch_norm(run.model)
    if recipe.late_drop_path is not None:
        set_drop_path(run.bare_model, recipe.drop_path_at(progress.epoch))
    if recipe.schedule == "epoch":
        run.scheduler.step(progress.epoch)
    first, started, waited = progress.step, time.perf_counter(), 0.0
    batches = run.train_loader.epoch(progress.epoch, first_step=progress.step)
    for _ in range(progress.step, run.steps_per_epoch):
        asked = time.perf_counter()
        micro_batches = next(batches)
        waited += time.perf_counter() - asked
        if recipe.schedule == "step":
            run.scheduler.step_update(run.steps_done + 1)
        train_step(run, micro_batches)
        seconds = time.perf_counter() - started
        show(run, bar, (progress.step - first) * recipe.batch_size / seconds)
    seconds = time.perf_counter() - started
    done = (progress.step - first) * recipe.batch_size
    return {
        "images_per_second": round(done / seconds, 1) if done else 0.0,
        "loader_wait": round(waited / seconds, 3) if done else 0.0,
    }


def show(run: Run, bar: Any, speed: float) -> None:
    """Moves the progress bar on."""
    progress = run.progress
    top1 = f"{100 * progress.history[-1]['val_top1']:.2f} %" if progress.history else "-"
    loss = progress.loss_sum / progress.step
    bar.set_description(f"epoch {progress.epoch + 1}/{run.recipe.total_epochs}", refresh=False)
    bar.set_postfix_str(f"loss {loss:.4f}, top-1 {top1}, {speed:.0f} images/s", refresh=False)
    bar.update()


def freeze_batch_norm(model: nn.Module) -> None:
    """Leaves BatchNorm's statistics as they are in a model that trains."""
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.eval()


def set_drop_path(model: nn.Module, rate: float | None) -> None:
    """Gives a model of this library the stochastic depth of an epoch; None leaves it as it was built."""
    if rate is not None:
        model.set_drop_path(rate)


def share_buffers(run: Run) -> None:
    """Gives every process the main one's BatchNorm statistics, without which they would evaluate different models."""
    if run.accelerator.num_processes > 1:
        for module in (run.bare_model, *([run.ema.module] if run.ema else [])):
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, src=0)


def validate(run: Run, model: nn.Module) -> Metrics:
    """Evaluates; stops the run where a signal asks for it, or too many images cannot be read."""
    most = int(run.recipe.max_bad_val_images * run.data.val.num_images)
    metrics = evaluate(
        model,
        run.val_loader,
        run.accelerator,
        max_unreadable=run.data.val.num_images,
        stop=lambda: run.requests.received is not None,
    )
    if metrics is None:
        stop(run)
    if metrics.unreadable:
        if run.accelerator.is_main_process:
            write_unreadable(run.folder, "val", metrics.unreadable)
        if len(metrics.unreadable) > most:
            save(run)
            fail_together(run.accelerator, unreadable_error(run, "val", metrics.unreadable, most))
    return metrics


# --------------------------------------------------------------------------------------------------------
# Steps
# --------------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------------
# What stays
# --------------------------------------------------------------------------------------------------------


def stop(run: Run) -> None:
    """Writes a checkpoint and ends the run, all processes together."""
    save(run)
    progress = run.progress
    signal = run.requests.received or "another process"
    raise Interrupted(
        f"stopped by {signal} at epoch {progress.epoch + 1}, step {progress.step} of {run.steps_per_epoch}: "
        "the checkpoint is written, the same command goes on from it"
    )


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


def save_best(run: Run) -> None:
    """Writes the weights of the epoch just done where it is the best one: in `best`, and for EMA in `ema-best`."""
    for key, name in (("val_top1", "best"), ("ema_top1", "ema-best")):
        tops = [line.get(key) for line in run.progress.history]
        if tops[-1] is not None and all(tops[-1] > top for top in tops[:-1]):
            write_weights(run, name)


def finish(run: Run) -> None:
    """Writes the weights folders with their cards, and says where they are and how to use them."""
    write_weights(run, "model")
    if run.ema is not None:
        write_weights(run, "ema")
    run.accelerator.wait_for_everyone()
    last, headline = run.progress.history[-1], headline_weights(run.progress.history)
    best = all_scores(run.progress.history)[WEIGHTS[headline]]
    right = round(last["val_top1"] * run.data.val.num_images)
    averaged = f", with EMA {100 * last['ema_top1']:.2f} %" if "ema_top1" in last else ""
    run.say(
        f"\ntop-1 {100 * last['val_top1']:.2f} % ({right} of {run.data.val.num_images} validation images), "
        f"top-5 {100 * last['val_top5']:.2f} %{averaged}; "
        f"best epoch {best.epoch} with {100 * best.top1:.2f} %\n"
        f"weights:   {run.folder / 'model'} (last), {run.folder / headline} (best)\n"
        f"curves:    {run.folder / 'curves.png'}\n"
        f"evaluate:  {evaluate_command(run.recipe, run.folder / 'model')}"
    )
    if run.recipe.push_to_hub and run.accelerator.is_main_process:
        run.say(f"published: {push_folder(run.folder / headline, run.recipe.push_to_hub)}")


def write_weights(run: Run, name: str) -> None:
    """A weights folder in the run's folder, by the main process: of the average where it is named after it."""
    state = run.ema.module.state_dict() if name.startswith("ema") else model_state(run.model)
    if run.accelerator.is_main_process:
        model = copy.deepcopy(run.shell)
        model.load_state_dict(state, assign=True)
        if run.recipe.quantize is not None:
            model = quantize(model, run.recipe.quantize)
        summary = data_summary(run.data)
        save_weights(model, run.folder / name, run.recipe, run.data_config, summary, run.progress.history)


def evaluate_command(recipe: Recipe, folder: Path) -> str:
    """The command that measures the weights again."""
    options = {"data": recipe.data, "data-dir": recipe.data_dir, "dataset": recipe.dataset}
    given = [f"--{name} {value}" for name, value in options.items() if value is not None]
    given += [f"--precision {recipe.precision}"] if recipe.precision != "no" else []
    return " ".join(["python recipes/evaluate.py", f"--weights {folder}", *given])
