"""The command that measures corruptions: what it writes, goes on with, and refuses."""

import json
import os
import shutil
import signal
import sys

import pytest
import torch
from accelerate.state import AcceleratorState
from helpers.command_line import check_refused, make_command
from helpers.corrupted import write_weights
from helpers.imagenet import WORDNET_IDS, make_classifier, write_classes
from PIL import Image
from timm.data import create_transform, resolve_model_data_config

from s3a.robustness import evaluation, images
from s3a.robustness.images import Part


@pytest.fixture(autouse=True)
def fresh_accelerator():
    AcceleratorState._reset_state(reset_partial_state=True)


@pytest.fixture
def robustness(monkeypatch, capsys):
    """Calls the command as `python tools/robustness.py ARGUMENTS`."""
    command = make_command(monkeypatch, capsys)

    def call(*arguments):
        AcceleratorState._reset_state(reset_partial_state=True)
        return command("robustness", *arguments)

    return call


@pytest.fixture
def measured(monkeypatch):
    """The parts that are measured, each with the names of its weights."""
    seen = []
    measure = evaluation.evaluate_part

    def note(candidates, part, *arguments, **options):
        seen.append((part, [candidate.path.rsplit("/", 3)[-3] for candidate in candidates]))
        return measure(candidates, part, *arguments, **options)

    monkeypatch.setattr(evaluation, "evaluate_part", note)
    return seen


@pytest.fixture
def runs(tmp_path):
    for seed in (0, 1):
        write_weights(tmp_path / "runs" / "small" / f"seed-{seed}" / "model", seed)
    return tmp_path / "runs"


@pytest.fixture
def arguments(runs, tmp_path):
    """Of a command with few images, whose weights are named first."""
    weights = [runs / "small" / f"seed-{seed}" / "model" for seed in (0, 1)]
    return ["--weights", *weights, *("--data", "digits", "--num-images", 10, "--output-dir", tmp_path / "out")]


SMALL = ["small", "small"]
PARTS = [(Part(*part), SMALL) for part in (("clean", 0), ("fog", 1), ("fog", 4), ("contrast", 1), ("contrast", 4))]
ASKED = ("--corruptions", "contrast", "fog", "--severities", 4, 1)


def found_in(folder):
    return json.loads((folder / "results.json").read_text())


def test_it_prints_and_writes_what_it_found(robustness, arguments, measured, tmp_path):
    status, out, err = robustness(*arguments, *ASKED)
    assert status == 0, err
    assert measured == PARTS
    assert err.splitlines()[:2] == ["part 1 of 5: clean images, 2 weights", "part 2 of 5: fog, severity 1, 2 weights"]
    out_folder = tmp_path / "out"
    assert (
        out.splitlines()[-1] == f"wrote {out_folder}/results.json, {out_folder}/results.md, {out_folder}/robustness.png"
    )
    page = (out_folder / "results.md").read_text()
    for text in (page, out):
        assert "10 validation images of digits, corrupted on the fly by imagecorruptions-imaug" in text
        assert "mCE" not in text
    assert "| `small` |" in page
    with Image.open(out_folder / "robustness.png") as picture:
        assert picture.width > 500
    found = found_in(out_folder)
    assert found["conditions"]["images"] == 10
    assert len(found["top1"]) == 2
    (out_folder / "robustness.png").unlink()
    status, again, err = robustness("--report-only", "--output-dir", out_folder)
    assert (status, again, err) == (0, out, "")
    assert (out_folder / "robustness.png").exists()
    assert (out_folder / "results.md").read_text() == page


def test_more_weights_corruptions_and_severities_measure_what_is_missing(robustness, arguments, measured, runs):
    robustness(*arguments, "--corruptions", "fog", "--severities", 1)
    before = list(measured)
    robustness(*arguments, *ASKED)
    assert before + measured[len(before) :] == [PARTS[0], PARTS[1], PARTS[2], *PARTS[3:]]
    measured.clear()
    arguments.insert(1, write_weights(runs / "large" / "seed-0" / "model", 2))
    status, out, _ = robustness(*arguments, *ASKED)
    assert measured == [(part, ["large"]) for part, _ in PARTS]
    assert status == 0
    assert "difference from large" in out
    shutil.rmtree(runs / "small" / "seed-1")
    write_weights(runs / "small" / "seed-1" / "model", 9)
    measured.clear()
    _, _, err = robustness(*arguments, *ASKED)
    assert measured == [(part, ["small"]) for part, _ in PARTS]
    assert f"{runs}/small/seed-1/model holds other weights than before: they are measured anew" in err


