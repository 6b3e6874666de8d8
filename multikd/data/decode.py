"""Bytes of a sample → an upright 8-bit RGB image and a label; every fault has a countable cause.

What becomes RGB how: transparency is laid over white (what most transparent graphics are drawn
for; dropping it would show arbitrary hidden colours); palettes, grey and black-and-white are
expanded; CMYK is converted without its colour profile; 16-bit grey is scaled by 255/65535; 32-bit
and floating-point images have no known range and are stretched from their least to their greatest
value; of an animation the first frame is taken; the EXIF orientation is applied.
"""

from __future__ import annotations

import functools
import io
import json
import threading
import warnings
from collections.abc import Iterable, Mapping, Sequence
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError

DEFAULT_MAX_PIXELS = 89_478_485  # Pillow's own limit: 256 MB as RGB
# Extension written for each format that is read. Pillow's EPS reader starts ghostscript and others
# are rarely tested with hostile bytes: only these are ever tried.
EXTENSION_OF_FORMAT = {
    "JPEG": "jpg",
    "MPO": "jpg",  # JPEGs of several pictures, as telephones write them
    "PNG": "png",
    "WEBP": "webp",
    "GIF": "gif",
    "BMP": "bmp",
    "TIFF": "tif",
    "PPM": "ppm",
    "JPEG2000": "jp2",
    "AVIF": "avif",
}
IMAGE_EXTENSIONS = frozenset(EXTENSION_OF_FORMAT.values()) | {
    *("jpeg", "jpe", "jfif", "mpo", "tiff", "pgm", "pbm", "pnm", "j2k", "img")
}
_MAGIC = (b"\xff\xd8\xff", b"\x89PNG\r\n\x1a\n", b"RIFF", b"GIF8", b"BM", b"II*\x00", b"MM\x00*")
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_EXIF_ORIENTATION = 0x0112
_START_OF_SCAN = 0xDA  # the JPEG marker behind which the pixels begin


class SampleFault(ValueError):
    """A sample that cannot be used.

    Attributes:
        cause: short and countable: ``truncated``, ``undecodable``, ``too large``, ``empty``,
            ``no image``, ``bad label``; from reading also ``unreadable``, ``unreachable``,
            ``shard changed``.
        detail: the particulars, for a log.
    """

    def __init__(self, cause: str, detail: str) -> None:
        super().__init__(cause, detail)  # both, so that it survives pickling between processes
        self.cause = cause
        self.detail = detail

    def __str__(self) -> str:
        return f"{self.cause}: {self.detail}"


class _Quiet:
    """Silence Pillow's warnings and its own size limit while any thread is inside.

    It warns where we return a fault, and its limit would hold below a larger ``max_pixels``.
    ``warnings.catch_warnings`` alone would leave the wrong filters behind when threads overlap.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._depth = 0
        self._caught = warnings.catch_warnings()
        self._limit = Image.MAX_IMAGE_PIXELS

    def __enter__(self) -> None:
        with self._lock:
            self._depth += 1
            if self._depth == 1:
                self._caught = warnings.catch_warnings()
                self._caught.__enter__()
                warnings.simplefilter("ignore")
                self._limit, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self._lock:
            self._depth -= 1
            if self._depth == 0:
                Image.MAX_IMAGE_PIXELS = self._limit
                self._caught.__exit__(kind, error, trace)


_quiet = _Quiet()


def decode_image(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> Image.Image:
    """Decode an encoded image to upright 8-bit RGB (see the head of this file for how).

    Args:
        data: a whole JPEG, PNG, WebP, GIF, BMP, TIFF, PPM, JPEG 2000 or AVIF file.
        max_pixels: an image of more is refused by its header, before any of it is decoded.

    Returns:
        A PIL image of mode RGB, not tied to ``data``.

    Raises:
        SampleFault: ``empty``, ``too large``, ``truncated`` or ``undecodable``.
    """
    return decode_with_format(data, max_pixels)[0]


def decode_pixels(data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS) -> NDArray[np.uint8]:
    """As ``decode_image``, to an array ``(H, W, 3)``.

    Upright JPEGs go straight to libjpeg-turbo where simplejpeg is installed (``multikd[fast]``):
    the same pixels, in three quarters of the time. Whatever it does not take, Pillow decodes.

    Raises:
        SampleFault: ``empty``, ``too large``, ``truncated`` or ``undecodable``.
    """
    if data.startswith(b"\xff\xd8\xff"):
        pixels = _decode_jpeg(data, max_pixels)
        if pixels is not None:
            return pixels
    return np.array(decode_image(data, max_pixels))


def _decode_jpeg(data: bytes, max_pixels: int) -> NDArray[np.uint8] | None:
    library = _simplejpeg()
    if library is None:
        return None
    # Images that lie on their side or hold several pictures are Pillow's, and so is CMYK.
    header = _jpeg_header(data)
    if header is None or b"MPF\x00" in header:
        return None
    try:
        if b"Exif\x00" in header:
            with _quiet, Image.open(io.BytesIO(data), formats=("JPEG",)) as image:
                if _orientation(image) != 1:
                    return None
        height, width, colours, _ = library.decode_jpeg_header(data)
        if colours not in ("YCbCr", "Gray"):
            return None
        _refuse_bomb((width, height), max_pixels)
        # The accurate transform, as Pillow has it; strict, so that damage is found.
        pixels: NDArray[np.uint8] = library.decode_jpeg(data, "RGB", fastdct=False, strict=True)
        return pixels
    except SampleFault:
        raise
    except Exception:  # Pillow says what it is
        return None


def _jpeg_header(data: bytes) -> bytes | None:
    """Everything before a JPEG's pixels; None where it is not one marked segment after another."""
    place, last = 2, len(data) - 4
    while place <= last and data[place] == 0xFF:
        marker = data[place + 1]
        if marker == _START_OF_SCAN:
            return data[:place]
        if marker == 0xFF or marker < 0xC0 or 0xD0 <= marker <= 0xD9:  # padding, or no length
            return None
        place += 2 + (data[place + 2] << 8 | data[place + 3])
    return None


