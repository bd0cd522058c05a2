"""Weights on the Hub: the real client against a server on loopback (`hub_server.py`)."""

import json
import logging
import shutil
import time
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from helpers.hub_server import STRANGER, TOKEN, Handler, Hub, RefusalError
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load, save
from timm.data import create_transform, resolve_model_data_config
from torch import nn
from transformers import pipeline

from s3a import SSViT, UperNet
from s3a.weights.pretrained import push_folder

LABELS = ["cat", "dog", "Eidechse ü"]
NANO = "lizards/nano"


def make_model(**options: object) -> SSViT:
    """A nano with random statistics, so that a lost buffer shows."""
    model = timm.create_model("ssvit_nano", num_classes=len(LABELS), **options)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    return model.eval()


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    data_config = {"input_size": (3, 48, 48), "crop_pct": 0.9, "mean": (0.4, 0.5, 0.6)}
    make_model().save_pretrained(tmp_path / "saved", data_config=data_config, config={"label_names": LABELS})
    return tmp_path / "saved"


@pytest.fixture
def commit(hub: Hub, folder: Path) -> str:
    """The commit of a repository with a nano."""
    return hub.publish(NANO, contents(folder))


def assert_same(model: nn.Module, other: nn.Module) -> None:
    state, others = model.state_dict(), other.state_dict()
    assert state.keys() == others.keys()
    assert all(torch.equal(tensor, others[key]) for key, tensor in state.items())


def take_requests(hub: Hub) -> list[str]:
    """The requests since the last call."""
    requests, hub.requests = hub.requests, []
    return requests


# --------------------------------------------------------------------------------------------------------
# Loading
# --------------------------------------------------------------------------------------------------------


def test_one_repository_serves_three_libraries(hub: Hub, commit: str, folder: Path):
    """This one, timm and transformers: the same probabilities for an image, under the same names."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (60, 80, 3), dtype=np.uint8))
    ours, through_timm = SSViT.from_pretrained(NANO), timm.create_model(f"hf-hub:{NANO}", pretrained=True).eval()
    assert_same(ours, SSViT.from_pretrained(folder))
    assert_same(ours, through_timm)
    with torch.no_grad():
        config = resolve_model_data_config(ours)
        right = ours(create_transform(**config, is_training=False)(image)[None]).softmax(-1)[0]
    said = pipeline("image-classification", model=NANO)(image)
    assert {each["label"]: pytest.approx(each["score"], abs=1e-6) for each in said} == dict(
        zip(LABELS, right.tolist(), strict=True)
    )
    assert timm.create_model(f"hf-hub:{NANO}@{commit}", pretrained=True, num_classes=5).head.out_features == 5


def test_a_dense_model_goes_to_the_hub_and_back(hub: Hub, monkeypatch: pytest.MonkeyPatch, caplog):
    """With its card, which names the repository; for another number of classes new layers are named."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    model = timm.create_model("upernet", backbone="ssvit_nano", num_classes=len(LABELS), head_dim=16, auxiliary_dim=8)
    for name, buffer in model.named_buffers():
        if "running" in name:
            buffer.uniform_(0.5, 1.5)
    data_config = {"input_size": (3, 64, 64), "mean": (0.4, 0.5, 0.6)}
    model.push_to_hub("lizards/dense", data_config=data_config, config={"label_names": LABELS})
    ours = UperNet.from_pretrained("lizards/dense")
    through_timm = timm.create_model("hf-hub:lizards/dense", pretrained=True)
    for loaded in (ours, through_timm):
        assert_same(loaded, model)
        assert resolve_model_data_config(loaded)["mean"] == [0.4, 0.5, 0.6]
        assert loaded.pretrained_cfg["label_names"] == LABELS
    assert b's3a.UperNet.from_pretrained("lizards/dense")' in hub.files("lizards/dense")["README.md"]
    caplog.clear()
    other = UperNet.from_pretrained("lizards/dense", num_classes=7)
    assert (other.head.classifier.out_channels, other.auxiliary_head.classifier.out_channels) == (7, 7)
    assert "label_names" not in other.pretrained_cfg
    (warned,) = [record.getMessage() for record in caplog.records if "newly initialized" in record.getMessage()]
    assert "lizards/dense knows 3 classes and num_classes is 7" in warned
    assert "head.classifier.weight, head.classifier.bias, auxiliary_head.classifier.weight" in warned


