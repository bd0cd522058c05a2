"""Commands as processes of their own that start in a moment: forked from one that has imported all libraries once.

What such a process is: its own memory, arguments, environment, working directory, signals and exit status. What it is
not: a fresh interpreter, so what is read when a library loads (OMP_WAIT_POLICY, HF_HOME) is that of the tests.
"""

import multiprocessing
import os
import runpy
import sys
from multiprocessing.process import BaseProcess
from pathlib import Path
from subprocess import CompletedProcess
from tempfile import TemporaryDirectory

CONTEXT = multiprocessing.get_context("forkserver")
LIBRARIES = ("sklearn.datasets", "matplotlib.figure", "s3a.data.local", "s3a.training.trainer")
CONTEXT.set_forkserver_preload(list(LIBRARIES))
TIMEOUT = 600  # seconds


def run_python(arguments: list[str], folder: Path, environment: dict[str, str]) -> CompletedProcess[str]:
    """Runs `python ARGUMENTS` to its end, where the first argument is a script, or -c and code."""
    (ended,) = run_together([arguments], folder, [environment])
    return ended


def run_together(
    commands: list[list[str]], folder: Path, environments: list[dict[str, str]]
) -> list[CompletedProcess[str]]:
    """Runs several commands at the same time, each with its environment; see `run_python`."""
    with TemporaryDirectory() as scratch:
        logs = [(f"{scratch}/{index}.out", f"{scratch}/{index}.err") for index in range(len(commands))]
        processes = [
            CONTEXT.Process(target=run_as_main, args=(arguments, str(folder), environment, *log))
            for arguments, environment, log in zip(commands, environments, logs, strict=True)
        ]
        for process in processes:
            process.start()
        return [
            CompletedProcess(arguments, wait_for(process), *(Path(path).read_text() for path in log))
            for arguments, process, log in zip(commands, processes, logs, strict=True)
        ]


def wait_for(process: BaseProcess) -> int:
    """The exit status of a process, or minus the signal that ended it."""
    process.join(TIMEOUT)
    if process.exitcode is None:
        process.kill()
        raise TimeoutError(f"{process} did not end within {TIMEOUT} seconds")
    return process.exitcode


def run_as_main(arguments: list[str], folder: str, environment: dict[str, str], out: str, err: str) -> None:
    """In the new process: becomes `python ARGUMENTS`."""
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(folder)
    if arguments[0] == "-c":
        sys.argv = ["-c", *arguments[2:]]
        sys.path.insert(0, "")
        exec(compile(arguments[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        sys.argv = arguments
        sys.path.insert(0, str(Path(arguments[0]).parent))
        runpy.run_path(arguments[0], run_name="__main__")
