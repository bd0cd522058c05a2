"""How quantized models are stored in a weights folder: as plain tensors under torchao's keys, in few bytes."""

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
    get_quantization,
    mark_quantized,
    quiet_import,
)

with quiet_import():
    from torchao.prototype.safetensors.safetensors_support import flatten_tensor_state_dict, unflatten_tensor_state_dict
    from torchao.quantization import (
        Int8Tensor,
        IntxUnpackedToInt8Tensor,
        quantize_,
    )
    from torchao.utils import TorchAOBaseTensor

CONFIG_KEY = "quantization"  # of config.json
SYMMETRIC = (Int8Tensor, IntxUnpackedToInt8Tensor)  # all of their zero points are 0 in our schemes


def flatten_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a quantized model as plain tensors: a weight becomes `_weight_qdata`, `_weight_scale`, ..."""
    quantization = get_quantization(model)
    assert quantization is not None
    state = {key: tensor.detach() for key, tensor in model.state_dict().items()}
    for name in quantization.layers:
        weight = state.pop(f"{name}.weight")
        if type(weight) is Tensor:
            raise ValueError(f"layer {name!r} was replaced after it was quantized: quantize the float model anew")
        state |= flatten_weight(name, weight)[0]
    return state


def flatten_weight(name: str, weight: Tensor) -> tuple[dict[str, Tensor], dict[str, str]]:
    """The parts of a layer's quantized weight under torchao's keys, in few bytes, and torchao's description of it."""
    parts, description = flatten_tensor_state_dict({f"{name}.weight": weight})
    parts[f"{name}._weight_scale"] = parts[f"{name}._weight_scale"].to(DTYPE)
    if isinstance(weight, SYMMETRIC):
        del parts[f"{name}._weight_zero_point"]
    if isinstance(weight, IntxUnpackedToInt8Tensor):
        parts[f"{name}._weight_qdata"] = pack_int4(parts[f"{name}._weight_qdata"])
    return parts, description


def pack_int4(codes: Tensor) -> Tensor:
    """Numbers from -8 to 7 two to a byte along the last axis: [3, -1] becomes [0xF3]. They come in an int8 each."""
    return ((codes[..., ::2] & 15) | (codes[..., 1::2] << 4)).view(torch.uint8)


def unpack_int4(packed: Tensor) -> Tensor:
    """The inverse of `pack_int4`."""
    signed = packed.view(torch.int8)
    return torch.stack([(signed << 4) >> 4, signed >> 4], dim=-1).flatten(-2)


def parse_quantization(config: Mapping[str, Any], model: nn.Module, label: str) -> Quantization:
    """How the model of a config.json is quantized.

    Args:
        label: what errors call the file.

    Raises:
        ValueError: if the entry is incomplete, does not fit the model, or cannot run on this machine.
    """
    entry = config[CONFIG_KEY]
    whole = isinstance(entry, dict) and isinstance(entry.get("scheme"), str) and isinstance(entry.get("layers"), list)
    if not whole or not entry["layers"] or not all(isinstance(name, str) for name in entry["layers"]):
        raise ValueError(f"{label}: {CONFIG_KEY} is {entry!r}: it must name a scheme and layers; quantize again")
    scheme, layers = entry["scheme"], tuple(entry["layers"])
    try:
        check_scheme(scheme)
    except ValueError as error:
        raise ValueError(f"{label}: {error}") from error
    check_layers(model, scheme, layers, f"{label}: ")
    return Quantization(scheme, layers)


def build_expected_state(model: nn.Module, quantization: Quantization) -> dict[str, Tensor]:
    """The keys, shapes and dtypes that a folder of the quantized model must hold, as tensors without memory.

    Args:
        model: without memory; in the dtypes of a quantized one (`convert.cast_model`), but not quantized yet.
    """
    state = dict(model.state_dict())
    for name in quantization.layers:
        weight = state.pop(f"{name}.weight")
        state |= flatten_weight(name, make_example(quantization.scheme, tuple(weight.shape), weight.dtype))[0]
    return {key: tensor.to("meta") for key, tensor in state.items()}


def load_state(model: nn.Module, state: dict[str, Tensor], quantization: Quantization) -> None:
    """Turns a model without memory into the quantized one that a folder holds.

    Args:
        model: as in `build_expected_state`.
        state: the folder's tensors, checked against the expected ones.
    """
    model.load_state_dict(restore_state(state, model, quantization), assign=True)
    model.requires_grad_(False)
    mark_quantized(model, quantization)


def restore_state(state: dict[str, Tensor], model: nn.Module, quantization: Quantization) -> dict[str, Tensor]:
    """The state dict with torchao's tensors again: the inverse of `flatten_state`."""
    state, plain = dict(state), model.state_dict()
    for name in quantization.layers:
        weight = plain[f"{name}.weight"]
        example = make_example(quantization.scheme, tuple(weight.shape), weight.dtype)
        flat, description = flatten_weight(name, example)
        parts = {part: state.pop(part) for part in flat}
        parts[f"{name}._weight_scale"] = parts[f"{name}._weight_scale"].to(example.scale.dtype)
        if isinstance(example, IntxUnpackedToInt8Tensor):
            parts[f"{name}._weight_qdata"] = unpack_int4(parts[f"{name}._weight_qdata"])
        if isinstance(example, SYMMETRIC):
            parts[f"{name}._weight_zero_point"] = example.zero_point.clone()
        state |= unflatten_tensor_state_dict(parts, description)[0]
    return state


@lru_cache(maxsize=32)
def make_example(scheme: str, shape: tuple[int, int], dtype: torch.dtype) -> TorchAOBaseTensor:
    """Some quantized weight of that shape: torchao itself shows which parts it has, whatever a folder says."""
    needs = SCHEMES[scheme]
    layer = nn.Linear(shape[1], shape[0], bias=False, dtype=dtype, device="cuda" if needs.capability else "cpu")
    nn.init.ones_(layer.weight)
    holder = nn.ModuleDict({"layer": layer})
    quantize_(holder, CONFIGS[scheme](needs))
    return holder.state_dict()["layer.weight"]
