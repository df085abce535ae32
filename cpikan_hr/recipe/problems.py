"""Problems of pixels: pictures and heights from interferograms."""

from typing import Literal

from pydantic import Field

from cpikan_hr.recipe.section import Section


class ImageProblem(Section):
    """A neural field of a picture: loss is the mean squared error of the samples."""

    kind: Literal["image"] = "image"
    path: str = Field(
        description="picture file: PNG, JPEG, TIFF, BMP, PGM, npy or Zarr; any size; FILE[2]: the third one in it"
    )
    orientation: Literal["stored", "file"] = Field(
        "stored", description="turn the picture first as its EXIF or TIFF orientation tag asks: no, or as the file says"
    )
    rotate: Literal[0, 90, 180, 270] = Field(0, description="turn the picture counter-clockwise by so many degrees")
    flip: Literal["none", "rows", "columns"] = Field("none", description="mirror after turning")
    nodata: float | None = Field(
        None,
        allow_inf_nan=False,
        description="value of pixels without data (null: what a TIFF's GDAL_NODATA says); NaN and Inf never are data",
    )
    mask: str | None = Field(None, description="picture of the same size, as stored; nonzero holds data")
    laplacian: float = Field(0.0, ge=0, description="weight of the mean squared Laplacian (px^-2), a smoothness prior")
    variation: float = Field(
        0.0, ge=0, description="weight of the total variation of the gradient (px^-2), a prior that leaves edges"
    )


class InterferometryProblem(Section):
    """Height from phase-shifted frames: I = A + B cos(4 pi h / lambda + delta), A and B eliminated per pixel."""

    kind: Literal["interferometry"] = "interferometry"
    stack: str = Field(description="folder that holds stack.yaml, or the file itself")
    rotate: Literal[0, 90, 180, 270] = Field(0, description="turn the frames counter-clockwise by so many degrees")
    flip: Literal["none", "rows", "columns"] = Field("none", description="mirror after turning")
    steps: Literal["nominal", "refine", "unknown"] = Field(
        "nominal",
        description="phase steps: as the stack says; refined from there on a sample of the frame; or found from "
        "nothing: then they ascend by convention, and the sign of the height follows from that",
    )
    harmonic: bool = Field(
        False, description="estimate a second harmonic of the fringes (camera or projector gamma), one per wavelength"
    )
    noise: float = Field(2.0, gt=0, description="standard deviation of one frame's read noise in grey levels")
    gain: float = Field(0.0, ge=0, description="shot noise: variance per grey level; quantisation is added to both")
    robust: float | None = Field(
        None,
        gt=0,
        description="loss grows linearly beyond so many standard deviations (Huber; null: off), e.g. 3; pixels whose "
        "frames deviate by more, rms, are left out of the start",
    )
    quality: float = Field(
        0.0, ge=0, le=1, description="pixels whose classical decode has a lower quality are left out"
    )
    repair: bool = Field(
        True, description="decide orders that noise got wrong again, with their surroundings; needs the right `noise`"
    )
    laplacian: float = Field(
        0.0, ge=0, description="weight of the mean squared Laplacian (nm px^-2), a smoothness prior"
    )
    variation: float = Field(
        0.0, ge=0, description="weight of the total variation of the gradient (nm px^-2), a prior that leaves edges"
    )
    remove_offset: bool = Field(
        False, description="evaluate after removing the mean difference (heights known up to a constant)"
    )
