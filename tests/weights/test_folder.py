"""Weights folders and official checkpoints: what is written comes back bit by bit, and nothing else is taken."""

import json
import pickle
import re
import shutil
from argparse import Namespace
from functools import cache
from pathlib import Path

import pytest
import timm
import torch
from helpers.golden import official_shapes, official_state
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from s3a import VVT, SSViT, SViT
from s3a.models import ssvit, svit, vvt
from s3a.models.ssvit import OFFICIAL_KEYS
from s3a.weights.official import convert_state, read_checkpoint

FAMILIES = {"ssvit": ssvit, "svit": svit, "vvt": vvt}
OFFICIAL = [
    tuple(name.split("_")) for family in FAMILIES.values() for name in family.SIZES if not name.endswith("_nano")
]


def assert_equal_states(model: nn.Module, other: nn.Module) -> None:
    """The same keys with the same bits."""
    state, others = model.state_dict(), other.state_dict()
    assert state.keys() == others.keys()
    for key, tensor in state.items():
        assert tensor.dtype == others[key].dtype
        assert torch.equal(tensor, others[key]), key


def randomized(**options: object) -> SSViT:
    """A nano whose every parameter and statistic differs from a fresh one's."""
    model = timm.create_model("ssvit_nano", **options)
    for tensor in model.state_dict().values():
        if tensor.is_floating_point():
            tensor.uniform_(0.1, 1)
        else:
            tensor.fill_(7)
    return model.eval()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A saved nano of five classes."""
    randomized(num_classes=5).save_pretrained(tmp_path / "saved")
    return tmp_path / "saved"


def change_config(folder: Path, **changes: object) -> None:
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")


def change_weights(folder: Path, drop: tuple[str, ...] = (), **added: Tensor) -> None:
    state = load_file(folder / "model.safetensors")
    state = {key: tensor for key, tensor in state.items() if key not in drop}
    save_file({**state, **added}, folder / "model.safetensors")


# --------------------------------------------------------------------------------------------------------
# Round trips
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_classes": 10},
        {"num_classes": 0},
        {"in_chans": 1, "num_classes": 3},
        {"global_pool": ""},
        {"size": 5, "drop_path_rate": 0.3},
    ],
)
def test_round_trip(tmp_path: Path, options: dict):
    model = randomized(**options)
    model.save_pretrained(tmp_path)
    loaded = SSViT.from_pretrained(tmp_path)
    assert_equal_states(loaded, model)
    assert not loaded.training
    assert (loaded.num_classes, loaded.in_chans, loaded.global_pool) == (
        model.num_classes,
        model.in_chans,
        model.global_pool,
    )
    x = torch.randn(2, options.get("in_chans", 3), 40, 56)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))


@pytest.mark.parametrize(("name", "family"), [("svit_nano", SViT), ("vvt_nano", VVT)])
def test_round_trip_of_the_others(tmp_path: Path, name: str, family: type):
    model = timm.create_model(name, num_classes=5, in_chans=1, drop_path_rate=0.1).eval()
    model.save_pretrained(tmp_path)
    loaded = family.from_pretrained(tmp_path)
    assert type(loaded) is family
    assert_equal_states(loaded, model)
    assert_equal_states(timm.create_model(f"local-dir:{tmp_path}", pretrained=True), model)
    x = torch.randn(2, 1, 40, 56)
    with torch.inference_mode():
        assert torch.equal(loaded(x), model(x))
    with pytest.raises(
        ValueError, match=rf"holds a {family.__name__}, not a SSViT.*{family.__name__}\.from_pretrained"
    ):
        SSViT.from_pretrained(tmp_path)


def test_loaded_models_train(folder: Path):
    """No tensor of theirs is bound to a file, to the meta device or to inference."""
    model = SSViT.from_pretrained(folder).train()
    model(torch.randn(2, 3, 40, 56)).sum().backward()
    assert all(parameter.grad is not None for parameter in model.parameters())
    shutil.rmtree(folder)
    assert {tensor.device.type for tensor in model.state_dict().values()} == {"cpu"}
    torch.optim.AdamW(model.parameters()).step()


@pytest.mark.parametrize(("asked", "classes"), [({}, 5), ({"num_classes": 5}, 5), ({"num_classes": 8}, 8)])
def test_timm_loads_the_folder(folder: Path, asked: dict, classes: int):
    """`local-dir:`; with other classes, all but the head is loaded."""
    saved = SSViT.from_pretrained(folder)
    loaded = timm.create_model(f"local-dir:{folder}", pretrained=True, **asked).eval()
    assert isinstance(loaded, SSViT)
    assert loaded.num_classes == classes
    saved.reset_classifier(classes)
    ours, right = loaded.state_dict(), saved.state_dict()
    assert ours.keys() == right.keys()
    body = [key for key in right if not key.startswith("head.")]
    assert all(torch.equal(ours[key], right[key]) for key in body)
    assert ours["head.weight"].shape == (classes, 256)
    if classes == 5:
        assert_equal_states(loaded, SSViT.from_pretrained(folder))


def test_timm_loads_features_and_other_channels(tmp_path: Path):
    model = randomized(in_chans=1, num_classes=5)
    model.save_pretrained(tmp_path)
    x = torch.randn(1, 1, 64, 64)
    same = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    backbone = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, features_only=True).eval()
    with torch.inference_mode():
        assert torch.equal(same(x), model(x))
        for ours, right in zip(backbone(x), model.forward_intermediates(x, intermediates_only=True), strict=True):
            assert torch.equal(ours, right)


def test_other_number_of_classes_keeps_the_body(folder: Path):
    model, other = SSViT.from_pretrained(folder), SSViT.from_pretrained(folder, num_classes=12)
    assert (other.num_classes, other.head.weight.shape) == (12, (12, 256))
    model.head = other.head
    assert_equal_states(other, model)
    assert SSViT.from_pretrained(folder, num_classes=0)(torch.randn(1, 3, 32, 32)).shape == (1, 256)
    assert torch.equal(
        SSViT.from_pretrained(folder, num_classes=5).head.weight, SSViT.from_pretrained(folder).head.weight
    )


def test_more_arguments_reach_the_model(folder: Path):
    model = SSViT.from_pretrained(folder, drop_path_rate=0.25)
    assert model.stages[-1].blocks[-1].drop_path.drop_prob == 0.25
    with pytest.raises(TypeError, match="drop_path_rates"):
        SSViT.from_pretrained(folder, drop_path_rates=0.25)


def test_config_names_labels_and_preprocessing(tmp_path: Path):
    """timm's config.json: architecture, classes, their names, and how images were prepared."""
    model, labels = randomized(num_classes=3), ["cat", "dog", "Eidechse ü"]
    data = {"input_size": (3, 48, 48), "mean": (0.1, 0.2, 0.3), "crop_pct": 0.9}
    model.save_pretrained(tmp_path, data_config=data, config={"label_names": labels}, card="# A model\n")
    config = json.loads((tmp_path / "config.json").read_text(encoding="utf-8"))
    assert (config["architecture"], config["num_classes"], config["label_names"]) == ("ssvit_nano", 3, labels)
    assert (tmp_path / "README.md").read_text(encoding="utf-8") == "# A model\n"
    for loaded in (SSViT.from_pretrained(tmp_path), timm.create_model(f"local-dir:{tmp_path}", pretrained=True)):
        resolved = resolve_model_data_config(loaded)
        assert (tuple(resolved["input_size"]), tuple(resolved["mean"])) == ((3, 48, 48), (0.1, 0.2, 0.3))
        assert resolved["crop_pct"] == 0.9
        assert loaded.pretrained_cfg["label_names"] == labels


