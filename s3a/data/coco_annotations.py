"""Reads annotations in COCO's format into columns, and refuses what no training could use.

A million of annotations as Python objects take gigabytes, and each worker would copy them as it counts references. As
arrays they take what their numbers take, and forked workers share them.

The format: Lin et al., "Microsoft COCO: Common Objects in Context", https://cocodataset.org/#format-data.
"""

import hashlib
import json
from array import array
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
from faster_coco_eval import mask as mask_api

from s3a.data.local import explain_access

MOST_EXCESS = 1.0
"""So many pixels may a box reach out of its image, which rounding explains."""
Segmentation = list[list[float]] | bytes
"""Polygons, each column, row, column, row, ... of its corners; or COCO's compressed run lengths (RLE)."""
Record = dict[str, Any]


@dataclass(frozen=True, eq=False)
class Segmentations:
    """The polygons and run lengths of n objects, one behind the other in two buffers.

    Attributes:
        coordinates: [total] float64, of all polygons, each in pairs of column and row.
        polygon_starts: [polygons + 1] int64, where each begins in `coordinates`.
        object_polygons: [n, 2] int64, the number of the first polygon of each object, and that behind its last.
        run_lengths: of all objects that have these instead of polygons.
        run_starts: [n + 1] int64, where those of each object begin.
    """

    coordinates: np.ndarray
    polygon_starts: np.ndarray
    object_polygons: np.ndarray
    run_lengths: bytes
    run_starts: np.ndarray

    def read(self, number: int) -> Segmentation:
        """The segmentation of an object."""
        start, end = self.run_starts[number : number + 2].tolist()
        if end > start:
            return self.run_lengths[start:end]
        first, end = self.object_polygons[number].tolist()
        starts = self.polygon_starts[first : end + 1].tolist()
        return [self.coordinates[start:end].tolist() for start, end in pairwise(starts)]


@dataclass(frozen=True, eq=False)
class Annotations:
    """A file of annotations as columns; those of an image lie one behind the other.

    Attributes:
        path: of the file.
        digest: of its bytes.
        category_ids: sorted; the place of one is its label.
        label_names: in the same order.
        image_ids: [images] int64, in the file's order, as all of the images' columns.
        file_names: [images] of NumPy's texts, relative to the folder of the images.
        sizes: [images, 2] int64, height and width.
        starts: [images + 1] int64, the first annotation of each image.
        ids: [n] int64, what the file calls each annotation.
        labels: [n] int64.
        boxes: [n, 4] float64: left, top, width, height in pixels, as the file has them.
        areas: [n] float64: of the object in pixels; where the file has none, of its box.
        is_crowd: [n] bool: whether it stands for many objects.
        segmentations: None where the objects have boxes alone.
    """

    path: Path
    digest: str
    category_ids: list[int]
    label_names: list[str]
    image_ids: np.ndarray
    file_names: np.ndarray
    sizes: np.ndarray
    starts: np.ndarray
    ids: np.ndarray
    labels: np.ndarray
    boxes: np.ndarray
    areas: np.ndarray
    is_crowd: np.ndarray
    segmentations: Segmentations | None

    @property
    def image_rows(self) -> np.ndarray:
        """[n] int64, the image of each annotation."""
        return np.repeat(np.arange(len(self.image_ids)), np.diff(self.starts))