@functools.cache
def _simplejpeg() -> Any:
    try:
        import simplejpeg
    except ImportError:
        return None
    return simplejpeg


def decode_with_format(
    data: bytes, max_pixels: int = DEFAULT_MAX_PIXELS
) -> tuple[Image.Image, str]:
    """As ``decode_image``, with Pillow's name of the format (``JPEG``, ``PNG``, …) beside it."""
    if not data:
        raise SampleFault("empty", "the image has no bytes")
    try:
        with _quiet, Image.open(io.BytesIO(data), formats=_formats()) as image:
            _refuse_bomb(image.size, max_pixels)
            image.load()
            turn = _TURNS.get(_orientation(image))
            rgb = _to_rgb(image)
            rgb = rgb.transpose(turn) if turn is not None else rgb
            return rgb, image.format or "unknown"
    except SampleFault:
        raise
    except MemoryError as error:
        raise SampleFault("too large", "out of memory") from error
    except Exception as error:  # hostile bytes make codecs raise nearly anything
        raise _fault_of(error, data) from error


def read_header(data: bytes) -> tuple[str, tuple[int, int]]:
    """Format and (width, height) as the header has them, nothing decoded.

    Raises:
        SampleFault: ``empty``, ``truncated`` or ``undecodable``.
    """
    if not data:
        raise SampleFault("empty", "the image has no bytes")
    try:
        with _quiet, Image.open(io.BytesIO(data), formats=_formats()) as image:
            return image.format or "unknown", image.size
    except Exception as error:  # as above
        raise _fault_of(error, data) from error


@functools.cache
def _formats() -> tuple[str, ...]:
    """Those of our formats that this Pillow opens (AVIF may be missing; MPO comes by JPEG)."""
    Image.init()
    return tuple(name for name in EXTENSION_OF_FORMAT if name in Image.OPEN)


def _refuse_bomb(size: tuple[int, int], max_pixels: int) -> None:
    width, height = size
    if width * height > max_pixels:
        raise SampleFault(
            "too large", f"{width}×{height} = {width * height} pixels, the limit is {max_pixels}"
        )
    if width < 1 or height < 1:
        raise SampleFault("undecodable", f"the header says {width}×{height} pixels")


def _fault_of(error: Exception, data: bytes) -> SampleFault:
    detail = f"{type(error).__name__}: {error}"
    if isinstance(error, UnidentifiedImageError):
        detail = "no known image format"
        cut = data.startswith(_MAGIC) and _end_is_missing(data)
    else:
        words = str(error).lower()
        cut = isinstance(error, EOFError) or "truncated" in words or _end_is_missing(data)
    return SampleFault("truncated" if cut else "undecodable", detail)


