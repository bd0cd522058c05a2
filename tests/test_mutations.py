"""The list of mutations can be run: each still has its place and its test. `mutations.py` runs them."""

import ast
from functools import cache
from pathlib import Path

import mutations
import pytest
from mutations import BLIND, MUTATIONS, Mutation, Report, apply_mutations, judge, make_trial

ROOT = Path(__file__).resolve().parents[1]


@cache
def read_source(name: str) -> str:
    return (ROOT / name).read_text(encoding="utf-8")


@cache
def list_tests(name: str) -> dict[str, bool]:
    """The tests of a file by name, and whether each is a slow one."""
    functions = [node for node in ast.parse(read_source(name)).body if isinstance(node, ast.FunctionDef)]
    return {each.name: "pytest.mark.slow" in map(ast.unparse, each.decorator_list) for each in functions}


@pytest.mark.parametrize("file", sorted({mutation.file for mutation in MUTATIONS}))
def test_every_mutation_can_be_applied(file: str):
    """The text that it replaces stands there once, and what comes of it is Python."""
    source = read_source(file)
    for mutation in MUTATIONS:
        if mutation.file == file:
            assert source.count(mutation.old) == 1, f"{mutation}: {mutation.old!r} must stand there once"
            assert mutation.old != mutation.new
            ast.parse(source.replace(mutation.old, mutation.new), f"{file}, mutated: {mutation.breaks}")


@pytest.mark.parametrize("file", sorted({mutation.test.partition("::")[0] for mutation in MUTATIONS}))
def test_every_mutation_has_a_test_of_the_default_suite(file: str):
    for mutation in MUTATIONS:
        name, _, function = mutation.test.partition("[")[0].partition("::")
        if name == file:
            assert function in list_tests(file), f"{mutation}: there is no {mutation.test}"
            assert not list_tests(file)[function], f"{mutation}: {mutation.test} is slow"


def test_no_mutation_is_listed_twice():
    places = [(mutation.file, mutation.old, mutation.new) for mutation in MUTATIONS]
    assert len(set(places)) == len(places)
    described = [str(mutation) for mutation in MUTATIONS]
    assert len(set(described)) == len(described)


FAULT = Mutation("s3a/module.py", "a + b", "a - b", "sums are differences", "tests/test_module.py::test_sums")
OTHER = Mutation("s3a/module.py", "a * b", "a / b", "products are quotients", "tests/test_module.py::test_products[2]")


@pytest.mark.parametrize(
    ("status", "failed", "verdict"),
    [
        (0, (), "survived"),
        (1, ("tests/test_module.py::test_sums[1]", "tests/test_module.py::test_products[2]"), "killed"),
        (1, ("tests/test_module.py::test_sums", "tests/test_module.py::test_products[3]"), "survived"),
        (1, ("tests/test_module.py::test_sums",), "survived"),
        (2, (), "fault of the list"),  # it cannot be imported
        (4, (), "fault of the list"),  # there is no such test
        (5, (), "fault of the list"),  # it is deselected
        (None, (), "fault of the list"),  # it does not end
    ],
)
def test_mutations_are_killed_if_each_of_their_tests_fails(status: int | None, failed: tuple, verdict: str):
    assert judge(make_trial(FAULT, OTHER), Report(status=status, failed=failed)) == verdict


def test_mutations_are_applied_to_a_copy(tmp_path: Path):
    (tmp_path / "s3a").mkdir()
    (tmp_path / "s3a" / "module.py").write_text("total = a + b\nproduct = a * b\n")
    apply_mutations(tmp_path, [FAULT, OTHER])
    assert (tmp_path / "s3a" / "module.py").read_text() == "total = a - b\nproduct = a / b\n"
    with pytest.raises(ValueError, match="sums are differences: the old text stands there 0 times"):
        apply_mutations(tmp_path, [FAULT])


def test_mutations_are_selected_by_file_and_word():
    chosen = mutations.select([str(ROOT / "s3a" / "nn")], ["ROTAT"])
    assert {mutation.file for mutation in chosen} == {"s3a/nn/s3a.py", "s3a/nn/rotary.py"}
    assert mutations.select([], [""]) == MUTATIONS
    assert set(BLIND) <= set(MUTATIONS)
