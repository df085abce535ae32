"""Formats x types x layouts against the pixels that were written: what a reader does not know, it refuses by name."""

import struct

import imagecodecs
import numpy as np
import pytest
import tifffile
from PIL import Image

from cpikan_hr.data import tiff as tiff_reader
from cpikan_hr.data.source import open_pages, open_source
from cpikan_hr.errors import UserError

RNG = np.random.default_rng(4)
H, W = 45, 67
WINDOWS = [(0, H, 0, W), (0, 1, 0, 1), (13, 38, 29, 67), (31, 45, 3, 50), (H - 1, H, W - 1, W)]


def pixels(dtype, channels=None):
    shape = (H, W) if channels is None else (H, W, channels)
    dtype = np.dtype(dtype)
    if dtype.kind == "f":
        return RNG.normal(size=shape).astype(dtype)
    info = np.iinfo(dtype)
    low, high = max(info.min, -(2**52)), min(info.max, 2**52)
    return RNG.integers(low, high, shape, dtype, endpoint=True)


def agree(path, expected, handed=None):
    """Every window of `path` holds those of `expected`, in `handed` (the dtype of `expected`)."""
    expected = expected.reshape(*expected.shape[:2], -1)
    source = open_source(path)
    assert source.shape == expected.shape and source.dtype == (handed or expected.dtype)
    for y0, y1, x0, x1 in WINDOWS:
        window = source.read(y0, y1, x0, x1)
        assert window.dtype == source.dtype
        np.testing.assert_array_equal(window, expected[y0:y1, x0:x1])


