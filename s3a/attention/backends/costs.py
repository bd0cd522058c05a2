"""What the work of a pass costs on a class of device, by which backends, tiles and block sizes are chosen.

One unit is one (query, key) pair without a mask in the fused attention over tiles, for one head of one image. The
prices are of heads of 32 channels; batch size, dtype and head dim are not looked at.
"""

from dataclasses import dataclass, replace

import torch


@dataclass(frozen=True, kw_only=True)
class PassCost:
    """What a backend does to execute one pass, for one head of one image.

    Attributes:
        pairs: (query, key) products, masked ones included.
        total: all of it, in the unit of this file.
    """

    pairs: int
    total: int


@dataclass(frozen=True, kw_only=True)
class DeviceCosts:
    """The prices of a class of device, in the unit of this file.

    Attributes:
        source: where they come from, for `s3a.explain`.
        candidates: the backends that are chosen from where none is named.
        granule: tokens to which the attention kernel rounds up the queries and the keys of a tile.
        masked_pair: a pair of a tile with a mask.
        gather: a token of a halo, its key and value gathered; with a share of the queries and results.
        copy: a token of tiles that are whole dilation groups, which are copied in order, or read where they are.
        moves: moving tokens to tiles or blocks and back, whatever their number.
        call: one call of the attention kernel.
        listed_pair: a pair of compiled inference that lists the keys of every query; None where it does not.
        block_pair: a pair of a touched block of that many tokens; of fewer, as of the fewest.
        partial_block: the factor of a block in which the mask decides pair by pair.
        reorder: a token of flex's sequence, its query, key, value and result moved.
    """

    source: str
    candidates: tuple[str, ...]
    granule: int
    masked_pair: float
    gather: float
    copy: float
    moves: float
    call: float
    listed_pair: float | None
    block_pair: dict[int, float]
    partial_block: float
    reorder: float


# Measured on two cores of an AMD EPYC (LOG.md). What is not told apart there has the price of its neighbour: masks cost
# nothing beside their pairs, and copying a group as much as gathering it. Flex is no candidate: a pair of its blocks
# costs more, it touches more of them, and it compiles for seconds at the first call for every map.
CPU = DeviceCosts(
    source="measured on two cores of an AMD EPYC (Zen 5)",
    candidates=("tiled",),
    granule=1,
    masked_pair=1,
    gather=60,
    copy=60,
    moves=0,
    call=4_000,
    listed_pair=4.5,
    block_pair={64: 1.5, 128: 1.5},
    partial_block=1,
    reorder=60,
)

# Estimated, never measured. Assumed are an H100, bfloat16, and 256 heads of images in a call. There a pair takes about
# a picosecond: fused attention on heads of 32 reaches some 130 of its 990 TFLOP/s, since exponentials bound it.
CUDA = DeviceCosts(
    source="estimated, not measured on a GPU",
    candidates=("tiled", "flex"),
    # The memory-efficient kernel works on tiles of 64 x 64, the flash kernels on up to 128 x 128.
    granule=64,
    # A mask rules the flash kernels out; the memory-efficient one has about half their speed, and reads the mask.
    masked_pair=2,
    # A vector of 32 channels in bfloat16 is 64 bytes, read and written: at 3 TB/s, 42 picoseconds. A token of a halo is
    # a key, a value and, about, a query and a result: four. The gradients of keys and values are added atomically, at
    # several times that, but beside a backward whose pairs cost 2.5 times those of the forward.
    gather=170,
    # Four vectors too, but in order, so that a compiler writes them where it computes them: half.
    copy=80,
    # A kernel of next to no work takes 5 microseconds: 20,000 picoseconds for each of the 256. Moving queries, keys,
    # values and results there and back takes four; a call two, with its mask and the joining of its result.
    moves=80_000,
    call=40_000,
    # Measured on CPUs alone.
    listed_pair=None,
    # Blocks of 64 use what they load for half as many products.
    block_pair={64: 1.25, 128: 1.0},
    # Four comparisons a pair, of places that are loaded once for a row or a column of the block.
    partial_block=1.25,
    # Four vectors, as in `gather`, by a permutation whose gradient is a permutation.
    reorder=170,
)

COSTS = {"cpu": CPU, "cuda": CUDA}


def find_costs(device: torch.device) -> DeviceCosts:
    """The prices of a device; those of a CPU for one that is not in the table."""
    return COSTS.get(device.type) or replace(CPU, listed_pair=None, source=f"those of a CPU, {CPU.source}")
