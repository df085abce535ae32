"""The console command `cpikan-hr`: thin; each sub-command is one function of the package."""

import argparse
import math
import sys
from pathlib import Path

from cpikan_hr import strict_json
from cpikan_hr.errors import UserError, exit_on_user_error
from cpikan_hr.progress import Progress
from cpikan_hr.runtime import prepare_process


class Parser(argparse.ArgumentParser):
    """Mistakes on the command line are one line too."""

    def error(self, message: str):
        raise UserError(f"{self.prog}: {message} (see {self.prog} --help)")


def size(text: str) -> tuple[int, int]:
    """'9344x7000', width x height, to (height, width)."""
    width, cross, height = text.lower().partition("x")
    if not (cross and width.isdigit() and height.isdigit() and int(width) and int(height)):
        raise argparse.ArgumentTypeError(f"'{text}' is not WIDTHxHEIGHT in pixels")
    return int(height), int(width)


def grid(text: str) -> tuple[int, int]:
    """'4x4', wavelengths x steps."""
    first, _, second = text.lower().partition("x")
    if not (first.isdigit() and second.isdigit()):
        raise argparse.ArgumentTypeError(f"'{text}' is not WAVELENGTHSxSTEPS")
    return int(first), int(second)


def positive(text: str) -> int:
    if not text.isdigit() or not int(text):
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return int(text)


def bits(text: str) -> int:
    if not text.isdigit() or int(text) not in range(8, 17):
        raise argparse.ArgumentTypeError(f"'{text}' is not a number of bits from 8 to 16")
    return int(text)


def amplitude(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"'{text}' is not a positive number")
    return value


