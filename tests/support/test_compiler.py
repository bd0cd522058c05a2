"""Compilation that fails says so: nothing runs uncompiled in silence."""

from collections.abc import Iterator
from functools import partial

import pytest
import torch
import torch._dynamo

from s3a.support.compiler import CompilationError, compile_copy, raise_compilation_errors


@pytest.fixture(autouse=True)
def no_code_generation(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Dynamo alone, as in a fresh process, with its limit raised as importing timm.optim does."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    torch._dynamo.reset()
    with torch._dynamo.config.patch(recompile_limit=1_000_000, fail_on_recompile_limit_hit=False):
        yield
    torch._dynamo.reset()


def double(x: torch.Tensor) -> torch.Tensor:
    return 2 * x


def break_graph(x: torch.Tensor) -> torch.Tensor:
    torch._dynamo.graph_break()
    return 2 * x


@pytest.mark.parametrize("is_one_graph", [True, False])
def test_the_ninth_shape_is_an_error_and_not_run_uncompiled(is_one_graph: bool):
    """A rank is compiled for anew each; eight are the limit."""
    compiled = compile_copy(double, "double") if is_one_graph else torch.compile(double)
    with raise_compilation_errors(instead="do without"):
        for rank in range(1, 9):
            assert torch.equal(compiled(torch.ones(rank * [2])), torch.full(rank * [2], 2.0))
    with (
        pytest.raises(CompilationError, match=r"more than 8 kinds of input; s3a\.clear_caches\(\) .*; or do without$"),
        raise_compilation_errors(instead="do without"),
    ):
        compiled(torch.ones(9 * [2]))


def test_a_copy_is_one_graph_or_an_error():
    with (
        pytest.raises(CompilationError, match=r"torch\.compile failed here: .*graph.*; or do without$"),
        raise_compilation_errors(instead="do without"),
    ):
        compile_copy(break_graph, "break_graph")(torch.ones(2))


def test_other_errors_are_left_alone():
    with pytest.raises(RuntimeError, match="of the caller") as raised, raise_compilation_errors(instead="do without"):
        raise RuntimeError("of the caller")
    assert type(raised.value) is RuntimeError
