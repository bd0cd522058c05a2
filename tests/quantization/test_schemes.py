"""Schemes that a machine cannot run are refused, and importing torchao changes nothing for others."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers.quantized import make_trained

from s3a import SSViT
from s3a.quantization import schemes
from s3a.quantization.convert import quantize
from s3a.quantization.schemes import check_scheme, check_trainable


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A nano in int8-dynamic."""
    quantize(make_trained(), "int8-dynamic").save_pretrained(tmp_path / "quantized")
    return tmp_path / "quantized"


def test_unknown_schemes():
    with pytest.raises(ValueError, match=r"'int8-dynamc' is unknown.*did you mean 'int8-dynamic'"):
        check_scheme("int8-dynamc")


def test_schemes_that_the_machine_cannot_run(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(
        ValueError, match=r"'float8-dynamic' needs a CUDA GPU of compute capability 8\.9.*there is none"
    ):
        check_scheme("float8-dynamic")
    with pytest.raises(ValueError, match=r"capability 9\.0 .*none here; it needs mslk 1\.0.*pip install 'mslk>=1\.0'"):
        check_scheme("int4-weight-only")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ValueError, match=r"capability 8\.9 or more, and the one here has 8\.0"):
        check_scheme("float8-dynamic")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    assert check_scheme("float8-dynamic").capability == (8, 9)


def test_old_torchao(monkeypatch: pytest.MonkeyPatch, folder: Path):
    monkeypatch.setattr(schemes, "version", lambda name: "0.9.2")
    for call in (lambda: check_scheme("int8-dynamic"), lambda: SSViT.from_pretrained(folder)):
        with pytest.raises(ValueError, match=r"needs torchao 0\.18 or newer, and 0\.9\.2 is installed \(pip install"):
            call()


def test_schemes_that_cannot_be_trained():
    assert check_trainable("int8-dynamic").trains
    with pytest.raises(ValueError, match="'float8-weight-only' cannot be trained for: use one of int8-weight-only"):
        check_trainable("float8-weight-only")


# The compiler warns once per class of torchao's tensors, so each of the three schemes has another.
IMPORT_AND_COMPILE = """
import logging, sys, warnings
import torch, timm, s3a
before = warnings.filters[:]
from s3a.quantization.convert import quantize
import s3a.quantization.storage
assert warnings.filters == before, [each for each in warnings.filters if each not in before]
assert logging.getLogger("torch.utils._pytree").level == 0

def compile_head(model):
    with torch.inference_mode():
        torch.compile(model.head)(torch.randn(2, 256))

model = timm.create_model("ssvit_nano")
compile_head(quantize(model, "float8-weight-only"))
quantize(model, "int8-weight-only").save_pretrained(sys.argv[1])
warnings.resetwarnings()
compile_head(s3a.SSViT.from_pretrained(sys.argv[1]))
print("quiet until here", file=sys.stderr)
quantized = quantize(model, "int8-activations-int4-weights")
warnings.resetwarnings()
compile_head(quantized)
"""


@pytest.mark.slow
def test_imports_leave_warnings_alone_and_users_see_none(tmp_path: Path):
    """Imports keep the filters as they are; quantized models compile without a warning that is not for users."""
    environment = os.environ | {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "cache")}
    command = [sys.executable, "-c", IMPORT_AND_COMPILE, str(tmp_path / "weights")]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    quiet, _, rest = run.stderr.partition("quiet until here")
    assert "_stable_hash_for_caching" not in quiet
    assert "_stable_hash_for_caching" in rest  # so the test sees it
