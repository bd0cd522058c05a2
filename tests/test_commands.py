"""The commands and the Python of README.md, docs/*.md and CONTRIBUTING.md are right.

Every command is known here and its options are parsed by the command itself. Short ones run in this process, with
stand-ins for what long ones leave; with `-m slow` all those run as they are written that take minutes at most.
"""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from argparse import REMAINDER, ArgumentParser
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import get_args

import mutations
import numpy as np
import pytest
import timm
import torch
from accelerate.commands.launch import launch_command_parser
from accelerate.state import AcceleratorState
from helpers import golden
from helpers.documents import GUIDES, ROOT, Command, list_blocks, list_commands, read
from helpers.hub_server import TOKEN, Hub
from PIL import Image
from timm.models import _registry
from torch.distributed.run import get_args_parser

from s3a.support.command_line import parse_options
from s3a.weights.card import Weights

TRAIN = "recipes/train.py"
TRAININGS = (TRAIN, "recipes/segment.py", "recipes/detect.py")
COMMANDS = [command for guide in GUIDES for command in list_commands(read(guide), guide.name)]
EXACT = {  # all else is parsed
    "python -m venv .venv",
    "source .venv/bin/activate",
    "pre-commit install",
    "ruff check --fix .",
    "ruff format .",
    "mypy",
    ".ci/run",
    "hf auth login",
    "squeue --me",
}
PACKAGES = {"natten", "pre-commit", "transformers"}  # that users are told to install
PYTEST_OPTIONS = {"-m": 1, "-n": 1, "-k": 1, "-q": 0, "--pdb": 0}  # and how many values each has
SBATCH_OPTIONS = ("nodes", "gpus-per-node", "cpus-per-gpu", "ntasks-per-node", "time", "partition")
SLURM_JOB = re.compile(r"(scancel|scontrol requeue) \d+|tail -f slurm-\d+\.out")


# --------------------------------------------------------------------------------------------------------
# Stand-ins for what long commands leave, and for what users bring
# --------------------------------------------------------------------------------------------------------

CLASSES = ("cat", "dog")


def write_weights(folder: Path, label_names: Sequence[str]) -> None:
    """A weights folder as a training run leaves it, of a network that has learnt nothing."""
    model = timm.create_model("ssvit_nano", num_classes=len(label_names))
    data_config = {"input_size": (3, 64, 64), "crop_pct": 1.0}
    model.save_pretrained(folder, data_config=data_config, config={"label_names": list(label_names)})


def write_dense_run(folder: Path, name: str) -> None:
    """The weights of a run of a dense task on scenes, of a network that has learnt nothing."""
    names = [*"0123456789", *(["background"] if name == "semantic_fpn" else [])]
    model = timm.create_model(name, backbone="ssvit_nano", num_classes=len(names), pyramid_dim=16)
    data_config = {"input_size": (3, 64, 64), "crop_pct": 1.0}
    for kind in ("model", "best"):
        model.save_pretrained(folder / kind, data_config=data_config, config={"label_names": names})


def write_run(folder: Path, label_names: Sequence[str]) -> None:
    """What the documents use of a run: its weights and its curves."""
    for kind in ("model", "best"):
        write_weights(folder / kind, label_names)
    scores = {"train_loss": 2.0, "val_loss": 1.5, "val_top1": 0.5, "learning_rate": 0.01, "images_per_second": 100.0}
    lines = [json.dumps({"epoch": epoch, **scores}) for epoch in (1, 2)]
    (folder / "metrics.jsonl").write_text("\n".join(lines))