def test_saving_again_replaces_and_leaves_nothing_else(folder: Path):
    other = randomized(num_classes=6)
    other.save_pretrained(folder)
    assert_equal_states(SSViT.from_pretrained(folder), other)
    assert sorted(path.name for path in folder.iterdir()) == ["config.json", "model.safetensors"]


def test_loaded_models_can_be_saved(folder: Path, tmp_path: Path):
    model = SSViT.from_pretrained(folder, num_classes=9)
    model.save_pretrained(tmp_path / "again")
    assert_equal_states(SSViT.from_pretrained(tmp_path / "again"), model)


def test_an_interrupted_save_leaves_the_old_weights(folder: Path, monkeypatch: pytest.MonkeyPatch):
    before = SSViT.from_pretrained(folder)

    def broken(_, path: Path, **options: object) -> None:
        Path(path).write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("s3a.weights.folder.save_file", broken)
    with pytest.raises(OSError, match="disk full"):
        randomized(num_classes=6).save_pretrained(folder)
    assert_equal_states(SSViT.from_pretrained(folder), before)


def test_models_built_by_hand_have_no_name_to_save(tmp_path: Path):
    model = SSViT(dims=(32,), depths=(1,), num_heads=(2,), mlp_ratios=(2,), layer_scale=(None,))
    with pytest.raises(ValueError, match=r"timm\.create_model"):
        model.save_pretrained(tmp_path)


