"""Training: `train(recipe)`, from the first step to the weights folders that are left. Read it from top to bottom.

A run is a loop over epochs (`run_epoch`) of optimizer steps (`train_step`); after each epoch comes an evaluation.
What the loop works on is built in `build`; what is particular to classification is in `tasks.classification`.

A run that is stopped anywhere and resumed ends with the same weights, byte for byte, as one that never was (on CUDA
with `deterministic`, since some kernels there add in any order): everything random is a function of (seed, step,
process) or (seed, epoch, image), a checkpoint knows its place to the step, and so nothing random needs to be in it.
"""

import copy
import json
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn, cast

import torch
from accelerate.utils import broadcast_object_list, gather_object
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from s3a.data import Batch
from s3a.data.loaders import describe_idle_workers
from s3a.models.backbone import Backbone
from s3a.nn.stochastic_depth import place_in_batch
from s3a.support.compiler import compile_whole_regions
from s3a.support.errors import Interrupted
from s3a.support.palette import PEER
from s3a.training.build import Run, build_run
from s3a.training.checkpoints import (
    Checkpoint,
    find_fault,
    find_newest,
    gather_model_state,
    gather_optimizer_state,
    list_checkpoints,
    load_states,
    read_state,
    write_checkpoint,
)
from s3a.training.evaluation import Evaluation, NonFiniteLossError, UnreadableImagesError, evaluate
from s3a.training.processes import (
    StopRequests,
    combine_seeds,
    configure_kernels,
    raise_on_main,
    reduce_any,
    seed_step,
    sum_over_hosts,
)
from s3a.training.progress import ProgressDisplay
from s3a.training.recipe import Recipe, spell_option
from s3a.training.run_folder import (
    CHECKPOINT_FOLDER,
    CURVES_NAME,
    EXAMPLES_NAME,
    INCIDENTAL,
    WEIGHTS,
    EpochMetrics,
    Panel,
    draw_curves,
    list_origins,
    write_metrics,
    write_unreadable,
)
from s3a.training.tasks.classification import Classification
from s3a.training.tasks.task import Task
from s3a.training.transfers import Readback, send_batches
from s3a.weights.card import Score, TrainingFacts, build_card
from s3a.weights.folder import save_folder
from s3a.weights.pretrained import push_folder


def train(recipe: Recipe, task: type[Task] = Classification, *, note: str | None = None) -> Path:
    """Trains a recipe to its end, from its newest checkpoint if there is one; returns the run's folder.

    Args:
        note: what to print when the run begins, once all is checked.

    Raises:
        ValueError, FileNotFoundError: for a recipe that cannot run here, see the message.
        NonFiniteLossError: where a loss or gradient becomes NaN or infinite; names step, images and checkpoint.
        UnreadableImagesError: where more images cannot be read than the recipe allows.
        Interrupted: where a signal asked the run to stop; its checkpoint is written.
    """
    kernels = configure_kernels(
        tf32=recipe.tf32, cudnn_benchmark=recipe.cudnn_benchmark, deterministic=recipe.deterministic
    )
    with kernels, compile_whole_regions(), StopRequests() as requests:
        run = build_run(recipe, task, requests)
        with run.lock:
            progress = resume(run)
            reduce_any(run.accelerator, False)  # waits for all: until here a signal ends all, from here it stops all
            requests.begin()
            if note is not None:
                run.say(note)
            processes, workers = run.accelerator.num_processes, run.recipe.num_workers
            if idle := describe_idle_workers(run.data.train, processes, workers):
                run.say(idle)
            display = ProgressDisplay(
                run.total_steps,
                done=count_steps(run, progress),
                show=progress.epoch < run.total_epochs and run.accelerator.is_main_process,
            )
            with display:
                while progress.epoch < run.total_epochs:
                    run_epoch(run, progress, display)
            finish(run, progress)
            run.accelerator.end_training()
    return run.folder


