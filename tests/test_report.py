"""A report is opened in a real browser: it shows what render and evaluate say, and asks nothing of a network."""

import io
import json
import re
import shutil
from types import SimpleNamespace

import bad_input
import numpy as np
import pytest
import yaml
from bad_input import refused
from browsing import SETTLED, wait
from PIL import Image

from cpikan_hr.cli import main as cli
from cpikan_hr.report.sections import phase_steps
from cpikan_hr.train import main as train

SHAPE = (330, 600)  # three levels of tiles, none of them square or whole
MASK = [165, 300, 290]  # circle: row, column, radius; the corners are outside
NUMBER = re.compile(r"[-\d.e]+")


@pytest.fixture(autouse=True)
def _at_the_root(monkeypatch, request):
    monkeypatch.chdir(request.config.rootpath)


@pytest.fixture(scope="module")
def made(tmp_path_factory, request):
    """A stack with a mask, a run of a few steps, its report, its map, and what evaluate says."""
    folder = tmp_path_factory.mktemp("report")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(request.config.rootpath)
        stack = bad_input.make_stack(folder / "wafer", SHAPE)
        described = yaml.safe_load((stack / "stack.yaml").read_text())
        (stack / "stack.yaml").write_text(yaml.safe_dump(described | {"mask": {"circle": MASK}}))
        run = bad_input.make_run(stack, folder / "run", 4, "--start.shifts", "1", "--start.wiener", "0")
        assert cli(["report", str(run), "--remove", "bow"]) == 0
        assert cli(["render", str(run), "--out", str(folder / "map.npy")]) == 0
    return SimpleNamespace(stack=stack, run=run, page=run / "report.html", map=np.load(folder / "map.npy"))


def main_map(page):
    return page.locator("canvas.map").first


def level(page):
    wait(page, SETTLED)
    return int(main_map(page).get_attribute("data-level"))


def place_of(page, x, y, shape=SHAPE):
    """Where on the canvas the middle of a pixel of the source is; the whole map is in view."""
    box = main_map(page).bounding_box()
    zoom = min(box["width"] / shape[1], box["height"] / shape[0])
    return {
        "x": box["width"] / 2 + (x + 0.5 - shape[1] / 2) * zoom,
        "y": box["height"] / 2 + (y + 0.5 - shape[0] / 2) * zoom,
    }


def colour_at(page, place):
    """Of the canvas as it is seen."""
    seen = Image.open(io.BytesIO(main_map(page).screenshot())).convert("RGB")
    return np.array(seen.getpixel((int(place["x"]), int(place["y"]))), float)


def readout(page):
    return page.locator("figure.view output").first.inner_text().replace("\u2212", "-")


def curve(page, name):
    """The points of a plot's line, in px of the page."""
    path = page.locator(f"#{name} path").first.get_attribute("d")
    return np.array([float(n) for n in re.findall(r"-?[\d.]+", path)]).reshape(-1, 2)


def test_the_map_is_drawn_in_its_colours(made, opened):
    page = opened(made.page)
    from matplotlib import colormaps

    about = json.loads(page.locator("#data").text_content())["layers"][0]
    for y, x in ((165, 300), (40, 300), (165, 500), (250, 130)):
        part = (made.map[y, x] - about["low"]) / (about["high"] - about["low"])
        expected = 255 * np.array(colormaps["viridis"](part)[:3])
        page.locator("form.point input[name=x]").fill("599")  # the cross out of the way
        page.locator("form.point input[name=y]").fill("0")
        page.locator("form.point button").click()
        wait(page, "document.querySelector('#profile-x-title').textContent.includes('y = 0')")
        wait(page, SETTLED)
        found = colour_at(page, place_of(page, x, y))
        assert np.abs(found - expected).max() < 25
    assert np.ptp(colour_at(page, place_of(page, 5, 320))) < 6  # outside the mask is the grey of the card