def test_a_signal_stops_it_and_the_same_command_goes_on(robustness, arguments, measured, monkeypatch, tmp_path):
    robustness(*arguments[:-1], tmp_path / "whole", *ASKED)
    measured.clear()
    note = evaluation.evaluate_part

    def interrupt(candidates, part, *others, **options):
        if len(measured) == 2:
            os.kill(os.getpid(), signal.SIGTERM)
        return note(candidates, part, *others, **options)

    with monkeypatch.context() as patch:
        patch.setattr(evaluation, "evaluate_part", interrupt)
        status, out, err = robustness(*arguments, *ASKED)
    assert (status, out) == (75, "")
    assert err.splitlines()[-1] == "stopped by SIGTERM: the same command goes on with the parts that are missing"
    assert measured == PARTS[:3]
    status, *_ = robustness(*arguments, *ASKED)
    assert status == 0
    assert measured == PARTS[:3] + PARTS[2:]
    assert found_in(tmp_path / "out")["top1"] == found_in(tmp_path / "whole")["top1"]


def test_other_conditions_are_refused(robustness, arguments, monkeypatch):
    arguments += ["--corruptions", "contrast", "--severities", 1]
    robustness(*arguments)
    seed = robustness(*arguments, "--seed", 1)
    check_refused(
        seed, "measured with the seed 0 (now 1): scores of both cannot be compared; give another --output-dir"
    )
    check_refused(robustness(*arguments, "--num-images", 11), "measured with the images 10 (now 11)")
    check_refused(robustness(*arguments, "--precision", "bf16"), "measured with the precision no (now bf16)")
    monkeypatch.setattr(images, "get_library_version", lambda: "9.9")
    check_refused(robustness(*arguments), "measured with the library version", "(now 9.9)")


def test_wrong_options_are_refused(robustness, arguments, tmp_path, monkeypatch):
    folder = tmp_path / "out"
    check_refused(robustness("--data", "digits"), "--weights and --data must be given")
    check_refused(robustness(*arguments, "--corruptions", "foggy"), "corruption 'foggy' is unknown", "'fog'")
    check_refused(robustness(*arguments, "--severities", 0, 5), "--severities is 0 5: give some of 1 2 3 4 5")
    check_refused(robustness(*arguments, "--batch-size", 0), "--batch-size is 0")
    check_refused(robustness(*arguments, "--num-images", 361), "--num-images is 361: it must be from 1 to 360")
    check_refused(robustness(*arguments, "--max-bad-images", 2), "--max-bad-images is 2")
    check_refused(robustness(*arguments, "--streaming"), "--streaming")
    check_refused(robustness("--report-only", "--output-dir", folder), f"{folder}/results.json does not exist")
    folder.mkdir()
    (folder / "results.json").write_text("[]")
    check_refused(robustness(*arguments), "results.json is no result of corruptions")
    images.load_library.cache_clear()
    monkeypatch.setitem(sys.modules, "imagecorruptions", None)
    check_refused(robustness(*arguments), 'pip install -e ".[robustness]"')


@pytest.mark.filterwarnings("ignore:.*the scores are of these alone")
def test_imagenet_needs_its_validation_images_alone(robustness, tmp_path):
    """Half of the images lie in the folders of the classes that the weights take them for."""
    model = make_classifier()
    model.save_pretrained(tmp_path / "weights")
    paths = write_classes(tmp_path / "imagenet" / "val", WORDNET_IDS[:6], per_class=1)
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    for path in paths[:3]:
        with torch.inference_mode():
            number = int(model(transform(Image.open(path))[None]).argmax())
        (tmp_path / "imagenet" / "val" / WORDNET_IDS[number]).mkdir(exist_ok=True)
        path.rename(tmp_path / "imagenet" / "val" / WORDNET_IDS[number] / path.name)
    data = ("--data", "imagenet", "--data-dir", tmp_path / "imagenet")
    asked = ("--corruptions", "contrast", "--severities", 1, "--output-dir", tmp_path / "out")
    status, _, err = robustness("--weights", tmp_path / "weights", *data, *asked)
    assert status == 0, err
    found = found_in(tmp_path / "out")
    (digest,) = found["weights"].values()
    assert 0.5 <= found["top1"][digest]["clean"]["0"] < 1
    assert found["conditions"]["knows_imagenet"]
