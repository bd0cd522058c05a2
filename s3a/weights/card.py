"""The model card of a weights folder: what the model is, what it costs and scores, and how to load it.

People read its text, and the Hub the YAML in front of it: https://huggingface.co/docs/hub/model-cards.
"""

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, cast, get_args

from huggingface_hub import EvalResult, ModelCardData
from timm.data import resolve_model_data_config
from torch import nn

from s3a.analysis.cost import Cost, count_cost
from s3a.quantization.schemes import SCHEMES, Quantization, get_quantization, group_names
from s3a.support.errors import make_unknown_error

Weights = Literal["last", "best", "ema", "ema-best"]
TITLES: dict[Weights, str] = {
    "last": "last epoch",
    "best": "best epoch",
    "ema": "EMA (exponential moving average), last epoch",
    "ema-best": "EMA (exponential moving average), best epoch",
}
PLACEHOLDER = "FOLDER_OR_REPO"  # stands for the place of weights that is not known yet
STRING = r'"(?:[^"\\\n]|\\.)*"'
# Where the code of a card names the place of the weights.
PLACES = re.compile(rf'(from_pretrained\(|pipeline\("[\w-]+", model=|create_model\((?="(?:local-dir|hf-hub):)){STRING}')
THESE_WEIGHTS = ": these weights"
IMAGENET = "ILSVRC/imagenet-1k"  # its id on the Hub


@dataclass(frozen=True, kw_only=True)
class Purpose:
    """What a model is for, as cards say it.

    Attributes:
        description: such as "An image classifier".
        outputs: what the outputs of the head are called.
        pipeline_tag: the Hub's name of the task; None where it has none.
        metric: the Hub's name of the metric; None where it has none.
        is_percentage: whether scores are fractions of 1, which people read in percent.
    """

    description: str
    outputs: str
    pipeline_tag: str | None = None
    metric: str | None = None
    is_percentage: bool = False


CLASSIFIER = Purpose(
    description="An image classifier",
    outputs="classes",
    pipeline_tag="image-classification",
    metric="accuracy",
    is_percentage=True,
)
SEGMENTER = Purpose(
    description="A model for semantic segmentation",
    outputs="classes",
    pipeline_tag="image-segmentation",
    metric="mean_iou",
    is_percentage=True,
)
DETECTOR = Purpose(
    description="An object detector",
    outputs="classes",
    pipeline_tag="object-detection",
    metric="mAP",
    is_percentage=True,
)


@dataclass(frozen=True, kw_only=True)
class Score:
    """How weights scored on the validation images after an epoch: values by title, such as "top-1"."""

    epoch: int
    values: Mapping[str, float]


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """How weights were trained, for their card.

    Attributes:
        name: of the run, for the title.
        purpose: what they are for.
        weights: which of the run's weights these are.
        scores: of these weights and of the run's others.
        dataset: its id on the Hub, or the name of the source, such as imagefolder.
        num_train, num_val: numbers of images.
        fingerprint: of the data.
        recipe: options and their values, without paths of the machine.

    Raises:
        ValueError: for an unknown kind of weights, or without a score for `weights`.
    """

    name: str
    purpose: Purpose = CLASSIFIER
    weights: Weights
    scores: Mapping[Weights, Score]
    dataset: str
    num_train: int
    num_val: int
    fingerprint: str
    recipe: Mapping[str, Any]

    def __post_init__(self) -> None:
        for kind in (self.weights, *self.scores):
            if kind not in get_args(Weights):
                raise make_unknown_error("weights", kind, get_args(Weights))
        if self.weights not in self.scores:
            raise ValueError(f"weights is {self.weights!r}: scores must hold its score, not only {list(self.scores)}")


