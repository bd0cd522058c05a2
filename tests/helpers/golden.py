"""The references of the tests: outputs of the official implementations, and the operator's rules spelled out slowly.

The recorded outputs lie in `tests/golden`; their weights and inputs follow from a fixed rule, `fill` and `images`. The
rules are written from the papers' prose with loops and dense masks, and share nothing with the library.
"""

import json
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

DATA = Path(__file__).parent.parent / "golden"

# --------------------------------------------------------------------------------------------------------
# Recorded numbers
# --------------------------------------------------------------------------------------------------------

# Branches that add to the residual stream are damped, so that deep models keep logits of order one.
DAMPED = (
    ".pos.weight",
    ".out_proj.weight",
    ".fc2.weight",
    ".pos_embed.conv.weight",
    ".mlp2.conv.conv.weight",
    ".stoken_refine.proj.weight",
)

# Cases of neighborhood.safetensors in the order that seeds them: height, width, kernel size, dilation.
NEIGHBORHOODS = (
    (7, 7, 7, 1),
    (14, 14, 7, 1),
    (14, 14, 3, 4),
    (14, 14, 7, 2),
    (13, 22, 5, 2),
    (28, 28, 5, 5),
    (20, 17, 3, 5),
    (30, 23, 7, 3),
)


def normal(seed: int, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Standard normal float32 tensors, drawn one after the other."""
    generator = np.random.Generator(np.random.PCG64(seed))
    return [torch.from_numpy(np.asarray(generator.standard_normal(shape, dtype=np.float32))) for shape in shapes]


def images(seed: int, shape: tuple[int, int, int, int]) -> Tensor:
    return normal(seed, shape)[0]


def fill(key: str, shape: tuple[int, ...]) -> Tensor:
    """The stand-in for the official parameter of that name."""
    if key.endswith("num_batches_tracked"):
        return torch.zeros(shape, dtype=torch.long)
    if key.endswith("RoPE.angle"):
        return (1.0 / 10000 ** torch.linspace(0, 1, shape[0] // 2)).repeat_interleave(2)
    if key.endswith("fold.weights"):  # one-hot kernels, also those of `unfold`
        return torch.eye(shape[0]).reshape(shape)
    noise = normal(zlib.crc32(key.encode()), shape)[0]
    leaf = key.rsplit(".", 1)[-1]
    if leaf in ("running_mean", "bias"):
        return 0.1 * noise
    if leaf == "running_var":
        return 0.5 + noise.abs()
    if leaf.startswith("gamma"):
        return 0.5 * noise
    if len(shape) == 1:
        return 1 + 0.1 * noise
    gain = 0.25 if key.endswith(DAMPED) else 1.0
    return gain * noise / int(np.prod(shape[1:])) ** 0.5


def official_shapes(size: str, family: str = "ssvit") -> dict[str, tuple[int, ...]]:
    """Key -> shape of an official state dict: "tiny" of "ssvit", "small" of "svit", "medium" of "vvt"."""
    entry = json.loads((DATA / f"{family}_official_shapes.json").read_text(encoding="utf-8"))[size]
    shapes = {}
    for pattern, shape in entry["shapes"].items():
        blocks, is_block, _ = pattern.partition(".*")
        copies = entry["depths"][blocks] if is_block else 1
        shapes.update({pattern.replace("*", str(block)): tuple(shape) for block in range(copies)})
    return shapes


def official_state(size: str, family: str = "ssvit") -> dict[str, Tensor]:
    """An official state dict, filled by the rule."""
    return {key: fill(key, shape) for key, shape in official_shapes(size, family).items()}


def recorded(name: str) -> dict[str, Tensor]:
    """The tensors of a file in `tests/golden`."""
    return load_file(DATA / f"{name}.safetensors")


def neighborhood_case(index: int) -> tuple[list[Tensor], Tensor]:
    """Query, key, value and the official output of a case, as [batch, height, width, heads, head_dim]."""
    height, width, kernel_size, dilation = NEIGHBORHOODS[index]
    inputs = normal(100 + index, *3 * [(2, 3, height, width, 8)])
    output = recorded("neighborhood")[f"h{height}_w{width}_k{kernel_size}_d{dilation}"]
    return [tensor.permute(0, 2, 3, 1, 4) for tensor in inputs], output.permute(0, 2, 3, 1, 4)


def error(ours: Tensor, right: Tensor) -> float:
    """The largest difference, in standard deviations of the right values."""
    assert ours.shape == right.shape
    return ((ours.double() - right.double()).abs().max() / right.double().std(correction=0)).item()


class SizeRecorder(TorchDispatchMode):
    """Records the number of elements of every tensor that is computed inside its `with` block."""

    def __init__(self) -> None:
        super().__init__()
        self.elements: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        output = func(*args, **(kwargs or {}))
        self.elements += [leaf.numel() for leaf in tree_leaves(output) if isinstance(leaf, Tensor)]
        return output


def count_largest(call: Callable[[], Any]) -> int:
    """The number of elements of the largest tensor that a call computes; free of cost on the meta device."""
    with SizeRecorder() as sizes:
        call()
    return max(sizes.elements)


# --------------------------------------------------------------------------------------------------------
# Rules, spelled out
# --------------------------------------------------------------------------------------------------------


def seen_keys(position: int, length: int, kernel_size: int, dilation: int) -> list[int]:
    """NATTEN's rule on one axis: a full window of the tokens of the same residue, shifted inwards at borders."""
    group = [token for token in range(length) if token % dilation == position % dilation]
    if len(group) <= kernel_size:
        return group
    reach = kernel_size // 2
    centre = min(max(group.index(position), reach), len(group) - 1 - reach)
    return group[centre - reach : centre + reach + 1]


def axis_mask(length: int, kernel_size: int, dilation: int) -> Tensor:
    """[length, length] bool: does the query (row) see the key (column)?"""
    mask = torch.zeros(length, length, dtype=torch.bool)
    for position in range(length):
        mask[position, seen_keys(position, length, kernel_size, dilation)] = True
    return mask


def dense_mask(
    height: int, width: int, kernel_size: int | tuple[int, int], dilation: int | tuple[int, int] = 1
) -> Tensor:
    """[tokens, tokens] bool, row-major: a key is seen if it is seen on both axes."""
    kernels, dilations = (both if isinstance(both, tuple) else (both, both) for both in (kernel_size, dilation))
    rows, columns = axis_mask(height, kernels[0], dilations[0]), axis_mask(width, kernels[1], dilations[1])
    return (rows[:, None, :, None] & columns[None, :, None, :]).reshape(height * width, height * width)


def masked_attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None = None) -> Tensor:
    """Softmax over all tokens under a dense mask; tensors are [batch, height, width, heads, head_dim]."""
    height, width, head_dim = query.shape[1], query.shape[2], query.shape[-1]
    query, key, value = (tensor.flatten(1, 2).transpose(1, 2) for tensor in (query, key, value))
    scores = query @ key.transpose(-1, -2) * (head_dim**-0.5 if scale is None else scale)
    attended = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value
    return attended.transpose(1, 2).unflatten(1, (height, width))


