"""Quantizes the linear layers of a model by torchao; `schemes` has the table of schemes.

Everything else in a quantized model computes in bfloat16, but for the classifier: it takes and gives float32, so that
logits that are close together stay distinct. Of a dense model the backbone alone is quantized and computes in bfloat16;
boxes and label maps need more digits.
"""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from fnmatch import fnmatchcase
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, default_decompositions

from s3a.quantization.schemes import (
    SCHEMES,
    Quantization,
    Scheme,
    check_float,
    check_scheme,
    check_trainable,
    mark_quantized,
    quiet_import,
)
from s3a.support.errors import make_unknown_error

with quiet_import():
    from torchao.core.config import AOBaseConfig
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        Int4WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8WeightOnlyConfig,
        PerGroup,
        PerRow,
        quantize_,
    )
    from torchao.quantization.qat import IntxFakeQuantizeConfig, QATConfig
    from torchao.utils import TorchAOBaseTensor, unwrap_tensor_subclass

DTYPE = torch.bfloat16  # of everything that is not quantized
HEAD_DTYPE = torch.float32

# Keeps torchao from setting options of the compiler for the whole process.
NO_GLOBALS = {"set_inductor_config": False}
CONFIGS: dict[str, Callable[[Scheme], AOBaseConfig]] = {
    "int8-weight-only": lambda scheme: Int8WeightOnlyConfig(**NO_GLOBALS),
    "int8-dynamic": lambda scheme: Int8DynamicActivationInt8WeightConfig(**NO_GLOBALS),
    "int4-weight-only": lambda scheme: Int4WeightOnlyConfig(group_size=scheme.group_size, **NO_GLOBALS),
    "int8-activations-int4-weights": lambda scheme: Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4,  # type: ignore[attr-defined]  # missing in torch's stubs
        weight_granularity=PerGroup(scheme.group_size),
    ),
    "float8-weight-only": lambda scheme: Float8WeightOnlyConfig(**NO_GLOBALS),
    "float8-dynamic": lambda scheme: Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), **NO_GLOBALS),
}

# Activations have a zero point in training alone: torchao cannot simulate symmetric rounding of tokens.
FAKE_WEIGHTS = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
FAKE_TOKENS = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
FAKE_CONFIGS: dict[str, Callable[[Scheme], QATConfig]] = {
    "int8-weight-only": lambda scheme: QATConfig(weight_config=FAKE_WEIGHTS),
    "int8-dynamic": lambda scheme: QATConfig(activation_config=FAKE_TOKENS, weight_config=FAKE_WEIGHTS),
    "int8-activations-int4-weights": lambda scheme: QATConfig(CONFIGS["int8-activations-int4-weights"](scheme)),
}


def choose_layers(
    model: nn.Module, scheme: str, *, layers: Sequence[str] = ("*",), skip: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """The names of the linear layers that a scheme quantizes, and of those that it cannot take.

    Args:
        layers, skip: shell patterns of names, such as "stages.2.*", "*.fc1" or "head".

    Returns:
        The chosen layers; and those that match too, but have inputs that the scheme's group size does not divide.

    Raises:
        ValueError: where a pattern matches no linear layer, or none is left.
    """
    linear = list_linear_layers(model)
    for pattern in (*layers, *skip):
        if not any(fnmatchcase(name, pattern) for name in linear):
            raise make_unknown_error("layer pattern", pattern, linear)
    wanted = [name for name in linear if matches(name, layers) and not matches(name, skip)]
    group = SCHEMES[scheme].group_size or 1
    fitting = [name for name in wanted if linear[name].in_features % group == 0]
    if not fitting:
        reason = f"none of them has inputs in groups of {group}" if wanted else "the patterns leave none"
        raise ValueError(f"no linear layer to quantize by {scheme!r}: {reason}; choose other layers")
    return fitting, [name for name in wanted if name not in fitting]


def list_linear_layers(model: nn.Module) -> dict[str, nn.Linear]:
    """The linear layers of the part of a model that can be quantized, by name."""
    part = get_quantized_part(model)
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in linear.items() if not part or name.startswith(f"{part}.")}


