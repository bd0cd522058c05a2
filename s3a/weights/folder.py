"""A weights folder, written and read: `config.json` in timm's format, and `model.safetensors`.

Loading is strict: a surplus key, a missing key or another shape is an error that names it.
"""

import hashlib
import inspect
import json
import logging
import shlex
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict
from difflib import get_close_matches
from importlib.metadata import version
from pathlib import Path
from types import MappingProxyType
from typing import Any

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models._hub import load_model_config_from_path, save_config_for_hf
from torch import Tensor, nn

from s3a.quantization.schemes import get_quantization
from s3a.support.errors import DiskFullError, is_disk_full, make_unknown_error

logger = logging.getLogger(__name__)

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"
LABEL_KEYS = ("label_names", "label_descriptions")
REMEDY = "write it again with save_pretrained"
# Arguments of timm's factory that say where weights come from. A config.json may not hold any.
FACTORY_ARGUMENTS = frozenset(inspect.signature(timm.create_model).parameters) - {"kwargs"}

# --------------------------------------------------------------------------------------------------------
# Writing
# --------------------------------------------------------------------------------------------------------


def save_folder(
    model: nn.Module,
    folder: str | Path,
    *,
    data_config: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    card: str | None = None,
) -> None:
    """Writes a weights folder, for `from_pretrained` and for `timm.create_model("local-dir:...")`.

    Args:
        model: made by timm's factory, so that it knows its name and arguments.
        folder: created if it does not exist; files of the same names are replaced.
        data_config: timm's preprocessing keys (input_size, mean, std, crop_pct, interpolation), as far as they
            differ from the model's defaults.
        config: more entries for `config.json`, such as label_names.
        card: text of the model card, `README.md`.
    """
    if "architecture" not in getattr(model, "pretrained_cfg", {}):
        raise ValueError(
            f"a {type(model).__name__} built by hand has no name to save: build it with timm.create_model(NAME, ...)"
        )
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    # safetensors takes neither strided views nor tensors that share memory
    state = {key: tensor.detach().contiguous() for key, tensor in collect_state(model).items()}
    replace_file(folder / WEIGHTS_NAME, lambda path: save_file(state, path, metadata={"format": "pt"}))
    replace_file(folder / CONFIG_NAME, lambda path: write_config(model, path, data_config, config))
    if card is not None:
        replace_file(folder / CARD_NAME, lambda path: path.write_text(card, encoding="utf-8"))


def collect_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict as plain tensors, also of a quantized model."""
    if get_quantization(model) is None:
        return model.state_dict()
    from s3a.quantization import storage  # noqa: PLC0415  torchao is slow to import, and most models are not quantized

    return storage.flatten_state(model)


def replace_file(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file next to its place and renames it, so that an interrupted write leaves the old one.

    Raises:
        DiskFullError: if there is no room for it.
    """
    partial = path.with_name(path.name + ".partial")
    try:
        write(partial)
    except (OSError, SafetensorError) as error:
        partial.unlink(missing_ok=True)
        if not is_disk_full(error):
            raise
        free = shutil.disk_usage(path.parent).free / 1e6
        raise DiskFullError(
            f"the disk of {path} is full, {free:.1f} MB are free: make room and run the same command again"
        ) from error
    partial.replace(path)


def write_config(
    model: nn.Module, path: Path, data_config: dict[str, Any] | None, config: dict[str, Any] | None
) -> None:
    """Writes timm's config.json so that transformers can read it too.

    The number of classes and their names stand at its top level alone: timm repeats the number among the model's
    arguments, and a model that was loaded has the names in its pretrained_cfg.
    """
    save_config_for_hf(model, str(path), model_config=config, data_config=data_config)
    written = json.loads(path.read_text(encoding="utf-8"))
    written.get("model_args", {}).pop("num_classes", None)
    if quantization := get_quantization(model):
        written["quantization"] = asdict(quantization) | {"torchao": version("torchao")}
    for key in LABEL_KEYS:
        if key in written["pretrained_cfg"]:
            written.setdefault(key, written["pretrained_cfg"].pop(key))
    path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


# --------------------------------------------------------------------------------------------------------
# Reading
# --------------------------------------------------------------------------------------------------------


