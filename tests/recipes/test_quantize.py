"""recipes/quantize.py: every figure of its table is checked by other means."""

import json
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
from helpers.exported import make_dense
from helpers.image_folder import make_image_folder
from helpers.quantized import compute_logits, make_trained
from huggingface_hub import ModelCard
from PIL import Image
from timm.data import create_transform, resolve_model_data_config
from torch import nn

from s3a import SemanticFPN, SSViT
from s3a.data import load_data
from s3a.quantization.convert import quantize
from s3a.training.evaluation import evaluate_weights
from s3a.training.tasks.segmentation import Segmentation


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A nano in int8-dynamic."""
    quantize(make_trained(), "int8-dynamic").save_pretrained(tmp_path / "quantized")
    return tmp_path / "quantized"


RECIPE = Path(__file__).parents[2] / "recipes" / "quantize.py"


def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, *arguments: object) -> tuple[int, str, str]:
    """recipes/quantize.py: exit status, stdout, stderr."""
    monkeypatch.setattr(sys, "argv", ["recipes/quantize.py", *map(str, arguments)])
    status = 0
    try:
        runpy.run_path(str(RECIPE), run_name="__main__")
    except SystemExit as stop:
        status = stop.code
    return status, *capsys.readouterr()


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A float nano of two classes that answers at random."""
    model = timm.create_model("ssvit_nano", num_classes=2)
    nn.init.normal_(model.head.weight, std=3)
    model.save_pretrained(tmp_path / "float", data_config={"input_size": (3, 48, 48), "crop_pct": 1.0})
    return tmp_path / "float"


def predict(folder: Path, pictures: Path) -> tuple[list[int], list[int]]:
    """Predictions and labels, image by image, by plain code."""
    model = SSViT.from_pretrained(folder)
    transform = create_transform(**resolve_model_data_config(model), is_training=False)
    files = [
        (label, path) for label, name in enumerate(("dark", "light")) for path in (pictures / "val" / name).iterdir()
    ]
    found = [
        compute_logits(model, transform(Image.open(path).convert("RGB"))[None]).argmax().item() for _, path in files
    ]
    return found, [label for label, _ in files]


@pytest.mark.slow
def test_the_command(monkeypatch, capsys, graphs, weights: Path, tmp_path: Path):
    """Every figure of its table is checked by other means."""
    images, output, results = make_image_folder(tmp_path / "images"), tmp_path / "out", tmp_path / "results.json"
    given = ("--weights", weights, "--scheme", "int8-activations-int4-weights", "--output", output, "--turns", 1)
    more = ("--data", "imagefolder", "--data-dir", images, "--skip", "head", "--latency-batch", 2, "--results", results)
    status, out, _ = command(monkeypatch, capsys, *given, *more)
    assert status == 0
    assert "int8-activations-int4-weights: 25 linear layers: stages.0.blocks.0-1.attn.qkv, " in out
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in re.findall(r"\|.*", out)]
    assert header == ["model", "top-1", "agreement", "MB on disk", "MB of memory", "ms compiled", "ms eager"]
    (before, labels), (after, _) = predict(weights, images), predict(output, images)
    assert [row[1] for row in rows] == [f"{100 * np.mean(np.equal(found, labels)):.2f} %" for found in (before, after)]
    assert [row[2] for row in rows] == ["100.00 %", f"{100 * np.mean(np.equal(before, after)):.2f} %"]
    sizes = [(folder / "model.safetensors").stat().st_size / 1e6 for folder in (weights, output)]
    assert [row[3] for row in rows] == [f"{size:,.2f}" for size in sizes]
    assert all(float(cell) > 0 for row in rows for cell in row[4:])
    written = json.loads(results.read_text())["rows"]
    assert [row["model"] for row in written] == ["float32", "int8-activations-int4-weights"]
    assert written[1]["agreement"] == pytest.approx(np.mean(np.equal(before, after)))
    card = ModelCard.load(output / "README.md")
    assert "| float32 | " in card.text
    (result,) = card.data.eval_results  # its own score, of the images that it was measured on
    assert (result.metric_value, result.dataset_type) == (written[1]["top1"], "imagefolder")
    assert f"Made from `{weights}`" in card.text


