"""The card of quantized weights keeps what the card of the original says, and calls each score by its model."""

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from torch import nn

from s3a.quantization.schemes import Quantization, mark_quantized
from s3a.weights.card import Score, TrainingFacts, build_card
from s3a.weights.quantized_card import Measurement, build_quantized_card, parse_card

LAYERS = tuple(f"stages.0.blocks.{block}.mlp.{layer}" for block in (0, 1) for layer in ("fc1", "fc2"))
QUANTIZATION = Quantization("int8-activations-int4-weights", LAYERS)
FACTS = TrainingFacts(
    name="clothes",
    weights="best",
    scores={"last": Score(epoch=9, values={"top-1": 0.5}), "best": Score(epoch=7, values={"top-1": 0.75})},
    dataset="fashion-mnist",
    num_train=60_000,
    num_val=10_000,
    fingerprint="sha256:5a1ad1e5",
    recipe={"learning_rate": 0.016},
)
MEASURED = Measurement(
    table="| model | top-1 |\n| --- | --- |\n| float32 | 75.00 % |", dataset="fashion-mnist", scores={"top-1": 0.625}
)
NOTES = "## Limits\n\nKnows no hats.\n\n```bash\n## no heading\n```\n\n"


@pytest.fixture(scope="module")
def model() -> nn.Module:
    with torch.device("meta"):
        model = timm.create_model("ssvit_nano", num_classes=10)
    mark_quantized(model, QUANTIZATION)
    return model


@pytest.fixture(scope="module")
def original_card() -> str:
    """As training writes it, with a licence and a section that somebody added."""
    with torch.device("meta"):
        text = build_card(timm.create_model("ssvit_nano", num_classes=10), FACTS, place="runs/clothes/best")
    return text.replace("license: mit", "license: cc-by-4.0").replace("## Use\n", f"{NOTES}## Use\n")


def test_data_scores_recipe_and_licence_are_kept(model: nn.Module, original_card: str):
    text = build_quantized_card(model, parse_card("hats/clothes", original_card), MEASURED, place="weights/int4")
    card = ModelCard(text)
    assert (card.data.license, card.data.library_name, card.data.datasets) == ("cc-by-4.0", "s3a", ["fashion-mnist"])
    assert (card.data.base_model, card.data.base_model_relation) == ("hats/clothes", "quantized")
    assert card.data.model_name == "ssvit_nano trained on clothes, quantized by int8-activations-int4-weights"
    assert [each.metric_value for each in card.data.eval_results] == [0.625]
    for words in (
        "| training images | 60,000 |",
        "| learning_rate | 0.016 |",
        NOTES,
        "## Results of the float weights\n\nOf `hats/clothes`, before the quantization.",
        "| **best epoch: those that were quantized** | 7 | 75.00 % |",
        "`int8-activations-int4-weights`, weights in int4 with a scale for each 32 inputs, in 4 linear layers: "
        "`stages.0.blocks.0-1.mlp.fc1, stages.0.blocks.0-1.mlp.fc2`",
        MEASURED.table,
        's3a.SSViT.from_pretrained("weights/int4")',
        "fan2024vision",
    ):
        assert words in text, words
    assert text.count("## Use\n") == text.count("## Citation\n") == text.count("```python") == 1
    assert "these weights" not in text
    assert "timm.create_model" not in text


def test_an_original_of_which_nothing_is_known(model: nn.Module, tmp_path):
    """A local folder without a card, and nothing measured: no score, no data, and no base model on the Hub."""
    card = ModelCard(build_quantized_card(model, parse_card(str(tmp_path), None), place="weights/int4"))
    assert (card.data.eval_results, card.data.datasets, card.data.get("base_model")) == (None, None, None)
    assert (card.data.license, card.data.pipeline_tag) == ("mit", "image-classification")
    assert "Results" not in card.text


@pytest.mark.parametrize("metadata", ["", "---\ntags: [clothes]\n---\n", "---\nmodel-index: [{name: x}]\n---\n"])
def test_cards_by_hand(model: nn.Module, metadata: str):
    """Without the task, or with scores that the Hub does not understand: what was scored is a classifier."""
    original = parse_card("hats/clothes", f"{metadata}# Clothes\n\n## Limits\n\nKnows no hats.\n")
    text = build_quantized_card(model, original, MEASURED, place="weights/int4")
    card = ModelCard(text)
    assert (card.data.pipeline_tag, card.data.metrics) == ("image-classification", ["accuracy"])
    assert [(each.task_type, each.metric_value) for each in card.data.eval_results] == [("image-classification", 0.625)]
    assert "Knows no hats." in card.text
    assert "None" not in text


def test_a_licence_of_its_own_keeps_its_name_and_address(model: nn.Module):
    licence = "license: other\nlicense_name: hat\nlicense_link: https://example.org/hat"
    original = parse_card("hats/clothes", f"---\n{licence}\npipeline_tag: image-segmentation\n---\n# Clothes\n")
    card = ModelCard(build_quantized_card(model, original, place="weights/int4"))
    assert (card.data.license_name, card.data.license_link) == ("hat", "https://example.org/hat")
    assert card.data.pipeline_tag is None


def test_metadata_that_cannot_be_read_are_said():
    with pytest.raises(ValueError, match="the model card of hats/clothes has metadata that cannot be read"):
        parse_card("hats/clothes", "---\na: [\n---\n# Clothes\n")


def test_a_quantized_model_of_timms_is_loaded_by_the_library():
    with torch.device("meta"):
        model = timm.create_model("resnet18", num_classes=10)
    mark_quantized(model, QUANTIZATION)
    text = build_quantized_card(model, parse_card("hats/clothes", None), place="weights/int4")
    assert 'model = load_pretrained("weights/int4")' in text


def test_weights_trained_for_a_scheme_say_that_the_rounding_was_simulated(model: nn.Module):
    text = build_card(model, FACTS, place="runs/clothes/best")
    assert "## Quantization\n\ntorchao's scheme `int8-activations-int4-weights`" in text
    assert "Measured in training, which simulates the rounding" in text
