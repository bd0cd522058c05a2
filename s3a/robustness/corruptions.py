"""The corruptions of Hendrycks and Dietterich (arXiv 1903.12261), their groups, and the mean corruption error.

ImageNet-C has fifteen of them at five severities, and four extra ones to choose a model by. An error of a model is
divided by AlexNet's under the same corruption, since some corruptions are harder than others.
"""

from collections.abc import Mapping, Sequence
from statistics import fmean

from s3a.data.imagenet import SEVERITIES
from s3a.support.errors import make_unknown_error

GROUPS: Mapping[str, tuple[str, ...]] = {
    "noise": ("gaussian_noise", "shot_noise", "impulse_noise"),
    "blur": ("defocus_blur", "glass_blur", "motion_blur", "zoom_blur"),
    "weather": ("snow", "frost", "fog", "brightness"),
    "digital": ("contrast", "elastic_transform", "pixelate", "jpeg_compression"),
    "extra": ("speckle_noise", "gaussian_blur", "spatter", "saturate"),
}
"""The paper's four groups, and those that it keeps for validation."""
ALL = tuple(name for names in GROUPS.values() for name in names)
"""All 19, in the paper's order."""
COMMON = tuple(name for name in ALL if name not in GROUPS["extra"])
"""The 15 that the mean corruption error is of."""

ALEXNET_ERRORS: Mapping[str, float] = {
    "gaussian_noise": 88.6428,
    "shot_noise": 89.4468,
    "impulse_noise": 92.2640,
    "defocus_blur": 81.9880,
    "glass_blur": 82.6268,
    "motion_blur": 78.5948,
    "zoom_blur": 79.8360,
    "snow": 86.6816,
    "frost": 82.6572,
    "fog": 81.9324,
    "brightness": 56.4592,
    "contrast": 85.3204,
    "elastic_transform": 64.6056,
    "pixelate": 71.7840,
    "jpeg_compression": 60.6500,
}
"""AlexNet's top-1 error on ImageNet-C in percent, averaged over the five severities."""


def expand_corruptions(words: Sequence[str]) -> tuple[str, ...]:
    """The corruptions that names and groups stand for, each once, in the paper's order.

    Args:
        words: names of corruptions or groups; `all` is the 19, `common` the 15 of the mean corruption error.

    Raises:
        ValueError: for a word that is neither, and where there is none.
    """
    meanings: dict[str, tuple[str, ...]] = {"all": ALL, "common": COMMON, **GROUPS, **{name: (name,) for name in ALL}}
    if not words:
        raise ValueError("no corruption is given: name some, or take the group common")
    chosen = set[str]()
    for word in words:
        if word not in meanings:
            raise make_unknown_error("corruption", word, meanings)
        chosen.update(meanings[word])
    return tuple(name for name in ALL if name in chosen)


def compute_corruption_errors(errors: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """The corruption error (CE) of each corruption: the mean error over the severities, divided by AlexNet's.

    Args:
        errors: top-1 errors by corruption, each at the severities 1 to 5, as fractions of 1.

    Returns:
        Fractions of 1 by corruption: 1 is as many errors as AlexNet makes, and a model can make more.

    Raises:
        ValueError: for a corruption that is none of the 15, other than five severities, and errors that are no
            fractions of 1.
    """
    for name, of_name in errors.items():
        if name not in ALEXNET_ERRORS:
            raise make_unknown_error("corruption with an error of AlexNet's", name, ALEXNET_ERRORS)
        if len(of_name) != len(SEVERITIES):
            raise ValueError(
                f"{name} has errors at {len(of_name)} severities: AlexNet's is the mean over {len(SEVERITIES)}, so "
                "measure them all"
            )
        wrong = next((error for error in of_name if not 0 <= error <= 1), None)  # NaN is wrong too
        if wrong is not None:
            raise ValueError(f"{name} has the error {wrong}: it must be a fraction between 0 and 1, not percent")
    return {name: 100 * fmean(of_name) / ALEXNET_ERRORS[name] for name, of_name in errors.items()}


def compute_mce(errors: Mapping[str, Sequence[float]]) -> float:
    """The mean corruption error (mCE): the mean of the 15 corruption errors, as a fraction of 1; AlexNet has 1.

    Args:
        errors: as for `compute_corruption_errors`, of all 15.

    Raises:
        ValueError: where one of the 15 is missing, and as `compute_corruption_errors`.
    """
    missing = [name for name in COMMON if name not in errors]
    if missing:
        raise ValueError(f"the mean corruption error is of 15 corruptions, without {', '.join(missing)}: measure them")
    return fmean(compute_corruption_errors(errors).values())