@dataclass(frozen=True, kw_only=True)
class OfficialFacts:
    """Where weights come from that others trained and published, and what they scored here, for their card.

    Attributes:
        checkpoint: the name of the file that they were converted from.
        sha256: of that file.
        source: the paper; None where it is not known.
        scores: as fractions of 1 by title, such as "ImageNet, top-1".
        published: those that the paper prints, by the same titles.
    """

    checkpoint: str
    sha256: str
    source: str | None
    scores: Mapping[str, float]
    published: Mapping[str, float]


# --------------------------------------------------------------------------------------------------------
# Whole cards
# --------------------------------------------------------------------------------------------------------


def build_card(
    model: nn.Module,
    facts: TrainingFacts | None = None,
    *,
    official: OfficialFacts | None = None,
    data_config: Mapping[str, Any] | None = None,
    cost: Cost | None = None,
    place: str | Path = PLACEHOLDER,
) -> str:
    """The text of a model card, the README.md of a weights folder.

    Args:
        model: made by timm's factory.
        facts: how it was trained; None if that is not known.
        official: of whom its weights are, where others published them.
        data_config: timm's preprocessing keys, as far as they differ from the model's own.
        cost: of an image of that size, where it is known; None counts it.
        place: the folder that the card is for, as its code shows it.
    """
    data_config = {**resolve_model_data_config(model), **(data_config or {})}
    title = name_model(model) + (f" trained on {facts.name}" if facts else ", official weights" if official else "")
    licence = find_licence(model)
    purpose = facts.purpose if facts else find_purpose(model)
    origin = "converted" if official else "trained or saved"
    intro = f"{purpose.description} of timm's registry, {origin} by s3a (Sparse Scan Self-Attention)."
    metadata = format_metadata(model, purpose, facts, title, licence, official)
    parts = [f"---\n{metadata}\n---", f"# {title}", intro]
    parts += describe_model(model, purpose, data_config, licence, cost)
    quantization = get_quantization(model)
    if quantization:
        parts += ["## Quantization", describe_quantization(model, quantization)]
    if facts:
        simulated = ["Measured in training, which simulates the rounding in float32."] if quantization else []
        parts += ["## Results", *simulated, format_scores(facts), "## Data", format_data(facts)]
        parts += ["## Recipe", format_table(["option", "value"], facts.recipe.items())]
    if official:
        parts += ["## Source", describe_source(official), "## Results", format_official_scores(official)]
    parts += ["## Use", show_use(model, purpose, str(place)), *cite(model)]
    return "\n\n".join(parts) + "\n"


def insert_repository(card: Path, repo: str) -> None:
    """Writes a repository's name into a card, if there is one: for the placeholder, and where code loads the model."""
    if not card.is_file():
        return

    def replace(match: re.Match[str]) -> str:
        source = "hf-hub:" if match[1].startswith("create_model") else ""
        return match[1] + quote(source + repo)

    text = card.read_text(encoding="utf-8").replace(PLACEHOLDER, repo)
    before, heading, use = text.partition("\n## Use\n")
    card.write_text(before + heading + PLACES.sub(replace, use), encoding="utf-8")


# --------------------------------------------------------------------------------------------------------
# Their parts
# --------------------------------------------------------------------------------------------------------


def find_purpose(model: nn.Module) -> Purpose:
    """What a model is for: a dense one says it itself, the others of timm's registry are classifiers."""
    return cast(Purpose, getattr(model, "purpose", CLASSIFIER))


def name_model(model: nn.Module) -> str:
    """What a title calls a model: its name in timm's registry, and its backbone's."""
    pretrained_cfg: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    backbone = find_backbone(model)
    return str(pretrained_cfg["architecture"]) + (f" over {backbone}" if backbone else "")


def find_backbone(model: nn.Module) -> str | None:
    """The name of a dense model's backbone; None for other models."""
    return getattr(model, "backbone_name", None)


def find_licence(model: nn.Module) -> str:
    """The licence of a model as timm knows it, or else this library's own."""
    pretrained_cfg: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    return pretrained_cfg.get("license") or "mit"


