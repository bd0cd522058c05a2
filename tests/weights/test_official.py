"""Official checkpoints: every key is known, values go where they belong, and pickles run no code."""

import pickle
import re
from argparse import Namespace
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from helpers.golden import official_shapes, official_state
from torch import Tensor, nn

from s3a.models import ssvit, svit, vvt
from s3a.models.ssvit import OFFICIAL_KEYS
from s3a.weights.official import convert_state, read_checkpoint

FAMILIES = {"ssvit": ssvit, "svit": svit, "vvt": vvt}
OFFICIAL = [
    tuple(name.split("_")) for family in FAMILIES.values() for name in family.SIZES if not name.endswith("_nano")
]

# --------------------------------------------------------------------------------------------------------
# Official checkpoints
# --------------------------------------------------------------------------------------------------------


@cache
def empty(size: str, family: str = "ssvit") -> nn.Module:
    """A published size without numbers."""
    with torch.device("meta"):
        return timm.create_model(f"{family}_{size}")


def official_empty(size: str, family: str = "ssvit") -> dict[str, Tensor]:
    """An official state dict without numbers."""
    return {key: torch.empty(shape, device="meta") for key, shape in official_shapes(size, family).items()}


@pytest.mark.parametrize(("family", "size"), OFFICIAL)
def test_every_official_key_is_accounted_for(family: str, size: str):
    """Every key of ours is filled, in our shape; of the official keys, only constants are dropped."""
    state, model, table = official_empty(size, family), empty(size, family), FAMILIES[family].OFFICIAL_KEYS
    converted = convert_state(state, model, table)
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in converted.items()} == expected
    left = {key for key in state if table.drops(key)}
    assert left == {key for key in state if key.endswith(("RoPE.angle", "fold.weights"))}
    assert len(converted) == len(state) - len(left)


@pytest.mark.parametrize(("family", "size"), [("ssvit", "tiny"), ("svit", "small"), ("vvt", "tiny")])
def test_every_missing_official_key_is_named(family: str, size: str):
    """Each key in turn, for the first block of each stage; the sizes of a family have the same kinds of keys."""
    state, table = official_empty(size, family), FAMILIES[family].OFFICIAL_KEYS
    for key in state:
        if re.search(r"(blocks|block\d)\.[1-9]", key) or table.drops(key):
            continue
        rest = {other: tensor for other, tensor in state.items() if other != key}
        with pytest.raises(ValueError, match=f"missing: {re.escape(table.rename(key))}$"):
            convert_state(rest, empty(size, family), table)


@pytest.mark.parametrize(
    ("surplus", "named"),
    [
        ("optimizer.state", r"has not: optimizer\.state"),
        ("head.extra", r"surplus: head\.extra"),
        ("layers.0.blocks.2.pos.weight", r"surplus: stages\.0\.blocks\.2\.pos_conv\.weight"),
        ("layers.3.downsample.norm.bias", r"surplus: stages\.4\.downsample\.norm\.bias"),
        ("layers.0.blocks.0.gamma_1", r"surplus: stages\.0\.blocks\.0\.ls1\.gamma"),
        ("layers.0.blocks.0.attn.qkv.weights", r"surplus: stages\.0\.blocks\.0\.attn\.qkv\.weights"),
        ("module.head.bias", r"has not: module\.head\.bias"),
    ],
)
def test_surplus_official_keys_are_named(surplus: str, named: str):
    state = {**official_empty("tiny"), surplus: torch.empty(1)}
    with pytest.raises(ValueError, match=named):
        convert_state(state, empty("tiny"), OFFICIAL_KEYS)