def finite(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise argparse.ArgumentTypeError(f"'{text}' is not a finite number")
    return value


# those of quantities.py, which would import torch
QUANTITIES = ("value", "gradient", "laplacian", "sigma", "background", "modulation", "residual", "valid", "error")
REMOVE = "what is taken from heights before pv, sq and sa: the mean, the plane, or the second-order surface"

REFERENCE_UNIT = "of the heights in a reference that does not say it: nm, um, mm, ..."


def parser() -> Parser:
    top = Parser(prog="cpikan-hr", description="Scaled-cPIKAN fields for very large images and interferograms")
    commands = top.add_subparsers(dest="command", required=True, parser_class=Parser)
    train = commands.add_parser("train", help="train a recipe on one process", add_help=False)
    train.set_defaults(run=None)
    synth = commands.add_parser("synth", help="write a synthetic wafer stack")
    synth.add_argument("out", type=Path)
    synth.add_argument("--size", type=size, default=(1750, 2336), help="WIDTHxHEIGHT in px")
    synth.add_argument("--frames", type=grid, default=(4, 4), help="WAVELENGTHSxSTEPS")
    synth.add_argument("--wavelengths", type=float, nargs="+", default=None, help="in um")
    synth.add_argument("--noise", type=float, default=2.0, help="standard deviation in 8-bit grey levels")
    synth.add_argument("--gain", type=float, default=0.0, help="variance of shot noise per 8-bit grey level")
    synth.add_argument("--step-error", type=float, default=0.0, help="rms error of the phase steps, rad")
    synth.add_argument("--missing", type=int, default=0, help="frames of each wavelength that are not there")
    synth.add_argument("--saturated", type=float, default=0.0, help="part of the pixels in glints that clip")
    synth.add_argument("--carrier", type=finite, nargs=2, default=None, metavar=("ROWS", "COLUMNS"),
                       help="tilt of the reference: nm of height per row and per column")  # fmt: skip
    synth.add_argument("--height", type=Path, default=None, help="take the surface from a map (.npy, TIFF)")
    synth.add_argument("--height-unit", default=None, help="of that map, where it does not say it: nm, um, mm, ...")
    synth.add_argument("--scale", type=float, default=None, help="multiply the heights of that map")
    synth.add_argument("--seed", type=int, default=0)
    synth.add_argument("--bits", type=int, default=8, choices=[8, 10, 12, 16])
    synth.add_argument("--format", choices=["bmp", "png", "tiff", "npy", "zarr"], default=None)
    decode = commands.add_parser("decode", help="classical height decode of a stack")
    decode.add_argument("stack", type=Path)
    decode.add_argument("--out", type=Path, required=True)
    decode.add_argument("--quality", type=Path, default=None, help="also write the quality map")
    decode.add_argument("--steps", choices=["nominal", "refine", "unknown"], default="nominal",
                        help="phase steps as the stack says, refined on the frames, or found from nothing")  # fmt: skip
    decode.add_argument("--harmonic", action="store_true", help="estimate and correct a second harmonic of the fringes")
    decode.add_argument(
        "--repair", type=amplitude, default=None, metavar="NOISE",
        help="decide wrong orders again, with their surroundings; NOISE: standard deviation of a frame in grey levels",
    )  # fmt: skip
    decode.add_argument("--threads", type=positive, default=None)
    render = commands.add_parser("render", help="render a trained field to TIFF, PNG or npy")
    render.add_argument("trained", metavar="RUN", type=Path)
    render.add_argument("--out", type=Path, required=True)
    render.add_argument("--region", default=None, help="y0:y1,x0:x1 in px of the source, or lattice points")
    render.add_argument("--scale", type=float, default=1.0, help="output pixels per source pixel")
    render.add_argument("--quantity", choices=QUANTITIES, default="value")
    render.add_argument(
        "--mask", choices=["stack", "valid"], default="stack",
        help="NaN outside the stack's mask, or wherever the frames tell nothing (heights)",
    )  # fmt: skip
    render.add_argument("--unit", default=None, help="of heights: nm (the default), um, mm, m, angstrom, in, ...")
    evaluate = commands.add_parser("evaluate", help="compare a trained field with a reference: one JSON line")
    evaluate.add_argument("trained", metavar="RUN", type=Path)
    evaluate.add_argument("--reference", type=Path, default=None)
    evaluate.add_argument("--reference-unit", default=None, help=REFERENCE_UNIT)
    evaluate.add_argument("--remove", choices=["none", "plane", "bow"], default="plane", help=REMOVE)
    report = commands.add_parser("report", help="everything about a run in one HTML file")
    report.add_argument("trained", metavar="RUN", type=Path, help="a run, or a field.safetensors")
    report.add_argument("--out", type=Path, default=None, help="RUN/report.html")
    report.add_argument("--reference", type=Path, default=None)
    report.add_argument("--reference-unit", default=None, help=REFERENCE_UNIT)
    report.add_argument("--remove", choices=["none", "plane", "bow"], default="plane", help=REMOVE)
    export = commands.add_parser("export", help="join the newest checkpoint of a run into one file, or pack its field")
    export.add_argument("trained", metavar="RUN", type=Path, help="a run, or a field.safetensors")
    export.add_argument("--out", type=Path, default=None)
    export.add_argument("--bits", type=bits, default=None, help="pack: quantise to 8..16 bits per weight and compress")
    export.add_argument(
        "--step", type=amplitude, default=None,
        help="pack the terms of sparse levels with this step, in the data's unit; about 4 times the rmse pays best",
    )  # fmt: skip
    commands.add_parser("doctor", help="check this machine's set-up")
    return top


@exit_on_user_error
def main(words: list[str] | None = None) -> int | None:
    words = list(sys.argv[1:] if words is None else words)
    if words[:1] == ["train"]:
        from cpikan_hr.train import main as train

        return train(words[1:])
    arguments = parser().parse_args(words)
    prepare_process()
    return COMMANDS[arguments.command](arguments)


def run_synth(arguments) -> None:
    from cpikan_hr.data.camera import Imperfections
    from cpikan_hr.data.synth import synth

    if arguments.scale is not None and arguments.height is None:
        raise UserError("--scale: multiplies the heights of a map; give --height FILE too")
    if arguments.height_unit is not None and arguments.height is None:
        raise UserError("--height-unit: is of the heights of a map; give --height FILE too")
    wavelengths, steps = arguments.frames
    chosen = arguments.wavelengths or [5.0 * 1.1**j for j in range(wavelengths)]
    if len(chosen) != wavelengths:
        raise UserError(f"--wavelengths: {len(chosen)} given, --frames says {wavelengths}")
    flaws = Imperfections(arguments.step_error, arguments.missing, arguments.saturated, arguments.gain)
    synth(
        arguments.out, size=arguments.size, wavelengths_um=chosen, steps=steps, noise=arguments.noise,
        seed=arguments.seed, bit_depth=arguments.bits, format=arguments.format, height=arguments.height,
        height_unit=arguments.height_unit, scale=1.0 if arguments.scale is None else arguments.scale,
        flaws=flaws, progress=Progress("synth"),
        carrier_nm_per_px=None if arguments.carrier is None else tuple(arguments.carrier),
    )  # fmt: skip
    print(arguments.out)


def run_decode(arguments) -> None:
    from cpikan_hr.data.stack import open_stack
    from cpikan_hr.problems.calibration import calibrate, doubts, tell
    from cpikan_hr.problems.decode import decode_stack
    from cpikan_hr.problems.noise import Noise
    from cpikan_hr.processes import compute_device

    stack = open_stack(arguments.stack)
    shared = calibrate(stack, arguments.steps, arguments.harmonic)
    noise = None if arguments.repair is None else Noise(arguments.repair)
    options = dict(threads=arguments.threads, quality=arguments.quality, shared=shared, repair=noise)
    for path in decode_stack(stack, arguments.out, progress=Progress("decode"), device=compute_device(), **options):
        if path is not None:
            print(path)
    if arguments.steps != "nominal" or arguments.harmonic:
        print(tell(shared))
    for doubt in doubts(shared, noise):
        print(f"warning: {stack.path}: {doubt}", file=sys.stderr)


def run_render(arguments) -> None:
    from cpikan_hr.processes import compute_device, launched
    from cpikan_hr.render import render
    from cpikan_hr.training.weights import load_field

    options = dict(region=arguments.region, scale=arguments.scale, quantity=arguments.quantity)
    options |= dict(unit=arguments.unit, mask=arguments.mask)
    with launched() as processes, processes.together():
        trained = load_field(arguments.trained, compute_device(), mapped=True)
        progress = Progress("render") if processes.rank == 0 else None
        path = render(trained, arguments.out, processes=processes, progress=progress, **options)
        if processes.rank == 0:
            print(path)


def run_evaluate(arguments) -> None:
    from cpikan_hr.data.source import open_source
    from cpikan_hr.evaluate import evaluate
    from cpikan_hr.problems import reference_of, refuse_unit
    from cpikan_hr.processes import compute_device
    from cpikan_hr.training.weights import load_field

    trained = load_field(arguments.trained, compute_device(), mapped=True)
    file = arguments.trained / "field.safetensors" if arguments.trained.is_dir() else arguments.trained
    size = file.stat().st_size
    if trained.recipe.problem.kind == "pde":
        from cpikan_hr.evaluate_pde import evaluate_equation

        refuse_unit(arguments.reference_unit, "an equation")
        reference = open_source(arguments.reference) if arguments.reference else None
        print(strict_json.dumps(evaluate_equation(trained, reference, size)))
        return
    reference = reference_of(trained.recipe, arguments.reference, arguments.reference_unit)
    print(strict_json.dumps(evaluate(trained, reference, size, arguments.remove)))


def run_report(arguments) -> None:
    from cpikan_hr.report import write_report

    options = dict(reference=arguments.reference, reference_unit=arguments.reference_unit, remove=arguments.remove)
    print(write_report(arguments.trained, arguments.out, progress=Progress("report"), **options))


def run_export(arguments) -> None:
    from cpikan_hr.training.export import export

    print(export(arguments.trained, arguments.out, arguments.bits, arguments.step))


def run_doctor(arguments) -> int:
    from cpikan_hr.doctor import doctor

    return doctor()


COMMANDS = {
    "synth": run_synth,
    "decode": run_decode,
    "render": run_render,
    "evaluate": run_evaluate,
    "report": run_report,
    "export": run_export,
    "doctor": run_doctor,
}