def read_annotations(path: Path) -> Annotations:
    """The annotations of a file; nothing of the images is read. COCO's take about half a minute.

    Raises:
        ValueError: for a file that is no JSON or lacks a key; ids that are unknown or not unique; boxes that reach out
            of their image; segmentations of no known kind or without a pixel; numbers that are not finite.
    """
    polygons = Polygons()
    parts, digest = parse_parts(path, polygons)
    category_ids, label_names = read_categories(path, parts["categories"])
    image_ids, file_names, sizes = read_images(path, parts["images"])
    ids, rows, records = sort_by_image(path, parts["annotations"], image_ids)

    def name(number: int) -> str:
        """What messages call an annotation."""
        return f"annotation {ids[number]} of {file_names[rows[number]]}"

    labels = find_places(read_integers(path, "annotation", records, "category_id"), np.array(category_ids))
    refuse(
        path,
        labels < 0,
        lambda number: f"{name(number)} of category {records[number]['category_id']}",
        "are of categories that are not listed",
        "list the category in 'categories' or take them out",
    )
    boxes = read_boxes(path, records, sizes[rows], name)
    return Annotations(
        path=path,
        digest=digest,
        category_ids=category_ids,
        label_names=label_names,
        image_ids=image_ids,
        file_names=file_names,
        sizes=sizes,
        starts=np.searchsorted(rows, np.arange(len(image_ids) + 1)),
        ids=ids,
        labels=labels,
        boxes=boxes,
        areas=read_areas(path, records, boxes, name),
        is_crowd=read_crowds(path, records, name),
        segmentations=pack_segmentations(path, records, polygons, sizes[rows], name),
    )


def sort_by_image(
    path: Path, records: Sequence[Record], image_ids: np.ndarray
) -> tuple[np.ndarray, np.ndarray, list[Record]]:
    """The ids of annotations, the rows of their images and the annotations themselves, image by image."""
    ids, of_images = (read_integers(path, "annotation", records, key) for key in ("id", "image_id"))

    def name(number: int) -> str:
        return f"annotation {ids[number]} of image {of_images[number]}"

    refuse(path, find_repeated(ids), name, "have the id of another one", "give each its own")
    rows = find_places(of_images, image_ids)
    refuse(path, rows < 0, name, "are of images that are not listed", "list the image in 'images' or take them out")
    order = np.argsort(rows, kind="stable")
    return ids[order], rows[order], [records[number] for number in order.tolist()]


class Polygons:
    """The polygons of a file in one buffer, filled while the file is parsed: as lists, COCO's would take gigabytes."""

    def __init__(self) -> None:
        self.coordinates, self.starts = array("d"), array("q", [0])

    def pack(self, record: Record) -> Record:
        """The record with the numbers of its polygons in their place; what is no polygon stays, to be refused later."""
        segmentation = record.get("segmentation")
        if isinstance(segmentation, list):
            first = len(self.starts) - 1
            for polygon in segmentation:
                if not isinstance(polygon, list) or len(polygon) < 6 or len(polygon) % 2:
                    return record
                try:
                    self.coordinates.fromlist(polygon)
                except (TypeError, OverflowError):
                    return record
                self.starts.append(len(self.coordinates))
            record["segmentation"] = range(first, len(self.starts) - 1)
        return record


def parse_parts(path: Path, polygons: Polygons) -> tuple[dict[str, list[Record]], str]:
    """The lists of images, annotations and categories, and a hash of the file.

    Args:
        polygons: to be filled with those of the annotations.
    """
    with explain_access(str(path)):
        content = path.read_bytes()
    digest = hashlib.sha256(content).hexdigest()
    try:
        text = content.decode("utf-8-sig")
        del content  # as large as the text
        parts = json.loads(text, object_hook=polygons.pack)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is no JSON ({error}): get it again, or export it again") from error
    for key in ("images", "annotations", "categories"):
        if not isinstance(parts, dict) or not isinstance(parts.get(key), list) or not parts[key]:
            raise ValueError(
                f"{path} has no list {key!r}, or an empty one: it must be an object with lists of images, annotations "
                "and categories, as those of COCO's instances; export it again in that format"
            )
        for number, record in enumerate(parts[key]):
            if not isinstance(record, dict):
                raise ValueError(f"{path}: entry {number} of {key!r} is {record!r:.60}: it must be an object; mend it")
    return parts, digest


# --------------------------------------------------------------------------------------------------------
# Columns
# --------------------------------------------------------------------------------------------------------


