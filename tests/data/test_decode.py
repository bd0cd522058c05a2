"""Image files of every kind come as the same picture."""

import io
import os
import socket
import warnings
from pathlib import Path

import numpy as np
import pytest
from helpers.alarm import stop_after
from PIL import Image

from s3a.data import decode
from s3a.data.decode import (
    MAX_ENCODED_BYTES,
    UnreadableImageError,
    choose_mode,
    decode_image,
    read_image,
    silence_pillow,
)

ROWS, COLUMNS = 24, 40
GRAY = np.add.outer(np.arange(ROWS) * 4, np.arange(COLUMNS) * 3).astype(np.uint8)  # 0 to 209, no symmetry
SIXTEEN = GRAY.astype(np.uint16) * 256 + 131
COLORS = np.stack([GRAY, GRAY // 2, 255 - GRAY], axis=-1)


def written(image: Image.Image, path: Path, **options: object) -> Path:
    image.save(path, **options)
    return path


def difference(path: Path, right: np.ndarray) -> int:
    """The largest, in levels of 255."""
    read = np.asarray(read_image(path)).astype(int)
    assert read.shape == (ROWS, COLUMNS, 3)
    return int(np.abs(read - (right if right.ndim == 3 else right[..., None])).max())


@pytest.mark.parametrize("ending", ["png", "webp", "tiff", "bmp", "ppm", "tga"])
def test_colours_without_loss(tmp_path: Path, ending: str):
    path = written(
        Image.fromarray(COLORS), tmp_path / f"a.{ending}", **({"lossless": True} if ending == "webp" else {})
    )
    assert difference(path, COLORS) == 0


def test_jpeg(tmp_path: Path):
    assert difference(written(Image.fromarray(COLORS), tmp_path / "a.jpg", quality=98), COLORS) <= 6
    assert difference(written(Image.fromarray(GRAY), tmp_path / "b.jpg", quality=98), GRAY) <= 3
    assert difference(written(Image.fromarray(COLORS).convert("CMYK"), tmp_path / "c.jpg", quality=98), COLORS) <= 6


def test_gray_and_bits(tmp_path: Path):
    assert difference(written(Image.fromarray(GRAY), tmp_path / "a.png"), GRAY) == 0
    black_and_white = np.where(GRAY > 100, 255, 0)
    assert difference(written(Image.fromarray(black_and_white == 255), tmp_path / "b.png"), black_and_white) == 0


@pytest.mark.parametrize("ending", ["png", "tiff", "pgm"])
def test_sixteen_bits_keep_their_range(tmp_path: Path, ending: str):
    """Pillow alone would make nearly all of it white."""
    path = written(Image.fromarray(SIXTEEN), tmp_path / f"a.{ending}")
    assert difference(path, GRAY) == 0


def test_big_endian_sixteen_bits(tmp_path: Path):
    (tmp_path / "a.pgm").write_bytes(b"P5 40 24 65535\n" + SIXTEEN.astype(">u2").tobytes())
    assert difference(tmp_path / "a.pgm", GRAY) == 0


def test_transparency_is_left_out(tmp_path: Path):
    """As for training; and without the warning that Pillow has for palettes."""
    alpha = np.full((ROWS, COLUMNS, 1), 7, dtype=np.uint8)
    assert difference(written(Image.fromarray(np.concatenate([COLORS, alpha], -1)), tmp_path / "a.png"), COLORS) == 0
    palette = Image.fromarray(GRAY).convert("P")
    path = written(palette, tmp_path / "b.png", transparency=bytes(range(256)))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert difference(path, GRAY) == 0


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int):
    """How a camera stores the picture, by the table of the EXIF standard: where row 0 and column 0 of the file are."""
    stored = {
        1: COLORS,
        2: COLORS[:, ::-1],
        3: COLORS[::-1, ::-1],
        4: COLORS[::-1],
        5: COLORS.swapaxes(0, 1),
        6: COLORS.swapaxes(0, 1)[::-1],
        7: COLORS.swapaxes(0, 1)[::-1, ::-1],
        8: COLORS.swapaxes(0, 1)[:, ::-1],
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = written(Image.fromarray(np.ascontiguousarray(stored)), tmp_path / "a.png", exif=exif)
    assert difference(path, COLORS) == 0


def test_exif_orientation_of_sixteen_bits(tmp_path: Path):
    exif = Image.Exif()
    exif[0x0112] = 3
    path = written(Image.fromarray(SIXTEEN[::-1, ::-1]), tmp_path / "a.png", exif=exif)
    assert difference(path, GRAY) == 0


def test_the_first_of_several_frames(tmp_path: Path):
    first, second = Image.fromarray(GRAY), Image.fromarray(255 - GRAY)
    assert difference(written(first, tmp_path / "a.gif", save_all=True, append_images=[second]), GRAY) == 0


def test_gray_for_networks_with_one_channel(tmp_path: Path):
    path = written(Image.fromarray(GRAY), tmp_path / "a.png")
    image = read_image(path, choose_mode(1))
    assert image.mode == "L"
    assert np.array_equal(np.asarray(image), GRAY)
    assert read_image(io.BytesIO(path.read_bytes()), choose_mode(3)).mode == "RGB"
    with pytest.raises(ValueError, match="in_chans is 4"):
        choose_mode(4)


def test_images_that_cannot_be_read(tmp_path: Path):
    whole = written(Image.fromarray(COLORS), tmp_path / "whole.png").read_bytes()
    contents = {
        "empty.png": b"",
        "text.png": b"this is no image",
        "half.png": whole[: len(whole) // 2],
        "broken.png": whole[:60] + bytes(40) + whole[100:],
    }
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=rf"image {tmp_path / name} cannot be read .*: mend it or take it out"):
            read_image(tmp_path / name)
    with pytest.raises(ValueError, match=f"image {tmp_path} cannot be read"):
        read_image(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"none\.png does not exist"):
        read_image(tmp_path / "none.png")
    with pytest.raises(ValueError, match="image row 7 cannot be read"):
        read_image(io.BytesIO(b"?"), name="row 7")


@pytest.mark.parametrize(
    ("pixels", "words"),
    [(np.float32(GRAY) / 255, "floating-point"), (np.int32(GRAY) * 1000, "more than 16 bits hold")],
)
def test_numbers_of_no_known_range(tmp_path: Path, pixels: np.ndarray, words: str):
    path = written(Image.fromarray(pixels), tmp_path / "a.tiff")
    with pytest.raises(ValueError, match=words):
        read_image(path)


# --------------------------------------------------------------------------------------------------------
# Rows of datasets
# --------------------------------------------------------------------------------------------------------


def photo(mode="RGB"):
    pixels = np.random.default_rng(0).integers(0, 256, (16, 20, 3), dtype=np.uint8)
    return Image.fromarray(pixels).resize((40, 32)).convert(mode)


def saved(image, kind, **options):
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"no image",
        saved(photo(), "JPEG")[:-200],
        saved(photo(), "JPEG")[:30],
        saved(photo(), "PNG")[:-60],
        saved(photo(), "JPEG")[:2] + bytes(500),
        saved(photo(), "PNG")[:60] + bytes(20) + saved(photo(), "PNG")[80:],
        None,
    ],
    ids=["empty", "text", "cut jpeg", "header", "cut png", "zeros", "damaged png", "nothing"],
)
def test_damaged_files_are_unreadable(content):
    with pytest.raises(UnreadableImageError):
        decode_image({"bytes": content, "path": None}, "RGB")


