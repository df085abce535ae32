"""What is launched under which backend file: few launches, each of many programs, since starting takes the most time.

Every program writes into a folder of its own, `folder / name`; the same name means the same program under every backend
and "alone", which is one process without `accelerate launch`.
"""

from pathlib import Path

import equations
import pictures
import yaml
from harness import ROOT

# One of each kind of checkpoint: replicated, sharded optimizer, sharded parameters on the host, optimizer on NVMe.
RESUMED = ("ddp_cpu", "fsdp2", "zero2", "zero3_offload", "zero3_nvme")
SETTLED_RESUMED = ("fsdp2", "zero2", "zero3_offload")
POISONED = ("ddp_cpu", "fsdp2", "zero2", "zero3_offload")
BF16 = ("ddp_cpu", "fsdp2", "zero2", "zero3")
REFUSED = {  # what needs whole weights, under ZeRO-3: the message's first words, and words that ask for it
    "training.ema needs whole weights": ["mixed", "--training.ema", "0.9"],
    "solve.method ssbroyden": ["burgers", "--solve.method", "ssbroyden"],
    "problem.balance needs": ["burgers", "--solve.method", "none", "--problem.balance", "{}"],
    "field.precision double:": ["burgers", "--solve.method", "none"],
}


def train(folder: Path, name: str, tree: dict, *words: str, kind: str = "train") -> dict:
    """The program that trains `tree` in the run folder `folder / name`."""
    path = folder / f"{name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(yaml.safe_dump(tree | {"output": str(folder / name)}))
    return {"name": name, "kind": kind, "words": ["--config", str(path), *words]}


def toy(folder: Path, name: str, *words: str) -> dict:
    return {"name": name, "kind": "toy", "words": [str(folder / name), *words]}


def wide_toy(folder: Path, *words: str) -> dict:
    """Has groups of weights below and above the megabyte from which DeepSpeed swaps at all."""
    shape = ("--steps", "6", "--accumulate", "2", "--clip", "0.1", "--width", "512", "--save-at", "3")
    return toy(folder, "wide", *shape, *words)


def refused(folder: Path) -> list[dict]:
    burgers = yaml.safe_load((ROOT / "recipes" / "burgers.yaml").read_text())
    trees = {"burgers": burgers, "grown": pictures.grown(folder / "pictures"), "mixed": pictures.mixed(folder)}
    return [
        train(folder, f"refused_{number}", trees[name], *words)
        for number, (name, *words) in enumerate(REFUSED.values())
    ]


def launches(config: str, folder: Path) -> list[list[dict]]:
    """The programs of each launch under `accelerate_configs/{config}.yaml`, in their order; "alone" in any order."""

    def all_of(trees: dict[str, dict]) -> list[dict]:
        return [train(folder, name, tree) for name, tree in trees.items()]

    first, second = [], [train(folder, "mixed", pictures.mixed(folder))]
    alone = config == "alone"
    if config in RESUMED:
        first.append(train(folder, "resumed", pictures.mixed(folder), kind="stopped"))
        second.append(train(folder, "resumed", pictures.mixed(folder)))
    if config == "zero3_nvme":
        first.append(wide_toy(folder))
        second.append(wide_toy(folder, "--resume"))
    if config in SETTLED_RESUMED:
        first.append(train(folder, "settled_resumed", pictures.settled(folder / "coloured"), kind="stopped"))
        second.append(train(folder, "settled_resumed", pictures.settled(folder / "coloured")))
    if config in POISONED:
        first.append(toy(folder, "poisoned", "--steps", "5", "--poison", "3:1:2"))
    if config in BF16:
        second.append(toy(folder, "bf16", "--precision", "bf16"))
    if alone:
        second += [wide_toy(folder), toy(folder, "fp16", "--precision", "fp16")]
    if config in ("alone", "zero2"):
        second.append(train(folder, "averaged", pictures.mixed(folder), "--training.ema", "0.9"))
    if config == "zero2_offload":
        second.append(toy(folder, "sgd", "--optimizer", "SGD"))
    if config in ("alone", "ddp_cpu", "zero3"):
        second += all_of(pictures.starts(folder))
        second.append(train(folder, "joining", pictures.joining(folder / "coloured")))
    if config in ("alone", "ddp_cpu", "fsdp2", "zero2", "zero3", "zero3_offload"):
        second.append(train(folder, "swept", pictures.swept(folder / "coloured")))
        second.append(train(folder, "settled", pictures.settled(folder / "coloured")))
    if config in ("alone", "zero3_nvme"):
        wide, begun = pictures.swept_wide(folder / "coloured"), folder / "swept_wide" / "checkpoints" / "step_00000004"
        second.append(train(folder, "swept_wide", wide))
        second += [] if alone else [train(folder, "swept_wide", wide, "--resume", str(begun))]
    if config in ("alone", "ddp_cpu", "zero2"):
        second.append(train(folder, "settled_averaged", pictures.settled(folder / "coloured"), "--training.ema", "0.5"))
    if config in ("alone", "zero2", "zero3"):
        second += all_of(equations.trained("single"))
    if config in ("alone", "ddp_cpu"):
        second += all_of(equations.trained("double") | equations.solved())
        second.append(train(folder, "phases", equations.of_both_phases()))
        second.append(train(folder, "clock", pictures.by_the_clock(folder / "coloured")))
    if config == "ddp_cpu":
        second += all_of(equations.of_one_step())
        for name, steps in {"phases": (7, 21), "clock": (2,)}.items():
            again = [folder / name / "checkpoints" / f"step_{step:08d}" for step in steps]
            tree = equations.of_both_phases() if name == "phases" else pictures.by_the_clock(folder / "coloured")
            second += [train(folder, name, tree, "--resume", str(path)) for path in again]
    if config == "zero3":
        second += refused(folder)
    if alone:
        first, second = second[::2], second[1::2]
    return [programs for programs in (first, second) if programs]