@pytest.mark.parametrize(
    ("family", "size", "surplus", "named"),
    [
        ("svit", "small", "layers.0.blocks.0.attn.stoken_refine.rpe", r"surplus: stages\.0\.blocks\.0\.attn\.rpe"),
        ("svit", "small", "layers.2.blocks.0.gamma_1", r"surplus: stages\.2\.blocks\.0\.ls1\.gamma"),
        ("svit", "small", "layers.0.RoPE.angle", r"has not: layers\.0\.RoPE\.angle"),
        ("vvt", "tiny", "block4.2.norm1.weight", r"surplus: stages\.3\.blocks\.2\.norm1\.weight"),
        ("vvt", "tiny", "patch_embed1.norm.scale", r"surplus: stem\.norm\.scale"),
        ("vvt", "tiny", "block1.0.attn.sr.weight", r"has not: block1\.0\.attn\.sr\.weight"),
        ("vvt", "tiny", "cls_token", r"has not: cls_token"),
    ],
)
def test_surplus_official_keys_of_the_others_are_named(family: str, size: str, surplus: str, named: str):
    state = {**official_empty(size, family), surplus: torch.empty(1)}
    with pytest.raises(ValueError, match=named):
        convert_state(state, empty(size, family), FAMILIES[family].OFFICIAL_KEYS)


@pytest.mark.parametrize(
    ("key", "shape"), [("head.bias", (999,)), ("head.weight", (1024, 1000)), ("proj.weight", (1024, 512, 2, 1))]
)
def test_official_shapes_must_fit(key: str, shape: tuple[int, ...]):
    """A weight that is transposed does not pass as one with other axes of length 1."""
    state = {**official_empty("tiny"), key: torch.empty(shape)}
    with pytest.raises(ValueError, match=rf"shapes: {key} is"):
        convert_state(state, empty("tiny"), OFFICIAL_KEYS)


@pytest.mark.parametrize(
    ("family", "size", "other"),
    [
        ("ssvit", "tiny", "small"),
        ("ssvit", "small", "tiny"),
        ("ssvit", "base", "large"),
        ("svit", "base", "large"),
        ("vvt", "small", "medium"),
        ("vvt", "large", "medium"),
    ],
)
def test_sizes_are_not_mixed_up(family: str, size: str, other: str):
    with pytest.raises(ValueError, match="not of this model"):
        convert_state(official_empty(size, family), empty(other, family), FAMILIES[family].OFFICIAL_KEYS)


def test_values_go_where_they_belong():
    """A sample of keys with layers renamed, moved and squeezed; gammas lose their axes of length 1."""
    state = official_state("base")
    converted = convert_state(state, empty("base"), OFFICIAL_KEYS)
    assert torch.equal(converted["stages.2.downsample.norm.running_var"], state["layers.1.downsample.norm.running_var"])
    assert torch.equal(converted["stages.3.blocks.8.ls2.gamma"], state["layers.3.blocks.8.gamma_2"].flatten())
    assert torch.equal(
        converted["stages.1.blocks.3.attn.proj.weight"], state["layers.1.blocks.3.attn.out_proj.weight"][:, :, 0, 0]
    )
    assert torch.equal(converted["stem.9.weight"], state["patch_embed.proj.9.weight"])


@pytest.mark.parametrize(("family", "size"), [("ssvit", "tiny"), ("svit", "small"), ("vvt", "tiny")])
def test_timm_loads_official_checkpoints(family: str, size: str, tmp_path: Path):
    """As a file of pretrained weights; our own state dicts pass through untouched."""
    model, state = empty(size, family), official_state(size, family)
    torch.save({"model": state}, tmp_path / "official.pth")
    overlay = {"file": str(tmp_path / "official.pth")}
    loaded = timm.create_model(f"{family}_{size}", pretrained=True, pretrained_cfg_overlay=overlay)
    expected = convert_state(state, model, FAMILIES[family].OFFICIAL_KEYS)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in loaded.state_dict().items())
    ours = model.state_dict()
    assert FAMILIES[family].checkpoint_filter_fn(ours, model) is ours


