"""`build_run`: what a recipe names, first checked and then built, as a `Run`."""

import socket
import sys
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from accelerate import Accelerator
from accelerate.optimizer import AcceleratedOptimizer
from accelerate.utils import (
    DistributedDataParallelKwargs,
    DistributedType,
    ProjectConfiguration,
    gather_object,
    is_tensorboard_available,
    is_wandb_available,
)
from timm.optim import create_optimizer_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer
from tqdm.auto import tqdm

from s3a.analysis.cost import Cost, copy_to_meta
from s3a.attention.backends import BACKENDS, Operands
from s3a.data import EvalLoader, ImageData, TrainLoader
from s3a.data.pixels import PixelNormalizer
from s3a.models.dense import DenseModel
from s3a.nn.batch_norm import synchronise_batch_norm
from s3a.nn.compilation import compile_model
from s3a.nn.layers import Region
from s3a.nn.s3a import S3A
from s3a.quantization.schemes import check_trainable
from s3a.support.errors import make_unknown_error
from s3a.training.checkpoints import CheckpointClock, list_checkpoints
from s3a.training.dense_recipe import DenseRecipe
from s3a.training.evaluation import make_eval_loader
from s3a.training.model import NOT_TAKEN, count_image_cost
from s3a.training.processes import StopRequests, raise_on_main, seed_step, set_cpu_threads
from s3a.training.recipe import Recipe
from s3a.training.run_folder import CHECKPOINT_FOLDER, check_folder, claim_folder
from s3a.training.tasks.classification import Classification
from s3a.training.tasks.task import Loss, Task
from s3a.weights.hub import create_repository


