"""Official checkpoints measured beside what their papers print: which are there, what they scored, and the table."""

import math
from collections.abc import Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import timm
from huggingface_hub.utils.sha import sha_fileobj

from s3a.comparison.report import Table
from s3a.data.imagenet import ARCHIVES, NUM_CLASSES, NUM_REAL, SETS, ImageNetSet
from s3a.published import PUBLISHED
from s3a.robustness.corruptions import COMMON
from s3a.robustness.imagenet import Figures, summarise_subsets
from s3a.weights.card import OfficialFacts
from s3a.weights.official import Checkpoint, build_on_meta, find_key_table, list_fitting, read_checkpoint

ENDINGS = (".pth", ".pt", ".bin", ".ckpt", ".tar")
ROUNDING = 0.05
"""Percent that a published figure may be off by, with one digit behind the point."""
SHARE_CHANGED = 0.02
"""Share of the images that another decoder, resizing or arithmetic may decide otherwise, as often for better as for
worse. An assumption; see docs/evidence.md."""


@dataclass(frozen=True)
class OfficialWeights:
    """A checkpoint as the weights of a model for images of one size.

    Attributes:
        path: of its file.
        sha256: of the file.
        model: its name in timm's registry.
        image_size: side in pixels.
        name: for its folder and repository: that of the model, with the size where it is not the model's own, and with
            the beginning of the file's hash where another file has that name.
    """

    path: Path
    sha256: str
    model: str
    image_size: int
    name: str

    @property
    def key(self) -> str:
        """What tells its results from those of others."""
        return f"{self.sha256}/{self.image_size}"


# --------------------------------------------------------------------------------------------------------
# What is there
# --------------------------------------------------------------------------------------------------------


def find_checkpoints(folder: Path) -> tuple[list[OfficialWeights], list[str]]:
    """The official checkpoints in a folder and those below it, and a line for every other file that may be one.

    A checkpoint is known by its keys and shapes. One that does not say its image size, in the trainer's options or the
    file's name, is listed with every size that its model has published figures of.

    Raises:
        FileNotFoundError: where there is none.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"--checkpoints {folder} does not exist: give the folder of the downloaded .pth files")
    found: dict[str, OfficialWeights] = {}
    skipped = []
    for path in sorted(path for path in folder.rglob("*") if path.suffix in ENDINGS and path.is_file()):
        try:
            weights = identify(path, {each.name for each in found.values()})
        except ValueError as error:
            skipped.append(str(error))
            continue
        if weights[0].key in found:
            skipped.append(f"{path} is the same file as {found[weights[0].key].path}")
        else:
            found |= {each.key: each for each in weights}
    if not found:
        others = f": {'; '.join(skipped[:3])}" if skipped else ""
        raise FileNotFoundError(
            f"--checkpoints {folder} has no official checkpoint of SSViT, SViT or VVT among its files "
            f"*{', *'.join(ENDINGS)}{others}"
        )
    return list(found.values()), skipped


def identify(path: Path, taken: Container[str]) -> list[OfficialWeights]:
    """The weights in a file, once for each image size that they may be for; ValueError where it is no such file.

    Args:
        taken: names of other weights.
    """
    checkpoint = read_checkpoint(path)
    fitting = list_fitting(checkpoint.state)
    if not fitting:
        raise ValueError(f"{path} has other keys or shapes than the official checkpoints of SSViT, SViT and VVT")
    model = fitting[0]
    classes = build_on_meta(model, checkpoint.state, find_key_table(model)).num_classes
    if classes != NUM_CLASSES:
        raise ValueError(f"{path} is {model} with {classes} classes, not ImageNet's 1,000")
    with path.open("rb") as file:
        sha256 = sha_fileobj(file).hex()
    weights = []
    for size in list_image_sizes(path, checkpoint, model):
        name = model if size == find_own_size(model) else f"{model}_{size}"
        weights.append(OfficialWeights(path, sha256, model, size, f"{name}-{sha256[:8]}" if name in taken else name))
    return weights


def list_image_sizes(path: Path, checkpoint: Checkpoint, model: str) -> list[int]:
    """The side that a checkpoint is for, by its own word or its file's name; else all that have published figures."""
    if checkpoint.image_size is not None:
        return [checkpoint.image_size]
    known = list(PUBLISHED[model].top1) if model in PUBLISHED else []
    named = [size for size in known if str(size) in path.stem]
    return named[:1] or known or [find_own_size(model)]


def find_own_size(model: str) -> int:
    """The side of the images that a model is made for."""
    config = timm.get_pretrained_cfg(model)
    assert config is not None  # every model with official checkpoints has one
    return config.input_size[-1]


