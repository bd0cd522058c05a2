"""Top-1 on corrupted images, of several weights at a time: an image is corrupted once for all that see it alike."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import fmean
from typing import Any, cast

import numpy as np
import torch
from accelerate import Accelerator
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from s3a.data import Batch, ImageData
from s3a.data.batches import Transform
from s3a.data.decode import choose_mode
from s3a.data.images import MapImages
from s3a.robustness.images import SMALLEST, CorruptedImages, Part, make_tensor_transform
from s3a.training.evaluation import check_unreadable, choose_task, evaluate, make_eval_loader
from s3a.training.tasks.classification import Classification, count_correct
from s3a.training.tasks.task import Measurement
from s3a.weights.folder import hash_weights, load_folder
from s3a.weights.pretrained import download_weights, load_pretrained


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """Weights that are evaluated.

    Attributes:
        path: as the user gave it: a folder, or ORG/NAME on the Hub.
        digest: of the files with tensors and configuration: other weights under the same path have another one.
        data_config: timm's preprocessing keys.
    """

    path: str
    digest: str
    model: nn.Module
    data_config: Mapping[str, Any]


def load_candidate(path: str, data: ImageData, *, other_label_names: bool = False) -> Candidate:
    """The weights of a folder or Hub repository, in evaluation mode on the CPU.

    Args:
        other_label_names: let the data call the classes otherwise than the weights do, in the same order.

    Raises:
        FileNotFoundError, ValueError: where they cannot be loaded, are of no classifier, know other classes than the
            data has, or take images that are too small to be corrupted.
    """
    if Path(path).exists():
        folder, model = Path(path), load_pretrained(path)
    else:
        folder = download_weights(path, None)
        model = load_folder(folder, path)
    try:
        if choose_task(model) is not Classification:
            raise ValueError("they are no classifier's, and corruptions are measured by top-1: take a classifier's")
        Classification(data).check_weights(model, other_label_names=other_label_names)
        data_config = resolve_model_data_config(model)
        height, width = data_config["input_size"][1:]
        if min(height, width) < SMALLEST:
            raise ValueError(
                f"they take images of {height} x {width} pixels, and corruptions need {SMALLEST} x {SMALLEST} or more: "
                f"take weights that were trained with --image-size {SMALLEST}"
            )
    except ValueError as error:
        raise ValueError(f"--weights {path}: {error}") from error
    return Candidate(path=path, digest=hash_weights(folder), model=model, data_config=data_config)


def group_by_preprocessing(candidates: Sequence[Candidate]) -> list[list[Candidate]]:
    """The candidates that see the same images, together."""
    groups: dict[str, list[Candidate]] = {}
    for candidate in candidates:
        groups.setdefault(json.dumps(candidate.data_config, sort_keys=True, default=str), []).append(candidate)
    return list(groups.values())


class SideBySide(nn.Module):
    """Classifiers that see the same images: from [batch, channels, height, width] to the logits of each."""

    def __init__(self, models: Sequence[nn.Module]) -> None:
        super().__init__()
        self.models = nn.ModuleList(models)

    def forward(self, images: Tensor) -> list[Tensor]:
        return [model(images) for model in self.models]


class SideBySideClassification(Classification):
    """Top-1 of each classifier in `SideBySide`, as `top1 of NAME`, and the mean of all, by which none is ranked."""

    def __init__(self, data: ImageData, names: Sequence[str]) -> None:
        super().__init__(data)
        self.names = names

    def measure(self, model: nn.Module, batch: Batch) -> Measurement:
        return Measurement(torch.cat([count_correct(logits.float(), batch.labels) for logits in model(batch.images)]))

    def compute_scores(self, sums: Sequence[float], num_images: int, records: Sequence[Any]) -> dict[str, float]:
        each = np.reshape(sums, (len(self.names), -1)).tolist()  # [models, top-1, top-5 and loss]
        scores: dict[str, float] = {}
        for name, its_sums in zip(self.names, each, strict=True):
            own = super().compute_scores(its_sums, num_images, records)
            scores |= {f"{score} of {name}": value for score, value in own.items()}
        return {"top1": fmean(scores[f"top1 of {name}"] for name in self.names), **scores}


@dataclass(frozen=True, kw_only=True)
class Conditions:
    """What is evaluated on, and how.

    Attributes:
        rows: of the validation images, [n] int64.
        seed: of the noise.
        batch_size: images at a time, over all processes.
        num_workers: processes that corrupt; 0 does it in this one.
        max_bad_images: share of the images that may be unreadable; the scores leave them out.
    """

    data: ImageData
    rows: np.ndarray
    seed: int
    batch_size: int
    num_workers: int = 0
    max_bad_images: float = 0.0

    def __post_init__(self) -> None:
        if not isinstance(self.data.val, MapImages):
            raise ValueError("corruptions need images that can be read in any order: leave --streaming out")


@dataclass(frozen=True, kw_only=True)
class PartScores:
    """What several weights scored on a part.

    Attributes:
        top1: fractions of 1, by the digest of the weights.
        unreadable: the names of images that could not be read, and that no score counts.
    """

    top1: dict[str, float]
    unreadable: list[str]


def evaluate_part(
    candidates: Sequence[Candidate],
    part: Part,
    conditions: Conditions,
    accelerator: Accelerator,
    *,
    stop: Callable[[], bool] = lambda: False,
) -> PartScores | None:
    """Evaluates candidates that share their preprocessing on corrupted images; all processes call this together.

    Args:
        candidates: with models on the accelerator's device.
        stop: whether this process wants to stop. If any does, all return None.

    Raises:
        ValueError: where too many images cannot be read, or a loss is not finite.
    """
    data_config = dict(candidates[0].data_config)
    channels, height, width = data_config["input_size"]
    data = conditions.data
    task = SideBySideClassification(data, [candidate.path for candidate in candidates])
    images = CorruptedImages(
        cast(MapImages, data.val),
        conditions.rows,
        cast(Transform, task.make_eval_transform(data_config)),
        choose_mode(channels),
        part,
        conditions.seed,
    )
    loader = make_eval_loader(
        replace(data, val=images),
        make_tensor_transform(height, width),
        accelerator,
        data_config=data_config,
        batch_size=conditions.batch_size,
        num_workers=conditions.num_workers,
    )
    model = SideBySide([candidate.model for candidate in candidates])
    found = evaluate(model, task, loader, accelerator, stop=stop, progress=accelerator.is_main_process)
    if found is None:
        return None
    check_unreadable(found.unreadable, int(conditions.max_bad_images * len(conditions.rows)))
    return PartScores(
        top1={candidate.digest: found.scores[f"top1 of {candidate.path}"] for candidate in candidates},
        unreadable=list(found.unreadable),
    )
