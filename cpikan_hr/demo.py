"""The main job end to end (`make demo`): a synthetic stack, the classical decode, a field, its map, and their errors.

Everything lies in one folder, `out/demo-WIDTHxHEIGHT`; a second run begins anew, and replaces what the first wrote.
"""

import json
import math
import os
import subprocess
import sys
import time
from pathlib import Path

from cpikan_hr.cli import Parser, size
from cpikan_hr.data.difference import difference
from cpikan_hr.data.preview import read_decimated, save_preview
from cpikan_hr.data.source import open_source
from cpikan_hr.data.stack import open_stack
from cpikan_hr.data.synth import synth
from cpikan_hr.errors import UserError, exit_on_user_error
from cpikan_hr.owned import refuse_foreign
from cpikan_hr.problems.decode import decode_stack
from cpikan_hr.processes import compute_device
from cpikan_hr.progress import Progress
from cpikan_hr.training.run_folder import refuse_foreign_folder

ROOT = Path(__file__).resolve().parents[1]
WRITTEN = ("stack", "classical.tif", "run", "height.tif", "height.png")


def run(*words: str) -> str:
    """Runs a command of this environment; its errors end the demo."""
    environment = os.environ | {"PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    done = subprocess.run(words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        sys.exit(done.returncode)
    return done.stdout


def refuse_foreign_files(out: Path) -> None:
    """UserError where the folder holds what no demo has written; each command refuses a stranger in its own place."""
    if out.exists() and not out.is_dir():
        raise UserError(f"{out}: is a file; give another --out")
    strangers = sorted({path.name for path in out.glob("*")} - set(WRITTEN))
    if strangers:
        raise UserError(f"{out}: holds {strangers[0]}, which no demo has written; give another --out")
    for path in map(out.joinpath, WRITTEN):
        if path.suffix:
            refuse_foreign(path)
    refuse_foreign_folder(out / "run")


@exit_on_user_error
def main(words: list[str] | None = None) -> None:
    parser = Parser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=size, default=(1750, 2336), help="WIDTHxHEIGHT in px")
    parser.add_argument("--noise", type=float, default=2.0, help="grey levels")
    parser.add_argument("--out", type=Path, default=None)
    arguments = parser.parse_args(words)
    height, width = arguments.size
    out = (arguments.out or Path("out") / f"demo-{width}x{height}").resolve()
    refuse_foreign_files(out)
    out.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    stack = synth(out / "stack", size=(height, width), noise=arguments.noise, seed=0, progress=Progress("synth"))
    truth = out / "stack" / "height_true.npy"
    device = compute_device()
    decoded, _ = decode_stack(open_stack(stack), out / "classical.tif", progress=Progress("decode"), device=device)
    launch_file = "single_gpu" if device.type == "cuda" else "cpu"
    run("accelerate", "launch", "--config_file", f"accelerate_configs/{launch_file}.yaml", "-m", "cpikan_hr.train",
        "--config", "recipes/wafer.yaml", "--problem.stack", str(out / "stack"), "--output", str(out / "run"),
        "--problem.noise", str(max(arguments.noise, 0.3)), "--resume", "never")  # fmt: skip
    run("cpikan-hr", "render", str(out / "run"), "--out", str(out / "height.tif"))
    figures = json.loads(run("cpikan-hr", "evaluate", str(out / "run")))
    maps = [read_decimated(open_source(path))[..., 0] for path in (out / "height.tif", truth)]
    picture = out / "height.png"
    save_preview(picture, [*maps, maps[0] - maps[1]], ["field", "truth", "difference"], unit="nm")
    classical = difference(open_source(Path(decoded)), open_source(truth))
    rmse = math.nan if figures["rmse"] is None else figures["rmse"]
    print(f"stack      {height} x {width} px, {time.perf_counter() - began:.0f} s in all")
    print(f"RMSE       field {rmse:.2f} nm, classical decode {classical.rms:.2f} nm")
    print(f"field      {figures['params_per_px']:.3f} parameters per px, peak RSS {figures['peak_rss_mb']:.0f} MB")
    print(f"map        {out / 'height.tif'}")
    print(f"picture    {picture}")


if __name__ == "__main__":
    sys.exit(main())