def load_folder(folder: Path, source: str | None = None, **model_args: Any) -> nn.Module:
    """The model of a weights folder with its weights, in evaluation mode on the CPU.

    Args:
        source: what errors call the folder; None for its path.
        model_args: more arguments for the model, such as drop_path_rate.

    Raises:
        FileNotFoundError: if a file is missing.
        ValueError: if a file cannot be read, or the weights are not those of the model.
    """
    source = source or str(folder)
    check_files(folder, source)
    model = build_model(folder / CONFIG_NAME, f"{source}/{CONFIG_NAME}", model_args)
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    if "quantization" in config:
        fill_quantized(model, config, folder, source)
    else:
        state = read_state(model, model.state_dict(), folder / WEIGHTS_NAME, f"{source}/{WEIGHTS_NAME}", model_args)
        model.load_state_dict(state, assign=True)
    return model.eval()


def check_files(folder: Path, source: str) -> None:
    """Raises FileNotFoundError where a file of a weights folder is missing; weights in its subfolders are suggested."""
    missing = next((name for name in (CONFIG_NAME, WEIGHTS_NAME) if not (folder / name).is_file()), None)
    if missing is None:
        return
    problem = f"weights folder {source!r} has no {missing}"
    if inner := list_weights_folders(folder):
        raise FileNotFoundError(f"{problem}, but folders in it hold weights: did you mean {' or '.join(inner)}?")
    raise FileNotFoundError(
        f"{problem}: it must hold {CONFIG_NAME} and {WEIGHTS_NAME}; write it with save_pretrained or "
        "tools/convert_official.py"
    )


def hash_weights(folder: Path) -> str:
    """A digest of the files with tensors and configuration, by which kept scores know their weights."""
    content = (hashlib.sha256((folder / name).read_bytes()).digest() for name in (CONFIG_NAME, WEIGHTS_NAME))
    return hashlib.sha256(b"".join(content)).hexdigest()


def list_weights_folders(folder: Path) -> list[str]:
    """The weights folders in a folder, such as `best` and `model` in that of a run; or else those one level deeper."""
    for pattern in ("*/", "*/*/"):
        inner = sorted(path.parent for path in folder.glob(f"{pattern}{CONFIG_NAME}"))
        found = [str(path) for path in inner if (path / WEIGHTS_NAME).is_file()]
        if found:
            return found
    return []


def make_file_error(path: Path) -> FileNotFoundError:
    """An error for a file given in place of a weights folder: it says which folder that is, or how to make one."""
    if (path.parent / CONFIG_NAME).is_file():
        remedy = f"did you mean its folder, {path.parent}?"
    elif path.suffix == ".safetensors":
        remedy = (
            f"load it with timm.create_model(NAME, checkpoint_path={str(path)!r}), and write one with save_pretrained"
        )
    else:
        command = shlex.join(["python", "tools/convert_official.py", str(path)])
        remedy = f"convert an official checkpoint with {command} --model NAME --output FOLDER"
    return FileNotFoundError(f"{str(path)!r} is a file, and weights are a folder with a {CONFIG_NAME}: {remedy}")


def find_similar_folder(path: Path) -> Path | None:
    """The folder beside a path whose name is nearest to the path's, for who mistyped it; None where none is near."""
    siblings = [entry.name for entry in path.parent.iterdir() if entry.is_dir()] if path.parent.is_dir() else []
    near = get_close_matches(path.name, siblings, n=1)
    return path.parent / near[0] if near else None


def build_model(path: Path, label: str, model_args: dict[str, Any]) -> nn.Module:
    """The model that a config.json describes, without memory for its weights.

    Args:
        label: what errors call the file.
        model_args: more arguments for the model, which raises its own errors for them.
    """
    check_config(path, label)
    pretrained_cfg, name, saved_args = load_model_config_from_path(path.parent)
    saved_args = {**saved_args, "num_classes": pretrained_cfg["num_classes"]}
    broken = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError)
    with torch.device("meta"):
        try:
            model = timm.create_model(name, pretrained_cfg=pretrained_cfg, **saved_args)
        except broken as error:
            raise ValueError(f"{label}: {name} cannot be built with its model_args ({error}): {REMEDY}") from error
        if model_args:
            model = timm.create_model(name, pretrained_cfg=pretrained_cfg, **{**saved_args, **model_args})
    return model


