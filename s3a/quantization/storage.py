"""How quantized models lie in a weights folder: plain tensors under torchao's keys, as small as they go."""

import warnings
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from s3a.quantization.convert import CONFIGS, DTYPE, check_layers
from s3a.quantization.schemes import (
    SCHEMES,
    Quantization,
    check_scheme,
    quiet_import,
)

with quiet_import():
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict
    from torchao.quantization import (
        Int8Tensor,
        IntxUnpackedToInt8Tensor,
        quantize_,
    )

# The compiler tells every user that it does not cache code for torchao's tensors.
warnings.filterwarnings("ignore", message=".*_stable_hash_for_caching")
CONFIG_KEY = "quantization"  # of config.json
SYMMETRIC = (Int8Tensor, IntxUnpackedToInt8Tensor)  # here all of their zero points are 0


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
