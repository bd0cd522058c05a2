"""What is compared: models, or one model under several scans, and the recipe of each of their runs."""

import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import timm
import torch

from s3a.analysis.cost import Cost
from s3a.geometry import Scan, find_scan_pattern
from s3a.nn.s3a import S3A
from s3a.support.errors import make_unknown_error
from s3a.training.model import build_model, count_image_cost
from s3a.training.recipe import ClassificationRecipe

Equal = Literal["epochs", "compute"]
PUBLISHED_SCAN = "alternate"


@dataclass(frozen=True, kw_only=True)
class Candidate:
    """A model, with another scan or size than its own where these are given."""

    model: str
    scan: str | None = None
    size: int | None = None

    @property
    def label(self) -> str:
        """Its name in tables."""
        size = None if self.size is None else f"size {self.size}"
        return " ".join(part for part in (self.model, self.scan, size) if part is not None)

    def drop_defaults(self) -> "Candidate":
        """The same candidate without a scan or size that its model has anyway: other comparisons can share its runs."""
        with torch.device("meta"):
            model = timm.create_model(self.model)
        sizes = {module.size for module in model.modules() if isinstance(module, S3A)}
        return replace(
            self,
            scan=None if self.scan == PUBLISHED_SCAN else self.scan,
            size=None if sizes == {self.size} else self.size,
        )


@dataclass(frozen=True, kw_only=True)
class Contender:
    """A candidate with its cost and the recipe that it is trained by.

    Attributes:
        folder: the name of the folder of its runs.
        recipe: of all its runs, but for seed and output folder.
        cost: of one image of the recipe's size.
    """

    candidate: Candidate
    folder: str
    recipe: ClassificationRecipe
    cost: Cost

    @property
    def label(self) -> str:
        """Its name in tables."""
        return self.candidate.label

    def make_recipe(self, runs: Path, seed: int) -> ClassificationRecipe:
        """The recipe of the run with this seed, whose folder lies under `runs`."""
        return replace(self.recipe, seed=seed, output_dir=runs / self.folder / f"seed-{seed}")

    def count_training_gmacs(self, num_images: int) -> float:
        """The forward GMACs of a run on `num_images` images, counted whole; backwards cost in proportion."""
        return self.recipe.total_epochs * num_images * self.cost.gmacs


def list_candidates(models: Iterable[str], scans: Iterable[str], sizes: Iterable[int]) -> list[Candidate]:
    """Every model with every scan and every size.

    Raises:
        ValueError: for no model, a name that is unknown, or one that is given twice.
    """
    models, scans, sizes = tuple(models), tuple(scans), tuple(sizes)
    if not models:
        raise ValueError("no model is given: name those to compare, such as ssvit_nano svit_nano vvt_nano")
    for name in models:
        if not timm.is_model(name):
            raise make_unknown_error("model", name, timm.list_models())
    for scan in scans:
        find_scan_pattern(scan)
    for kind, given in (("model", models), ("--scan", scans), ("--size", sizes)):
        twice = next((value for value in given if given.count(value) > 1), None)
        if twice is not None:
            raise ValueError(f"{kind} {twice} is given twice: name each once")
    combined = itertools.product(models, scans or (None,), sizes or (None,))
    return [Candidate(model=model, scan=scan, size=size) for model, scan, size in combined]


def make_contenders(
    candidates: list[Candidate],
    recipe: ClassificationRecipe,
    label_names: list[str],
    *,
    equal: Equal = "epochs",
    reference: str | None = None,
) -> list[Contender]:
    """Counts what every candidate costs, and gives it the recipe of its runs.

    Args:
        recipe: of every run; the candidate fills in model, scan and size.
        label_names: of the data.
        equal: "epochs" trains all as long as the recipe says; "compute" gives all the GMACs of the reference.
        reference: the label of a candidate; None is the first.

    Raises:
        ValueError: for a candidate that cannot be trained by the recipe, or a reference that is none of them.
    """
    labels = [candidate.label for candidate in candidates]
    if reference is not None and reference not in labels:
        raise make_unknown_error("reference", reference, labels)
    costs = []
    for candidate in candidates:
        own = replace(recipe, model=candidate.model, scan=candidate.scan, size=candidate.size)
        costs.append(count_image_cost(build_model(own, len(label_names)), recipe.image_size, recipe.image_size))
    reference_gmacs = costs[labels.index(reference or labels[0])].gmacs
    contenders = []
    for candidate, cost in zip(candidates, costs, strict=True):
        plain = candidate.drop_defaults()
        own = replace(recipe, model=plain.model, scan=plain.scan, size=plain.size)
        own = scale_epochs(own, reference_gmacs / cost.gmacs) if equal == "compute" else own
        folder = plain.label.replace(" ", "-")
        contenders.append(Contender(candidate=candidate, folder=folder, recipe=own, cost=cost))
    return contenders


def list_equal_scans(contenders: Iterable[Contender]) -> list[str]:
    """A line for each contender that differs from one before it in nothing but the names of its scans.

    On small maps several scans come down to the same passes: at 32 px `ssvit_nano` has maps of 8, 4 and 2 tokens a
    side, where fixing the window and fixing the anchors are the same.
    """
    first: dict[object, str] = {}
    lines = []
    for contender in contenders:
        side = contender.recipe.image_size
        passes = list_passes(contender.candidate, side)
        other = first.setdefault((contender.candidate.model, passes), contender.label)
        if passes and other != contender.label:
            lines.append(
                f"{contender.label} runs the same passes as {other} at {side} px: equal seeds give equal weights; "
                "compare them with a larger --image-size"
            )
    return lines


def list_passes(candidate: Candidate, image_size: int) -> tuple[Scan, ...]:
    """The passes of each block with S3A, for an image of that side in pixels; empty for a model without any."""
    config = timm.get_pretrained_cfg(candidate.model)
    channels = 3 if config is None else config.input_size[0]
    found: list[Scan] = []
    given = {name: value for name in ("scan", "size") if (value := getattr(candidate, name)) is not None}
    with torch.device("meta"):
        model = timm.create_model(candidate.model, **given).eval()
    attentions = [module for module in model.modules() if isinstance(module, S3A)]
    for attention in attentions:
        attention.register_forward_hook(lambda module, args, output: found.append(module.scan(*args[0].shape[1:3])))
    if attentions:
        model(torch.empty(1, channels, image_size, image_size, device="meta"))
    return tuple(found)


def scale_epochs(recipe: ClassificationRecipe, factor: float) -> ClassificationRecipe:
    """A training `factor` times as long, to the nearest whole epoch and at least one; its phases keep their shares.

    Half of 20 epochs with 4 of warm-up, and 4 more of cooldown: 10 with 2, and 2 more.
    """
    total = max(1, round(factor * recipe.total_epochs))
    cooldown = min(round(factor * recipe.cooldown_epochs), total - 1)
    return replace(recipe.change_epochs(total - cooldown), cooldown_epochs=cooldown)