@dataclass
class Progress:
    """How far a run has come. Weights, averages and the optimizer's state are in the run's objects.

    Attributes:
        epoch: epochs that are done, with their evaluation.
        step: optimizer steps that are done in the epoch under way.
        loss_sum: of those steps.
        skipped: how many of those steps were skipped as not finite; they have no loss.
        history: the metrics of each epoch that is done.
        unreadable: names of the training images that could not be read so far.
        pending: the last step, while the host does not know its outcome; its loss is not in the sum yet. None in
            checkpoints.
    """

    epoch: int = 0
    step: int = 0
    loss_sum: float = 0.0
    skipped: int = 0
    history: list[EpochMetrics] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)
    pending: "PendingStep | None" = None

    @property
    def num_losses(self) -> int:
        """How many of the epoch's steps have a loss that is known."""
        return self.step - self.skipped - (self.pending is not None)

    @property
    def train_loss(self) -> float:
        """Mean loss of those steps; 0 where there are none."""
        return self.loss_sum / max(self.num_losses, 1)


@dataclass(frozen=True, kw_only=True)
class PendingStep:
    """An optimizer step that the device was given, and whose outcome the host has not read yet.

    Attributes:
        number: counted from 1 since the beginning of the run.
        epoch: counted from 1.
        indices: rows of the images that this process had in it.
        outcome: what `judge_step` found.
    """

    number: int
    epoch: int
    learning_rate: float
    indices: list[Tensor]
    outcome: Readback


def count_steps(run: Run, progress: Progress) -> int:
    """Optimizer steps that are done since the beginning of the run."""
    return min(progress.epoch * run.steps_per_epoch, run.total_steps) + progress.step


# --------------------------------------------------------------------------------------------------------
# Epochs
# --------------------------------------------------------------------------------------------------------


def run_epoch(run: Run, progress: Progress, display: ProgressDisplay) -> None:
    """Trains what is left of an epoch, evaluates, and writes metrics, curves, the best weights and a checkpoint."""
    speed = train_epoch(run, progress, display)
    share_buffers(run)
    evaluation = validate(run, progress, run.bare_model)
    if run.accelerator.is_main_process:
        run.task.write_records(run.folder, evaluation.records)
    scores = {f"val_{name}": score for name, score in evaluation.scores.items()}
    if run.ema is not None:
        best = run.task.best
        scores[f"ema_{best}"] = validate(run, progress, run.ema.module).scores[best]
    metrics = EpochMetrics(
        epoch=progress.epoch + 1,
        train_loss=progress.train_loss,
        scores=scores,
        learning_rate=run.optimizer.param_groups[0]["lr"],
        images_per_second=speed.images_per_second,
        loader_wait=speed.loader_wait,
        skipped_steps=progress.skipped,
        unreadable_val=len(evaluation.unreadable),
    )
    progress.history.append(metrics)
    progress.epoch, progress.step, progress.loss_sum, progress.skipped = progress.epoch + 1, 0, 0.0, 0
    report_epoch(run, metrics)
    columns = {column: value for column, value in metrics.to_line().items() if column != "epoch"}
    run.accelerator.log(columns, step=count_steps(run, progress))
    save_best(run, progress)
    save(run, progress)


@dataclass(frozen=True, kw_only=True)
class Speed:
    """How fast an epoch trained since it was begun or resumed, and which share of that time it waited for images."""

    images_per_second: float = 0.0
    loader_wait: float = 0.0


def train_epoch(run: Run, progress: Progress, display: ProgressDisplay) -> Speed:
    """Takes the steps that are left of an epoch."""
    prepare_epoch(run, progress)
    first, started, waited = progress.step, time.perf_counter(), 0.0
    batches = run.train_loader.epoch(progress.epoch, first_step=progress.step)
    for _ in range(progress.step, run.count_steps_of(progress.epoch)):
        asked = time.perf_counter()
        micro_batches = next(batches)
        if progress.pending is None or progress.pending.outcome.is_there():  # else the device still had work to do
            waited += time.perf_counter() - asked
        if run.recipe.moves_each_step:
            run.scheduler.step_update(count_steps(run, progress) + 1)
        train_step(run, progress, micro_batches)
        speed = (progress.step - first) * run.recipe.batch_size / (time.perf_counter() - started)
        show_step(run, progress, display, speed)
    settle_step(run, progress)
    if progress.step == first:
        return Speed()
    seconds = time.perf_counter() - started
    speed = (progress.step - first) * run.recipe.batch_size / seconds
    return Speed(images_per_second=round(speed, 1), loader_wait=round(waited / seconds, 3))


