"""The training and evaluation loops, on Accelerate."""

import math
import os
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator, DataLoaderConfiguration
from accelerate.utils import gather_object, set_seed
from timm.data import create_transform, resolve_model_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim import Optimizer
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from s3a.checkpoint import read_newest, rng_state, set_rng_state, write_checkpoint
from s3a.cost import count_cost
from s3a.data import ImageData, eval_loader, load_data, train_loader
from s3a.errors import unknown
from s3a.recipe import Recipe
from s3a.run_folder import CHECKPOINT_FOLDER, MODEL_FOLDER, claim_folder, draw_curves, model_card, write_metrics
from s3a.weights import PretrainedMixin, save_folder


class NonFiniteLossError(ValueError):
    """The loss became NaN or infinite."""


# --------------------------------------------------------------------------------------------------------
# Evaluation
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metrics:
    """What an evaluation found. top1 and top5 are fractions of 1, loss is the mean cross-entropy."""

    top1: float
    top5: float
    loss: float
    images: int
    images_per_second: float


@torch.no_grad()
def evaluate(model: nn.Module, loader: DataLoader, accelerator: Accelerator, *, progress: bool = False) -> Metrics:
    """Evaluates a prepared model on a prepared loader; every image counts once, on any number of processes.

    Raises:
        NonFiniteLossError: where the model returns NaN.
    """
    was_training = model.training
    model.eval()
    started = time.perf_counter()
    totals = torch.zeros(4, dtype=torch.float64)  # right at 1, right at 5, loss, images
    for images, labels in tqdm(loader, desc="evaluating", disable=not progress, leave=False):
        with accelerator.autocast():
            logits = model(images)
        best = logits.topk(min(5, logits.shape[1]), dim=1).indices == labels[:, None]  # [batch, 5]
        losses = cross_entropy(logits.float(), labels, reduction="none")
        columns = torch.stack([best[:, 0].float(), best.any(1).float(), losses, torch.ones_like(losses)], dim=1)
        totals += accelerator.gather_for_metrics(columns).double().sum(0).cpu()
    model.train(was_training)
    top1, top5, loss = (totals[:3] / totals[3]).tolist()
    if not math.isfinite(loss):
        raise NonFiniteLossError(f"the validation loss is {loss}: the weights or the images hold non-finite numbers")
    return Metrics(
        top1=top1,
        top5=top5,
        loss=loss,
        images=int(totals[3]),
        images_per_second=round(int(totals[3]) / (time.perf_counter() - started), 1),
    )


# --------------------------------------------------------------------------------------------------------
# Training
# --------------------------------------------------------------------------------------------------------


@dataclass
class Run:
    """A run under way: what the recipe built, and how far it has come."""

    recipe: Recipe
    folder: Path
    accelerator: Accelerator
    data: ImageData
    model: nn.Module
    optimizer: Optimizer
    scheduler: Scheduler
    train_loader: DataLoader
    val_loader: DataLoader
    data_config: dict[str, Any]
    history: list[dict[str, Any]]

    @property
    def epoch(self) -> int:
        """Epochs done."""
        return len(self.history)

    @property
    def bare_model(self) -> nn.Module:
        """The model as the recipe built it, without Accelerate's wrapping."""
        return self.accelerator.unwrap_model(self.model)

    def say(self, message: str) -> None:
        """Tells the user, once for all processes, without tearing the progress bar."""
        if self.accelerator.is_main_process:
            tqdm.write(message, file=sys.stderr)


def train(recipe: Recipe) -> Path:
    """Trains a recipe to its end, from its newest checkpoint if there is one; returns the run's folder.

    Raises:
        ValueError, FileNotFoundError: for a recipe that cannot run here, see the message.
        NonFiniteLossError: where the loss becomes NaN or infinite; names the step and the last good checkpoint.
    """
    run = prepare(recipe)
    resume(run)
    with tqdm(
        total=recipe.epochs * len(run.train_loader),
        initial=run.epoch * len(run.train_loader),
        unit="step",
        smoothing=0.05,
        disable=run.epoch == recipe.epochs or not run.accelerator.is_main_process,
    ) as bar:
        while run.epoch < recipe.epochs:
            run_epoch(run, bar)
    finish(run)
    return run.folder


