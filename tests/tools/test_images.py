import base64
import os
import struct
import time
import zlib
from contextlib import suppress
from io import BytesIO
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from metis_agent.errors import InputError
from metis_agent.messages import image_block, image_source
from metis_agent.tools.download import DownloadRules
from metis_agent.tools.images import ImageRules, load_image, thumbnail


def encoded(image, kind="PNG", **options):
    file = BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def data_uri(content, mime_type="image/png"):
    return f"data:{mime_type};base64,{base64.b64encode(content).decode()}"


def png_header(width, height):
    """A PNG that claims a size, with next to nothing in it."""

    def chunk(name, content):
        return struct.pack(">I", len(content)) + name + content + struct.pack(">I", zlib.crc32(name + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0" * 99)) + chunk(b"IEND", b"")
    )


RED = Image.new("RGB", (6, 4), "red")
PNG = encoded(RED)


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "GIF"])
def test_formats(kind):
    image = load_image(encoded(RED, kind))
    assert (image.mode, image.size) == ("RGB", (6, 4))
    red, green, blue = image.getpixel((3, 2))
    assert red > 240 > 20 > max(green, blue)


@pytest.mark.parametrize("kind", ["BMP", "TIFF", "ICO", "PPM", "PCX", "EPS", "PDF"])
def test_other_formats_are_refused(kind):
    with pytest.raises(InputError, match="PNG, JPEG, WEBP or GIF"):
        load_image(encoded(RED, kind))


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "empty"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'><script/></svg>", "SVG"),
        (b"\xef\xbb\xbf <?xml version='1.0'?><svg/>", "SVG"),
        (b"<!DOCTYPE html><html>", "web page"),
        (b"no image at all", "damaged"),
        (PNG[:40], "can't be read"),
        (encoded(RED, "JPEG")[:300], "can't be read"),
        (encoded(RED, "WEBP")[:30], "can't be read"),
        (PNG[:-20] + b"\0" * 20, "can't be read"),
    ],
)
def test_what_is_no_image_is_said_so(content, said):
    with pytest.raises(InputError, match=said):
        load_image(content)


def test_one_pixel():
    assert load_image(encoded(Image.new("RGB", (1, 1)))).size == (1, 1)


@pytest.mark.parametrize("size", [(8_000, 5_001), (40_000_001, 1), (10_000, 10_000), (60_000, 60_000)])
def test_too_many_pixels_are_not_decoded(size):
    with pytest.raises(InputError, match="pixels"):
        load_image(png_header(*size))


def test_limits_can_be_set():
    assert load_image(PNG, ImageRules(max_pixels=24, max_bytes=len(PNG))).size == (6, 4)
    with pytest.raises(InputError, match=r"6 x 4 pixels; at most 23"):
        load_image(PNG, ImageRules(max_pixels=23))
    with pytest.raises(InputError, match="bytes"):
        load_image(PNG, ImageRules(max_bytes=len(PNG) - 1))


def test_a_bomb_in_a_text_chunk():
    content = zlib.compress(b"a" * 50_000_000)
    chunk = b"zTXt" + b"k\0\0" + content
    bomb = PNG[:33] + struct.pack(">I", len(chunk) - 4) + chunk + struct.pack(">I", zlib.crc32(chunk)) + PNG[33:]
    with pytest.raises(InputError):
        load_image(bomb)


@pytest.mark.parametrize("kind", ["GIF", "WEBP", "PNG"])
def test_of_an_animation_the_first_frame_is_loaded(kind):
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("blue", "red", "green")]
    image = load_image(encoded(frames[0], kind, save_all=True, append_images=frames[1:]))
    assert getattr(image, "n_frames", 1) == 1
    assert image.convert("RGB").getpixel((3, 2))[2] > 240


def test_the_orientation_is_applied_and_the_metadata_is_gone():
    exif = Image.Exif()
    exif[0x0112] = 6  # turn by 90 degrees
    exif[0x010E] = "a secret place"
    photo = Image.new("RGB", (40, 20), "red")
    image = load_image(encoded(photo, "JPEG", exif=exif, comment=b"secret", icc_profile=b"secret" * 30))
    assert image.size == (20, 40)
    assert image.info == {}
    assert dict(image.getexif()) == {}
    for kind in ("JPEG", "PNG"):
        assert b"secret" not in encoded(image, kind)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16"])
def test_modes(mode):
    image = load_image(encoded(Image.new(mode, (3, 2))))
    assert image.mode == ("RGBA" if mode in ("LA", "RGBA") else "RGB")


def test_cmyk_and_what_shows_through():
    assert load_image(encoded(Image.new("CMYK", (3, 2)), "JPEG")).mode == "RGB"
    assert load_image(encoded(Image.new("P", (3, 2)), transparency=0)).mode == "RGBA"


def test_16_bits_of_grey_keep_their_brightness():
    grey = Image.new("I;16", (2, 1), 0x8000)
    assert load_image(encoded(grey)).getpixel((0, 0)) == (128, 128, 128)


def test_data_uris():
    assert load_image(data_uri(PNG)).size == (6, 4)
    assert load_image(data_uri(PNG, "text/plain")).size == (6, 4)  # what it says of itself does not count
    assert load_image("data:;base64," + base64.b64encode(PNG).decode()).size == (6, 4)
    assert load_image(data_uri(PNG).replace("data:image/png", "DATA:image/png;charset=x")).size == (6, 4)


@pytest.mark.parametrize(
    "uri",
    [
        "data:", "data:image/png,abc", "data:image/png;base64,***", "data:image/png;base64,YQ", "data:;base64,",
        "data:image/png;base64 ,YQ==", "data:image/svg+xml;base64," + base64.b64encode(b"<svg/>").decode(),
        "data:" + ";a=b" * 10_000 + ";base64,YQ==", data_uri(PNG) + "\n",
    ],
)  # fmt: skip
def test_bad_data_uris(uri):
    with pytest.raises(InputError):
        load_image(uri)


