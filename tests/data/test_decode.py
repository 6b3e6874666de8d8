from __future__ import annotations

import contextlib
import io
import pickle
import struct
import threading
import warnings
import zlib

import numpy as np
import pytest
from PIL import Image

from multikd.data.decode import (
    SampleFault,
    decode_image,
    decode_label,
    decode_pixels,
    decode_with_format,
    find_image,
    read_header,
)


def encoded(image: Image.Image, format: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=format, **options)
    return buffer.getvalue()


def noise(mode: str = "RGB", size: tuple[int, int] = (37, 23)) -> Image.Image:
    rng = np.random.default_rng(0)
    return Image.fromarray(rng.integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)).convert(
        mode
    )


@pytest.mark.parametrize("format", ["PNG", "BMP", "TIFF", "PPM", "GIF", "WEBP", "JPEG", "JPEG2000"])
def test_formats(format: str) -> None:
    options = {"WEBP": {"lossless": True}}.get(format, {})
    image, name = decode_with_format(encoded(noise(), format, **options))
    assert (image.mode, image.size, name) == ("RGB", (37, 23), format)
    if format not in ("GIF", "JPEG", "JPEG2000"):  # the lossless ones
        np.testing.assert_array_equal(np.asarray(image), np.asarray(noise()))


@pytest.mark.parametrize("mode", ["L", "1", "P", "LA", "RGBA", "CMYK", "I;16", "YCbCr"])
def test_modes_become_rgb(mode: str) -> None:
    image = noise("L").convert("I;16") if mode == "I;16" else noise(mode)
    format = "TIFF" if mode in ("CMYK", "YCbCr") else "PNG"
    decoded = decode_image(encoded(image, format))
    assert decoded.mode == "RGB"
    assert decoded.size == (37, 23)


def test_transparency_is_laid_over_white() -> None:
    pixels = np.zeros((1, 3, 4), dtype=np.uint8)
    pixels[0, :, 3] = 0, 128, 255
    got = np.asarray(decode_image(encoded(Image.fromarray(pixels), "PNG")))
    assert got[0, :, 0].tolist() == [255, 127, 0]


def test_palette_and_grey_transparency() -> None:
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putdata([0, 1])
    got = np.asarray(decode_image(encoded(palette, "PNG", transparency=0)))
    assert got.tolist() == [[[255, 255, 255], [200, 100, 50]]]
    grey = Image.fromarray(np.array([[7, 90]], dtype=np.uint8))
    got = np.asarray(decode_image(encoded(grey, "PNG", transparency=7)))
    assert got[0, :, 0].tolist() == [255, 90]


def test_sixteen_bits_are_scaled_not_clipped() -> None:
    values = np.array([[0, 257, 32896, 65535]], dtype=np.uint16)
    for format in ("PNG", "TIFF"):
        got = np.asarray(decode_image(encoded(Image.fromarray(values), format)))
        assert got[0, :, 0].tolist() == [0, 1, 128, 255], format


def test_floating_point_is_stretched() -> None:
    values = np.array([[-1.0, 0.0, 1.0]], dtype=np.float32)
    got = np.asarray(decode_image(encoded(Image.fromarray(values), "TIFF")))
    assert got[0, :, 1].tolist() == [0, 128, 255]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(orientation: int) -> None:
    upright = noise(size=(6, 4))
    # The inverse of what a viewer must do to show it upright.
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = upright.transpose(undo[orientation]) if orientation > 1 else upright
    exif = Image.Exif()
    exif[0x0112] = orientation
    for format in ("PNG", "TIFF"):
        got = decode_image(encoded(stored, format, exif=exif))
        np.testing.assert_array_equal(np.asarray(got), np.asarray(upright))


def test_broken_exif_does_not_cost_the_image() -> None:
    data = encoded(noise(), "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff\x01")
    assert decode_image(data).size == (37, 23)


def test_first_frame_of_an_animation() -> None:
    red, blue = Image.new("RGB", (5, 4), "red"), Image.new("RGB", (5, 4), "blue")
    for format in ("GIF", "PNG", "WEBP"):
        data = encoded(red, format, save_all=True, append_images=[blue], duration=50)
        assert np.asarray(decode_image(data))[2, 2].tolist()[0] > 240, format


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP", "GIF", "BMP"])
@pytest.mark.parametrize("part", [0.1, 0.5, 0.9])
def test_truncated(format: str, part: float) -> None:
    data = encoded(noise(size=(120, 90)), format)
    with pytest.raises(SampleFault) as caught:
        decode_image(data[: int(len(data) * part)])
    assert caught.value.cause == "truncated"


@pytest.mark.parametrize(
    "data, cause",
    [
        (b"", "empty"),
        (b"<html>no image</html>", "undecodable"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "undecodable"),
        (bytes(1000), "undecodable"),
    ],
)
def test_no_image(data: bytes, cause: str) -> None:
    for function in (decode_image, read_header):
        with pytest.raises(SampleFault) as caught:
            function(data)
        assert caught.value.cause == cause


