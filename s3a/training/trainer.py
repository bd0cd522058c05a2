"""The training loop, on Accelerate: epochs of steps, the evaluation after each, and the weights that are left.

A run that was stopped anywhere ends with the same weights, byte for byte, as one that never was (`run`, `steps`).
"""

import copy
import shlex
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from s3a.quantization.convert import quantize
from s3a.training.build import build
from s3a.training.checkpoints import CheckpointClock, model_state
from s3a.training.evaluation import Metrics, evaluate
from s3a.training.processes import fail_together
from s3a.training.recipe import Recipe
from s3a.training.run import Run, data_summary, resume, save, stop
from s3a.training.run_folder import WEIGHTS, all_scores, headline_weights, save_weights, write_unreadable
from s3a.training.signals import StopRequests
from s3a.training.steps import train_step, unreadable_error
from s3a.weights.pretrained import push_folder


def train(recipe: Recipe) -> Path:
    """Trains a recipe to its end, from its newest checkpoint if there is one; returns the run's folder.

    Raises:
        ValueError, FileNotFoundError: for a recipe that cannot run here, see the message.
        NonFiniteLossError: where a loss or gradient becomes NaN or infinite; names step, images and checkpoint.
        UnreadableImagesError: where more images cannot be read than the recipe allows.
        Interrupted: where a signal asked the run to stop; its checkpoint is written.
    """
    with StopRequests() as requests, ExitStack() as held:
        run = Run(**build(recipe), requests=requests, clock=CheckpointClock(recipe.checkpoint_every))
        if run.lock is not None:
            held.callback(run.lock.release)
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
        "train_loss": progress.loss_sum / max(run.steps_per_epoch - progress.skipped, 1),
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
    progress.epoch, progress.step, progress.loss_sum, progress.skipped = progress.epoch + 1, 0, 0.0, 0
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
    loss = progress.loss_sum / max(progress.step - progress.skipped, 1)
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
# Weights
# --------------------------------------------------------------------------------------------------------


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
        f"best epoch {best.epoch} with {100 * best.top1:.2f} %{' (EMA)' if headline.startswith('ema') else ''}\n"
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
    options = {"--weights": folder, "--data": recipe.data, "--data-dir": recipe.data_dir, "--dataset": recipe.dataset}
    options |= {"--precision": recipe.precision} if recipe.precision != "no" else {}
    given = [word for name, value in options.items() if value is not None for word in (name, str(value))]
    streaming = ["--streaming"] if recipe.streaming else []
    return shlex.join(["python", "recipes/evaluate.py", *given, *streaming])
