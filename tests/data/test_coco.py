"""Data in COCO's format: targets that pycocotools would draw, and one line for each fault."""

import contextlib
import copy
import io
import json
import os
import pickle
import warnings

import numpy as np
import pytest
import torch
from helpers.numbered_images import make_loader
from PIL import Image
from pycocotools import mask as oracle_masks
from pycocotools.coco import COCO

from s3a.data import EvalLoader
from s3a.data.coco import load_coco
from s3a.data.decode import UnreadableImageError
from s3a.data.targets import split_targets

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # of pycocotools

HEIGHT, WIDTH = 40, 50
LAYOUTS = {
    "coco": ("train2017", "annotations/instances_train2017.json", "val2017", "annotations/instances_val2017.json"),
    "plain": ("train", "annotations/instances_train.json", "val", "annotations/instances_val.json"),
    "roboflow": ("train", "train/_annotations.coco.json", "valid", "valid/_annotations.coco.json"),
}
SQUARE = [10.0, 5.0, 20.5, 5.0, 20.5, 15.0, 10.0, 15.0]
TRIANGLE = [30.2, 20.1, 45.7, 38.0, 30.2, 38.0]
SPECK = [3.1, 3.1, 4.4, 3.1, 4.4, 3.15, 3.1, 3.15]
"""No pixel's centre is inside."""


def draw_rectangle(top, left, bottom, right):
    mask = np.zeros((HEIGHT, WIDTH), np.uint8, order="F")
    mask[top:bottom, left:right] = 1
    return mask


def count_runs(mask):
    """Uncompressed run lengths, column by column, beginning with those of 0."""
    flat = mask.ravel(order="F")
    edges = np.flatnonzero(np.diff(np.concatenate([[0], flat]))).tolist()
    return {"size": [HEIGHT, WIDTH], "counts": np.diff([0, *edges, len(flat)]).tolist()}


def compress(mask):
    encoded = oracle_masks.encode(mask)
    return {"size": [HEIGHT, WIDTH], "counts": encoded["counts"].decode()}


def make_annotation(id_, image_id, category_id, segmentation, bbox, iscrowd=0):
    return {
        "id": id_,
        "image_id": image_id,
        "category_id": category_id,
        "segmentation": segmentation,
        "bbox": bbox,
        "area": bbox[2] * bbox[3] * 0.75,
        "iscrowd": iscrowd,
    }


def make_content():
    """Five images, of which the third has a crowd alone and the fourth nothing. Annotations lie in no order."""
    crowd = draw_rectangle(2, 3, 30, 40)
    return {
        "images": [
            {"id": id_, "file_name": f"{id_:05}.png", "height": HEIGHT, "width": WIDTH} for id_ in (70, 7, 12, 33, 1)
        ],
        "categories": [{"id": 90, "name": "toothbrush"}, {"id": 3, "name": "car"}],
        "annotations": [
            make_annotation(5, 7, 90, [SQUARE], [10, 5, 10.5, 10]),
            make_annotation(901, 70, 3, [SQUARE, TRIANGLE], [10, 5, 35.7, 33]),
            make_annotation(12, 7, 3, count_runs(crowd), [3, 2, 37, 28], iscrowd=1),
            make_annotation(13, 12, 3, count_runs(crowd), [3, 2, 37, 28], iscrowd=1),
            make_annotation(2, 70, 90, compress(draw_rectangle(0, 0, 7, 9)), [0, 0, 9, 7]),
            make_annotation(77, 1, 90, [TRIANGLE], [30.2, 20.1, 15.5, 17.9]),
        ],
    }


def write_data(folder, train=None, val=None, layout="coco", images=True):
    """A folder in a layout; the image of row i is full of i."""
    for split, images_dir, path in zip(("train", "val"), LAYOUTS[layout][::2], LAYOUTS[layout][1::2], strict=True):
        content = {"train": train, "val": val}[split] or make_content()
        (folder / images_dir).mkdir(parents=True, exist_ok=True)
        (folder / path).parent.mkdir(exist_ok=True)
        (folder / path).write_text(json.dumps(content))
        for i, image in enumerate(content["images"] if images else ()):
            Image.new("RGB", (image["width"], image["height"]), (i, i, i)).save(
                folder / images_dir / image["file_name"]
            )
    return folder


def decode_all(images):
    """What pycocotools calls each image, and its decoded target."""
    rows = images.read_rows(list(range(images.num_images)))
    return {id_: row.target.decode(HEIGHT, WIDTH) for id_, row in zip(images.image_ids, rows, strict=True)}


