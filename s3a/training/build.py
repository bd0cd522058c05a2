"""What a recipe names, built: model, data, optimizer, schedule, and Accelerate around them."""

import random
from typing import Any

import numpy as np
import timm
import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType, ProjectConfiguration, is_tensorboard_available, is_wandb_available
from timm.data import Mixup, create_transform, resolve_model_data_config
from timm.loss import SoftTargetCrossEntropy
from timm.models import get_pretrained_cfg
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.scheduler.scheduler import Scheduler
from timm.utils import ModelEmaV3
from torch import nn
from torch.optim import Optimizer

from s3a.analysis.cost import copy_to_meta, count_cost
from s3a.data import EvalLoader, ImageData, TrainLoader, load_data
from s3a.models.backbone import Backbone
from s3a.nn.compilation import compile_model
from s3a.nn.s3a import S3A
from s3a.quantization.convert import fake_quantize
from s3a.quantization.schemes import check_float, check_trainable
from s3a.support.errors import unknown
from s3a.training.augmentation import train_transform
from s3a.training.processes import use_cores
from s3a.training.recipe import Recipe
from s3a.training.run_folder import claim_folder
from s3a.weights.hub import create_repository
from s3a.weights.pretrained import PretrainedMixin, load_pretrained


def build(recipe: Recipe) -> dict[str, Any]:
    """The fields of a `Run`, by name. Claims the run's folder late, so that a recipe that cannot run leaves no trace.

    Raises:
        ValueError, FileNotFoundError: for a recipe that cannot run here.
    """
    if not timm.is_model(recipe.model):
        raise unknown("model", recipe.model, timm.list_models())
    check_tracker(recipe.track)
    if recipe.quantize is not None:
        check_trainable(recipe.quantize)
    data = load_data(recipe.data, recipe.data_dir, dataset=recipe.dataset, streaming=recipe.streaming)
    accelerator = build_accelerator(recipe)
    seed_step(recipe.seed, step=0, process=-1)  # the same weights on every process
    model = build_model(recipe, data.label_names)
    check_image_size(model, recipe.image_size)
    data_config = resolve_model_data_config(model)
    channels = data_config["input_size"][0]
    data_config |= {"input_size": (channels, recipe.image_size, recipe.image_size), "crop_pct": recipe.crop_pct}
    train_loader, val_loader = build_loaders(recipe, data, data_config, accelerator)
    shell = copy_to_meta(model)
    if recipe.quantize is not None:
        fake_quantize(model, recipe.quantize)
    model = model.to(accelerator.device)
    ema = build_ema(recipe, model)
    optimizer = create_optimizer_v2(model, "adamw", lr=recipe.peak_learning_rate, weight_decay=recipe.weight_decay)
    scheduler = build_scheduler(recipe, optimizer, train_loader.steps_per_epoch)
    model = prepare_model(recipe, model, accelerator)
    with accelerator.main_process_first():
        lock = claim_folder(recipe) if accelerator.is_main_process else None
    if recipe.push_to_hub and accelerator.is_main_process:
        create_repository(recipe.push_to_hub)  # now, so that a missing right does not show after the last epoch
    accelerator.init_trackers(recipe.run_name, config=recipe.trackable())
    model, optimizer = accelerator.prepare(model, optimizer)
    return {
        "recipe": recipe,
        "folder": recipe.folder,
        "lock": lock,
        "accelerator": accelerator,
        "data": data,
        "data_config": data_config,
        "shell": shell,
        "model": model,
        "optimizer": optimizer,
        "scheduler": scheduler,
        "criterion": build_criterion(recipe),
        "mixup": build_mixup(recipe, len(data.label_names)),
        "ema": ema,
        "train_loader": train_loader,
        "val_loader": val_loader,
    }


def build_accelerator(recipe: Recipe) -> Accelerator:
    """Accelerate for the recipe; ValueError where it and the processes do not go together."""
    folder = str(recipe.folder)
    accelerator = Accelerator(
        mixed_precision=recipe.precision,
        step_scheduler_with_optimizer=False,
        log_with=recipe.track,
        project_config=ProjectConfiguration(project_dir=folder, logging_dir=f"{folder}/tracking"),
    )
    check_processes(recipe, accelerator)
    use_cores(accelerator, recipe.cpu_threads)
    return accelerator


def build_loaders(
    recipe: Recipe, data: ImageData, data_config: dict[str, Any], accelerator: Accelerator
) -> tuple[TrainLoader, EvalLoader]:
    """This process' share of the training and of the validation images."""
    loading = {
        "channels": data_config["input_size"][0],
        "batch_size": recipe.batch_size,
        "process_index": accelerator.process_index,
        "num_processes": accelerator.num_processes,
        "num_workers": recipe.num_workers,
        "pin_memory": accelerator.device.type == "cuda",
    }
    train_loader = TrainLoader(
        data.train,
        train_transform(recipe, data_config),
        accumulate=recipe.accumulate,
        repeats=recipe.repeats,
        seed=recipe.seed,
        **loading,
    )
    return train_loader, EvalLoader(data.val, create_transform(**data_config, is_training=False), **loading)


def build_ema(recipe: Recipe, model: nn.Module) -> ModelEmaV3 | None:
    """timm's average of the weights, or None; its decay is that of the recipe for each 512 images."""
    if recipe.ema_decay is None:
        return None
    return ModelEmaV3(model, decay=recipe.ema_decay ** (recipe.batch_size / 512))


def build_criterion(recipe: Recipe) -> nn.Module:
    """The loss: of labels, or of the mixed ones that `build_mixup` has smoothed."""
    return SoftTargetCrossEntropy() if recipe.mixes else nn.CrossEntropyLoss(label_smoothing=recipe.label_smoothing)


