"""Weights folders, here and on the Hub.

A weights folder, or a repository on the Hub, holds `config.json` (timm's format) and `model.safetensors`. Loading is
strict: a key too many, a key too few or another shape is an error that names it.
"""

import inspect
import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import timm
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from timm.models._hub import load_model_config_from_path, save_config_for_hf
from torch import Tensor, nn

from s3a.quantization.schemes import quantization_of
from s3a.support.errors import DiskFullError, is_disk_full, unknown
from s3a.weights.card import model_card, name_repository
from s3a.weights.hub import download, upload

CONFIG_NAME = "config.json"
WEIGHTS_NAME = "model.safetensors"
CARD_NAME = "README.md"

# The files of a weights folder, each with what helps where a Hub repository lacks it.
FILES = {
    CONFIG_NAME: "only repositories of this library's or timm's models are loaded; check the name",
    WEIGHTS_NAME: "only safetensors weights are loaded, never pickles; ask its authors for them",
}
AGAIN = "write it again with save_pretrained"
TOGETHER = "both files must come from one model"
NOT_THE_MODELS = frozenset(inspect.signature(timm.create_model).parameters) - {"kwargs"}  # where weights come from

ModelT = TypeVar("ModelT", bound=nn.Module)


# --------------------------------------------------------------------------------------------------------
# Folders
# --------------------------------------------------------------------------------------------------------


def save_folder(
    model: nn.Module,
    folder: str | Path,
    *,
    data_config: dict[str, Any] | None = None,
    config: dict[str, Any] | None = None,
    card: str | None = None,
) -> None:
    """Writes a weights folder that `from_pretrained` and `timm.create_model("local-dir:...")` both load.

    Args:
        model: made by timm's factory, so that it knows its name and arguments.
        folder: created where it does not exist; files of the same names are replaced.
        data_config: timm's preprocessing keys (input_size, mean, std, crop_pct, interpolation) where they
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
    state = {key: tensor.detach().contiguous() for key, tensor in state_to_save(model).items()}
    replace(folder / WEIGHTS_NAME, lambda path: save_file(state, path, metadata={"format": "pt"}))
    replace(folder / CONFIG_NAME, lambda path: write_config(model, path, data_config, config))
    if card is not None:
        replace(folder / CARD_NAME, lambda path: path.write_text(card, encoding="utf-8"))


def state_to_save(model: nn.Module) -> dict[str, Tensor]:
    """The state dict, of plain tensors."""
    if quantization_of(model) is None:
        return model.state_dict()
    from s3a.quantization import storage  # noqa: PLC0415  torchao is slow to import, and most models are not quantized

    return storage.flat_state(model)


def replace(path: Path, write: Callable[[Path], Any]) -> None:
    """Writes a file beside its place and renames it, so that an interrupted write leaves the old one.

    Raises:
        DiskFullError: where there is no room for it.
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
    """timm's config.json, as transformers takes it too.

    The number of classes stands at its top level alone, and so do the names of the classes, which a model that was
    loaded has among its pretrained_cfg.
    """
    save_config_for_hf(model, path, model_config=config, data_config=data_config)
    written = json.loads(path.read_text(encoding="utf-8"))
    written.get("model_args", {}).pop("num_classes", None)
    if quantization := quantization_of(model):
        written["quantization"] = asdict(quantization) | {"torchao": version("torchao")}
    for key in ("label_names", "label_descriptions"):
        if key in written["pretrained_cfg"]:
            written.setdefault(key, written["pretrained_cfg"].pop(key))
    path.write_text(json.dumps(written, indent=2) + "\n", encoding="utf-8")


def load_folder(folder: Path, source: str | None = None, **model_args: Any) -> nn.Module:
    """Builds the model that a weights folder describes and fills it, strictly.

    Args:
        source: what errors call the folder; None is its path.
        model_args: more arguments for the model, such as drop_path_rate.

    Raises:
        FileNotFoundError: where a file is missing.
        ValueError: where one cannot be read, or the weights are not those of the model.
    """
    source = source or str(folder)
    for name in FILES:
        if not (folder / name).is_file():
            raise FileNotFoundError(
                f"weights folder {source!r} has no {name}: it must hold {CONFIG_NAME} and {WEIGHTS_NAME}; "
                "write it with save_pretrained or tools/convert_official.py"
            )
    model = build_model(folder / CONFIG_NAME, f"{source}/{CONFIG_NAME}", model_args)
    config = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
    if "quantization" in config:
        fill_quantized(model, config, folder, source)
    else:
        fill(model, folder / WEIGHTS_NAME, f"{source}/{WEIGHTS_NAME}")
    return model.eval()