def test_a_dense_model(monkeypatch, capsys, tmp_path: Path):
    """It is scored by its own task, and evaluates to the same afterwards; of its classes some pixels are compared."""
    monkeypatch.setattr(subprocess, "run", lambda *args, **options: SimpleNamespace(stdout="1000000\n"))  # the memory
    generator = np.random.default_rng(0)
    for split in ("train", "val"):
        for kind, shape in (("images", (48, 56, 3)), ("label-maps", (48, 56))):
            (tmp_path / "data" / kind / split).mkdir(parents=True)
            for index in range(2):
                pixels = generator.integers(0, 256 if kind == "images" else 5, size=shape, dtype=np.uint8)
                Image.fromarray(pixels).save(tmp_path / "data" / kind / split / f"{index}.png")
    (tmp_path / "data" / "classes.txt").write_text("\n".join("abcde"))
    make_dense(pyramid_dim=16).save_pretrained(tmp_path / "float", data_config={"input_size": (3, 48, 48)})
    data = ("--data", "label-maps", "--data-dir", tmp_path / "data")
    given = ("--weights", tmp_path / "float", "--scheme", "int8-weight-only", "--output", tmp_path / "out")
    status, out, err = command(monkeypatch, capsys, *given, *data, "--turns", 0)
    assert status == 0, err
    header, _, *rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in re.findall(r"\|.*", out)]
    assert header[:3] == ["model", "mIoU", "agreement"]
    assert rows[0][2] == "100.00 %"
    assert float(rows[1][2].rstrip(" %")) > 90
    quantized = SemanticFPN.from_pretrained(tmp_path / "out")
    for model, row in ((SemanticFPN.from_pretrained(tmp_path / "float"), rows[0]), (quantized, rows[1])):
        task = Segmentation(load_data("label-maps", tmp_path / "data", kind="label-maps"))
        assert row[1] == f"{100 * evaluate_weights(model, task, batch_size=2).scores['miou']:.2f} %"
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.pipeline_tag == "image-segmentation"
    (result,) = card.data.eval_results
    assert (result.metric_type, result.metric_name) == ("mean_iou", "mIoU, int8-weight-only")
    assert "SemanticFPN.from_pretrained" in card.text


def test_what_the_command_refuses(monkeypatch, capsys, weights: Path, folder: Path, tmp_path: Path):
    """In one line, before anything is written."""
    out, precious = tmp_path / "out", shutil.copytree(weights, tmp_path / "precious")
    for arguments, words in (
        ((weights, "int8-dynamc", out), ("'int8-dynamc'", "did you mean 'int8-dynamic'?")),
        ((weights, "float8-dynamic", out), ("needs a CUDA GPU of compute capability 8.9",)),
        ((folder, "int8-dynamic", out), ("quantized already",)),
        ((weights, "int8-dynamic", weights), ("is the folder of the weights",)),
        ((weights, "int8-dynamic", precious), ("precious holds weights that are not quantized",)),
        ((weights, "int8-dynamic", out, "--layers", "stage.*"), ("'stage.*' is unknown",)),
        ((weights, "int8-dynamic", out, "--batch-size", 0), ("--batch-size is 0",)),
        ((weights, "int8-dynamic", out, "--dataset", "a/b"), ("--dataset is a/b and there is no --data",)),
        ((weights, "int8-dynamic", out, "--data-dir", "images"), ("--data-dir is images and there is no --data",)),
        ((tmp_path / "none", "int8-dynamic", out), ("neither a local folder nor",)),
        ((weights, "int8-dynamic", weights / "config.json" / "x"), ("cannot be made",)),
    ):
        given = ("--weights", arguments[0], "--scheme", arguments[1], "--output", *arguments[2:])
        status, printed, err = command(monkeypatch, capsys, *given)
        assert (status, printed, err.count("\n")) == (2, "", 1), err
        assert all(word in err for word in words), err
        assert not out.exists()
