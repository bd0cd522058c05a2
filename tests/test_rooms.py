"""The rooms of the library: every import runs downwards, and importing a module changes nothing else."""

import ast
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

import s3a

ROOT = Path(s3a.__file__).parent
# From the ground up. A room imports from those below it; the rooms of one line are siblings, which do not.
RANKS = (
    ("support",),
    ("geometry", "published"),
    ("attention", "data"),
    ("quantization",),
    ("nn",),
    ("analysis",),
    ("weights",),
    ("models",),
    ("export", "training"),
    ("comparison",),
    ("robustness",),
)
RANK = {room: rank for rank, rooms in enumerate(RANKS) for room in rooms}


def list_modules() -> dict[str, Path]:
    """Every module of the library, by its dotted name."""
    modules = {}
    for path in ROOT.rglob("*.py"):
        parts = path.relative_to(ROOT.parent).with_suffix("").parts
        modules[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return modules


def list_imports(path: Path, modules: set[str]) -> set[str]:
    """The modules of the library that a file imports anywhere, inside functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "s3a"}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} imports by a relative path"
            if node.module is not None and node.module.split(".")[0] == "s3a":
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                found |= {name if name in modules else node.module for name in inner}
    return found


def room_of(module: str) -> str:
    """The first part below s3a: a folder, or a module of the root."""
    return module.split(".")[1]


def is_below(module: str, other: str) -> bool:
    """Whether the first module's room is below the second's; a room without a rank is above all."""
    return RANK.get(room_of(module), len(RANKS)) < RANK.get(room_of(other), len(RANKS) + 1)


def find_faults(modules: dict[str, Path]) -> list[str]:
    """What is wrong with the imports, a line each."""
    imports = {name: list_imports(path, set(modules)) for name, path in modules.items()}
    faults = [f"{name} has no rank" for name in modules if name != "s3a" and room_of(name) not in RANK]
    for name, others in imports.items():
        for other in others - {name}:
            if other == "s3a":
                faults.append(f"{name} imports s3a itself")
            elif name != "s3a" and room_of(name) != room_of(other) and not is_below(other, name):
                faults.append(f"{name} imports {other}, which is not below it")
    return faults + [" -> ".join(circle) for circle in find_circles(imports)]


def find_circles(imports: dict[str, set[str]]) -> list[list[str]]:
    """The circles of imports that a depth-first walk meets."""
    circles, done = [], set()

    def visit(name: str, way: list[str]) -> None:
        if name in way:
            circles.append([*way[way.index(name) :], name])
        elif name not in done:
            for other in sorted(imports.get(name, set()) - {name}):
                visit(other, [*way, name])
            done.add(name)

    for name in sorted(imports):
        visit(name, [])
    return circles


def list_outside_imports(modules: dict[str, Path]) -> list[str]:
    """The modules of other libraries that the modules import when they are loaded, so not inside functions."""
    found = set()
    nodes: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8")) for path in modules.values()]
    while nodes:
        node = nodes.pop()
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None:
            found.add(node.module)
        elif not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            nodes += ast.iter_child_nodes(node)
    return sorted(name for name in found if name.split(".")[0] != "s3a")


def test_imports_run_one_way():
    assert find_faults(list_modules()) == []


def test_few_modules_in_the_root():
    assert len(list(ROOT.glob("*.py"))) - 1 <= 3


@pytest.mark.parametrize(
    ("name", "line", "fault"),
    [
        ("s3a.support.errors", "from s3a.geometry import sparse_scan", "which is not below it"),
        ("s3a.data.decode", "import s3a.attention.plan", "which is not below it"),
        ("s3a.export", "def f():\n    from s3a.training import build", "which is not below it"),
        ("s3a.geometry", "from s3a import S3A", "imports s3a itself"),
        ("s3a.models.backbone", "from s3a.models import ssvit", "s3a.models.backbone -> s3a.models.ssvit"),
        ("s3a.attic", "import math", "has no rank"),
    ],
)
def test_faults_are_found(name, line, fault, tmp_path):
    modules = list_modules()
    changed = tmp_path / "changed.py"
    old = modules[name].read_text(encoding="utf-8") if name in modules else ""
    changed.write_text(f"{old}\n{line}\n", encoding="utf-8")
    faults = find_faults({**modules, name: changed})
    assert any(fault in each for each in faults), faults


CARELESS = {
    "import os; os.environ['OMP_WAIT_POLICY'] = 'passive'": "os.environ[OMP_WAIT_POLICY]",
    "import matplotlib; matplotlib.use('agg')": "matplotlib.rcParams[backend]",
    "import warnings; warnings.filterwarnings('ignore', 'all is well')": "all is well",
    "import logging; logging.getLogger('torch').setLevel('ERROR')": "the logger 'torch'",
    "import signal; signal.signal(signal.SIGUSR1, print)": "the handler of SIGUSR1",
    "import torch; torch.set_num_threads(torch.get_num_threads() + 1)": "torch.get_num_threads",
    "torch._dynamo.config.recompile_limit = 3": "torch._dynamo.config.recompile_limit",
    "torch.manual_seed(1)": "the state of torch's generator",
    "torch.nn.functional.relu = print": "torch.nn.functional.relu was replaced",
    "from timm.data import auto_augment; auto_augment.NAME_TO_OP['Rotate'] = print": "NAME_TO_OP[Rotate]",
}
"""Lines of a module, each with what it changes for all others."""


@pytest.fixture(scope="module")
def global_changes(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], list[str]]:
    """What importing all modules changes in a fresh process that has what they import, and then a careless module."""
    folder, modules = tmp_path_factory.mktemp("modules"), list_modules()
    (folder / "careless.py").write_text("\n".join(CARELESS), encoding="utf-8")
    environment = {
        "PATH": os.environ["PATH"],
        "HOME": str(folder),
        "PYTHONPATH": os.pathsep.join(map(str, (ROOT.parent, Path(__file__).parent, folder))),
        "MPLBACKEND": "svg",  # any but "agg", which matplotlib chooses by itself where there is no display
    }
    finished = subprocess.run(
        [sys.executable, "-m", "helpers.global_state"],
        input=json.dumps({"first": list_outside_imports(modules), "then": [sorted(modules), ["careless"]]}),
        env=environment,
        capture_output=True,
        check=False,
        text=True,
        timeout=300,
    )
    assert finished.returncode == 0, finished.stderr
    library, careless = json.loads(finished.stdout)
    return library, careless


@pytest.mark.slow
def test_importing_changes_nothing_global(global_changes):
    """timm's registry of models excepted, which nothing here looks at: that change is what the package is for."""
    library, _ = global_changes
    assert not library, "\n".join(library)


@pytest.mark.slow
def test_global_changes_are_found(global_changes):
    _, careless = global_changes
    for fault in CARELESS.values():
        assert any(fault in change for change in careless), fault


@pytest.mark.parametrize("room", sorted(path.parent for path in ROOT.rglob("__init__.py")), ids=lambda room: room.name)
def test_a_room_only_reexports(room):
    """An `__init__.py` is a docstring, imports of the library, and the names of `__all__`."""
    tree = ast.parse((room / "__init__.py").read_text(encoding="utf-8"))
    assert ast.get_docstring(tree)
    imported, exported = [], []
    for node in tree.body[1:]:
        if isinstance(node, ast.Assign):
            assert [target.id for target in node.targets if isinstance(target, ast.Name)] == ["__all__"]
            exported = ast.literal_eval(node.value)
        else:
            assert isinstance(node, ast.ImportFrom), ast.unparse(node)
            assert node.module.split(".")[0] == "s3a", ast.unparse(node)
            imported += [alias.asname or alias.name for alias in node.names]
    assert sorted(imported) == sorted(exported)