def test_a_missing_file_is_unreadable(tmp_path):
    with pytest.raises(UnreadableImageError, match="it does not exist"):
        decode_image(tmp_path / "gone.png", "RGB")


def test_paths_in_rows_are_not_opened(tmp_path):
    """Whoever wrote a row could name any file of this machine; those that a source found itself are Paths."""
    path = written(photo(), tmp_path / "a.png")
    assert decode_image(path, "RGB").size == (40, 32)
    with pytest.raises(UnreadableImageError, match=r"a\.png', and paths are for image folders: .*--data imagefolder"):
        decode_image({"bytes": None, "path": str(path)}, "RGB")
    for nothing in (None, {"bytes": None, "path": None}):
        with pytest.raises(UnreadableImageError, match="it is empty"):
            decode_image(nothing, "RGB")


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    ("limit", "words"), [(1279, "1,280 pixels, and at most 1,279"), (500, "more than 1,000 pixels, and at most 500")]
)
def test_more_pixels_than_pillow_allows_are_unreadable(monkeypatch, limit, words):
    """Where Pillow alone would warn, and where it would refuse."""
    content = saved(photo(), "PNG")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
    with (
        pytest.raises(UnreadableImageError, match=rf"^it has {words} are decoded: shrink"),
        silence_pillow(),
    ):
        decode_image({"bytes": content, "path": None}, "RGB")
    for enough in (1280, None):
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", enough)
        with silence_pillow():
            assert decode_image({"bytes": content, "path": None}, "RGB").size == (40, 32)


def test_a_small_file_of_many_pixels_is_refused_without_a_warning(tmp_path, recwarn):
    filters = list(warnings.filters)
    path = written(Image.new("1", (9500, 9500)), tmp_path / "white.png")
    assert path.stat().st_size < 100_000
    with pytest.raises(
        ValueError, match=r"white\.png cannot be read \(it has 90,250,000 pixels, and at most 89,478,485 are"
    ):
        read_image(path)
    assert not recwarn.list
    assert warnings.filters == filters


