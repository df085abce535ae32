"""PNG, JPEG and the other formats of Pillow as a `Source`: decoded once, when the first window is asked for.

Invariant: at most one picture is being decoded in a process, and its pixels then stand uncompressed in an anonymous
temporary file (in TMPDIR). PNG and JPEG go there strip by strip, through libvips; the other formats, JPEG in CMYK and
all frames but the first of an animation are decoded whole. Samples are those of the file: alpha is dropped, palettes
are expanded, fewer than 8 bits are scaled to 0..255, no colour profile is applied, nothing is turned.
"""

import os
import threading
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

from cpikan_hr.data.orientation import UPRIGHT
from cpikan_hr.data.pages import page_of
from cpikan_hr.data.windows import MAX_PIXELS, RawRows, Source
from cpikan_hr.errors import UserError
from cpikan_hr.files import temporary_file

Image.MAX_IMAGE_PIXELS = MAX_PIXELS  # Pillow's own bomb limit would refuse frames of large sensors

_MODES = {  # Pillow mode -> the mode it is handed out in, channels, dtype
    **{mode: ("L", 1, np.uint8) for mode in ("1", "L", "LA", "La")},
    **{mode: ("RGB", 3, np.uint8) for mode in ("P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")},
    **{mode: (mode, 1, np.dtype("<u2")) for mode in ("I;16", "I;16L")},
    "I;16B": ("I;16", 1, np.dtype("<u2")),
    "F": ("F", 1, np.float32),
}
_JPEGS = ("JPEG", "MPO")  # MPO: a JPEG with a preview or a gain map behind it
_STREAMED = {**dict.fromkeys(_JPEGS, ("L", "RGB")), "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B")}
_ONE = (*_JPEGS, "PSD")  # formats whose first picture is the picture, whatever follows
_UNTRUE = ("EPS", "FITS", "WMF")  # Pillow leaves out FITS's scale and offset; the others are drawings
_ROWS = 256  # rows handed to the temporary file at a time
_DECODING = threading.Lock()


class Picture(Source):
    """A picture that Pillow reads; `page`: which frame of an animation. UserError: not an image, truncated, bomb,
    several frames and none chosen, a depth that would lose bits."""

    def __init__(self, path: Path, page: int | None = None):
        with _opened(path) as image:
            pages = _pictures(image)
            self._page = page_of(path, page, pages)
            head = _head(path)
            grey = image.format == "PNG" and head[25] == 4  # with alpha: Pillow makes colours of 16 bits
            name = str(path) if pages == 1 else f"{path}[{self._page}]"
            if self._page:
                image.seek(self._page)
            width, height = image.size
            if image.mode not in _MODES or image.format in _UNTRUE:
                kind = f"{image.format} of {image.mode} pixels"
                raise UserError(f"{path}: unsupported bit depth or format: {kind}; save it as PNG or TIFF")
            self._mode, channels, dtype = _MODES["LA" if grey else image.mode]
            self._streamed = not self._page and image.mode in _STREAMED.get(image.format, ())
            bits, one_bit = _bits(image, head), image.mode == "1"
            self._jpeg2000 = image.format == "JPEG2000" and bits > 8
            if bits > 8 and np.dtype(dtype).itemsize == 1:
                if not (self._jpeg2000 or self._streamed):
                    raise UserError(f"{path}: {image.format} of {bits} bits would be cut to 8; save it as PNG or TIFF")
                dtype = np.dtype(np.uint16)
            orientation = _orientation(path, image)
        super().__init__(name, (height, width, channels), np.dtype(dtype))
        self.orientation = orientation
        self.stored = np.dtype(bool) if one_bit else self.stored
        self._path, self._rows, self._lock = path, None, threading.Lock()

    def _read(self, y0, y1, x0, x1):
        with self._lock:
            if self._rows is None:
                with _DECODING:
                    self._rows = self._decode()
        return self._rows.read(y0, y1, x0, x1)

    def _decode(self) -> RawRows:
        height, width, channels = self.shape
        size = height * width * channels * self.dtype.itemsize
        write = self._stream if self._streamed else self._unpack_jpeg2000 if self._jpeg2000 else self._unpack
        with temporary_file(size, self.name) as file:
            try:
                write(file)
            except (OSError, SyntaxError, ValueError, EOFError) as error:
                raise UserError(f"{self._path}: truncated or damaged ({error}); copy the file again") from None
            file.flush()
            dtype = self.dtype.newbyteorder("<")
            return RawRows(os.dup(file.fileno()), self.name, self.shape, dtype, 0, width * channels * dtype.itemsize)

    def _stream(self, file) -> None:
        os.environ.setdefault("VIPS_CONCURRENCY", "1")  # more threads buffer more strips; decoding is one's work anyway
        import pyvips  # not at the start: only pictures need it

        pyvips.cache_set_max(0)
        try:
            source = pyvips.Source.new_from_file(os.fspath(self._path))
            image = pyvips.Image.new_from_source(source, "", access="sequential", fail_on="error")
            if image.bands > self.shape[2]:
                image = image.extract_band(0, n=self.shape[2])
            if (image.height, image.width, image.bands) != self.shape or image.format != _VIPS[self.dtype.name]:
                raise ValueError(f"{image.width} x {image.height} pixels of {image.bands} {image.format}")
            image.write_to_target(pyvips.Target.new_to_descriptor(file.fileno()), ".raw")
        except pyvips.Error as error:
            raise ValueError(str(error).strip().splitlines()[-1].strip()) from None

    def _unpack(self, file) -> None:
        height, width, _ = self.shape
        with _opened(self._path) as image:
            if self._page:
                image.seek(self._page)
            image.load()
            for y in range(0, height, _ROWS):
                strip = image.crop((0, y, width, min(y + _ROWS, height)))
                file.write((strip if strip.mode == self._mode else strip.convert(self._mode)).tobytes())

    def _unpack_jpeg2000(self, file) -> None:
        import imagecodecs  # Pillow would cut colours to 8 bits, and multiply grey levels to fill 16

        try:
            pixels = imagecodecs.jpeg2k_decode(self._path.read_bytes())
        except RuntimeError as error:
            raise ValueError(error) from None
        pixels = pixels.reshape(*self.shape[:2], -1)
        if pixels.dtype != np.uint16:
            raise UserError(f"{self._path}: unsupported bit depth: pixels are {pixels.dtype}; save it as TIFF")
        for y in range(0, self.shape[0], _ROWS):
            file.write(np.ascontiguousarray(pixels[y : y + _ROWS, :, : self.shape[2]], "<u2").tobytes())


