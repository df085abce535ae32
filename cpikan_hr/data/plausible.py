"""Numbers of `stack.yaml` that can only be a mistake in their unit: refused, with what to write instead."""

from collections.abc import Sequence

from cpikan_hr.errors import UserError

WAVELENGTHS_UM = 0.1, 1000.0  # that a height is measured with
LIGHT_UM = 200.0  # numbers from here on are wavelengths of light in nm, unless heights are as large
PITCHES_UM = 0.01, 1e6  # pixel pitches
ORDERS = 1000  # half wavelengths in a height range
TURN = 6.3  # rad; steps that are mostly larger are in degrees


def check_wavelengths(
    where: str,
    wavelengths_um: Sequence[float],
    height_range_um: tuple[float, float] | None,
    key: str = "wavelengths_um",
) -> None:
    """UserError where they lie outside `WAVELENGTHS_UM`, or would be nm of light and no height is as large as they."""
    low, high = WAVELENGTHS_UM
    room = height_range_um[1] - height_range_um[0] if height_range_um else 0.0
    for each in wavelengths_um:
        told = f"{where}: {key}: {each:g} um is no wavelength that heights are measured with"
        if each < low:
            raise UserError(f"{told}; give micrometres in wavelengths_um, or nanometres in wavelengths_nm")
        if each > high or (each >= LIGHT_UM and room < each / 2):
            fringes = "; projected fringes need a height_range_um of half of it or more" if each <= high else ""
            raise UserError(f"{told}; if it is in nm, name the key wavelengths_nm{fringes}")


def check_lengths(
    where: str, pitch_um: float, height_range_um: tuple[float, float] | None, wavelengths_um: Sequence[float]
) -> None:
    """UserError where the pitch is none of a camera, or the range holds too many half wavelengths, or hardly any."""
    if not PITCHES_UM[0] <= pitch_um <= PITCHES_UM[1]:
        raise UserError(f"{where}: pixel_pitch_um: {pitch_um:g} um is no side of a pixel; give micrometres")
    if height_range_um is None:
        return
    low, high = height_range_um
    if not low < high:
        raise UserError(f"{where}: height_range_um: {[low, high]} is empty; write [lowest, highest]")
    orders = (high - low) / (max(wavelengths_um) / 2)
    if not 1 / ORDERS < orders < ORDERS:
        raise UserError(
            f"{where}: height_range_um: {[low, high]} spans {orders:.3g} half wavelengths; give micrometres, in a "
            "range that the wavelengths can tell"
        )


def check_steps(where: str, steps: Sequence[float]) -> None:
    """UserError where steps [K] of one wavelength mostly differ by more than a turn."""
    apart = sorted(abs(b - a) for a, b in zip(steps, steps[1:], strict=False))
    if apart and apart[len(apart) // 2] > TURN and max(map(abs, steps)) > 2 * TURN:
        raise UserError(
            f"{where}: phase_steps_rad: {list(steps)[:4]}... differ by more than a turn (are they in degrees?); "
            "give rad"
        )