def load_with_oracle(content):
    with contextlib.redirect_stdout(io.StringIO()):
        oracle = COCO()
        oracle.dataset = copy.deepcopy(content)
        oracle.createIndex()
    return oracle


def check_targets(targets, content):
    """The targets are what pycocotools reads from the content: boxes, masks, classes by id, crowds."""
    oracle = load_with_oracle(content)
    assert sum(len(target["labels"]) for target in targets.values()) > 0
    for image_id, target in targets.items():
        annotations = oracle.imgToAnns[image_id]
        corners = [[x, y, x + width, y + height] for x, y, width, height in (each["bbox"] for each in annotations)]
        masks = [oracle.annToMask(each) for each in annotations]
        assert torch.allclose(target["boxes"], torch.tensor(corners, dtype=torch.float32).reshape(-1, 4), atol=1e-5)
        assert np.array_equal(target["masks"], np.array(masks, np.uint8).reshape(-1, HEIGHT, WIDTH))
        assert target["labels"].tolist() == [[3, 90].index(each["category_id"]) for each in annotations]
        assert target["is_crowd"].tolist() == [bool(each["iscrowd"]) for each in annotations]


# --------------------------------------------------------------------------------------------------------
# Rows and targets
# --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", LAYOUTS)
def test_targets_are_those_of_pycocotools_in_each_layout(tmp_path, layout):
    data = load_coco(write_data(tmp_path, layout=layout))
    assert data.label_names == ["car", "toothbrush"]
    for images, ids in ((data.train, [70, 7, 1]), (data.val, [70, 7, 12, 33, 1])):
        assert list(images.category_ids) == [3, 90] and images.has_masks
        assert images.image_ids == ids and images.num_images == len(ids)
        check_targets(decode_all(images), make_content())
    assert data.train.read_rows([2])[0].encoded == tmp_path / LAYOUTS[layout][0] / "00001.png"


def test_random_polygons_are_drawn_as_pycocotools_draws_them(tmp_path):
    content, rng = make_content(), np.random.default_rng(0)
    content["annotations"] = [
        make_annotation(i + 1, int(rng.choice([70, 7, 12])), 3, polygons, [0, 0, 50, 40])
        for i, polygons in enumerate(
            [(rng.random((n, 2)) * [WIDTH, HEIGHT]).round(2).ravel().tolist() for n in rng.integers(3, 20, parts)]
            for parts in rng.integers(1, 4, 40)
        )
    ]
    check_targets(decode_all(load_coco(write_data(tmp_path, val=content)).val), content)


def test_images_and_targets_stay_together_on_any_number_of_processes_and_workers(tmp_path):
    data = load_coco(write_data(tmp_path))
    targets = decode_all(data.train)

    def keep(image, target):
        return torch.from_numpy(np.asarray(image).copy()).permute(2, 0, 1), target

    for num_processes, num_workers in ((1, 0), (1, 2), (3, 0)):
        seen = []
        for process in range(num_processes):
            loader = make_loader(
                data.train,
                keep,
                batch_size=3,
                num_workers=num_workers,
                process_index=process,
                num_processes=num_processes,
            )
            batches = [batch for step in loader.epoch(0) for batch in step]
            seen += [
                each
                for batch in batches
                for each in zip(batch.indices, batch.images, split_targets(batch.targets), strict=True)
            ]
        assert sorted(int(index) for index, _, _ in seen) == [0, 1, 2]
        for index, image, target in seen:
            assert (image == (0, 1, 4)[index]).all()  # rows of the file
            expected = targets[data.train.image_ids[index]]
            assert target.keys() == expected.keys()
            assert all(torch.equal(target[key], expected[key]) for key in target)


def test_a_split_is_sent_to_other_processes_as_arrays(tmp_path):
    content = make_content()
    content["annotations"] *= 200
    content["annotations"] = [{**each, "id": i + 1} for i, each in enumerate(content["annotations"])]
    images = load_coco(write_data(tmp_path, train=content)).train
    sent = pickle.dumps(images)
    assert len(sent) < len(json.dumps(content))
    check_targets(decode_all(pickle.loads(sent)), {**content})


def test_boxes_are_clipped_within_a_pixel(tmp_path):
    content = make_content()
    content["annotations"][0]["bbox"] = [-0.9, 3, 51.5, 37.5]
    data = load_coco(write_data(tmp_path, train=content, val=content))
    assert decode_all(data.train)[7]["boxes"][0].tolist() == [0, 3, WIDTH, HEIGHT]
    assert data.val.build_ground_truth()["annotations"][2]["bbox"] == [-0.9, 3, 51.5, 37.5]