def test_the_readout_is_the_rendered_height(made, opened):
    page = opened(made.page)
    step = float(re.search(r"Stored in steps of ([\d.]+) nm", page.content())[1])
    for y, x in ((165, 300), (300, 255), (255, 256), (256, 511), (10, 300), (200, 580)):
        main_map(page).hover(position=place_of(page, x, y))
        wait(page, f"document.querySelector('output').textContent.startsWith('x {x}, y {y} px')")
        value = float(readout(page).rsplit(": ", 1)[1].split(" ")[0])
        assert abs(value - made.map[y, x]) <= step / 2 + 0.06 and readout(page).endswith(" nm")
        assert f"{round((x + 0.5) * 3.2e-3, 4):g}" in readout(page)
    main_map(page).hover(position=place_of(page, 3, 3))
    wait(page, "document.querySelector('output').textContent.endsWith('no value')")


def test_wheel_buttons_keys_and_drag_move_through_the_levels(made, opened):
    page = opened(made.page, width=400)
    assert level(page) == 1
    box = main_map(page).bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.mouse.wheel(0, -900)
    wait(page, "document.querySelector('canvas.map').dataset.level === '0'")
    before = page.locator("output").first.text_content()
    page.mouse.down()
    page.mouse.move(box["x"] + box["width"] / 2 + 60, box["y"] + box["height"] / 2, steps=4)
    page.mouse.up()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    wait(page, f"document.querySelector('output').textContent !== {json.dumps(before)}")
    assert "y = 165" in page.locator("#profile-x-title").inner_text()  # a drag is no click
    page.get_by_role("button", name="Whole map").first.click()
    wait(page, "document.querySelector('canvas.map').dataset.level === '1'")
    main_map(page).focus()
    zoom = float(main_map(page).get_attribute("data-zoom"))
    for key in ("+", "+", "ArrowRight", "ArrowDown", "Enter"):
        page.keyboard.press(key)
    wait(page, "!document.querySelector('#profile-x-title').textContent.includes('y = 165')")
    assert level(page) == 0 and float(main_map(page).get_attribute("data-zoom")) == pytest.approx(4 * zoom)
    page.keyboard.press("0")
    wait(page, "document.querySelector('canvas.map').dataset.level === '1'")
    page.get_by_role("button", name="Zoom in").first.click()
    wait(page, "document.querySelector('canvas.map').dataset.level === '0'")


def test_fingers_pinch_and_tap(made, opened):
    page = opened(made.page, width=400, has_touch=True)
    client = page.context.new_cdp_session(page)
    box = main_map(page).bounding_box()
    x, y = box["x"] + box["width"] / 2, box["y"] + box["height"] / 2

    def touch(kind, *places):
        points = [{"x": px, "y": py, "id": k} for k, (px, py) in enumerate(places)]
        client.send("Input.dispatchTouchEvent", {"type": kind, "touchPoints": points})

    touch("touchStart", (x - 20, y), (x + 20, y))
    for d in range(25, 100, 5):
        touch("touchMove", (x - d, y), (x + d, y))
    touch("touchEnd")
    wait(page, "document.querySelector('canvas.map').dataset.level === '0'")
    assert "y = 165" in page.locator("#profile-x-title").inner_text()
    page.touchscreen.tap(x + 30, y + 40)
    wait(page, "!document.querySelector('#profile-x-title').textContent.includes('y = 165')")


def test_a_click_shows_the_profiles_through_it(made, opened):
    page = opened(made.page)
    first = curve(page, "profile-x")
    assert "y = 165" in page.locator("#profile-x-title").inner_text()
    for y, x in ((165, 300), (270, 420)):
        if y != 165:
            main_map(page).click(position=place_of(page, x, y))
            wait(page, f"document.querySelector('#profile-x-title').textContent.includes('y = {y} px')")
            assert not np.array_equal(first[:50], curve(page, "profile-x")[:50])
        for name, line in (("profile-x", made.map[y]), ("profile-y", made.map[:, x])):
            drawn, line = curve(page, name), line[np.isfinite(line)]
            assert len(drawn) == len(line)  # every pixel is a point
            slope, shift = np.polyfit(line, drawn[:, 1], 1)
            assert slope < 0 and np.abs(slope * line + shift - drawn[:, 1]).max() < 0.5


