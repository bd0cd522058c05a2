"""Parameters and cost of models at any image size, by both conventions: python tools/cost.py ssvit_tiny."""

import json
import signal
from dataclasses import asdict, dataclass
from difflib import get_close_matches
from typing import Annotated

if __name__ == "__main__" and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # Ctrl-C during the imports below shows no traceback

import timm
import torch
import tyro

from s3a.analysis.cost import Cost, count_cost
from s3a.published import PUBLISHED
from s3a.support.command_line import run_command
from s3a.support.errors import make_unknown_error

DENSE_MODULES = ("segmentation", "detection", "rcnn")
LEGEND = """\
layers: GMACs of convolutions and pointwise layers alone, in units of 2^30: the "FLOPs" of the SSViT paper
whole:  GMACs with the products of attention, in units of 10^9: those of the SViT and VVT papers
paper:  GMACs that the model's own paper prints for this size, and its top-1 on ImageNet-1k in percent"""


@dataclass(frozen=True, kw_only=True)
class Options:
    """Counts the parameters of models and the multiply-accumulates of one image."""

    models: Annotated[tyro.conf.Positional[tuple[str, ...]], tyro.conf.arg(metavar="[MODEL ...]")] = ()
    """Names in timm's registry; none for all models of this library."""
    backbone: str | None = None
    """Of models for segmentation and detection; None for ssvit_tiny."""
    height: int = 224
    """Of the image, in pixels."""
    width: int = 224
    """Of the image, in pixels."""
    json: bool = False
    """Print JSON instead of a table."""


def main(options: Options) -> None:
    """Prints the costs of the models."""
    names = options.models or list_own_models()
    costs = {name: count_cost(build_on_meta(name, options.backbone), options.height, options.width) for name in names}
    if options.json:
        size = {"height": options.height, "width": options.width}
        print(json.dumps([{"model": name, **size, **asdict(cost)} for name, cost in costs.items()], indent=2))
    else:
        print(format_table(costs, options.height, options.width))


def list_own_models() -> list[str]:
    """The names that this library registers, family by family in the order of their files."""
    entries = {name: timm.model_entrypoint(name) for name in timm.list_models()}
    own = {name: entry.__code__ for name, entry in entries.items() if entry.__module__.startswith("s3a.")}
    return sorted(own, key=lambda name: (own[name].co_filename, own[name].co_firstlineno))


def build_on_meta(name: str, backbone: str | None) -> torch.nn.Module:
    """The model without memory for its weights; ValueError for an unknown name, or a backbone that it does not have.

    Args:
        backbone: of a dense model; None for its own.
    """
    if not timm.is_model(name):
        raise make_unknown_error("model", name, {*list_own_models(), *get_close_matches(name, timm.list_models(), n=1)})
    dense = [each for module in DENSE_MODULES for each in timm.list_models(module=module)]
    if backbone is not None and name not in dense:
        raise ValueError(f"--backbone is {backbone}, and {name} has none: it is for {', '.join(dense)}")
    with torch.device("meta"):
        return timm.create_model(name, **({} if backbone is None else {"backbone": backbone}))


def format_table(costs: dict[str, Cost], height: int, width: int) -> str:
    """The counted costs as a table for people, with what the papers print beside them."""
    longest = max(map(len, [*costs, "model"]))
    side = height if height == width else None
    lines = [f"One image of {height} x {width} pixels.", ""]
    lines += [f"{'model':{longest}}  {'parameters':>12}  {'layers':>7}  {'whole':>7}  {'paper':>7}  {'top-1':>7}"]
    for name, cost in costs.items():
        published = PUBLISHED.get(name)
        gmacs, top1 = (published.gmacs.get(side), published.top1.get(side)) if published else (None, None)
        counted = f"{cost.parameters:12,}  {cost.published_gmacs:7.2f}  {cost.gmacs:7.2f}"
        lines += [f"{name:{longest}}  {counted}  {gmacs or '-':>7}  {top1 or '-':>7}"]
    return "\n".join([*lines, "", LEGEND])


if __name__ == "__main__":
    run_command(Options, main)