def test_training_leaves_out_images_without_objects_to_learn(tmp_path):
    content = make_content()
    content["images"] += [{"id": 99, "file_name": "small.png", "height": 31, "width": 50}]
    content["annotations"] += [make_annotation(6, 99, 3, [SQUARE], [10, 5, 10.5, 10])]
    content["annotations"][5]["bbox"][3] = 0.0  # the only object of image 1; COCO has two without a height
    folder = write_data(tmp_path, train=content, val=content)
    with pytest.warns(UserWarning, match=r"1 of 7 objects are not trained on.*annotation 77 of 00001\.png"):
        data = load_coco(folder)
    assert data.train.image_ids == [70, 7]
    assert data.val.image_ids == [70, 7, 12, 33, 1, 99]
    assert len(data.val.read_rows([4])[0].target.decode(HEIGHT, WIDTH)["labels"]) == 0
    assert 77 in [each["id"] for each in data.val.build_ground_truth()["annotations"]]


def test_an_object_without_a_pixel_is_in_no_target(tmp_path):
    content = make_content()
    content["annotations"][0]["segmentation"] = [SPECK]
    assert load_with_oracle(content).annToMask(content["annotations"][0]).sum() == 0
    target = decode_all(load_coco(write_data(tmp_path, train=content)).train)[7]
    assert target["is_crowd"].tolist() == [True]
    assert target["masks"].shape == (1, HEIGHT, WIDTH) and target["boxes"].shape == (1, 4)


@pytest.mark.parametrize("segmentation", [None, []])
def test_boxes_alone_are_targets_without_masks(tmp_path, segmentation):
    content = make_content()
    for annotation in content["annotations"]:
        annotation["segmentation"] = segmentation
    data = load_coco(write_data(tmp_path, train=content, val=content))
    assert not data.train.has_masks and not data.val.has_masks
    for target in (*decode_all(data.train).values(), data.val.blank.decode(32, 32)):
        assert target.keys() == {"boxes", "labels", "is_crowd"}
    target = decode_all(data.train)[70]
    assert target["boxes"].canvas_size == (HEIGHT, WIDTH)
    assert torch.allclose(target["boxes"], torch.tensor([[10, 5, 45.7, 38], [0, 0, 9, 7]]))
    assert "segmentation" not in data.val.build_ground_truth()["annotations"][0]


def test_a_blank_target_has_masks_where_data_have(tmp_path):
    blank = load_coco(write_data(tmp_path)).val.blank.decode(32, 48)
    assert blank["masks"].shape == (0, 32, 48) and blank["boxes"].shape == (0, 4) and blank["is_crowd"].shape == (0,)


def test_the_ground_truth_is_that_of_the_file(tmp_path):
    content = make_content()
    truth = load_coco(write_data(tmp_path, images=False)).val.build_ground_truth()
    assert truth["images"] == content["images"]
    assert truth["categories"] == sorted(content["categories"], key=lambda category: category["id"])
    found = {each["id"]: each for each in truth["annotations"]}
    oracle = load_with_oracle(truth)
    for annotation in content["annotations"]:
        each = found.pop(annotation["id"])
        assert {**each, "segmentation": annotation["segmentation"]} == annotation
        expected = load_with_oracle(content).annToMask(annotation)
        assert np.array_equal(oracle.annToMask(each), expected)
    assert not found


