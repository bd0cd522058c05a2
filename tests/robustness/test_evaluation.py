"""Top-1 under corruption: against a model run by hand, with others beside it, and what is refused."""

import dataclasses

import numpy as np
import pytest
import timm
import torch
from accelerate import Accelerator
from helpers.corrupted import DIGITS, corrupt_by_hand, prepare_by_hand, write_weights
from helpers.image_folder import make_image_folder
from PIL import Image
from sklearn.datasets import load_digits as load_arrays
from sklearn.model_selection import train_test_split

import s3a
from s3a.data import load_data
from s3a.robustness.evaluation import Conditions, evaluate_part, group_by_preprocessing, load_candidate
from s3a.robustness.images import CLEAN, Part, choose_rows
from s3a.training.evaluation import UnreadableImagesError


@pytest.fixture(scope="module")
def digits():
    return load_data("digits")


def conditions_of(data, count: int | None = 12, **changes) -> Conditions:
    rows = choose_rows(data.val.num_images, count)
    return Conditions(**{"data": data, "rows": rows, "seed": 3, "batch_size": 5, **changes})


@torch.no_grad()
def score_by_hand(folder, part: Part, rows, seed: int) -> float:
    """The share of the digits in these rows that the weights get right, one by one."""
    model = s3a.SSViT.from_pretrained(folder)
    config = model.pretrained_cfg
    channels, side, _ = config["input_size"]
    arrays = load_arrays()
    _, held_out = train_test_split(np.arange(len(arrays.images)), test_size=360, random_state=0)
    pixels = []
    for row in rows:
        picture = Image.fromarray((arrays.images[held_out[row]] * (255 / 16)).round().astype(np.uint8))
        image = prepare_by_hand(picture, side, "RGB" if channels == 3 else "L")
        if part != CLEAN:
            image = corrupt_by_hand(image, *part, seed, int(row)).convert(image.mode)
        pixels.append(torch.tensor(np.array(image)).reshape(side, side, channels).permute(2, 0, 1) / 255)
    classes = model((torch.stack(pixels) - 0.5) / 0.25).argmax(1).numpy()
    return float((classes == arrays.target[held_out[rows]]).mean())


@pytest.mark.parametrize(("part", "channels"), [(CLEAN, 3), (Part("fog", 2), 1), (Part("impulse_noise", 4), 3)])
def test_top1_is_what_plain_code_counts(digits, tmp_path, part, channels):
    folders = [write_weights(tmp_path / str(seed), seed, channels=channels) for seed in (0, 1)]
    candidates = [load_candidate(str(folder), digits) for folder in folders]
    conditions = conditions_of(digits, 40, batch_size=16)
    found = evaluate_part(candidates, part, conditions, Accelerator())
    expected = [score_by_hand(folder, part, conditions.rows, seed=3) for folder in folders]
    assert [found.top1[candidate.digest] for candidate in candidates] == pytest.approx(expected, abs=1e-12)
    assert len(set(expected)) == 2
    assert found.unreadable == []


def test_those_beside_it_change_nothing(digits, tmp_path):
    candidates = [load_candidate(str(write_weights(tmp_path / str(seed), seed)), digits) for seed in range(3)]
    part, conditions = Part("frost", 2), conditions_of(digits)
    together = evaluate_part(candidates, part, conditions, Accelerator())
    for candidate in candidates:
        alone = evaluate_part([candidate], part, dataclasses.replace(conditions, batch_size=12), Accelerator())
        assert alone.top1[candidate.digest] == together.top1[candidate.digest]


def test_those_that_see_the_same_images_are_together(digits, tmp_path):
    sizes = {"a": 32, "b": 48, "c": 32}
    candidates = [load_candidate(str(write_weights(tmp_path / name, 0, side=sizes[name])), digits) for name in sizes]
    groups = group_by_preprocessing(candidates)
    assert [[candidate.path[-1] for candidate in group] for group in groups] == [["a", "c"], ["b"]]


def test_other_weights_have_another_digest(digits, tmp_path):
    first, again, other, larger = (
        load_candidate(str(write_weights(tmp_path / "w", seed, side=side)), digits).digest
        for seed, side in ((0, 32), (0, 32), (1, 32), (0, 48))
    )
    assert first == again
    assert len({first, other, larger}) == 3


def test_a_stop_has_no_scores(digits, tmp_path):
    candidate = load_candidate(str(write_weights(tmp_path / "w", 0)), digits)
    assert evaluate_part([candidate], CLEAN, conditions_of(digits), Accelerator(), stop=lambda: True) is None


def test_unreadable_images_are_refused_or_left_out(tmp_path):
    folder = make_image_folder(tmp_path / "images", num_val=4)
    broken = folder / "val" / "light" / "002.jpg"
    broken.write_bytes(b"no picture")
    data = load_data("imagefolder", folder)
    names = ["dark", "light"]
    candidate = load_candidate(str(write_weights(tmp_path / "w", 0, label_names=names)), data)
    part = Part("gaussian_noise", 3)
    with pytest.raises(UnreadableImagesError, match=r"1 of the validation images cannot be read \(.*002\.jpg, since"):
        evaluate_part([candidate], part, conditions_of(data, None), Accelerator())
    found = evaluate_part([candidate], part, conditions_of(data, None, max_bad_images=0.2), Accelerator())
    assert found.unreadable == [str(broken)]
    assert found.top1[candidate.digest] * 7 == pytest.approx(round(found.top1[candidate.digest] * 7))


def test_numbers_that_are_not_finite_name_their_weights(digits, tmp_path):
    candidates = [load_candidate(str(write_weights(tmp_path / name, 0)), digits) for name in ("good", "bad")]
    torch.nn.init.constant_(candidates[1].model.get_classifier().bias, torch.nan)
    with pytest.raises(ValueError, match=r"the validation loss of \S*/bad is nan"):
        evaluate_part(candidates, CLEAN, conditions_of(digits), Accelerator())


def test_weights_that_do_not_fit_are_refused(digits, tmp_path):
    small = write_weights(tmp_path / "small", 0, side=28)
    with pytest.raises(ValueError, match=r"--weights \S*small: they take images of 28 x 28 pixels.*--image-size 32"):
        load_candidate(str(small), digits)
    others = write_weights(tmp_path / "others", 0, label_names=[f"no {digit}" for digit in DIGITS])
    with pytest.raises(ValueError, match=r"--weights \S*others: the weights know a class 'no 0'.*--other-label-names"):
        load_candidate(str(others), digits)
    assert load_candidate(str(others), digits, other_label_names=True).path == str(others)
    segmenter = timm.create_model("semantic_fpn", backbone="ssvit_nano", num_classes=10, pyramid_dim=16)
    segmenter.save_pretrained(tmp_path / "fpn", data_config={"input_size": (3, 64, 64)})
    with pytest.raises(ValueError, match=r"--weights \S*fpn: they are no classifier's"):
        load_candidate(str(tmp_path / "fpn"), digits)
    with pytest.raises(FileNotFoundError, match="'nowhere' is neither a local folder nor a Hub repository"):
        load_candidate("nowhere", digits)
