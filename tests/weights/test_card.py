"""Model cards: what people and the Hub read of a model, checked through the Hub's own parser."""

import dataclasses
import re
from pathlib import Path

import pytest
import timm
import torch
from huggingface_hub import ModelCard

from s3a.analysis.cost import count_cost
from s3a.weights.card import (
    DETECTOR,
    SEGMENTER,
    OfficialFacts,
    Purpose,
    Score,
    TrainingFacts,
    build_card,
    insert_repository,
)

FACTS = TrainingFacts(
    name="digits",
    weights="ema",
    scores={
        "last": Score(epoch=28, values={"top-1": 358 / 360, "top-5": 1.0}),
        "ema": Score(epoch=28, values={"top-1": 359 / 360}),
    },
    dataset="digits",
    num_train=1437,
    num_val=360,
    fingerprint="sha256:5a1ad1e5",
    recipe={"model": "ssvit_nano", "crop_scale": (0.8, 1.0), "drop_path": 0.1, "odd": "a | b\nc"},
)


@pytest.fixture(scope="module")
def model() -> torch.nn.Module:
    with torch.device("meta"):
        return timm.create_model("ssvit_nano", num_classes=10)


def rows(text: str) -> dict[str, list[str]]:
    """The rows of all tables by their first cell."""
    cells = [re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line.startswith("| ")]
    return {first.strip(): [cell.strip() for cell in rest] for first, *rest in cells}


def test_the_hub_reads_the_card(model: torch.nn.Module):
    data = ModelCard(build_card(model, FACTS)).data
    assert (data.license, data.library_name, data.pipeline_tag) == ("mit", "timm", "image-classification")
    assert (data.datasets, data.metrics) == (["digits"], ["accuracy"])
    assert {"timm", "transformers", "s3a"} <= set(data.tags)
    (result,) = data.eval_results
    assert (result.metric_type, result.metric_value, result.dataset_type) == ("accuracy", 359 / 360, "digits")
    assert "top-1" in result.metric_name
    assert "EMA" in result.metric_name
    last = TrainingFacts(**{**vars(FACTS), "weights": "last"})
    assert [result.metric_value for result in ModelCard(build_card(model, last)).data.eval_results] == [358 / 360, 1.0]


def test_people_read_the_card(model: torch.nn.Module):
    text = build_card(model, FACTS, data_config={"input_size": (3, 64, 96)})
    told = rows(text)
    cost = count_cost(model, 64, 96)
    assert told["image"] == ["64 x 96 pixels, 3 channels"]
    assert told["parameters"] == [f"{cost.parameters:,}"]
    assert told["GMACs, layers alone"] == [f"{cost.published_gmacs:.3g}"]
    assert told["GMACs, whole"] == [f"{cost.gmacs:.3g}"] != told["GMACs, layers alone"]
    assert told["last epoch"] == ["28", "99.44 %", "100.00 %"]
    assert told["**EMA (exponential moving average), last epoch: these weights**"] == ["28", "99.72 %", ""]
    assert told["fingerprint"] == ["`sha256:5a1ad1e5`"]
    assert told["training images"] == ["1,437"]
    assert told["crop_scale"] == ["(0.8, 1.0)"]
    assert told["odd"] == ["a \\| b c"]
    assert told["licence"] == ["mit"]
    assert "arxiv.org/abs/2405.13335" in text


def test_the_card_of_another_purpose(model: torch.nn.Module):
    """Nothing of classes, accuracies or pipelines; scores as they are; data and recipe as ever."""
    purpose = Purpose(description="A model of brightness", outputs="outputs")
    scores = {"last": Score(epoch=2, values={"error": 1.23456})}
    text = build_card(model, dataclasses.replace(FACTS, purpose=purpose, weights="last", scores=scores))
    data, told = ModelCard(text).data, rows(text)
    assert (data.pipeline_tag, data.eval_results, data.datasets) == (None, None, ["digits"])
    assert data.tags == ["timm", "s3a"]
    assert text.split("# ")[1].splitlines()[2].startswith("A model of brightness of timm's registry")
    assert (told["weights"], told["**last epoch: these weights**"]) == (["epoch", "error"], ["2", "1.2346"])
    assert told["training images"] == ["1,437"]
    assert told["drop_path"] == ["0.1"]
    assert not re.search("classif|accuracy|pipeline", text)
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(code, "card", "exec")


def test_a_model_of_which_nothing_is_known(model: torch.nn.Module):
    text = build_card(model)
    assert ModelCard(text).data.eval_results is None
    assert "Recipe" not in text
    assert rows(text)["image"] == ["64 x 64 pixels, 3 channels"]


def test_models_of_timm(tmp_path: Path):
    """They have their licence, and no method of this library loads them."""
    with torch.device("meta"):
        text = build_card(timm.create_model("resnet18"))
    assert ModelCard(text).data.license == "apache-2.0"
    assert "from_pretrained" not in text
    assert "fan2024vision" not in text


DENSE = [
    ("semantic_fpn", "ssvit_nano", SEGMENTER, "image-segmentation", "mit", "fan2024vision"),
    ("upernet", "svit_nano", SEGMENTER, "image-segmentation", "mit", "huang2022vision"),
    ("mask_rcnn", "vvt_nano", DETECTOR, "object-detection", "apache-2.0", "sun2022vicinity"),
    ("retinanet", "resnet18", DETECTOR, "object-detection", "apache-2.0", None),
]


