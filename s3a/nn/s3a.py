"""S3A: Sparse Scan Self-Attention as a module, to drop into any network."""

import operator
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from torch import Tensor, nn

from s3a.attention.backends import BACKENDS, KernelOptions, Operands
from s3a.attention.plan import ScanPlan, attend_plan, check_options, freeze_options, plan_scan
from s3a.geometry import FIXED, PASSES, Fixed, Passes, Scan, check_size, sparse_scan
from s3a.nn.layers import DepthwiseConv, Pointwise
from s3a.nn.rotary import build_rotary_tables, rotate
from s3a.support.caches import cache_results
from s3a.support.errors import make_unknown_error


@dataclass(frozen=True, eq=False)
class AttentionPlan:
    """All that S3A needs to know of a map.

    Attributes:
        scan: the plan of its passes.
        cosine, sine: [tokens, 1, 1, head_dim / 2], the rotation of every pair of channels.
    """

    scan: ScanPlan
    cosine: Tensor
    sine: Tensor


@cache_results(maxsize=256)
def join_plan(scan: ScanPlan, head_dim: int, device: torch.device, dtype: torch.dtype) -> AttentionPlan:
    """The plan of a scan with the rotary tables of its map, in that dtype."""
    cosine, sine = build_rotary_tables(scan.height, scan.width, head_dim, device, dtype)
    return AttentionPlan(scan=scan, cosine=cosine, sine=sine)


@cache_results(maxsize=1024)
def build_attention_plan(
    height: int,
    width: int,
    size: int,
    fixed: Fixed,
    passes: Passes,
    operands: Operands,
    backend: str | None,
    kernel_options: KernelOptions = (),
) -> AttentionPlan:
    """The plan of S3A on a map; built at the first call for its arguments, looked up at the next.

    Args:
        height, width: the map, in tokens.
        size, fixed, passes: of the scan, see `geometry.sparse_scan`.
        operands: what will be attended; rotary tables are of their dtype, float32 at least.
        backend, kernel_options: of every pass, see `plan.plan_scan`.
    """
    neighborhoods = sparse_scan(height, width, size, fixed, passes)
    scan = plan_scan(neighborhoods, height, width, operands, backend, kernel_options)
    dtype = torch.promote_types(operands.dtype, torch.float32)
    return join_plan(scan, operands.head_dim, operands.device, dtype)


@torch.compiler.assume_constant_result
def find_attention_plan(
    device: torch.device,
    dtype: torch.dtype,
    head_dim: int,
    needs_grad: bool,
    backend: str | None,
    kernel_options: KernelOptions,
    *arguments: Any,
) -> AttentionPlan:
    """`build_attention_plan`, whose result a tracer takes as a constant: a plan is never built inside a graph."""
    operands = Operands(device, dtype, head_dim, needs_grad)
    return build_attention_plan(*arguments, operands, backend, kernel_options)


