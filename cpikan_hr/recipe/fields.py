"""The field: its networks, levels and blend."""

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cpikan_hr.recipe.section import Section

InputMap = Literal["tanh", "identity", "sine"]


def _check_hidden(hidden: list[int]) -> None:
    if not all(1 <= width <= 65536 for width in hidden):
        raise ValueError(f"`hidden` {hidden}: a layer has from 1 to 65536 units")


class CPIKANNetwork(Section):
    """Scaled-cPIKAN: Chebyshev-KAN layers on local coordinates in [-1, 1]."""

    kind: Literal["cpikan"] = "cpikan"
    hidden: list[int] = Field([8, 8], description="widths of the hidden layers")
    degree: int | list[int] = Field(
        5, description="highest Chebyshev degree, of every layer or a list with one for each"
    )
    input_map: InputMap = Field("tanh", description="what brings a layer's input into [-1, 1]")
    first_input_map: InputMap = Field("tanh", description="the same for the first layer, whose input is scaled already")
    layer_norm: bool = Field(False, description="LayerNorm after each hidden layer")
    shared_constant: bool = Field(
        False, description="one T_0 per output instead of one per edge: the same functions, fewer numbers"
    )
    init: Literal["xavier_normal", "chebykan", "moments"] = Field(
        "xavier_normal",
        description="published Xavier normal, ChebyKAN's, or Glorot-like from the basis' second moments",
    )

    @model_validator(mode="after")
    def _layers(self) -> "CPIKANNetwork":
        _check_hidden(self.hidden)
        degrees, layers = [self.degree] if isinstance(self.degree, int) else self.degree, len(self.hidden) + 1
        if isinstance(self.degree, list) and len(degrees) != layers:
            raise ValueError(f"`degree` {degrees}: give one number, or one for each of the {layers} layers")
        if not all(1 <= degree <= 64 for degree in degrees):
            raise ValueError(f"`degree` {self.degree}: a degree is from 1 to 64")
        return self


class SIRENNetwork(Section):
    """Sine network (Sitzmann et al. 2020)."""

    kind: Literal["siren"] = "siren"
    hidden: list[int] = Field([64, 64], description="widths of the hidden layers")
    first_omega: float = Field(30.0, gt=0, description="frequency of the first layer")
    hidden_omega: float = Field(30.0, gt=0, description="frequency of the other layers")

    @model_validator(mode="after")
    def _layers(self) -> "SIRENNetwork":
        if not self.hidden:
            raise ValueError("`hidden`: siren needs at least one hidden layer, e.g. [64]")
        _check_hidden(self.hidden)
        return self


class FourierMLPNetwork(Section):
    """MLP on NeRF positional encoding (Mildenhall et al. 2020)."""

    kind: Literal["fourier_mlp"] = "fourier_mlp"
    hidden: list[int] = Field([64, 64], description="widths of the hidden layers")
    bands: int = Field(6, ge=0, le=24, description="octaves of the encoding, 2^k pi")
    activation: Literal["tanh", "silu", "gelu"] = Field("silu", description="activation of the hidden layers")

    @model_validator(mode="after")
    def _layers(self) -> "FourierMLPNetwork":
        _check_hidden(self.hidden)
        return self


class Chebyshev2DNetwork(Section):
    """Linear tensor-product Chebyshev expansion; with `input_map: sine` the cosine basis."""

    kind: Literal["chebyshev2d"] = "chebyshev2d"
    degree: int | list[int] | None = Field(
        7, description="highest degree, of both axes or [rows, columns] (null: as many terms as the tile has pixels)"
    )
    input_map: Literal["identity", "sine"] = Field(
        "sine", description="sine: orthogonal on pixels; identity: polynomials"
    )
    sparse: bool = Field(
        False,
        description="each tile keeps the terms that stand out (see `start` and `target`), no others; "
        "needs `degree: null`",
    )

    @model_validator(mode="after")
    def _degrees(self) -> "Chebyshev2DNetwork":
        degrees = self.degree if isinstance(self.degree, list) else [self.degree] * 2
        if len(degrees) != 2 or not all(d is None or 0 <= d <= 511 for d in degrees):
            raise ValueError(f"`degree` {self.degree}: one number or two, [rows, columns], each from 0 to 511")
        return self


Network = Annotated[CPIKANNetwork | SIRENNetwork | FourierMLPNetwork | Chebyshev2DNetwork, Field(discriminator="kind")]


