"""Heights are in nm, whatever unit and calibration their file says, under any of its names."""

import numpy as np
import pytest
import tifffile

from cpikan_hr.data.heights import open_heights
from cpikan_hr.data.units import nm_per
from cpikan_hr.data.writers import MapWriter
from cpikan_hr.errors import UserError

NM = np.random.default_rng(0).normal(0, 2000, (9, 11))
NAMES = {
    1.0: ["nm", "nanometre"],
    1e3: ["um", "\u00b5m", "\u03bcm", "\\u00B5m", "micron", "microns", "micrometer", "micrometres", "Microns"],
    0.1: ["Å", "\u212b", "angstrom"],
    1e6: ["mm"], 1e7: ["cm"], 1e9: ["m", "metre"], 25.4e6: ["in", "inch"], 25.4e3: ["mil"],
}  # fmt: skip


def read(path, *arguments):
    return open_heights(path, *arguments).read(0, 9, 0, 11)[..., 0]


@pytest.mark.parametrize(("name", "nm"), [(name, nm) for nm, names in NAMES.items() for name in names])
def test_every_name_of_a_unit(name, nm, tmp_path, caplog):
    assert nm_per(name, "") == nm
    with MapWriter(tmp_path / "h.tif", NM.shape, np.float64, unit=name) as writer:
        writer.write(0, 0, NM / nm)
        writer.finish()
    np.testing.assert_allclose(read(tmp_path / "h.tif"), NM, rtol=1e-12)
    np.save(tmp_path / "h.npy", NM / nm)
    np.testing.assert_allclose(read(tmp_path / "h.npy", name), NM, rtol=1e-12)
    assert not caplog.records


def imagej(path, pixels, *lines):
    said = "\n".join(["ImageJ=1.53t", *lines, ""])
    tifffile.imwrite(path, pixels, description=said, metadata=None)


def test_imagejs_value_unit_and_calibration_count_and_the_unit_of_its_sides_does_not(tmp_path, caplog):
    imagej(tmp_path / "h.tif", NM, "unit=mm", "vunit=\\u00B5m", "cf=0", "c0=3.0", "c1=0.5")
    np.testing.assert_allclose(read(tmp_path / "h.tif"), 1000 * (3 + 0.5 * NM), rtol=1e-12)
    assert not caplog.records
    imagej(tmp_path / "sides.tif", NM, "unit=micron")
    np.testing.assert_array_equal(read(tmp_path / "sides.tif"), NM)
    assert "sides are in micron" in caplog.text and "taken as nm" in caplog.text
    np.testing.assert_allclose(read(tmp_path / "sides.tif", "um"), 1000 * NM)
    imagej(tmp_path / "none.tif", NM, "unit=pixel", "vunit=pixel")
    np.testing.assert_array_equal(read(tmp_path / "none.tif"), NM)


def test_gdals_unit_scale_offset_and_no_data(tmp_path):
    xml = "<GDALMetadata>" + "".join(
        f'<Item name="X" sample="0" role="{role}">{value}</Item>'
        for role, value in (("unittype", "metre"), ("scale", 2.0), ("offset", 1.0))
    ) + "</GDALMetadata>"  # fmt: skip
    marked = NM.astype(np.float32)
    marked[2, 3] = -9999
    tags = [(42112, "s", 0, xml, True), (42113, "s", 0, "-9999", True)]
    tifffile.imwrite(tmp_path / "dem.tif", marked, extratags=tags, metadata=None)
    heights = read(tmp_path / "dem.tif")
    assert np.isnan(heights[2, 3]) and np.isnan(heights).sum() == 1
    np.testing.assert_allclose(np.delete(heights, 25), np.delete(1e9 * (1 + 2 * NM), 25), rtol=1e-5)


def test_a_tiff_is_known_by_its_content(tmp_path):
    tifffile.imwrite(tmp_path / "h.tif", NM, metadata={"unit": "um"})
    (tmp_path / "h.tif").rename(tmp_path / "h.dat")
    np.testing.assert_allclose(read(tmp_path / "h.dat"), 1000 * NM)


def test_a_unit_that_no_one_says_is_said_once(tmp_path, caplog):
    np.save(tmp_path / "h.npy", NM)
    for _ in range(2):
        np.testing.assert_array_equal(read(tmp_path / "h.npy"), NM)
    assert caplog.text.count("taken as nm") == 1


def test_a_unit_that_is_no_length_and_two_that_differ_are_refused(tmp_path):
    tifffile.imwrite(tmp_path / "w.tif", NM, metadata={"unit": "waves"})
    tifffile.imwrite(tmp_path / "h.tif", NM, metadata={"unit": "um"})
    with pytest.raises(UserError, match="'waves' is no unit of length"):
        read(tmp_path / "w.tif")
    with pytest.raises(UserError, match="--reference-unit: 'furlong' is no unit"):
        read(tmp_path / "h.tif", "furlong")
    with pytest.raises(UserError, match="says that its values are in um"):
        read(tmp_path / "h.tif", "nm")
    np.testing.assert_allclose(read(tmp_path / "h.tif", "micron"), 1000 * NM)
