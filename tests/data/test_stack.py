"""`stack.yaml` in all its forms, and one clear line for every way to get it wrong."""

import numpy as np
import pytest
import tifffile
import yaml
import zarr
from PIL import Image

from cpikan_hr.data.stack import open_stack
from cpikan_hr.errors import UserError

J, K, H, W = 2, 4, 12, 17
FRAMES = np.random.default_rng(1).integers(0, 256, (J, K, H, W), dtype=np.uint8)
STEPS = [0.0, 1.5, 3.0, 4.5]
LEFT_OUT = ("wavelengths_um", None)


def describe(folder, **changes):
    keys = {"frames": "bucket_*.bmp", "wavelengths_um": [5.0, 5.5], "phase_steps_rad": STEPS, "pixel_pitch_um": 3.2}
    keys = {key: value for key, value in (keys | {"bit_depth": 8} | changes).items() if (key, value) != LEFT_OUT}
    (folder / "stack.yaml").write_text(yaml.safe_dump(keys))
    return folder


@pytest.fixture
def folder(tmp_path):
    for i, frame in enumerate(FRAMES.reshape(-1, H, W)):
        Image.fromarray(frame).save(tmp_path / f"bucket_{i + 5}.bmp")  # 5 ... 12: text order would put 10 first
    return describe(tmp_path)


def test_frames_are_wavelength_major_in_natural_order(folder):
    stack = open_stack(folder)
    assert (stack.J, stack.K, stack.shape, stack.dtype) == (J, K, (H, W), np.uint8)
    np.testing.assert_array_equal(stack.read(3, 9, 4, 15), FRAMES[:, :, 3:9, 4:15])
    np.testing.assert_allclose(stack.phase_steps_rad, [STEPS, STEPS])
    assert stack.mask(0, H, 0, W).all() and stack.mask(1, 3, 2, 7).shape == (2, 5)


@pytest.mark.parametrize("kind", ["pages.tif", "flat.npy", "nested.npy", "flat.zarr", "nested.zarr"])
def test_one_file_may_hold_all_frames(tmp_path, kind):
    pixels = FRAMES if kind.startswith("nested") else FRAMES.reshape(-1, H, W)
    if kind.endswith("tif"):
        tifffile.imwrite(tmp_path / kind, pixels, photometric="minisblack")
    elif kind.endswith("npy"):
        np.save(tmp_path / kind, pixels)
    else:
        zarr.create_array(tmp_path / kind, shape=pixels.shape, dtype=pixels.dtype)[:] = pixels
    stack = open_stack(describe(tmp_path, frames=kind) / "stack.yaml")
    np.testing.assert_array_equal(stack.read(0, H, 2, 9), FRAMES[..., 2:9])


def test_frames_may_be_listed_by_name(folder):
    names = [f"bucket_{i}.bmp" for i in (12, 11, 10, 9, 8, 7, 6, 5)]
    np.testing.assert_array_equal(
        open_stack(describe(folder, frames=names)).read(0, H, 0, W).reshape(-1, H, W), FRAMES.reshape(-1, H, W)[::-1]
    )


@pytest.mark.parametrize("name", ["br[1]", "wafer *", "a?b", "~", "µm ü", "x[!y]"])
def test_the_name_of_a_folder_is_no_pattern(tmp_path, monkeypatch, name):
    (tmp_path / name / "sub[2]").mkdir(parents=True)
    for i, frame in enumerate(FRAMES.reshape(-1, H, W)):
        Image.fromarray(frame).save(tmp_path / name / "sub[2]" / f"f[{i}].BMP")
    monkeypatch.chdir(tmp_path)
    for folder in (tmp_path / name, name):
        for frames in ("sub[2]/f*.BMP", f"{tmp_path}/{name}/sub[2]/f*.BMP", [f"sub[2]/f[{i}].BMP" for i in range(8)]):
            stack = open_stack(describe(tmp_path / name, frames=frames) and folder)
            np.testing.assert_array_equal(stack.read(0, H, 0, W), FRAMES)


