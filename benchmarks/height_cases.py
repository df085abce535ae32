"""What `heights.py` measures, as data: how a stack is made, how the recipe is changed, and what is asked of the field.

A limit is on the field's figure over that of another estimate of the height (`decode`: the classical decode with the
steps of stack.yaml; `tile_dct`: thresholded overlapping tiles of it). Figures: `rmse`, `near_steps` (RMSE within 3 px
of a jump above 15 nm), `wrong_orders` (pixels off by more than a quarter of the shortest wavelength).
"""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROUNDED = 0.1  # grey levels, of frames without noise: the frame model counts their rounding by itself


@dataclass(frozen=True)
class Case:
    name: str
    noise: float  # of the frames, 8-bit grey levels
    synth: dict[str, Any] = field(default_factory=dict)  # further options of `cpikan-hr synth`
    recipe: dict[str, Any] = field(default_factory=dict)  # changes of `base`
    limits: dict[tuple[str, str], float] = field(default_factory=dict)  # (figure, other estimate) -> largest ratio
    base: str = "recipes/wafer.yaml"

    @property
    def overrides(self) -> dict[str, Any]:
        return {"problem.noise": max(self.noise, ROUNDED)} | self.recipe


def limits(decode: float, tile_dct: float | None = None) -> dict[tuple[str, str], float]:
    return {("rmse", "decode"): decode} | ({} if tile_dct is None else {("rmse", "tile_dct"): tile_dct})


REFINE, REPAIR = {"problem.steps": "refine"}, {"problem.repair": True}

WAFER = [
    Case("4 steps, no noise", 0, limits=limits(1.0)),
    Case("4 steps, sigma 2", 2, limits=limits(0.33, 0.95)),
    Case(
        "4 steps, sigma 5", 5,
        limits=limits(0.27, 0.95) | {("near_steps", "decode"): 0.4, ("near_steps", "tile_dct"): 1.0},
    ),
    Case("3 steps, sigma 2", 2, {"frames": "4x3"}, limits=limits(0.33, 0.95)),
    Case("steps wrong by 0.1 rad, no noise", 0, {"step-error": 0.1}, REFINE, limits(0.1)),
    Case("steps wrong by 0.1 rad, sigma 2", 2, {"step-error": 0.1}, REFINE, limits(0.3)),
    Case("a frame missing, 2 % saturated, sigma 2", 2, {"missing": 1, "saturated": 0.02}, limits=limits(0.4)),
    Case("wrong orders, sigma 10", 10, recipe=REPAIR, limits={("wrong_orders", "decode"): 0.01}),
]  # fmt: skip

MAPS = ("opd-1.opd", "sur-2.sur", "x3p-2.x3p")


def of_measured_maps(folder: Path, into: Path) -> list[Case]:
    """The surfaces of measured maps (read by SurfaceTopography, written to `into` as .npy in nm) at sigma 2 and 5."""
    import numpy as np
    from SurfaceTopography import open_topography

    cases = []
    for name in MAPS:
        topography = open_topography(str(folder / name)).topography().to_unit("nm")
        path = into / f"{name}.npy"
        np.save(path, np.ma.filled(np.ma.asarray(topography.heights(), float), np.nan))
        for noise, most in ((2, 0.33), (5, 0.27)):
            asked = {"limits": limits(most, 0.95), "base": "recipes/surface.yaml"}
            cases.append(Case(f"{name}, sigma {noise}", noise, {"height": path}, **asked))
    return cases
