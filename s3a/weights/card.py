"""The model card of a weights folder: what the model is, costs and scores, and how to load it; for people and the Hub.

The Hub reads the YAML in front: https://huggingface.co/docs/hub/model-cards.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from huggingface_hub import EvalResult, ModelCardData
from timm.data import resolve_model_data_config
from torch import nn

from s3a.analysis.cost import count_cost
from s3a.quantization.schemes import quantization_of
from s3a.support.errors import unknown

Weights = Literal["last", "best", "ema", "ema-best"]
DESCRIBED = {
    "last": "last epoch",
    "best": "best epoch",
    "ema": "EMA (exponential moving average), last epoch",
    "ema-best": "EMA (exponential moving average), best epoch",
}
PLACEHOLDER = "FOLDER_OR_REPO"  # in a card that does not know yet where it will be published


@dataclass(frozen=True, kw_only=True)
class Score:
    """What weights scored on the validation images. top1 and top5 are fractions of 1."""

    epoch: int
    top1: float
    top5: float | None = None


@dataclass(frozen=True, kw_only=True)
class TrainingFacts:
    """What a run tells of the weights that it leaves.

    Attributes:
        name: of the run, for the title.
        weights: which of the run's weights these are.
        scores: of these and of the others that were evaluated.
        dataset: its id on the Hub, or the source's name, such as imagefolder.
        num_train, num_val: images.
        fingerprint: of the data.
        recipe: options and their values, without paths of the machine.

    Raises:
        ValueError: where there is no score for `weights`, or an unknown kind of weights.
    """

    name: str
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
                raise unknown("weights", kind, get_args(Weights))
        if self.weights not in self.scores:
            raise ValueError(f"weights is {self.weights!r}: scores must hold its score, not only {list(self.scores)}")


def model_card(
    model: nn.Module, facts: TrainingFacts | None = None, *, data_config: Mapping[str, Any] | None = None
) -> str:
    """The text of a weights folder's README.md.

    Args:
        model: made by timm's factory.
        facts: of its training; None where nothing is known of it.
        data_config: timm's preprocessing keys where they differ from the model's own.
    """
    data_config = {**resolve_model_data_config(model), **(data_config or {})}
    title = model.pretrained_cfg["architecture"] + (f" trained on {facts.name}" if facts else "")
    intro = "An image classifier of timm's registry, trained or saved by s3a (Sparse Scan Self-Attention)."
    parts = [f"---\n{metadata(model, facts, title)}\n---", f"# {title}", intro, *describe(model, data_config)]
    if facts:
        parts += [*results(facts), *data(facts), "## Recipe", table(["option", "value"], facts.recipe.items())]
    parts += ["## Use", use(model)]
    if citation := getattr(model, "citation", None):
        parts += ["## Citation", f"```bibtex\n{citation}\n```"]
    return "\n\n".join(parts) + "\n"


def name_repository(card: Path, repo: str) -> None:
    """Writes the repository's name where the card shows how to load the model."""
    if card.is_file():
        card.write_text(card.read_text(encoding="utf-8").replace(PLACEHOLDER, repo), encoding="utf-8")


def metadata(model: nn.Module, facts: TrainingFacts | None, title: str) -> str:
    """The YAML in front. Scores are fractions of 1 there."""
    known = {}
    if facts:
        common = {
            "task_type": "image-classification",
            "dataset_type": facts.dataset,
            "dataset_name": facts.name,
            "dataset_split": "validation",
            "metric_type": "accuracy",
        }
        score, kind = facts.scores[facts.weights], DESCRIBED[facts.weights]
        values = {"top-1": score.top1, "top-5": score.top5}
        scored = [
            EvalResult(**common, metric_name=f"{name}, {kind}", metric_value=value)
            for name, value in values.items()
            if value is not None
        ]
        known = {"datasets": [facts.dataset], "metrics": ["accuracy"], "model_name": title, "eval_results": scored}
    tags, library = ["image-classification", "timm", "transformers", "s3a"], "timm"
    if quantization_of(model):
        tags, library = ["image-classification", "s3a", "torchao"], "s3a"
    return ModelCardData(
        license=license_of(model), library_name=library, pipeline_tag="image-classification", tags=tags, **known
    ).to_yaml()


def license_of(model: nn.Module) -> str:
    """The licence that timm's description of the model names; this library's own where it names none."""
    return model.pretrained_cfg.get("license") or "mit"


def describe(model: nn.Module, data_config: Mapping[str, Any]) -> list[str]:
    """What the model is and costs."""
    channels, height, width = data_config["input_size"]
    cost = count_cost(model, height, width)
    rows = {
        "classes": f"{model.num_classes:,}",
        "image": f"{height} x {width} pixels, {channels} channel{'s' if channels > 1 else ''}",
        "parameters": f"{cost.parameters:,}",
        "GMACs, layers alone": f"{cost.published_gmacs:.3g}",
        "GMACs, whole": f"{cost.gmacs:.3g}",
        "licence": license_of(model),
    }
    if quantization := quantization_of(model):
        rows["quantization"] = f"{quantization.scheme}, {len(quantization.layers)} linear layers; the rest bfloat16"
    units = (
        "Both costs are of one image. The first, which SSViT's paper publishes, leaves the attention products out and "
        "counts in units of 2^30; the other counts them, in units of 10^9."
    )
    return [table(["", ""], rows.items()), units]


def results(facts: TrainingFacts) -> list[str]:
    """The scores, and which of them is that of these weights."""
    rows = []
    for kind, score in facts.scores.items():
        name = f"**{DESCRIBED[kind]}: these weights**" if kind == facts.weights else DESCRIBED[kind]
        rows.append((name, score.epoch, percent(score.top1), percent(score.top5)))
    return ["## Results", table(["weights", "epoch", "top-1", "top-5"], rows)]


def percent(share: float | None) -> str:
    """A fraction of 1 for a person."""
    return "" if share is None else f"{100 * share:.2f} %"


def data(facts: TrainingFacts) -> list[str]:
    """What the model was trained and evaluated on."""
    rows = {
        "dataset": facts.dataset,
        "training images": f"{facts.num_train:,}",
        "validation images": f"{facts.num_val:,}",
        "fingerprint": f"`{facts.fingerprint}`",
    }
    return ["## Data", table(["", ""], rows.items())]


def use(model: nn.Module) -> str:
    """How the model is loaded by this library, by timm and by transformers."""
    family = type(model).__name__ if hasattr(model, "from_pretrained") else None
    own = f'model = s3a.{family}.from_pretrained("{PLACEHOLDER}")\n' if family else ""
    if quantization_of(model):  # neither timm nor transformers knows such weights
        return f"```python\nimport s3a\n\n{own}```"
    return f"""```python
import s3a  # registers its models with timm
import timm
from transformers import pipeline

{own}model = timm.create_model("hf-hub:{PLACEHOLDER}", pretrained=True)
classify = pipeline("image-classification", model="{PLACEHOLDER}")
```"""


def table(header: list[str], rows: Iterable[Iterable[Any]]) -> str:
    """A table in Markdown."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(cell(value) for value in line) + " |" for line in lines)


def cell(value: Any) -> str:
    """A value that stays in its cell."""
    return " ".join(str(value).replace("|", "\\|").split())