def seed_step(seed: int, step: int, process: int) -> None:
    """Seeds every generator of a process for one step, so that a step's randomness does not depend on those before."""
    entropy = np.random.SeedSequence((seed, step, process + 1))
    state = int(entropy.generate_state(1)[0])
    random.seed(state)
    np.random.seed(state)
    torch.manual_seed(state)


NOT_TAKEN = {
    "drop_path_rate": "--model {model} has no drop path: use --drop-path None",
    "scan": "--model {model} has no sparse scans: leave --scan out, or use an SSViT",
    "size": "--model {model} has no sparse scans to give a size: leave --size out, or use an SSViT",
}


def build_model(recipe: Recipe, label_names: list[str]) -> nn.Module:
    """The recipe's model, with fresh weights or those to fine-tune, which keep their head where the classes agree."""
    model_args = {"drop_path_rate": recipe.drop_path, "scan": recipe.scan, "size": recipe.size}
    given = {name: value for name, value in model_args.items() if value is not None}
    try:
        if recipe.weights is None:
            model = timm.create_model(recipe.model, num_classes=len(label_names), **built_for(recipe), **given)
        else:
            model = load_pretrained(recipe.weights, **given)
    except TypeError as error:
        refused = next((name for name in given if f"'{name}'" in str(error)), None)
        if refused is None:
            raise
        raise ValueError(NOT_TAKEN[refused].format(model=recipe.model)) from error
    check_scans(recipe, model)
    if recipe.weights is not None:
        check_float(model)
        name = model.pretrained_cfg["architecture"]
        if name != recipe.model:
            raise ValueError(f"--weights {recipe.weights} holds a {name}: use --model {name}, or other weights")
        if model.pretrained_cfg.get("label_names") != label_names:
            model.reset_classifier(len(label_names))
    if recipe.grad_checkpointing:
        model.set_grad_checkpointing()
    return model


def built_for(recipe: Recipe) -> dict[str, int]:
    """The side that a model of timm's with one fixed size is built for; nothing for others, which take any."""
    config = get_pretrained_cfg(recipe.model)
    return {"img_size": recipe.image_size} if config is not None and config.fixed_input_size else {}


def check_scans(recipe: Recipe, model: nn.Module) -> None:
    """Raises ValueError for fields that this model would leave unheeded, as some of timm's do with arguments."""
    for field in ("scan", "size"):
        if getattr(recipe, field) is not None and not any(isinstance(module, S3A) for module in model.modules()):
            raise ValueError(NOT_TAKEN[field].format(model=recipe.model))
    if recipe.late_drop_path is not None and not isinstance(model, Backbone):
        raise ValueError(f"--model {recipe.model} cannot change its drop path: use --late-drop-path None")


def check_image_size(model: nn.Module, side: int) -> None:
    """Raises ValueError where the model does not take squares of so many pixels: a forward on the meta device says."""
    try:
        count_cost(model, side, side)
    except ValueError as error:
        raise ValueError(f"--image-size is {side}: {error}") from error


def check_processes(recipe: Recipe, accelerator: Accelerator) -> None:
    """Raises ValueError where the recipe and the processes that Accelerate started do not go together."""
    if accelerator.distributed_type == DistributedType.FSDP:
        if accelerator.device.type != "cuda":
            raise ValueError("FSDP needs CUDA: on this machine leave it out of the accelerate configuration, for DDP")
        if recipe.ema_decay is not None:
            raise ValueError(f"--ema-decay is {recipe.ema_decay}: no average is kept of sharded weights; use None")
    if recipe.precision == "fp16" and accelerator.device.type == "cpu":
        raise ValueError("--precision is fp16, which needs a GPU: use bf16 or no")
    share = recipe.batch_size // (accelerator.num_processes * recipe.accumulate)
    if recipe.mixes and share % 2:
        raise ValueError(
            f"--batch-size is {recipe.batch_size}, {share} images a forward: mixup and cutmix need an even number; "
            "change it, or use --mixup 0 --cutmix 0"
        )


def check_tracker(track: str | None) -> None:
    """Raises ValueError where the tracker is not installed."""
    installed = {"tensorboard": is_tensorboard_available, "wandb": is_wandb_available}
    if track is not None and not installed[track]():
        raise ValueError(f"--track is {track}, which is not installed: pip install {track}")


def prepare_model(recipe: Recipe, model: nn.Module, accelerator: Accelerator) -> nn.Module:
    """SyncBN and compilation, where the recipe and the machine have them."""
    if recipe.sync_batch_norm and accelerator.num_processes > 1 and accelerator.device.type == "cuda":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    if recipe.compile:
        if isinstance(model, PretrainedMixin):
            compile_model(model)
        else:
            model.compile()
    return model


def build_scheduler(recipe: Recipe, optimizer: Optimizer, steps_per_epoch: int) -> Scheduler:
    """timm's cosine with warm-up and cooldown; a function of the epoch or step alone."""
    scheduler, _ = create_scheduler_v2(
        optimizer,
        sched="cosine",
        num_epochs=recipe.epochs,
        cooldown_epochs=recipe.cooldown_epochs,
        warmup_epochs=recipe.warmup_epochs,
        warmup_lr=1e-6,
        min_lr=recipe.min_learning_rate,
        step_on_epochs=recipe.schedule == "epoch",
        updates_per_epoch=steps_per_epoch,
    )
    return scheduler


def build_mixup(recipe: Recipe, num_classes: int) -> Mixup | None:
    """timm's mixup and cutmix, which smooth the labels too."""
    if not recipe.mixes:
        return None
    return Mixup(
        mixup_alpha=recipe.mixup,
        cutmix_alpha=recipe.cutmix,
        switch_prob=recipe.mixup_switch,
        label_smoothing=recipe.label_smoothing,
        num_classes=num_classes,
    )