def prepare_epoch(run: Run, progress: Progress) -> None:
    """Sets the model and the learning rate to what the recipe has for this epoch."""
    recipe, model = run.recipe, run.bare_model
    run.model.train()
    if recipe.freeze_batch_norm:
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d | nn.SyncBatchNorm):
                module.eval()
    rate = recipe.drop_path_at(progress.epoch)
    if rate is not None and rate != recipe.drop_path:
        assert isinstance(model, Backbone)
        model.set_drop_path(rate)
    if not recipe.moves_each_step:
        run.scheduler.step(progress.epoch)


def show_step(run: Run, progress: Progress, display: ProgressDisplay, speed: float) -> None:
    """Shows that a step is done. The score is that of the last evaluation, which was an epoch ago."""
    words = [f"loss {progress.train_loss:.4f}"] if progress.num_losses else []
    if progress.history:
        score = run.task.format_score(progress.history[-1].scores[f"val_{run.task.best}"])
        words.append(f"last {run.task.title} {score}")
    words.append(f"{speed:.0f} images/s")
    display.advance(f"epoch {progress.epoch + 1}/{run.total_epochs}", ", ".join(words))


def report_epoch(run: Run, metrics: EpochMetrics) -> None:
    """Prints an epoch's metrics, and which side of the machine held it up."""
    waiting = metrics.loader_wait
    slow = "the loader is the bottleneck: raise --num-workers" if waiting > 0.2 else "the model is the bottleneck"
    run.say(
        f"epoch {metrics.epoch:>3}: train loss {metrics.train_loss:.4f}, {run.task.describe_epoch(metrics.scores)}, "
        f"{metrics.images_per_second:.0f} images/s, {100 * waiting:.0f} % of the time waiting for them: {slow}"
    )


# --------------------------------------------------------------------------------------------------------
# An optimizer step
# --------------------------------------------------------------------------------------------------------


def train_step(run: Run, progress: Progress, micro_batches: list[Batch]) -> None:
    """Takes one optimizer step on this process' share of a batch, and does what any process asks for after it.

    The device gets the whole step without the host waiting for any of it; meanwhile the host learns how the step before
    went. A step that is not finite does not reach the weights.
    """
    seed_step(run.recipe.seed, count_steps(run, progress), run.accelerator.process_index)
    buffers = {}
    if run.recipe.on_non_finite == "skip":  # a forward that is not finite would spoil BatchNorm's statistics for good
        buffers = {name: buffer.clone() for name, buffer in run.bare_model.named_buffers()}
    loss_share = forward_backward(run, micro_batches, combine_seeds(run.recipe.seed, count_steps(run, progress)))
    outcome = judge_step(run, loss_share, clip_gradient(run))
    apply_gradient(run, outcome[2], buffers)
    launched = PendingStep(
        number=count_steps(run, progress) + 1,
        epoch=progress.epoch + 1,
        learning_rate=run.optimizer.param_groups[0]["lr"],
        indices=[batch.indices for batch in micro_batches],
        outcome=Readback(outcome),
    )
    settle_step(run, progress)  # the one before
    progress.step, progress.pending = progress.step + 1, launched
    unreadable = {name: reason for batch in micro_batches for name, reason in batch.unreadable.items()}
    news = exchange(run, progress, unreadable)
    if news.num_unreadable:
        record_unreadable(run, progress, unreadable)
    if news.stop:
        stop(run, progress)
    if news.checkpoint:
        save(run, progress)