def test_keys_that_exporters_leave_out_have_defaults(tmp_path):
    content = make_content()
    for annotation in content["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    annotation = load_coco(write_data(tmp_path, val=content)).val.build_ground_truth()["annotations"][1]
    assert (annotation["area"], annotation["iscrowd"]) == (63, 0)  # of the box of 9 x 7


def test_the_fingerprint_follows_the_annotations(tmp_path):
    first = load_coco(write_data(tmp_path)).fingerprint
    path = tmp_path / LAYOUTS["coco"][3]
    times = path.stat()
    assert load_coco(write_data(tmp_path)).fingerprint == first
    path.write_text(path.read_text().replace("20.1", "20.2"))
    os.utime(path, ns=(times.st_atime_ns, times.st_mtime_ns))
    assert load_coco(tmp_path).fingerprint != first


# --------------------------------------------------------------------------------------------------------
# Faults of images
# --------------------------------------------------------------------------------------------------------


def test_images_that_are_missing_or_have_another_size_are_named(tmp_path):
    data = load_coco(write_data(tmp_path))
    folder = tmp_path / "val2017"
    (folder / "00070.png").unlink()
    Image.new("RGB", (HEIGHT, WIDTH)).save(folder / "00007.png")  # turned
    [batch] = EvalLoader(data.val, lambda image, target: (torch.zeros(3, 8, 8), target), channels=3, batch_size=5)
    assert batch.unreadable == {
        f"{folder}/00070.png": "it does not exist",
        f"{folder}/00007.png": "it has 50 x 40 pixels, and its annotations are for 40 x 50",
    }
    assert batch.labels.tolist() == [-1, -1, 0, 0, 0]
    with pytest.raises(UnreadableImageError, match="annotate the image as it is now"):
        data.val.read_rows([1])[0].target.decode(WIDTH, HEIGHT)


# --------------------------------------------------------------------------------------------------------
# Faults of annotations
# --------------------------------------------------------------------------------------------------------


def set_first(**values):
    return lambda content: content["annotations"][0].update(values)


def set_image(**values):
    return lambda content: content["images"][1].update(values)


def set_runs(**values):
    return lambda content: content["annotations"][2]["segmentation"].update(values)


def drop(part, key):
    return lambda content: content[part][0].pop(key)


FAULTS = [
    (lambda content: content.pop("categories"), "has no list 'categories', or an empty one"),
    (lambda content: content.update(annotations={}), "has no list 'annotations', or an empty one"),
    (lambda content: content["images"].append(3), "entry 5 of 'images' is 3: it must be an object"),
    (drop("annotations", "bbox"), "'bbox' of the annotation with id 5 is absent: it must be a list"),
    (drop("annotations", "id"), "'id' of the annotation number 0 is absent: it must be a whole number"),
    (drop("images", "width"), "'width' of the image with id 70 is absent: it must be a whole number"),
    (set_first(image_id="7"), "'image_id' of the annotation with id 5 is '7': it must be a whole number"),
    (set_first(category_id=True), "'category_id' of the annotation with id 5 is True"),
    (set_first(id=2**70), "it must have 64 bits at most"),
    (set_first(id=12), "1 records have the id of another one, the first is annotation 12 of image 7"),
    (set_first(image_id=8), "1 records are of images that are not listed, the first is annotation 5 of image 8"),
    (set_first(category_id=4), "not listed, the first is annotation 5 of 00007.png of category 4: list the category"),
    (set_first(bbox=[1, 2, 3]), "bbox that is not four numbers, the first is annotation 5 of 00007.png"),
    (set_first(bbox=[1, 2, "3", 4]), "bbox that is not four numbers"),
    (set_first(bbox=[1, 2, float("nan"), 4]), "numbers that are not finite, the first is annotation 5 of 00007.png"),
    (set_first(bbox=[1, 2, 10**400, 4]), "more digits than a float holds"),
    (set_first(bbox=[20, 2, -3, 4]), "bbox of negative size, the first is annotation 5"),
    (set_first(bbox=[10, 5, 41.5, 3]), r"reaches out of its image by more than 1 pixel.*bbox 10, 5, 41.5, 3 .*40 x 50"),
    (set_first(bbox=[10, -1.5, 3, 3]), "reaches out of its image by more than 1 pixel"),
    (set_first(bbox=[50.5, 3, 0.2, 3]), "reaches out of its image"),
    (set_first(area=-1), "area that is negative or not finite, the first is annotation 5"),
    (set_first(area="large"), "area that is no number"),
    (set_first(iscrowd=2), "iscrowd that is neither 0 nor 1"),
    (
        set_first(segmentation=[[1, 2, 3, 4]]),
        "no list of polygons, the first is annotation 5 of 00007.png: .*at least 3 points",
    ),
    (set_first(segmentation=[SQUARE, []]), "no list of polygons"),
    (set_first(segmentation=[[*SQUARE, 1]]), "no list of polygons"),
    (set_first(segmentation=[[*SQUARE, 1, None]]), "no list of polygons"),
    (set_first(segmentation=SQUARE), "no list of polygons"),
    (set_first(segmentation=[[*SQUARE, 1, float("inf")]]), "polygon with numbers that are not finite"),
    (set_first(segmentation=[[*SQUARE, 1, 1e9]]), "farther outside of its image than that is large"),
    (set_first(segmentation="none"), "segmentation of annotation 5 of 00007.png is neither polygons nor run lengths"),
    (set_first(segmentation=[]), "1 records have no segmentation, and others have, the first is annotation 5"),
    (set_runs(size=[WIDTH, HEIGHT]), r"annotation 12 of 00007.png has the size \[50, 40\]: it must be .*\[40, 50\]"),
    (
        set_runs(counts=[5, 5]),
        "annotation 12 of 00007.png has counts that are not the lengths of runs over 40 x 50 pixels",
    ),
    (set_runs(counts=[5, 1994.5, 0.5]), "counts that are not the lengths of runs"),
    (set_runs(counts="\u20ac"), "annotation 12 of 00007.png cannot be decoded"),
    (set_runs(counts=compress(draw_rectangle(0, 0, 0, 0))["counts"]), "annotation 12 of 00007.png has no pixel"),
    (set_runs(counts="zzzz"), "annotation 12 of 00007.png cannot be decoded"),
    (set_runs(counts=[-5, 2005]), "counts that are not the lengths of runs"),
    (set_runs(counts=[2000]), "annotation 12 of 00007.png has no pixel"),
    (set_image(id=70), "'images' have the id of another one, the first is image 70, '00007.png'"),
    (set_image(file_name="00070.png"), "have the file of another one, the first is image 7"),
    (set_image(file_name="/etc/passwd"), "lead out of the folder, the first is image 7"),
    (set_image(file_name="a/../../b.png"), "lead out of the folder"),
    (set_image(height=0), "no height or width, the first is image 7"),
    (lambda content: content["categories"][0].update(id=3), "'categories' have the id of another one"),
    (lambda content: content["categories"][0].update(name="car"), "'categories' have the name of another one"),
]


@pytest.mark.parametrize(("spoil", "message"), FAULTS, ids=[message[:60] for _, message in FAULTS])
@pytest.mark.parametrize("split", ["train", "val"])
def test_faults_of_annotations_are_one_line_with_the_file(tmp_path, spoil, message, split):
    content = make_content()
    spoil(content)
    write_data(tmp_path, images=False, **{split: content})
    with pytest.raises(ValueError, match=message) as error:
        load_coco(tmp_path)
    assert "\n" not in str(error.value)
    assert str(tmp_path / LAYOUTS["coco"][1 if split == "train" else 3]) in str(error.value)


@pytest.mark.parametrize("text", ["", "{", "[1, 2]", "\xff", '{"images": ' + "[" * 100_000])
def test_files_that_are_no_annotations_are_named(tmp_path, text):
    write_data(tmp_path, images=False)
    (tmp_path / LAYOUTS["coco"][1]).write_text(text, encoding="latin-1")
    with pytest.raises(ValueError, match=r"instances_train2017\.json (is no JSON|has no list)"):
        load_coco(tmp_path)


@pytest.mark.parametrize("name", LAYOUTS["coco"])
def test_a_part_that_is_missing_is_named_with_the_known_layouts(tmp_path, name):
    write_data(tmp_path, images=False)
    (tmp_path / name).rename(tmp_path / "elsewhere")
    with pytest.raises(FileNotFoundError, match=rf"{name} does not exist.*_annotations\.coco\.json"):
        load_coco(tmp_path)


def test_a_folder_of_no_known_layout_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError, match="no annotations in COCO's format: it must hold train2017/ with"):
        load_coco(tmp_path)
    with pytest.raises(FileNotFoundError, match="absent' does not exist: it must hold train2017/ with"):
        load_coco(tmp_path / "absent")


