"""ImageNet's sets, subset by subset: each subset is evaluated for itself, and the scores of a set are made of them."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, cast

from s3a.data.imagenet import (
    SETS,
    SEVERITIES,
    ImageNetData,
    ImageNetSet,
    check_set_folder,
    find_corruption_folders,
    list_classes,
)
from s3a.robustness.corruptions import ALL, COMMON, compute_corruption_errors, compute_mce
from s3a.support.command_line import print_progress, read_rank
from s3a.training.run_folder import write_whole

CLEAN_IMAGES = "clean"
RESULTS_NAME = "results.json"
Figures = Mapping[str, Any]
"""What `Evaluation.to_json` gives: top1, top5, loss, images, images_per_second, and unreadable where there are some.
Kept figures have the fingerprint of the images beside it."""


@dataclass(frozen=True)
class Subset:
    """Images that are evaluated in one go, such as those of one corruption and severity.

    Attributes:
        name: of the set, or CORRUPTION/SEVERITY, or clean.
        loader: the function of `s3a.data.imagenet_images` that loads it.
        arguments: of that function.
    """

    name: str
    loader: str
    arguments: Mapping[str, Any]

    def load(self) -> ImageNetData:
        """The images; for errors see `load_imagenet`."""
        from s3a.data import imagenet_images  # noqa: PLC0415  datasets is slow to import

        return cast(ImageNetData, getattr(imagenet_images, self.loader)(**self.arguments))


def list_subsets(
    name: ImageNetSet, data_dir: Path | None = None, *, dataset: str | None = None, imagenet: Path | None = None
) -> list[Subset]:
    """The subsets of a set, and ImageNet's own images of the same classes where their folder is given.

    Args:
        data_dir, dataset: see `load_imagenet`.
        imagenet: the folder with ImageNet's validation images.

    Folders are checked before anything is measured: whether they are there, and what their classes are.

    Raises:
        FileNotFoundError: for folders that are missing, such as those of a corruption or severity of ImageNet-C.
        ValueError: for options that the set does not take, and folders of other classes.
    """
    if imagenet is not None and name in ("imagenet", "imagenet-real"):
        raise ValueError(
            f"--imagenet is {str(imagenet)!r} and --data is {name}, which is of ImageNet's own images: leave it out"
        )
    subsets = [Subset(name, "load_imagenet", {"name": name, "data_dir": data_dir, "dataset": dataset})]
    if name == "imagenet-c":
        if data_dir is None or dataset is not None:
            raise ValueError(
                "--data imagenet-c needs --data-dir DIR and takes no --dataset: it is read from its folders "
                "CORRUPTION/SEVERITY/CLASS"
            )
        subsets = list_corruption_subsets(data_dir)
    elif data_dir is not None and name != "imagenet-real":  # whose files may lie loose
        check_set_folder(name, data_dir)
    if imagenet is not None:
        check_set_folder("imagenet", imagenet)
        classes = None if SETS[name].indices is None else list_classes(name)
        clean = {"name": "imagenet", "data_dir": imagenet, "classes": classes}
        subsets.append(Subset(CLEAN_IMAGES, "load_imagenet", clean))
    return subsets


def list_corruption_subsets(data_dir: Path) -> list[Subset]:
    """The subsets of ImageNet-C; those of its four extra corruptions only where they are there."""
    folders = find_corruption_folders(data_dir, ALL)
    missing = [name for name in COMMON if (name, SEVERITIES[0]) not in folders]
    if missing:
        raise FileNotFoundError(
            f"data folder {str(data_dir)!r} has no folder {', '.join(missing)} of ImageNet-C: mCE is the mean over all "
            "15 corruptions; unpack noise.tar, blur.tar, weather.tar and digital.tar there"
        )
    for folder in folders.values():
        check_set_folder("imagenet-c", folder)
    return [
        Subset(f"{name}/{severity}", "load_corruption", {"folder": path}) for (name, severity), path in folders.items()
    ]


@dataclass
class ImageNetResults:
    """What was measured so far on ImageNet's sets, as a file that a later call goes on with.

    Attributes:
        precision: of the evaluation.
        figures: key of the weights -> set -> subset. Where the fingerprint of the images changes, they are measured
            anew.
        machine: that measured last, with the versions of packages.
    """

    precision: str
    figures: dict[str, dict[str, dict[str, Figures]]] = field(default_factory=dict)
    machine: dict[str, Any] = field(default_factory=dict)

    def get_figures(self, key: str, name: ImageNetSet) -> dict[str, Figures]:
        """Those of the subsets of a set that have been measured."""
        return self.figures.setdefault(key, {}).setdefault(name, {})

    def write(self, folder: Path) -> None:
        """Writes the file, which a reader finds whole at any time."""
        write_whole(folder / RESULTS_NAME, json.dumps(asdict(self), indent=2) + "\n")


def open_imagenet_results(folder: Path, precision: str) -> ImageNetResults:
    """What a folder holds to go on with, or an empty result; the folder is made.

    Raises:
        ValueError: where the file is no result, or of another precision.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / RESULTS_NAME
    if not path.is_file():
        return ImageNetResults(precision)
    try:
        found = ImageNetResults(**json.loads(path.read_text(encoding="utf-8")))
    except (json.JSONDecodeError, UnicodeDecodeError, TypeError) as error:
        raise ValueError(
            f"{path} is no result on ImageNet's sets ({error}): delete it, or give another --output-dir"
        ) from error
    if found.precision != precision:
        raise ValueError(
            f"{path} was measured with --precision {found.precision} and not {precision}: give another --output-dir"
        )
    return found