HANDED = {"int8": "float32", "int16": "float32", "float16": "float32"}
HANDED |= dict.fromkeys(("int32", "uint32", "int64", "uint64"), "float64")
TYPES = ["uint8", "int8", "uint16", "int16", "uint32", "int32", "float32", "float64"]
LAYOUTS = {
    "strips": dict(rowsperstrip=8),
    "tiles": dict(tile=(16, 32)),
    "planar": dict(tile=(32, 16), planarconfig="separate"),
}
CODECS = {
    "plain": {},
    "big endian": dict(byteorder=">"),
    "lzw": dict(compression="lzw"),
    "deflate": dict(compression="zlib"),
    "zstd": dict(compression="zstd"),
    "packbits": dict(compression="packbits"),
    "lerc": dict(compression="lerc"),
    "lzma": dict(compression="lzma"),
    "lzw, predictor 2": dict(compression="lzw", predictor=2),
    "deflate, predictor 3": dict(compression="zlib", predictor=3),
    "lzw, predictor, big endian": dict(compression="lzw", predictor=2, byteorder=">"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("codec", CODECS)
def test_a_tiff_is_read_as_it_was_written_whatever_its_codec_type_and_layout(tmp_path, codec, layout):
    options = CODECS[codec] | LAYOUTS[layout]
    planar = layout == "planar"
    for dtype in TYPES:
        if ("predictor 3" in codec) != (dtype[0] == "f") and "predictor" in codec:
            continue
        written = pixels(dtype, 3 if planar else None)
        stored = np.moveaxis(written, 2, 0) if planar else written
        tifffile.imwrite(tmp_path / "p.tif", stored, photometric="rgb" if planar else "minisblack", **options)
        agree(tmp_path / "p.tif", written, HANDED.get(dtype))


def test_float16_and_wide_integers_are_widened_exactly_and_refused_beyond_doubles(tmp_path):
    for dtype in ("float16", "int64", "uint64", "int8", "int16", "bool"):
        written = pixels("uint8") > 127 if dtype == "bool" else pixels(dtype)
        np.save(tmp_path / "p.npy", written)
        agree(tmp_path / "p.npy", written, HANDED.get(dtype, "uint8"))
    np.save(tmp_path / "p.npy", np.array([[2**53 + 1, 0]], np.int64))
    with pytest.raises(UserError, match="beyond 2\\*\\*53"):
        open_source(tmp_path / "p.npy").read(0, 1, 0, 2)
    tifffile.imwrite(tmp_path / "half.tif", half := pixels("float16"), tile=(16, 16))
    agree(tmp_path / "half.tif", half, "float32")


def test_a_picture_in_one_strip_is_decoded_once(tmp_path, monkeypatch):
    monkeypatch.setattr(tiff_reader, "_LARGE", 1000)
    for dtype in ("uint16", "int16", "int32"):
        written = pixels(dtype)
        tifffile.imwrite(tmp_path / "p.tif", written, rowsperstrip=H, compression="lzw", predictor=2)
        agree(tmp_path / "p.tif", written, HANDED.get(dtype))
    source, calls = open_source(tmp_path / "p.tif"), []
    segment = source._segment
    monkeypatch.setattr(source, "_segment", lambda index: calls.append(index) or segment(index))
    for y in range(H):
        source.read(y, y + 1, 0, W)
    assert calls == [0]


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("compression", [None, "lzw"])
def test_grey_levels_from_white_are_turned_round(tmp_path, dtype, compression):
    written = pixels(dtype)
    options = dict(photometric="miniswhite", rowsperstrip=7, compression=compression)
    tifffile.imwrite(tmp_path / "p.tif", np.stack([written, written // 2]), **options)
    top = np.iinfo(dtype).max
    for frame, expected in zip(open_pages(tmp_path / "p.tif"), (written, written // 2), strict=True):
        np.testing.assert_array_equal(frame.read(3, 40, 5, 60)[..., 0], (top - expected)[3:40, 5:60])


@pytest.mark.parametrize("compression", [None, "group4", "tiff_lzw", "packbits"])
def test_one_bit_tiff_is_0_and_255_as_pillow_reads_it(tmp_path, compression):
    image = Image.fromarray(pixels("uint8")).convert("1")
    image.save(tmp_path / "p.tif", compression=compression)
    agree(tmp_path / "p.tif", np.asarray(image.convert("L")))


@pytest.mark.parametrize("bits", [2, 4, 10, 12, 14])
def test_packed_samples_are_scaled_below_eight_bits_and_kept_above(tmp_path, bits):
    written = RNG.integers(0, 2**bits, (H, W), np.uint8 if bits < 8 else np.uint16)
    packed = b"".join(imagecodecs.packints_encode(row, bits) for row in written)
    tags = {256: W, 257: H, 258: bits, 259: 1, 262: 1, 277: 1, 278: H, 279: len(packed)}
    write_tiff(tmp_path / "p.tif", tags, packed)
    agree(tmp_path / "p.tif", written * (255 // (2**bits - 1)) if bits < 8 else written)


def write_tiff(path, tags, data):
    """A little-endian TIFF of one strip, by hand."""
    tags = dict(sorted((tags | {273: 8}).items()))
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags.items())
    directory = struct.pack("<H", len(tags)) + entries + struct.pack("<I", 0)
    path.write_bytes(b"II*\0" + struct.pack("<I", 8 + len(data)) + data + directory)


def test_bits_that_are_filled_from_the_low_end_and_a_missing_photometric_tag(tmp_path):
    written = pixels("uint8")
    reversed_bits = np.packbits(np.unpackbits(written.reshape(-1, 1), axis=1)[:, ::-1], axis=1)
    tags = {256: W, 257: H, 258: 8, 259: 1, 266: 2, 277: 1, 278: H, 279: H * W}
    write_tiff(tmp_path / "p.tif", tags, reversed_bits.tobytes())
    agree(tmp_path / "p.tif", written)


def test_a_palette_of_eight_or_sixteen_bits_is_looked_up(tmp_path):
    written, colours = pixels("uint8"), RNG.integers(0, 256, (3, 256), dtype=np.uint16)
    for colormap, kept in ((colours * 257, colours), (colours * 256, colours), (colours * 251, colours * 251)):
        tifffile.imwrite(tmp_path / "p.tif", written, photometric="palette", colormap=colormap, tile=(16, 16))
        eight = kept is colours
        agree(tmp_path / "p.tif", kept.T[written].astype("uint8" if eight else "uint16"))


def test_jpeg_in_tiff_is_what_pillow_decodes(tmp_path):
    smooth = np.stack([np.add.outer(np.arange(H), np.arange(W)) * k for k in (1, 2, 0.5)], -1).astype(np.uint8)
    for photometric in ("ycbcr", "rgb"):
        tifffile.imwrite(
            tmp_path / "p.tif", smooth, photometric="rgb", compression="jpeg",
            compressionargs={"outcolorspace": photometric}, tile=(32, 32),
        )  # fmt: skip
        read = open_source(tmp_path / "p.tif").read(0, H, 0, W).astype(int)
        assert np.abs(read - np.asarray(Image.open(tmp_path / "p.tif"), int)).max() <= 2


@pytest.mark.parametrize(
    ("photometric", "message"),
    [("separated", "SEPARATED"), ("cielab", "CIELAB"), ("ycbcr", "YCBCR"), ("cfa", "CFA")],
)
def test_colour_schemes_that_are_not_read_are_refused_by_name(tmp_path, photometric, message):
    channels = {"separated": 4, "cfa": None}.get(photometric, 3)
    tifffile.imwrite(tmp_path / "p.tif", pixels("uint8", channels), photometric="minisblack", planarconfig="contig"
                     if channels else None)  # fmt: skip
    with tifffile.TiffFile(tmp_path / "p.tif", mode="r+") as tif:
        tif.pages[0].tags[262].overwrite(int(tifffile.PHOTOMETRIC[photometric.upper()]))
    with pytest.raises(UserError, match=f"{message} TIFF"):
        open_source(tmp_path / "p.tif")


def test_alpha_is_dropped_alike_in_all_formats(tmp_path):
    colour, alpha = pixels("uint8", 3), pixels("uint8")
    both = np.dstack([colour, alpha])
    for name in ("p.png", "p.bmp", "p.webp", "p.tif", "planar.tif", "p.tga"):
        if name == "planar.tif":
            moved = np.moveaxis(both, 2, 0)
            tifffile.imwrite(tmp_path / name, moved, photometric="rgb", extrasamples=["unassalpha"], planarconfig=2)
        elif name == "p.tif":
            tifffile.imwrite(tmp_path / name, both, photometric="rgb", extrasamples=["unassalpha"])
        else:
            Image.fromarray(both).save(tmp_path / name, **({"lossless": True, "exact": True} if "webp" in name else {}))
        agree(tmp_path / name, colour)
    grey = np.dstack([alpha, colour[..., 0]])
    tifffile.imwrite(tmp_path / "grey.tif", grey, photometric="minisblack", extrasamples=["unassalpha"])
    agree(tmp_path / "grey.tif", alpha)
    tifffile.imwrite(tmp_path / "more.tif", both, photometric="rgb", extrasamples=["unspecified"])
    agree(tmp_path / "more.tif", both)  # a fourth channel that nobody calls alpha


def test_colours_that_were_multiplied_by_alpha_are_divided_again(tmp_path):
    alpha = np.maximum(pixels("uint8"), 1)
    colour = (pixels("uint8", 3) / 255.0 * alpha[..., None]).astype(np.uint8)
    tifffile.imwrite(tmp_path / "p.tif", np.dstack([colour, alpha]), photometric="rgb", extrasamples=["assocalpha"])
    agree(tmp_path / "p.tif", np.minimum(np.rint(colour * (255 / alpha[..., None].astype(float))), 255).astype("uint8"))


# ---------------------------------------------------------------- bitmaps


def write_bmp(path, bits, rows, *, masks=(), palette=(), info=40, compression=0):
    """A bottom-up bitmap of `rows` of bytes, by hand."""
    rows = [row + bytes(-len(row) % 4) for row in rows]
    extra = b"".join(struct.pack("<I", mask) for mask in masks) + b"".join(bytes([b, g, r, 0]) for r, g, b in palette)
    tail = bytes(max(0, info - 40 - 4 * len(masks)))
    size = 14 + max(info, 40 + 4 * len(masks)) + 4 * len(palette)
    head = struct.pack("<2sIHHI", b"BM", 0, 0, 0, size)
    head += struct.pack("<IiiHHIIiiII", info, W, H, 1, bits, compression, 0, 0, 0, len(palette), 0)
    path.write_bytes(head + extra[: 4 * len(masks)] + tail + extra[4 * len(masks) :] + b"".join(rows[::-1]))


MASKS = {
    "bgra": (32, 0xFF0000, 0xFF00, 0xFF),
    "rgba": (32, 0xFF, 0xFF00, 0xFF0000),
    "xbgr": (32, 0xFF000000, 0xFF0000, 0xFF00),
    "565": (16, 0xF800, 0x7E0, 0x1F),
    "555": (16, 0x7C00, 0x3E0, 0x1F),
    "444": (16, 0xF00, 0xF0, 0xF),
}


@pytest.mark.parametrize("info", [40, 56, 108, 124])
@pytest.mark.parametrize("name", MASKS)
def test_the_masks_of_a_bitmap_say_where_its_colours_are(tmp_path, name, info):
    bits, *masks = MASKS[name]
    words = RNG.integers(0, 2**bits, (H, W), f"<u{bits // 8}")
    write_bmp(tmp_path / "p.bmp", bits, [row.tobytes() for row in words], masks=masks, info=info, compression=3)
    levels = [(words & mask) // (mask & -mask) / (mask // (mask & -mask)) for mask in masks]
    agree(tmp_path / "p.bmp", np.floor(np.stack(levels, -1) * 255 + 0.5).astype(np.uint8))


def test_sixteen_bits_without_masks_are_555_and_deeper_or_absurd_masks_are_refused(tmp_path):
    words = RNG.integers(0, 2**15, (H, W), "<u2")
    rows = [row.tobytes() for row in words]
    write_bmp(tmp_path / "p.bmp", 16, rows)
    fives = np.stack([words >> shift & 31 for shift in (10, 5, 0)], -1)
    agree(tmp_path / "p.bmp", np.floor(fives / 31 * 255 + 0.5).astype(np.uint8))
    for masks, message in (((0x3FF00000, 0xFFC00, 0x3FF), "more than 8 bits"), ((0xF0F0, 0xF, 0xF00), "no sense")):
        write_bmp(tmp_path / "p.bmp", 32, rows * 2, masks=masks, compression=3)
        with pytest.raises(UserError, match=message):
            open_source(tmp_path / "p.bmp")


@pytest.mark.parametrize("bits", [1, 4])
@pytest.mark.parametrize("coloured", [False, True])
def test_bitmaps_of_one_and_four_bits_are_looked_up(tmp_path, bits, coloured):
    n = 2**bits
    indices = RNG.integers(0, n, (H, W), dtype=np.uint8)
    palette = RNG.integers(0, 256, (n, 3), dtype=np.uint8)
    palette = palette if coloured else np.repeat(palette[:, :1], 3, axis=1)
    rows = [np.packbits(np.unpackbits(row[:, None], axis=1)[:, 8 - bits :].ravel()).tobytes() for row in indices]
    write_bmp(tmp_path / "p.bmp", bits, rows, palette=palette.tolist())
    agree(tmp_path / "p.bmp", palette[indices] if coloured else palette[indices, 0])


def test_run_lengths_are_decoded(tmp_path):
    indices = np.repeat(RNG.integers(0, 256, (H, 1), dtype=np.uint8), W, axis=1)
    indices[:, 40:] = RNG.integers(0, 256, (H, W - 40))
    palette = RNG.integers(0, 256, (256, 3), dtype=np.uint8)
    runs = [bytes([40, row[0], 0, W - 40, *row[40:], 0, 0, 0]) for row in indices]  # run, absolute, end of line
    write_bmp(tmp_path / "p.bmp", 8, [], palette=palette.tolist(), compression=1)
    with open(tmp_path / "p.bmp", "ab") as file:
        file.write(b"".join(runs[::-1]) + bytes([0, 1]))
    agree(tmp_path / "p.bmp", palette[indices])


# ---------------------------------------------------------------- PNG, Netpbm, JPEG and others


@pytest.mark.parametrize("channels", [None, 2, 3, 4])
def test_png_of_sixteen_bits_keeps_them(tmp_path, channels):
    import png

    written = pixels("uint16", channels)
    with open(tmp_path / "p.png", "wb") as file:
        options = dict(greyscale=(channels or 1) < 3, alpha=(channels or 1) in (2, 4), bitdepth=16)
        png.Writer(W, H, **options).write(file, written.reshape(H, -1).tolist())
    agree(tmp_path / "p.png", written if channels in (None, 3) else written[..., : channels - 1])


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_png_of_few_bits_is_scaled_to_255(tmp_path, bits):
    import png

    written = RNG.integers(0, 2**bits, (H, W), dtype=np.uint8)
    with open(tmp_path / "p.png", "wb") as file:
        png.Writer(W, H, greyscale=True, bitdepth=bits).write(file, written.tolist())
    agree(tmp_path / "p.png", written * (255 // (2**bits - 1)))


@pytest.mark.parametrize("text", [False, True])
@pytest.mark.parametrize("top", [1, 15, 255, 4095, 65535])
@pytest.mark.parametrize("channels", [1, 3])
def test_pgm_and_ppm_keep_their_levels(tmp_path, monkeypatch, channels, top, text):
    monkeypatch.setattr("cpikan_hr.data.pnm._PIECE", 100)
    written = RNG.integers(0, top + 1, (H, W, channels), np.uint8 if top < 256 else np.uint16)
    magic = {(1, False): "P5", (3, False): "P6", (1, True): "P2", (3, True): "P3"}[channels, text]
    stored = written.astype(">u2" if top > 255 else "u1").tobytes()
    body = " ".join(map(str, written.ravel())).replace(" ", "\n", 9).encode() if text else stored
    (tmp_path / "p.ppm").write_bytes(f"{magic} # by hand\n{W} {H}\n{top}\n".encode() + body)
    scaled = np.rint(written * (255 / top)).astype(np.uint8) if top < 255 else written
    agree(tmp_path / "p.ppm", scaled)
    (tmp_path / "p.ppm").write_bytes((tmp_path / "p.ppm").read_bytes()[:-200])
    with pytest.raises(UserError, match="p.ppm: truncated"):
        open_source(tmp_path / "p.ppm").read(0, H, 0, W)


def test_pbm_and_pfm(tmp_path):
    image = Image.fromarray(pixels("uint8")).convert("1")
    image.save(tmp_path / "p.pbm")
    agree(tmp_path / "p.pbm", np.asarray(image.convert("L")))
    black = "".join("01"[int(v == 0)] for v in np.asarray(image.convert("L")).ravel())
    (tmp_path / "text.pbm").write_text(f"P1\n{W} {H}\n{black}\n")
    agree(tmp_path / "text.pbm", np.asarray(image.convert("L")))
    for magic, channels, order in (("Pf", 1, "<"), ("PF", 3, ">")):
        written = pixels("float32", channels)
        head = f"{magic}\n{W} {H}\n{'-1.0' if order == '<' else '1.0'}\n".encode()
        (tmp_path / "p.pfm").write_bytes(head + written[::-1].astype(f"{order}f4").tobytes())
        agree(tmp_path / "p.pfm", written)


@pytest.mark.parametrize("dtype", ["uint8", "uint16"])
@pytest.mark.parametrize("channels", [None, 3])
def test_lossless_jpeg_2000_keeps_its_bits(tmp_path, dtype, channels):
    written = pixels(dtype, channels)
    (tmp_path / "p.jp2").write_bytes(imagecodecs.jpeg2k_encode(written, level=0, reversible=True, codecformat="jp2"))
    agree(tmp_path / "p.jp2", written)
    if dtype == "uint16":
        (tmp_path / "p.j2k").write_bytes(
            imagecodecs.jpeg2k_encode(written >> 4, level=0, reversible=True, codecformat="j2k", bitspersample=12)
        )
        agree(tmp_path / "p.j2k", written >> 4)


def test_deep_avif_fits_and_sgi_are_refused_instead_of_cut(tmp_path):
    (tmp_path / "p.avif").write_bytes(imagecodecs.avif_encode(pixels("uint16", 3) >> 6, bitspersample=10))
    sgi = struct.pack(">HBBHHHH", 474, 0, 2, 2, W, H, 1).ljust(512, b"\0") + bytes(2 * W * H)
    (tmp_path / "p.sgi").write_bytes(sgi)
    cards = ["SIMPLE  = T", "BITPIX  = 16", "NAXIS   = 2", f"NAXIS1  = {W}", f"NAXIS2  = {H}", "END"]
    fits = "".join(card.ljust(80) for card in cards).ljust(2880).encode()
    (tmp_path / "p.fits").write_bytes(fits + bytes(2 * W * H))
    for name in ("p.avif", "p.sgi", "p.fits"):
        with pytest.raises(UserError, match="cut to 8|unsupported bit depth") as error:
            open_source(tmp_path / name)
        assert "\n" not in str(error.value)


def test_a_cmyk_jpeg_of_adobe_is_what_pillow_makes_of_it(tmp_path):
    smooth = np.stack([np.add.outer(np.arange(H), np.arange(W)) * k for k in (1, 2, 0.5)], -1).astype(np.uint8)
    Image.fromarray(smooth).convert("CMYK").save(tmp_path / "p.jpg", quality=95)
    agree(tmp_path / "p.jpg", np.asarray(Image.open(tmp_path / "p.jpg").convert("RGB")))


# ---------------------------------------------------------------- several pictures in a file

PAGES = RNG.integers(0, 65536, (2, 3, H, W), dtype=np.uint16)


def write_gif(path, pages):
    frames = [Image.fromarray((page >> 8).astype(np.uint8)) for page in pages]
    frames[0].save(path, save_all=True, append_images=frames[1:], lossless=True)


SEVERAL = {
    "pages.tif": lambda path: tifffile.imwrite(path, PAGES.reshape(6, H, W), photometric="minisblack"),
    "packed.tif": lambda path: tifffile.imwrite(path, PAGES.reshape(6, H, W), photometric="minisblack", compression=5),
    "hyperstack.tif": lambda path: tifffile.imwrite(path, PAGES, imagej=True, metadata={"axes": "ZCYX"}),
    "one_directory.tif": lambda path: tifffile.TiffWriter(path, imagej=True).write(
        PAGES, metadata={"axes": "ZCYX"}, truncate=True
    ),
    "shaped.tif": lambda path: tifffile.imwrite(path, PAGES, photometric="minisblack", truncate=True),
    "channels.ome.tif": lambda path: tifffile.imwrite(path, PAGES, metadata={"axes": "ZCYX"}, photometric="minisblack"),
    "array.npy": lambda path: np.save(path, PAGES),
}


@pytest.mark.parametrize("name", SEVERAL)
def test_of_several_pictures_one_has_to_be_chosen(tmp_path, name):
    SEVERAL[name](tmp_path / name)
    with pytest.raises(UserError, match=r"\[0\]") as error:
        open_source(tmp_path / name)
    assert "\n" not in str(error.value) and ("67" in str(error.value))
    for i, page in enumerate(PAGES.reshape(6, H, W)):
        agree(tmp_path / f"{name}[{i}]", page)
    assert len(open_pages(tmp_path / name)) == 6
    with pytest.raises(UserError, match="no such file|page 6"):
        open_source(tmp_path / f"{name}[6]")


@pytest.mark.parametrize("name", ["p.gif", "p.webp", "p.png"])
def test_of_an_animation_one_frame_has_to_be_chosen(tmp_path, name):
    write_gif(tmp_path / name, PAGES[0])
    with pytest.raises(UserError, match="holds 3 pictures"):
        open_source(tmp_path / name)
    for i, page in enumerate(PAGES[0]):
        window = open_source(tmp_path / f"{name}[{i}]").read(0, H, 0, W)
        np.testing.assert_array_equal(window[..., 0], page >> 8)


def test_thumbnails_smaller_copies_and_masks_are_no_further_pictures(tmp_path):
    written = pixels("uint8", 3)
    with tifffile.TiffWriter(tmp_path / "p.tif") as tif:
        tif.write(written[::2, ::2], photometric="rgb", subfiletype=1)
        tif.write(written, photometric="rgb", subifds=1, tile=(32, 32))
        tif.write(written[::2, ::2], photometric="rgb", subfiletype=1, tile=(32, 32))
        tif.write(written[::4, ::4], photometric="rgb", subfiletype=1)
    agree(tmp_path / "p.tif", written)


def test_a_file_whose_name_looks_like_a_choice_is_that_file(tmp_path):
    np.save(tmp_path / "a.npy", PAGES)
    named = pixels("uint8")
    np.save(tmp_path / "x.npy", named)
    (tmp_path / "x.npy").rename(tmp_path / "a.npy[2]")
    agree(tmp_path / "a.npy[2]", named)
    with pytest.raises(UserError, match=r"b.npy\[2\]: no such file"):
        open_source(tmp_path / "b.npy[2]")


# ---------------------------------------------------------------- orientation


@pytest.mark.parametrize("name", ["p.jpg", "p.png", "p.tif", "p.webp"])
def test_an_orientation_tag_is_told_or_followed(tmp_path, caplog, name):
    from PIL import ImageOps

    image = Image.fromarray(pixels("uint8", 3))
    for tag in range(1, 9):
        caplog.clear()
        exif = Image.Exif()
        exif[0x0112] = tag
        path = tmp_path / f"{tag}{name}"
        image.save(path, exif=exif)
        stored, upright = np.asarray(Image.open(path)), np.asarray(ImageOps.exif_transpose(Image.open(path)))
        if name == "p.tif":  # Pillow has turned it already
            stored, upright = np.asarray(image), stored
        source = open_source(path, upright=True)
        assert source.shape == upright.shape
        np.testing.assert_array_equal(source.read(0, upright.shape[0], 0, upright.shape[1]), upright)
        assert not caplog.records
        agree(path, stored)
        assert caplog.text.count(f"orientation tag {tag}") == (tag > 1)


# ---------------------------------------------------------------- suffixes that lie, and files cut short

CUT = {
    "lzw.tif": lambda path: tifffile.imwrite(path, pixels("uint16"), compression="lzw", rowsperstrip=8),
    "masks.bmp": lambda path: Image.fromarray(pixels("uint8", 4)).save(path),
    "one.bmp": lambda path: Image.fromarray(pixels("uint8")).convert("1").save(path),
    "p.jp2": lambda path: path.write_bytes(imagecodecs.jpeg2k_encode(pixels("uint16"), codecformat="jp2")),
    "p.webp": lambda path: Image.fromarray(pixels("uint8", 3)).save(path),
    "p.gif": lambda path: Image.fromarray(pixels("uint8")).save(path),
    "p.pgm": lambda path: Image.fromarray(pixels("uint8")).save(path),
    "hyperstack.tif": SEVERAL["one_directory.tif"],
}


@pytest.mark.parametrize("kept", [0.0, 0.1, 0.6, 0.97])
@pytest.mark.parametrize("name", CUT)
def test_a_file_cut_short_is_refused_in_one_line(tmp_path, name, kept):
    CUT[name](tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[: int(len(whole) * kept)])
    with pytest.raises(UserError, match=name) as error:
        for source in open_pages(tmp_path / name):
            source.read(0, H, 0, W)
    assert "\n" not in str(error.value)


def test_what_a_file_holds_counts_not_its_suffix(tmp_path):
    written = pixels("uint8", 3)
    for kind in ("png", "bmp", "tiff", "ppm"):
        Image.fromarray(written).save(tmp_path / "p.dat", format=kind)
        for suffix in (".bmp", ".png", ".TIF", ".npy", ""):
            (tmp_path / f"q{suffix}").write_bytes((tmp_path / "p.dat").read_bytes())
            agree(tmp_path / f"q{suffix}", written)


@pytest.mark.parametrize("name", ["lzw.tif", "masks.bmp", "p.jp2", "p.pgm", "hyperstack.tif", "p.npy"])
def test_damage_anywhere_gives_one_line_or_pixels(tmp_path, name):
    if name == "p.npy":
        np.save(tmp_path / name, pixels("uint8"))
    else:
        CUT[name](tmp_path / name)
    whole = (tmp_path / name).read_bytes()
    places = [*RNG.integers(0, min(len(whole), 300), 40), *RNG.integers(0, len(whole), 10)]
    for place in places:
        other = bytes([whole[place] ^ int(RNG.integers(1, 256))])
        (tmp_path / name).write_bytes(whole[:place] + other + whole[place + 1 :])
        try:
            for source in open_pages(tmp_path / name):
                source.read(0, min(H, source.shape[0]), 0, min(W, source.shape[1]))
        except UserError as error:
            assert "\n" not in str(error)


def test_a_picture_taken_out_of_a_stack_is_one_picture(tmp_path):
    written = pixels("uint8")
    for description in ('{"shape": [6, 90, 67]}', '{"shape": [6, 45, 67]}', "ImageJ=1.53t\nimages=6\nslices=6\n"):
        tifffile.imwrite(tmp_path / "p.tif", written, description=description, metadata=None)
        agree(tmp_path / "p.tif", written)