def test_warnings_about_metadata_are_not_repeated_for_every_image(recwarn):
    """They name no file. Others come as ever."""
    content = saved(photo(), "JPEG", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x09broken")
    with Image.open(io.BytesIO(content)) as image:
        image.getexif()
    assert "Corrupt EXIF" in str(recwarn.pop().message)
    with silence_pillow():
        assert decode_image({"bytes": content, "path": None}, "RGB").size == (40, 32)
    assert not recwarn.list


def test_files_of_too_many_bytes_are_unreadable(tmp_path, monkeypatch):
    path = tmp_path / "large.png"
    with path.open("wb") as file:
        file.truncate(MAX_ENCODED_BYTES + 1)  # takes no room on the disk
    with pytest.raises(
        ValueError, match=r"large\.png cannot be read \(it has 268,435,457 bytes, and at most 268,435,456"
    ):
        read_image(path)
    content = saved(photo(), "PNG")
    monkeypatch.setattr(decode, "MAX_ENCODED_BYTES", len(content))
    assert decode_image({"bytes": content, "path": None}, "RGB").size == (40, 32)
    with pytest.raises(UnreadableImageError, match="shrink it or take it out"):
        decode_image({"bytes": content + b"\0", "path": None}, "RGB")


@pytest.mark.parametrize("kind", ["fifo", "socket", "device", "folder", "link"])
def test_what_is_no_file_is_not_opened(tmp_path, kind):
    path = tmp_path / "a.png"
    with socket.socket(socket.AF_UNIX) as server:
        make = {
            "fifo": os.mkfifo,
            "socket": lambda path: server.bind(str(path)),
            "device": lambda path: path.symlink_to("/dev/zero"),
            "folder": Path.mkdir,
            "link": lambda path: path.symlink_to("gone.png"),
        }[kind]
        make(path)
    words = {"fifo": "a FIFO", "link": r"a link to gone\.png, which does not exist"}.get(kind, f"a {kind}")
    with stop_after(seconds=60):
        with pytest.raises(
            ValueError, match=rf"image {path} cannot be read \(it is {words}.*\): mend it or take it out"
        ):
            read_image(path)
        with pytest.raises(UnreadableImageError, match=words):
            decode_image(path, "RGB")


def test_a_file_that_may_not_be_read_is_unreadable(tmp_path, monkeypatch):
    path = written(photo(), tmp_path / "a.png")

    def refuse(*_: object) -> None:
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(ValueError, match=r"a\.png cannot be read \(Permission denied\): give the user of this command"):
        read_image(path)


@pytest.mark.parametrize("mode", ["RGB", "L"])
@pytest.mark.filterwarnings("error")
def test_images_of_every_kind_are_read_as_they_look(mode):
    gray = np.asarray(photo("L"))
    deep = Image.fromarray(gray.astype(np.uint16) * 257)
    palette = photo().quantize(16)
    pictures = {
        "gray": (saved(photo("L"), "PNG"), photo("L"), 0),
        "16 bits": (saved(deep, "PNG"), photo("L"), 0),
        "16 bits, tiff": (saved(deep, "TIFF"), photo("L"), 0),
        "cmyk": (saved(photo("CMYK"), "JPEG", quality=100, subsampling=0), photo(), 4),
        "palette": (saved(palette, "PNG", transparency=bytes(range(16))), palette, 0),
        "alpha": (saved(photo("RGBA"), "PNG"), photo(), 0),
        "bits": (saved(photo("1"), "PNG"), photo("1"), 0),
    }
    for name, (content, expected, tolerance) in pictures.items():
        image = decode_image({"bytes": content, "path": None}, mode)
        assert image.mode == mode
        difference = np.abs(np.asarray(image, int) - np.asarray(expected.convert(mode), int))
        assert difference.mean() <= tolerance, name


def test_of_sixteen_bits_the_upper_eight_are_taken():
    levels = np.array([[0, 255, 256, 32768, 65279, 65280, 65535]], dtype=np.uint16)
    image = decode_image({"bytes": saved(Image.fromarray(levels), "PNG"), "path": None}, "L")
    assert np.asarray(image).tolist() == [[0, 0, 1, 128, 254, 255, 255]]


def test_images_stand_upright():
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn clockwise shows it upright
    image = decode_image({"bytes": saved(photo(), "JPEG", exif=exif, quality=100, subsampling=0), "path": None}, "RGB")
    upright = np.asarray(photo().rotate(-90, expand=True), int)
    assert np.abs(np.asarray(image, int) - upright).mean() <= 4