def scan_table(height: int, width: int, fixed: str, size: int = 7) -> list[tuple[int, int]]:
    """The (kernel, dilation) of S3A's passes on a map: the table of the official code, dilation by trial."""

    def odd(number: int) -> int:
        return number if number % 2 == 1 else number + 1

    shorter = min(height, width)
    window, anchors = {"window": (size, shorter // size), "anchors": (shorter // size, size)}[fixed]
    passes = [(odd(window), 1)] if window > 1 else []
    if anchors > 1:
        dilation = max(window, 1)
        while dilation > 1 and odd(anchors) * dilation > shorter:
            dilation -= 1
        passes.append((odd(anchors), dilation))
    return passes


def chained_attention(query: Tensor, key: Tensor, value: Tensor, fixed: str, size: int = 7) -> Tensor:
    """S3A's passes, one after the other with the same queries and keys, by dense masks."""
    height, width = query.shape[1:3]
    for kernel_size, dilation in scan_table(height, width, fixed, size):
        value = masked_attention(query, key, value, dense_mask(height, width, kernel_size, dilation))
    return value


def ablated_attention(query: Tensor, key: Tensor, value: Tensor, fixed: str, size: int, passes: str) -> Tensor:
    """One of S3A's passes without the other, by dense masks, or softmax over all tokens."""
    height, width = query.shape[1:3]
    if passes == "dense":
        return masked_attention(query, key, value, torch.ones(2 * (height * width,), dtype=torch.bool))
    shorter = min(height, width)
    has_local, has_anchor = {
        "window": (size > 1, shorter // size > 1),
        "anchors": (shorter // size > 1, size > 1),
    }[fixed]
    steps = scan_table(height, width, fixed, size)
    assert len(steps) == has_local + has_anchor
    kept = {"both": steps, "local": steps[:has_local], "anchor": steps[len(steps) - has_anchor :]}[passes]
    for kernel_size, dilation in kept:
        value = masked_attention(query, key, value, dense_mask(height, width, kernel_size, dilation))
    return value
