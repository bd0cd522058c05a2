"""Bounded caches of plans and compiled code, which `clear_caches` empties together."""

from collections.abc import Callable
from functools import _lru_cache_wrapper, lru_cache
from typing import Any, TypeVar

ResultT = TypeVar("ResultT")
CACHES: list["_lru_cache_wrapper[Any]"] = []


def cache_results(maxsize: int) -> Callable[[Callable[..., ResultT]], "_lru_cache_wrapper[ResultT]"]:
    """`functools.lru_cache`, emptied by `clear_caches` too.

    Args:
        maxsize: results that are kept; the least recently used one goes first.
    """

    def decorate(function: Callable[..., ResultT]) -> "_lru_cache_wrapper[ResultT]":
        cached = lru_cache(maxsize=maxsize)(function)
        CACHES.append(cached)
        return cached

    return decorate


def clear_caches() -> None:
    """Forgets every plan and all compiled code of this library in this process; both are made again when needed.

    Their tensors are freed, those on a GPU too, as soon as no model or graph of the caller holds them.
    """
    for cached in CACHES:
        cached.cache_clear()
