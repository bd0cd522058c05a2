"""The model card of quantized weights: what the card of the original says, and what has changed."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

from huggingface_hub import ModelCard, ModelCardData
from timm.data import resolve_model_data_config
from torch import nn
from yaml import YAMLError  # type: ignore[import-untyped]

from s3a.quantization.schemes import get_quantization
from s3a.weights.card import (
    THESE_WEIGHTS,
    Purpose,
    cite,
    describe_model,
    describe_quantization,
    find_licence,
    find_purpose,
    list_results,
    name_model,
    show_use,
)

OTHER = Purpose(description="A model", outputs="outputs")
REBUILT = ("Use", "Quantization")  # sections of the original's card that say nothing of the quantized weights


@dataclass(frozen=True, kw_only=True)
class Original:
    """The weights that quantized ones were made from.

    Attributes:
        name: their folder or repository.
        metadata: of their model card; empty where they have none.
        sections: of the card, by heading.
    """

    name: str
    metadata: ModelCardData
    sections: Mapping[str, str]


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
    model: nn.Module, original: Original, measurement: Measurement | None = None, *, place: str | Path
) -> str:
    """The text of the card. Scores of the original are called so, and the Hub is told those of the quantized alone.

    Args:
        model: quantized.
        measurement: None while nothing is measured.
        place: the folder that the card is for.
    """
    quantization = get_quantization(model)
    assert quantization is not None
    data, dataset = original.metadata, measurement.dataset if measurement else None
    own = find_purpose(model)
    # a hand-written card may not say what the model is for; what was scored is what models of its kind are for
    purpose = own if dataset is not None or data.pipeline_tag in (None, own.pipeline_tag) else OTHER
    licence = str(data.license or find_licence(model))
    title = f"{data.model_name or name_model(model)}, quantized by {quantization.scheme}"
    metadata = ModelCardData(
        license=licence,
        license_name=data.license_name,
        license_link=data.license_link,
        library_name="s3a",  # neither timm nor transformers can load such weights
        pipeline_tag=purpose.pipeline_tag,
        tags=[*([purpose.pipeline_tag] if purpose.pipeline_tag else []), "s3a", "torchao"],
        datasets=data.datasets,
    )
    if not Path(original.name).is_dir():
        metadata.base_model, metadata["base_model_relation"] = original.name, "quantized"
    if measurement and dataset is not None:
        metadata.model_name, metadata.metrics = title, [str(purpose.metric)]
        metadata.eval_results = list_results(purpose, measurement.scores, dataset, dataset)
    parts = [f"---\n{metadata.to_yaml()}\n---", f"# {title}"]
    parts += [f"Made from `{original.name}` by s3a (Sparse Scan Self-Attention) with torchao."]
    parts += describe_model(model, purpose, resolve_model_data_config(model), licence)
    parts += [
        "## Quantization",
        describe_quantization(model, quantization),
        *([measurement.table] if measurement else []),
    ]
    parts += carry_over(original)
    parts += ["## Use", show_use(model, purpose, str(place))]
    parts += ["## Citation", original.sections["Citation"]] if "Citation" in original.sections else cite(model)
    return "\n\n".join(parts) + "\n"


def carry_over(original: Original) -> list[str]:
    """The sections of the original's card that hold for the quantized weights too, and its scores, called so."""
    parts = []
    for heading, text in original.sections.items():
        if heading == "Results":
            scores = text.replace(THESE_WEIGHTS, ": those that were quantized")
            parts += ["## Results of the float weights", f"Of `{original.name}`, before the quantization.", scores]
        elif heading not in (*REBUILT, "Citation"):
            parts += [f"## {heading}", text]
    return parts


def parse_card(name: str, text: str | None) -> Original:
    """What a model card says.

    Args:
        name: the folder or repository that the card is of.
        text: None where there is no card.

    Raises:
        ValueError: for a card whose metadata are no YAML.
    """
    if text is None:
        return Original(name=name, metadata=ModelCardData(), sections={})
    try:
        # scores that the Hub could not read either are not needed here
        card = ModelCard(text, ignore_metadata_errors=True)
    except (ValueError, YAMLError) as error:
        raise ValueError(
            f"the model card of {name} has metadata that cannot be read ({' '.join(str(error).split())}): mend or "
            "delete its README.md, in a copy of the folder where it is not yours"
        ) from error
    return Original(name=name, metadata=cast(ModelCardData, card.data), sections=split_sections(card.text))


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