def prepare(recipe: Recipe) -> Run:
    """Builds all that the recipe names and hands it to Accelerate."""
    if not timm.is_model(recipe.model):
        raise unknown("model", recipe.model, timm.list_models())
    data = load_data(recipe.data, recipe.data_dir)
    # batch_size is the step's, over all processes: Accelerate splits it
    accelerator = Accelerator(
        mixed_precision=recipe.precision,
        dataloader_config=DataLoaderConfiguration(split_batches=True),
        step_scheduler_with_optimizer=False,
    )
    if recipe.batch_size % accelerator.num_processes:
        raise ValueError(
            f"--batch-size is {recipe.batch_size} and there are {accelerator.num_processes} processes: "
            "it must be a multiple of them"
        )
    use_cores(accelerator, recipe.cpu_threads)
    set_seed(recipe.seed)
    model = build_model(recipe, len(data.label_names))
    data_config = resolve_model_data_config(model)
    channels = data_config["input_size"][0]
    check_image_size(model, recipe.image_size)
    data_config |= {"input_size": (channels, recipe.image_size, recipe.image_size), "crop_pct": recipe.crop_pct}
    common = {"channels": channels, "batch_size": recipe.batch_size, "num_workers": recipe.num_workers}
    training = train_loader(data.train, train_transform(recipe, data_config), seed=recipe.seed, **common)
    validation = eval_loader(data.val, create_transform(**data_config, is_training=False), **common)
    optimizer = create_optimizer_v2(
        model, "adamw", lr=recipe.learning_rate * recipe.batch_size / 512, weight_decay=recipe.weight_decay
    )
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=recipe.epochs,
        warmup_epochs=recipe.warmup_epochs,
        warmup_lr=1e-6,
        min_lr=recipe.min_learning_rate,
        step_on_epochs=False,
        updates_per_epoch=len(training),
    )
    with accelerator.main_process_first():  # last, so that a recipe that cannot run leaves no trace
        folder = claim_folder(recipe)
    prepared = accelerator.prepare(model, optimizer, training, validation)
    return Run(recipe, folder, accelerator, data, *prepared[:2], scheduler, *prepared[2:], data_config, history=[])


def build_model(recipe: Recipe, num_classes: int) -> nn.Module:
    """The recipe's model with fresh weights; ValueError where it has no drop path to set."""
    drop_path = {} if recipe.drop_path is None else {"drop_path_rate": recipe.drop_path}
    try:
        return timm.create_model(recipe.model, num_classes=num_classes, **drop_path)
    except TypeError as error:
        if "drop_path_rate" not in str(error):
            raise
        raise ValueError(f"--model {recipe.model} has no drop path: use --drop-path None") from error


def check_image_size(model: nn.Module, side: int) -> None:
    """Raises ValueError where the model does not take squares of so many pixels: a forward on the meta device says."""
    try:
        count_cost(model, side, side)
    except ValueError as error:
        raise ValueError(f"--image-size is {side}: {error}") from error