def test_a_pattern_matches_neither_hidden_files_nor_mask_and_reference(folder):
    (folder / "._bucket_5.bmp").write_bytes(b"of a Macintosh")
    for name in ("bucket_0.bmp", "bucket_99.bmp"):
        Image.fromarray(np.full((H, W), 255, np.uint8)).save(folder / name)
    stack = open_stack(describe(folder, frames="*.bmp", mask="bucket_0.bmp", reference="bucket_99.bmp"))
    np.testing.assert_array_equal(stack.read(0, H, 0, W), FRAMES)


@pytest.mark.parametrize("names", [
    ["f_-90", "f_0", "f_90", "f_180"], ["f=0.25", "f=0.5", "f=0.75", "f=1.0"], ["f(-1)", "f(-2)", "f(3)", "f(4)"],
])  # fmt: skip
def test_frames_whose_order_their_names_leave_open_have_to_be_listed(tmp_path, names):
    for name, frame in zip(names, FRAMES[0], strict=True):
        Image.fromarray(frame).save(tmp_path / f"{name}.bmp")
    keys = dict(wavelengths_um=[5.0], phase_steps_rad=None)
    with pytest.raises(UserError, match="come first.*list the files"):
        open_stack(describe(tmp_path, frames="f*.bmp", **keys))
    listed = open_stack(describe(tmp_path, frames=[f"{name}.bmp" for name in names], **keys))
    np.testing.assert_array_equal(listed.read(0, H, 0, W), FRAMES[:1])


@pytest.mark.parametrize("names", [
    ["s2-f-9", "s2-f-10", "s10-f-1", "s10-f-2"], ["5.0um_1", "5.0um_2", "5.5um_1", "5.5um_10"],
    ["2024-01-05_9", "2024-01-05_10", "2024-01-05_11", "2024-01-06_1"],
])  # fmt: skip
def test_numbers_in_names_order_the_frames(tmp_path, names):
    for name, frame in zip(names, FRAMES[0], strict=True):
        Image.fromarray(frame).save(tmp_path / f"{name}.bmp")
    stack = open_stack(describe(tmp_path, frames="*.bmp", wavelengths_um=[5.0], phase_steps_rad=None))
    np.testing.assert_array_equal(stack.read(0, H, 0, W), FRAMES[:1])


def test_a_frame_that_is_listed_twice_is_refused(folder):
    with pytest.raises(UserError, match="bucket_7.bmp is listed twice"):
        open_stack(describe(folder, frames=["bucket_*.bmp", "bucket_7.bmp"]))


def test_pages_of_a_file_may_be_listed(tmp_path):
    tifffile.imwrite(tmp_path / "f.tif", FRAMES.reshape(-1, H, W), photometric="minisblack")
    stack = open_stack(describe(tmp_path, frames=[f"f.tif[{i}]" for i in range(7, -1, -1)]))
    np.testing.assert_array_equal(stack.read(0, H, 0, W).reshape(-1, H, W), FRAMES.reshape(-1, H, W)[::-1])
    assert (tmp_path / "f.tif").resolve() in stack.files


def test_signed_frames_are_read_but_their_clipping_is_not_guessed(tmp_path):
    np.save(tmp_path / "f.npy", FRAMES.astype(np.int16) - 99)
    with pytest.raises(UserError, match="bit_depth: where int16 frames are clipped is not known"):
        open_stack(describe(tmp_path, frames="f.npy"))
    keys = yaml.safe_load((tmp_path / "stack.yaml").read_text())
    del keys["bit_depth"]
    (tmp_path / "stack.yaml").write_text(yaml.safe_dump(keys))
    stack = open_stack(tmp_path)
    assert stack.clips is None
    np.testing.assert_array_equal(stack.read(0, H, 0, W), FRAMES.astype(np.float32) - 99)