def test_the_length_is_checked_before_the_base64_is_decoded(monkeypatch):
    monkeypatch.setattr(base64, "b64decode", lambda *_, **__: pytest.fail("decoded"))
    with pytest.raises(InputError, match="bytes"):
        load_image("data:image/png;base64," + "A" * 2_000, ImageRules(max_bytes=1_000))


def test_a_file_is_read_by_path_only(tmp_path):
    file = tmp_path / "x.png"
    file.write_bytes(PNG)
    assert load_image(file).size == (6, 4)
    for text in (str(file), f"file://{file}", "/etc/passwd", "../x.png", "ftp://x/y.png", "javascript:1"):
        with pytest.raises(InputError, match="no image"):
            load_image(text)


def test_what_is_no_file(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path, tmp_path / "missing", tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(InputError, match="file"):
            load_image(path)


def test_a_large_file_is_not_read_whole(tmp_path):
    file = tmp_path / "x.png"
    with file.open("wb") as sparse:
        sparse.truncate(10_000_000_000)
    with pytest.raises(InputError, match="bytes"):
        load_image(file)


@pytest.mark.parametrize("source", [None, 3, [], object()])
def test_what_is_no_source_is_said_so(source):
    with pytest.raises(InputError, match="no image"):
        load_image(source)


@pytest.mark.allow_hosts(["127.0.0.1"])
def test_addresses_are_fetched(serve, reply, resolver):
    server = serve(lambda handler: reply(handler, PNG))
    rules = ImageRules(download=DownloadRules(allowed=lambda address: True, ports=frozenset({server.port})))
    assert load_image(f"{server.url}/x.png", rules).size == (6, 4)
    with pytest.raises(InputError, match="public internet"):
        load_image("http://127.0.0.1/x.png")


@given(st.binary(max_size=200))
@settings(max_examples=200)
def test_any_bytes_load_or_are_refused(content):
    for prefix in (b"", PNG[:8], b"\xff\xd8\xff", b"RIFF\0\0\0\0WEBP", b"GIF89a"):
        with pytest.raises(InputError):
            load_image(prefix + content)


@given(st.integers(0, len(PNG) - 1), st.integers(0, 255))
def test_a_changed_byte_never_crashes(place, value):
    content = bytearray(PNG)
    content[place] = value
    with suppress(InputError):
        load_image(bytes(content))


def test_thumbnails():
    content, mime_type = thumbnail(Image.new("RGB", (1_000, 500), "red"), 100)
    assert mime_type == "image/jpeg"
    assert Image.open(BytesIO(content)).size == (100, 50)
    content, mime_type = thumbnail(Image.new("RGBA", (10, 5_000)), 100)
    assert mime_type == "image/png"
    assert Image.open(BytesIO(content)).size == (1, 100)  # not 0 wide
    assert Image.open(BytesIO(thumbnail(RED)[0])).size == (6, 4)  # not enlarged


def test_content_blocks():
    assert load_image(image_source(image_block(PNG, "image/png"))).size == (6, 4)
    uri = data_uri(PNG)
    encoded_png = base64.b64encode(PNG).decode()
    for block in (
        {"type": "image", "url": uri},
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "image_url", "image_url": uri},
        {"type": "image", "source_type": "base64", "data": encoded_png, "mime_type": "image/png"},
        {"type": "image", "source": {"type": "base64", "media_type": "image/png", "data": encoded_png}},
    ):
        assert load_image(image_source(block)).size == (6, 4)
    for other in ("text", None, {}, {"type": "text", "text": "x"}, {"type": "image"}, {"type": "image", "url": 3}):
        assert image_source(other) is None


def jpeg_of_scans(side, scans):
    """Progressive, with nearly empty scans: each makes the decoder walk every block again."""

    def segment(marker, body):
        return b"\xff" + bytes([marker]) + struct.pack(">H", len(body) + 2) + body

    blocks = ((side + 7) // 8) ** 2
    start = b"\xff\xd8" + segment(0xDB, b"\0" + bytes([1] * 64))
    start += segment(0xC2, struct.pack(">BHHB", 8, side, side, 1) + b"\x01\x11\x00")
    start += segment(0xC4, b"\x00" + bytes([1] + [0] * 15) + b"\x00")
    start += segment(0xC4, b"\x10" + bytes([1, 1] + [0] * 14) + b"\xe0\x00")
    start += segment(0xDA, b"\x01\x01\x00\x00\x00\x00") + bytes((blocks + 7) // 8)
    runs = -(-blocks // 32767)
    sizes = [blocks // runs + (number < blocks % runs) for number in range(runs)]
    bits = "".join("0" + format(size - 16384, "014b") for size in sizes)
    bits += "1" * (-len(bits) % 8)
    scan = int(bits, 2).to_bytes(len(bits) // 8, "big").replace(b"\xff", b"\xff\0")
    return start + (segment(0xDA, b"\x01\x01\x00\x01\x3f\x0d") + scan) * scans + b"\xff\xd9"


def test_a_jpeg_of_thousands_of_scans_is_refused_at_once():
    began = time.perf_counter()
    with pytest.raises(InputError, match="more than 100 scans"):
        load_image(jpeg_of_scans(6300, 2500))
    assert time.perf_counter() - began < 2
    assert load_image(jpeg_of_scans(1100, 20)).size == (1100, 1100)


def test_decoding_has_a_deadline():
    with pytest.raises(InputError, match="in the time that there is"):
        load_image(jpeg_of_scans(1100, 50), ImageRules(seconds=1e-6))
