"""Evaluation on ImageNet's sets: which classes are told apart, and which labels count as right."""

from collections.abc import Sequence
from typing import Any, cast

import torch
from timm.data import create_transform
from torch import Tensor, nn

from s3a.data import Batch
from s3a.data.batches import Transform
from s3a.data.imagenet import NUM_CLASSES, ImageNetData, is_name_of
from s3a.training.model import TimmModel
from s3a.training.tasks.classification import Classification, count_correct
from s3a.training.tasks.task import Measurement


class ImageNetClassification(Classification):
    """A classifier of ImageNet's 1,000 classes on one of `s3a.data.imagenet`; for evaluation alone.

    Of a set with fewer classes their logits are taken before the softmax and the largest is found, as the authors of
    ImageNet-A and ImageNet-R do: an image cannot be given a class that the set does not have.

    The scores are those of classification. With several right labels an image is right if the prediction is one of
    them (as in timm's `RealLabelsImagenet`), and the loss is of their probabilities' sum; `clean_top1` and `clean_top5`
    are those by ImageNet's own label of the same images.
    """

    def __init__(self, data: ImageNetData) -> None:
        super().__init__(data)
        self.imagenet = data
        self.is_right: Tensor | None = None
        if data.real_labels is not None:
            self.is_right = torch.zeros(len(data.real_labels), NUM_CLASSES, dtype=torch.bool)
            for row, labels in enumerate(data.real_labels):
                self.is_right[row, list(labels)] = True

    def make_eval_transform(self, data_config: dict[str, Any]) -> Transform:
        crop_pct = 1.0 if self.imagenet.is_cropped else data_config["crop_pct"]
        transform: Transform = create_transform(
            **{**data_config, "crop_pct": crop_pct}, is_training=False, normalize=False
        )
        return transform

    def measure(self, model: nn.Module, batch: Batch) -> Measurement:
        logits = model(batch.images).float()
        if self.is_right is None:
            classes = torch.as_tensor(list(self.imagenet.classes), device=logits.device)
            return Measurement(count_correct(logits[:, classes], number_within(batch.labels, classes)))
        is_right = self.is_right[batch.indices.cpu().clamp(min=0)].to(logits.device) & (batch.labels >= 0)[:, None]
        counts = count_any_correct(logits, is_right)
        if not self.imagenet.has_labels:
            return Measurement(counts)
        return Measurement(torch.cat([counts, count_correct(logits, batch.labels)]))

    def compute_scores(self, sums: Sequence[float], num_images: int, records: Sequence[Any]) -> dict[str, float]:
        scores = super().compute_scores(sums[:3], num_images, records)
        if len(sums) > 3:
            scores |= {f"clean_{name}": sums[index] / max(num_images, 1) for name, index in (("top1", 3), ("top5", 4))}
        return scores

    def check_weights(self, model: nn.Module, *, other_label_names: bool = False) -> None:
        """Raises ValueError for a model that does not know ImageNet's classes in their order."""
        if model.num_classes != NUM_CLASSES:
            raise ValueError(
                f"the weights know {model.num_classes} classes: on ImageNet's sets those are evaluated that were "
                "trained on its 1,000 classes"
            )
        known = cast(TimmModel, model).pretrained_cfg.get("label_names") or ()
        other = next((number for number, name in enumerate(known) if not is_name_of(name, number)), None)
        if other is not None and not other_label_names:
            raise ValueError(
                f"the weights know a class {known[other]!r} where ImageNet has {self.data.label_names[other]!r}: give "
                "weights that were trained on ImageNet, or, where only the names differ, --other-label-names"
            )


def number_within(labels: Tensor, classes: Tensor) -> Tensor:
    """The place of each label among rising `classes`; -1 stays -1."""
    return torch.where(labels >= 0, torch.searchsorted(classes, labels.clamp(min=0)), labels)


def count_any_correct(logits: Tensor, is_right: Tensor) -> Tensor:
    """How many images have a right class first and among the first 5, and the sum of -log of their probability.

    Args:
        logits: [n, classes].
        is_right: [n, classes] bool; a row without a right class is no image.
    """
    hits = is_right.gather(1, logits.topk(5, dim=1).indices)  # [n, 5]
    losses = logits.logsumexp(1) - logits.masked_fill(~is_right, -torch.inf).logsumexp(1)
    is_image = is_right.any(1)
    return torch.stack([hits[:, 0].sum(), hits.any(1).sum(), losses[is_image].sum()])