def test_splits_with_different_categories_are_an_error(tmp_path):
    content = make_content()
    content["categories"][0]["name"] = "brush"
    write_data(tmp_path, val=content, images=False)
    with pytest.raises(ValueError, match=r"category 90 is 'toothbrush' in .*train2017\.json and 'brush' in .*val2017"):
        load_coco(tmp_path)
    content["categories"][0] = {"id": 91, "name": "toothbrush"}
    content["annotations"] = content["annotations"][1:4]
    write_data(tmp_path, val=content, images=False)
    with pytest.raises(ValueError, match=r"category 90 is 'toothbrush' in .* and absent in"):
        load_coco(tmp_path)


def test_segmentations_in_one_split_alone_are_an_error(tmp_path):
    content = make_content()
    for annotation in content["annotations"]:
        del annotation["segmentation"]
    write_data(tmp_path, val=content, images=False)
    with pytest.raises(ValueError, match=r"val2017\.json has no segmentations and .*train2017\.json has"):
        load_coco(tmp_path)


def test_nothing_to_train_on_is_an_error(tmp_path):
    content = make_content()
    content["annotations"] = content["annotations"][2:4]  # crowds
    write_data(tmp_path, train=content, images=False)
    with warnings.catch_warnings(), pytest.raises(ValueError, match=r"train2017\.json has no image to train on"):
        load_coco(tmp_path)
