"""Weights folders: what is written comes back bit by bit, and nothing else is loaded."""

import json
import logging
import re
import shutil
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file
from timm.data import resolve_model_data_config
from torch import Tensor, nn

from s3a import VVT, SSViT, SViT


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
    """None of their tensors is bound to a file, on the meta device or for inference alone."""
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


LABELS = ["ant", "bee", "cat", "dog", "fox"]


@pytest.fixture
def labelled(tmp_path: Path) -> Path:
    """A saved nano of five classes with names."""
    randomized(num_classes=5).save_pretrained(tmp_path / "labelled", config={"label_names": LABELS})
    return tmp_path / "labelled"


def list_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


@pytest.mark.parametrize("through_timm", [False, True])
def test_a_new_head_is_not_silent(labelled: Path, caplog: pytest.LogCaptureFixture, through_timm: bool):
    """A warning names its weights; the names of the old classes are gone, also from what is saved."""

    def load(**options: object) -> nn.Module:
        if through_timm:
            return timm.create_model(f"local-dir:{labelled}", pretrained=True, **options)
        return SSViT.from_pretrained(labelled, **options)

    for options in ({}, {"num_classes": 5}):
        assert load(**options).pretrained_cfg["label_names"] == LABELS
    assert "label_names" not in load(num_classes=0).pretrained_cfg
    assert list_warnings(caplog) == []
    model = load(num_classes=8)
    (warning,) = list_warnings(caplog)
    assert warning.startswith("Some weights of ssvit_nano were newly initialized")
    assert "knows 5 classes and num_classes is 8: head.weight, head.bias. Train the model" in warning
    assert "label_names" not in model.pretrained_cfg
    model.save_pretrained(labelled.parent / "again")
    assert "ant" not in (labelled.parent / "again" / "config.json").read_text(encoding="utf-8")


def test_timm_does_not_adapt_channels_in_silence(folder: Path, caplog: pytest.LogCaptureFixture):
    model = timm.create_model(f"local-dir:{folder}", pretrained=True, in_chans=1)
    assert model.in_chans == 1
    (warning,) = list_warnings(caplog)
    assert "stem.0.weight was adapted from 3 to 1 channels" in warning


def test_more_arguments_reach_the_model(folder: Path):
    model = SSViT.from_pretrained(folder, drop_path_rate=0.25)
    assert model.stages[-1].blocks[-1].drop_path.drop_prob == 0.25
    with pytest.raises(TypeError, match=r"'drop_path_rates' is unknown.*did you mean 'drop_path_rate'"):
        SSViT.from_pretrained(folder, drop_path_rates=0.25)
    with pytest.raises(
        ValueError, match=r"with 5 classes and in_chans=1; leave out.*stem\.0\.weight is \(16, 3, 3, 3\)"
    ):
        SSViT.from_pretrained(folder, in_chans=1)


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


def test_the_folder_of_a_run_is_answered_with_its_weights(folder: Path):
    """And one with several runs with those of each; folders without weights are not named."""
    run = folder.parent / "runs" / "digits"
    for name in ("model", "best"):
        shutil.copytree(folder, run / name)
    (run / "checkpoints").mkdir()
    hint = f"did you mean {run}/best or {run}/model?"
    for place in (run, run.parent):
        with pytest.raises(FileNotFoundError, match=f"'{place}' has no config.json, but .*") as raised:
            SSViT.from_pretrained(place)
        assert str(raised.value).endswith(hint)
    (run / "best" / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=f"did you mean {run}/model\\?$"):
        SSViT.from_pretrained(run)
    with pytest.raises(FileNotFoundError, match=f"'{run}/modle' .*; did you mean the folder {run}/model\\?$"):
        SSViT.from_pretrained(run / "modle")


def test_a_file_is_answered_with_what_makes_a_folder(folder: Path):
    for name, words in {
        "saved/model.safetensors": f"did you mean its folder, {folder}?",
        "official 1.pth": f"tools/convert_official.py '{folder.parent}/official 1.pth' --model NAME --output FOLDER",
        "pytorch_model.bin": "tools/convert_official.py",
        "other.safetensors": "checkpoint_path=",
    }.items():
        path = folder.parent / name
        path.touch()
        with pytest.raises(FileNotFoundError, match="is a file, and weights are a folder") as raised:
            SSViT.from_pretrained(path)
        assert words in str(raised.value)


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


@pytest.mark.parametrize(
    ("key", "dtype"),
    [
        ("norm.weight", torch.int64),
        ("norm.weight", torch.uint8),
        ("norm.weight", torch.bool),
        ("norm.weight", torch.float8_e4m3fn),
        ("norm.num_batches_tracked", torch.float32),
        ("norm.num_batches_tracked", torch.int32),
    ],
)
def test_another_kind_of_numbers(folder: Path, key: str, dtype: torch.dtype):
    """Of the right shape: without a word the model would compute in them."""
    change_weights(folder, **{key: load_file(folder / "model.safetensors")[key].to(dtype)})
    with pytest.raises(ValueError, match=rf"another kind of numbers: {re.escape(key)}$"):
        SSViT.from_pretrained(folder)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_other_floats_are_loaded(folder: Path, dtype: torch.dtype):
    change_weights(folder, **{"norm.weight": load_file(folder / "model.safetensors")["norm.weight"].to(dtype)})
    assert SSViT.from_pretrained(folder).norm.weight.dtype == dtype


@pytest.mark.parametrize("num_classes", [4, 0, 1000])
def test_wrong_number_of_classes(folder: Path, num_classes: int):
    change_config(folder, num_classes=num_classes)
    with pytest.raises(ValueError, match=rf"{num_classes} classes.*head\.weight"):
        SSViT.from_pretrained(folder)


@pytest.mark.parametrize("num_classes", ["five", -1, 2.5, True])
def test_meaningless_number_of_classes(folder: Path, num_classes: object):
    change_config(folder, num_classes=num_classes)
    with pytest.raises(ValueError, match=rf"num_classes is {num_classes!r}: it must be an integer of 0 or more"):
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


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_args": {"pretrained": True}}, "model_args holds pretrained"),
        ({"model_args": {"checkpoint_path": "evil.pth"}}, "model_args holds checkpoint_path"),
        ({"model_args": {"depth": 3}}, "ssvit_nano cannot be built with its model_args"),
        ({"model_args": {"dims": [32]}}, "ssvit_nano cannot be built with its model_args"),
        ({"model_args": {"size": "seven"}}, "ssvit_nano cannot be built with its model_args"),
        ({"model_args": [3]}, "model_args is [3]: it must be a JSON object"),
        ({"pretrained_cfg": "none"}, "pretrained_cfg is 'none': it must be a JSON object"),
    ],
)
def test_configs_that_no_model_has(folder: Path, changes: dict, words: str):
    """No entry of a config can choose another file to load."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, **changes}), encoding="utf-8")
    with pytest.raises(ValueError, match=r"config\.json") as raised:
        SSViT.from_pretrained(folder)
    assert words in str(raised.value)