def write_photographs(folder: Path, count: int) -> None:
    """Noise by class: FOLDER/CLASS/*.jpg."""
    generator = np.random.default_rng(0)
    for name in CLASSES:
        (folder / name).mkdir(parents=True)
        for index in range(count):
            pixels = generator.integers(0, 256, size=(80, 90, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{index}.jpg")


@pytest.fixture(scope="module")
def stand_ins(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with all that short commands and the Python of the documents read."""
    folder = tmp_path_factory.mktemp("clone")
    for run, label_names in {"digits": "0123456789", "vvt": "0123456789", "photos": CLASSES}.items():
        write_run(folder / "runs" / run, label_names)
    shutil.copytree(folder / "runs" / "photos", folder / "runs" / "photos_finetune")
    for name in ("semantic_fpn", "mask_rcnn"):
        write_dense_run(folder / "runs" / f"{name}_scenes", name)
    write_weights(folder / "weights" / "ssvit_tiny", CLASSES)
    write_photographs(folder / "photographs", count=5)
    write_photographs(folder / "pictures" / "train", count=32)
    write_photographs(folder / "pictures" / "val", count=2)
    for name in ("two.png", "scene.png"):
        Image.fromarray(np.eye(8, dtype=np.uint8) * 255).resize((64, 64)).save(folder / name)
    shutil.copytree(ROOT / "docs" / "benchmarks", folder / "docs" / "benchmarks")
    return folder


@pytest.fixture
def clone(stand_ins: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder is one with stand-ins, and Accelerate is as in a new process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    monkeypatch.chdir(stand_ins)
    return stand_ins


# --------------------------------------------------------------------------------------------------------
# Every command is known, and its options are
# --------------------------------------------------------------------------------------------------------


def find_script(command: Command) -> tuple[str, list[str]] | None:
    """The script of this project that a command starts, however it is launched, and its arguments.

    Raises:
        SystemExit: for an option that the launcher does not know.
    """
    words = list(command.words)
    if words[:2] == ["accelerate", "launch"]:
        launched = launch_command_parser().parse_args(words[2:])
        return launched.training_script, launched.training_script_args
    if words[:1] == ["torchrun"]:
        launched = get_args_parser().parse_args(words[1:])
        return launched.training_script, launched.training_script_args
    if words[:1] == ["sbatch"]:
        launched = get_sbatch_parser().parse_args(words[1:])
        assert f"python {TRAIN}" in read(ROOT / launched.job_file)
        return TRAIN, launched.script_args
    if words[:1] == ["python"] and words[1].endswith(".py"):
        return words[1], words[2:]
    return None


def get_sbatch_parser() -> ArgumentParser:
    """The options of Slurm's sbatch that the documents use, all of which have a value."""
    parser = ArgumentParser(prog="sbatch", allow_abbrev=False)
    for name in SBATCH_OPTIONS:
        parser.add_argument(f"--{name}")
    parser.add_argument("job_file")
    parser.add_argument("script_args", nargs=REMAINDER)
    return parser


def parse_script(script: str, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """The options of a command, parsed by itself; it does nothing more. A training run has its `folder` too."""
    assert (ROOT / script).is_file(), f"{script} does not exist"
    options: list[object] = []
    with monkeypatch.context() as patch:
        patch.setattr("s3a.support.command_line.run_command", lambda kind, _: options.append(parse_options(kind)))
        patch.setattr("s3a.training.trainer.train", lambda recipe, *_, **__: options.append(recipe))
        patch.syspath_prepend(ROOT / "recipes")  # as where Python runs the file
        patch.setattr(sys, "argv", [script, *arguments])
        if script == "tests/mutations.py":
            options.append(mutations.parse_options())
        elif script == "tools/compare.py":
            options += runpy.run_path(str(ROOT / script))["parse_arguments"](arguments)
        else:
            runpy.run_path(str(ROOT / script), run_name="__main__")
    parsed = {name: value for each in reversed(options) for name, value in vars(each).items()}
    is_training = script in TRAININGS and options
    return SimpleNamespace(**parsed, **({"folder": options[0].folder} if is_training else {}))


def check_models(options: SimpleNamespace) -> None:
    """Every model that the options name is in timm's registry."""
    named = [getattr(options, "model", None), *getattr(options, "models", ())]
    assert not [name for name in named if name not in (None, "NAME") and not timm.is_model(name)]


def check_pip(words: list[str]) -> None:
    """Installs this project with extras that it has, or a package of the table."""
    if words[0] == "-e":
        extras = re.fullmatch(r"\.(?:\[(\w+)\])?", words[1])[1]
        assert extras is None or re.search(rf"^{extras} = \[", read(ROOT / "pyproject.toml"), re.MULTILINE)
    else:
        assert set(words) <= PACKAGES


def check_pytest(words: list[str]) -> None:
    """Options of the table, and tests that exist."""
    rest = iter(words)
    for word in rest:
        if word in PYTEST_OPTIONS:
            for _ in range(PYTEST_OPTIONS[word]):
                next(rest)
        else:
            path, _, test = word.partition("::")
            assert (ROOT / path).exists(), path
            assert not test or f"def {test}(" in read(ROOT / path), test


@pytest.mark.parametrize("command", list(dict.fromkeys(COMMANDS)), ids=lambda command: f"{command.source}: {command}")
def test_the_command_is_known(command: Command, clone: Path, monkeypatch: pytest.MonkeyPatch):
    words = list(command.words)
    if str(command) in EXACT or SLURM_JOB.fullmatch(str(command)):
        return
    if words[:2] == ["pip", "install"]:
        check_pip(words[2:])
    elif words[:3] == ["python", "-m", "pytest"]:
        check_pytest(words[3:])
    elif words[:2] == ["python", "-c"] and len(words) == 3:
        compile(words[2], str(command), "exec")
    elif found := find_script(command):
        script, arguments = found
        if "--help" not in arguments:
            check_models(parse_script(script, arguments, monkeypatch))
    else:
        pytest.fail(f"{command}: unknown, so that nothing tests it")


# --------------------------------------------------------------------------------------------------------
# What a command reads, another one writes
# --------------------------------------------------------------------------------------------------------

USERS = {"pictures", "photographs", "scenery", "objects", "ssvit_t.pth", "downloads"}  # what users bring
IMAGENETS = {f"/data/{name}" for name in ("imagenet", "imagenet-a", "imagenet-c", "robustness")}
USERS |= IMAGENETS | {f"/data/{name}" for name in ("ade20k", "coco", "cifar-100-binary")}
WRITTEN_BY_PYTHON = re.compile(r"""(?:save(?:_pretrained)?|push_to_hub)\(["']([^"']+)""")
READ_BY_PYTHON = re.compile(r"""(?:from_pretrained\(|local-dir:|open\()["']?([^"')]+)""")


def list_reads(options: SimpleNamespace) -> set[str]:
    """The files and folders that a command reads."""
    given = [getattr(options, name, None) for name in ("source", "data_dir", "checkpoints", "imagenet", "robustness")]
    weights = getattr(options, "weights", None)
    given += [*(weights if isinstance(weights, tuple) else [weights])]
    given += [*getattr(options, "images", ()), *getattr(options, "runs", ())]
    return {str(path) for path in given if path is not None}


def list_writes(options: SimpleNamespace) -> set[str]:
    """The files and folders that a command writes."""
    given = (getattr(options, name, None) for name in ("output", "runs_dir"))
    written = {str(path) for path in given if path is not None}
    if hasattr(options, "folder"):
        written |= {str(options.folder), *(f"{options.folder}/{kind}" for kind in ("model", *get_args(Weights)))}
    return written


def test_what_is_read_was_written(clone: Path, monkeypatch: pytest.MonkeyPatch):
    """The folders of all pages are consistent: a command reads what another one writes, or what users bring."""
    read_by, written = {}, set(USERS)
    for command in COMMANDS:
        script, arguments = find_script(command) or (None, [])
        if command.words[:2] == ("python", "-c"):
            written |= set(WRITTEN_BY_PYTHON.findall(command.words[2]))
        elif script and "--help" not in arguments:
            options = parse_script(script, arguments, monkeypatch)
            read_by |= dict.fromkeys(list_reads(options), str(command))
            written |= list_writes(options)
    for guide in GUIDES:
        for block in list_blocks(read(guide), "python"):
            read_by |= dict.fromkeys(READ_BY_PYTHON.findall(block), f"Python of {guide.name}")
            written |= set(WRITTEN_BY_PYTHON.findall(block))
    missing = {path: by for path, by in read_by.items() if not written & {path, *map(str, Path(path).parents)}}
    assert not missing
    assert len(read_by) > 5


COMPARISONS = [command for command in COMMANDS if "tools/compare.py" in command.words]


@pytest.mark.parametrize("command", COMPARISONS, ids=str)
def test_a_comparison_asks_for_what_its_committed_result_has(command: Command):
    """Defaults of a recipe change, and the results of the command with them."""
    script, arguments = find_script(command)
    options, recipe = runpy.run_path(str(ROOT / script))["parse_arguments"](arguments)
    settings = json.loads(read(ROOT / options.output_dir / "results.json"))["settings"]
    measured = settings["recipe"]
    asked = {"name": options.recipe, **{name: getattr(recipe, name) for name in measured if name != "name"}}
    assert json.loads(json.dumps(asked)) == measured
    for name in ("models", "scan", "size", "seeds", "equal"):
        assert json.loads(json.dumps(getattr(options, name))) == settings[name]


# --------------------------------------------------------------------------------------------------------
# Short commands and all Python, with stand-ins for what long commands leave
# --------------------------------------------------------------------------------------------------------

SHORT = re.compile(
    r"python (-c '?from|recipes/evaluate|tools/(explain|visualise|predict|plot_runs|benchmark.py (compare|plot)))\b"
    r"|--print-recipe|--help"
)
LONG = {*IMAGENETS, "scenes"}  # data with too many images for a test
SHORT_COMMANDS = {str(each): each for each in COMMANDS if SHORT.search(str(each)) and not LONG & {*each.words}}


@pytest.mark.parametrize("command", SHORT_COMMANDS.values(), ids=SHORT_COMMANDS)
def test_short_commands_run(command: Command, clone: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    if command.words[:2] == ("python", "-c"):
        exec(command.words[2], {})
        return
    script, arguments = find_script(command)
    monkeypatch.setattr(sys, "argv", [script, *arguments])
    monkeypatch.syspath_prepend(ROOT / "recipes")  # as where Python runs the file
    try:
        runpy.run_path(str(ROOT / script), run_name="__main__")
    except SystemExit as stop:
        assert not stop.code, capsys.readouterr().err
    assert capsys.readouterr().out


@pytest.fixture
def program(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """An empty main module, whose models timm forgets at the end."""
    program = ModuleType("__main__")
    monkeypatch.setitem(sys.modules, program.__name__, program)
    yield program
    for name in timm.list_models(module=program.__name__):
        _registry._clear_model_entries(name)
        del _registry._model_entrypoints[name]


@pytest.mark.parametrize("guide", GUIDES, ids=lambda path: path.name)
def test_python_runs(guide: Path, clone: Path, program: ModuleType, hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys):
    """A block that begins with imports is a program of its own; another one goes on with the block before it."""
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    for block in list_blocks(read(guide), "python"):
        if block.startswith(("import ", "from ")):
            vars(program).clear()
            program.__name__ = "__main__"
        exec(compile(block, guide.name, "exec"), vars(program))


# --------------------------------------------------------------------------------------------------------
# As written
# --------------------------------------------------------------------------------------------------------

NOT_RUN = {  # all other commands are
    r"pip install|venv|pre-commit|pytest|ruff|mypy|\.ci/run": "the environment is made, and these are its checks",
    r"hf auth login": "asks for a token",
    r"tests/mutations\.py": "tests the tests for a quarter of an hour",
    r"_imagenet(?!.*--print-recipe)|_384|/data/(imagenet|robustness)": "needs ImageNet or its robustness sets",
    r"_cifar100": "needs CIFAR-100; tests/data/test_cifar.py trains on a few images of noise",
    r"_ade20k|_coco(?!.*--print-recipe)": "needs ADE20K, COCO or one's own label maps",
    r"recipes/(segment|detect)\.py *(#|&&|$)": "trains for minutes, tests/training/test_dense_runs.py for seconds",
    r"runs/(semantic_fpn|mask_rcnn)_scenes": "the weights of these; the tests of each command have smaller ones",
    r"--num_processes|--use_fsdp": "needs several GPUs",
    r"sbatch|squeue|scancel|scontrol|slurm-": "needs Slurm, on which tests/recipes/test_slurm.py runs the job file",
    r"--nnodes": "waits for a second launcher; tests/recipes/test_train.py starts both",
    r"tools/benchmark\.py (?!compare)|tools/compare\.py|ssvit_small": "measures or compiles for minutes to days",
    r"runs/compared-": "reads the runs of tools/compare.py",
    r"--quantize|--format aoti": "compiles for minutes, as tests/quantization and tests/test_export.py do too",
    r"train\.py photos(?!.*--epochs 1)": "as many epochs as one's own photographs need",
}


@pytest.mark.slow
def test_commands_run_as_written(trained_digits: Path, tmp_path: Path):
    """In the order of the documents, in a folder that has nothing but the project and what users bring.

    And the run of the first command, which finds it finished.
    """
    for name in ("recipes", "tools"):
        (tmp_path / name).symlink_to(ROOT / name)
    shutil.copytree(ROOT / "docs" / "benchmarks", tmp_path / "docs" / "benchmarks")
    write_photographs(tmp_path / "pictures" / "train", count=32)
    write_photographs(tmp_path / "pictures" / "val", count=2)
    shutil.copytree(trained_digits, tmp_path / "runs" / "digits")
    for run in ("photos", "photos_finetune"):
        write_run(tmp_path / "runs" / run, CLASSES)
    torch.save({"model": golden.official_state("tiny")}, tmp_path / "ssvit_t.pth")
    environment, failed = os.environ | {"PYTHONPATH": str(ROOT)}, []
    for command in dict.fromkeys(map(str, COMMANDS)):
        if not any(re.search(pattern, command) for pattern in NOT_RUN):
            ended = subprocess.run(
                ["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
            )
            if ended.returncode:
                failed.append(f"{command}\n{ended.stdout[-1000:]}\n{ended.stderr[-2000:]}")
    assert not failed, "\n\n".join(failed)
