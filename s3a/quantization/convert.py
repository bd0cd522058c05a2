"""torchao's quantization of a model's linear layers.

The rest of a quantized model is bfloat16, from the images on; its classifier takes and gives float32, so that close
logits stay apart. `schemes` has the table of schemes.
"""

import warnings
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
    quiet_import,
)
from s3a.support.errors import unknown

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
    from torchao.utils import unwrap_tensor_subclass

# The compiler tells every user that it does not cache code for torchao's tensors.
warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")

DTYPE = torch.bfloat16  # of all that is not quantized
HEAD_DTYPE = torch.float32

# torchao would set options of the compiler for the whole process.
ALONE = {"set_inductor_config": False}
CONFIGS: dict[str, Callable[[Scheme], AOBaseConfig]] = {
    "int8-weight-only": lambda scheme: Int8WeightOnlyConfig(**ALONE),
    "int8-dynamic": lambda scheme: Int8DynamicActivationInt8WeightConfig(**ALONE),
    "int4-weight-only": lambda scheme: Int4WeightOnlyConfig(group_size=scheme.group_size, **ALONE),
    "int8-activations-int4-weights": lambda scheme: Int8DynamicActivationIntxWeightConfig(
        weight_dtype=torch.int4, weight_granularity=PerGroup(scheme.group_size)
    ),
    "float8-weight-only": lambda scheme: Float8WeightOnlyConfig(**ALONE),
    "float8-dynamic": lambda scheme: Float8DynamicActivationFloat8WeightConfig(granularity=PerRow(), **ALONE),
}

# In training activations keep a zero point of their own: torchao's fake quantization has no symmetric tokens.
FAKE_WEIGHTS = IntxFakeQuantizeConfig(torch.int8, "per_channel", is_symmetric=True)
FAKE_TOKENS = IntxFakeQuantizeConfig(torch.int8, "per_token", is_symmetric=False)
FAKES: dict[str, Callable[[Scheme], QATConfig]] = {
    "int8-weight-only": lambda scheme: QATConfig(weight_config=FAKE_WEIGHTS),
    "int8-dynamic": lambda scheme: QATConfig(activation_config=FAKE_TOKENS, weight_config=FAKE_WEIGHTS),
    "int8-activations-int4-weights": lambda scheme: QATConfig(CONFIGS["int8-activations-int4-weights"](scheme)),
}


def choose_layers(
    model: nn.Module, scheme: str, *, layers: Sequence[str] = ("*",), skip: Sequence[str] = ()
) -> tuple[list[str], list[str]]:
    """The names of the linear layers that a scheme quantizes, and of those that it has to leave.

    Args:
        layers, skip: shell patterns of names, such as "stages.2.*", "*.fc1" or "head".

    Returns:
        The layers chosen; and those whose inputs are no multiple of the scheme's group.

    Raises:
        ValueError: where a pattern matches no linear layer, or none is left.
    """
    linear = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    for pattern in (*layers, *skip):
        if not any(fnmatchcase(name, pattern) for name in linear):
            raise unknown("layer pattern", pattern, linear)
    wanted = [name for name in linear if matches(name, layers) and not matches(name, skip)]
    group = SCHEMES[scheme].group_size or 1
    fitting = [name for name in wanted if linear[name].in_features % group == 0]
    if not fitting:
        reason = f"none of them has inputs in groups of {group}" if wanted else "the patterns leave none"
        raise ValueError(f"no linear layer to quantize by {scheme!r}: {reason}; choose other layers")
    return fitting, [name for name in wanted if name not in fitting]


def matches(name: str, patterns: Iterable[str]) -> bool:
    """Whether a name matches any of the shell patterns."""
    return any(fnmatchcase(name, pattern) for pattern in patterns)


def quantize(model: nn.Module, scheme: str, layers: Sequence[str] | None = None) -> nn.Module:
    """A quantized copy of a model of timm's registry, in evaluation mode; the model stays as it is.

    Args:
        scheme: a name of `schemes.SCHEMES`.
        layers: names of linear layers, as `choose_layers` finds them; None for all that the scheme can take.

    Raises:
        ValueError: for a scheme that is unknown or cannot run here, layers that it cannot take, and for a model that
            is quantized already.
    """
    needs = check_scheme(scheme)
    check_float(model)
    layers = choose_layers(model, scheme)[0] if layers is None else list(layers)
    check_layers(model, scheme, layers)
    model = deepcopy(model).eval().requires_grad_(False)
    cast(model)
    if needs.capability is not None:
        model.cuda()
    quantize_(model, CONFIGS[scheme](needs), filter_fn=lambda module, name: name in layers)
    for name in layers:
        weight = model.get_submodule(name).weight
        weight.scale = weight.scale.to(DTYPE).to(weight.scale.dtype)  # as folders keep it
    model.quantization = Quantization(scheme, tuple(layers))
    return model


def fake_quantize(model: nn.Module, scheme: str) -> None:
    """Makes a model round in its forward as the scheme does, and pass gradients as if it did not; in place.

    Parameters and their names stay: `quantize` takes what was trained into a plain model.

    Raises:
        ValueError: for a scheme that cannot be trained for, and for a model that is quantized already.
    """
    needs = check_trainable(scheme)
    check_float(model)
    layers, _ = choose_layers(model, scheme)
    quantize_(model, FAKES[scheme](needs), filter_fn=lambda module, name: name in layers)


def check_layers(model: nn.Module, scheme: str, layers: Iterable[str], where: str = "") -> None:
    """Raises ValueError for layers that the model has not, or that the scheme cannot take."""
    known, _ = choose_layers(model, scheme)
    for name in layers:
        if name not in known:
            raise unknown(f"{where}layer of scheme {scheme!r}", name, known)


def cast(model: nn.Module) -> None:
    """Makes a model compute in bfloat16 from its first convolution on, and in float32 in its classifier."""
    model.to(DTYPE)
    first, head = (model.get_submodule(model.pretrained_cfg[key]) for key in ("first_conv", "classifier"))
    head.to(HEAD_DTYPE)
    first.register_forward_pre_hook(take_body_dtype)
    head.register_forward_pre_hook(take_head_dtype)


def take_body_dtype(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A hook in front of the first convolution, which images reach in float32."""
    return tuple(x.to(DTYPE) for x in inputs)


def take_head_dtype(module: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """A hook in front of the classifier."""
    return tuple(x.to(HEAD_DTYPE) for x in inputs)


def trace(model: nn.Module, images: Tensor, **options: Any) -> ExportedProgram:
    """torch.export's program of a quantized model, which loads without torchao: of plain tensors and PyTorch's own
    operators."""
    program = torch.export.export(unwrap_tensor_subclass(deepcopy(model)), (images,), **options)
    own = {op: how for op, how in default_decompositions().items() if getattr(op, "namespace", None) == "torchao"}
    return program.run_decompositions(own)