def cite(model: nn.Module) -> list[str]:
    """The section with the paper of a model of this library."""
    citation = getattr(model, "citation", None)
    return ["## Citation", f"```bibtex\n{citation}\n```"] if citation else []


def describe_quantization(model: nn.Module, quantization: Quantization) -> str:
    """What is quantized, and how."""
    scheme = SCHEMES[quantization.scheme]
    rest = "Everything else computes in bfloat16."
    if find_backbone(model):
        rest = "The rest of the backbone computes in bfloat16, and the head in float32."
    scales = f"a scale for each {scheme.group_size} inputs" if scheme.group_size else "a scale for each output"
    return (
        f"torchao's scheme `{quantization.scheme}`, weights in {scheme.weights} with {scales}, in "
        f"{len(quantization.layers)} linear layers: `{group_names(quantization.layers)}`. {rest}"
    )


def format_metadata(
    model: nn.Module,
    purpose: Purpose,
    facts: TrainingFacts | None,
    title: str,
    licence: str,
    official: OfficialFacts | None = None,
) -> str:
    """The YAML for the Hub. Accuracies are fractions of 1 there."""
    tag = purpose.pipeline_tag
    tags = ["timm", *(["transformers"] if purpose is CLASSIFIER else []), "s3a"]
    library = "timm"
    if get_quantization(model):  # neither timm nor transformers can load such weights
        tags, library = ["s3a", "torchao"], "s3a"
    metadata = ModelCardData(
        license=licence, library_name=library, pipeline_tag=tag, tags=[*([tag] if tag else []), *tags]
    )
    if facts:
        metadata.datasets = [facts.dataset]
    if facts and tag and purpose.metric:
        metadata.metrics, metadata.model_name = [purpose.metric], title
        values = {
            f"{name}, {TITLES[facts.weights]}": value for name, value in facts.scores[facts.weights].values.items()
        }
        metadata.eval_results = list_results(purpose, values, facts.dataset, facts.name)
    if official and official.scores:
        metadata.datasets, metadata.metrics, metadata.model_name = [IMAGENET], [str(purpose.metric)], title
        metadata.eval_results = [
            result
            for title, score in official.scores.items()
            if "mCE" not in title  # which is no accuracy
            for result in list_results(purpose, {title: score}, *name_dataset(title))
        ]
    return metadata.to_yaml()


def name_dataset(title: str) -> tuple[str, str]:
    """The dataset of a score such as "ImageNet-A, top-1": its id on the Hub, or what it is called, and its name."""
    name = title.partition(",")[0]
    return IMAGENET if name == "ImageNet" else name.lower().replace(" ", "-"), name


def list_results(purpose: Purpose, values: Mapping[str, float], dataset: str, name: str) -> list[EvalResult]:
    """Scores as the Hub reads them.

    Args:
        values: by title.
        dataset: its id on the Hub, or the name of the source.
        name: what people call it.
    """
    return [
        EvalResult(
            task_type=str(purpose.pipeline_tag),
            dataset_type=dataset,
            dataset_name=name,
            dataset_split="validation",
            metric_type=str(purpose.metric),
            metric_name=title,
            metric_value=value,
        )
        for title, value in values.items()
    ]


def describe_model(
    model: nn.Module, purpose: Purpose, data_config: Mapping[str, Any], licence: str, cost: Cost | None = None
) -> list[str]:
    """A table of what the model is and costs, and a note on both costs."""
    channels, height, width = data_config["input_size"]
    cost = cost or count_cost(model, height, width)
    backbone = find_backbone(model)
    rows = {
        **({"backbone": backbone} if backbone else {}),
        purpose.outputs: f"{model.num_classes:,}",
        "image": f"{height} x {width} pixels, {channels} channel{'s' if channels > 1 else ''}",
        "parameters": f"{cost.parameters:,}",
        "GMACs, layers alone": f"{cost.published_gmacs:.3g}",
        "GMACs, whole": f"{cost.gmacs:.3g}",
        "licence": licence,
    }
    if quantization := get_quantization(model):
        rest = "the rest of the backbone bfloat16, the head float32" if backbone else "the rest bfloat16"
        rows["quantization"] = f"{quantization.scheme}, {len(quantization.layers)} linear layers; {rest}"
    units = (
        "Both costs are of one image. The first, which SSViT's paper publishes, leaves the attention products out and "
        "counts in units of 2^30; the other counts them, in units of 10^9."
    )
    return [format_table(["", ""], rows.items()), units]


