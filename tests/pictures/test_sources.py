"""Pictures as people have them: each odd one is read right, or left out by name and counted."""

import io
import json
import struct
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import ExifTags, Image, ImageCms

from fluxsae.errors import FluxSaeError
from fluxsae.pictures import fit_picture, load_pictures, open_picture
from fluxsae.pictures.sources import MAX_PIXELS, describe_fit, inspect_picture

RED, BLUE, WHITE, GRAY = (255, 0, 0), (0, 0, 255), (255, 255, 255), (128, 128, 128)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=kind, **options)
    return buffer.getvalue()


def halves(mode: str = "RGB", *, size: tuple[int, int] = (48, 32)) -> Image.Image:
    """Red on the left, blue on the right."""
    image = Image.new("RGB", size, RED)
    image.paste(BLUE, (size[0] // 2, 0, *size))
    return image.convert(mode)


def sides(image: Image.Image) -> tuple[Any, Any]:
    """The colours in the middle of the left and of the right half."""
    width, height = image.size
    return image.getpixel((width // 4, height // 2)), image.getpixel((3 * width // 4, height // 2))


def is_near(colour: Any, wanted: tuple[int, int, int], tolerance: int = 6) -> bool:
    return max(abs(a - b) for a, b in zip(colour, wanted, strict=True)) <= tolerance


def gray_ramp(top: int, dtype: Any) -> Image.Image:
    return Image.fromarray(np.repeat(np.linspace(0, top, 64)[None], 32, axis=0).astype(dtype))


def transparent(mode: str) -> Image.Image:
    """Red, but its right half is fully transparent (and black beneath)."""
    image = Image.new("RGBA", (48, 32), (*RED, 255))
    image.paste((0, 0, 0, 0), (24, 0, 48, 32))
    if mode == "P":
        palette = Image.new("P", image.size, 0)
        palette.putpalette([*RED, 0, 0, 0])
        palette.paste(1, (24, 0, 48, 32))
        palette.info["transparency"] = 1
        return palette
    return image.convert(mode)


def turned(orientation: int) -> bytes:
    """Halves, stored so that the EXIF orientation puts them upright."""
    undo = {3: Image.Transpose.ROTATE_180, 6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    return encoded(halves().transpose(undo[orientation]), "JPEG", quality=95, exif=exif)


@pytest.mark.parametrize("orientation", [3, 6, 8])
def test_a_photograph_is_turned_as_its_exif_says(orientation: int) -> None:
    opened = inspect_picture(turned(orientation))
    assert opened.image.size == (48, 32)
    assert is_near(sides(opened.image)[0], RED)
    assert is_near(sides(opened.image)[1], BLUE)
    assert opened.notes == ("turned as its EXIF says",)


@pytest.mark.parametrize("mode", ["RGBA", "P", "LA"])
def test_transparent_parts_become_white(mode: str) -> None:
    opened = inspect_picture(encoded(transparent(mode)))
    left, right = sides(opened.image)
    assert right == WHITE
    assert is_near(left, RED if mode != "LA" else (76, 76, 76))
    assert "transparent parts made white" in opened.notes


@pytest.mark.parametrize(
    ("image", "note"),
    [
        (gray_ramp(255, np.uint8), "gray to RGB"),
        (gray_ramp(65535, np.uint16), "16 bits to 8"),
        (gray_ramp(65535, np.int32), "16 bits to 8"),
    ],
    ids=["8", "16", "32"],
)
def test_gray_keeps_its_shades_whatever_its_bits(image: Image.Image, note: str) -> None:
    opened = inspect_picture(encoded(image, "TIFF"))
    shades = np.asarray(opened.image)[16]
    assert (shades == shades[:, :1]).all()
    assert np.abs(shades[:, 0] - np.linspace(0, 255, 64)).max() <= 1
    assert note in opened.notes


def test_a_png_of_16_bits_a_channel_keeps_its_colours() -> None:
    rows = b"".join(b"\0" + struct.pack(">3H", 0xFFFF, 0x8080, 0) * 40 for _ in range(40))

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", 40, 40, 16, 2, 0, 0, 0)
    content = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")
    assert is_near(open_picture(content).getpixel((20, 20)), (255, 128, 0), 1)


@pytest.mark.parametrize("mode", ["P", "1", "CMYK"])
def test_other_modes_become_rgb_with_their_colours(mode: str) -> None:
    content = encoded(halves(mode), "TIFF" if mode == "CMYK" else "PNG")
    image = open_picture(content)
    assert image.mode == "RGB"
    left, right = sides(image)
    if mode != "1":
        assert is_near(left, RED, 12)
        assert is_near(right, BLUE, 12)


def test_a_cmyk_jpeg_is_not_inverted() -> None:
    opened = inspect_picture(encoded(halves("CMYK"), "JPEG", quality=95))
    assert is_near(sides(opened.image)[0], RED, 12)
    assert opened.notes == ("CMYK to RGB",)


def test_a_colour_profile_is_followed_and_an_unfit_one_left_out() -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    assert is_near(sides(open_picture(encoded(halves(), icc_profile=profile)))[0], RED)
    opened = inspect_picture(encoded(halves(), icc_profile=b"no profile"))
    assert opened.notes == ("unfit colour profile left out",)
    assert sides(opened.image) == (RED, BLUE)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_read(kind: str) -> None:
    frames = [Image.new("RGB", (40, 40), colour) for colour in (BLUE, RED)]
    opened = inspect_picture(encoded(frames[0], kind, save_all=True, append_images=frames[1:], duration=50))
    assert is_near(opened.image.getpixel((20, 20)), BLUE, 12)
    assert "first frame of an animation" in opened.notes


def bomb(width: int, height: int) -> bytes:
    """A PNG of a few bytes whose head promises this many pixels."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + b"IHDR" + header + struct.pack(">I", zlib.crc32(b"IHDR" + header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 4) + b"IDAT"


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (encoded(halves())[:-40], "broken or cut off"),
        (encoded(halves(size=(480, 320)), "JPEG")[:-900], "broken or cut off"),
        (encoded(halves(size=(31, 400))), "too small: 31 x 400 pixels"),
        (bomb(9460, 9460), "too large: 9460 x 9460"),
        (bomb(60_000, 60_000), "is too large"),
        (b"", "no picture of a kind that is read"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "no picture of a kind that is read"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 50 50\n", "no picture of a kind that is read"),
        (encoded(gray_ramp(1, np.float32), "TIFF"), "values of 0 to 1, whose white is unknown"),
    ],
    ids=["cut-png", "cut-jpeg", "tiny", "huge", "bomb", "empty", "svg", "eps", "float"],
)
def test_what_cannot_be_read_is_refused_with_its_name(content: bytes, message: str) -> None:
    assert MAX_PIXELS < 9460**2
    with pytest.raises(FluxSaeError, match=f"odd.png.*{message}"):
        open_picture(content, name="odd.png")


@pytest.mark.parametrize(
    ("size", "words"),
    [
        ((64, 32), ()),
        ((128, 64), ("scaled down",)),
        ((32, 16), ("enlarged",)),
        ((64, 64), ("cropped",)),
        ((400, 100), ("scaled down", "cropped")),
    ],
)
def test_cropping_and_scaling_are_said(size: tuple[int, int], words: tuple[str, ...]) -> None:
    assert describe_fit(size, height=32, width=64) == words
    assert fit_picture(halves(size=size), height=32, width=64).size == (64, 32)


def test_the_middle_is_kept_where_a_picture_is_cropped() -> None:
    image = Image.new("RGB", (300, 100), RED)
    image.paste(BLUE, (100, 0, 200, 100))
    assert is_near(fit_picture(image, height=50, width=50).resize((1, 1)).getpixel((0, 0)), BLUE)


def write(folder: Path, files: dict[str, bytes | str]) -> Path:
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return folder


def shade(value: int, size: tuple[int, int] = (40, 40)) -> bytes:
    return encoded(Image.new("RGB", size, (value, value, value)))


def test_a_folder_gives_its_pictures_in_order_with_captions_and_says_what_it_left_out(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "photos",
        {
            "b.jpg": shade(1),  # holds a PNG
            "b.txt": "\ufeffa  gray\u00a0sheet\n",
            "deep/a.png": shade(2),
            "again.png": shade(1),
            "cut.png": shade(3)[:60],
            "dot.png": encoded(Image.new("RGB", (1, 1))),
            "phone.heic": b"\0\0\0\x18ftypheic",
            "readme.md": "no picture",
            ".hidden.png": shade(4),
            "__MACOSX/x.png": shade(5),
            "bad.png": shade(6),
            "bad.txt": b"\xff\xfe",
            "wide.png": shade(7, (80, 40)),
        },
    )
    found = load_pictures(folder, height=32, width=32)
    assert [(entry.name, entry.caption) for entry in found.entries] == [
        ("again.png", ""), ("deep/a.png", ""), ("wide.png", ""),
    ]  # fmt: skip
    assert {refusal.name: refusal.kind for refusal in found.refusals} == {
        "b.jpg": "double", "bad.png": "unfit caption", "cut.png": "broken or cut off", "dot.png": "too small",
        "phone.heic": "no picture of a kind that is read",
    }  # fmt: skip
    assert [found.picture(i).getpixel((0, 0)) for i in range(3)] == [(1, 1, 1), (2, 2, 2), (7, 7, 7)]
    about = found.describe()
    assert about["changed"] == {"cropped": 1, "scaled down": 3}
    assert sum(about["refused"].values()) == 5
    json.dumps(about)
    assert "b.jpg is the same file as again.png" in found.report()
    assert "left out: 1 double" in found.report()


def test_sidecar_files_caption_their_pictures_and_a_png_called_jpg_is_read(tmp_path: Path) -> None:
    folder = write(
        tmp_path, {"b.jpg": shade(1), "b.txt": "\ufeffa  gray\u00a0sheet\n", "c.png": shade(2), "c.txt": " \n"}
    )
    found = load_pictures(folder, height=40, width=40)
    assert [entry.caption for entry in found.entries] == ["a gray sheet", ""]
    assert found.describe()["changed"] == {".jpg that holds PNG": 1}
    assert found.describe()["with_caption"] == 1


def test_metadata_lines_caption_pictures_in_their_folder(tmp_path: Path) -> None:
    lines = [{"file_name": "a.png", "text": "first"}, {"file_name": "sub/b.png", "text": ["one", "two"]}]
    folder = write(
        tmp_path,
        {
            "train/a.png": shade(1), "train/sub/b.png": shade(2), "train/c.png": shade(3),
            "train/metadata.jsonl": "\n".join(map(json.dumps, lines)) + "\n\n",
        },
    )  # fmt: skip
    found = load_pictures(folder, height=40, width=40)
    assert {entry.name: entry.caption for entry in found.entries} == {
        "train/a.png": "first", "train/c.png": "", "train/sub/b.png": "one",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "metadata.jsonl line 1 is not valid JSON"),
        ('{"text": "a"}', "line 1 has no file_name"),
        ('{"file_name": "a.png", "text": "a", "caption": "b"}', "several captions: caption, text"),
    ],
)
def test_unfit_metadata_is_refused_with_its_line(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(FluxSaeError, match=message):
        load_pictures(write(tmp_path, {"a.png": shade(1), "metadata.jsonl": line}), height=40, width=40)


def hub_cells(contents: list[bytes | None]) -> pa.Array:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    return pa.array([None if c is None else {"bytes": c, "path": "x.png"} for c in contents], kind)


@pytest.mark.parametrize("pack", [hub_cells, lambda contents: pa.array(contents, pa.binary())], ids=["hub", "bytes"])
def test_a_parquet_file_gives_pictures_and_captions_of_its_columns(
    tmp_path: Path, pack: Callable[..., pa.Array]
) -> None:
    contents = [shade(1), None, shade(2), shade(1), b"no picture", shade(3)]
    captions = ["one", "x", None, "one", "x", "three"]
    path = tmp_path / "data.parquet"
    pq.write_table(pa.table({"image": pack(contents), "caption": captions}), path, row_group_size=2)
    found = load_pictures(path, height=40, width=40)
    assert [(entry.name, entry.caption) for entry in found.entries] == [
        ("data.parquet#0", "one"), ("data.parquet#2", ""), ("data.parquet#5", "three"),
    ]  # fmt: skip
    assert [refusal.kind for refusal in found.refusals] == ["unreadable", "double", "no picture of a kind that is read"]
    assert [found.picture(i).getpixel((0, 0))[0] for i in range(3)] == [1, 2, 3]
    assert load_pictures(tmp_path, height=40, width=40).describe()["pictures"] == 3  # a folder of such files


@pytest.mark.parametrize(
    ("columns", "arguments", "message"),
    [
        ({"caption": ["a"]}, {}, "no columns of pictures among caption"),
        ({"left": [b"x"], "right": [b"x"]}, {}, "2 columns of pictures"),
        ({"image": [shade(1)]}, {"caption_column": "words"}, "no column 'words'; it has image"),
        ({"image": [b"x"]}, {}, "holds no picture that can be read. 1 were left out; the first: data.parquet#0 is no"),
    ],
)
def test_unfit_tables_are_refused(tmp_path: Path, columns: Any, arguments: Any, message: str) -> None:
    pq.write_table(pa.table(columns), tmp_path / "data.parquet")
    with pytest.raises(FluxSaeError, match=message):
        load_pictures(tmp_path / "data.parquet", height=40, width=40, **arguments)


@pytest.mark.parametrize(("name", "message"), [("none", "There are no pictures at"), (".", "holds no picture")])
def test_a_place_without_pictures_is_refused(tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(FluxSaeError, match=message):
        load_pictures(tmp_path / name, height=40, width=40)


def test_a_picture_that_changed_after_it_was_found_is_refused(tmp_path: Path) -> None:
    found = load_pictures(write(tmp_path, {"a.png": shade(1)}), height=40, width=40)
    write(tmp_path, {"a.png": shade(2)})
    with pytest.raises(FluxSaeError, match=r"a\.png has changed"):
        found.picture(0)
