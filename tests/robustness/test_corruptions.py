"""Names, groups and the mean corruption error, against the library and calculations by hand."""

import imagecorruptions
import pytest

from s3a.robustness.corruptions import (
    ALEXNET_ERRORS,
    ALL,
    COMMON,
    GROUPS,
    compute_corruption_errors,
    compute_mce,
    expand_corruptions,
)


def test_names_and_groups_are_the_librarys():
    assert list(ALL) == imagecorruptions.get_corruption_names("all")
    assert list(COMMON) == list(ALEXNET_ERRORS) == imagecorruptions.get_corruption_names("common")
    for ours, theirs in {"extra": "validation"}.items() | {(name, name) for name in GROUPS if name != "extra"}:
        assert list(GROUPS[ours]) == imagecorruptions.get_corruption_names(theirs)


def test_words_stand_for_corruptions_in_the_papers_order():
    assert expand_corruptions(["all"]) == ALL
    assert expand_corruptions(["common", "fog"]) == COMMON
    assert expand_corruptions(["spatter", "noise", "shot_noise", "fog"]) == (
        *("gaussian_noise", "shot_noise", "impulse_noise"),
        *("fog", "spatter"),
    )


def test_unknown_words_are_refused():
    with pytest.raises(ValueError, match=r"corruption 'gausian_noise' is unknown.*did you mean 'gaussian_noise'"):
        expand_corruptions(["noise", "gausian_noise"])
    with pytest.raises(ValueError, match="no corruption is given"):
        expand_corruptions([])


def test_alexnet_has_the_mean_corruption_error_1():
    errors = {name: [percent / 100] * 5 for name, percent in ALEXNET_ERRORS.items()}
    assert compute_mce(errors) == pytest.approx(1, abs=1e-12)
    assert compute_corruption_errors(errors) == pytest.approx(dict.fromkeys(COMMON, 1), abs=1e-12)


def test_each_corruption_counts_the_same_and_each_severity_does():
    """One corruption at half of AlexNet's errors: the mean of 14 ones and a half, whichever it is."""
    for better in ("gaussian_noise", "jpeg_compression"):
        errors = {name: [percent / 100] * 5 for name, percent in ALEXNET_ERRORS.items()}
        half = ALEXNET_ERRORS[better] / 200
        errors[better] = [half - 0.2, half + 0.2, half, half - 0.1, half + 0.1]
        assert compute_mce(errors) == pytest.approx(14.5 / 15, abs=1e-12)
        assert compute_corruption_errors(errors)[better] == pytest.approx(0.5, abs=1e-12)
    assert compute_corruption_errors({"fog": [0, 0.25, 0.5, 0.75, 1]}) == {"fog": pytest.approx(50 / 81.9324)}


@pytest.mark.parametrize(
    ("errors", "words"),
    [
        ({"fog": [0.5] * 4}, "fog has errors at 4 severities"),
        ({"fog": [0.5, 0.5, 50, 0.5, 0.5]}, "fog has the error 50.*not percent"),
        ({"fog": [0.5, 0.5, float("nan"), 0.5, 0.5]}, "fog has the error nan"),
        ({"spatter": [0.5] * 5}, "'spatter' is unknown"),
    ],
)
def test_other_errors_are_refused(errors, words):
    with pytest.raises(ValueError, match=words):
        compute_corruption_errors(errors)


def test_the_mean_is_of_all_15():
    with pytest.raises(ValueError, match="without pixelate: measure them"):
        compute_mce({name: [0.5] * 5 for name in COMMON if name != "pixelate"})