class LevelOptions(Section):
    """One level: tiles that cover the domain, one network each; several strides make a quadtree of tiles."""

    tile: int | list[int] | None = Field(
        None,
        description="tile stride in px, or the strides of a quadtree's leaves, each half the one before "
        "(give this or `grid`)",
    )
    grid: list[int] | None = Field(
        None, description="number of tiles [rows, columns], for an equation along each axis (give this or `tile`)"
    )
    overlap: float = Field(
        0.25, ge=0, le=1, description="width of the blend between neighbours over the (smallest) tile stride"
    )
    grow: bool = Field(
        False,
        description="cpikan, siren with one hidden layer: each tile gets the units that pay, up to `hidden`, "
        "by Gauss-Newton",
    )
    scaled: bool = Field(
        True, description="networks see coordinates scaled to [-1, 1]; off, those of the equation, for comparison"
    )
    lr_scale: float = Field(1.0, ge=0, description="this level's learning rate over `training.lr`; 0 keeps its start")
    network: Network

    @model_validator(mode="after")
    def _one_size(self) -> "LevelOptions":
        if (self.tile is None) == (self.grid is None):
            raise ValueError("give either `tile` (px) or `grid` ([rows, columns])")
        if self.grid is not None and min(self.grid, default=0) < 1:
            raise ValueError("`grid` needs at least one tile per axis")
        strides = self.strides
        if strides is not None and (not strides or min(strides) < 2):
            raise ValueError("`tile` is at least 2 px")
        if strides is not None and any(large != 2 * small for large, small in zip(strides, strides[1:], strict=False)):
            raise ValueError("`tile`: each stride of a quadtree is half the one before, e.g. [64, 32, 16, 8]")
        sparse = getattr(self.network, "sparse", False)
        adaptive = self.grow or sparse
        if sparse and self.network.degree is not None:
            raise ValueError("`sparse` chooses among as many terms as the tile has pixels: give `degree: null`")
        if self.grow and (self.network.kind not in ("cpikan", "siren") or len(self.network.hidden) != 1):
            raise ValueError("`grow` needs cpikan or siren with one hidden layer, e.g. hidden: [6]")
        if strides is not None and len(strides) > 1 and not adaptive:
            raise ValueError("`tile`: a quadtree needs a network that adapts: chebyshev2d with `sparse`, or `grow`")
        if adaptive and strides is None:
            raise ValueError("`sparse` and `grow` are for fields of pixels: they need `tile`, strides of leaves in px")
        if adaptive and (
            round(self.overlap * strides[-1], 6) % 2
            or self.network.kind == "chebyshev2d"
            and self.network.input_map != "sine"
        ):
            raise ValueError(
                "an adaptive level blends over an even number of px (`overlap` times the smallest `tile`), "
                "on `input_map: sine`"
            )
        if self.grid is not None and self.network.kind == "chebyshev2d" and self.network.degree is None:
            raise ValueError("`degree: null` needs tiles of a number of pixels: give `tile`")
        return self

    @property
    def strides(self) -> list[int] | None:
        """Tile strides in px, largest first; None for a level given by `grid`."""
        return [self.tile] if isinstance(self.tile, int) else self.tile


class FieldOptions(Section):
    """u(x) = sum over levels and tiles of window * (mean + scale * network(local x))."""

    window: Literal["quintic", "cosine", "bump"] = Field(
        "quintic", description="blend: quintic smoothstep (C2), raised cosine (C1), bump (C-infinity)"
    )
    channels: Literal["plain", "principal"] = Field(
        "principal",
        description="levels work in the data's own channels, or in its principal components (colours decorrelate)",
    )
    mode: Literal["joint", "progressive"] = Field(
        "joint", description="train all levels together, or let them join one after another, coarse to fine"
    )
    levels: list[LevelOptions] = Field(min_length=1, description="coarse to fine")
    chunk: int = Field(
        262144, ge=1024, description="largest number of jet rows x points evaluated at once; on a GPU 16 times as many"
    )
    checkpoint: bool = Field(False, description="recompute activations in the backward pass (non-reentrant)")
    compile: bool = Field(False, description="torch.compile the jet kernels")
    precision: Literal["single", "double"] = Field(
        "single", description="of an equation's field: second-order solvers reach further in double"
    )
