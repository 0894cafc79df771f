"""Read and decode one image file: JPEG, PNG and all that Pillow reads, from a disk or out of a tar."""

import contextlib
import errno
from collections.abc import Callable
from io import BytesIO
from pathlib import Path
from typing import NamedTuple, Protocol, TypeVar

import numpy as np
import simplejpeg
from PIL import Image, ImageOps, UnidentifiedImageError

from umd.errors import TemporaryError, UserError
from umd.files import LOST, WAITS, again_if_lost

with contextlib.suppress(ImportError):  # at import, so that every process that decodes has it
    from pillow_heif import register_heif_opener

    register_heif_opener()

T = TypeVar("T")
NO_ROOM = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)  # of this process or host, not of a file
ORIENTATION = 0x0112  # EXIF tag; 1: as stored; from 5 on, height and width are swapped
FLOATS = "its pixels are floating-point numbers, with no word on which is black or white: convert it to 8 or 16 bits"


class Stored(Protocol):
    """An image file inside another file, such as a tar. str() gives its location."""

    def read(self) -> bytes: ...


class BrokenPicture(UserError):
    """A picture cannot be read or decoded. `skip_broken` leaves out these only: other errors say nothing about it."""


class Picture(NamedTuple):
    """A whole picture, possibly decoded at a fraction of its size. Crops are in pixels of the original size."""

    pixels: np.ndarray  # uint8 [h, w, C]; of a clip [F, h, w, C]
    size: tuple[int, int]  # original height and width
    scale: tuple[float, float] = (1.0, 1.0)  # h and w over the original ones


Shrink = Callable[[int, int], int]  # height, width -> 1, 2, 4 or 8: factor by which a JPEG may be decoded smaller


def decode(file: str | Path | Stored, shrink: Shrink | None = None) -> Picture:
    """Read an image file: uint8 [h, w, 1 or 3], rotated by its EXIF tag, transparent parts on white.

    shrink: see `Shrink`. A JPEG decoder gives 1/2, 1/4 or 1/8 of the size from fewer frequencies.

    Raises BrokenPicture if it is no picture or cannot be read, and as `read_patiently`.
    """
    encoded = read_file(file)
    try:
        if shrink is not None and (size := upright_jpeg(encoded)) is not None and (factor := shrink(*size)) > 1:
            height, width = (-(-side // factor) for side in size)
            # strict raises for anything unusual in a file; Pillow then decides
            with contextlib.suppress(ValueError):
                small = simplejpeg.decode_jpeg(
                    encoded, "RGB", min_height=height, min_width=width, min_factor=1, strict=True
                )
                if small.shape[:2] == (height, width):
                    return Picture(small, size, (1 / factor, 1 / factor))
        with Image.open(BytesIO(encoded)) as image:
            return whole(pixels(flatten(ImageOps.exif_transpose(image))))
    except Exception as error:  # Pillow's readers raise many kinds of exceptions on damaged data
        raise BrokenPicture(unreadable(file, error)) from error


def read_file(file: str | Path | Stored) -> bytes:
    """Read the bytes of an image file. Raises BrokenPicture if that file cannot be read, and as `read_patiently`."""
    try:
        return read_patiently(Path(file).read_bytes if isinstance(file, str | Path) else file.read, file)
    except OSError as error:
        raise BrokenPicture(unreadable(file, error)) from error


def read_patiently(call: Callable[[], T], file: str | Path | Stored) -> T:
    """Return `call()`, which reads a file; repeat it if a network disk is lost for a moment.

    Raises:
        TemporaryError: the disk stays lost.
        UserError: this process has no room: too many open files, no memory.
        OSError: any other, which says something about the file.
    """
    try:
        return again_if_lost(call, Path(str(file)))
    except OSError as error:
        if error.errno in LOST:
            raise TemporaryError(
                f"cannot read {file} ({error.strerror}), tried for {sum(WAITS):.0f} s: the disk is lost or damaged "
                "there; check it and give the command again, or remove this file if it is the only one"
            ) from error
        if error.errno in NO_ROOM:
            raise UserError(
                f"cannot read {file} ({error.strerror}): raise that limit, or read with fewer workers"
            ) from error
        raise


def whole(array: np.ndarray) -> Picture:
    """Wrap a picture [h, w, C] or clip [F, h, w, C] in its original size."""
    return Picture(array, (array.shape[-3], array.shape[-2]))


def upright_jpeg(encoded: bytes) -> tuple[int, int] | None:
    """Height and width of a JPEG that needs no rotation. None for all other files, and damaged ones."""
    if encoded[:2] != b"\xff\xd8":
        return None
    try:
        if may_be_turned(encoded):
            with Image.open(BytesIO(encoded)) as image:
                if image.getexif().get(ORIENTATION, 1) != 1:
                    return None
        return simplejpeg.decode_jpeg_header(encoded)[:2]
    except Exception:
        return None


def may_be_turned(encoded: bytes) -> bool:
    """Whether a JPEG may need rotation: it has an APP1 segment (Exif, XMP) before its pixels, or an unusual layout."""
    at = 2
    while encoded[at] == 0xFF and 0xC0 <= encoded[at + 1] < 0xFF and not 0xD0 <= encoded[at + 1] <= 0xD9:
        if (marker := encoded[at + 1]) in (0xDA, 0xE1):  # SOS, APP1
            return marker == 0xE1
        at += 2 + int.from_bytes(encoded[at + 2 : at + 4], "big")
    return True


def flatten(image: Image.Image) -> Image.Image:
    """Convert any Pillow image to mode L or RGB; transparent parts become white."""
    if image.mode.startswith("I"):  # 16-bit grey, which Pillow's own conversion would clip at 255
        return Image.fromarray((np.asarray(image).astype(np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    if image.mode == "F":
        raise ValueError(FLOATS)
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        white.alpha_composite(image.convert("RGBA"))
        return white.convert("RGB")
    return image if image.mode in ("L", "RGB") else image.convert("L" if image.mode == "1" else "RGB")


def pixels(image: Image.Image) -> np.ndarray:
    """Convert an image of mode L or RGB to uint8 [h, w, 1 or 3]."""
    array = np.asarray(image)
    return array if array.ndim == 3 else array[..., None]


def unreadable(file: str | Path | Stored, error: Exception) -> str:
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    if isinstance(error, UnidentifiedImageError):
        reason = "it is not an image"
    mends: dict[type, str] = {
        FileNotFoundError: "check its path",
        PermissionError: "give yourself the right to read it (chmod)",
    }
    mend = mends.get(type(error), "replace or remove it")
    return f"cannot read image {file} ({reason}): {mend}"
