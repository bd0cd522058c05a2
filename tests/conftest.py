"""What every test starts from, and what several need."""

import os
import signal
import tempfile
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from helpers.command_line import Command, make_command
from helpers.hub_server import HUB, Hub

os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # as the commands do; read when torch loads

# Read when huggingface_hub loads: the Hub of all tests, and of the processes they start, is one on loopback.
home = tempfile.TemporaryDirectory(prefix="s3a-tests-")
os.environ |= {"HF_ENDPOINT": HUB.url, "HF_HOME": home.name, "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
os.environ |= {"NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_HUB_CACHE", "HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"):
    os.environ.pop(name, None)

import pytest
import torch
import torch._dynamo
from filelock import FileLock
from helpers.real_runs import run_command

from s3a.attention.backends import flex

# Tensors are small here: a second thread gains little, and where other work runs it waits for its turn at every
# operation, up to a hundred times longer than the operation takes.
torch.set_num_threads(1)

# A shell starts what it runs in the background with Ctrl-C ignored, and all its children inherit that.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


MOST_WORKERS = 8  # each takes one to two GB of memory


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """As many processes as cores for the whole suite; this process alone for files or tests that are named."""
    if config.args_source is not pytest.Config.ArgsSource.TESTPATHS:
        return 0
    return min(len(os.sched_getaffinity(0)), MOST_WORKERS)


LONGEST_FILES = ("test_trainer.py", "test_compilation.py", "test_dense_runs.py", "test_functional.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Puts the tests of the longest files first, so that no process begins one of them when the others are done."""
    items.sort(key=lambda item: item.path.name not in LONGEST_FILES)


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """The same random numbers at every run, whatever ran before."""
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def same_signals() -> Iterator[None]:
    """Signals do to this process what they did before, also where a command ran in it."""
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT)}
    yield
    signal.set_wakeup_fd(-1)
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture(scope="session")
def trained_digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README's first command leaves. It runs once for all workers, so tests that change it take a copy."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent
    folder = shared / "digits"
    with FileLock(shared / "digits.lock"):
        if not (folder / "model").is_dir():
            ended = run_command(["accelerate", "launch", "recipes/train.py", "--output-dir", str(folder)])
            assert ended.returncode == 0, ended.stderr
    return folder


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Hub:
    """The Hub on loopback without repositories, and its clients with an empty cache."""
    HUB.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub-cache"))
    return HUB


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Command:
    """Runs a tool; see `command_line.make_command`."""
    return make_command(monkeypatch, capsys)


@pytest.fixture
def graphs(monkeypatch: pytest.MonkeyPatch) -> Iterator[Counter]:
    """Counts compiled graphs and their runs; dynamo works as ever, but code generation is left out.

    Its limit is torch's own: importing timm.optim raises it to a million for the whole process.
    """
    counts = Counter()

    def backend(graph: torch.fx.GraphModule, _) -> object:
        counts["compiled"] += 1

        def call(*arguments: object) -> object:
            counts["runs"] += 1
            return graph(*arguments)

        return call

    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    forget_graphs()
    with torch._dynamo.config.patch(recompile_limit=8):
        yield counts
    forget_graphs()


def forget_graphs() -> None:
    """As in a fresh process: dynamo remembers what varied, also for functions that are gone."""
    flex.compile_pass.cache_clear()
    torch._dynamo.reset()