def test_what_is_cached_is_not_asked_for_again(hub: Hub, commit: str):
    SSViT.from_pretrained(NANO)
    loads = [request for request in take_requests(hub) if request.startswith("GET")]
    assert loads == [f"GET /{NANO}/resolve/main/config.json", f"GET /{NANO}/resolve/{commit}/model.safetensors"]
    SSViT.from_pretrained(NANO, revision=commit)
    assert take_requests(hub) == []
    SSViT.from_pretrained(NANO, local_files_only=True)
    assert take_requests(hub) == []
    SSViT.from_pretrained(NANO)
    assert take_requests(hub) == [f"HEAD /{NANO}/resolve/main/config.json"]


def test_revisions(hub: Hub, commit: str, folder: Path):
    """A branch gives its newest commit, a commit itself, and the cache keeps both."""
    first = SSViT.from_pretrained(folder)
    other = make_model()
    other.save_pretrained(folder)
    newer = hub.publish(NANO, contents(folder))
    hub.publish(NANO, hub.repositories[NANO].commits[commit], branch="release/v1.0")
    for revision, right in ((commit, first), (newer, other), ("main", other), ("release/v1.0", first), (None, other)):
        assert_same(SSViT.from_pretrained(NANO, revision), right)
    hub.publish(NANO, hub.repositories[NANO].commits[commit])
    assert_same(SSViT.from_pretrained(NANO), first)
    take_requests(hub)
    assert_same(SSViT.from_pretrained(NANO, newer), other)
    assert take_requests(hub) == []