def test_channels_last_weights_are_saved(tmp_path: Path):
    """safetensors takes contiguous tensors alone."""
    model = randomized()
    expected = {key: tensor.clone() for key, tensor in model.state_dict().items()}
    model.to(memory_format=torch.channels_last).save_pretrained(tmp_path)
    loaded = SSViT.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(loaded[key], tensor) for key, tensor in expected.items())


# --------------------------------------------------------------------------------------------------------
# Folders that cannot be loaded
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["config.json", "model.safetensors"])
def test_missing_file(folder: Path, missing: str):
    (folder / missing).unlink()
    with pytest.raises(FileNotFoundError, match=rf"{folder}.*no {missing}"):
        SSViT.from_pretrained(folder)


def test_missing_folder(tmp_path: Path):
    """Neither a folder nor the name of a repository: refused without asking the network."""
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path}/none.*folder"):
        SSViT.from_pretrained(tmp_path / "none")


@pytest.mark.parametrize("name", ["no-such-model", "someone/no-such-model"])
def test_missing_repository(name: str, tmp_path: Path):
    """Neither a folder nor in the cache."""
    with pytest.raises(FileNotFoundError, match=f"'{name}'.*folder"):
        SSViT.from_pretrained(name, cache_dir=tmp_path, local_files_only=True)


@pytest.mark.parametrize("content", [b"", b"not safetensors at all, but long enough", b"\x80\x04\x95" + bytes(100)])
def test_garbage_weights(folder: Path, content: bytes):
    (folder / "model.safetensors").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.safetensors is no whole safetensors file"):
        SSViT.from_pretrained(folder)


@pytest.mark.parametrize("part", [0.2, 0.5, 0.999])
def test_truncated_weights(folder: Path, part: float):
    path = folder / "model.safetensors"
    content = path.read_bytes()
    path.write_bytes(content[: int(part * len(content))])
    with pytest.raises(ValueError, match=r"model\.safetensors is no whole safetensors file.*again"):
        SSViT.from_pretrained(folder)