@pytest.mark.parametrize("name", ["bucket_9.bmp", "bucket_9.png", "bucket_9.tif", "bucket_9.pbm"])
def test_a_frame_of_one_bit_is_refused(folder, name):
    (folder / "bucket_9.bmp").unlink()
    Image.new("1", (W, H)).save(folder / name)
    with pytest.raises(UserError, match=f"{name}: unsupported bit depth: 1 bit shows no fringes"):
        open_stack(describe(folder, frames="bucket_*"))


def test_frames_that_ask_to_be_turned_are_told_once(tmp_path, caplog):
    exif = Image.Exif()
    exif[0x0112] = 6
    for i, frame in enumerate(FRAMES.reshape(-1, H, W)):
        Image.fromarray(frame).save(tmp_path / f"{i}.png", exif=exif)
    np.testing.assert_array_equal(open_stack(describe(tmp_path, frames="*.png")).read(0, H, 0, W), FRAMES)
    assert caplog.text.count("orientation tag") == 1


def test_steps_may_differ_per_wavelength_or_be_unknown(folder):
    rows = [STEPS, [0.1, 1.6, 3.1, 4.6]]
    np.testing.assert_allclose(open_stack(describe(folder, phase_steps_rad=rows)).phase_steps_rad, rows)
    unknown = open_stack(describe(folder, phase_steps_rad=None))
    assert unknown.phase_steps_rad is None and unknown.K == K


def test_wavelengths_may_have_different_numbers_of_steps(folder):
    rows = [[0.0, 1.5, 3.0, 4.5, 6.0], [0.1, 2.0, 4.0]]
    stack = open_stack(describe(folder, phase_steps_rad=rows))
    assert (stack.J, stack.K) == (2, 5)
    np.testing.assert_array_equal(stack.present, [[True] * 5, [True] * 3 + [False] * 2])
    np.testing.assert_array_equal(np.isnan(stack.phase_steps_rad), ~stack.present)
    read = stack.read(0, H, 2, 9)
    np.testing.assert_array_equal(read[stack.present], FRAMES.reshape(-1, H, W)[..., 2:9])
    assert (read[~stack.present] == 0).all()


def test_mask_from_a_picture_and_from_a_circle(folder):
    valid = np.random.default_rng(2).random((H, W)) > 0.5
    Image.fromarray(valid.astype(np.uint8) * 255).save(folder / "mask.png")
    np.testing.assert_array_equal(open_stack(describe(folder, mask="mask.png")).mask(2, 9, 1, 16), valid[2:9, 1:16])
    circle = open_stack(describe(folder, mask={"circle": [6, 8, 3]})).mask(0, H, 0, W)
    y, x = np.mgrid[:H, :W] + 0.5
    np.testing.assert_array_equal(circle, np.hypot(y - 6, x - 8) <= 3)


