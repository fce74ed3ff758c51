"""Bytes that mean harm: each is refused by name, before anything large is made of it."""

import gzip
import io
import random
import struct
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from pipelines.errors import StageError
from pipelines.images.decode import MAX_SIDE, open_picture
from tests.picture_bytes import SIZE, assert_known, exif, known, png, png_chunk, saved, tiff

PARAM = "messages[2].content[0].image_url.url"
MAX_PIXELS = 50_000_000
HUGE = (60_000, 60_000)


def decoded(data: bytes) -> Image.Image:
    return open_picture(data, param=PARAM, max_pixels=MAX_PIXELS).decode()


def refused(data: bytes) -> str:
    with pytest.raises(StageError) as error:
        decoded(data)
    assert (error.value.code, error.value.param) == ("invalid_image", PARAM)
    assert error.value.message.startswith(f"'{PARAM}' ")
    return error.value.message


def jpeg_of(size: tuple[int, int]) -> bytes:
    data = bytearray(saved(known(), "JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", size[1], size[0])
    return bytes(data)


def jpeg_with(*segments: bytes) -> bytes:
    data = saved(known(), "JPEG", quality=95)
    return data[:2] + b"".join(segments) + data[2:]


def segment(marker: int, body: bytes) -> bytes:
    return struct.pack(">BBH", 0xFF, marker, len(body) + 2) + body


def scans(number: int) -> bytes:
    """A progressive JPEG with its last scan so many times more."""
    data = saved(known(), "JPEG", progressive=True)
    last = data.rindex(b"\xff\xda")
    return data[:last] + data[last:-2] * (number + 1) + data[-2:]


def webp_of(size: tuple[int, int]) -> bytes:
    canvas = struct.pack("<I", 0) + (size[0] - 1).to_bytes(3, "little") + (size[1] - 1).to_bytes(3, "little")
    body = b"WEBPVP8X" + struct.pack("<I", 10) + canvas + saved(known(), "WEBP")[12:]
    return b"RIFF" + struct.pack("<I", len(body)) + body


def gif_of(size: tuple[int, int], frame: tuple[int, int, int, int] = (0, 0, 8, 8)) -> bytes:
    data = saved(Image.new("P", (8, 8)), "GIF")
    at = data.index(b",\0\0\0\0\x08\0\x08\0")
    return data[:6] + struct.pack("<HH", *size) + data[10:at] + struct.pack("<cHHHH", b",", *frame) + data[at + 9 :]


def bmp_of(size: tuple[int, int]) -> bytes:
    data = bytearray(saved(known(), "BMP"))
    data[18:26] = struct.pack("<ii", *size)
    return bytes(data)


def tiff_of(size: tuple[int, int], **more: tuple[int, list[int]]) -> bytes:
    tags = {256: (4, [size[0]]), 257: (4, [size[1]]), 258: (3, [8]), 259: (3, [1]), 262: (3, [1]), 277: (3, [1])}
    return tiff({**tags, **{int(tag[1:]): value for tag, value in more.items()}}, bytes(64 * 48))


OF_SIZE = {
    "PNG": lambda size: png(8, 2, b"", size=size),
    "JPEG": jpeg_of,
    "WebP": webp_of,
    "GIF": gif_of,
    "TIFF": tiff_of,
    "BMP": bmp_of,
}


@pytest.mark.parametrize("name", OF_SIZE)
def test_more_pixels_than_are_taken_are_refused_by_the_header(name):
    message = refused(OF_SIZE[name](HUGE))
    assert "60000 x 60000 pixels, more than the 50000000" in message


@pytest.mark.parametrize("name", OF_SIZE)
def test_a_side_is_no_longer_than_anybody_looks_at(name):
    if name == "GIF":
        return  # it has 16 bits for one
    size = (65_535 if name == "JPEG" else MAX_SIDE + 1, 1)
    assert f"{size[0]} x 1: no side may be longer than {MAX_SIDE}" in refused(OF_SIZE[name](size))


@pytest.mark.parametrize("size", [(0, 48), (64, 0), (0, 0)])
@pytest.mark.parametrize("name", ["PNG", "JPEG", "TIFF", "BMP"])
def test_a_picture_without_pixels_is_none(name, size):
    assert f"is {size[0]} x {size[1]}: a picture needs pixels" in refused(OF_SIZE[name](size))


def test_a_frame_without_pixels_is_none():
    assert "without pixels" in refused(gif_of((8, 8), (0, 0, 0, 8)))


def test_a_frame_makes_the_screen_larger():
    assert "65535 x 65535 pixels" in refused(gif_of((8, 8), (0, 0, 65535, 65535)))
    assert "65000 x 65000 pixels" in refused(gif_of((65000, 65000), (0, 0, 1, 1)))


FORMATS = {
    "PNG": lambda: saved(Image.effect_noise(SIZE, 80), "PNG"),
    "JPEG": lambda: saved(Image.effect_noise(SIZE, 80), "JPEG"),
    "JPEG progressive": lambda: saved(Image.effect_noise(SIZE, 80), "JPEG", progressive=True),
    "WebP": lambda: saved(Image.effect_noise(SIZE, 80).convert("RGB"), "WEBP"),
    "WebP lossless": lambda: saved(Image.effect_noise(SIZE, 80).convert("RGB"), "WEBP", lossless=True),
    "GIF": lambda: saved(Image.effect_noise(SIZE, 80), "GIF"),
    "TIFF": lambda: saved(Image.effect_noise(SIZE, 80), "TIFF"),
    "TIFF LZW": lambda: saved(Image.effect_noise(SIZE, 80), "TIFF", compression="tiff_lzw"),
    "BMP": lambda: saved(Image.effect_noise(SIZE, 80), "BMP"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_is_cut_off_is_refused_wherever_it_is_cut(name):
    data = FORMATS[name]()
    assert decoded(data).size == SIZE
    for part in (0.01, 0.05, 0.1, 0.25, 0.5, 0.75, 0.9):
        refused(data[: max(4, int(len(data) * part))])


# A decoder makes nearly all of a large picture before it finds that the end is missing. (Of a BMP it makes nothing, it
# copies; a TIFF has its directory, or what that points to, at its end.)
@pytest.mark.parametrize("name", [name for name in FORMATS if not name.startswith(("BMP", "TIFF", "WebP"))])
def test_a_file_without_its_end_is_refused_before_it_is_decoded(name):
    data = FORMATS[name]()
    open_picture(data, param=PARAM, max_pixels=MAX_PIXELS)
    open_picture(data + b"what follows is nobody's", param=PARAM, max_pixels=MAX_PIXELS)
    for part in (0.5, 0.9, 0.99):
        with pytest.raises(StageError, match="cut off before its end"):
            open_picture(data[: int(len(data) * part)], param=PARAM, max_pixels=MAX_PIXELS)


@pytest.mark.parametrize("name", FORMATS)
def test_a_file_that_is_cut_off_at_any_byte_of_its_header_is_refused(name):
    data = FORMATS[name]()
    for length in range(1, min(700, len(data) * 3 // 4)):
        refused(data[:length])


@settings(max_examples=300, deadline=None)
@given(st.sampled_from(sorted(FORMATS)), st.integers(0, 2**32), st.integers(1, 8), st.booleans())
def test_broken_bytes_are_a_picture_or_a_refusal(name, seed, changes, early):
    chance = random.Random(seed)
    data = bytearray(FORMATS[name]())
    for _ in range(changes):
        data[chance.randrange(4, min(len(data), 200 if early else len(data)))] = chance.randrange(256)
    error = None
    try:
        image = open_picture(bytes(data), param=PARAM, max_pixels=1_000_000).decode()
    except StageError as raised:
        error = raised
    if error is None:
        assert image.mode == "RGB"
    else:
        assert (error.code, error.param) == ("invalid_image", PARAM)


@pytest.mark.parametrize(
    ("data", "what"),
    [
        (b"", "holds no bytes"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "an SVG drawing"),
        (b"\xef\xbb\xbf<?xml version='1.0'?><!-- --><svg >", "an SVG drawing"),
        (b"  <!DOCTYPE html><html>", "an HTML or XML page"),
        (b"%PDF-1.7", "a PDF document"),
        (b"PK\x03\x04....", "a ZIP archive"),
        (gzip.compress(b"x", mtime=0), "gzip data"),
        (b"\0\0\0\x1cftypavif", "an AVIF picture"),
        (b"\0\0\0\x1cftypheic", "a HEIF picture"),
        (b"\0\0\0\x1cftypisom", "a video"),
        (b"\0\0\0\x0cjP  \r\n\x87\n", "a JPEG 2000 picture"),
        (b"\xff\x0a....", "a JPEG XL picture"),
        (b"8BPS\0\x01", "a Photoshop document"),
        (b"\0\0\x01\0\x01\0", "an icon"),
        (b"P6 1 1 255 abc", "a Netpbm picture"),
        (b"%!PS-Adobe-3.0 EPSF", "PostScript"),
        (b"what is this", "text"),
        (b"\0\x01\x02\x03", "none of these formats"),
        (saved(known(), "ICO"), "an icon"),
        (saved(known(), "TGA"), "none of these formats"),
        (saved(known(), "PCX"), "none of these formats"),
    ],
)
def test_what_is_no_picture_is_named(data, what):
    assert what in refused(data)


@pytest.mark.parametrize("name", ["PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP"])
def test_a_signature_alone_is_no_picture(name):
    start = {"JPEG": 3, "WEBP": 12}.get(name, 8)
    signature = saved(known(), name)[:start]
    assert "cut off" in refused(signature)
    refused(signature + bytes(10_000))
    refused(signature + b"\xff" * 10_000)


def test_metadata_that_unpacks_to_much_is_not_unpacked():
    zeros = zlib.compress(bytes(50_000_000), 9)
    text = b"zTXt", b"k\0\0" + zeros
    more = (png_chunk(*text), png_chunk(b"iTXt", b"k\0\x01\0\0\0" + zeros), png_chunk(b"iCCP", b"k\0\0" + zeros)) * 40
    rows = known().tobytes()
    assert_known(decoded(png(8, 2, rows, *more, after=more)))


def test_absurdly_many_pieces_are_refused():
    assert "chunks" in refused(png(8, 2, known().tobytes(), png_chunk(b"tEXt", b"") * 70_000))
    assert "segments" in refused(jpeg_with(segment(0xFE, b"") * 5000))
    assert "segments" in refused(jpeg_with(b"\xff\0" * 1_000_000))
    gif = saved(Image.new("P", (8, 8)), "GIF")
    assert "blocks" in refused(gif[: gif.index(b",")] + b"!\xfe" + b"\x01a" * 1_000_000)
    assert "scans" in refused(scans(100))
    assert "cut off" in refused(jpeg_with(b"\xff" * 1_000_000))
    assert_known(decoded(jpeg_with(b"\xff" * 1000)), tolerance=12)  # filling, of which some may be


def test_a_directory_that_repeats_the_file_in_every_entry_is_refused():
    data = tiff_of((64, 48))
    entries = b"".join(struct.pack("<HHII", tag, 7, len(data), 0) for tag in (273, 278, 279, 320, 324, 325, 347))
    hostile = b"II*\0" + struct.pack("<I", len(data)) + data[8:] + struct.pack("<H", 7) + entries + bytes(4)
    assert "cut off" in refused(hostile)
    many = b"II*\0" + struct.pack("<IH", 8, 65535) + bytes(12 * 65535)
    assert "entries" in refused(many)


def test_exif_that_repeats_itself_in_every_entry_is_not_read():
    """A decoder that reads it makes gigabytes of it."""
    more = b"".join(struct.pack("<HHII", 40000 + tag, 7, 60_000, 0) for tag in range(900))
    said = exif(1, more=more, entries=901).ljust(65_000, b"\0")
    assert_known(decoded(jpeg_with(*[segment(0xE1, said)] * 50)), tolerance=12)


@pytest.mark.parametrize("name", ["JPEG", "PNG", "TIFF"])
def test_the_decoder_gets_no_metadata(name):
    said = exif(6, more=b"SECRET") if name != "PNG" else exif(6, more=b"SECRET")[6:]
    more = {"JPEG": {"comment": "SECRET", "exif": said}, "PNG": {"exif": said}, "TIFF": {"tiffinfo": {274: 6}}}[name]
    picture = open_picture(saved(known(), name, **more), param=PARAM, max_pixels=MAX_PIXELS)
    assert picture.header.orientation == 6
    with Image.open(io.BytesIO(picture.header.data)) as image:
        assert "exif" not in image.info
        assert image.getexif().get(274) is None
    assert b"SECRET" not in picture.header.data


def test_a_tiff_that_leads_into_itself_is_its_first_page():
    data = tiff(
        {256: (4, [64]), 257: (4, [48]), 258: (3, [8] * 3), 259: (3, [1]), 262: (3, [2]), 277: (3, [3])},
        known().tobytes(),
        next_directory=8 + 64 * 48 * 3,
    )
    assert_known(decoded(data))


def test_tiles_of_absurd_size_are_refused():
    tiles = {"t322": (4, [1 << 30]), "t323": (4, [1 << 30]), "t324": (4, [8]), "t325": (4, [3072])}
    assert "tiles" in refused(tiff_of((64, 48), **tiles))
    refused(tiff_of((64, 48), t277=(4, [1 << 31])))
    refused(tiff_of((64, 48), t278=(4, [1 << 31]), t259=(3, [5])))


def test_two_sizes_in_one_file_are_refused():
    data = jpeg_of((10, 10))
    at = data.index(b"\xff\xc0")
    frame = bytearray(data[at : data.index(b"\xff\xc4")])
    frame[5:9] = struct.pack(">HH", 60_000, 60_000)
    assert "twice" in refused(data[:at] + bytes(frame) + data[at:])
    rows = known().tobytes()
    again = png_chunk(b"IHDR", struct.pack(">IIBBBBB", 50_000, 50_000, 8, 2, 0, 0, 0))
    assert "two different sizes" in refused(png(8, 2, rows, again))


PEAK = """
import sys, re
from pathlib import Path
from pipelines.errors import StageError
from pipelines.images.decode import open_picture
def peak():
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1]) * 1024
open_picture(Path(sys.argv[1]).read_bytes(), param="", max_pixels=10**6).decode()
for path in sys.argv[2:]:
    data = Path(path).read_bytes()
    before = peak()
    try:
        open_picture(data, param="", max_pixels=50_000_000).decode()
    except StageError:
        pass
    else:
        print("not refused", path)
    if peak() - before > 16 * 2**20:
        print("takes", peak() - before, path)
"""


def test_refusing_takes_no_memory(tmp_path: Path):
    """Of pictures that promise 3600 million pixels, and one that promises as many as are taken and holds none."""
    (tmp_path / "good").write_bytes(saved(known(), "PNG"))
    files = []
    for name, make in OF_SIZE.items():
        for size in (HUGE, (7000, 7000)):
            files.append(tmp_path / f"{name} {size[0]}")
            data = gif_of(size, (0, 0, *size)) if name == "GIF" else make(size)
            files[-1].write_bytes(data[:600] if name in ("PNG", "JPEG") else data)
    command = [sys.executable, "-c", PEAK, str(tmp_path / "good"), *map(str, files)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    assert done.stdout == ""


def test_warnings_of_the_decoder_harm_nobody():
    """What it only warns of elsewhere, here is no error of one request because of another."""
    size = (11_000, 9_000)  # more than Pillow's own limit
    data = saved(Image.new("1", size), "PNG")
    picture = open_picture(data, param=PARAM, max_pixels=100_000_000)
    assert picture.size == size
    assert "more than the" in refused(data)
    assert Image.open(io.BytesIO(data)).size == size
