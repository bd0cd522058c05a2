"""How this library compiles: code of its own for every kind of call, and no fallback that nobody hears of."""

from collections.abc import Callable
from functools import partial
from itertools import count
from types import FunctionType
from typing import Any

import torch
import torch._dynamo

NUMBERS = count()
# Past the limit dynamo itself runs eager and dense, and says little; and importing timm.optim raises the limit for all.
NO_SILENT_FALLBACK = partial(torch._dynamo.config.patch, recompile_limit=8, fail_on_recompile_limit_hit=True)


def compile_own(function: Callable[..., Any], name: str) -> Callable[..., Any]:
    """Compiles a copy of a function, as one graph, under a code object and a name of its own.

    Dynamo counts recompilations per code object and gives up after eight, and makes dynamic by name what it sees
    vary. With a copy for each kind of call, what varies under one is little and known.

    Args:
        function: one without a closure.
        name: for logs; a number is added.
    """
    name = f"{name}_{next(NUMBERS)}"
    return torch.compile(
        FunctionType(function.__code__.replace(co_name=name), function.__globals__, name), fullgraph=True
    )