def test_a_channel_of_colour_frames_is_chosen(tmp_path):
    colour = np.random.default_rng(3).integers(0, 256, (3, H, W, 3), dtype=np.uint8)
    for i, frame in enumerate(colour):
        Image.fromarray(frame).save(tmp_path / f"{i}.png")
    keys = dict(frames="*.png", wavelengths_um=[0.654], phase_steps_rad=None)
    np.testing.assert_array_equal(open_stack(describe(tmp_path, channel=1, **keys)).read(0, H, 0, W)[0], colour[..., 1])
    with pytest.raises(UserError, match="channel: the frames have 3 channels; set it"):
        open_stack(describe(tmp_path, **keys))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"wavelength_um": [5.0]}, "unknown key 'wavelength_um'; did you mean 'wavelengths_um'"),
        ({"wavelengths_um": "five"}, "wavelengths_um: .*expected"),
        ({"wavelengths_um": [5.0, -5.5]}, "wavelengths_um: "),
        ({"pixel_pitch_um": [1, 2]}, "pixel_pitch_um: .*number"),
        ({"phase_steps_rad": [0, "x", 1]}, "phase_steps_rad: .*expected"),
        ({"frames": "*.png"}, "frames: no file matches"),
        ({"frames": ["bucket_5.bmp", "bucket_99.bmp"]}, "bucket_99.bmp: no such frame"),
        ({"wavelengths_um": [5.0, 5.5, 6.0]}, "8 frames found, but 3 wavelengths x 4 phase steps"),
        ({"phase_steps_rad": None, "wavelengths_um": [5.0, 5.5, 6.0]}, "cannot be shared"),
        ({"phase_steps_rad": [0.0, 1.5]}, "too few phase steps"),
        ({"phase_steps_rad": None, "wavelengths_um": [5.0, 5.2, 5.5, 6.0]}, "too few phase steps"),
        ({"phase_steps_rad": [STEPS] * 3}, "3 lists for 2 wavelengths"),
        ({"phase_steps_rad": [STEPS, STEPS[:2]]}, "too few phase steps: 2"),
        ({"phase_steps_rad": [STEPS, STEPS[:3]]}, "8 frames found, but the lists of steps say 7"),
        ({"bit_depth": 24}, "unsupported bit depth 24"),
        ({"bit_depth": 12}, "the frames hold 8 bits"),
        ({"height_range_um": [3, -3]}, "height_range_um: "),
        ({"height_range_um": [3, 3]}, "height_range_um: .*is empty"),
        ({"height_range_um": [-13500, 13500]}, "height_range_um: .*half wavelengths; give micrometres"),
        ({"height_range_um": [-13e-6, 13e-6]}, "height_range_um: .*half wavelengths; give micrometres"),
        ({"height_range_um": [0, float("nan")]}, "height_range_um: "),
        ({"wavelengths_um": [633, 532]}, "wavelengths_um: 633 um .*name the key wavelengths_nm"),
        ({"wavelengths_um": [5000, 5500], "height_range_um": [-13, 13]}, "wavelengths_um: 5000 um .*wavelengths_nm"),
        ({"wavelengths_um": [6.33e-7, 5.32e-7]}, "wavelengths_um: 6.33e-07 um .*micrometres"),
        ({"wavelengths_um": [True, 5.5]}, "wavelengths_um: .*not yes or no"),
        ({"wavelengths_nm": [5000, 5500]}, "wavelengths_um, wavelengths_nm: both are given"),
        ({"wavelengths_um": None, "wavelengths_nm": [5.0, 5.5]}, "wavelengths_nm: 0.005 um .*micrometres"),
        ({"phase_steps_rad": [0, 90, 180, 270]}, "phase_steps_rad: .*degrees"),
        ({"pixel_pitch_um": 3.2e-6}, "pixel_pitch_um: .*micrometres"),
        ({"pixel_pitch_um": -3}, "pixel_pitch_um: "),
        ({"carrier_nm_per_px": [0, float("inf")]}, "carrier_nm_per_px: "),
        ({"bit_depth": True}, "bit_depth: "),
        ({"mask": "bucket_99.bmp"}, "no such file"),
        ({"reference": "h.npy"}, "reference: .*no such file"),
    ],
)
def test_each_mistake_in_the_yaml_gives_one_line(folder, changes, message):
    with pytest.raises(UserError, match=message) as error:
        open_stack(describe(folder, **changes))
    assert "\n" not in str(error.value)


def test_a_folder_without_a_description_is_refused(tmp_path):
    with pytest.raises(UserError, match="stack.yaml: no such file"):
        open_stack(tmp_path)
    (tmp_path / "stack.yaml").write_text("frames: [unclosed")
    with pytest.raises(UserError, match="not valid YAML"):
        open_stack(tmp_path)


def test_frames_of_different_sizes_are_refused(folder):
    Image.fromarray(np.zeros((H, W + 1), np.uint8)).save(folder / "bucket_9.bmp")
    with pytest.raises(UserError, match="bucket_9.bmp: .*one size"):
        open_stack(folder)