@dataclass(frozen=True, kw_only=True)
class Run:
    """A training run as its recipe built it. How far it has come is apart, in the trainer's `Progress`.

    Attributes:
        lock: of the folder, on the main process; a context that unlocks it.
        data_config: timm's preprocessing keys.
        cost: of an image, at the recipe's size.
        shell: the model without memory, neither compiled nor spread over processes: weights are saved in a copy of it.
        model: as it is trained; compiled, and wrapped for several processes.
        ema: timm's moving average of the weights.
        requests: notes that this process is asked to stop.
    """

    recipe: Recipe
    task: Task
    accelerator: Accelerator
    lock: AbstractContextManager[object]
    data_config: dict[str, Any]
    cost: Cost
    train_loader: TrainLoader
    val_loader: EvalLoader
    shell: nn.Module
    model: nn.Module
    compute_loss: Loss
    optimizer: AcceleratedOptimizer
    scheduler: Scheduler
    ema: ModelEmaV3 | None
    clock: CheckpointClock
    requests: StopRequests

    @property
    def folder(self) -> Path:
        """Where the run is written."""
        return self.recipe.folder

    @property
    def data(self) -> ImageData:
        """The images of both splits."""
        return self.task.data

    @property
    def bare_model(self) -> nn.Module:
        """The model without the wrapping for several processes."""
        model: nn.Module = self.accelerator.unwrap_model(self.model)
        return model

    @property
    def steps_per_epoch(self) -> int:
        """Optimizer steps of an epoch that goes through all training images."""
        return self.train_loader.steps_per_epoch

    @property
    def total_steps(self) -> int:
        """Optimizer steps of the run."""
        return self.recipe.count_steps(self.steps_per_epoch)

    @property
    def total_epochs(self) -> int:
        """Epochs of the run, of which the last may be a part of one."""
        return -(-self.total_steps // self.steps_per_epoch)

    def count_steps_of(self, epoch: int) -> int:
        """Optimizer steps of an epoch, counted from 0."""
        return min(self.steps_per_epoch, self.total_steps - epoch * self.steps_per_epoch)

    def say(self, message: str) -> None:
        """Prints a message on stderr, once for all processes, above the progress bar."""
        if self.accelerator.is_main_process and sys.stderr is not None:
            tqdm.write(message, file=sys.stderr)


def build_run(recipe: Recipe, task_type: type[Task] = Classification, requests: StopRequests | None = None) -> Run:
    """Builds the run of a recipe, on every process.

    All that can be refused is refused first. The folder is made at last, so that a recipe that cannot run leaves no
    trace.

    Args:
        requests: the context that notes requests to stop, entered; None for one that notes no signals.

    Raises:
        ValueError, FileNotFoundError: for a recipe that cannot run here.
    """
    # Checks: of the recipe alone, with its data, with the processes, and with its model, which has no memory yet.
    check_names(recipe)
    check_folder(recipe)
    task = task_type.load(recipe)
    accelerator = build_accelerator(recipe)
    check_processes(recipe, accelerator)
    check_same_data(task, accelerator)
    task.check_recipe(recipe, recipe.batch_size // (accelerator.num_processes * recipe.accumulate))
    shell = build_shell(recipe, task)
    check_backend(recipe, shell, accelerator)
    data_config = task.configure_data(recipe, shell)
    cost = count_image_cost(shell, *data_config["input_size"][1:])
    # The loaders refuse a batch that cannot be cut, and the task an augmentation; they read nothing before an epoch.
    train_loader = build_train_loader(recipe, task, data_config, accelerator)
    val_loader = build_val_loader(recipe, task, data_config, accelerator)

    # Construction.
    set_cpu_threads(accelerator, recipe.cpu_threads)
    model = build_first_model(recipe, task, accelerator)
    ema = build_ema(recipe, model, accelerator)
    optimizer = build_optimizer(recipe, model)
    scheduler = recipe.make_scheduler(optimizer, train_loader.steps_per_epoch)
    model = convert_model(recipe, model, accelerator)
    with accelerator.main_process_first():
        lock: AbstractContextManager[object] = claim_folder(recipe) if accelerator.is_main_process else nullcontext()
    if recipe.push_to_hub and accelerator.is_main_process:
        create_repository(recipe.push_to_hub)  # now, so that a missing right does not show after the last epoch
    accelerator.init_trackers(recipe.run_name, config=recipe.to_tracker())
    model, optimizer = accelerator.prepare(model, optimizer)
    return Run(
        recipe=recipe,
        task=task,
        accelerator=accelerator,
        lock=lock,
        data_config=data_config,
        cost=cost,
        train_loader=train_loader,
        val_loader=val_loader,
        shell=shell,
        model=model,
        compute_loss=task.make_loss(recipe),
        optimizer=optimizer,
        scheduler=scheduler,
        ema=ema,
        clock=CheckpointClock(recipe.checkpoint_every),
        requests=requests or StopRequests(),
    )


# --------------------------------------------------------------------------------------------------------
# Checks
# --------------------------------------------------------------------------------------------------------


def check_names(recipe: Recipe) -> None:
    """Raises ValueError for a model, tracker or quantization scheme that is unknown, missing, or not trainable."""
    if not timm.is_model(recipe.model):
        raise make_unknown_error("model", recipe.model, timm.list_models())
    installed = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    if recipe.track is not None and not installed[recipe.track]():
        raise ValueError(f"--track is {recipe.track}, which is not installed: pip install {recipe.track}")
    if recipe.quantize is not None:
        check_trainable(recipe.quantize)


def build_accelerator(recipe: Recipe) -> Accelerator:
    """Accelerate with the recipe's precision and tracker; the processes know each other from here on."""
    folder = str(recipe.folder)
    return Accelerator(
        mixed_precision=recipe.precision,
        step_scheduler_with_optimizer=False,
        # gradients are not copied to be summed; buffers not shared in every forward, but before the trainer evaluates
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
        log_with=recipe.track,
        project_config=ProjectConfiguration(project_dir=folder, logging_dir=f"{folder}/tracking"),
    )


def check_processes(recipe: Recipe, accelerator: Accelerator) -> None:
    """Raises ValueError where the recipe does not go with the processes and devices that Accelerate found."""
    if accelerator.distributed_type == DistributedType.FSDP:
        if not accelerator.is_fsdp2:
            raise ValueError(
                "this is the first version of FSDP, which accelerate takes where none is named: use --fsdp_version 2"
            )
        if accelerator.device.type != "cuda":
            raise ValueError("FSDP needs CUDA: on this machine leave it out of the accelerate configuration, for DDP")
        if recipe.ema_decay is not None:
            raise ValueError(f"--ema-decay is {recipe.ema_decay}: no average is kept of sharded weights; use None")
        if isinstance(recipe, DenseRecipe):
            raise ValueError("FSDP is for classification, whose blocks it shards: train dense tasks without it, by DDP")
    if recipe.precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--precision is fp16, which needs a GPU: use bf16 or no")


def check_same_data(task: Task, accelerator: Accelerator) -> None:
    """Raises ValueError, on all processes together, where one of them has other images than the main one."""
    own = [task.data.train.num_images, task.data.val.num_images, task.data.fingerprint]
    for process, (host, theirs) in enumerate(gather_object([(socket.gethostname(), own)])):
        if process == 0:
            first = theirs
        elif theirs != first:
            error = ValueError(
                f"process {process} on {host} has {theirs[0]} and {theirs[1]} images (fingerprint {theirs[2][:12]}), "
                f"the main one {first[0]} and {first[1]} ({first[2][:12]}): all machines must have the same files"
            )
            raise_on_main(accelerator, error)


def check_backend(recipe: Recipe, shell: nn.Module, accelerator: Accelerator) -> None:
    """Raises ValueError where the recipe's backend cannot train the model on this device."""
    if recipe.backend is None:
        return
    if recipe.backend not in BACKENDS:
        raise make_unknown_error("backend", recipe.backend, BACKENDS)
    scans = [module for module in shell.modules() if isinstance(module, S3A)]
    if not scans:
        raise ValueError(NOT_TAKEN["backend"].format(model=recipe.model))
    dtype = {"no": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}[recipe.precision]
    for head_dim in {module.head_dim for module in scans}:
        reason = BACKENDS[recipe.backend].why_not(Operands(accelerator.device, dtype, head_dim, needs_grad=True))
        if reason is not None:
            raise ValueError(f"--backend is {recipe.backend}: {reason}; use tiled, or leave --backend out")


# --------------------------------------------------------------------------------------------------------
# The model
# --------------------------------------------------------------------------------------------------------


def build_shell(recipe: Recipe, task: Task) -> nn.Module:
    """The model of `Task.build_model` without memory, in evaluation mode; drawing nothing at random.

    It has no backend of its own: weights are saved in a copy of it, to be used on any machine.
    """
    recipe = replace(recipe, backend=None)
    if recipe.weights is not None:
        return copy_to_meta(task.build_model(recipe))
    with torch.device("meta"):
        return task.build_model(recipe).eval()


def build_first_model(recipe: Recipe, task: Task, accelerator: Accelerator) -> nn.Module:
    """The model that a run begins with: the same weights on every process, on the process's device.

    Prints a line about a new head of loaded weights, unless a checkpoint is there to replace it.
    """
    seed_step(recipe.seed, step=0, process=-1)
    starts = not list_checkpoints(recipe.folder / CHECKPOINT_FOLDER)
    model = task.build_model(recipe, partial(accelerator.print, file=sys.stderr) if starts else lambda line: None)
    if recipe.quantize is not None:
        from s3a.quantization.convert import fake_quantize  # noqa: PLC0415  torchao is slow to import

        fake_quantize(model, recipe.quantize)
    return model.to(accelerator.device)


def convert_model(recipe: Recipe, model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """The model with synchronised BatchNorm, and compiled, where the recipe and the processes ask for it."""
    if recipe.sync_batch_norm and accelerator.num_processes > 1:
        synchronise_batch_norm(model)
    if recipe.compile:
        if any(isinstance(module, Region) for module in model.modules()):
            compile_model(model)  # of a dense model the backbone alone: what its head does follows from the objects
        else:
            (model.backbone if isinstance(model, DenseModel) else model).compile()
    return model


# --------------------------------------------------------------------------------------------------------
# Around the model
# --------------------------------------------------------------------------------------------------------


def build_train_loader(
    recipe: Recipe, task: Task, data_config: dict[str, Any], accelerator: Accelerator
) -> TrainLoader:
    """This process' share of the training images."""
    return TrainLoader(
        task.data.train,
        task.make_train_transform(recipe, data_config),
        erasing=task.make_erasing(recipe),
        normalizer=PixelNormalizer(data_config["mean"], data_config["std"]),
        channels=data_config["input_size"][0],
        batch_size=recipe.batch_size,
        accumulate=recipe.accumulate,
        repeats=recipe.repeats,
        seed=recipe.seed,
        process_index=accelerator.process_index,
        num_processes=accelerator.num_processes,
        num_workers=recipe.num_workers,
        pin_memory=accelerator.device.type == "cuda",
    )


def build_val_loader(recipe: Recipe, task: Task, data_config: dict[str, Any], accelerator: Accelerator) -> EvalLoader:
    """This process' share of the validation images.

    In batches as large as the passes of training, which fit into memory, and with half of the workers, since images are
    only decoded and cropped.
    """
    return make_eval_loader(
        task.data,
        task.make_eval_transform(data_config),
        accelerator,
        data_config=data_config,
        batch_size=recipe.batch_size // recipe.accumulate,
        num_workers=(recipe.num_workers + 1) // 2,
    )


def build_ema(recipe: Recipe, model: nn.Module, accelerator: Accelerator) -> ModelEmaV3 | None:
    """timm's moving average of the weights, compiled as the model will be; None where the recipe keeps none.

    The recipe's decay is for each 512 images.
    """
    if recipe.ema_decay is None:
        return None
    ema = ModelEmaV3(model, decay=recipe.ema_decay ** (recipe.batch_size / 512))
    ema.module = convert_model(recipe, ema.module, accelerator)
    return ema


def build_optimizer(recipe: Recipe, model: nn.Module) -> Optimizer:
    """timm's AdamW, fused: that one leaves out a step on the device, without the host knowing."""
    return create_optimizer_v2(
        model, "adamw", lr=recipe.peak_learning_rate, weight_decay=recipe.weight_decay, fused=True
    )