def forward_backward(run: Run, micro_batches: list[Batch], seed: int) -> Tensor:
    """Accumulates the gradient of the step's loss; returns this process' share of the loss.

    Args:
        seed: of the stochastic depth of our models, which an image has from its place in the whole batch.
    """
    device = run.accelerator.device
    total = torch.zeros((), device=device)
    first = run.accelerator.process_index * sum(len(batch.labels) for batch in micro_batches)
    batches = map(run.train_loader.normalizer, send_batches(micro_batches, device))
    for index, batch in enumerate(batches, start=1):
        # gradients are summed over the processes once, in the last backward
        with nullcontext() if index == len(micro_batches) else run.accelerator.no_sync(run.model):
            with run.accelerator.autocast(), place_in_batch(seed, first, run.recipe.batch_size, device):
                loss = run.compute_loss(run.model, batch) / len(micro_batches)
            run.accelerator.backward(loss)
        first += len(batch.labels)
        total += loss.detach()
    return total


def clip_gradient(run: Run) -> Tensor:
    """Scales the gradient down to the norm that the recipe allows; returns the norm that it had, of whole weights."""
    run.accelerator.unscale_gradients()
    parameters = [parameter for parameter in run.model.parameters() if parameter.grad is not None]
    norm = get_total_norm([cast(Tensor, parameter.grad) for parameter in parameters])
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if run.recipe.clip_grad is not None:
        clip_grads_with_norm_(parameters, run.recipe.clip_grad, norm)
    return norm


def judge_step(run: Run, loss_share: Tensor, norm: Tensor) -> Tensor:
    """What came of a step, the same on all processes and on the device.

    Returns:
        [3]: the mean loss of the processes, the gradient's norm, and 1 where either is not finite on any process, or 0.
    """
    finite = loss_share.isfinite()
    if run.accelerator.scaler is None:  # which takes care of an infinite gradient by itself: it skips and scales less
        finite = finite & norm.isfinite()
    shares = torch.stack([loss_share, norm.to(loss_share.dtype), (~finite).to(loss_share.dtype)])
    sums = run.accelerator.reduce(shares, reduction="sum")  # the norm is the same on all, but for one not finite
    return torch.cat([sums[:2] / run.accelerator.num_processes, sums[2:].clamp(max=1)])


def apply_gradient(run: Run, not_finite: Tensor, buffers: Mapping[str, Tensor]) -> None:
    """Changes the weights and their average by the gradient, unless the step is not finite.

    The device decides by itself. The average of a step that is left out takes the same weights once more.

    Args:
        not_finite: 1 or 0; [], on the device.
        buffers: those of the model as they were before the step, to be put back where it is not finite.
    """
    optimizer = run.optimizer.optimizer
    if run.accelerator.scaler is None:
        optimizer.found_inf = not_finite  # where fused optimizers look, since gradients are scaled
        run.optimizer.step()
        del optimizer.found_inf
    else:
        run.optimizer.step()
    for name, before in buffers.items():
        buffer = run.bare_model.get_buffer(name)
        buffer.copy_(torch.where(not_finite > 0, before, buffer))
    if run.ema is not None:
        run.ema.update(run.bare_model)
    run.optimizer.zero_grad()


def settle_step(run: Run, progress: Progress) -> None:
    """Waits for the outcome of the pending step, if there is one, and counts its loss.

    One that is not finite was skipped; this says so, or ends the run, as the recipe has it.
    """
    step, progress.pending = progress.pending, None
    if step is None:
        return
    loss, norm, not_finite = step.outcome.read()
    if not not_finite:
        progress.loss_sum += loss
    elif run.recipe.on_non_finite == "stop":
        fail_at_non_finite(run, step, loss, norm)
    else:
        progress.skipped += 1
        run.say(f"skipped step {step.number}: the loss is {loss}, the gradient's norm {norm}")