def test_the_table_says_what_evaluate_says(made, opened, tmp_path, capsys):
    page = opened(made.page)
    rows = page.eval_on_selector_all(
        "#figures tr[data-key]", "rows => rows.map(r => [r.dataset.key, r.cells[1].dataset.value])"
    )
    found = {key: float(value) for key, value in rows}
    capsys.readouterr()
    assert cli(["evaluate", str(made.run), "--remove", "bow"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert {"rmse", "psnr", "ssim", "seam", "pv", "sq", "sa", "bow", "warp", "params", "train_seconds"} <= set(found)
    other = {"peak_rss_mb", "classical_rmse", "over_classical"}  # the memory is that of the process that asks
    for key in set(found) - other:
        assert found[key] == pytest.approx(said[key], rel=1e-12), key
    assert "without the second-order surface" in page.locator("tr[data-key=sq]").inner_text()
    assert cli(["decode", str(made.stack), "--out", str(tmp_path / "h.npy")]) == 0
    error = np.load(tmp_path / "h.npy") - np.load(made.stack / "height_true.npy").reshape(SHAPE)
    assert found["classical_rmse"] == pytest.approx(np.sqrt(np.nanmean(np.square(error, dtype=np.float64))), rel=1e-6)
    assert found["over_classical"] == pytest.approx(found["rmse"] / found["classical_rmse"], rel=1e-4)


def test_error_and_residual_are_those_of_the_map(made, opened):
    page = opened(made.page)
    truth = np.load(made.stack / "height_true.npy").reshape(SHAPE)
    boxes = page.locator("figure.view")
    assert boxes.count() == 4
    sigma = made.run.parent / "sigma.npy"
    assert not cli(["render", str(made.run), "--out", str(sigma), "--quantity", "sigma"])
    for index, (y, x) in ((1, (100, 200)), (1, (165, 400)), (2, (100, 200)), (3, (100, 200))):
        canvas = boxes.nth(index).locator("canvas.map")
        box = canvas.bounding_box()
        zoom = box["width"] / SHAPE[1]
        canvas.hover(position={"x": (x + 0.5) * zoom, "y": (y + 0.5) * zoom})
        output = boxes.nth(index).locator("output")
        wait(page, f"document.querySelectorAll('output')[{index}].textContent.startsWith('x {x}, y {y} px')")
        value = float(output.inner_text().replace("\u2212", "-").rsplit(": ", 1)[1].split(" ")[0])
        if index == 1:
            low, high = (json.loads(page.locator("#data").text_content())["layers"][1][key] for key in ("low", "high"))
            assert abs(value - (made.map[y, x] - truth[y, x])) <= (high - low) / 1000 + 0.01
        elif index == 2:
            assert abs(value - residual(made, y, x)) < 0.05
        else:
            assert value == pytest.approx(float(np.load(sigma)[y, x]), abs=0.02)


def residual(made, y, x):
    """Root mean square of the frames about the best A + B cos, over the noise, by least squares in float64."""
    frames = np.array([np.asarray(Image.open(p))[y, x] for p in sorted(made.stack.glob("bucket_*.bmp"))], float)
    total = 0.0
    for frame, wavelength in zip(frames.reshape(4, 4), [5.0 * 1.1**j for j in range(4)], strict=True):
        phase = 4e-3 * np.pi * float(made.map[y, x]) / wavelength + np.pi / 2 * np.arange(4)
        design = np.stack([np.ones(4), np.cos(phase)], 1)
        total += np.square(frame - design @ np.linalg.lstsq(design, frame)[0]).sum()
    return np.sqrt(total / (4 * (4 - 2))) / 2.0


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [360, 1280])
def test_it_is_readable_on_a_phone_and_in_the_dark(made, opened, width, scheme):
    page = opened(made.page, width, scheme)
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    colours = page.evaluate("(({color, backgroundColor}) => [color, backgroundColor])(getComputedStyle(document.body))")
    ink, paper = (np.mean([float(n) for n in re.findall(r"[\d.]+", colour)[:3]]) for colour in colours)
    assert (ink > paper + 150) if scheme == "dark" else (paper > ink + 150)
    for control in page.locator("button, input, canvas.map").all():
        name = control.evaluate("c => c.ariaLabel || c.labels?.[0]?.textContent || c.textContent")
        assert name.strip() and control.evaluate("c => c.tabIndex") == 0
    assert page.locator("#training path").count() == 2
    assert page.locator("#settings pre").inner_text() == (made.run / "recipe.yaml").read_text()


def test_colours_can_be_fitted_to_the_view(made, opened):
    page = opened(made.page)
    before = page.locator(".ticks").first.inner_text()
    for _ in range(3):
        page.get_by_role("button", name="Zoom in").first.click()
    level(page)
    page.get_by_role("button", name="Colours of this view").first.click()
    assert page.locator(".ticks").first.inner_text() != before


def test_a_run_whose_data_are_gone_and_a_bare_field(made, opened, tmp_path, capsys):
    moved = made.stack.with_name("elsewhere")
    made.stack.rename(moved)
    try:
        shutil.copy(made.run / "field.safetensors", tmp_path / "alone.safetensors")
        assert cli(["report", str(tmp_path / "alone.safetensors"), "--out", str(tmp_path / "alone.html")]) == 0
        reference = ["--reference", str(moved / "height_true.npy"), "--out", str(tmp_path / "known.html")]
        assert cli(["report", str(made.run), *reference]) == 0
    finally:
        moved.rename(made.stack)
    page = opened(tmp_path / "alone.html")
    assert page.locator("figure.view").count() == 1 and page.locator(".missing").count() == 3
    keys = page.eval_on_selector_all("tr[data-key]", "rows => rows.map(r => r.dataset.key)")
    assert "params" in keys and "sq" in keys and "rmse" not in keys
    page = opened(tmp_path / "known.html")
    assert page.locator("figure.view").count() == 2 and page.locator("tr[data-key=rmse]").count() == 1


def test_a_picture_is_shown_in_its_colours(opened, tmp_path):
    y, x = np.mgrid[0:300, 0:500]
    exact = np.stack([128 + 90 * np.sin(x / 30), 128 + 80 * np.cos(y / 25), (x + y) / 4], -1).astype(np.uint8)
    picture = tmp_path / "a<" / "script><b>.png"  # a path that would end a script of the page
    picture.parent.mkdir()
    Image.fromarray(exact).save(picture)
    words = ["--config", "recipes/image.yaml", "--problem.path", str(picture)]
    assert train([*words, "--output", str(tmp_path / "run"), "--training.steps", "0"]) == 0
    assert cli(["report", str(tmp_path / "run"), "--out", str(tmp_path / "p.html")]) == 0
    page = opened(tmp_path / "p.html")
    main_map(page).hover(position=place_of(page, 120, 70, (300, 500)))
    wait(page, "document.querySelector('output').textContent.startsWith('x 120, y 70 px')")
    values = [float(n) for n in readout(page).rsplit(": ", 1)[1].split(" ")[:3]]
    assert np.abs(np.array(values) - exact[70, 120]).max() < 8
    assert page.locator("#profile-x path").count() == 3 and page.locator("#steps").count() == 0
    assert "a</script><b>.png" in page.locator("#settings pre").inner_text()
    assert page.locator("figure.view").count() == 2 and "No gradient steps" in page.locator("#training").inner_text()


def test_found_phase_steps_stand_beside_the_nominal_ones():
    nominal = [[0.0, 1.5, float("nan"), 3.0], [0.0, 1.0, 2.0, 3.0]]
    text = phase_steps(nominal, [[0.0, 1.52, 3.01], [0.1, 1.0, 2.0, 3.0]], [5.0, 5.5])
    assert text.count("<tr") == 5 and "1.5200" in text and "nan" not in text
    assert "as they are" in phase_steps(nominal, None, [5.0, 5.5])
    assert "as they are" in phase_steps(nominal, [[0.0, 1.5, 3.0], [0.0, 1.0, 2.0, 3.0]], [5.0, 5.5])
    assert phase_steps(None, None, [5.0]) == "" and "nominal" not in phase_steps(None, [[0.0, 1.0]], [5.0])


def test_report_of_what_cannot_be(made, tmp_path, capfd):
    assert "no trained field" in refused(cli, ["report", str(tmp_path / "nowhere")], tmp_path, capfd)
    assert "is a folder" in refused(cli, ["report", str(made.run), "--out", str(tmp_path)], tmp_path, capfd)
    (tmp_path / "run").mkdir()
    shutil.copy(made.run / "field.safetensors", tmp_path / "run")
    (tmp_path / "run" / "metrics.jsonl").write_text("{no json}\n")
    assert "metrics.jsonl: cannot be read" in refused(cli, ["report", str(tmp_path / "run")], tmp_path, capfd)