def _end_is_missing(data: bytes) -> bool:
    """Whether a file of a known format lacks the mark or the length that its end should have."""
    if data.startswith(b"\xff\xd8"):
        return b"\xff\xd9" not in data[-64:]
    if data.startswith(b"\x89PNG"):
        return b"IEND" not in data[-64:]
    if data.startswith(b"RIFF"):
        return len(data) < 8 + int.from_bytes(data[4:8], "little")
    if data.startswith(b"GIF8"):
        return b"\x3b" not in data[-8:]
    if data.startswith(b"BM"):
        return len(data) < int.from_bytes(data[2:6], "little")
    return False


def _orientation(image: Image.Image) -> int:
    try:
        value = image.getexif().get(_EXIF_ORIENTATION, 1)
    except Exception:  # a broken EXIF block says nothing of the pixels
        return 1
    return value if isinstance(value, int) else 1


def _to_rgb(image: Image.Image) -> Image.Image:
    """``image`` as RGB; always a copy."""
    mode = image.mode
    if mode.startswith("I;16") or mode in ("I", "F"):
        return Image.fromarray(_to_eight_bits(np.asarray(image), mode)).convert("RGB")
    if "transparency" in image.info or mode in ("LA", "La", "PA", "RGBA", "RGBa"):
        opaque = image.convert("RGBA")
        white = Image.new("RGBA", opaque.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, opaque).convert("RGB")
    return image.convert("RGB") if mode != "RGB" else image.copy()


def _to_eight_bits(values: NDArray[Any], mode: str) -> NDArray[np.uint8]:
    """16-bit, 32-bit or float grey ``(H, W)`` → uint8 ``(H, W)``."""
    grey = np.nan_to_num(values.astype(np.float64))
    low, high = float(grey.min()), float(grey.max())
    if mode.startswith("I;16") or (mode == "I" and low >= 0 and high <= 65535):
        low, high = 0.0, 65535.0
    grey = (grey - low) * (255.0 / (high - low)) if high > low else np.zeros_like(grey)
    return np.rint(grey).clip(0, 255).astype(np.uint8)


def image_extension(extensions: Iterable[str]) -> str | None:
    """The extension that holds the image: a plain one (``jpg``) before a compound one.

    ``seg.png`` is compound: it counts where no plain image extension is there.
    """
    extensions = list(extensions)
    for extension in extensions:
        if extension in IMAGE_EXTENSIONS:
            return extension
    for extension in extensions:
        if extension.rpartition(".")[2] in IMAGE_EXTENSIONS:
            return extension
    return None


def find_image(members: Mapping[str, bytes]) -> bytes:
    """The encoded image among a sample's members.

    Raises:
        SampleFault: ``no image``.
    """
    extension = image_extension(members)
    if extension is None:
        raise SampleFault("no image", f"members: {', '.join(members) or 'none'}")
    return members[extension]


def decode_label(members: Mapping[str, bytes]) -> int:
    """The class of a sample: ``.cls`` (a decimal number), else ``label`` in ``.json``; else −1.

    Raises:
        SampleFault: ``bad label``, where there is a label that is no integer from −1 up.
    """
    if "cls" in members:
        return _as_label(members["cls"], "cls")
    if "json" in members:
        try:
            record = json.loads(members["json"])
        except (ValueError, RecursionError) as error:
            raise SampleFault("bad label", f"json: {error}") from error
        if isinstance(record, dict) and record.get("label") is not None:
            return _as_label(str(record["label"]).encode(), "json")
    return -1


def decode_columns(members: Mapping[str, bytes], columns: Sequence[str]) -> tuple[int, ...]:
    """Further class numbers of a sample: values of its ``.json``, −1 where it has none.

    Raises:
        SampleFault: ``bad label``, where a value is no integer from −1 up.
    """
    if not columns or "json" not in members:
        return (-1,) * len(columns)
    try:
        record = json.loads(members["json"])
    except (ValueError, RecursionError) as error:
        raise SampleFault("bad label", f"json: {error}") from error
    found = [record.get(name) if isinstance(record, dict) else None for name in columns]
    return tuple(-1 if v is None else _as_label(str(v).encode(), "json") for v in found)


def _as_label(text: bytes, member: str) -> int:
    try:
        label = int(text.decode("ascii")) if len(text) < 32 else -2
    except ValueError:
        label = -2
    if not -1 <= label < 2**31:
        raise SampleFault("bad label", f"{member}: expected a class number, received {text[:32]!r}")
    return label