def fail_at_non_finite(run: Run, step: PendingStep, loss: float, norm: float) -> NoReturn:
    """Lists the images of the step, and ends the run with NonFiniteLossError."""
    indices = torch.cat(step.indices).tolist()
    names = [run.data.train.name_of(index) for index in gather_object(indices)]
    path = run.folder / "non_finite.txt"
    if run.accelerator.is_main_process:
        path.write_text("".join(f"{name}\n" for name in names), encoding="utf-8")
    newest = next(iter(list_checkpoints(run.folder / CHECKPOINT_FOLDER)), "none yet")
    error = NonFiniteLossError(
        f"the loss is {loss} and the gradient's norm {norm} at step {step.number} (epoch {step.epoch}, learning rate "
        f"{step.learning_rate:.2e}), on {names[0]} and {len(names) - 1} other images listed in {path}: lower "
        f"--learning-rate, or use --on-non-finite skip; last good checkpoint: {newest}"
    )
    raise_on_main(run.accelerator, error)


@dataclass(frozen=True, kw_only=True)
class News:
    """What the processes know of each other after a step; the same on all of them.

    Attributes:
        stop: a process is asked to stop.
        checkpoint: one is due.
        num_unreadable: training images that were found unreadable for the first time.
    """

    stop: bool
    checkpoint: bool
    num_unreadable: int


def exchange(run: Run, progress: Progress, unreadable: Mapping[str, str]) -> News:
    """Sums up what each process has to say after a step: what the hosts know, and no device is asked about."""
    is_due = run.accelerator.is_main_process and run.clock.is_due(count_steps(run, progress))
    num_new = len(set(unreadable) - set(progress.unreadable))
    is_asked = run.requests.reason is not None
    stop, checkpoint, num_unreadable = sum_over_hosts(run.accelerator, is_asked, is_due, num_new)
    return News(stop=stop > 0, checkpoint=checkpoint > 0, num_unreadable=num_unreadable)


# --------------------------------------------------------------------------------------------------------
# Images that cannot be read
# --------------------------------------------------------------------------------------------------------


def record_unreadable(run: Run, progress: Progress, unreadable: Mapping[str, str]) -> None:
    """Lists unreadable training images in the run's folder; ends the run where the recipe allows fewer."""
    found = dict(gather_object([*unreadable.items()]))
    progress.unreadable = sorted({*progress.unreadable, *found})
    if run.accelerator.is_main_process:
        write_unreadable(run.folder, "train", progress.unreadable)
    most = int(run.recipe.max_bad_images * run.data.train.num_images)
    if len(progress.unreadable) > most:
        fail_at_unreadable(run, "train", len(progress.unreadable), most, found)


def fail_at_unreadable(run: Run, split: str, count: int, most: int, found: Mapping[str, str]) -> NoReturn:
    """Ends the run with UnreadableImagesError.

    Args:
        split: train or val.
        count: of unreadable images, where `most` are allowed.
        found: some of them, and why they cannot be read.
    """
    kind, limit = {"train": ("training", "max_bad_images"), "val": ("validation", "max_bad_val_images")}[split]
    name, reason = min(found.items())
    error = UnreadableImagesError(
        f"{count} of the {kind} images cannot be read, {most} are allowed ({spell_option(limit)} "
        f"{getattr(run.recipe, limit)}), such as {name}, since {reason}: mend those listed in "
        f"{run.folder / f'unreadable_{split}.txt'} or take them out, or allow more"
    )
    raise_on_main(run.accelerator, error)


# --------------------------------------------------------------------------------------------------------
# Validation
# --------------------------------------------------------------------------------------------------------


def share_buffers(run: Run) -> None:
    """Gives every process the main one's BatchNorm statistics, without which they would evaluate different models."""
    if run.accelerator.num_processes > 1:
        for module in (run.bare_model, *([run.ema.module] if run.ema else [])):
            for buffer in module.buffers():
                torch.distributed.broadcast(buffer, src=0)


def validate(run: Run, progress: Progress, model: nn.Module) -> Evaluation:
    """Evaluates a model; stops the run where that is asked for, or where too many images cannot be read."""
    evaluation = evaluate(
        model, run.task, run.val_loader, run.accelerator, stop=lambda: run.requests.reason is not None
    )
    if evaluation is None:
        stop(run, progress)
    if evaluation.unreadable:
        if run.accelerator.is_main_process:
            write_unreadable(run.folder, "val", evaluation.unreadable)
        most = int(run.recipe.max_bad_val_images * run.data.val.num_images)
        if len(evaluation.unreadable) > most:
            save(run, progress)
            fail_at_unreadable(run, "val", len(evaluation.unreadable), most, evaluation.unreadable)
    return evaluation


