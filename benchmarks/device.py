"""The option `--device` of benchmarks that also run on a GPU."""

import argparse


def device(name: str) -> str:
    if name not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"'{name}' is neither cpu nor cuda")
    if name == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise argparse.ArgumentTypeError("there is no GPU here")
    return name


def add_device(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", type=device, default="cpu", help="cpu or cuda (default: %(default)s)")