def test_values_of_the_others_go_where_they_belong():
    state = official_state("base", "svit")
    converted = convert_state(state, empty("base", "svit"), svit.OFFICIAL_KEYS)
    assert torch.equal(converted["stages.3.downsample.reduction.weight"], state["layers.2.downsample.proj.0.weight"])
    assert torch.equal(converted["stages.2.blocks.5.ls1.gamma"], state["layers.2.blocks.5.gamma_1"].flatten())
    assert torch.equal(converted["stages.1.blocks.2.mlp.dwconv.bias"], state["layers.1.blocks.2.mlp2.conv.conv.bias"])
    state = official_state("tiny", "vvt")
    converted = convert_state(state, empty("tiny", "vvt"), vvt.OFFICIAL_KEYS)
    assert torch.equal(converted["stem.proj.weight"], state["patch_embed1.proj.weight"])
    assert torch.equal(converted["stages.3.downsample.norm.bias"], state["patch_embed4.norm.bias"])
    assert torch.equal(converted["stages.0.blocks.1.attn.gate.2.weight"], state["block1.1.attn.se_fc.2.weight"])
    assert torch.equal(converted["stages.2.norm.weight"], state["norm3.weight"])


# --------------------------------------------------------------------------------------------------------
# Reading checkpoints
# --------------------------------------------------------------------------------------------------------


class Malicious:
    """Touches a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple:
        return Path.touch, (self.path,)


STATE = {"head.weight": torch.arange(6.0).reshape(2, 3), "head.bias": torch.zeros(2)}


@pytest.mark.parametrize(
    "content",
    [STATE, {"model": STATE}, {"model": STATE, "epoch": 3, "args": Namespace(lr=0.1), "optimizer": {"state": {}}}],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_read_checkpoint(tmp_path: Path, content: dict, zipped: bool):
    """A bare state dict, one under "model", and one beside a trainer's options; both formats of torch."""
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    state = read_checkpoint(tmp_path / "a.pth").state
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[key], tensor) for key, tensor in STATE.items())


def test_read_checkpoint_needs_a_file(tmp_path: Path):
    for path in (tmp_path / "none.pth", tmp_path):
        with pytest.raises(FileNotFoundError, match=str(path)):
            read_checkpoint(path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"garbage",
        b"PK\x03\x04 not really a zip",
        b"\x80\x02}q\x00.",
        b"\x80\x04K\x03.",
        bytes(4096),
        b"<html>404</html>",
    ],
)
def test_read_checkpoint_refuses_other_files(tmp_path: Path, content: bytes):
    path = tmp_path / "a.pth"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=str(path)):
        read_checkpoint(path)


def test_read_checkpoint_refuses_truncated_files(tmp_path: Path):
    path = tmp_path / "a.pth"
    for zipped in (True, False):
        torch.save({"model": STATE}, path, _use_new_zipfile_serialization=zipped)
        content = path.read_bytes()
        for part in (0.1, 0.5, 0.9):
            path.write_bytes(content[: int(part * len(content))])
            with pytest.raises(ValueError, match=str(path)):
                read_checkpoint(path)


@pytest.mark.parametrize("content", [{}, {"model": {}}, {"epoch": 3}, [1, 2], torch.zeros(3), {"model": {"a": 1}}])
def test_read_checkpoint_refuses_other_contents(tmp_path: Path, content: object):
    torch.save(content, tmp_path / "a.pth")
    with pytest.raises(ValueError, match="no state dict"):
        read_checkpoint(tmp_path / "a.pth")


@pytest.mark.parametrize("zipped", [True, False, None])
def test_read_checkpoint_unpickles_no_objects(tmp_path: Path, zipped: bool | None):
    """A pickle's code is not run, in both formats of torch and as a plain pickle."""
    path, touched = tmp_path / "a.pth", tmp_path / "touched"
    content = {"model": STATE, "extra": Malicious(touched)}
    if zipped is None:
        path.write_bytes(pickle.dumps(Malicious(touched)))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=zipped)
    with pytest.raises(ValueError, match=str(path)):
        read_checkpoint(path)
    assert not touched.exists()
    pickle.loads(pickle.dumps(Malicious(touched)))
    assert touched.exists(), "the pickle is harmless, so the test proves nothing"


def test_read_checkpoint_forgets_what_it_allowed(tmp_path: Path):
    """The class of trainers' options is allowed for the call alone."""
    before = set(torch.serialization.get_safe_globals())
    torch.save(STATE, tmp_path / "a.pth")
    read_checkpoint(tmp_path / "a.pth")
    assert set(torch.serialization.get_safe_globals()) == before
