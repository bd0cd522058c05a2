"""tools/export.py: what it prints, and what it refuses."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from helpers.command_line import TOOLS, Command, check_refused
from helpers.exported import TINY, TINY_BACKBONE, make_confident, make_dense


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    make_confident(**TINY).save_pretrained(tmp_path / "weights", data_config={"input_size": (3, 64, 64)})
    return tmp_path / "weights"


def test_the_tool(command: Command, graphs, weights: Path, tmp_path: Path):
    given = ("--weights", weights, "--format", "pt2", "--output", tmp_path / "model.pt2", "--dynamic-batch")
    status, out, _ = command("export", *given, "--width", 96, "--turns", 1, "--batch-size", 2)
    assert status == 0
    assert "for any number of images of 64 x 96 pixels; logits within" in out
    assert "runs by torch.export.load(FILE).module()(images)" in out
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in out.splitlines() if line.startswith("|")]
    assert rows[0] == ["model", "ms a batch", "images/s", "against compiled"]
    assert [row[0] for row in rows[2:]] == ["pt2", "compiled", "eager"]
    for _, milliseconds, speed, _ in rows[2:]:
        assert float(speed) == pytest.approx(2e3 / float(milliseconds), rel=0.2)


def test_backbones(command: Command, weights: Path, tmp_path: Path):
    """A detector is refused with the remedy, which then works; a classifier has none."""
    detector = make_dense("retinanet", pyramid_dim=16, backbone_args=TINY_BACKBONE)
    detector.save_pretrained(tmp_path / "det", data_config={"input_size": (3, 64, 64)})
    given = ("--format", "pt2", "--output", tmp_path / "model.pt2", "--turns", 0, "--batch-size", 1)
    check_refused(command("export", "--weights", tmp_path / "det", *given), "a RetinaNet finds", "--backbone")
    status, out, _ = command("export", "--weights", tmp_path / "det", *given, "--backbone")
    assert status == 0
    assert "for 1 images of 64 x 64 pixels; maps within" in out
    check_refused(command("export", "--weights", weights, *given, "--backbone"), "--backbone is for dense models")


def test_what_the_tool_refuses(command: Command, weights: Path, tmp_path: Path):
    good = {"--weights": weights, "--format": "pt2", "--output": tmp_path / "model.pt2"}
    for changes, words in (
        ({"--output": tmp_path / "model.bin"}, ("must end in .pt2",)),
        ({"--weights": tmp_path / "none"}, ("neither a local folder",)),
        ({"--height": 8}, ("8 x 64 pixels",)),
        ({"--batch-size": 0}, ("--batch-size is 0",)),
        ({"--format": "tflite"}, ("--format",)),
    ):
        arguments = [word for pair in ({**good, **changes}).items() for word in pair]
        check_refused(command("export", *arguments), *words)
    assert not (tmp_path / "model.pt2").exists()


@pytest.mark.slow
def test_no_compiler(tmp_path: Path):
    """In a process of its own, because PyTorch looks for a compiler only once."""
    make_confident(**TINY).save_pretrained(tmp_path / "weights", data_config={"input_size": (3, 64, 64)})
    tool, out = TOOLS / "export.py", tmp_path / "out"
    given = ["--weights", tmp_path / "weights", "--format", "aoti", "--output", out / "model.pt2"]
    environment = os.environ | {"CXX": "/nowhere/g++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    run = subprocess.run([sys.executable, tool, *given], env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 2
    assert re.search(r"error: .*no working C\+\+ compiler.*use the format pt2", run.stderr), run.stderr
    assert list(out.iterdir()) == []