def test_foreign_weights(folder: Path):
    """Of another network: the keys that are missing and those that are too many."""
    save_file({"conv1.weight": torch.zeros(3)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"missing: .* more; surplus: conv1\.weight"):
        SSViT.from_pretrained(folder)


def test_missing_and_surplus_keys(folder: Path):
    change_weights(folder, drop=("stem.0.bias",))
    with pytest.raises(ValueError, match=r"missing: stem\.0\.bias$"):
        SSViT.from_pretrained(folder)
    change_weights(folder, **{"stem.0.bias": torch.zeros(16), "rotary": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"surplus: rotary$"):
        SSViT.from_pretrained(folder)


def test_wrong_shape(folder: Path):
    change_weights(folder, **{"norm.weight": torch.ones(255)})
    with pytest.raises(ValueError, match=r"norm\.weight is \(255,\), must be \(256,\)"):
        SSViT.from_pretrained(folder)


@pytest.mark.parametrize("num_classes", [4, 0, 1000])
def test_wrong_number_of_classes(folder: Path, num_classes: int):
    change_config(folder, num_classes=num_classes)
    with pytest.raises(ValueError, match=rf"{num_classes} classes.*head\.weight"):
        SSViT.from_pretrained(folder)


@pytest.mark.parametrize("num_classes", ["five", -1, 2.5, True])
def test_meaningless_number_of_classes(folder: Path, num_classes: object):
    change_config(folder, num_classes=num_classes)
    with pytest.raises(ValueError, match="num_classes"):
        SSViT.from_pretrained(folder)


@pytest.mark.parametrize(("wrong", "meant"), [("ssvit_nanno", "ssvit_nano"), ("ssvit-tiny", "ssvit_tiny")])
def test_unknown_architecture(folder: Path, wrong: str, meant: str):
    change_config(folder, architecture=wrong)
    with pytest.raises(ValueError, match=f"architecture '{wrong}'.*'{meant}'"):
        SSViT.from_pretrained(folder)


def test_another_architecture(folder: Path):
    """A registered one, of another family or another size."""
    change_config(folder, architecture="ssvit_tiny")
    with pytest.raises(ValueError, match="ssvit_tiny with 5 classes"):
        SSViT.from_pretrained(folder)
    model = timm.create_model("resnet10t", num_classes=2)
    save_file(model.state_dict(), folder / "model.safetensors")
    change_config(folder, architecture="resnet10t", num_classes=2, pretrained_cfg={}, model_args={})
    with pytest.raises(ValueError, match="ResNet, not a SSViT"):
        SSViT.from_pretrained(folder)


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"architecture: ssvit_nano"])
def test_config_that_is_not_json(folder: Path, content: bytes):
    (folder / "config.json").write_bytes(content)
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        SSViT.from_pretrained(folder)


@pytest.mark.parametrize("content", ["[]", "3", '"ssvit_nano"', "null"])
def test_config_that_is_no_object(folder: Path, content: str):
    (folder / "config.json").write_text(content)
    with pytest.raises(ValueError, match=r"config\.json"):
        SSViT.from_pretrained(folder)


@pytest.mark.parametrize("key", ["architecture", "num_classes", "pretrained_cfg"])
def test_config_without_an_entry(folder: Path, key: str):
    config = json.loads((folder / "config.json").read_text())
    config.pop(key)
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=rf"config\.json lacks {key}"):
        SSViT.from_pretrained(folder)


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
    """Ours, all of them, in our shapes; of theirs, only constants are left behind."""
    state, model, table = official_empty(size, family), empty(size, family), FAMILIES[family].OFFICIAL_KEYS
    converted = convert_state(state, model, table)
    expected = {key: tensor.shape for key, tensor in model.state_dict().items()}
    assert {key: tensor.shape for key, tensor in converted.items()} == expected
    left = {key for key in state if table.drops(key)}
    assert left == {key for key in state if key.endswith(("RoPE.angle", "fold.weights"))}
    assert len(converted) == len(state) - len(left)


@pytest.mark.parametrize(("family", "size"), OFFICIAL)
def test_every_missing_official_key_is_named(family: str, size: str):
    """Each key in turn, but one block stands for all."""
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
    """A transposed weight is no reshaped one."""
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
    state = read_checkpoint(tmp_path / "a.pth")
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
    """Whatever the pickle would run is not run; torch's two formats, and a plain pickle."""
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
    """The allowance for trainers' options must not outlive the call."""
    before = set(torch.serialization.get_safe_globals())
    torch.save(STATE, tmp_path / "a.pth")
    read_checkpoint(tmp_path / "a.pth")
    assert set(torch.serialization.get_safe_globals()) == before