def get_quantized_part(model: nn.Module) -> str:
    """The name of the module that quantization converts: a dense model's backbone, or "" for all of the model."""
    return str(getattr(model, "quantized_part", ""))


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether any of the shell patterns matches a name."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def quantize(model: nn.Module, scheme: str, layers: Sequence[str] | None = None) -> nn.Module:
    """A quantized copy of a model of timm's registry, in evaluation mode; the model itself is not changed.

    Args:
        scheme: a name of `schemes.SCHEMES`.
        layers: names of linear layers, as `choose_layers` returns them; None for all that the scheme can take.

    Raises:
        ValueError: for a scheme that is unknown or cannot run here, layers that it cannot take, and for a model that
            is quantized already.
    """
    needs = check_scheme(scheme)
    check_float(model)
    layers = choose_layers(model, scheme)[0] if layers is None else list(layers)
    check_layers(model, scheme, layers)
    model = deepcopy(model).eval().requires_grad_(False)
    cast_model(model)
    if needs.capability is not None:
        model.cuda()
    quantize_(model, CONFIGS[scheme](needs), filter_fn=lambda module, name: name in layers)
    for name in layers:
        weight: TorchAOBaseTensor = model.get_submodule(name).weight
        weight.scale = weight.scale.to(DTYPE).to(weight.scale.dtype)  # rounded as in a weights folder
    mark_quantized(model, Quantization(scheme, tuple(layers)))
    return model


def fake_quantize(model: nn.Module, scheme: str) -> None:
    """Makes a model train as if it were quantized: its forward rounds, its gradients ignore that; in place.

    Parameters keep their names and stay float: to quantize, load the trained ones into a plain model.

    Raises:
        ValueError: for a scheme that cannot be trained for, and for a model that is quantized already.
    """
    needs = check_trainable(scheme)
    check_float(model)
    layers, _ = choose_layers(model, scheme)
    quantize_(model, FAKE_CONFIGS[scheme](needs), filter_fn=lambda module, name: name in layers)


def check_layers(model: nn.Module, scheme: str, layers: Iterable[str], where: str = "") -> None:
    """Raises ValueError for names that are no layers of the model, or are layers that the scheme cannot take."""
    known, _ = choose_layers(model, scheme)
    for name in layers:
        if name not in known:
            raise make_unknown_error(f"{where}layer of scheme {scheme!r}", name, known)


def cast_model(model: nn.Module) -> None:
    """Makes a model compute in bfloat16 from its first convolution on, and in float32 in its classifier.

    Of a dense model it is the backbone that computes in bfloat16, and everything behind it in float32.
    """
    if part := get_quantized_part(model):
        backbone = model.get_submodule(part).to(DTYPE)
        backbone.register_forward_pre_hook(cast_to_body)
        backbone.register_forward_hook(cast_maps)
        return
    names: dict[str, str] = getattr(model, "pretrained_cfg", {})
    model.to(DTYPE)
    model.get_submodule(names["classifier"]).to(HEAD_DTYPE).register_forward_pre_hook(cast_to_head)
    model.get_submodule(names["first_conv"]).register_forward_pre_hook(cast_to_body)


def cast_to_body(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A hook of the first convolution or of a backbone, which gets images in float32."""
    return tuple(x.to(DTYPE) for x in inputs)


def cast_maps(module: nn.Module, inputs: tuple[Tensor, ...], maps: list[Tensor]) -> list[Tensor]:
    """A hook of a backbone, whose maps a dense head reads in float32."""
    return [x.to(HEAD_DTYPE) for x in maps]


def cast_to_head(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A hook of the classifier, which gets features in bfloat16."""
    return tuple(x.to(HEAD_DTYPE) for x in inputs)


def export_program(model: nn.Module, images: Tensor, **options: Any) -> ExportedProgram:
    """torch.export's program of a quantized model, for PyTorch alone: of plain tensors and its own operators."""
    program = torch.export.export(unwrap_tensor_subclass(deepcopy(model)), (images,), **options)
    torchao_rules = {
        operator: rule
        for operator, rule in default_decompositions().items()
        if getattr(operator, "namespace", None) == "torchao"
    }
    return program.run_decompositions(torchao_rules)
