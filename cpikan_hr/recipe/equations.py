"""Problems of equations: the residual and its conditions, how they are weighed, and second-order solvers for them."""

from typing import Literal

from pydantic import Field, model_validator

from cpikan_hr.recipe.section import Section


class PointOptions(Section):
    """Collocation points, over all processes and micro-batches: where the equation and its conditions are asked for."""

    interior: int = Field(2000, ge=1, description="inside the box")
    condition: int = Field(200, ge=1, description="of each soft condition, on its face")
    interface: int = Field(
        0, ge=0, description="XPINN: on each axis's interfaces of tiles that do not overlap, altogether (0: off)"
    )
    pattern: Literal["sobol", "random"] = Field("sobol", description="scrambled Sobol sequence, or uniform")
    redraw_every: int | None = Field(None, ge=1, description="updates between fresh points (null: the same throughout)")


class MeasurementOptions(Section):
    """Values of u at scattered points, as inverse problems need."""

    path: str | None = Field(
        None,
        description="csv, npy or npz file with a column per axis and one per function, found by their names where it "
        "has names, else in this order (null: made of the known answer)",
    )
    points: int = Field(400, ge=1, description="how many are made")
    noise: float = Field(0.0, ge=0, description="standard deviation of their error over that of the answer")


class BalanceOptions(Section):
    """Weights of the conditions against the residual, found during training."""

    method: Literal["gradient_norm", "ntk"] = Field(
        "gradient_norm",
        description="gradient_norm: alike norms of the terms' gradients (Wang et al. 2021); "
        "ntk: alike traces of their tangent kernels (Wang et al. 2022)",
    )
    every: int = Field(100, ge=1, description="updates between looks")
    memory: float = Field(0.9, ge=0, lt=1, description="share of the old weights that stays")


class AttentionOptions(Section):
    """Residual-based attention (Anagnostopoulos et al. 2024): points whose residual stays large count more."""

    decay: float = Field(0.999, gt=0, lt=1, description="of the weights per update")
    rate: float = Field(0.01, gt=0, description="what the largest residual adds per update")


class CausalOptions(Section):
    """Causal weights (Wang et al. 2024): later times count once the residual of earlier ones is small."""

    epsilon: float = Field(1.0, gt=0, description="how small, over the weight of the residual")
    slices: int = Field(16, ge=2, description="of the time axis")


class RefineOptions(Section):
    """Residual-based adaptive distribution, RAD (Wu et al. 2023): points are drawn where the residual is large."""

    every: int = Field(500, ge=1, description="updates between draws")
    pool: int = Field(10000, ge=1, description="points among which they are drawn")
    power: float = Field(1.0, ge=0, description="k of |r|^k / mean + c")
    floor: float = Field(1.0, ge=0, description="c, which keeps some points everywhere")


class PDEProblem(Section):
    """A partial differential equation on a box: residual, conditions and, for inverse problems, measurements."""

    kind: Literal["pde"] = "pde"
    equation: str = Field(description="name of a shipped equation, or a Python file with one (docs/add_an_equation.md)")
    parameters: dict[str, bool | int | float | str] = Field(
        {}, description="of the equation, where they are not its defaults"
    )
    unknown: dict[str, float] = Field({}, description="parameters that are learned too, and their first values")
    constraints: Literal["soft", "values", "hard"] = Field(
        "soft",
        description="values: u = lift + factor * field satisfies values on faces and velocities exactly; "
        "hard: also periodicity, by a circle that networks see (one tile along that axis)",
    )
    points: PointOptions = PointOptions()
    measurements: MeasurementOptions | None = Field(None, description="null: none")
    weights: dict[str, float] = Field(
        {}, description="of the terms of the loss: residual, the conditions' names, measurements, interface_value, "
        "interface_residual, interface_flux; 1 where not given"
    )
    balance: BalanceOptions | None = Field(None, description="null: weights stay as given")
    attention: AttentionOptions | None = Field(None, description="null: off")
    causal: CausalOptions | None = Field(None, description="null: off")
    refine: RefineOptions | None = Field(None, description="null: off")
    resolution: int = Field(201, ge=2, description="points per axis of maps and of the comparison with the answer")

    @model_validator(mode="after")
    def _weights(self) -> "PDEProblem":
        for name, weight in self.weights.items():
            if not weight >= 0:
                raise ValueError(f"`weights.{name}`: a weight is not negative")
        if self.attention and self.points.redraw_every is not None:
            raise ValueError("`attention` needs the same points throughout: leave out `points.redraw_every`")
        if self.refine and self.points.redraw_every is not None:
            raise ValueError("`refine` draws the points itself: leave out `points.redraw_every`")
        return self


class MarchOptions(Section):
    """Windows of time solved one after the other before all times at once (Wight and Zhao 2021)."""

    windows: int = Field(10, ge=1, description="of one length; best as many as there are tiles along t, with overlap 0")
    iterations: int = Field(10, ge=1, description="at most, in each")
    tolerance: float = Field(0.01, ge=0, description="a window ends where one iteration lowers the loss by less")


class SolveOptions(Section):
    """Second-order minimisation of all residuals at fixed points, after `training.steps` first-order updates."""

    method: Literal[
        "none",
        "levenberg_marquardt",
        "bfgs",
        "ssbfgs",
        "ssbroyden",
        "lbfgs",
        "additive_schwarz",
        "multiplicative_schwarz",
    ] = Field(
        "none",
        description="Levenberg-Marquardt on the residual vector; quasi-Newton: BFGS, self-scaled BFGS, self-scaled "
        "Broyden, L-BFGS; L-BFGS with a Schwarz preconditioner over layers or tiles",
    )
    iterations: int = Field(200, ge=0, description="at most; after `march`, over all times")
    march: MarchOptions | None = None
    tolerance: float = Field(0.0, ge=0, description="stop where 10 iterations lower the loss by less than this share")
    redraw_every: int | None = Field(None, ge=1, description="iterations between fresh points (null: the same)")
    damping: float = Field(1e-3, gt=0, description="levenberg_marquardt: first damping, over the largest curvature")
    dense: int = Field(
        6000,
        ge=0,
        description="levenberg_marquardt: by Cholesky up to so many parameters or where J'J is a band, beyond by "
        "conjugate gradients with a block per tile as preconditioner; 0: always by these",
    )
    local: int = Field(10, ge=1, description="schwarz: iterations on each block")

    @property
    def most(self) -> int:
        """Iterations at most."""
        if self.method == "none":
            return 0
        return self.iterations + (self.march.windows * self.march.iterations if self.march else 0)
