"""ImageNet's sets, part by part: each part is evaluated for itself, and the scores of a set are made of them."""

from collections.abc import Mapping
from dataclasses import dataclass
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

CLEAN = "clean"
Figures = Mapping[str, Any]
"""What `Evaluation.to_json` gives: top1, top5, loss, images, images_per_second, and unreadable where there are some."""


@dataclass(frozen=True)
class Part:
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


def list_parts(
    name: ImageNetSet, data_dir: Path | None = None, *, dataset: str | None = None, imagenet: Path | None = None
) -> list[Part]:
    """The parts of a set, and ImageNet's own images of the same classes where their folder is given.

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
    parts = [Part(name, "load_imagenet", {"name": name, "data_dir": data_dir, "dataset": dataset})]
    if name == "imagenet-c":
        if data_dir is None or dataset is not None:
            raise ValueError(
                "--data imagenet-c needs --data-dir DIR and takes no --dataset: it is read from its folders "
                "CORRUPTION/SEVERITY/CLASS"
            )
        parts = list_corruption_parts(data_dir)
    elif data_dir is not None and name != "imagenet-real":  # whose files may lie loose
        check_set_folder(name, data_dir)
    if imagenet is not None:
        check_set_folder("imagenet", imagenet)
        classes = None if SETS[name].indices is None else list_classes(name)
        clean = {"name": "imagenet", "data_dir": imagenet, "classes": classes}
        parts.append(Part(CLEAN, "load_imagenet", clean))
    return parts


def list_corruption_parts(data_dir: Path) -> list[Part]:
    """The parts of ImageNet-C; those of its four extra corruptions only where they are there."""
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
        Part(f"{name}/{severity}", "load_corruption", {"folder": path}) for (name, severity), path in folders.items()
    ]


def summarise_parts(name: ImageNetSet, figures: Mapping[str, Figures]) -> dict[str, Any]:
    """One flat object of the scores of a set, all fractions of 1.

    Of ImageNet-C the scores are means over its 75 parts, with mce, and by corruption the errors of each severity and
    their quotient by AlexNet's. Where ImageNet was given, clean_top1, clean_top5 and clean_images are its own.

    Args:
        figures: of each part, by name.
    """
    clean = figures.get(CLEAN, {})
    summary = summarise_corruptions(figures) if name == "imagenet-c" else dict(figures[name])
    if SETS[name].indices is not None:
        summary["classes"] = len(list_classes(name))
    return summary | {f"clean_{key}": clean[key] for key in ("top1", "top5", "images") if key in clean}


def summarise_corruptions(figures: Mapping[str, Figures]) -> dict[str, Any]:
    """The scores of ImageNet-C; its extra corruptions count in none of the means."""
    there = [name for name in ALL if f"{name}/{SEVERITIES[0]}" in figures]
    errors = {name: [1 - figures[f"{name}/{severity}"]["top1"] for severity in SEVERITIES] for name in there}
    common = {name: errors[name] for name in COMMON}
    counted = [figures[f"{name}/{severity}"] for name in COMMON for severity in SEVERITIES]
    images = sum(part["images"] for part in counted)
    seconds = sum(part["images"] / part["images_per_second"] for part in counted)
    unreadable = [image for part in counted for image in part.get("unreadable", ())]
    return {
        "mce": compute_mce(common),
        **{key: fmean(part[key] for part in counted) for key in ("top1", "top5", "loss")},
        "images": images,
        "images_per_second": round(images / seconds, 1),
        "corruption_errors": compute_corruption_errors(common),
        "errors": errors,
        **({"unreadable": unreadable} if unreadable else {}),
    }