class S3A(nn.Module):
    """Sparse Scan Self-Attention (arXiv 2405.13335), to drop into any network.

    Projects tokens to queries, keys and values, rotates queries and keys by their place in the map, attends
    first to a reference window and then to anchors spread over the map, adds a depthwise convolution of the
    values (LePE), and projects back.

    Args:
        dim: channels of a token.
        num_heads: attention heads; head_dim = dim / num_heads, a multiple of 4.
        size: tokens per axis of what is fixed.
        fixed: "window" fixes the reference window and lets the number of anchors follow the map, "anchors"
            the other way round. Networks alternate the two.
        passes: "both" as published; for ablations "local" or "anchor" alone, or "dense" attention.
        backend: None chooses for each pass what costs least: tiled on a CPU, tiled or flex on CUDA (`s3a.explain` says
            why). One that is named ("flex", "tiled", "reference") is used exactly, or ValueError.
        kernel_options: for `flex_attention`, with backend="flex" alone; see `s3a.neighborhood_attention`.

    Shape:
        [batch, height, width, dim] to the same.

    Raises:
        ValueError: for heads that do not divide the dim or leave a head_dim that is no multiple of 4, a size
            below 1, an unknown `fixed`, `passes` or backend, or kernel options without backend="flex".
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        *,
        size: int = 7,
        fixed: Fixed = "window",
        passes: Passes = "both",
        backend: str | None = None,
        kernel_options: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        whole = isinstance(dim, int) and isinstance(num_heads, int)
        if not whole or min(dim, num_heads) < 1 or dim % num_heads or (dim // num_heads) % 4:
            raise ValueError(
                f"dim is {dim!r} and num_heads is {num_heads!r}: the heads must divide the dim into head dims "
                "that are multiples of 4 (the rotary embedding needs pairs for rows and for columns)"
            )
        if fixed not in FIXED:
            raise make_unknown_error("fixed", fixed, FIXED)
        if passes not in PASSES:
            raise make_unknown_error("passes", passes, PASSES)
        if backend is not None and backend not in BACKENDS:
            raise make_unknown_error("backend", backend, BACKENDS)
        self.dim, self.num_heads, self.head_dim = dim, num_heads, dim // num_heads
        self.kernel_options = freeze_options(kernel_options)
        check_options(self.kernel_options, backend)
        self.size, self.fixed, self.passes, self.backend = check_size(size), fixed, passes, backend
        self.qkv = Pointwise(dim, 3 * dim)
        self.lepe = DepthwiseConv(dim, 5)
        self.proj = Pointwise(dim, dim)

    def scan(self, height: int, width: int) -> Scan:
        """The passes on a map of tokens."""
        return sparse_scan(height, width, self.size, self.fixed, self.passes)

    def plan(self, x: Tensor) -> AttentionPlan:
        """The plan for tokens of x's map size, device and dtype; cached for the process."""
        needs_grad = torch.is_grad_enabled() and (x.requires_grad or self.qkv.weight.requires_grad)
        # a plan belongs to one map size, also where a tracer would vary it
        height, width = operator.index(x.shape[1]), operator.index(x.shape[2])
        scan = height, width, self.size, self.fixed, self.passes
        backend = self.backend, self.kernel_options
        return find_attention_plan(x.device, x.dtype, self.head_dim, needs_grad, *backend, *scan)

    def forward(self, x: Tensor, plan: AttentionPlan | None = None) -> Tensor:
        """Attends. `plan` is what `self.plan(x)` returns; None looks it up.

        Raises:
            ValueError: for tokens of another shape, a plan of another map or device, or tensors that the backend cannot
                run.
        """
        if x.ndim != 4 or x.shape[-1] != self.dim or 0 in x.shape[1:]:
            raise ValueError(f"tokens have shape {tuple(x.shape)}: they must be [batch, height, width, {self.dim}]")
        plan = plan or self.plan(x)
        if (plan.scan.height, plan.scan.width) != x.shape[1:3] or plan.cosine.device != x.device:
            raise ValueError(
                f"the plan is of {plan.scan.height} x {plan.scan.width} tokens on {plan.cosine.device}, and x has "
                f"{x.shape[1]} x {x.shape[2]} on {x.device}: give what plan(x) returns, or no plan"
            )
        qkv = self.qkv(x)  # [batch, height, width, 3 * dim]
        query, key, value = self.split_heads(qkv, plan)
        attended = rearrange(attend_plan(query, key, value, plan.scan), "b (h w) n d -> b h w (n d)", h=x.shape[1])
        return self.proj(attended + self.lepe(qkv[..., 2 * self.dim :]))

    def split_heads(self, qkv: Tensor, plan: AttentionPlan) -> tuple[Tensor, Tensor, Tensor]:
        """Queries and keys, both rotated, and values of projected tokens; each [batch, tokens, heads, head_dim]."""
        heads = rearrange(qkv, "b h w (three n d) -> b (h w) three n d", three=3, n=self.num_heads)
        query, key = rotate(heads[:, :, :2], plan.cosine, plan.sine).unbind(2)
        return query, key, heads[:, :, 2]
