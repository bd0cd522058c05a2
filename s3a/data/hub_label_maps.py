"""Images with label maps in data sets of the Hugging Face Hub, copied into the cache of datasets."""

import json
from pathlib import Path

import datasets
from datasets import Dataset, DatasetBuilder, Features, load_dataset_builder
from httpx2 import TransportError
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError

from s3a.data.columns import ENCODED, choose_column
from s3a.data.hub import (
    FOLDER_BUILDER,
    explain_hub_errors,
    explain_obstacle,
    find_obstacle,
    find_splits,
    look_in_cache_alone,
    split_config,
)
from s3a.data.images import ImageData, MapImages, Row
from s3a.data.label_maps import EncodedLabelMap, Numbering
from s3a.data.local import hash_content
from s3a.data.shards import hide_bars_in_logs
from s3a.data.targets import IGNORED, LabelMap

MAP_COLUMNS = (
    "annotation",
    "annotations",
    "label",
    "label_map",
    "labels",
    "mask",
    "masks",
    "segmentation",
    "segmentation_mask",
    "semantic_segmentation",
)
"""What the column of label maps may be called."""
NAME_FILES = ("id2label.json", "classes.txt")
"""Files of a repository that name its classes: a dict of names by number, as on the Hub many have, or a name a line."""


class HubLabelMaps(MapImages):
    """The rows of a Hugging Face dataset with the columns `image` and `label_map`.

    Paths in its rows are never opened, since whoever wrote them could have named any file of this machine.
    """

    blank = LabelMap()

    def __init__(self, dataset: Dataset, split: str, numbering: Numbering) -> None:
        for column in ("image", "label_map"):
            dataset = dataset.cast_column(column, datasets.Image(decode=False))
        self.dataset, self.split, self.numbering = dataset.with_format("arrow"), split, numbering
        self.num_images = len(dataset)

    def name_of(self, index: int) -> str:
        return f"row {index} of {self.split}"

    def read_rows(self, indices: list[int]) -> list[Row]:
        if not indices:
            return []
        table = self.dataset[indices]
        columns = table["image"].to_pylist(), table["label_map"].to_pylist()
        return [
            Row(index, image, target=EncodedLabelMap(encoded, self.numbering))
            for index, image, encoded in zip(indices, *columns, strict=True)
        ]


def load_hub_label_maps(dataset: str, ignore_zero: bool) -> ImageData:
    """ORG/NAME or ORG/NAME:CONFIG of the Hub, or a local folder that datasets can load, with images and label maps.

    It is downloaded once, into the cache of datasets (HF_HOME), and found there without a network.

    Args:
        ignore_zero: whether 0 is ignored and classes are numbered from 1 on, instead of from 0.

    Raises:
        FileNotFoundError: where it is absent, gated, or out of reach, or does not name its classes.
        ValueError: where its splits or columns are not those of images and label maps.
    """
    where = f"--dataset {dataset}"
    obstacle = find_obstacle(split_config(dataset)[0])
    builder, found = copy_repository(dataset, obstacle)
    splits = {split: found[name] for split, name in find_splits(found, dataset).items()}
    columns = {}
    for split, rows in splits.items():
        if rows.info.builder_name == FOLDER_BUILDER:
            raise ValueError(f"{where} is a folder of single files: download it, and give the folder with --data-dir")
        if not len(rows):
            raise ValueError(f"{split} of {dataset} has no images: it must have some")
        columns[split] = find_map_columns(rows.features, where)
    names = read_names(dataset, ignore_zero, in_cache_alone=obstacle is not None)
    numbering = Numbering(len(names), ignore_zero)
    train, val = (
        HubLabelMaps(select_columns(rows, *columns[split]), split, numbering) for split, rows in splits.items()
    )
    content = [builder.hash, builder.config_id, numbering, sorted(columns.items()), *names]
    return ImageData(train, val, names, hash_content(content))