def test_a_truncated_or_foreign_frame_is_named(folder):
    path = folder / "bucket_9.bmp"
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(UserError, match="bucket_9.bmp: truncated"):
        open_stack(folder)
    path.write_text("no image at all")
    with pytest.raises(UserError, match="bucket_9.bmp: not an image"):
        open_stack(folder)


def test_a_value_above_the_bit_depth_is_named_with_its_pixel(tmp_path):
    frames = np.zeros((8, H, W), np.uint16)
    frames[5, 7, 9] = 4096
    np.save(tmp_path / "f.npy", frames)
    stack = open_stack(describe(tmp_path, frames="f.npy", bit_depth=12))
    assert stack.read(0, 7, 0, W).max() == 0
    with pytest.raises(UserError, match=r"f.npy\[5\]: pixel \(7, 9\) is 4096: above 2\*\*12 - 1"):
        stack.read(4, H, 6, W)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_pixel_that_is_no_number_is_named(tmp_path, value):
    frames = np.zeros((8, H, W), np.float32)
    frames[2, 3, 4] = value
    np.save(tmp_path / "f.npy", frames)
    with pytest.raises(UserError, match=r"f.npy\[2\]: pixel \(3, 4\) is (nan|inf)"):
        open_stack(describe(tmp_path, frames="f.npy")).read(1, H, 2, W)


def test_wavelengths_in_nm_are_those_in_um(folder):
    stack = open_stack(describe(folder, wavelengths_um=None, wavelengths_nm=[632.8, 532.0]))
    assert stack.wavelengths_um == pytest.approx([0.6328, 0.532])


def test_projected_fringes_have_long_wavelengths_where_heights_are_as_large(folder):
    stack = open_stack(describe(folder, wavelengths_um=[400.0, 420.0], height_range_um=[0, 1600]))
    assert stack.wavelengths_um == [400.0, 420.0]


def test_a_key_that_is_given_twice_is_refused(folder):
    with (folder / "stack.yaml").open("a") as file:
        file.write("pixel_pitch_um: 4.0\n")
    with pytest.raises(UserError, match="pixel_pitch_um is given twice"):
        open_stack(folder)


@pytest.mark.parametrize("value", [np.nan, -np.inf, -9999.0])
def test_what_is_no_number_outside_the_mask_is_no_data(tmp_path, value):
    frames = np.random.default_rng(4).random((8, H, W)).astype(np.float32)
    valid = np.ones((H, W), bool)
    frames[2, 3, 4], valid[3, 4] = value, False
    marked = dict(extratags=[(42113, "s", 0, "-9999", True)], metadata=None, photometric="minisblack")
    tifffile.imwrite(tmp_path / "f.tif", frames, **marked)
    np.save(tmp_path / "m.npy", valid)
    read = open_stack(describe(tmp_path, frames="f.tif", mask="m.npy")).read(1, H, 2, W)
    frames[2, 3, 4] = 0
    np.testing.assert_array_equal(read.reshape(8, H - 1, W - 2), frames[:, 1:, 2:])
    with pytest.raises(UserError, match=r"pixel \(3, 4\) is"):
        open_stack(describe(tmp_path, frames="f.tif")).read(1, H, 2, W)


def test_values_above_the_bit_depth_outside_the_mask_are_no_data(tmp_path):
    frames, valid = np.ones((8, H, W), np.uint16), np.ones((H, W), bool)
    frames[5, 7, 9], valid[7, 9] = 65535, False
    np.save(tmp_path / "f.npy", frames)
    np.save(tmp_path / "m.npy", valid)
    stack = open_stack(describe(tmp_path, frames="f.npy", mask="m.npy", bit_depth=12))
    assert stack.read(0, H, 0, W)[1, 1, 7, 9] == 0