@pytest.mark.parametrize(
    ("name", "backbone", "purpose", "tag", "licence", "paper"), DENSE, ids=[row[0] for row in DENSE]
)
def test_dense_models(name: str, backbone: str, purpose: Purpose, tag: str, licence: str, paper: str | None):
    """What they are for, at what size, with the licence and the paper of their backbones; no pipeline loads them."""
    with torch.device("meta"):
        model = timm.create_model(name, backbone=backbone, num_classes=11)
    text = build_card(model, data_config={"input_size": (3, 64, 96)})
    data, told = ModelCard(text).data, rows(text)
    assert (data.pipeline_tag, data.license, told["licence"]) == (tag, licence, [licence])
    assert f"# {name} over {backbone}\n\n{purpose.description} of timm's registry" in text
    assert (told["backbone"], told["classes"]) == ([backbone], ["11"])
    assert told["image"] == ["64 x 96 pixels, 3 channels"]
    assert told["parameters"] == [f"{sum(parameter.numel() for parameter in model.parameters()):,}"]
    assert told["GMACs, whole"] == [f"{count_cost(model, 64, 96).gmacs:.3g}"]
    assert (paper is None) == ("## Citation" not in text)
    assert paper is None or f"@article{{{paper}," in text
    assert not re.search("classif|pipeline\\(|transformers", text)
    facts = dataclasses.replace(FACTS, purpose=purpose, scores={"ema": Score(epoch=3, values={"mIoU": 0.5})})
    (result,) = ModelCard(build_card(model, facts)).data.eval_results
    assert (result.metric_type, result.metric_value) == (purpose.metric, 0.5)


def test_the_code_of_a_dense_card_loads_the_folder(tmp_path: Path):
    model = timm.create_model("semantic_fpn", backbone="ssvit_nano", num_classes=4, pyramid_dim=8)
    model.save_pretrained(tmp_path / "dense")
    *imports, ours, through_timm = read_code(build_card(model, place=tmp_path / "dense")).splitlines()
    for line in (ours, through_timm):
        scope: dict = {}
        exec("\n".join([*imports, line]), scope)
        each = scope["model"]
        assert type(each).__name__ == "SemanticFPN"
        assert all(torch.equal(tensor, each.state_dict()[key]) for key, tensor in model.state_dict().items())


def test_the_commands_of_the_card_run(model: torch.nn.Module, tmp_path: Path):
    """Python that parses, with the repository's name."""
    (tmp_path / "README.md").write_text(build_card(model), encoding="utf-8")
    insert_repository(tmp_path / "README.md", "lizards/nano")
    text = (tmp_path / "README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    compile(code, "card", "exec")
    assert 's3a.SSViT.from_pretrained("lizards/nano")' in code
    assert 'timm.create_model("hf-hub:lizards/nano", pretrained=True)' in code
    assert 'model="lizards/nano"' in code


def read_code(text: str) -> str:
    """The Python code of a card."""
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return code


def test_the_code_of_a_folder_loads_the_folder_and_after_a_push_the_repository(tmp_path: Path):
    """Also of a folder with an odd name, and of a card that names another repository."""
    folder, card = tmp_path / 'a "b"', tmp_path / "README.md"
    model = timm.create_model("ssvit_nano", num_classes=10)
    model.save_pretrained(folder)
    text = build_card(model, FACTS, place=folder)
    local = read_code(text).replace("from transformers import pipeline", "pipeline = dict.get").splitlines()
    assert not any("hf-hub:" in line or "FOLDER" in line for line in local)
    scope: dict = {}
    exec("\n".join(local[:-1]), scope)  # the last line is transformers' pipeline
    assert scope["model"].num_classes == 10
    ours = "# s3a.SSViT.from_pretrained(FOLDER)\n" + 'timm.create_model("resnet18")'
    card.write_text(text.replace("import timm\n", f"import timm\n{ours}\n"), encoding="utf-8")
    for repo in ("lizards/nano", "snakes/nano"):
        insert_repository(card, repo)
        code = read_code(card.read_text(encoding="utf-8"))
        assert f's3a.SSViT.from_pretrained("{repo}")' in code
        assert f'timm.create_model("hf-hub:{repo}", pretrained=True)' in code
        assert f'pipeline("image-classification", model="{repo}")' in code
        assert ours in code
    assert str(folder) not in card.read_text(encoding="utf-8")


def test_the_card_of_official_weights(model: torch.nn.Module):
    """What was measured beside what is published; the mean corruption error is no accuracy for the Hub."""
    scores = {"ImageNet, top-1": 0.8301, "ImageNet-V2, top-1": 0.721, "ImageNet-C, mCE": 0.455}
    facts = OfficialFacts(
        checkpoint="best (1).pth",
        sha256="0123abcd",
        source="A paper, arXiv 1234.56789",
        scores=scores,
        published={"ImageNet, top-1": 0.83},
    )
    text = build_card(model, official=facts)
    table = rows(text)
    assert table["ImageNet, top-1"] == ["83.01 %", "83.0 %"]
    assert table["ImageNet-V2, top-1"] == ["72.10 %", ""]
    assert table["ImageNet-C, mCE"] == ["45.50 %", ""]
    assert all(said in text for said in ("best (1).pth", "0123abcd", "A paper, arXiv 1234.56789"))
    found = {result.metric_name: result.metric_value for result in ModelCard(text).data.eval_results}
    assert found == {name: scores[name] for name in ("ImageNet, top-1", "ImageNet-V2, top-1")}


def test_facts_that_do_not_fit():
    with pytest.raises(ValueError, match="weights is 'best': scores must hold its score"):
        TrainingFacts(**{**vars(FACTS), "weights": "best"})
    with pytest.raises(ValueError, match="weights 'emma' is unknown"):
        TrainingFacts(**{**vars(FACTS), "scores": {**FACTS.scores, "emma": FACTS.scores["ema"]}})