# --------------------------------------------------------------------------------------------------------
# Saving, stopping, resuming
# --------------------------------------------------------------------------------------------------------


def save(run: Run, progress: Progress) -> None:
    """Writes a checkpoint of everything that changes, and after an epoch metrics and curves."""
    settle_step(run, progress)
    model_state = gather_model_state(run.model)
    optimizer_state = gather_optimizer_state(run.model, run.optimizer.optimizer)
    loader_states = gather_object([run.train_loader.state_dict()])
    failure: OSError | None = None
    if run.accelerator.is_main_process:
        scaler = run.accelerator.scaler
        history = [metrics.to_line() for metrics in progress.history]
        known = {name: value for name, value in vars(progress).items() if name != "pending"}
        state = {
            "task": type(run.task).__name__,
            "data": summarize_data(run) | run.task.config,
            "recipe": run.recipe.to_json(),
            "progress": {**known, "history": history},
            "model": model_state,
            "ema": run.ema.module.state_dict() if run.ema else None,
            "optimizer": optimizer_state,
            "scaler": scaler.state_dict() if scaler else None,
            "loaders": loader_states,
        }
        # an epoch's last step and its evaluation are two places
        name = f"step-{count_steps(run, progress):09d}-epoch-{progress.epoch:05d}"
        try:
            write_checkpoint(run.folder / CHECKPOINT_FOLDER / name, state, keep=run.recipe.keep_checkpoints)
            if progress.step == 0:
                write_history(run, progress)
        except OSError as error:  # such as a full disk; the others would wait for this process
            failure = error
    if reduce_any(run.accelerator, failure is not None):
        raise_on_main(run.accelerator, failure or OSError("the main process could not write"))
    run.clock.restart()


def stop(run: Run, progress: Progress) -> NoReturn:
    """Writes a checkpoint and ends the run with Interrupted, on all processes together."""
    save(run, progress)
    reason = run.requests.reason or "another process"
    raise Interrupted(
        f"stopped by {reason} at epoch {progress.epoch + 1}, step {progress.step} of "
        f"{run.count_steps_of(progress.epoch)}: "
        "the checkpoint is written, the same command goes on from it"
    )


def resume(run: Run) -> Progress:
    """Loads the newest whole checkpoint of the run, if it has one; returns how far the run has come, and says so.

    Which one that is, the main process finds; the others load the same, or all begin anew.
    """
    checkpoint = choose_checkpoint(run)
    if checkpoint is None:
        epochs = "1 epoch" if run.total_epochs == 1 else f"{run.total_epochs} epochs"
        run.say(f"beginning {run.folder}: {epochs} of {run.steps_per_epoch} steps")
        return Progress()
    check_readable(run, checkpoint)
    state = read_state(run.folder / CHECKPOINT_FOLDER / checkpoint.name)
    task = state.get("task", Classification.__name__)  # the only one, when checkpoints did not name it
    if task != type(run.task).__name__:
        raise ValueError(
            f"{run.folder} holds a run of the task {task}, and this one is {type(run.task).__name__}: give it its own "
            "--output-dir"
        )
    if state["data"] != summarize_data(run) | run.task.config:
        raise ValueError(
            f"the data is not that of the run in {run.folder}: it had {describe_data(state['data'])}, now there are "
            f"{describe_data(summarize_data(run))}; give this run its own --output-dir"
        )
    if run.accelerator.scaler and state["scaler"]:
        run.accelerator.scaler.load_state_dict(state["scaler"])
    load_states(run.model, run.optimizer.optimizer, state["model"], state["optimizer"])
    if run.ema is not None:
        run.ema.module.load_state_dict(state["ema"])
    history = [EpochMetrics.from_line(line) for line in state["progress"]["history"]]
    progress = Progress(**{**state["progress"], "history": history})
    if run.accelerator.is_main_process:
        write_history(run, progress)
    if progress.epoch == run.total_epochs:
        run.say(f"{run.folder} is finished: {progress.epoch} epochs, nothing left to train")
    else:
        where = f", at step {progress.step} of {run.count_steps_of(progress.epoch)}" if progress.step else ""
        run.say(f"resuming {run.folder} after epoch {progress.epoch} of {run.total_epochs}{where}")
        resume_stream(run, progress, state.get("loaders", []))
    return progress