_VIPS = {"uint8": "uchar", "uint16": "ushort"}


def count_pictures(path: Path) -> int:
    """How many pictures an animation holds."""
    with _opened(path) as image:
        return _pictures(image)


def _pictures(image: Image.Image) -> int:
    return 1 if image.format in _ONE else getattr(image, "n_frames", 1)


def _opened(path: Path) -> Image.Image:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `Source` checks the size itself
            return Image.open(path)
    except Image.UnidentifiedImageError:
        raise UserError(f"{path}: not an image (BMP, PNG, JPEG, TIFF, PGM, npy and Zarr are read)") from None
    except Image.DecompressionBombError:
        raise UserError(f"{path}: above the limit of {MAX_PIXELS} pixels; cut the image in parts") from None
    except (OSError, SyntaxError, ValueError) as error:
        raise UserError(f"{path}: broken image header ({error}); copy the file again") from None


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(2**16)


def _bits(image: Image.Image, head: bytes) -> int:
    """Bits of a sample in the file, where Pillow's mode does not tell; 8 where it does."""
    if image.format == "PNG":
        return head[24]  # the bit depth of IHDR, which is always the first chunk
    if image.format == "SGI":
        return 8 * head[3]
    if image.format == "JPEG2000":
        size = head.find(b"\xff\x4f\xff\x51")  # SIZ: depth less one and sign of every component, 40 bytes on
        return 8 if size < 0 else max(byte & 127 for byte in head[size + 42 :: 3][: head[size + 41]]) + 1
    if image.format == "AVIF":
        box = head.find(b"av1C")
        return 10 if box >= 0 and head[box + 6] & 64 else 8
    return 8


def _orientation(path: Path, image: Image.Image) -> int:
    """The EXIF orientation, 1 to 8. Pillow decodes a whole PNG in the search for it, so its chunks are walked here."""
    exif = Image.Exif()
    if image.format == "PNG":
        with open(path, "rb") as file:
            file.seek(8)
            while len(head := file.read(8)) == 8 and head[4:] not in (b"eXIf", b"IEND"):
                file.seek(int.from_bytes(head[:4], "big") + 4, 1)
            if head[4:] == b"eXIf":
                exif.load(file.read(int.from_bytes(head[:4], "big")))
    else:
        exif = image.getexif()
    asked = exif.get(0x0112, 1)
    return asked if asked in UPRIGHT else 1