def bomb(width: int, height: int) -> bytes:
    """A PNG whose header promises more than anybody should decode."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        check = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", check)

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    body = zlib.compress(bytes(100))
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", body) + chunk(b"IEND", b"")
    )


@pytest.mark.parametrize("side", [10_000, 30_000, 2**31 - 1])
def test_bombs_are_refused_by_their_header(side: int) -> None:
    with pytest.raises(SampleFault) as caught:
        decode_image(bomb(side, side))
    assert caught.value.cause == "too large"


def test_limit_is_the_callers() -> None:
    data = encoded(noise(), "PNG")
    assert decode_image(data, max_pixels=37 * 23).size == (37, 23)
    limit = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = 10  # Pillow's own does not come into it
    try:
        assert decode_image(data).size == (37, 23)
        assert Image.MAX_IMAGE_PIXELS == 10
    finally:
        Image.MAX_IMAGE_PIXELS = limit
    assert read_header(bomb(30_000, 30_000)) == ("PNG", (30_000, 30_000))
    with pytest.raises(SampleFault, match="too large: 37×23 = 851 pixels, the limit is 850"):
        decode_image(data, max_pixels=850)


def test_warnings_do_not_leak_and_filters_come_back_in_threads() -> None:
    before = list(warnings.filters)
    data = bomb(10_000, 10_000)  # Pillow warns of this size
    errors: list[BaseException] = []

    def work() -> None:
        for _ in range(50):
            try:
                decode_image(data, max_pixels=10)
            except SampleFault as fault:
                if fault.cause != "too large":
                    errors.append(fault)
            except BaseException as error:
                errors.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert list(warnings.filters) == before


def test_random_damage_gives_a_fault_or_an_image() -> None:
    rng = np.random.default_rng(1)
    for format in ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP"):
        data = encoded(noise(), format)
        for _ in range(60):
            damaged = np.frombuffer(data, dtype=np.uint8).copy()
            damaged[rng.integers(0, len(damaged), 8)] = rng.integers(0, 256, 8)
            with contextlib.suppress(SampleFault):  # nothing else may be raised
                assert decode_image(damaged.tobytes(), max_pixels=10**6).mode == "RGB"


def test_fault_survives_pickling() -> None:
    fault = pickle.loads(pickle.dumps(SampleFault("truncated", "12 bytes")))
    assert (fault.cause, fault.detail) == ("truncated", "12 bytes")


def test_find_image_prefers_a_plain_extension() -> None:
    assert find_image({"seg.png": b"s", "cls": b"1", "jpg": b"i"}) == b"i"
    assert find_image({"cls": b"1", "left.png": b"l"}) == b"l"
    with pytest.raises(SampleFault, match="no image"):
        find_image({"cls": b"1"})


@pytest.mark.parametrize(
    "members, label",
    [
        ({}, -1),
        ({"cls": b"12"}, 12),
        ({"cls": b" 3\n"}, 3),
        ({"cls": b"-1"}, -1),
        ({"json": b'{"label": 4}'}, 4),
        ({"json": b'{"label": null}'}, -1),
        ({"json": b'{"caption": "x"}'}, -1),
        ({"cls": b"1", "json": b'{"label": 4}'}, 1),
    ],
)
def test_labels(members: dict[str, bytes], label: int) -> None:
    assert decode_label(members) == label


@pytest.mark.parametrize(
    "members",
    [
        {"cls": b"cat"},
        {"cls": b""},
        {"cls": b"-2"},
        {"cls": b"9" * 40},
        {"cls": b"\xff"},
        {"json": b"{"},
        {"json": b'{"label": 1.5}'},
        {"json": b'{"label": true}'},
    ],
)
def test_bad_labels(members: dict[str, bytes]) -> None:
    with pytest.raises(SampleFault) as caught:
        decode_label(members)
    assert caught.value.cause == "bad label"


def test_pixels_are_those_of_pillow_whatever_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """With simplejpeg and without: upright, turned, grey, CMYK and damaged JPEGs, and a PNG."""
    photo = Image.fromarray(np.random.default_rng(0).integers(0, 255, (31, 45, 3), dtype=np.uint8))
    turned = Image.Exif()
    turned[0x0112] = 6
    files = [
        encoded(photo, "JPEG"),
        encoded(photo.convert("L"), "JPEG"),
        encoded(photo.convert("CMYK"), "JPEG"),
        encoded(photo, "JPEG", exif=turned),
        encoded(photo, "JPEG", exif=turned, icc_profile=bytes(200_000)),
        encoded(photo, "JPEG", progressive=True, icc_profile=bytes(200_000)),
        encoded(photo, "PNG"),
    ]
    padded = files[3]  # with bytes of padding before a marker, and the turn behind it
    files += [padded[:2] + b"\xff\xff" + padded[2:]]
    for library in (True, False):
        if not library:
            monkeypatch.setattr("multikd.data.decode._simplejpeg", lambda: None)
        for data in files:
            pixels = decode_pixels(data)
            assert pixels.dtype == np.uint8
            np.testing.assert_array_equal(pixels, np.asarray(decode_image(data)))
        with pytest.raises(SampleFault, match="truncated"):
            decode_pixels(files[0][: len(files[0]) // 2])
        with pytest.raises(SampleFault, match="too large"):
            decode_pixels(files[0], max_pixels=100)
