"""How the commands start: without libraries that only their work needs, and without a traceback at Ctrl-C."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
COMMANDS = sorted(path for folder in ("recipes", "tools") for path in (ROOT / folder).glob("[!_]*.py"))
# Each takes a tenth or more of the time of `import timm`.
LATE = ("datasets", "pandas", "pyarrow", "scipy", "sklearn", "torchao", "transformers")
HELP = """
import runpy, sys
for path in sys.argv[1:]:
    known = set(sys.modules)
    sys.path.insert(0, path.rpartition("/")[0])
    sys.argv = [path, "--help"]
    try:
        runpy.run_path(path, run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, path
    for name in sorted(set(sys.modules) - known):
        print("imported", path, name)
"""


def run_python(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process of its own, where `s3a` is this checkout's."""
    return subprocess.run(
        [sys.executable, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(ROOT), **environment},
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


def test_help_imports_no_slow_library():
    finished = run_python("-c", HELP, *COMMANDS)
    assert finished.returncode == 0, finished.stderr
    imported = [line.split()[1:] for line in finished.stdout.splitlines() if line.startswith("imported")]
    assert any(name == "s3a" for _, name in imported)
    assert [(path, name) for path, name in imported if name in LATE] == []


@pytest.mark.parametrize("path", COMMANDS, ids=lambda path: path.stem)
def test_control_c_during_imports_shows_no_traceback(path, tmp_path):
    (tmp_path / "torch.py").write_text("import os, signal; os.kill(os.getpid(), signal.SIGINT)", encoding="utf-8")
    finished = run_python(path, "--help", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    status = 75 if path.stem in ("train", "segment", "detect") else -signal.SIGINT
    assert (finished.returncode, finished.stderr) == (status, "")


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGINT])
def test_a_signal_before_a_run_begins_says_run_me_again(number, tmp_path):
    """Also while the main thread waits in a library, where no handler of Python's runs."""
    wait = f"import ctypes, os; os.kill(os.getpid(), {int(number)}); ctypes.CDLL(None).sleep(20)"
    (tmp_path / "torch.py").write_text(wait, encoding="utf-8")
    finished = run_python(ROOT / "recipes" / "train.py", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert (finished.returncode, finished.stdout, finished.stderr) == (75, "", "")