def resume_stream(run: Run, progress: Progress, states: Sequence[dict[str, Any]]) -> None:
    """Has a stream go on at its place in the epoch, or says what is seen again where nobody has that place.

    Args:
        states: of the loaders of all processes when the checkpoint was written.
    """
    loader = run.train_loader
    if progress.step == 0 or not loader.state_dict():
        return
    readers = [len(state.get("places", ())) for state in states]
    if readers == [loader.num_readers] * run.accelerator.num_processes:
        loader.load_state_dict(states[run.accelerator.process_index])
        return
    before = f"{len(readers)} x {readers[0]}" if any(readers) else "an unknown number"
    now = f"{run.accelerator.num_processes} x {loader.num_readers}"
    run.say(
        f"the stream was read by {before} readers, and now by {now} (of each process): its shards are dealt anew. "
        f"The rest of epoch {progress.epoch + 1} may show images again that its first "
        f"{progress.step / run.steps_per_epoch:.0%} had, and leave others out; as many processes and --num-workers as "
        "before would go on exactly"
    )


def choose_checkpoint(run: Run) -> Checkpoint | None:
    """The newest whole checkpoint that the main process has, on all processes; None where it has none."""
    chosen: list[Checkpoint | Exception | None] = [None]
    if run.accelerator.is_main_process:
        try:
            chosen = [find_newest(run.folder / CHECKPOINT_FOLDER, run.say)]
        except (ValueError, OSError) as error:
            chosen = [error]
    (choice,) = broadcast_object_list(chosen)
    if isinstance(choice, Exception):
        raise_on_main(run.accelerator, choice)
    return cast(Checkpoint | None, choice)


def check_readable(run: Run, checkpoint: Checkpoint) -> None:
    """Raises ValueError, on all processes together, where one of them does not have the main one's checkpoint."""
    faults = []
    folder = run.folder / CHECKPOINT_FOLDER / checkpoint.name
    if not run.accelerator.is_main_process:  # which has looked at it already
        fault = find_fault(folder, checkpoint.manifest)
        place = f"process {run.accelerator.process_index} on {socket.gethostname()}"
        faults = [f"{place} cannot read {folder}, which the main process goes on from ({fault})"] if fault else []
    faults = gather_object(faults)
    if faults:
        others = f", and {len(faults) - 1} more cannot either" if len(faults) > 1 else ""
        error = ValueError(f"{faults[0]}{others}: all machines must share the folder that --output-dir names")
        raise_on_main(run.accelerator, error)


def summarize_data(run: Run) -> dict[str, Any]:
    """How many images there are, and the hash that changes when they do."""
    counts = {"train": run.data.train.num_images, "val": run.data.val.num_images}
    return {**counts, "fingerprint": run.data.fingerprint}


def describe_data(summary: Mapping[str, Any]) -> str:
    """A summary of the data in words."""
    return f"{summary['train']} and {summary['val']} images (fingerprint {summary['fingerprint'][:12]})"


def write_history(run: Run, progress: Progress) -> None:
    """Writes what a user watches: metrics, and curves, which are redrawn every half minute and at the end."""
    history = progress.history
    write_metrics(run.folder, history)
    curves = run.folder / CURVES_NAME
    is_recent = curves.exists() and time.time() - curves.stat().st_mtime < 30
    if history and not (is_recent and progress.epoch < run.total_epochs):
        rates = {"learning rate": [metrics.learning_rate for metrics in history]}
        panels = [*run.task.list_panels(run.recipe, history), Panel(title="learning rate", curves=rates, color=PEER)]
        draw_curves(run.folder, [metrics.epoch for metrics in history], panels)