def build_model(path: Path, shown: str, model_args: dict[str, Any]) -> nn.Module:
    """The model of a config.json, without memory for its weights.

    Args:
        shown: what errors call the file.
        model_args: more arguments for the model; what is wrong with them is the model's to say.
    """
    check_config(path, shown)
    pretrained_cfg, name, saved_args = load_model_config_from_path(path.parent)
    saved_args = {**saved_args, "num_classes": pretrained_cfg["num_classes"]}
    broken = (TypeError, ValueError, LookupError, AttributeError, ArithmeticError, AssertionError, RuntimeError)
    with torch.device("meta"):
        try:
            model = timm.create_model(name, pretrained_cfg=pretrained_cfg, **saved_args)
        except broken as error:
            raise ValueError(f"{shown}: {name} cannot be built with its model_args ({error}): {AGAIN}") from error
        if model_args:
            model = timm.create_model(name, pretrained_cfg=pretrained_cfg, **{**saved_args, **model_args})
    return model


def check_config(path: Path, shown: str) -> None:
    """Raises ValueError unless the file is a timm config.json with what loading needs, and nothing else to load."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"{shown} is not JSON ({error}): {AGAIN}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{shown} holds no JSON object: {AGAIN}")
    if "architecture" not in config and "model_type" in config:
        raise ValueError(f"{shown} is for a {config['model_type']!r} of transformers: load that with transformers")
    missing = [key for key in ("architecture", "num_classes", "pretrained_cfg") if key not in config]
    if missing:
        raise ValueError(f"{shown} lacks {', '.join(missing)}: {AGAIN}")
    if not timm.is_model(config["architecture"]):
        raise unknown(f"{shown}: architecture", config["architecture"], timm.list_models())
    classes = config["num_classes"]
    if not isinstance(classes, int) or isinstance(classes, bool) or classes < 0:
        raise ValueError(f"{shown}: num_classes is {classes!r}: it must be an integer of 0 or more; {AGAIN}")
    for key in ("pretrained_cfg", "model_args"):
        if not isinstance(config.get(key, {}), dict):
            raise ValueError(f"{shown}: {key} is {config[key]!r}: it must be a JSON object; {AGAIN}")
    foreign = sorted(config.get("model_args", {}).keys() & NOT_THE_MODELS)
    if foreign:
        raise ValueError(f"{shown}: model_args holds {', '.join(foreign)}: only the model's own arguments may; {AGAIN}")


def fill(model: nn.Module, path: Path, shown: str) -> None:
    """Gives a model without memory the tensors of a safetensors file, strictly."""
    model.load_state_dict(read_state(model, model.state_dict(), path, shown), assign=True)


def fill_quantized(model: nn.Module, config: dict[str, Any], folder: Path, source: str) -> None:
    """`fill` for a model that `config.json` says is quantized."""
    from s3a.quantization import convert, storage  # noqa: PLC0415  torchao is slow to import, most models are not quantized

    quantization = storage.parse_quantization(config, model, f"{source}/{CONFIG_NAME}")
    convert.cast(model)
    expected = storage.expected_parts(model, quantization)
    state = read_state(model, expected, folder / WEIGHTS_NAME, f"{source}/{WEIGHTS_NAME}")
    storage.assign(model, state, quantization)


def read_state(model: nn.Module, expected: dict[str, Tensor], path: Path, shown: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file: exactly the keys, shapes and kinds of numbers that are expected."""
    state = read_safetensors(path, shown)
    name, classes = model.pretrained_cfg["architecture"], model.num_classes
    problem = f"{shown} does not hold the {name} with {classes} classes that {CONFIG_NAME} describes"
    check_state(state, {key: tuple(tensor.shape) for key, tensor in expected.items()}, f"{problem}; {TOGETHER}")
    kinds = [key for key, tensor in expected.items() if kind_of(tensor) != kind_of(state[key])]
    if kinds:
        raise ValueError(f"{problem}; {TOGETHER}: another kind of numbers: {shortened(kinds)}")
    return state


def kind_of(tensor: Tensor) -> str:
    """What may stand for each other: floating-point numbers that models compute in, or integers; never codes."""
    if tensor.dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
        return "float"
    return "float8" if tensor.is_floating_point() else "integer" if tensor.dtype == torch.int64 else str(tensor.dtype)


def read_safetensors(path: Path, shown: str) -> dict[str, Tensor]:
    """The tensors of a safetensors file; ValueError where it is truncated or something else."""
    try:
        return load_file(path)
    except SafetensorError as error:
        raise ValueError(f"{shown} is no whole safetensors file ({error}): copy or download it again") from error