def refuse(path: Path, faulty: np.ndarray, name: Callable[[int], str], fault: str, remedy: str) -> None:
    """Raises ValueError where any record of a file is faulty: how many are, the first by its name, and what helps."""
    if faulty.any():
        numbers = np.flatnonzero(faulty)
        raise ValueError(f"{path}: {len(numbers)} records {fault}, the first is {name(int(numbers[0]))}: {remedy}")


def read_values(path: Path, kind: str, records: Sequence[Record], key: str, types: tuple[type, ...]) -> list[Any]:
    """The values of a key that every record must have, each of one of these types."""
    values = [record.get(key) for record in records]
    if not {*map(type, values)} <= {*types}:  # a bool is no int here
        number = next(number for number, value in enumerate(values) if type(value) not in types)
        wanted = " or ".join(
            {int: "a whole number", float: "a number", str: "a text", list: "a list"}[t] for t in types
        )
        which = f"with id {records[number]['id']}" if "id" in records[number] else f"number {number}"
        given = f"is {values[number]!r:.60}" if key in records[number] else "is absent"
        raise ValueError(
            f"{path}: {key!r} of the {kind} {which} {given}: it must be {wanted}; mend it or export the file again"
        )
    return values


def read_integers(path: Path, kind: str, records: Sequence[Record], key: str) -> np.ndarray:
    """[n] int64: the whole numbers under a key."""
    values = read_values(path, kind, records, key, (int,))
    try:
        return np.array(values, np.int64)
    except OverflowError as error:
        raise ValueError(f"{path}: {key!r} of {kind}s is up to {max(values)}: it must have 64 bits at most") from error


def read_categories(path: Path, records: Sequence[Record]) -> tuple[list[int], list[str]]:
    """The ids of the categories, sorted, and their names."""
    ids = read_integers(path, "category", records, "id")
    names = np.array(read_values(path, "category", records, "name", (str,)), object)
    for column, what in ((ids, "id"), (names, "name")):
        refuse(
            path,
            find_repeated(column),
            lambda number: f"category {names[number]!r} with id {ids[number]}",
            f"of 'categories' have the {what} of another one",
            "give each its own",
        )
    order = np.argsort(ids)
    return ids[order].tolist(), names[order].tolist()