def check_config(path: Path, label: str) -> None:
    """Raises ValueError unless a file is timm's config.json, names a known model and chooses no weights to load."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{label} is not JSON ({error}): {REMEDY}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{label} holds no JSON object: {REMEDY}")
    if "architecture" not in config and "model_type" in config:
        raise ValueError(f"{label} is for a {config['model_type']!r} of transformers: load that with transformers")
    missing = [key for key in ("architecture", "num_classes", "pretrained_cfg") if key not in config]
    if missing:
        raise ValueError(f"{label} lacks {', '.join(missing)}: {REMEDY}")
    if not timm.is_model(config["architecture"]):
        raise make_unknown_error(f"{label}: architecture", config["architecture"], timm.list_models())
    classes = config["num_classes"]
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 0:
        raise ValueError(f"{label}: num_classes is {classes!r}: it must be an integer of 0 or more; {REMEDY}")
    for key in ("pretrained_cfg", "model_args"):
        if not isinstance(config.get(key, {}), dict):
            raise ValueError(f"{label}: {key} is {config[key]!r}: it must be a JSON object; {REMEDY}")
    foreign = sorted(config.get("model_args", {}).keys() & FACTORY_ARGUMENTS)
    if foreign:
        raise ValueError(
            f"{label}: model_args holds {', '.join(foreign)}: only the model's own arguments may; {REMEDY}"
        )


def fill_quantized(model: nn.Module, config: dict[str, Any], folder: Path, source: str) -> None:
    """Gives a model without memory the weights of a folder, if its config.json says that they are quantized."""
    from s3a.quantization import convert, storage  # noqa: PLC0415  torchao is slow to import, most models are not quantized

    quantization = storage.parse_quantization(config, model, f"{source}/{CONFIG_NAME}")
    convert.cast_model(model)
    expected = storage.build_expected_state(model, quantization)
    state = read_state(model, expected, folder / WEIGHTS_NAME, f"{source}/{WEIGHTS_NAME}")
    storage.load_state(model, state, quantization)


def warn_of_new_head(model: nn.Module, known: int, source: str) -> None:
    """Logs a warning, as transformers does, that the classifier of a model has weights that nobody trained.

    Args:
        known: how many classes the weights know.
        source: where they come from.
    """
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    classifiers = cfg["classifier"] if isinstance(cfg["classifier"], list | tuple) else [cfg["classifier"]]
    logger.warning(
        "Some weights of %s were newly initialized, because %s knows %d classes and num_classes is %d: %s. "
        "Train the model before you use it for predictions.",
        cfg["architecture"],
        source,
        known,
        model.num_classes,
        ", ".join(f"{name}.{kind}" for name in classifiers for kind in ("weight", "bias")),
    )


def forget_other_labels(model: nn.Module) -> None:
    """Takes the names of classes out of a model's description if they are those of a head that it had before."""
    cfg: dict[str, Any] = getattr(model, "pretrained_cfg", {})
    if cfg.get("num_classes") != getattr(model, "num_classes", None):
        for key in LABEL_KEYS:
            cfg.pop(key, None)


def read_state(
    model: nn.Module,
    expected: dict[str, Tensor],
    path: Path,
    label: str,
    model_args: Mapping[str, Any] = MappingProxyType({}),
) -> dict[str, Tensor]:
    """The tensors of a safetensors file.

    Args:
        label: what errors call the file.
        model_args: what the model has beyond its config.json.

    Raises:
        ValueError: unless they have the expected keys, shapes and kinds of numbers.
    """
    try:
        state = load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{label} is no whole safetensors file ({error}): copy or download it again") from error
    name = getattr(model, "pretrained_cfg", {}).get("architecture")
    given = ", ".join(f"{key}={value!r}" for key, value in model_args.items())
    problem = f"{label} does not hold the {name} with {model.num_classes} classes " + (
        f"and {given}; leave out what changes shapes"
        if given
        else f"that {CONFIG_NAME} describes; both files must come from one model"
    )
    check_state(state, {key: tuple(tensor.shape) for key, tensor in expected.items()}, problem)
    differing = [key for key, tensor in expected.items() if name_kind(tensor.dtype) != name_kind(state[key].dtype)]
    if differing:
        raise ValueError(f"{problem}: another kind of numbers: {shorten_list(differing)}")
    return state


def name_kind(dtype: torch.dtype) -> str:
    """One name for all dtypes that may replace each other: those that models compute in, or the 8-bit floats."""
    if dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return "float"
    return "float8" if dtype.is_floating_point else str(dtype)


def check_state(state: dict[str, Tensor], expected: dict[str, tuple[int, ...]], problem: str) -> None:
    """Raises ValueError unless a state dict has exactly the expected keys and shapes."""
    faults = []
    missing, surplus = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing:
        faults.append(f"missing: {shorten_list(missing)}")
    if surplus:
        faults.append(f"surplus: {shorten_list(surplus)}")
    shapes = [
        f"{key} is {tuple(state[key].shape)}, must be {shape}"
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    if shapes:
        faults.append(f"shapes: {shorten_list(shapes)}")
    if faults:
        raise ValueError(f"{problem}: {'; '.join(faults)}")


def shorten_list(names: list[str], most: int = 3) -> str:
    """The first few names, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
