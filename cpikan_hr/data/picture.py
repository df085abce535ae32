"""PNG, JPEG and the other formats of Pillow as a `Source`: decoded once, when the first window is asked for.

Invariant: at most one picture is being decoded in a process, and its pixels then stand uncompressed in an anonymous
temporary file (in TMPDIR). PNG and JPEG go there strip by strip, through libvips; the other formats, and JPEG in CMYK,
are decoded whole by Pillow. Alpha is dropped, palettes are expanded, EXIF rotation is not applied.
"""

import os
import threading
import warnings
from pathlib import Path

import numpy as np
from PIL import Image

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
_STREAMED = {"JPEG": ("L", "RGB"), "PNG": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16", "I;16B")}  # modes, by libvips
_ROWS = 256  # rows handed from Pillow to the temporary file at a time
_DECODING = threading.Lock()


class Picture(Source):
    """A picture that Pillow reads. UserError: not an image, truncated, bomb, a depth that would lose bits."""

    def __init__(self, path: Path):
        with self._opened(path) as image:
            width, height = image.size
            if image.mode not in _MODES:
                raise UserError(f"{path}: unsupported bit depth: {image.mode} pixels; save it with 8 or 16 bits")
            self._mode, channels, dtype = _MODES[image.mode]
            self._streamed = image.mode in _STREAMED.get(image.format, ())
            if image.format == "PNG" and channels == 3 and _png_bits(path) == 16:
                raise UserError(f"{path}: 16-bit colour PNG would be cut to 8 bits; save it as TIFF or in grey")
        super().__init__(str(path), (height, width, channels), np.dtype(dtype))
        self._path, self._rows, self._lock = path, None, threading.Lock()

    @staticmethod
    def _opened(path: Path) -> Image.Image:
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # `Source` checks the size itself
                return Image.open(path)
        except Image.UnidentifiedImageError:
            raise UserError(f"{path}: not an image (BMP, PNG, JPEG, TIFF, npy and Zarr are read)") from None
        except Image.DecompressionBombError:
            raise UserError(f"{path}: above the limit of {MAX_PIXELS} pixels; cut the image in parts") from None
        except (OSError, SyntaxError, ValueError) as error:
            raise UserError(f"{path}: broken image header ({error}); copy the file again") from None

    def _read(self, y0, y1, x0, x1):
        with self._lock:
            if self._rows is None:
                with _DECODING:
                    self._rows = self._decode()
        return self._rows.read(y0, y1, x0, x1)

    def _decode(self) -> RawRows:
        height, width, channels = self.shape
        size = height * width * channels * self.dtype.itemsize
        with temporary_file(size, self.name) as file:
            try:
                self._stream(file) if self._streamed else self._unpack(file)
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
            image.write_to_target(pyvips.Target.new_to_descriptor(file.fileno()), ".raw")
        except pyvips.Error as error:
            raise ValueError(str(error).strip().splitlines()[-1].strip()) from None

    def _unpack(self, file) -> None:
        height, width, _ = self.shape
        with self._opened(self._path) as image:
            image.load()
            for y in range(0, height, _ROWS):
                strip = image.crop((0, y, width, min(y + _ROWS, height)))
                file.write((strip if strip.mode == self._mode else strip.convert(self._mode)).tobytes())


def _png_bits(path: Path) -> int:
    with open(path, "rb") as file:
        return file.read(25)[24]  # the bit depth field of IHDR, which is always the first chunk
