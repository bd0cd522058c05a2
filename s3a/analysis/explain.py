"""Why a map is attended the way it is: backend, token order and tiles of every pass, and what lost."""

from dataclasses import dataclass

import torch

from s3a.attention.backends.blocks import BLOCK_SIZE, BlockLayout, layouts
from s3a.attention.backends.tiles import TileCost, listed_cost, prefers_list, tile_costs
from s3a.attention.functional import choose_backend, objection_to_flex
from s3a.attention.plan import Backend
from s3a.geometry import Fixed, Neighborhood, ScanRule, scan_passes, scan_rule

SHOWN_LOSERS = 2


@dataclass(frozen=True, kw_only=True)
class PassChoice:
    """How one pass is run, and what else it could have been.

    Attributes:
        fixed: which kind of scan the pass belongs to. name: "local", "anchor" or "dense".
        neighborhood: its kernel and dilation.
        num_pairs: (query, key) pairs of the pass. num_tokens: of the map.
        tiles: every choice of tiles, cheapest (the chosen one) first.
        listed: what compiled inference on a CPU would cost with the keys of every query listed, in the unit of
            `TileCost.total`. lists: whether it does that instead of cutting tiles.
        orders: every candidate token order of the block mask, the chosen one first.
    """

    fixed: Fixed
    name: str
    neighborhood: Neighborhood
    num_pairs: int
    num_tokens: int
    tiles: list[TileCost]
    listed: int
    lists: bool
    orders: list[BlockLayout]

    def __str__(self) -> str:
        kernel, dilation = self.neighborhood.kernel_size[0], self.neighborhood.dilation[0]
        density = 100 * self.num_pairs / self.num_tokens**2
        what = "dense pass" if self.name == "dense" else f'fixed="{self.fixed}", {self.name} pass'
        return "\n".join(
            [
                f"{what}: kernel {kernel}, dilation {dilation}; {self.num_pairs:,} pairs, {density:.1f} % of dense",
                f"  tiles:  {self.describe_tiles()}",
                f"  listed: {self.describe_list()}",
                f"  blocks: {self.describe_orders()}",
            ]
        )

    def describe_tiles(self) -> str:
        """The chosen tiles, and by how much the next ones lost."""
        best, *others = self.tiles
        lost = ", ".join(
            f"{named(cost.tile)} (+{100 * (cost.total / best.total - 1):.0f} %)" for cost in others[:SHOWN_LOSERS]
        )
        return (
            f"{named(best.tile)} in {best.batches} {plural(best.batches, 'call')}, {best.pairs:,} pairs with masked "
            f"ones, {best.halo_tokens:,} keys gathered" + (f"; lost on estimated cost: {lost}" if lost else "")
        )

    def describe_list(self) -> str:
        """Whether compiled inference lists keys, and by how much it lost or won."""
        share = f"{100 * self.listed / self.tiles[0].total:.0f} % of the tiles' estimated cost"
        if self.lists:
            return f"compiled inference lists the keys of every query instead, at {share}"
        return f"compiled inference keeps the tiles; a list of the keys of every query comes to {share}"

    def describe_orders(self) -> str:
        """The chosen token order, and how many blocks the others touch."""
        best, *others = self.orders
        total = (-(-self.num_tokens // BLOCK_SIZE)) ** 2
        lost = ", ".join(f"{named(layout.tile)} tiles ({len(layout.pairs)})" for layout in others[:SHOWN_LOSERS])
        return (
            f"{named_order(best, self.neighborhood)} touches {len(best.pairs)} of {total} blocks of {BLOCK_SIZE} "
            f"({100 * len(best.pairs) / total:.1f} %), {int(best.full.sum())} of them full"
            + (f"; lost on blocks: {lost}" if lost else "")
        )


@dataclass(frozen=True, kw_only=True)
class Explanation:
    """What S3A does on a map. `str()` gives the whole story.

    Attributes:
        height, width: the map, in tokens. device, dtype, size: as asked.
        backend: the automatic choice. reasons: why each of the others lost.
        passes: every kind of scan in it, pass by pass.
    """

    height: int
    width: int
    device: torch.device
    dtype: torch.dtype
    size: int
    backend: Backend
    reasons: dict[Backend, str]
    passes: tuple[PassChoice, ...]

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        lines = [f"{self.height} x {self.width} tokens on {self.device}, {dtype}, size {self.size}"]
        lines += [f"backend {self.backend}", *(f"  not {name}: {reason}" for name, reason in self.reasons.items()), ""]
        return "\n".join([*lines, "\n\n".join(str(choice) for choice in self.passes)])


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
        scan: which of them a network runs, a key of `geometry.SCANS`.

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
    asked = (device, dtype, head_dim, training, height * width)
    backend = choose_backend(None, *asked)
    reasons: dict[Backend, str] = {"reference": "it is the oracle; its memory grows with pairs times head dim"}
    if backend == "flex":
        reasons["tiled"] = "on CUDA the block mask runs in one kernel"
    else:
        reasons["flex"] = str(objection_to_flex(*asked))
    passes = [
        PassChoice(
            fixed=fixed,
            name=name,
            neighborhood=neighborhood,
            num_pairs=neighborhood.count_pairs(height, width),
            num_tokens=height * width,
            tiles=tile_costs(neighborhood, height, width),
            listed=listed_cost(neighborhood, height, width),
            lists=prefers_list(neighborhood, height, width, device),
            orders=layouts(neighborhood, height, width),
        )
        for fixed, name, neighborhood in named_passes(scan_rule(scan), height, width, size)
    ]
    return Explanation(
        height=height,
        width=width,
        device=device,
        dtype=dtype,
        size=size,
        backend=backend,
        reasons=reasons,
        passes=tuple(passes),
    )


def named_passes(rule: ScanRule, height: int, width: int, size: int) -> list[tuple[Fixed, str, Neighborhood]]:
    """Every pass that a network's blocks run on a map: its kind of scan, its name, its neighborhood."""
    names = ("local", "dense" if rule.passes == "dense" else "anchor")
    return [
        (fixed, name, neighborhood)
        for fixed in rule.fixed
        for name, neighborhood in zip(names, scan_passes(height, width, size, fixed, rule.passes), strict=True)
        if neighborhood is not None
    ]


def named(tile: tuple[int, int]) -> str:
    """A tile for a person."""
    return f"{tile[0]} x {tile[1]}"


def plural(count: int, word: str) -> str:
    """The word for so many."""
    return word if count == 1 else f"{word}s"


def named_order(layout: BlockLayout, neighborhood: Neighborhood) -> str:
    """A token order for a person."""
    grouped = "" if neighborhood.dilation == (1, 1) else "dilation group by group, "
    rows = int(layout.rows.max()) + 1
    whole = layout.tile[0] * min(neighborhood.dilation[0], rows) >= rows
    return grouped + ("row by row" if whole else f"tile by tile ({named(layout.tile)})")