def check_state(state: dict[str, Tensor], expected: dict[str, tuple[int, ...]], problem: str) -> None:
    """Raises ValueError unless the state has exactly the expected keys and shapes."""
    faults = []
    missing, surplus = sorted(expected.keys() - state.keys()), sorted(state.keys() - expected.keys())
    if missing:
        faults.append(f"missing: {shortened(missing)}")
    if surplus:
        faults.append(f"surplus: {shortened(surplus)}")
    shapes = [
        f"{key} is {tuple(state[key].shape)}, must be {shape}"
        for key, shape in expected.items()
        if key in state and tuple(state[key].shape) != shape
    ]
    if shapes:
        faults.append(f"shapes: {shortened(shapes)}")
    if faults:
        raise ValueError(f"{problem}: {'; '.join(faults)}")


def shortened(names: list[str], most: int = 3) -> str:
    """The first few of many, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


# --------------------------------------------------------------------------------------------------------
# Folders and repositories
# --------------------------------------------------------------------------------------------------------


def load_pretrained(
    folder_or_repo: str | Path,
    revision: str | None = None,
    *,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
    num_classes: int | None = None,
    **model_args: Any,
) -> nn.Module:
    """Loads a weights folder or a Hub repository of any registered model, in evaluation mode on the CPU.

    Args:
        folder_or_repo: a folder, or ORG/NAME on the Hub.
        revision: branch, tag or commit of the repository; None is its main branch.
        token, cache_dir, local_files_only: of the repository, see `hub.download`.
        num_classes: another number of classes: the head is made anew, all else is loaded.
        model_args: more arguments for the model, such as drop_path_rate.

    Raises:
        FileNotFoundError: where the folder, the repository or a file in it does not exist, or cannot be had.
        ValueError: where the weights are not whole or not those of the model in `config.json`, or where a folder
            is asked for a revision.
    """
    folder = Path(folder_or_repo)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{str(folder)!r} is a local folder, without revisions: leave revision={revision!r} out")
        model = load_folder(folder, **model_args)
    else:
        options = {"revision": revision, "token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        folder = download(str(folder_or_repo), FILES, **options)
        model = load_folder(folder, f"{folder_or_repo}@{folder.name}", **model_args)
    if num_classes is not None and num_classes != model.num_classes:
        if quantization_of(model):
            raise ValueError(
                f"num_classes is {num_classes}: {str(folder_or_repo)!r} is quantized with {model.num_classes} classes; "
                "load the weights that it was made from"
            )
        model.reset_classifier(num_classes)
    return model


def push_folder(folder: Path, repo: str, *, token: str | bool | None = None, private: bool | None = None) -> str:
    """Publishes a weights folder as a Hub repository, made where there is none, in one commit; returns its URL.

    Where the model card shows how to load the model, it gets the repository's name.

    Args:
        repo: ORG/NAME.
        token: of somebody who may write there; None is the stored one.
        private: of a new repository; None is the organisation's default.

    Raises:
        FileNotFoundError, ValueError: where the folder is no whole weights folder, or cannot be published.
    """
    load_folder(folder)  # what cannot be loaded is not published
    with TemporaryDirectory() as copy:
        paths = [Path(shutil.copy(folder / name, copy)) for name in (*FILES, CARD_NAME) if (folder / name).is_file()]
        name_repository(Path(copy) / CARD_NAME, repo)
        return upload(paths, repo, token=token, private=private)


class PretrainedMixin:
    """`from_pretrained`, `save_pretrained` and `push_to_hub` for models of timm's factory."""

    save_pretrained = save_folder

    @classmethod
    def from_pretrained(
        cls: type[ModelT], folder_or_repo: str | Path, revision: str | None = None, **options: Any
    ) -> ModelT:
        """`load_pretrained`, with its options and errors; ValueError too for the weights of another family."""
        model = load_pretrained(folder_or_repo, revision, **options)
        if not isinstance(model, cls):
            own = isinstance(model, PretrainedMixin)
            loader = f"{type(model).__name__}.from_pretrained" if own else "timm.create_model"
            raise ValueError(
                f"{str(folder_or_repo)!r} holds a {type(model).__name__}, not a {cls.__name__}: load it with {loader}"
            )
        return model

    def push_to_hub(
        self, repo: str, *, token: str | bool | None = None, private: bool | None = None, **options: Any
    ) -> str:
        """Publishes the model as a Hub repository, made where there is none, in one commit; returns its URL.

        Args:
            repo: ORG/NAME.
            token: of somebody who may write there; None is the stored one.
            private: of a new repository; None is the organisation's default.
            options: of `save_pretrained`; without a card, one is written from what the model itself tells.

        Raises:
            ValueError: where it cannot be published; says why, and what helps.
        """
        with TemporaryDirectory() as folder:
            save_folder(self, folder, **{"card": model_card(self), **options})
            return push_folder(Path(folder), repo, token=token, private=private)
