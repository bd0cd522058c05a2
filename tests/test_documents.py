"""The documents name what exists: every path, every module of the tree, the order of imports, the papers."""

import re
from functools import cache
from pathlib import Path

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from test_rooms import RANKS

from s3a.models import VVT, SSViT, SViT

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / name for name in ("README.md", "CONTRIBUTING.md", "LOG.md")] + sorted(ROOT.glob("docs/**/*.md"))
PATH = re.compile(r"(?<![\w./-])((?:s3a|tests|tools|recipes|docs|\.ci)/[\w./*<-]*)(?:::(\w+))?")
PYPROJECT = (ROOT / "pyproject.toml").read_text(encoding="utf-8")


@cache
def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def find_blocks(document: str, heading: str) -> list[str]:
    """The contents of the code blocks of a section."""
    _, _, rest = document.partition(f"\n## {heading}\n")
    section = re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0]
    return re.findall(r"^```\w*\n(.*?)^```", section, flags=re.MULTILINE | re.DOTALL)


def list_anchors(document: str) -> set[str]:
    """What a link to a heading may be, by GitHub's rule."""
    prose = re.sub(r"^```.*?^```", "", document, flags=re.MULTILINE | re.DOTALL)
    headings = re.findall(r"^#+ (.+)$", prose, flags=re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


# --------------------------------------------------------------------------------------------------------
# Paths and links
# --------------------------------------------------------------------------------------------------------


def find_absent(document: str) -> list[str]:
    """The paths of this repository that a document names and that do not exist; so too for `FILE::TEST`.

    `tests/<room>/test_<file>.py` stands for many: the folder in front of `<` must exist. `*` matches as in a shell.
    """
    absent = []
    for path, test in PATH.findall(document):
        named = path.rstrip(".")
        if "<" in named:
            named = named.partition("<")[0].rpartition("/")[0]
        found = list(ROOT.glob(named))
        if not found or (test and f"def {test}(" not in read(found[0])):
            absent.append(path + (f"::{test}" if test else ""))
    return absent


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_named_paths_exist(document: Path):
    assert not (absent := find_absent(read(document))), "\n".join(absent)


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path):
    for target in re.findall(r"\]\(([^)\s]+)\)", read(document)):
        path, _, anchor = target.partition("#")
        if not path.startswith(("http://", "https://")):
            linked = document.parent / path if path else document
            assert linked.exists(), target
            assert not anchor or anchor in list_anchors(read(linked)), target


@pytest.mark.parametrize(
    ("text", "absent"),
    [
        ("the layers (`s3a/layers.py`).", ["s3a/layers.py"]),
        ("`s3a/geometry.py`, s3a/nn/ and docs/benchmarks.", []),
        ("python tools/costs.py ssvit_tiny", ["tools/costs.py"]),
        ("s3a/models/<family>.py and tests/<room>/test_<file>.py", []),
        ("s3a/rooms/<family>.py", ["s3a/rooms/<family"]),
        ("docs/benchmarks/*.json, docs/*.toml", ["docs/*.toml"]),
        ("tests/test_geometry.py::test_count_pairs", []),
        ("tests/test_geometry.py::test_count", ["tests/test_geometry.py::test_count"]),
        ("/data/docs/nothing https://example.org/s3a/nothing", []),
    ],
)
def test_absent_paths_are_found(text: str, absent: list[str]):
    assert find_absent(text) == absent


# --------------------------------------------------------------------------------------------------------
# CONTRIBUTING.md
# --------------------------------------------------------------------------------------------------------


def list_tree(block: str) -> list[str]:
    """The paths of a tree that is drawn by indentation: a name, spaces, and what it is."""
    paths, folders = [], []
    for line in filter(str.strip, block.splitlines()):
        name = line.split()[0]
        depth = (len(line) - len(line.lstrip())) // 2
        paths.append("".join([*folders[:depth], name]))
        folders[depth:] = [name]
    return paths


def test_the_tree_names_every_module_once():
    """All Python files of the library and of the commands; an `__init__.py` is its folder's line."""
    (block,) = find_blocks(read(ROOT / "CONTRIBUTING.md"), "The tree")
    named = list_tree(block)
    files = [path for folder in ("s3a", "recipes", "tools") for path in (ROOT / folder).rglob("*.py")]
    expected = {str(path.relative_to(ROOT)) for path in files if path.name != "__init__.py"}
    expected |= {f"{path.parent.relative_to(ROOT)}/" for path in files if path.name == "__init__.py"}
    assert len(named) == len(set(named))
    assert not (absent := [path for path in named if not (ROOT / path).exists()]), "\n".join(absent)
    assert not (unnamed := sorted(expected - set(named))), "\n".join(unnamed)


def test_the_order_of_imports_is_the_one_that_is_held():
    (block,) = find_blocks(read(ROOT / "CONTRIBUTING.md"), "The order of imports")
    assert [tuple(line.split(", ")) for line in block.splitlines()] == list(RANKS)


# --------------------------------------------------------------------------------------------------------
# CITATION.cff and .pre-commit-config.yaml
# --------------------------------------------------------------------------------------------------------


def parse_bibtex(entry: str) -> dict[str, str]:
    """The fields of one entry, each on a line of its own or wrapped."""
    return {name: " ".join(value.split()) for name, value in re.findall(r"(\w+)\s*=\s*\{(.*?)\}", entry, re.DOTALL)}


def test_the_citation_is_of_this_version():
    citation = yaml.safe_load(read(ROOT / "CITATION.cff"))
    for field in ("version", "license"):
        assert re.search(rf'^{field} = "(.+)"$', PYPROJECT, re.MULTILINE)[1] == citation[field]
    assert re.search(r"^keywords = (.+)$", PYPROJECT, re.MULTILINE)[1] == str(citation["keywords"]).replace("'", '"')


def test_the_citation_has_the_papers_of_the_models():
    references = yaml.safe_load(read(ROOT / "CITATION.cff"))["references"]
    for model, reference in zip((SSViT, SViT, VVT), references, strict=True):
        paper = parse_bibtex(model.citation)
        authors = [f"{author['family-names']}, {author['given-names']}" for author in reference["authors"]]
        assert " and ".join(authors) == paper["author"]
        assert str(reference["year"]) == paper["year"]
        assert {field: reference[field] for field in ("title", "journal", "url")} == {
            field: paper[field] for field in ("title", "journal", "url")
        }
        assert reference["doi"] == f"10.48550/arXiv.{paper['url'].rpartition('/')[2]}"


def test_commits_are_linted_by_the_same_ruff_as_here():
    (repository,) = yaml.safe_load(read(ROOT / ".pre-commit-config.yaml"))["repos"]
    allowed = re.search(r'"ruff([^"]+)"', PYPROJECT)[1]
    assert repository["rev"].removeprefix("v") in SpecifierSet(allowed)
