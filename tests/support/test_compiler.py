"""Compilation that fails says so: nothing runs uncompiled in silence."""

import ast
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
import torch._dynamo

import s3a
from s3a.support import compiler
from s3a.support.compiler import CompilationError, TooManyVariantsError, compile_copy, raise_compilation_errors


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


def test_past_the_limit_it_is_an_error_and_not_run_uncompiled(monkeypatch: pytest.MonkeyPatch):
    """A rank is compiled for anew each."""
    monkeypatch.setattr(compiler, "MOST_VARIANTS", 4)
    compiled = compile_copy(double, "double")
    with raise_compilation_errors(instead="do without"):
        for rank in range(1, 5):
            assert torch.equal(compiled(torch.ones(rank * [2])), torch.full(rank * [2], 2.0))
    with (
        pytest.raises(TooManyVariantsError, match=r"more kinds of input .*s3a\.clear_caches\(\) .*, or do without$"),
        raise_compilation_errors(instead="do without"),
    ):
        compiled(torch.ones(5 * [2]))


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


def find_private_names(path: Path) -> set[str]:
    """What a file names of PyTorch's private side: torch._dynamo, or a name with an underscore from a torch module."""
    tree = ast.parse(path.read_text())
    aliases, found = {}, set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "torch":
            names = {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
            aliases, found = aliases | names, found | set(names.values())
        elif isinstance(node, ast.Import):
            aliases |= {alias.asname: alias.name for alias in node.names if alias.asname}
            found |= {alias.name for alias in node.names}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            first, _, rest = ast.unparse(node).partition(".")
            found.add(f"{aliases.get(first, first)}.{rest}")
    parts = {name: name.split(".") for name in found if "(" not in name and "[" not in name}
    return {
        name
        for name, (first, *rest) in parts.items()
        if first == "torch" and any(part.startswith("_") and not part.endswith("__") for part in rest)
    }


def test_private_names_are_found_behind_other_names(tmp_path: Path):
    lines = (
        "import torch.distributed as dist",
        "from torch.nn import modules as parts",
        "dist._x()",
        "parts.batchnorm._y",
    )
    (tmp_path / "user.py").write_text("\n".join(lines))
    assert find_private_names(tmp_path / "user.py") == {"torch.distributed._x", "torch.nn.modules.batchnorm._y"}


def test_one_file_knows_the_private_side_of_torch():
    """So that a release of PyTorch that renames something breaks one file, whose tests say what."""
    root = Path(s3a.__file__).parent
    users = {path.relative_to(root).as_posix(): find_private_names(path) for path in root.rglob("*.py")}
    # documented in spite of their names, or imported where they are measured with and nowhere else
    allowed = {
        "export.py": {"torch._inductor"},
        "comparison/speed.py": {"torch.distributed._tools.mem_tracker.MemTracker"},
    }
    private = {
        path: {name for name in names if not any(name.startswith(prefix) for prefix in allowed.get(path, ()))}
        for path, names in users.items()
    }
    assert {path for path, names in private.items() if names} == {"support/compiler.py"}
    assert {"torch._dynamo", "torch.utils._python_dispatch._disable_current_modes"} <= private["support/compiler.py"]
