"""torchao's quantization of a model's linear layers, and how quantized models lie in a weights folder.

The rest of a quantized model is bfloat16, from the images on; its classifier takes and gives float32, so that close
logits stay apart. `schemes` has the table of schemes.
"""

import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from copy import deepcopy
from fnmatch import fnmatchcase
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram, default_decompositions

from s3a.errors import unknown
from s3a.schemes import SCHEMES, Quantization, Scheme, check_float, check_scheme, check_trainable, quiet_import

with quiet_import():
    from torchao.core.config import AOBaseConfig
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict
    from torchao.quantization import (
        Float8DynamicActivationFloat8WeightConfig,
        Float8WeightOnlyConfig,
        Int4WeightOnlyConfig,
        Int8DynamicActivationInt8WeightConfig,
        Int8DynamicActivationIntxWeightConfig,
        Int8Tensor,
        Int8WeightOnlyConfig,
        IntxUnpackedToInt8Tensor,
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
CONFIG_KEY = "quantization"  # of config.json
SYMMETRIC = (Int8Tensor, IntxUnpackedToInt8Tensor)  # here all of their zero points are 0

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


# --------------------------------------------------------------------------------------------------------
# Models
# --------------------------------------------------------------------------------------------------------


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


# --------------------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------------------


def flat_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a quantized model as plain tensors: a weight becomes `_weight_qdata`, `_weight_scale`, ..."""
    state = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    for name in model.quantization.layers:
        weight = state.pop(f"{name}.weight")
        if type(weight) is Tensor:
            raise ValueError(f"layer {name!r} was replaced after it was quantized: quantize the float model anew")
        state |= flatten(name, weight)[0]
    return state


def flatten(name: str, weight: Tensor) -> tuple[dict[str, Tensor], dict[str, str]]:
    """A quantized weight's parts under torchao's keys, as small as they go, and torchao's description of it."""
    parts, description = flatten_tensor_state_dict({f"{name}.weight": weight})
    parts[f"{name}._weight_scale"] = parts[f"{name}._weight_scale"].to(DTYPE)
    if isinstance(weight, SYMMETRIC):
        del parts[f"{name}._weight_zero_point"]
    if isinstance(weight, IntxUnpackedToInt8Tensor):
        parts[f"{name}._weight_qdata"] = pack(parts[f"{name}._weight_qdata"])
    return parts, description


def pack(int4: Tensor) -> Tensor:
    """Numbers from -8 to 7, of an int8 each, two to a byte along the last axis: the first one in the low bits."""
    return ((int4[..., ::2] & 15) | (int4[..., 1::2] << 4)).view(torch.uint8)


def unpack(packed: Tensor) -> Tensor:
    """The inverse of `pack`."""
    signed = packed.view(torch.int8)
    return torch.stack([(signed << 4) >> 4, signed >> 4], dim=-1).flatten(-2)


def parse_quantization(config: Mapping[str, Any], model: nn.Module, shown: str) -> Quantization:
    """What a config.json says of the quantization of its model.

    Raises:
        ValueError: where that is not of the model, or cannot run on this machine.
    """
    entry = config[CONFIG_KEY]
    whole = isinstance(entry, dict) and isinstance(entry.get("scheme"), str) and isinstance(entry.get("layers"), list)
    if not whole or not entry["layers"] or not all(isinstance(name, str) for name in entry["layers"]):
        raise ValueError(f"{shown}: {CONFIG_KEY} is {entry!r}: it must name a scheme and layers; quantize again")
    scheme, layers = entry["scheme"], tuple(entry["layers"])
    try:
        check_scheme(scheme)
    except ValueError as error:
        raise ValueError(f"{shown}: {error}") from error
    check_layers(model, scheme, layers, f"{shown}: ")
    return Quantization(scheme, layers)


def expected_parts(model: nn.Module, quantization: Quantization) -> dict[str, Tensor]:
    """The state dict that a folder of the quantized model holds, of tensors without memory.

    Args:
        model: without memory; cast, and not quantized yet.
    """
    state = dict(model.state_dict())
    for name in quantization.layers:
        weight = state.pop(f"{name}.weight")
        state |= flatten(name, example(quantization.scheme, tuple(weight.shape), weight.dtype))[0]
    return {key: tensor.to("meta") for key, tensor in state.items()}


def assign(model: nn.Module, state: dict[str, Tensor], quantization: Quantization) -> None:
    """Makes a cast model without memory the quantized one.

    Args:
        state: of a folder; its keys, shapes and dtypes are as expected.
    """
    model.load_state_dict(restored(state, model, quantization), assign=True)
    model.requires_grad_(False)
    model.quantization = quantization


def restored(state: dict[str, Tensor], model: nn.Module, quantization: Quantization) -> dict[str, Tensor]:
    """The state dict of the quantized model from that of a folder."""
    state, plain = dict(state), model.state_dict()
    for name in quantization.layers:
        like = example(quantization.scheme, tuple(plain[f"{name}.weight"].shape), plain[f"{name}.weight"].dtype)
        flat, description = flatten(name, like)
        parts = {part: state.pop(part) for part in flat}
        parts[f"{name}._weight_scale"] = parts[f"{name}._weight_scale"].to(like.scale.dtype)
        if isinstance(like, IntxUnpackedToInt8Tensor):
            parts[f"{name}._weight_qdata"] = unpack(parts[f"{name}._weight_qdata"])
        if isinstance(like, SYMMETRIC):
            parts[f"{name}._weight_zero_point"] = like.zero_point.clone()
        state |= unflatten_tensor_state_dict(parts, description)[0]
    return state


@lru_cache(maxsize=32)
def example(scheme: str, shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    """A quantized weight of that shape: its parts are what torchao makes, whatever a folder says."""
    needs = SCHEMES[scheme]
    layer = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype, device="cuda" if needs.capability else "cpu")
    nn.init.ones_(layer.weight)
    holder = nn.ModuleDict({"layer": layer})
    quantize_(holder, CONFIGS[scheme](needs))
    return holder.state_dict()["layer.weight"]