def copy_repository(dataset: str, obstacle: Exception | None) -> tuple[DatasetBuilder, dict[str, Dataset]]:
    """Copies a data set into the cache, or finds it there, as `load_hub` does.

    Args:
        obstacle: what keeps the repository from being read, so that only the cache is left.
    """
    path, config = split_config(dataset)
    try:
        with explain_hub_errors(dataset), look_in_cache_alone(obstacle is not None), hide_bars_in_logs():
            builder = load_dataset_builder(path, config)
            builder.download_and_prepare()
            return builder, builder.as_dataset()
    except (FileNotFoundError, ValueError) as error:
        if obstacle is None:
            raise
        raise FileNotFoundError(explain_obstacle(dataset, obstacle)) from error


def find_map_columns(features: Features, where: str) -> tuple[str, str]:
    """The names of the columns of images and of label maps.

    Label maps are in the only column of images that is called one of MAP_COLUMNS, or in the only one beside `image`.

    Raises:
        ValueError: where there is no such column, or there are several.
    """
    names = [name for name, feature in features.items() if isinstance(feature, datasets.Image) or feature in ENCODED]
    maps = [name for name in names if name in MAP_COLUMNS]
    if not maps and "image" in names:
        maps = [name for name in names if name != "image"]
    images = [name for name in names if name not in maps]
    if len(maps) != 1 or not images:
        raise ValueError(
            f"{where} has the columns {', '.join(features)}, of images {', '.join(names) or 'none'}: it must have one "
            f"of images, called 'image', and one of label maps, called {', '.join(MAP_COLUMNS)}; rename them"
        )
    return choose_column(images, "image", where, "beside the label maps"), maps[0]


def select_columns(rows: Dataset, image: str, label_map: str) -> Dataset:
    """The two columns alone, renamed to `image` and `label_map`."""
    rows = rows.select_columns([image, label_map])
    return rows.rename_columns({image: "image", label_map: "label_map"})


def read_names(dataset: str, ignore_zero: bool, in_cache_alone: bool) -> list[str]:
    """The names of the classes, from the repository's own file of them.

    Args:
        in_cache_alone: whether to ask no network, which takes half a minute where there is none.

    Raises:
        FileNotFoundError: where it has none.
        ValueError: where that does not name the classes.
    """
    first = int(ignore_zero)
    table = read_repository_file(dataset, NAME_FILES[0], in_cache_alone)
    if table is not None:
        return parse_table(table, first, f"{NAME_FILES[0]} of --dataset {dataset}")
    lines = (read_repository_file(dataset, NAME_FILES[1], in_cache_alone) or "").splitlines()
    names = [line.strip() for line in lines if line.strip()]
    if not names:
        raise FileNotFoundError(
            f"--dataset {dataset} has no file, in the cache or within reach, that names its classes: it must have "
            f"{' or '.join(NAME_FILES)}; or download it, write classes.txt into the folder (a name a line, in the "
            f"order of their numbers from {first} on), and give the folder as --dataset"
        )
    return names


def read_repository_file(dataset: str, name: str, in_cache_alone: bool) -> str | None:
    """The text of a small file of a repository, or of a local folder; None where it is absent or out of reach."""
    path, _ = split_config(dataset)
    try:
        local = Path(path) / name
        if not Path(path).is_dir():
            local = Path(hf_hub_download(path, name, repo_type="dataset", local_files_only=in_cache_alone))
        return local.read_text(encoding="utf-8") if local.is_file() else None
    except (EntryNotFoundError, HfHubHTTPError, TransportError):
        return None


def parse_table(text: str, first: int, where: str) -> list[str]:
    """The names of classes from a JSON dict of them by number, of which those of ignored ones are left out.

    Args:
        first: the number of the first class.

    Raises:
        ValueError: where it is no such dict, or has gaps.
    """
    try:
        names = {int(number): str(name) for number, name in json.loads(text).items()}
    except (AttributeError, ValueError) as error:
        raise ValueError(f'{where} must be like {{"0": "wall", "1": "sky"}} ({error}): write it so') from error
    classes = {number: name for number, name in names.items() if number >= first and number != IGNORED}
    if not classes or sorted(classes) != list(range(first, first + len(classes))):
        raise ValueError(
            f"{where} names {', '.join(map(str, sorted(names)[:8]))}, ...: it must name the classes from {first} on, "
            "without gaps"
        )
    return [classes[number] for number in sorted(classes)]
