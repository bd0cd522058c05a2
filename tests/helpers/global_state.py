"""What a process has once and shares: looked at before and after importing a library.

`python -m helpers.global_state` reads `{"first": [MODULE, ...], "then": [[MODULE, ...], ...]}` from stdin, imports the
first modules, then the others, and prints what each list of these changed: a JSON list of lines for each.
"""

import importlib
import json
import logging
import multiprocessing
import os
import random
import signal
import sys
import threading
import warnings
from typing import Any

import datasets
import huggingface_hub.utils
import matplotlib
import numpy as np
import PIL.Image
import PIL.ImageFile
import torch
import torch._dynamo
import torch._inductor.config
from timm.data import auto_augment

NEW_LOGGER = (logging.NOTSET, False, True, [], [])  # the settings that a logger begins with


def take_snapshot() -> dict[str, Any]:
    """The global state of the interpreter and of the libraries, by the name of each part."""
    return {
        **{f"os.environ[{name}]": value for name, value in os.environ.items()},
        "sys.path": list(sys.path),
        "sys.excepthook": sys.excepthook,
        "threading.excepthook": threading.excepthook,
        **{f"warnings.filters: {each}": "there" for each in warnings.filters},
        "warnings.showwarning": warnings.showwarning,
        "the method of starting processes": multiprocessing.get_start_method(allow_none=True),
        "the state of random": random.getstate(),
        **{f"the handler of {each.name}": signal.getsignal(each) for each in signal.Signals},
        **{f"the logger {name!r}": settings for name, settings in list_loggers() if settings != NEW_LOGGER},
        "the state of numpy.random": str(np.random.get_state()),
        "numpy's print options": np.get_printoptions(),
        "numpy's floating-point errors": np.geterr(),
        **{f"matplotlib.rcParams[{name}]": matplotlib.rcParams._get(name) for name in matplotlib.rcParams},
        "PIL.Image.MAX_IMAGE_PIXELS": PIL.Image.MAX_IMAGE_PIXELS,
        "PIL.ImageFile.LOAD_TRUNCATED_IMAGES": PIL.ImageFile.LOAD_TRUNCATED_IMAGES,
        **{f"timm's auto_augment.NAME_TO_OP[{name}]": value for name, value in auto_augment.NAME_TO_OP.items()},
        "the progress bars of datasets": datasets.are_progress_bars_disabled(),
        "the progress bars of huggingface_hub": huggingface_hub.utils.are_progress_bars_disabled(),
        **take_torch_snapshot(),
    }


def take_torch_snapshot() -> dict[str, Any]:
    """torch's settings, and those of its compiler."""
    return {
        "torch.get_default_dtype": torch.get_default_dtype(),
        "torch.get_default_device": torch.get_default_device(),
        "torch.get_num_threads": torch.get_num_threads(),
        "torch.get_num_interop_threads": torch.get_num_interop_threads(),
        "torch.is_grad_enabled": torch.is_grad_enabled(),
        "torch.get_float32_matmul_precision": torch.get_float32_matmul_precision(),
        "torch.are_deterministic_algorithms_enabled": torch.are_deterministic_algorithms_enabled(),
        "torch.backends.cudnn.benchmark": torch.backends.cudnn.benchmark,
        "the state of torch's generator": torch.get_rng_state().tolist(),
        "torch.serialization.get_safe_globals": set(map(str, torch.serialization.get_safe_globals())),
        "torch.multiprocessing.get_sharing_strategy": torch.multiprocessing.get_sharing_strategy(),
        **{f"torch._dynamo.config.{name}": value for name, value in torch._dynamo.config.get_config_copy().items()},
        **{f"torch._inductor.config.{name}": value for name, value in torch._inductor.config.get_config_copy().items()},
    }


def list_loggers() -> list[tuple[str, tuple[object, ...]]]:
    """The name and the settings of every logger."""
    loggers = [each for each in logging.root.manager.loggerDict.values() if isinstance(each, logging.Logger)]
    return [
        (each.name, (each.level, each.disabled, each.propagate, list(each.handlers), list(each.filters)))
        for each in [logging.root, *loggers]
    ]


def list_functions() -> dict[str, object]:
    """Every function and class that stands in a loaded module of another library, by its dotted name there."""
    return {
        f"{module_name}.{name}": value
        for module_name, module in list(sys.modules.items())
        if module is not None and module_name.split(".")[0] not in ("s3a", "helpers", "__main__")
        for name, value in list(vars(module).items())
        if callable(value)
    }


def find_changes(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """The parts that were changed, removed or added, a line each."""
    absent = object()
    changed = [name for name in {**before, **after} if before.get(name, absent) != after.get(name, absent)]
    return [f"{name} was {str(before.get(name))[:200]} and is {str(after.get(name))[:200]}" for name in changed]


def find_replaced(before: dict[str, object], after: dict[str, object]) -> list[str]:
    """The functions of other libraries in whose place stands something else, a line each."""
    return [f"{name} was replaced" for name, value in before.items() if name in after and after[name] is not value]


def main() -> None:
    imports = json.load(sys.stdin)
    for name in imports["first"]:
        importlib.import_module(name)
    changes = []
    for names in imports["then"]:
        state, functions = take_snapshot(), list_functions()
        for name in names:
            importlib.import_module(name)
        changes.append(find_changes(state, take_snapshot()) + find_replaced(functions, list_functions()))
    print(json.dumps(changes))


if __name__ == "__main__":
    main()