# --------------------------------------------------------------------------------------------------------
# The weights that are left
# --------------------------------------------------------------------------------------------------------


def save_best(run: Run, progress: Progress) -> None:
    """Writes the weights of the epoch just done where it is the best one so far: `best`, and for EMA `ema-best`."""
    origins = list_origins(progress.history, run.task.best)
    for name in ("best", "ema-best"):
        if name in origins and origins[name].metrics is progress.history[-1]:
            write_weights(run, progress, name)


def finish(run: Run, progress: Progress) -> None:
    """Writes the weights of the last epoch, publishes the best ones if asked to, and says where all is."""
    write_weights(run, progress, "model")
    if run.ema is not None:
        write_weights(run, progress, "ema")
    examples = run.folder / EXAMPLES_NAME
    if run.accelerator.is_main_process and not examples.exists():
        with torch.no_grad(), run.accelerator.autocast():  # as in the evaluation, for which it is compiled
            run.task.draw_examples(run.bare_model.eval(), run.data_config, examples)
    run.accelerator.wait_for_everyone()
    origins = list_origins(progress.history, run.task.best)
    # papers print the higher score of the plain weights and their average
    name = max((name for name in ("best", "ema-best") if name in origins), key=lambda name: origins[name].score)
    best = origins[name]
    command = run.task.evaluate_command(run.recipe, run.folder / "model")
    lines = [
        f"\n{run.task.describe_result(progress.history[-1].scores)}; best epoch {best.metrics.epoch} with "
        f"{run.task.format_score(best.score)}{' (EMA)' if best.prefix == 'ema' else ''}",
        f"weights:   {run.folder / 'model'} (last), {run.folder / name} (best)",
        f"curves:    {run.folder / CURVES_NAME}",
        *([f"examples:  {examples}"] if examples.exists() else []),
        *([f"evaluate:  {command}"] if command else []),
    ]
    run.say("\n".join(lines))
    if run.recipe.push_to_hub and run.accelerator.is_main_process:
        run.say(f"published: {push_folder(run.folder / name, run.recipe.push_to_hub)}")


def write_weights(run: Run, progress: Progress, name: str) -> None:
    """Writes the weights folder of this name, a key of WEIGHTS, with its model card, on the main process."""
    if run.ema is not None and name.startswith("ema"):
        state = run.ema.module.state_dict()
    else:
        state = gather_model_state(run.model)
    if not run.accelerator.is_main_process:
        return
    model = copy.deepcopy(run.shell)
    model.load_state_dict(state, assign=True)
    if run.recipe.quantize is not None:
        from s3a.quantization.convert import quantize  # noqa: PLC0415  torchao is slow to import

        model = quantize(model, run.recipe.quantize)
    origin = list_origins(progress.history, run.task.best)[name]
    score = {"weights": WEIGHTS[name], "epoch": origin.metrics.epoch, run.task.best: origin.score}
    save_folder(
        model,
        run.folder / name,
        data_config=run.data_config,
        config={**run.task.config, "data": summarize_data(run), "score": score},
        card=build_card(
            model,
            collect_facts(run, progress, name),
            data_config=run.data_config,
            cost=run.cost,
            place=run.folder / name,
        ),
    )


def collect_facts(run: Run, progress: Progress, name: str) -> TrainingFacts:
    """How the weights of a folder were trained, for their model card."""
    scores = {}
    for folder, origin in list_origins(progress.history, run.task.best).items():
        values = run.task.list_card_scores(origin.metrics.scores, origin.prefix)
        scores[WEIGHTS[folder]] = Score(epoch=origin.metrics.epoch, values=values)
    options = json.loads(run.recipe.to_json())
    return TrainingFacts(
        name=run.recipe.run_name,
        purpose=run.task.purpose,
        weights=WEIGHTS[name],
        scores=scores,
        dataset=run.recipe.dataset or run.recipe.data,
        num_train=run.data.train.num_images,
        num_val=run.data.val.num_images,
        fingerprint=run.data.fingerprint,
        recipe={field: value for field, value in options.items() if field not in INCIDENTAL},
    )
