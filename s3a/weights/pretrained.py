"""Pretrained models, loaded and published: from weights folders and Hub repositories alike."""

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar, cast

from torch import nn

from s3a.quantization.schemes import get_quantization
from s3a.weights.card import build_card, insert_repository
from s3a.weights.folder import (
    CARD_NAME,
    CONFIG_NAME,
    WEIGHTS_NAME,
    check_config,
    find_similar_folder,
    forget_other_labels,
    load_folder,
    make_file_error,
    save_folder,
    warn_of_new_head,
)
from s3a.weights.hub import download, upload

logger = logging.getLogger(__name__)

# The files of a repository, each with what helps if it is missing.
FILES = {
    CONFIG_NAME: "only repositories of this library's or timm's models are loaded; check the name",
    WEIGHTS_NAME: "only safetensors weights are loaded, never pickles; ask its authors for them",
}

ModelT = TypeVar("ModelT", bound="PretrainedMixin")


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
    """The model of a weights folder or Hub repository with its weights, in evaluation mode on the CPU.

    Args:
        folder_or_repo: a folder, or ORG/NAME on the Hub; of any model in timm's registry.
        revision: branch, tag or commit of the repository; None for its main branch.
        token, cache_dir, local_files_only: for repositories, see `hub.download`.
        num_classes: another number of classes; the head then has fresh weights, which a warning is logged about.
        model_args: more arguments for the model, such as drop_path_rate.

    Raises:
        FileNotFoundError: if the folder, the repository or a file in it does not exist or cannot be downloaded.
        ValueError: if the weights are damaged or not those of the model in `config.json`, or if a revision is given
            for a folder.
    """
    folder = Path(folder_or_repo)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"{str(folder)!r} is a local folder, without revisions: leave revision={revision!r} out")
        model = load_folder(folder, **model_args)
    elif folder.is_file():
        raise make_file_error(folder)
    else:
        options = {"token": token, "cache_dir": cache_dir, "local_files_only": local_files_only}
        commit = download_weights(str(folder_or_repo), revision, **options)
        model = load_folder(commit, f"{folder_or_repo}@{commit.name}", **model_args)
    if num_classes is not None and num_classes != model.num_classes:
        replace_head(model, num_classes, str(folder_or_repo))
    return model


def download_weights(repo: str, revision: str | None, **options: Any) -> Path:
    """The folder of the cache with a repository's weights; errors suggest a local folder of a similar name."""
    try:
        return download(repo, FILES, revision=revision, **options)
    except FileNotFoundError as error:
        similar = find_similar_folder(Path(repo))
        if similar is None:
            raise
        raise FileNotFoundError(f"{error}; did you mean the folder {similar}?") from error


def read_card(folder_or_repo: str | Path, revision: str | None = None, **options: Any) -> str | None:
    """The text of the model card of a folder or Hub repository; None where there is none.

    Args:
        revision, options: see `load_pretrained`; of a repository, the card is one file more of the same revision.
    """
    folder = Path(folder_or_repo)
    if not folder.is_dir():
        try:
            folder = download(str(folder_or_repo), {CARD_NAME: "it has no model card"}, revision=revision, **options)
        except FileNotFoundError as error:
            logger.warning("the model card is left out: %s", error)
            return None
    path = folder / CARD_NAME
    return path.read_text(encoding="utf-8") if path.is_file() else None


def replace_head(model: nn.Module, num_classes: int, source: str) -> None:
    """Gives a loaded model a head of another number of classes, with fresh weights, and logs a warning about it.

    Raises:
        ValueError: for a quantized model.
    """
    if get_quantization(model):
        raise ValueError(
            f"num_classes is {num_classes}: {source!r} is quantized with {model.num_classes} classes; "
            "load the weights that it was made from"
        )
    known = cast(int, model.num_classes)
    cast(Callable[[int], None], model.reset_classifier)(num_classes)  # every model of timm has it
    forget_other_labels(model)
    if num_classes:
        warn_of_new_head(model, known, source)


def push_folder(folder: Path, repo: str, *, token: str | bool | None = None, private: bool | None = None) -> str:
    """Publishes a weights folder on the Hub in one commit, and returns the commit's URL.

    The published model card shows the repository's name where it says how to load the model.

    Args:
        repo: ORG/NAME; created if it does not exist.
        token: of an account that may write there; None for the stored one.
        private: whether a new repository is private; None for the organisation's default.

    Raises:
        FileNotFoundError: if a file of the folder is missing.
        ValueError: if the folder cannot be loaded, or cannot be published.
    """
    load_folder(folder)  # what cannot be loaded is not published
    with TemporaryDirectory() as copy:
        paths = [Path(shutil.copy(folder / name, copy)) for name in (*FILES, CARD_NAME) if (folder / name).is_file()]
        insert_repository(Path(copy) / CARD_NAME, repo)
        return upload(paths, repo, token=token, private=private)


def read_model_name(folder_or_repo: str) -> str:
    """The name of the model in the config.json of weights; errors are those of `load_pretrained`."""
    folder = Path(folder_or_repo)
    try:
        path = (folder if folder.is_dir() else download(folder_or_repo, FILES)) / CONFIG_NAME
        check_config(path, f"{folder_or_repo}/{CONFIG_NAME}")
    except FileNotFoundError:
        load_pretrained(folder_or_repo)  # says what is missing, and what may be meant
        raise
    return str(json.loads(path.read_text(encoding="utf-8"))["architecture"])


class PretrainedMixin(nn.Module):
    """The methods `from_pretrained`, `save_pretrained` and `push_to_hub`, for models that timm's factory makes."""

    save_pretrained = save_folder

    @classmethod
    def from_pretrained(
        cls: type[ModelT], folder_or_repo: str | Path, revision: str | None = None, **options: Any
    ) -> ModelT:
        """The model of a weights folder or Hub repository; options and errors are those of `load_pretrained`.

        Raises:
            ValueError: also if the weights are of another family of models.
        """
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
        """Publishes the model on the Hub in one commit, and returns the commit's URL.

        Args:
            repo: ORG/NAME; created if it does not exist.
            token: of an account that may write there; None for the stored one.
            private: whether a new repository is private; None for the organisation's default.
            options: those of `save_pretrained`; without a card, one is made from the model alone.

        Raises:
            ValueError: if it cannot be published, with the reason and the remedy.
        """
        with TemporaryDirectory() as folder:
            save_folder(self, folder, **{"card": build_card(self), **options})
            return push_folder(Path(folder), repo, token=token, private=private)