def measure_subsets(
    results: ImageNetResults,
    name: ImageNetSet,
    subsets: Sequence[Subset],
    evaluators: Mapping[str, Callable[[ImageNetData], Figures]],
    folder: Path | None,
) -> None:
    """Measures what the results do not have yet, and writes them after each evaluation.

    Args:
        evaluators: by key of the weights; a subset is loaded once for all of them.
        folder: where the results are kept; None keeps them nowhere.
    """
    for index, subset in enumerate(subsets, start=1):
        data = subset.load()
        for key, evaluate in evaluators.items():
            figures = results.get_figures(key, name)
            if figures.get(subset.name, {}).get("fingerprint") == data.fingerprint:
                continue
            if len(subsets) > 1:
                print_progress(f"{subset.name} ({index} of {len(subsets)})")
            figures[subset.name] = {**evaluate(data), "fingerprint": data.fingerprint}
            if folder is not None and read_rank() == 0:
                results.write(folder)


def summarise_subsets(name: ImageNetSet, figures: Mapping[str, Figures]) -> dict[str, Any]:
    """One flat object of the scores of a set, all fractions of 1.

    Of ImageNet-C the scores are means over its 75 subsets, with mce, and by corruption the errors of each severity and
    their quotient by AlexNet's. Where ImageNet was given, clean_top1, clean_top5 and clean_images are its own.

    Args:
        figures: of each subset, by name.
    """
    clean = figures.get(CLEAN_IMAGES, {})
    summary = summarise_corruptions(figures) if name == "imagenet-c" else dict(figures[name])
    summary.pop("fingerprint", None)
    if SETS[name].indices is not None:
        summary["classes"] = len(list_classes(name))
    return summary | {f"clean_{key}": clean[key] for key in ("top1", "top5", "images") if key in clean}


def summarise_corruptions(figures: Mapping[str, Figures]) -> dict[str, Any]:
    """The scores of ImageNet-C; its extra corruptions count in none of the means."""
    there = [name for name in ALL if f"{name}/{SEVERITIES[0]}" in figures]
    errors = {name: [1 - figures[f"{name}/{severity}"]["top1"] for severity in SEVERITIES] for name in there}
    common = {name: errors[name] for name in COMMON}
    counted = [figures[f"{name}/{severity}"] for name in COMMON for severity in SEVERITIES]
    images = sum(subset["images"] for subset in counted)
    seconds = sum(subset["images"] / subset["images_per_second"] for subset in counted)
    unreadable = [image for subset in counted for image in subset.get("unreadable", ())]
    return {
        "mce": compute_mce(common),
        **{key: fmean(subset[key] for subset in counted) for key in ("top1", "top5", "loss")},
        "images": images,
        "images_per_second": round(images / seconds, 1),
        "corruption_errors": compute_corruption_errors(common),
        "errors": errors,
        **({"unreadable": unreadable} if unreadable else {}),
    }
