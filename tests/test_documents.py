"""The documents name what exists: every path, every module of the tree, the order of imports, the papers.

Their figures are those of committed results. `test_commands.py` tests their commands and their Python.
"""

import json
import math
import re
from pathlib import Path
from statistics import mean, stdev

import pytest
import yaml
from helpers.documents import GUIDES, PAGES, ROOT, list_blocks, read
from packaging.specifiers import SpecifierSet
from test_rooms import RANKS

from s3a.models import VVT, SSViT, SViT

DOCUMENTS = [*GUIDES, ROOT / "LOG.md", *sorted(ROOT.glob("docs/*/**/*.md"))]
PATH = re.compile(r"(?<![\w./-])((?:s3a|tests|tools|recipes|docs|\.ci)/[\w./*<-]*)(?:::(\w+))?")
PYPROJECT = read(ROOT / "pyproject.toml")


def find_section(document: str, heading: str) -> str:
    """The text between a heading of the second level and the next one."""
    _, _, rest = document.partition(f"\n## {heading}\n")
    return re.split(r"^## ", rest, maxsplit=1, flags=re.MULTILINE)[0]


def list_tables(text: str) -> list[list[list[str]]]:
    """The tables in Markdown, as rows of cells; the first row is the header."""
    found = re.findall(r"(?:^\|.*\n)+", text + "\n", flags=re.MULTILINE)
    lines = ([[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()] for table in found)
    return [[header, *rows] for header, _, *rows in lines]


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
# README.md and its pages
# --------------------------------------------------------------------------------------------------------


def test_the_readme_is_one_page():
    lines = read(ROOT / "README.md").splitlines()
    assert len(lines) <= 200
    assert "pip install -e . && accelerate launch recipes/train.py" in lines
    assert 'pip install -e ".[dev]" && python -m pytest' in lines


@pytest.mark.parametrize("page", PAGES)
def test_pages_say_what_they_are_for(page: str):
    """In the first line; they link back to the README, which links to them, and to each of their sections."""
    text = read(ROOT / "docs" / f"{page}.md")
    purpose, contents = text.split("\n\n")[1:3]
    assert purpose.startswith("For whoever ")
    assert "[README](../README.md)" in purpose
    assert re.findall(r"\[([^\]]+)\]\(#", contents) == re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert f"(docs/{page}.md)" in read(ROOT / "README.md")


# Section of docs/benchmarks.md: the columns of its table, each a file, the name of its rows, the figure, its digits.
FIGURES = {
    "The operator": [
        (f"operator{kind}_cpu", "candidate", "times_dense", ".1f") for kind in ("", "_compiled", "_backward")
    ],
    "Models": [
        (f"model{kind}_cpu", "model", figure, digits)
        for kind in ("", "_bf16", "_autocast")
        for figure, digits in (("images_per_second", ".1f"), ("times_peer", ".2f"))
    ],
    "Quantization": [
        ("quantize_int8_dynamic_cpu", "model", figure, ".2f")
        for figure in ("megabytes", "memory_megabytes", "compiled_ms", "eager_ms")
    ],
}


@pytest.mark.parametrize("heading", FIGURES)
def test_benchmarks_are_the_committed_results(heading: str):
    page = read(ROOT / "docs" / "benchmarks.md")
    ((_, *rows),) = list_tables(find_section(page, heading))
    for column, (file, key, figure, digits) in enumerate(FIGURES[heading], start=1):
        result = json.loads(read(ROOT / "docs" / "benchmarks" / f"{file}.json"))
        assert f"**{result['machine']['processor']}**" in page
        measured = {row[key]: row[figure] for row in result["rows"]}
        for name, *cells in rows:
            if " + " in name:  # passes one after the other: their times add up, so do the inverses of their speedups
                measured[name] = 1 / sum(1 / measured[part] for part in name.split(" + "))
            expected = format(measured[name.strip("`")], digits) if name.strip("`") in measured else ""
            assert cells[column - 1].partition(" ")[0] == expected, (heading, name, figure)


def test_loaders_are_the_committed_result():
    """The table, and what a node of eight GPUs needs by it: the formula of docs/training.md."""
    result = json.loads(read(ROOT / "docs" / "benchmarks" / "loader_cpu.json"))
    speeds = {(str(row["workers"]), row["product"], row["loader"]): row for row in result["rows"]}
    ((_, *rows),) = list_tables(find_section(read(ROOT / "docs" / "benchmarks.md"), "Loaders"))
    assert [(workers, product) for workers, product, *_ in rows] == [*dict.fromkeys(key[:2] for key in speeds)]
    for workers, product, ours, timms, ratio in rows:
        mine, peer = (speeds[workers, product, loader] for loader in ("s3a", "timm"))
        shown = f"{mine['per_worker']:.0f}", f"{peer['per_worker']:.0f}", f"{mine['times_timm']:.2f}"
        assert (ours, timms, ratio) == shown
    section = find_section(read(ROOT / "docs" / "training.md"), "Many GPUs")
    rate = round(speeds["2", "pixels", "s3a"]["per_worker"])
    assert f"{result['machine']['processor']} (Zen 5) decodes {rate} images/s" in " ".join(section.split())
    ((_, *rows),) = list_tables(section)
    for needed, workers, cores in rows:
        expected = math.ceil(1.25 * int(needed.replace(",", "")) / rate)
        assert (int(workers), int(cores)) == (expected, 8 * (expected + 1))


def test_growth_is_the_committed_results():
    """Three tables of one run and one of counts, whose last column follows from the first table."""
    folder, page = ROOT / "docs" / "benchmarks", read(ROOT / "docs" / "benchmarks.md")
    growth, crossing = (json.loads(read(folder / f"{name}.json")) for name in ("growth_cpu", "crossing"))
    assert f"**{growth['machine']['processor']}**" in page
    times, memory, pairs, crossings = list_tables(find_section(page, "What grows how"))
    measured = {(row["model"], f"{row['image_size']} px"): row for row in growth["rows"]}
    for table, show in (
        (times, lambda row: f"{row['median_ms']:,.0f} ({row['times_peer']:.2f})"),
        (memory, lambda row: f"{row['mib']:,.0f}"),
        (pairs, lambda row: f"{row['first_stage_pairs_per_token']:,.0f} / {row['pairs_per_token']:,.0f}"),
    ):
        (_, *sides), *lines = table
        shown = {(name.strip("`"), side): cell for name, *own in lines for side, cell in zip(sides, own, strict=True)}
        assert shown == {place: show(row) for place, row in measured.items()}
    for row, cells in zip(crossing["rows"], crossings[1:], strict=True):
        own, its = (
            {each["image_size"]: each["median_ms"] for each in growth["rows"] if each["model"] == row[kind]}
            for kind in ("model", "peer")
        )
        slower = [side for side in own if all(own[larger] > its[larger] for larger in own if larger >= side)]
        counts = [row[name] for name in ("first_stage_pairs_per_token", "pairs_per_token", "gmacs")]
        found = [*counts, min(slower, default=None)]
        names = [f"`{row[kind]}`" for kind in ("model", "peer")]
        assert cells == [*names, *("never" if side is None else f"{side} px" for side in found)]


def test_schemes_are_the_committed_results():
    """Each beside float32 of its own run; the row of float32 is that of the first."""
    page = read(ROOT / "docs" / "deployment.md")
    (_, *rows), *_ = list_tables(find_section(page, "Quantization"))
    shown = {name.strip("`"): cells for name, *cells in rows}
    for scheme in [name for name in shown if name != "float32"]:
        path = ROOT / "docs" / "benchmarks" / f"quantize_digits_{scheme.replace('-', '_')}_cpu.json"
        result = json.loads(read(path))
        assert result["machine"]["processor"] in page
        first = result["rows"][0]
        for row in result["rows"]:
            shares = [f"{100 * row[key]:.2f} %" for key in ("top1", "agreement")]
            sizes = [f"{row[key]:.2f}" for key in ("megabytes", "memory_megabytes")]
            times = [f"{row[key] / first[key]:.2f}" for key in ("compiled_ms", "eager_ms")]
            if row["model"] == scheme or scheme == "int8-dynamic":
                assert shown[row["model"]] == [*shares, *sizes, *times]


@pytest.mark.parametrize("folder", sorted(path.parent.name for path in ROOT.glob("docs/comparisons/*/results.md")))
def test_comparisons_are_the_committed_results(folder: str):
    """The columns that the page shows of results.md, whose tables are of the same rows."""
    page = read(ROOT / "docs" / "comparisons.md")
    (section,) = (text for text in re.split("\n##+ ", page) if f"docs/comparisons/{folder}\n" in text)
    measured: dict[tuple[str, str], str] = {}
    for header, *rows in list_tables(read(ROOT / "docs" / "comparisons" / folder / "results.md")):
        measured |= {(row[0], name): cell for row in rows for name, cell in zip(header, row, strict=True)}
    header, *rows = list_tables(section)[-1]
    shown = {(row[0], name): cell for row in rows for name, cell in zip(header, row, strict=True) if name != "model"}
    assert shown
    assert shown == {place: measured.get(place) for place in shown}


def test_results_on_corrupted_clothes_are_the_committed_ones():
    """The first two tables of results.md: top-1, and its difference from the first line."""
    committed = list_tables(read(ROOT / "docs" / "robustness" / "results.md"))
    shown = list_tables(find_section(read(ROOT / "docs" / "robustness.md"), "Results on corrupted clothes"))
    assert shown == committed[:2]


def test_results_on_scenes_are_the_committed_ones():
    """Mean and standard deviation over the seeds, in percent, after the last epoch."""
    columns = [("semantic_fpn", "miou"), ("semantic_fpn", "pixel_accuracy")]
    columns += [("mask_rcnn", name) for name in ("box_ap", "box_ap50", "mask_ap")]
    folder = ROOT / "docs" / "comparisons" / "scenes"
    ((_, *rows),) = list_tables(find_section(read(ROOT / "docs" / "dense.md"), "Results on scenes"))
    assert {name.strip("`") for name, *_ in rows} == {path.stem.split("_scenes_")[1][:-2] for path in folder.iterdir()}
    for name, *cells in rows:
        expected = []
        for recipe, score in columns:
            paths = [folder / f"{recipe}_scenes_{name.strip('`')}_{seed}.jsonl" for seed in range(3)]
            scores = [100 * json.loads(read(path).splitlines()[-1])[f"val_{score}"] for path in paths]
            expected.append(f"{mean(scores):.1f} ± {stdev(scores):.1f}")
        assert cells == expected


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
    (block,) = list_blocks(find_section(read(ROOT / "CONTRIBUTING.md"), "The tree"), "")
    named = list_tree(block)
    files = [path for folder in ("s3a", "recipes", "tools") for path in (ROOT / folder).rglob("*.py")]
    expected = {str(path.relative_to(ROOT)) for path in files if path.name != "__init__.py"}
    expected |= {f"{path.parent.relative_to(ROOT)}/" for path in files if path.name == "__init__.py"}
    assert len(named) == len(set(named))
    assert not (absent := [path for path in named if not (ROOT / path).exists()]), "\n".join(absent)
    assert not (unnamed := sorted(expected - set(named))), "\n".join(unnamed)


def test_the_order_of_imports_is_the_one_that_is_held():
    (block,) = list_blocks(find_section(read(ROOT / "CONTRIBUTING.md"), "The order of imports"), "")
    assert [tuple(line.split(", ")) for line in block.splitlines()] == list(RANKS)


# --------------------------------------------------------------------------------------------------------
# CITATION.cff and .pre-commit-config.yaml
# --------------------------------------------------------------------------------------------------------


def parse_bibtex(entry: str) -> dict[str, str]:
    """The fields of one entry, wrapped or not."""
    return {name: " ".join(value.split()) for name, value in re.findall(r"(\w+)\s*=\s*\{+(.*?)\}", entry, re.DOTALL)}


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


def test_the_readme_cites_as_the_citation_file():
    """The papers as the models cite them, which are those of the file, and the software."""
    (block,) = list_blocks(read(ROOT / "README.md"), "bibtex")
    *papers, software = map(parse_bibtex, re.findall(r"^@.*?(?=^@|\Z)", block, flags=re.MULTILINE | re.DOTALL))
    assert papers == [parse_bibtex(model.citation) for model in (SSViT, SViT, VVT)]
    citation = yaml.safe_load(read(ROOT / "CITATION.cff"))
    assert software == {
        "title": citation["title"],
        "author": citation["authors"][0]["name"],
        "version": citation["version"],
    }


def test_commits_are_linted_by_the_same_ruff_as_here():
    (repository,) = yaml.safe_load(read(ROOT / ".pre-commit-config.yaml"))["repos"]
    allowed = re.search(r'"ruff([^"]+)"', PYPROJECT)[1]
    assert repository["rev"].removeprefix("v") in SpecifierSet(allowed)