def use_cores(accelerator: Accelerator, threads: int | None) -> None:
    """Shares the cores among the processes of this machine: `accelerate launch` leaves each with a single thread."""
    if accelerator.device.type == "cpu":
        processes = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        torch.set_num_threads(threads or max(1, cores // processes))


def train_transform(recipe: Recipe, data_config: dict[str, Any]) -> Any:
    """timm's augmentation as the recipe has it; ValueError for a policy that timm does not know."""
    try:
        return create_transform(
            input_size=data_config["input_size"],
            is_training=True,
            scale=recipe.crop_scale,
            ratio=recipe.crop_ratio,
            hflip=recipe.horizontal_flip,
            color_jitter=recipe.color_jitter,
            auto_augment=recipe.auto_augment,
            re_prob=recipe.random_erasing,
            re_mode="pixel",
            interpolation=data_config["interpolation"],
            mean=data_config["mean"],
            std=data_config["std"],
        )
    except AssertionError as error:
        raise ValueError(
            f"--auto-augment is {recipe.auto_augment!r}: it must be a policy of timm's, such as rand-m9-mstd0.5-inc1"
        ) from error


def run_epoch(run: Run, bar: Any) -> None:
    """One epoch: trains, evaluates, writes metrics, curves and a checkpoint."""
    started = time.perf_counter()
    train_loss, learning_rate = train_epoch(run, bar)
    seconds = time.perf_counter() - started
    metrics = evaluate(run.model, run.val_loader, run.accelerator)
    line = {
        "epoch": run.epoch + 1,
        "train_loss": train_loss,
        "val_loss": metrics.loss,
        "val_top1": metrics.top1,
        "val_top5": metrics.top5,
        "learning_rate": learning_rate,
        "images_per_second": round(len(run.train_loader) * run.recipe.batch_size / seconds, 1),
    }
    run.history.append(line)
    run.say(
        f"epoch {line['epoch']:>3}: train loss {train_loss:.4f}, val loss {metrics.loss:.4f}, "
        f"top-1 {100 * metrics.top1:.2f} %, {line['images_per_second']:.0f} images/s"
    )
    save(run)


def train_epoch(run: Run, bar: Any) -> tuple[float, float]:
    """One pass over the training images; returns the mean loss and the last learning rate."""
    run.model.train()
    run.train_loader.set_epoch(run.epoch)  # Accelerate's loader hands it on; left alone it would count from 0 again
    done = run.epoch * len(run.train_loader)
    total_loss = torch.zeros((), dtype=torch.float64)
    started = time.perf_counter()
    top1 = f"{100 * run.history[-1]['val_top1']:.2f} %" if run.history else "-"
    for step, (images, labels) in enumerate(run.train_loader, start=1):
        run.scheduler.step_update(done + step)
        loss = train_step(run, images, labels, done + step)
        total_loss += loss
        speed = step * run.recipe.batch_size / (time.perf_counter() - started)
        bar.set_description(f"epoch {run.epoch + 1}/{run.recipe.epochs}", refresh=False)
        bar.set_postfix_str(f"loss {loss:.4f}, top-1 {top1}, {speed:.0f} images/s", refresh=False)
        bar.update()
    return float(total_loss / len(run.train_loader)), run.optimizer.param_groups[0]["lr"]


def train_step(run: Run, images: Tensor, labels: Tensor, step: int) -> float:
    """One optimizer step; returns the loss, averaged over the processes."""
    with run.accelerator.autocast():
        logits = run.model(images)
    loss = cross_entropy(logits.float(), labels, label_smoothing=run.recipe.label_smoothing)
    mean_loss = float(run.accelerator.reduce(loss.detach(), reduction="mean"))
    if not math.isfinite(mean_loss):
        raise NonFiniteLossError(non_finite_message(run, mean_loss, step))
    run.optimizer.zero_grad()
    run.accelerator.backward(loss)
    run.optimizer.step()
    return mean_loss


def non_finite_message(run: Run, loss: float, step: int) -> str:
    """What happened, where, and what is still good."""
    rate = run.optimizer.param_groups[0]["lr"]
    good = checkpoint_folder(run) if run.epoch else "none yet"
    return (
        f"the loss is {loss} at step {step} (epoch {run.epoch + 1}, learning rate {rate:.2e}): "
        f"lower --learning-rate; last good checkpoint: {good}"
    )


# --------------------------------------------------------------------------------------------------------
# What stays
# --------------------------------------------------------------------------------------------------------


def checkpoint_folder(run: Run) -> Path:
    """Where the checkpoint after the epochs done stands."""
    return run.folder / CHECKPOINT_FOLDER / f"epoch-{run.epoch:05d}"


def save(run: Run) -> None:
    """Writes metrics, curves and the checkpoint of the epochs done."""
    generators = gather_object([rng_state()])
    if run.accelerator.is_main_process:
        write_metrics(run.folder, run.history)
        draw_curves(run.folder, run.history)
        scaler = run.accelerator.scaler
        state = {
            "data": data_summary(run.data),
            "history": run.history,
            "scaler": scaler.state_dict() if scaler else None,
            "model": run.bare_model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "generators": generators,
        }
        write_checkpoint(checkpoint_folder(run), state, keep=run.recipe.keep_checkpoints)
    run.accelerator.wait_for_everyone()


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
    run.bare_model.load_state_dict(state["model"])
    run.optimizer.load_state_dict(state["optimizer"])
    run.history = state["history"]
    generators = state["generators"]
    if len(generators) == run.accelerator.num_processes:
        set_rng_state(generators[run.accelerator.process_index])
    else:
        run.say(f"the checkpoint is of {len(generators)} processes: drop path draws anew on this number of processes")
    if run.accelerator.is_main_process:
        write_metrics(run.folder, run.history)
    if run.epoch == run.recipe.epochs:
        run.say(f"{run.folder} is finished: {run.epoch} epochs, nothing left to train")
    else:
        run.say(f"resuming {run.folder} after epoch {run.epoch} of {run.recipe.epochs}")


def data_summary(data: ImageData) -> dict[str, Any]:
    """What must not change between the parts of a run."""
    return {"train": len(data.train), "val": len(data.val), "label_names": data.label_names}


def described(summary: dict[str, Any]) -> str:
    """A data summary for a person."""
    return f"{summary['train']} and {summary['val']} images of {len(summary['label_names'])} classes"


def finish(run: Run) -> None:
    """Writes the weights folder with its card, and says where it is and how to use it."""
    recipe, folder = run.recipe, run.folder / MODEL_FOLDER
    if run.accelerator.is_main_process:
        model = run.bare_model
        parameters = sum(parameter.numel() for parameter in model.parameters())
        num_images = (len(run.data.train), len(run.data.val))
        family = type(model).__name__ if isinstance(model, PretrainedMixin) else None
        card = model_card(recipe, family, run.history[-1], num_images, parameters)
        save_folder(model, folder, data_config=run.data_config, config={"label_names": run.data.label_names}, card=card)
    run.accelerator.wait_for_everyone()
    last = run.history[-1]
    right = round(last["val_top1"] * len(run.data.val))
    run.say(
        f"\ntop-1 {100 * last['val_top1']:.2f} % ({right} of {len(run.data.val)} validation images), "
        f"top-5 {100 * last['val_top5']:.2f} %\n"
        f"weights:   {folder}\n"
        f"curves:    {run.folder / 'curves.png'}\n"
        f"evaluate:  {evaluate_command(recipe, folder)}"
    )


def evaluate_command(recipe: Recipe, folder: Path) -> str:
    """The command that measures the weights again."""
    data = f"--data {recipe.data}" + (f" --data-dir {recipe.data_dir}" if recipe.data_dir else "")
    precision = f" --precision {recipe.precision}" if recipe.precision != "no" else ""
    return f"python recipes/evaluate.py --weights {folder} {data}{precision}"


def evaluate_weights(
    model: nn.Module, data: ImageData, *, batch_size: int, precision: str, num_workers: int
) -> dict[str, Any]:
    """Evaluates a loaded model on the validation images with its own preprocessing; for `recipes/evaluate.py`.

    Raises:
        ValueError: where the data has another number of classes than the model.
    """
    if len(data.label_names) != model.num_classes:
        raise ValueError(
            f"the weights know {model.num_classes} classes and the data has {len(data.label_names)}: "
            "evaluate on the data set they were trained for"
        )
    accelerator = Accelerator(mixed_precision=precision, dataloader_config=DataLoaderConfiguration(split_batches=True))
    use_cores(accelerator, threads=None)
    config = resolve_model_data_config(model)
    loader = eval_loader(
        data.val,
        create_transform(**config, is_training=False),
        channels=config["input_size"][0],
        batch_size=batch_size,
        num_workers=num_workers,
    )
    model, loader = accelerator.prepare(model, loader)
    return asdict(evaluate(model, loader, accelerator, progress=True))