def test_both_files_are_of_one_commit(hub: Hub, commit: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    """Somebody pushes another architecture right after config.json was fetched."""
    first = SSViT.from_pretrained(folder)
    timm.create_model("ssvit_nano", size=5, num_classes=7).save_pretrained(folder)
    resolve = Handler.resolve

    def push_after_config(self: Handler, repo: str, revision: str, name: str) -> tuple:
        answer = resolve(self, repo, revision, name)
        if name == "config.json" and self.command == "GET":
            hub.publish(NANO, contents(folder))
        return answer

    monkeypatch.setattr(Handler, "resolve", push_after_config)
    assert_same(SSViT.from_pretrained(NANO), first)
    assert SSViT.from_pretrained(NANO).num_classes == 7


def test_cache_dir_and_token(hub: Hub, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    hub.publish("lizards/private", contents(folder), private=True)
    hub.publish("lizards/gated", contents(folder), gated=True)
    for repo in ("lizards/private", "lizards/gated"):
        assert_same(
            SSViT.from_pretrained(repo, token=TOKEN, cache_dir=tmp_path / "mine"), SSViT.from_pretrained(folder)
        )
    assert {path.name for path in (tmp_path / "mine").glob("models--*")} == {
        "models--lizards--private",
        "models--lizards--gated",
    }
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    SSViT.from_pretrained("lizards/private")
    with pytest.raises(FileNotFoundError, match="does not exist or is private"):
        SSViT.from_pretrained("lizards/private", token=False, cache_dir=tmp_path / "other")


def test_a_folder_has_no_revisions(folder: Path):
    with pytest.raises(ValueError, match=r"local folder.*leave revision='main' out"):
        SSViT.from_pretrained(folder, "main")


# --------------------------------------------------------------------------------------------------------
# What cannot be had
# --------------------------------------------------------------------------------------------------------


def get_refusal(repo: str = NANO, **options: object) -> str:
    """The error for a repository, checked to be one line."""
    with pytest.raises(FileNotFoundError) as raised:
        SSViT.from_pretrained(repo, **options)
    line = str(raised.value)
    assert "\n" not in line
    assert line.startswith(f"{repo!r} is ")
    return line


def test_every_refusal_says_why_and_what_helps(hub: Hub, commit: str, folder: Path, monkeypatch: pytest.MonkeyPatch):
    hub.publish("lizards/gated", contents(folder), gated=True)
    hub.publish("lizards/pickled", {"config.json": b"{}", "pytorch_model.bin": b"\x80\x04"})
    hub.publish("lizards/empty", {"README.md": b"# Nothing yet\n"})
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(folder / "none"))
    said = [
        (get_refusal("lizards/nanno"), "does not exist or is private: check the name"),
        (get_refusal("lizards/nanno", token=TOKEN), "does not exist or is private: check the name"),
        (get_refusal("lizards/gated"), "is gated: ask for access on its page"),
        (get_refusal("lizards/gated", token=STRANGER), "is gated: ask for access on its page"),
        (get_refusal(token="hf_expired"), "does not know the token"),
        (get_refusal(token=True), "token=True finds no stored token"),
        (get_refusal(revision="v2"), "has no revision 'v2': pass a branch, tag or commit"),
        (get_refusal(revision="0" * 40), f"has no revision '{'0' * 40}': pass a branch, tag or commit"),
        (get_refusal("lizards/pickled"), "has no model.safetensors at revision 'main': only safetensors"),
        (get_refusal("lizards/empty"), "has no config.json at revision 'main'"),
        (
            get_refusal(local_files_only=True),
            "not in the cache, and local_files_only=True forbids to ask the Hub: leave",
        ),
        (get_refusal("liz ards/nano"), "its name is not valid: it must be ORG/NAME"),
        (get_refusal("nano"), "neither a local folder nor a Hub repository ORG/NAME"),
        (get_refusal("lizards/nano/main"), "neither a local folder nor a Hub repository ORG/NAME"),
    ]
    for line, reason in said:
        assert reason in line


def test_a_cache_does_not_hide_what_the_hub_says(hub: Hub, commit: str):
    """A repository that is gone or gated is no outage, so the cache does not stand in; its commit still loads."""
    model = SSViT.from_pretrained(NANO)
    hub.repositories[NANO].gated = True
    assert "is gated" in get_refusal()
    assert "does not know the token" in get_refusal(token="hf_expired")
    del hub.repositories[NANO]
    assert "does not exist or is private" in get_refusal()
    assert_same(SSViT.from_pretrained(NANO, commit), model)


def test_a_disabled_repository(hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch):
    def disabled(*_: object) -> tuple:
        raise RefusalError(403, message="Access to this resource is disabled.")

    monkeypatch.setattr(Handler, "resolve", disabled)
    assert "is disabled by the Hub" in get_refusal()


def test_a_token_without_the_right(hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch):
    def forbidden(*_: object) -> tuple:
        raise RefusalError(403, message="Your token is not fine-grained enough")

    monkeypatch.setattr(Handler, "resolve", forbidden)
    assert "the token gives no right to that (403)" in get_refusal(token=TOKEN)


def test_what_is_no_hub(hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch):
    """Such as a proxy's login page, which answers every request, but without a commit."""
    monkeypatch.setattr(Handler, "resolve", lambda *_: (b"<html>", {}))
    assert "what answers is no Hub: check HF_ENDPOINT" in get_refusal()


def test_no_network_and_nothing_cached(hub: Hub, commit: str):
    """The error comes at once, not after minutes of retries."""
    with hub.down():
        started = time.perf_counter()
        assert "config.json is not in the cache, and the Hub cannot be reached" in get_refusal()
        assert time.perf_counter() - started < 5


def test_no_network_and_only_half_cached(hub: Hub, commit: str, tmp_path: Path):
    SSViT.from_pretrained(NANO)
    (cached,) = (tmp_path / "hub-cache").glob("models--*/snapshots/*/model.safetensors")
    cached.unlink()
    with hub.down():
        assert "model.safetensors is not in the cache, and the Hub cannot be reached" in get_refusal()


def test_no_network_and_a_warm_cache(hub: Hub, commit: str, caplog: pytest.LogCaptureFixture):
    """Loaded from the cache with a warning; a commit needs no network, so it comes without one."""
    model = SSViT.from_pretrained(NANO)
    with hub.down():
        assert_same(SSViT.from_pretrained(NANO), model)
        (warning,) = list_warnings(caplog)
        assert "the Hub cannot be reached" in warning
        assert f"{NANO} is loaded from the cache, as of commit {commit}" in warning
        SSViT.from_pretrained(NANO, commit)
        SSViT.from_pretrained(NANO, local_files_only=True)
    assert len(list_warnings(caplog)) == 1


@pytest.mark.parametrize("status", [429, 503])
def test_an_overloaded_hub_and_a_warm_cache(hub: Hub, commit: str, status: int, caplog: pytest.LogCaptureFixture):
    model = SSViT.from_pretrained(NANO)
    hub.failing = status
    assert_same(SSViT.from_pretrained(NANO), model)
    (warning,) = list_warnings(caplog)
    assert f"the Hub answers {status}" in warning
    assert f"as of commit {commit}" in warning


def list_warnings(caplog: pytest.LogCaptureFixture) -> list[str]:
    """The library's warnings."""
    return [record.getMessage() for record in caplog.records if record.levelno >= logging.WARNING]


def test_a_hub_that_is_overloaded_is_asked_again(hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch):
    waits = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        hub.failing = None if len(waits) == 2 else hub.failing

    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", sleep)
    hub.failing = 503
    assert SSViT.from_pretrained(NANO).num_classes == 3
    assert len(waits) == 2


def test_a_hub_that_stays_overloaded(hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    hub.failing = 500
    assert "config.json is not in the cache, and the Hub answers 500" in get_refusal()


def test_offline_mode(hub: Hub, commit: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    """The user chose it, so the cache is used without a warning."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    assert "not in the cache, and HF_HUB_OFFLINE forbids to ask the Hub: unset it" in get_refusal()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    SSViT.from_pretrained(NANO)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    take_requests(hub)
    SSViT.from_pretrained(NANO)
    assert take_requests(hub) == []
    assert not list_warnings(caplog)


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("config.json", b"{", "config.json is not JSON"),
        ("config.json", b'{"model_type": "vit", "architectures": []}', "'vit' of transformers"),
        ("config.json", b'{"architecture": "ssvit_nano"}', "lacks num_classes, pretrained_cfg"),
        ("model.safetensors", b"\x80\x04\x95" + bytes(100), "model.safetensors is no whole safetensors file"),
        ("model.safetensors", save({"conv1.weight": torch.zeros(3)}), "missing: "),
        ("model.safetensors", {"rotary": torch.zeros(2)}, "surplus: rotary"),
        ("model.safetensors", {"norm.weight": torch.ones(255)}, "norm.weight is (255,), must be (256,)"),
        ("model.safetensors", {"norm.weight": torch.ones(256, dtype=torch.long)}, "norm.weight"),
    ],
)
def test_repositories_that_hold_something_else(hub: Hub, commit: str, name: str, content: bytes | dict, words: str):
    """The repository and its commit are named, not a path of the cache."""
    if isinstance(content, dict):
        content = save({**load(hub.files(NANO)[name]), **content})
    broken = hub.publish(NANO, {name: content})
    with pytest.raises(ValueError, match=f"{NANO}@{broken}/{name}") as raised:
        SSViT.from_pretrained(NANO)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)


def test_other_families_are_named(hub: Hub, tmp_path: Path):
    model = timm.create_model("resnet10t", num_classes=2)
    timm.models.save_for_hf(model, tmp_path / "resnet", safe_serialization=True)
    hub.publish("lizards/resnet", contents(tmp_path / "resnet"))
    with pytest.raises(ValueError, match=r"'lizards/resnet' holds a ResNet, not a SSViT: load it with timm"):
        SSViT.from_pretrained("lizards/resnet")


# --------------------------------------------------------------------------------------------------------
# Publishing
# --------------------------------------------------------------------------------------------------------


def test_push_then_pull(hub: Hub, tmp_path: Path):
    """What comes back is what was pushed, byte for byte, from one commit."""
    model, config = make_model(drop_path_rate=0.1), {"label_names": LABELS}
    model.save_pretrained(tmp_path / "saved", config=config)
    card = "---\nlicense: mit\n---\n{}\n"
    url = model.push_to_hub("lizards/new", token=TOKEN, config=config, card=card.format("FOLDER_OR_REPO"))
    pushed = hub.files("lizards/new")
    assert pushed == {**contents(tmp_path / "saved"), "README.md": card.format("lizards/new").encode()}
    assert url == f"{hub.url}/lizards/new/commit/{hub.repositories['lizards/new'].branches['main']}"
    assert len(hub.repositories["lizards/new"].commits) == 2, "the empty one and one with all files"
    assert_same(SSViT.from_pretrained("lizards/new"), model)


def test_a_pulled_model_is_pushed_again(hub: Hub, commit: str, folder: Path):
    """With its preprocessing and the names of its classes."""
    SSViT.from_pretrained(NANO).push_to_hub("lizards/copy", token=TOKEN, private=True)
    copied, saved = hub.files("lizards/copy"), contents(folder)
    assert copied["model.safetensors"] == saved["model.safetensors"]
    assert json.loads(copied["config.json"]) == json.loads(saved["config.json"])
    assert hub.repositories["lizards/copy"].private
    assert SSViT.from_pretrained("lizards/copy", token=TOKEN).pretrained_cfg["label_names"] == LABELS


def test_a_push_brings_a_card(hub: Hub, tmp_path: Path):
    make_model().push_to_hub("lizards/new", token=TOKEN)
    (tmp_path / "README.md").write_bytes(hub.files("lizards/new")["README.md"])
    card = ModelCard.load(tmp_path / "README.md")
    assert (card.data.license, card.data.library_name) == ("mit", "timm")
    assert 's3a.SSViT.from_pretrained("lizards/new")' in card.text
    assert "FOLDER_OR_REPO" not in card.text


def test_pushing_a_folder(hub: Hub, folder: Path):
    """Other files in it are not published, and the folder is not changed."""
    (folder / "README.md").write_text("---\nlicense: mit\n---\n# FOLDER_OR_REPO\n")
    (folder / "diary.txt").write_text("private")
    before = contents(folder)
    hub.publish("lizards/there", {"notes.md": b"kept"})
    push_folder(folder, "lizards/there", token=TOKEN)
    names = {"README.md", "config.json", "model.safetensors", "notes.md"}
    assert hub.files("lizards/there").keys() == names
    assert b"# lizards/there\n" in hub.files("lizards/there")["README.md"]
    assert contents(folder) == before


def test_what_cannot_be_loaded_is_not_published(hub: Hub, folder: Path):
    shutil.copy(folder / "config.json", folder / "model.safetensors")
    with pytest.raises(ValueError, match="no whole safetensors file"):
        push_folder(folder, "lizards/new", token=TOKEN)
    assert take_requests(hub) == []


def test_an_invalid_card_is_refused(hub: Hub):
    with pytest.raises(ValueError, match=r"Invalid metadata in README\.md"):
        make_model().push_to_hub("lizards/new", token=TOKEN, card="---\n- a list\n---\n")


@pytest.mark.parametrize(
    ("token", "repo", "words"),
    [
        (None, "lizards/new", "(401): log in with `hf auth login`"),
        ("hf_expired", "lizards/new", "does not know the token"),
        (STRANGER, "lizards/new", "gives no right to that (403)"),
        (TOKEN, "new", "must be ORG/NAME"),
        (TOKEN, "liz ards/new", "its name is not valid"),
    ],
)
def test_refused_pushes(hub: Hub, token: str | None, repo: str, words: str):
    with pytest.raises(ValueError, match=repo) as raised:
        make_model().push_to_hub(repo, token=token)
    assert words in str(raised.value)
    assert "\n" not in str(raised.value)
    assert not hub.repositories


def test_a_push_without_network(hub: Hub):
    with hub.down(), pytest.raises(ValueError, match="'lizards/new': the Hub cannot be reached"):
        make_model().push_to_hub("lizards/new", token=TOKEN)