def find_sets(robustness: Path) -> dict[ImageNetSet, Path]:
    """The folders of the robustness sets in a folder, under the names that they have as distributed.

    Raises:
        FileNotFoundError: where there is none.
    """
    if not robustness.is_dir():
        raise FileNotFoundError(f"--robustness {robustness} does not exist: give the folder with the sets")
    folders = {path.name.lower().replace("_", "-"): path for path in robustness.glob("*") if path.is_dir()}
    found: dict[ImageNetSet, Path] = {}
    for name, rule in SETS.items():
        if name in ("imagenet", "imagenet-real"):
            continue
        fitting = [folders[each.lower()] for each in (*rule.folders, name) if each.lower() in folders]
        if fitting:
            found[name] = fitting[0]
    if {*COMMON, *ARCHIVES} & {*folders} and "imagenet-c" not in found:
        found["imagenet-c"] = robustness
    if not found:
        names = ", ".join(rule.folders[0] for name, rule in SETS.items() if name not in ("imagenet", "imagenet-real"))
        raise FileNotFoundError(f"--robustness {robustness} has none of the folders {names}: unpack the sets there")
    return found


# --------------------------------------------------------------------------------------------------------
# What was measured
# --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Measured:
    """A score of a checkpoint beside the one that is published, both in percent.

    Attributes:
        title: of the set.
        images: that were scored.
        is_complete: whether these are all that the set has as distributed.
        score: top-1, or of ImageNet-C the mean corruption error.
        published: None where the paper has no figure.
    """

    weights: OfficialWeights
    name: ImageNetSet
    images: int
    is_complete: bool
    score: float
    published: float | None

    @property
    def title(self) -> str:
        """The set and the score."""
        return f"{SETS[self.name].title}, {'mCE' if self.name == 'imagenet-c' else 'top-1'}"

    @property
    def difference(self) -> float | None:
        """Percent that it lies above the published score."""
        return None if self.published is None else self.score - self.published

    @property
    def verdict(self) -> str:
        """What the difference means, in a few words."""
        if self.difference is None:
            return "not published"
        if not self.is_complete:
            return f"not the whole set: {self.images:,} of {SETS[self.name].num_images:,} images"
        allowed = compute_allowance(self.images)
        beyond = abs(self.difference) > allowed
        return f"{'BEYOND' if beyond else 'within'} ± {allowed:.2f}"


def compute_allowance(num_images: int) -> float:
    """Percent by which two evaluations of the same weights on the same images may differ without meaning.

    Half a unit of the last published digit, and two standard deviations of the sum of single decisions that fall
    otherwise: of n images a share of 2 % changes sides, each way with the same chance.
    """
    return ROUNDING + 100 * 2 * math.sqrt(SHARE_CHANGED / num_images)


def compare_with_published(weights: OfficialWeights, name: ImageNetSet, figures: Mapping[str, Figures]) -> Measured:
    """A score of all subsets of a set, beside the published one."""
    summary = summarise_subsets(name, figures)
    model = PUBLISHED.get(weights.model)
    published = None
    if model is not None and name == "imagenet":
        published = model.top1.get(weights.image_size)
    elif model is not None and weights.image_size == min(model.top1):
        published = model.robustness.get(name)
    sizes = {"imagenet-c": 75 * SETS["imagenet-c"].num_images, "imagenet-real": NUM_REAL}
    return Measured(
        weights=weights,
        name=name,
        images=summary["images"],
        is_complete=summary["images"] == sizes.get(name, SETS[name].num_images),
        score=100 * summary["mce" if name == "imagenet-c" else "top1"],
        published=published,
    )


def choose_sizes(rows: Iterable[Measured]) -> tuple[list[OfficialWeights], list[str]]:
    """For each checkpoint the weights at one size, and a line where the nearest published figure decided it.

    Args:
        rows: of ImageNet, of each checkpoint at every size that it may be for.
    """
    by_file: dict[str, list[Measured]] = {}
    for row in rows:
        by_file.setdefault(row.weights.sha256, []).append(row)
    chosen, notes = [], []
    for own in by_file.values():
        best = min(own, key=lambda row: math.inf if row.difference is None else abs(row.difference))
        chosen.append(best.weights)
        if len(own) > 1:
            tried = ", ".join(f"{row.weights.image_size} px {row.score:.2f} % ({row.published} %)" for row in own)
            partly = "" if best.is_complete else f", on {best.images:,} images alone"
            notes.append(
                f"{best.weights.path} does not say its image size: {best.weights.image_size} px is nearest to what is "
                f"published ({tried}{partly})"
            )
    return chosen, notes


def make_table(rows: Sequence[Measured]) -> Table:
    """A line for each checkpoint and set."""
    table = [["checkpoint", "model", "px", "set", "measured (%)", "published (%)", "difference", "verdict"]]
    for row in rows:
        difference = "-" if row.difference is None or not row.is_complete else f"{row.difference:+.2f}"
        table.append(
            [
                row.weights.path.name,
                row.weights.model,
                str(row.weights.image_size),
                row.title,
                f"{row.score:.2f}",
                "-" if row.published is None else f"{row.published:.1f}",
                difference,
                row.verdict,
            ]
        )
    return table


def describe_official(weights: OfficialWeights, rows: Iterable[Measured]) -> OfficialFacts:
    """Where weights come from and what they scored on whole sets, for their card."""
    own = [row for row in rows if row.weights == weights and row.is_complete]
    return OfficialFacts(
        checkpoint=weights.path.name,
        sha256=weights.sha256,
        source=PUBLISHED[weights.model].source if weights.model in PUBLISHED else None,
        scores={row.title: row.score / 100 for row in own},
        published={row.title: row.published / 100 for row in own if row.published is not None},
    )
