"""Writing a map or picture of any size, window by window, in any order and by several processes: `MapWriter`.

Invariants
* The final file appears by one rename when it is whole; a failure or an interrupt leaves nothing behind.
* Memory depends on the window (and, for TIFF and PNG, on one tile or row), not on the map.
* All windows go into one raw scratch file `NAME.part`. For .npy and .bmp it already is the final file; for .tif and
  .png `finish` streams it into the final format.
"""

import io
import os
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import numpy as np
import png
import tifffile

from cpikan_hr import strict_json
from cpikan_hr.data import bmp
from cpikan_hr.errors import UserError
from cpikan_hr.files import writing
from cpikan_hr.owned import MARK, mark, refuse_foreign, sole_writer

TIFF_TILE = 512
_PNG_LEVEL = 3  # zlib level: noise does not compress better above it, and 65 MP should not take minutes
_DTYPES = {
    ".tif": ("float32", "float64", "uint8", "uint16"),
    ".tiff": ("float32", "float64", "uint8", "uint16"),
    ".npy": ("float32", "float64", "uint8", "uint16"),
    ".png": ("uint8", "uint16"),
    ".bmp": ("uint8",),
}


class MapWriter:
    """A map of `shape` (H, W) or (H, W, C) that becomes the file `path` (.tif, .npy, .png or .bmp) on `finish`.

    `unit`, `pixel_pitch_um` and `description` go into the TIFF's ImageDescription: as JSON, or where the name ends with
    .ome.tif as OME-XML, with the pitch as PhysicalSizeX/Y and the unit of the values as a MapAnnotation.
    One process creates the scratch file (`create=True`) and finishes; others, started after it, write with
    `create=False`.
    `nodata`: what pixels without data hold, which a TIFF says (GDAL_NODATA).
    Leaving the `with` block without `finish` removes everything. UserError: unknown suffix, dtype the format cannot
    hold, disk too small, no permission.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        shape: tuple[int, ...],
        dtype: np.typing.DTypeLike,
        *,
        unit: str | None = None,
        pixel_pitch_um: float | None = None,
        description: str | None = None,
        nodata: float | None = None,
        create: bool = True,
    ):
        self.path, self.dtype = Path(path), np.dtype(dtype)
        self.shape: tuple[int, int, int] = (*shape, 1)[:3]
        self._nodata = nodata
        self._about = {"unit": unit, "pixel_pitch_um": pixel_pitch_um, "description": description}
        self._suffix, self._fd, self._create, self._converted = self.path.suffix.lower(), None, create, False
        self._finished, self._held = False, ExitStack()
        self._check_format()
        self._scratch = self.path.with_name(self.path.name + ".part")
        self._whole = self._scratch if self._direct else self.path.with_name(self.path.name + ".whole.part")
        header = self._header()
        row = self.shape[1] * self.shape[2] * self.dtype.itemsize
        self._offset, self._stride = len(header), row
        size = len(header) + self.shape[0] * row
        if self._suffix == ".bmp":
            padded = bmp.row_bytes(self.shape[1], 8 * self.shape[2])
            size = len(header) + self.shape[0] * padded
            self._offset, self._stride = size - padded, -padded
        try:
            with writing(self.path):
                if create:
                    refuse_foreign(self.path)
                    check_space(self.path.parent, size * (1 if self._direct else 2))
                    self._held.enter_context(sole_writer(self._scratch, "another process is writing it"))
                    self._fd = os.open(self._scratch, os.O_RDWR | os.O_TRUNC)
                    os.ftruncate(self._fd, size)
                    _pwrite(self._fd, memoryview(header), 0)
                else:
                    self._fd = os.open(self._scratch, os.O_RDWR)
        except BaseException:
            self.close()
            raise

    @property
    def _direct(self) -> bool:
        return self._suffix in (".npy", ".bmp")

    def write(self, y0: int, x0: int, block: np.ndarray) -> None:
        """Writes `block` [h, w] or [h, w, C] with its first pixel at (y0, x0). Thread safe for disjoint windows."""
        block = np.asarray(block)
        block = block.reshape(*block.shape[:2], self.shape[2])
        h, w = block.shape[:2]
        assert 0 <= y0 <= y0 + h <= self.shape[0] and 0 <= x0 <= x0 + w <= self.shape[1], (self.shape, y0, x0, h, w)
        assert np.can_cast(block.dtype, self.dtype, "same_kind"), (block.dtype, self.dtype)
        if self._suffix == ".bmp":
            block = block[..., ::-1]  # colours stand as blue, green, red
        block = np.ascontiguousarray(block, self.dtype)
        start = self._offset + y0 * self._stride + x0 * self.shape[2] * self.dtype.itemsize
        with writing(self.path):
            if block[:1].nbytes == self._stride:  # whole rows, one after the other
                _pwrite(self._fd, memoryview(block).cast("B"), start)
            else:
                for i, row in enumerate(block):
                    _pwrite(self._fd, memoryview(row).cast("B"), start + i * self._stride)

    def convert(self) -> None:
        """Brings what was written into the final format, by the creator, after every window is written."""
        assert self._create and not self._converted
        if self._direct:
            mark(self._fd)
        else:
            with writing(self.path):
                self._write_format(self._whole)
        self._converted = True

    def finish(self) -> Path:
        """Gives the whole map its name, once. Of maps that belong together all are converted before one is finished."""
        if not self._converted:
            self.convert()
        with writing(self.path):
            os.replace(self._whole, self.path)
        self._finished = True
        self.close()
        return self.path

    def close(self) -> None:
        """Closes the scratch file; its creator also removes it."""
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None
            if self._create:
                self._whole.unlink(missing_ok=True)
                if not (self._direct and self._finished):  # its name may be another process's by now
                    self._scratch.unlink(missing_ok=True)
        self._held.close()

    def __enter__(self) -> "MapWriter":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    def _check_format(self) -> None:
        if self._suffix not in _DTYPES:
            raise UserError(f"{self.path}: unknown format {self._suffix!r}; end the name with {', '.join(_DTYPES)}")
        if self.dtype.name not in _DTYPES[self._suffix]:
            raise UserError(
                f"{self.path}: {self._suffix} holds {' or '.join(_DTYPES[self._suffix])}, not {self.dtype.name}; "
                "end the name with .tif or .npy"
            )
        if self._suffix in (".png", ".bmp") and self.shape[2] not in (1, 3):
            raise UserError(f"{self.path}: {self._suffix} holds 1 or 3 channels, not {self.shape[2]}; use .tif or .npy")

    def _header(self) -> bytes:
        if self._suffix == ".bmp":
            return bmp.header_bytes(self.shape)
        if self._suffix == ".npy":
            file = io.BytesIO()
            fields = {"descr": self.dtype.str, "fortran_order": False, "shape": self._axes}
            np.lib.format.write_array_header_1_0(file, fields)
            return file.getvalue()
        return b""

    @property
    def _axes(self) -> tuple[int, ...]:
        """Maps of one channel are stored as [H, W]."""
        return self.shape if self.shape[2] > 1 else self.shape[:2]

    def _read(self, y: int, x0: int, x1: int) -> np.ndarray:
        """Pixels [x1 - x0, C] of a row of the scratch file."""
        row = np.empty((x1 - x0, self.shape[2]), self.dtype)
        view, position = memoryview(row).cast("B"), y * self._stride + x0 * row[:1].nbytes
        while len(view):
            got = os.preadv(self._fd, [view], position)
            assert got, "the scratch file was cut while it was written"
            view, position = view[got:], position + got
        return row

    def _write_format(self, whole: Path) -> None:
        if self._suffix == ".png":
            height, width, channels = self.shape
            writer = _MarkedPng(
                width, height, greyscale=channels == 1, bitdepth=8 * self.dtype.itemsize, compression=_PNG_LEVEL
            )
            big_endian = self.dtype.newbyteorder(">")
            with open(whole, "wb") as file:
                rows = (self._read(y, 0, width).astype(big_endian).tobytes() for y in range(height))
                writer.write_packed(file, rows)
            return
        about = {key: value for key, value in self._about.items() if value is not None}
        ome = self.path.name.lower().endswith((".ome.tif", ".ome.tiff"))
        with tifffile.TiffWriter(whole, bigtiff=True, ome=ome) as tif:
            tif.write(
                self._tiles(),
                software=MARK,
                shape=self._axes,
                dtype=self.dtype,
                tile=(TIFF_TILE, TIFF_TILE),
                photometric="rgb" if self.shape[2] == 3 and self.dtype.kind == "u" else "minisblack",
                planarconfig="contig" if self.shape[2] > 1 else None,
                extratags=[] if self._nodata is None else [(42113, "s", 0, f"{self._nodata:g}", True)],
                **(self._ome(about) if ome else {"description": strict_json.dumps(about), "metadata": None}),
            )

    def _ome(self, about: dict) -> dict:
        """OME has a place for the pitch, none for the unit of pixel values: that is a structured annotation."""
        metadata = {"axes": "YXS"[: len(self._axes)]}
        if "pixel_pitch_um" in about:
            metadata |= {f"PhysicalSize{axis}": about["pixel_pitch_um"] for axis in "XY"}
            metadata |= {f"PhysicalSize{axis}Unit": "µm" for axis in "XY"}
        if "unit" in about:
            metadata["MapAnnotation"] = {"Namespace": "cpikan_hr", "ValueUnit": about["unit"]}
        if "description" in about:
            metadata["Description"] = about["description"]
        return {"metadata": metadata}

    def _tiles(self) -> Iterator[np.ndarray]:
        """Tiles in TIFF order, padded with zeros at the right and lower border."""
        height, width, channels = self.shape
        for y in range(0, height, TIFF_TILE):
            for x in range(0, width, TIFF_TILE):
                tile = np.zeros((TIFF_TILE, TIFF_TILE, channels), self.dtype)
                end = min(x + TIFF_TILE, width)
                for i in range(min(TIFF_TILE, height - y)):
                    tile[i, : end - x] = self._read(y + i, x, end)
                yield tile if channels > 1 else tile[..., 0]


class _MarkedPng(png.Writer):
    """Says who wrote the file, as `refuse_foreign` wants it."""

    def write_preamble(self, outfile) -> None:
        super().write_preamble(outfile)
        png.write_chunk(outfile, b"tEXt", b"Software\0" + MARK.encode())


def check_space(folder: Path, needed: int) -> None:
    """UserError where the disk under `folder` has fewer than `needed` bytes free."""
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise UserError(f"{folder}: {needed} bytes are needed and {free} are free; free some space or write elsewhere")


def _pwrite(fd: int, view: memoryview, position: int) -> None:
    while len(view):
        done = os.pwrite(fd, view, position)
        view, position = view[done:], position + done