def read_images(path: Path, records: Sequence[Record]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The ids, file names and sizes of the images."""
    ids, heights, widths = (read_integers(path, "image", records, key) for key in ("id", "height", "width"))
    names = np.array(read_values(path, "image", records, "file_name", (str,)))
    sizes = np.stack([heights, widths], 1)  # [images, 2]

    def name(number: int) -> str:
        return f"image {ids[number]}, {str(names[number])!r} of {heights[number]} x {widths[number]} pixels"

    refuse(path, find_repeated(ids), name, "of 'images' have the id of another one", "give each its own")
    refuse(path, find_repeated(names), name, "of 'images' have the file of another one", "list it once")
    refuse(path, sizes.min(1) < 1, name, "of 'images' have no height or width", "write those of the file")
    outside = np.array([not is_inside(file_name) for file_name in names.tolist()])
    refuse(
        path, outside, name, "of 'images' lead out of the folder", "write names relative to the folder of the images"
    )
    return ids, names, sizes


def is_inside(file_name: str) -> bool:
    """Whether a path of a file of others stays below the folder that it is relative to."""
    parts = PurePosixPath(file_name).parts
    return bool(parts) and parts[0] != "/" and ".." not in parts and "\0" not in file_name


def read_boxes(path: Path, records: Sequence[Record], sizes: np.ndarray, name: Callable[[int], str]) -> np.ndarray:
    """[n, 4] float64: left, top, width, height.

    Args:
        sizes: [n, 2], height and width of the image of each.
    """
    values = read_values(path, "annotation", records, "bbox", (list,))
    wrong = np.array([len(box) != 4 or not {*map(type, box)} <= {int, float} for box in values])
    refuse(path, wrong, name, "have a bbox that is not four numbers", "write left, top, width, height in pixels")
    boxes = read_floats(path, values)
    height, width = sizes.T
    left, top, right, bottom = find_corners(boxes).T

    def describe(number: int) -> str:
        box = ", ".join(f"{value:g}" for value in boxes[number])
        return f"{name(number)} with bbox {box} (left, top, width, height) on {height[number]} x {width[number]} pixels"

    refuse(path, ~np.isfinite(boxes).all(1), describe, "have a bbox with numbers that are not finite", "mend them")
    refuse(path, boxes[:, 2:].min(1) < 0, describe, "have a bbox of negative size", "order its corners")
    excess: np.ndarray = np.max([-left, -top, right - width, bottom - height], axis=0)
    beyond = (excess > MOST_EXCESS) | (left >= width) | (top >= height) | (right < 0) | (bottom < 0)
    remedy = "write bbox as left, top, width, height in pixels of that image, or cut them to it"
    refuse(
        path, beyond, describe, f"have a bbox that reaches out of its image by more than {MOST_EXCESS:g} pixel", remedy
    )
    return boxes


def read_floats(path: Path, values: Sequence[Any]) -> np.ndarray:
    """An array of numbers; ValueError for those that a float cannot hold."""
    try:
        return np.array(values, np.float64)
    except OverflowError as error:
        raise ValueError(f"{path} has a number of more digits than a float holds: mend it") from error


def find_corners(boxes: np.ndarray) -> np.ndarray:
    """[n, 4]: left, top, right, bottom of boxes with left, top, width, height."""
    return np.concatenate([boxes[:, :2], boxes[:, :2] + boxes[:, 2:]], 1)


def read_areas(path: Path, records: Sequence[Record], boxes: np.ndarray, name: Callable[[int], str]) -> np.ndarray:
    """[n] float64: the area that AP sorts objects into small, medium and large by."""
    values = [record.get("area") for record in records]
    wrong = np.array([value is not None and type(value) not in (int, float) for value in values])
    refuse(path, wrong, name, "have an area that is no number", "write that of the object in pixels, or leave it out")
    of_boxes = boxes[:, 2] * boxes[:, 3]
    areas = read_floats(path, [box if value is None else value for value, box in zip(values, of_boxes, strict=True)])
    wrong = ~np.isfinite(areas) | (areas < 0)
    refuse(path, wrong, name, "have an area that is negative or not finite", "write that of the object in pixels")
    return areas


def read_crowds(path: Path, records: Sequence[Record], name: Callable[[int], str]) -> np.ndarray:
    """[n] bool; False where the file says nothing."""
    values = [record.get("iscrowd", 0) for record in records]
    wrong = np.array([value not in (0, 1) for value in values])
    refuse(path, wrong, name, "have an iscrowd that is neither 0 nor 1", "write one of them")
    return np.array(values, bool)


def find_repeated(values: np.ndarray) -> np.ndarray:
    """[n] bool: whether the same value stands further up."""
    first = np.zeros(len(values), bool)
    first[np.unique(values, return_index=True)[1]] = True
    return ~first


def find_places(values: np.ndarray, known: np.ndarray) -> np.ndarray:
    """[n] int64: where each value stands among the known ones, or -1."""
    order = np.argsort(known)
    places = order[np.searchsorted(known[order], values).clip(max=len(known) - 1)]
    return np.where(known[places] == values, places, -1)


# --------------------------------------------------------------------------------------------------------
# Segmentations
# --------------------------------------------------------------------------------------------------------


def pack_segmentations(
    path: Path, records: Sequence[Record], polygons: Polygons, sizes: np.ndarray, name: Callable[[int], str]
) -> Segmentations | None:
    """The segmentations of all records; None where no record has one.

    Args:
        polygons: that were found in the file.
        sizes: [n, 2], height and width of the image of each.
    """
    values = [record.get("segmentation") or None for record in records]
    absent = np.array([value is None for value in values])
    if absent.all():
        return None
    refuse(path, absent, name, "have no segmentation, and others have", "draw them, or leave out 'segmentation' of all")
    unpacked = np.array([isinstance(value, list) for value in values])
    remedy = "write a list of polygons, each a list of column, row, column, row, ... in pixels, of at least 3 points"
    refuse(path, unpacked, name, "have a segmentation that is no list of polygons", remedy)
    encoded: list[bytes] = []
    for number, value in enumerate(values):
        try:
            encoded.append(b"" if isinstance(value, range) else encode_run_lengths(value, *sizes[number].tolist()))
        except ValueError as error:
            raise ValueError(f"{path}: the segmentation of {name(number)} {error}") from error
    segmentations = Segmentations(
        coordinates=np.asarray(polygons.coordinates),
        polygon_starts=np.asarray(polygons.starts),
        object_polygons=np.array(
            [(value.start, value.stop) if isinstance(value, range) else (0, 0) for value in values], np.int64
        ),
        run_lengths=b"".join(encoded),
        run_starts=np.cumsum([0, *map(len, encoded)], dtype=np.int64),
    )
    check_polygons(path, segmentations, sizes, name)
    return segmentations


def check_polygons(path: Path, packed: Segmentations, sizes: np.ndarray, name: Callable[[int], str]) -> None:
    """Raises ValueError for polygons with NaN, or that lie so far outside that to fill them takes for ever."""
    firsts, ends = packed.object_polygons.T
    counts = ends - firsts
    objects = np.repeat(np.arange(len(counts)), counts)  # of each polygon, object by object
    if not len(objects):
        return
    numbers = np.arange(len(objects)) + np.repeat(firsts - (np.cumsum(counts) - counts), counts)  # of these polygons
    points, starts = packed.coordinates.reshape(-1, 2), packed.polygon_starts[:-1] // 2
    lowest, highest = (edge.reduceat(points, starts)[numbers] for edge in (np.minimum, np.maximum))  # [polygons, 2]
    extent = sizes[objects][:, ::-1]  # width, height

    def refuse_polygons(faulty: np.ndarray, fault: str, remedy: str) -> None:
        refuse(path, np.bincount(objects[faulty], minlength=len(sizes)) > 0, name, fault, remedy)

    infinite = ~np.all(np.isfinite(lowest) & np.isfinite(highest), axis=1)
    refuse_polygons(infinite, "have a polygon with numbers that are not finite", "mend them")
    far = np.any((lowest < -extent) | (highest > 2 * extent), axis=1)
    remedy = "write column, row, column, row, ... in pixels of that image"
    refuse_polygons(far, "have a polygon that lies farther outside of its image than that is large", remedy)


def encode_run_lengths(value: object, height: int, width: int) -> bytes:
    """COCO's compressed run lengths of a mask of this size; ValueError for what is none, or has no pixel."""
    if not isinstance(value, dict) or not isinstance(value.get("counts"), str | list):
        raise ValueError(
            "is neither polygons nor run lengths: write a list of polygons, or an object with size, counts"
        )
    if value.get("size") != [height, width]:
        raise ValueError(
            f"has the size {value.get('size')!r}: it must be that of its image, [{height}, {width}] (height, width)"
        )
    encoded, remedy = value, "export it again"
    if isinstance(value["counts"], list):
        counts = value["counts"]
        if {*map(type, counts)} != {int} or min(counts) < 0 or sum(counts) != height * width:
            raise ValueError(f"has counts that are not the lengths of runs over {height} x {width} pixels: {remedy}")
        encoded = mask_api.segmToRle(value, width, height)
        is_empty = not sum(counts[1::2])
    else:
        try:
            is_empty = not mask_api.decode(value).any()
        except (ValueError, RuntimeError) as error:
            raise ValueError(f"cannot be decoded ({' '.join(str(error).split())[:120]}): {remedy}") from error
    if is_empty:
        raise ValueError(f"has no pixel: {remedy}, or take it out")
    return encoded["counts"] if isinstance(encoded["counts"], bytes) else encoded["counts"].encode()