def format_scores(facts: TrainingFacts) -> str:
    """A table of the scores; those of these weights in bold."""
    titles = list(dict.fromkeys(title for score in facts.scores.values() for title in score.values))
    rows = []
    for kind, score in facts.scores.items():
        name = f"**{TITLES[kind]}{THESE_WEIGHTS}**" if kind == facts.weights else TITLES[kind]
        values = {
            title: f"{100 * value:.2f} %" if facts.purpose.is_percentage else f"{value:.4f}"
            for title, value in score.values.items()
        }
        rows.append((name, score.epoch, *(values.get(title, "") for title in titles)))
    return format_table(["weights", "epoch", *titles], rows)


def describe_source(official: OfficialFacts) -> str:
    """Who trained the weights, and which file they were converted from."""
    paper = f" of *{official.source}*" if official.source else ""
    return (
        f"Trained and published by the authors{paper}. Converted by s3a, without a change of any number, from their "
        f"file `{official.checkpoint}` (SHA-256 `{official.sha256}`). The licence above is that of their code."
    )


def format_official_scores(official: OfficialFacts) -> str:
    """A table of the scores measured here, beside those that the paper prints."""
    rows = [
        (
            title,
            f"{100 * score:.2f} %",
            f"{100 * official.published[title]:.1f} %" if title in official.published else "",
        )
        for title, score in official.scores.items()
    ]
    return format_table(["set", "measured with s3a", "published"], rows)


def format_data(facts: TrainingFacts) -> str:
    """A table of the data for training and evaluation."""
    rows = {
        "dataset": facts.dataset,
        "training images": f"{facts.num_train:,}",
        "validation images": f"{facts.num_val:,}",
        "fingerprint": f"`{facts.fingerprint}`",
    }
    return format_table(["", ""], rows.items())


def show_use(model: nn.Module, purpose: Purpose, place: str) -> str:
    """Python code that loads a folder with this library and timm, and a classifier with transformers too."""
    family = type(model).__name__ if hasattr(model, "from_pretrained") else None
    own = [f"model = s3a.{family}.from_pretrained({quote(place)})"] if family else []
    if get_quantization(model):
        load = f"model = load_pretrained({quote(place)})"
        lines = ["import s3a", "", *own] if own else ["from s3a.weights.pretrained import load_pretrained", "", load]
        return "\n".join(["```python", *lines, "```"])
    lines = ["import s3a  # registers its models with timm", "import timm"]
    lines += ["from transformers import pipeline"] if purpose is CLASSIFIER else []
    lines += ["", *own, f"model = timm.create_model({quote('local-dir:' + place)}, pretrained=True)"]
    lines += [f'classify = pipeline("image-classification", model={quote(place)})'] if purpose is CLASSIFIER else []
    return "\n".join(["```python", *lines, "```"])


def quote(text: str) -> str:
    """A text as a string in the code of a card, between double quotes."""
    return json.dumps(text, ensure_ascii=False)


def format_table(header: list[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table in Markdown; whitespace and bars in a cell cannot break it."""
    lines = [header, ["---"] * len(header), *rows]
    cells = ([" ".join(str(value).replace("|", "\\|").split()) for value in line] for line in lines)
    return "\n".join("| " + " | ".join(line) + " |" for line in cells)
