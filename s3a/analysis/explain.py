"""Why a map is attended the way it is: backend, token order and tiles of every pass, and what lost."""

from dataclasses import dataclass

import torch

from s3a.attention.backends import Operands
from s3a.attention.backends.blocks import BLOCK_SIZE, TokenOrder, rank_orders
from s3a.attention.backends.tiles import TileCost, estimate_key_list_cost, prefers_key_list, rank_tiles
from s3a.attention.plan import explain_choice
from s3a.geometry import Fixed, Neighborhood, ScanPattern, find_passes, find_scan_pattern

SHOWN_LOSERS = 2


@dataclass(frozen=True, kw_only=True)
class PassChoice:
    """How one pass is executed, and what else it could have been.

    Attributes:
        fixed: which kind of scan the pass belongs to. name: "local", "anchor" or "dense".
        neighborhood: its kernel and dilation.
        backend: the automatic choice. reasons: for each other backend, why it lost.
        num_pairs: (query, key) pairs of the pass. num_tokens: of the map.
        tiles: every choice of tiles, cheapest (the chosen one) first.
        key_list_cost: what compiled inference on a CPU would cost with the keys of every query listed, in the unit of
            `TileCost.total`. lists_keys: whether it does that instead of cutting tiles.
        orders: every candidate token order of the block mask, the chosen one first.
    """

    fixed: Fixed
    name: str
    neighborhood: Neighborhood
    backend: str
    reasons: dict[str, str]
    num_pairs: int
    num_tokens: int
    tiles: list[TileCost]
    key_list_cost: int
    lists_keys: bool
    orders: list[TokenOrder]

    def __str__(self) -> str:
        kernel, dilation = self.neighborhood.kernel_size[0], self.neighborhood.dilation[0]
        density = 100 * self.num_pairs / self.num_tokens**2
        what = "dense pass" if self.name == "dense" else f'fixed="{self.fixed}", {self.name} pass'
        return "\n".join(
            [
                f"{what}: kernel {kernel}, dilation {dilation}; {self.num_pairs:,} pairs, {density:.1f} % of dense",
                f"  tiles:  {self.describe_tiles()}",
                f"  listed: {self.describe_key_list()}",
                f"  blocks: {self.describe_orders()}",
            ]
        )

    def describe_backend(self) -> str:
        """The backend and why the others lost, a line each."""
        return "\n".join([f"backend {self.backend}", *(f"  not {name}: {why}" for name, why in self.reasons.items())])

    def describe_tiles(self) -> str:
        """The chosen tiles, and by how much the next ones lost."""
        best, *others = self.tiles
        lost = ", ".join(
            f"{format_tile(cost.tile)} (+{100 * (cost.total / best.total - 1):.0f} %)" for cost in others[:SHOWN_LOSERS]
        )
        calls = "1 call" if best.batches == 1 else f"{best.batches} calls"
        return (
            f"{format_tile(best.tile)} in {calls}, {best.pairs:,} pairs with masked ones, "
            f"{best.halo_tokens:,} keys gathered" + (f"; lost on estimated cost: {lost}" if lost else "")
        )

    def describe_key_list(self) -> str:
        """Whether compiled inference lists keys, and by how much that lost or won."""
        share = f"{100 * self.key_list_cost / self.tiles[0].total:.0f} % of the tiles' estimated cost"
        if self.lists_keys:
            return f"compiled inference lists the keys of every query instead, at {share}"
        return f"compiled inference keeps the tiles; a list of the keys of every query comes to {share}"

    def describe_orders(self) -> str:
        """The chosen token order, and how many blocks the others touch."""
        best, *others = self.orders
        total = (-(-self.num_tokens // BLOCK_SIZE)) ** 2
        lost = ", ".join(f"{format_tile(order.tile)} tiles ({len(order.pairs)})" for order in others[:SHOWN_LOSERS])
        return (
            f"{format_order(best, self.neighborhood)} touches {len(best.pairs)} of {total} blocks of {BLOCK_SIZE} "
            f"({100 * len(best.pairs) / total:.1f} %), {int(best.full.sum())} of them full"
            + (f"; lost on blocks: {lost}" if lost else "")
        )


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What S3A does on a map. `str()` is the whole explanation as text.

    Attributes:
        height, width: the map, in tokens. device, dtype, size: as asked.
        passes: every kind of scan in it, pass by pass.
    """

    height: int
    width: int
    device: torch.device
    dtype: torch.dtype
    size: int
    passes: tuple[PassChoice, ...]

    @property
    def backend(self) -> str | None:
        """The backend of every pass; None where they differ, or no pass is left."""
        names = {choice.backend for choice in self.passes}
        return names.pop() if len(names) == 1 else None

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        lines = [f"{self.height} x {self.width} tokens on {self.device}, {dtype}, size {self.size}"]
        if not self.passes:
            return "\n".join([*lines, "no pass is left: every token keeps its value"])
        if self.backend is not None:
            return "\n".join([*lines, self.passes[0].describe_backend(), "", "\n\n".join(map(str, self.passes))])
        return "\n\n".join([*lines, *(f"{choice}\n{choice.describe_backend()}" for choice in self.passes)])


def explain(
    height: int,
    width: int,
    *,
    device: str | torch.device = "cpu",
    dtype: torch.dtype = torch.float32,
    size: int = 7,
    scan: str = "alternate",
    head_dim: int = 32,
    training: bool = False,
) -> Explanation:
    """Says, per pass, which backend, tiles and token order are chosen for a map, and why the others lost.

    Args:
        height, width: the map, in tokens.
        device, dtype, head_dim, training: of the tensors that would be attended; nothing is put on the device.
        size: of the scans.
        scan: which of them a network runs, a key of `geometry.SCAN_PATTERNS`.

    Raises:
        ValueError: for a map without tokens, a size below 1 or an unknown scan.
    """
    if min(height, width) < 1:
        raise ValueError(f"the map is {height} x {width} tokens: height and width must be positive")
    try:
        device = torch.device(device)
    except RuntimeError as error:
        raise ValueError(f"device is {device!r}: it must be one that torch knows, such as cpu or cuda") from error
    if head_dim < 4 or head_dim % 4:
        raise ValueError(f"head_dim is {head_dim}: it must be a multiple of 4, as S3A's rotary embedding needs")
    backend, reasons = explain_choice(height * width, Operands(device, dtype, head_dim, training))
    passes = tuple(
        PassChoice(
            fixed=fixed,
            name=name,
            neighborhood=neighborhood,
            backend=backend,
            reasons=reasons,
            num_pairs=neighborhood.count_pairs(height, width),
            num_tokens=height * width,
            tiles=rank_tiles(neighborhood, height, width),
            key_list_cost=estimate_key_list_cost(neighborhood, height, width),
            lists_keys=prefers_key_list(neighborhood, height, width, device),
            orders=rank_orders(neighborhood, height, width),
        )
        for fixed, name, neighborhood in list_passes(find_scan_pattern(scan), height, width, size)
    )
    return Explanation(height=height, width=width, device=device, dtype=dtype, size=size, passes=passes)


def list_passes(pattern: ScanPattern, height: int, width: int, size: int) -> list[tuple[Fixed, str, Neighborhood]]:
    """Every pass that a network's blocks execute on a map: its kind of scan, its name, its neighborhood."""
    names = ("local", "dense" if pattern.passes == "dense" else "anchor")
    return [
        (fixed, name, neighborhood)
        for fixed in pattern.fixed
        for name, neighborhood in zip(names, find_passes(height, width, size, fixed, pattern.passes), strict=True)
        if neighborhood is not None
    ]


def format_tile(tile: tuple[int, int]) -> str:
    """A tile as text, rows first."""
    return f"{tile[0]} x {tile[1]}"


def format_order(order: TokenOrder, neighborhood: Neighborhood) -> str:
    """A token order as text."""
    grouped = "" if neighborhood.dilation == (1, 1) else "dilation group by group, "
    rows = int(order.rows.max()) + 1
    whole = order.tile[0] * min(neighborhood.dilation[0], rows) >= rows
    return grouped + ("row by row" if whole else f"tile by tile ({format_tile(order.tile)})")
