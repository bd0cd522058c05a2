"""Why a map is attended the way it is: backend, token order and tiles of every pass, and what lost."""

from dataclasses import dataclass

import torch

from s3a.attention.backends import Operands
from s3a.attention.backends.blocks import TokenOrder, list_block_sizes, rank_orders
from s3a.attention.backends.costs import DeviceCosts, find_costs
from s3a.attention.backends.tiles import TileCost, estimate_key_list, prefers_key_list, rank_tiles
from s3a.attention.plan import BackendChoice, explain_choice
from s3a.geometry import Fixed, Neighborhood, ScanPattern, find_passes, find_scan_pattern

SHOWN_LOSERS = 2


@dataclass(frozen=True, kw_only=True)
class PassChoice:
    """How one pass is executed, and what else it could have been.

    Attributes:
        fixed: which kind of scan the pass belongs to. name: "local", "anchor" or "dense".
        neighborhood: its kernel and dilation.
        choice: the automatic choice of a backend, what each would cost, and why the others lost.
        prices: of the device, by which everything here is chosen.
        num_pairs: (query, key) pairs of the pass. num_tokens: of the map.
        tiles: every choice of tiles, cheapest (the chosen one) first.
        key_list_cost: what compiled inference would cost with the keys of every query listed; None on a device where it
            does not list them. lists_keys: whether it does that instead of cutting tiles.
        orders: every candidate token order of the block mask, the chosen one first.
    """

    fixed: Fixed
    name: str
    neighborhood: Neighborhood
    choice: BackendChoice
    prices: DeviceCosts
    num_pairs: int
    num_tokens: int
    tiles: list[TileCost]
    key_list_cost: int | None
    lists_keys: bool
    orders: list[TokenOrder]

    @property
    def backend(self) -> str:
        """The name of the chosen backend."""
        return self.choice.name

    def __str__(self) -> str:
        kernel, dilation = self.neighborhood.kernel_size[0], self.neighborhood.dilation[0]
        density = 100 * self.num_pairs / self.num_tokens**2
        what = "dense pass" if self.name == "dense" else f'fixed="{self.fixed}", {self.name} pass'
        return "\n".join(
            [
                f"{what}: kernel {kernel}, dilation {dilation}; {self.num_pairs:,} pairs, {density:.1f} % of dense",
                f"  backend {self.backend}: {self.describe_cost(self.backend)}",
                *(f"    not {name}: {self.describe_loser(name)}" for name in self.choice.reasons),
                f"  tiles:  {self.describe_tiles()}",
                *([] if self.key_list_cost is None else [f"  listed: {self.describe_key_list()}"]),
                f"  blocks: {self.describe_orders()}",
            ]
        )

    def describe_cost(self, name: str) -> str:
        """What a backend does for the pass, and what that costs."""
        cost = self.choice.costs[name]
        return f"{cost.pairs:,} pairs done, cost {cost.total:,}"

    def describe_loser(self, name: str) -> str:
        """Why a backend was not chosen, with what it would have cost where it can run."""
        reason = self.choice.reasons[name]
        return f"{reason}; {self.describe_cost(name)}" if name in self.choice.costs else reason

    def describe_tiles(self) -> str:
        """The chosen tiles, and by how much the next ones lost."""
        best, *others = self.tiles
        lost = ", ".join(
            f"{format_tile(cost.tile)} (+{100 * (cost.total / best.total - 1):.0f} %)" for cost in others[:SHOWN_LOSERS]
        )
        calls = "1 call" if best.batches == 1 else f"{best.batches} calls"
        moved = f"{best.halo_tokens:,} keys gathered"
        if best.groups is not None:
            moved = "the map as it is" if best.groups.is_map else "whole dilation groups, nothing gathered"
        return f"{format_tile(best.tile)} in {calls}, {best.pairs:,} pairs with masked ones, {moved}" + (
            f"; lost on estimated cost: {lost}" if lost else ""
        )

    def describe_key_list(self) -> str:
        """Whether compiled inference lists keys, and by how much that lost or won."""
        assert self.key_list_cost is not None
        share = f"{100 * self.key_list_cost / self.tiles[0].total:.0f} % of the tiles' estimated cost"
        if self.lists_keys:
            return f"compiled inference lists the keys of every query instead, at {share}"
        return f"compiled inference keeps the tiles; a list of the keys of every query comes to {share}"

    def describe_orders(self) -> str:
        """The chosen token order and blocks, and by how much the next ones lost."""
        best, *others = self.orders
        total, cost = best.num_blocks**2, best.estimate_cost(self.prices).total
        lost = ", ".join(
            f"{format_tile(order.tile)} tiles in blocks of {order.block_size} "
            f"(+{100 * (order.estimate_cost(self.prices).total / cost - 1):.0f} %)"
            for order in others[:SHOWN_LOSERS]
        )
        return (
            f"{format_order(best, self.neighborhood)} touches {len(best.pairs)} of {total} blocks of {best.block_size} "
            f"({100 * len(best.pairs) / total:.1f} %), {int(best.full.sum())} of them full"
            + (f"; lost on estimated cost: {lost}" if lost else "")
        )


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What S3A does on a map. `str()` is the whole explanation as text.

    Attributes:
        height, width: the map, in tokens. device, dtype, size: as asked.
        source: where the costs come from. passes: every kind of scan in it, pass by pass.
    """

    height: int
    width: int
    device: torch.device
    dtype: torch.dtype
    size: int
    source: str
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
        lines.append(f"costs are in pairs of unmasked attention, for one head of one image: {self.source}")
        return "\n\n".join(["\n".join(lines), *map(str, self.passes)])


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
    operands, prices = Operands(device, dtype, head_dim, training), find_costs(device)
    passes = tuple(
        PassChoice(
            fixed=fixed,
            name=name,
            neighborhood=neighborhood,
            choice=explain_choice(neighborhood, height, width, operands),
            prices=prices,
            num_pairs=neighborhood.count_pairs(height, width),
            num_tokens=height * width,
            tiles=rank_tiles(neighborhood, height, width, prices),
            key_list_cost=estimate_key_list(neighborhood, height, width, prices),
            lists_keys=prefers_key_list(neighborhood, height, width, device),
            orders=rank_orders(neighborhood, height, width, prices, list_block_sizes(height * width)),
        )
        for fixed, name, neighborhood in list_passes(find_scan_pattern(scan), height, width, size)
    )
    return Explanation(
        height=height, width=width, device=device, dtype=dtype, size=size, source=prices.source, passes=passes
    )


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
