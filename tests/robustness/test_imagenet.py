"""Scores on ImageNet's sets, through recipes/evaluate.py: each beside another calculation of it."""

import json
import pkgutil

import numpy as np
import pytest
import torch
from helpers.imagenet import WORDNET_IDS, make_classifier, write_classes, write_image
from helpers.small_runs import call_command, fail_command
from PIL import Image
from timm.data import create_dataset, create_transform, resolve_model_data_config
from timm.data.real_labels import RealLabelsImagenet
from timm.utils import accuracy
from torch.nn.functional import cross_entropy
from torchvision.datasets import ImageFolder

import s3a.training.evaluation
from s3a.data.imagenet_images import load_corruption, load_imagenet
from s3a.robustness.corruptions import ALEXNET_ERRORS, GROUPS
from s3a.training.tasks.imagenet import ImageNetClassification
from s3a.weights.folder import save_folder

pytestmark = pytest.mark.filterwarnings("ignore:.*the scores are of these alone")


@pytest.fixture(scope="module")
def model():
    return make_classifier()


@pytest.fixture(scope="module")
def weights(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("weights") / "nano"
    save_folder(model, folder)
    return folder


def compute_logits(model, paths, **changes):
    """With timm's own transform and normalization."""
    transform = create_transform(**{**resolve_model_data_config(model), **changes}, is_training=False)
    with torch.inference_mode():
        return model(torch.stack([transform(Image.open(path).convert("RGB")) for path in paths]))


def evaluate(capsys, weights, name, folder, *options):
    call_command("evaluate.py", "--weights", weights, "--data", name, "--data-dir", folder, *options)
    return json.loads(capsys.readouterr().out)


def check_scores(result, logits, labels, prefix=""):
    """Top-1 and top-5 by timm, and the loss of plain scores by torch."""
    top1, top5 = accuracy(logits, torch.tensor(labels), topk=(1, 5))
    assert result[f"{prefix}top1"] == pytest.approx(float(top1) / 100, abs=1e-6)
    assert result[f"{prefix}top5"] == pytest.approx(float(top5) / 100, abs=1e-6)
    assert result[f"{prefix}images"] == len(labels)
    if not prefix:
        assert result["loss"] == pytest.approx(float(cross_entropy(logits, torch.tensor(labels))), rel=1e-4)


def name_after_predictions(model, folder, written, among, per_class=1):
    """Writes images of some classes, and moves every other one to the class that it is taken for among others."""
    paths = write_classes(folder, [WORDNET_IDS[number] for number in written], per_class)
    predicted = compute_logits(model, paths)[:, among].argmax(1)
    for path, place in list(zip(paths, predicted.tolist(), strict=True))[::2]:
        target = folder / WORDNET_IDS[among[place]] / f"moved_{path.name}"
        target.parent.mkdir(exist_ok=True)
        path.rename(target)


@pytest.mark.parametrize("letter", ["a", "r"])
def test_the_logits_of_a_set_are_taken_before_the_argmax(model, weights, tmp_path, capsys, letter):
    """timm's `validate.py` takes the columns of its file of indices; the images' classes count in their order."""
    numbers = [int(line) for line in pkgutil.get_data("timm.data", f"_info/imagenet_{letter}_indices.txt").split()]
    name_after_predictions(model, tmp_path / "set", numbers[::9], numbers, per_class=2)
    ids = [WORDNET_IDS[number] for number in numbers]
    write_classes(tmp_path / "imagenet" / "val", [*ids[3:12], *(set(WORDNET_IDS[:20]) - {*ids})], seed=77)
    result = evaluate(
        capsys, weights, f"imagenet-{letter}", tmp_path / "set", "--imagenet", tmp_path / "imagenet", "--batch-size", 7
    )

    paths = sorted((tmp_path / "set").glob("*/*.jpg"))
    labels = [ids.index(path.parent.name) for path in paths]
    logits = compute_logits(model, paths)[:, numbers]
    check_scores(result, logits, labels)
    assert result["classes"] == 200
    assert 0.3 < result["top1"] < 1
    everywhere = compute_logits(model, paths).argmax(1)
    assert result["top1"] > float((everywhere == torch.tensor(numbers)[labels]).float().mean())

    clean = [path for path in sorted((tmp_path / "imagenet").glob("val/*/*.jpg")) if path.parent.name in ids]
    labels = [ids.index(path.parent.name) for path in clean]
    check_scores(result, compute_logits(model, clean)[:, numbers], labels, "clean_")


def test_v2_counts_its_folders_as_numbers(model, weights, tmp_path, capsys):
    paths = write_classes(tmp_path, [str(number) for number in range(0, 120, 10)], per_class=1)
    predicted = compute_logits(model, paths).argmax(1).tolist()
    for path, number in list(zip(paths, predicted, strict=True))[:8]:
        target = tmp_path / str(number) / f"moved_{path.name}"
        target.parent.mkdir(exist_ok=True)
        path.rename(target)
    found = sorted(tmp_path.glob("*/*.jpg"))
    result = evaluate(capsys, weights, "imagenet-v2", tmp_path)
    check_scores(result, compute_logits(model, found), [int(path.parent.name) for path in found])
    assert result["top1"] >= 8 / 12
    assert "classes" not in result


def test_sketch_and_imagenet_are_scored_as_timm_reads_their_folders(model, weights, tmp_path, capsys):
    numbers = list(range(1000))
    name_after_predictions(model, tmp_path / "sketch", numbers[:40], numbers)
    for wordnet_id in WORDNET_IDS:
        (tmp_path / "sketch" / wordnet_id).mkdir(exist_ok=True)
    theirs = create_dataset("", str(tmp_path / "sketch"), class_map={name: i for i, name in enumerate(WORDNET_IDS)})
    paths, labels = zip(*theirs.reader.samples, strict=True)
    for name in ("imagenet-sketch", "imagenet"):
        check_scores(evaluate(capsys, weights, name, tmp_path / "sketch"), compute_logits(model, paths), list(labels))


@pytest.mark.parametrize("loose", [False, True])
def test_real_labels_are_counted_as_timm_counts_them(model, weights, tmp_path, capsys, loose):
    known = json.loads(pkgutil.get_data("timm.data", "_info/imagenet_real_labels.json"))
    own = [[*labels] for labels in known[:60]]  # the first has none
    folder = tmp_path / "val"
    tried = [write_image(tmp_path / "tried" / f"{seed}.jpg", seed) for seed in range(500)]
    ranked = dict(zip(tried, compute_logits(model, tried).topk(5).indices.tolist(), strict=True))
    for number, labels in enumerate(own, start=1):  # where one can be had, an image with a right class first, or behind
        places = slice(1) if number % 2 else slice(1, 5)
        path = next((path for path, each in ranked.items() if {*each[places]} & {*labels}), next(iter(ranked)))
        label = ranked.pop(path)[0]
        inner = folder if loose else folder / WORDNET_IDS[label if number % 2 else 5]
        inner.mkdir(parents=True, exist_ok=True)
        path.rename(inner / f"ILSVRC2012_val_{number:08d}.JPEG")
    result = evaluate(capsys, weights, "imagenet-real", tmp_path, "--batch-size", 5)

    paths = sorted(folder.rglob("*.JPEG"), key=lambda path: path.name)
    logits = compute_logits(model, paths)
    (tmp_path / "real.json").write_text(json.dumps(own))
    theirs = RealLabelsImagenet([str(path) for path in paths], str(tmp_path / "real.json"))
    theirs.add_result(logits)
    assert 0 < theirs.get_accuracy(1) < theirs.get_accuracy(5)
    assert result["top1"] == pytest.approx(theirs.get_accuracy(1) / 100)
    assert result["top5"] == pytest.approx(theirs.get_accuracy(5) / 100)
    kept = [row for row, labels in enumerate(own) if labels]
    assert result["images"] == len(kept)
    probabilities = logits.softmax(1)
    losses = [-np.log(float(probabilities[row, own[row]].sum())) for row in kept]
    assert result["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
    assert ("clean_top1" in result) == (not loose)
    if not loose:
        labels = [WORDNET_IDS.index(paths[row].parent.name) for row in kept]
        check_scores(result | {"clean_images": len(kept)}, logits[kept], labels, "clean_")
        assert result["clean_top1"] > 0


def write_corruptions(folder, names, model):
    """Two images of every corruption and severity, of which the model takes more for their class at low severities."""
    for row, name in enumerate(names):
        for severity in range(1, 6):
            part = folder / name / str(severity)
            seeds = (50 * row + 7 * severity, 50 * row + 7 * severity + 1)
            paths = [write_image(part / WORDNET_IDS[3] / f"{seed}.JPEG", seed, 224) for seed in seeds]
            predicted = compute_logits(model, paths, crop_pct=1.0).argmax(1).tolist()
            for path, number in list(zip(paths, predicted, strict=True))[severity // 2 :]:
                (part / WORDNET_IDS[number]).mkdir(exist_ok=True)
                path.rename(part / WORDNET_IDS[number] / path.name)


def test_the_mean_corruption_error_is_of_errors_divided_by_alexnets(model, weights, tmp_path, capsys):
    names = [name for group in GROUPS.values() for name in group]
    write_corruptions(tmp_path, [*names[:15], "spatter"], model)
    write_classes(tmp_path / "val", WORDNET_IDS[:4])
    result = evaluate(capsys, weights, "imagenet-c", tmp_path, "--imagenet", tmp_path)
    errors = {}
    for name in [*names[:15], "spatter"]:
        errors[name] = []
        for severity in range(1, 6):
            paths = sorted((tmp_path / name / str(severity)).glob("*/*"))
            right = compute_logits(model, paths, crop_pct=1.0).argmax(1).tolist()  # the images are cropped already
            hits = [WORDNET_IDS[number] == path.parent.name for number, path in zip(right, paths, strict=True)]
            errors[name].append(1 - float(np.mean(hits)))
    assert {name: pytest.approx(each) for name, each in errors.items()} == result["errors"]
    assert {len({*each}) for each in errors.values()} != {1}
    quotients = {name: 100 * np.mean(errors[name]) / ALEXNET_ERRORS[name] for name in names[:15]}
    assert {name: pytest.approx(each) for name, each in quotients.items()} == result["corruption_errors"]
    assert result["mce"] == pytest.approx(np.mean(list(quotients.values())))
    assert result["top1"] == pytest.approx(1 - np.mean([errors[name] for name in names[:15]]))
    assert (result["images"], result["clean_images"]) == (75 * 2, 8)
    theirs = ImageFolder(tmp_path / "val")
    labels = [WORDNET_IDS.index(theirs.classes[label]) for label in theirs.targets]
    check_scores(result, compute_logits(model, [path for path, _ in theirs.samples]), labels, "clean_")


def test_images_that_were_cropped_are_not_cropped_again(model, tmp_path):
    """ImageNet-C was cropped when it was made: a model that sees 0.875 of other images sees all of these."""
    path = write_image(tmp_path / WORDNET_IDS[3] / "a.JPEG", 0, 224)
    config = {**resolve_model_data_config(model), "crop_pct": 0.875}
    seen = ImageNetClassification(load_corruption(tmp_path)).make_eval_transform(config)(Image.open(path))
    whole = create_transform(**{**config, "crop_pct": 1.0}, is_training=False, normalize=False)(Image.open(path))
    assert torch.equal(seen, whole)
    other = ImageNetClassification(load_imagenet("imagenet", tmp_path)).make_eval_transform(config)(Image.open(path))
    assert not torch.equal(other, whole)


def test_an_incomplete_set_of_corruptions_is_refused(weights, tmp_path, capsys):
    write_image(tmp_path / "fog" / "1" / WORDNET_IDS[0] / "a.JPEG", 0)
    for severity in range(2, 6):
        write_image(tmp_path / "fog" / str(severity) / WORDNET_IDS[0] / "a.JPEG", 0)
    line = fail_command(capsys, "evaluate.py", "--weights", weights, "--data", "imagenet-c", "--data-dir", tmp_path)
    assert "no folder gaussian_noise, shot_noise" in line and "fog" not in line.partition("of ImageNet-C")[0][-60:]


def test_the_clean_images_are_looked_for_before_the_set_is_measured(weights, tmp_path, capsys, monkeypatch):
    write_classes(tmp_path / "a", ["n01498041"])
    monkeypatch.setattr(s3a.training.evaluation, "evaluate_weights", None)  # nothing may be measured
    arguments = (
        "--weights",
        weights,
        "--data",
        "imagenet-a",
        "--data-dir",
        tmp_path / "a",
        "--imagenet",
        tmp_path / "b",
    )
    assert "b' does not exist" in fail_command(capsys, "evaluate.py", *arguments)


def test_a_stopped_evaluation_goes_on(weights, tmp_path, capsys, monkeypatch):
    """What an output folder keeps of the same weights and images is not measured again."""
    write_classes(tmp_path / "a", ["n01498041"])
    write_classes(tmp_path / "val", ["n01498041", "n02007558"])
    options = ("--imagenet", tmp_path, "--output-dir", tmp_path / "out")
    measured = []
    original = s3a.training.evaluation.evaluate_weights

    def stop_at_second(model, task, **options):
        measured.append(task.data.val.num_images)
        if len(measured) == 2:
            options["stop"] = lambda: "a test"
        return original(model, task, **options)

    monkeypatch.setattr(s3a.training.evaluation, "evaluate_weights", stop_at_second)
    arguments = ("--weights", weights, "--data", "imagenet-a", "--data-dir", tmp_path / "a", *options)
    with pytest.raises(SystemExit) as stopped:
        call_command("evaluate.py", *arguments)
    printed = capsys.readouterr()
    assert (stopped.value.code, printed.out, measured) == (75, "", [2, 4])
    assert "stopped by a test" in printed.err and "clean (2 of 2)" in printed.err
    kept = evaluate(capsys, weights, "imagenet-a", tmp_path / "a", *options)
    assert measured == [2, 4, 4]
    fresh = evaluate(capsys, weights, "imagenet-a", tmp_path / "a", *options[:2])
    assert {**kept, "images_per_second": 0} == {**fresh, "images_per_second": 0}
    assert {*fresh} == {"top1", "top5", "loss", "images", "images_per_second", "classes"} | {
        f"clean_{key}" for key in ("top1", "top5", "images")
    }
    save_folder(make_classifier("vvt_nano"), tmp_path / "other")
    other = evaluate(capsys, tmp_path / "other", "imagenet-a", tmp_path / "a", *options)
    assert measured[5:] == [2, 4] and other["loss"] != kept["loss"]
    assert evaluate(capsys, weights, "imagenet-a", tmp_path / "a", *options) == kept
    assert len(measured) == 7
    line = fail_command(capsys, "evaluate.py", *arguments, "--precision", "bf16")
    assert "was measured with --precision no and not bf16" in line


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (("--data", "digits", "--output-dir", "out"), "--output-dir is 'out': it keeps scores of ImageNet's sets"),
        (("--data", "imagenet-a"), "--data imagenet-a needs --data-dir DIR"),
        (("--data", "imagenet-c", "--dataset", "a/b"), "--data imagenet-c needs --data-dir DIR and takes no --dataset"),
        (("--data", "imagenet-real", "--data-dir", "val", "--imagenet", "val"), "which is of ImageNet's own images"),
        (("--data", "digits", "--imagenet", "val"), "--imagenet is 'val': it is for imagenet-a"),
        (("--data", "imagenet-a", "--data-dir", "a", "--flip"), "--flip is given, and --data imagenet-a takes none"),
        (("--data", "imagenet-a", "--data-dir", "a", "--streaming"), "--streaming is given"),
    ],
)
def test_options_that_do_not_fit_are_refused(weights, capsys, options, said):
    assert said in fail_command(capsys, "evaluate.py", "--weights", weights, *options)


def test_weights_of_other_classes_are_refused(weights, tmp_path, capsys):
    write_classes(tmp_path / "val", WORDNET_IDS[:2], per_class=1)
    config = json.loads((weights / "config.json").read_text())
    folder = tmp_path / "weights"
    folder.mkdir()
    (folder / "model.safetensors").symlink_to(weights / "model.safetensors")
    arguments = ("--weights", folder, "--data", "imagenet", "--data-dir", tmp_path)
    for names, refused in ((WORDNET_IDS, False), (["tench", *WORDNET_IDS[1:]], False), (WORDNET_IDS[::-1], True)):
        (folder / "config.json").write_text(json.dumps({**config, "label_names": names}))
        if refused:
            line = fail_command(capsys, "evaluate.py", *arguments)
            assert f"know a class {names[0]!r} where ImageNet has {WORDNET_IDS[0]!r}" in line
            arguments += ("--other-label-names",)
        call_command("evaluate.py", *arguments)
        assert json.loads(capsys.readouterr().out)["images"] == 2
