"""The model card of quantized weights: what the card of the original says, and what has changed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

from huggingface_hub import ModelCard, ModelCardData
from timm.data import resolve_model_data_config
from torch import nn
from yaml import YAMLError  # type: ignore[import-untyped]

from s3a.quantization.schemes import Quantization
from s3a.weights.card import (
    CLASSIFIER,
    THESE_WEIGHTS,
    Purpose,
    cite,
    describe_model,
    describe_quantization,
    find_licence,
    list_results,
    show_use,
)

OTHER = Purpose(description="A model", outputs="outputs")
REBUILT = ("Use", "Quantization")  # sections of the original's card that say nothing of the quantized weights


@dataclass(frozen=True, kw_only=True)
class Original:
    """The weights that quantized ones were made from.

    Attributes:
        name: their folder or repository.
        card: the text of their model card; None where they have none.
    """

    name: str
    card: str | None


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """What was measured of quantized weights.

    Attributes:
        table: of them and the original, in Markdown.
        dataset: whose validation images they were scored on; None where they were not.
        scores: fractions of 1 by title, such as "top-1".
    """

    table: str
    dataset: str | None
    scores: Mapping[str, float]


def build_quantized_card(
    model: nn.Module,
    quantization: Quantization,
    original: Original,
    measurement: Measurement | None = None,
    *,
    place: str | Path,
) -> str:
    """The text of the card. Scores of the original are called so, and the Hub is told those of the quantized alone.

    Args:
        model: quantized.
        measurement: None while nothing is measured.
        place: the folder that the card is for.

    Raises:
        ValueError: for an original with a card whose metadata cannot be read.
    """
    data, sections = parse_card(original)
    purpose = CLASSIFIER if data is None or data.pipeline_tag == CLASSIFIER.pipeline_tag else OTHER
    licence = str((data and data.license) or find_licence(model))
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    title = f"{(data and data.model_name) or cfg['architecture']}, quantized by {quantization.scheme}"
    metadata = ModelCardData(
        license=licence,
        library_name="s3a",  # neither timm nor transformers can load such weights
        pipeline_tag=purpose.pipeline_tag,
        tags=[*([purpose.pipeline_tag] if purpose.pipeline_tag else []), "s3a", "torchao"],
        datasets=data.datasets if data else None,
    )
    if not Path(original.name).is_dir():
        metadata.base_model, metadata["base_model_relation"] = original.name, "quantized"
    if measurement and measurement.dataset:
        metadata.model_name, metadata.metrics = title, [str(purpose.metric)]
        metadata.eval_results = list_results(purpose, measurement.scores, measurement.dataset, measurement.dataset)
    parts = [f"---\n{metadata.to_yaml()}\n---", f"# {title}"]
    parts += [f"Made from `{original.name}` by s3a (Sparse Scan Self-Attention) with torchao."]
    parts += describe_model(model, purpose, resolve_model_data_config(model), licence)
    parts += ["## Quantization", describe_quantization(quantization), *([measurement.table] if measurement else [])]
    parts += carry_over(sections, original.name)
    parts += ["## Use", show_use(model, purpose, str(place))]
    parts += ["## Citation", sections["Citation"]] if "Citation" in sections else cite(model)
    return "\n\n".join(parts) + "\n"


def carry_over(sections: Mapping[str, str], name: str) -> list[str]:
    """The sections of the original's card that hold for the quantized weights too, and its scores, called so."""
    parts = []
    for heading, text in sections.items():
        if heading == "Results":
            scores = text.replace(THESE_WEIGHTS, ": those that were quantized")
            parts += ["## Results of the float weights", f"Of `{name}`, before the quantization.", scores]
        elif heading not in (*REBUILT, "Citation"):
            parts += [f"## {heading}", text]
    return parts


def parse_card(original: Original) -> tuple[ModelCardData | None, dict[str, str]]:
    """The metadata of the original's card, and its sections by heading; None and no section where it has none."""
    if original.card is None:
        return None, {}
    try:
        card = ModelCard(original.card)
    except (ValueError, YAMLError) as error:
        raise ValueError(
            f"the model card of {original.name} has metadata that cannot be read ({error}): mend it, or delete it"
        ) from error
    return cast(ModelCardData, card.data), split_sections(card.text)


def split_sections(text: str) -> dict[str, str]:
    """The sections of a text in Markdown by their headings of the second level, which are none inside of code."""
    sections: dict[str, list[str]] = {}
    heading, is_code = None, False
    for line in text.splitlines():
        is_code ^= line.startswith("```")
        if line.startswith("## ") and not is_code:
            heading = line.removeprefix("## ").strip()
        elif heading is not None:
            sections.setdefault(heading, []).append(line)
    return {heading: "\n".join(lines).strip() for heading, lines in sections.items()}
