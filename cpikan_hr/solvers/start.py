"""The start: every level of the recipe is solved on the picture, coarse to fine, before any gradient step.

Adaptive levels (sparse Chebyshev quadtrees, grown cPIKAN or SIREN tiles) choose their own tiles and terms towards the
recipe's target; the others get the least squares of their last layer. The picture is read block by block, and
processes share the blocks.
"""

import math
from collections.abc import Callable
from contextlib import closing

import torch

from cpikan_hr.errors import UserError
from cpikan_hr.fields import Field
from cpikan_hr.parallel import at_once, in_threads
from cpikan_hr.processes import ALONE, Processes
from cpikan_hr.recipe import LevelOptions, Recipe, StartOptions
from cpikan_hr.solvers.blocks import Block, ReadTarget, blocks_of, shares_of
from cpikan_hr.solvers.budget import FULL, SLACK, GrownSample, Sample, wanted_of
from cpikan_hr.solvers.grid_sweeps import sweep_grid
from cpikan_hr.solvers.growth import grow, set_networks
from cpikan_hr.solvers.last_layer import fit_last_layers
from cpikan_hr.solvers.spectral import fit_spectral, set_terms
from cpikan_hr.solvers.sweeps import sweep
from cpikan_hr.solvers.terms import shared
from cpikan_hr.solvers.texture import Texture, learn

ROUNDS = 3  # passes over the picture at most until a target is met, by growing levels
PASSES = 6  # and by closed-form ones, which are cheap
RAISES = 10  # passes at ever higher prices at most, where all before took more parameters than allowed
TIMED = 0.25  # parameters per px and channel at most of sparse levels whose only target is a time
STRIP = 2**19  # pixels compared at once
CELL = 64  # side of the squares that such a block is made of, px

Progress = Callable[[str, float], None]
Passed = Callable[[], tuple[float, float]]  # mean squared error, the level's parameters per px and channel


def fit_field(
    field: Field,
    target: ReadTarget,
    shape: tuple[int, int],
    recipe: Recipe,
    full_range: float,
    processes: Processes = ALONE,
    progress: Progress | None = None,
    solved: Callable[[list[dict]], None] | None = None,
) -> list[dict]:
    """Solves all levels in place, alike on all processes. Returns what each level of the recipe contributed.

    `solved` is called with the contributions so far after every pass over the picture and every sweep: the field is
    then whole, and stays so until the next call. What `progress` and `solved` raise ends the start and leaves it whole.
    """
    contributions: list[dict] = []
    normalise(field, target, shape, recipe)
    for group, choice in enumerate(recipe.field.levels):
        report = _reporter(progress, f"level {group + 1} of {len(recipe.field.levels)}")

        def passed(group: int = group, choice: LevelOptions = choice) -> tuple[float, float]:
            error = mean_squared_error(field, group + 1, target, shape, processes)
            levels = [field.levels[k] for k in field.groups[group]]
            params = sum(level.count_parameters() for level in levels)
            contributions[group:] = [{
                "level": group + 1, "network": choice.network.kind,
                "tiles": sum(level.network.tiles for level in levels if level.network is not None),
                "params": params, "rmse": math.sqrt(error),
            }]  # fmt: skip
            if solved:
                solved(contributions)
            return error, params / (shape[0] * shape[1] * field.mix.shape[0])

        if choice.network.kind == "chebyshev2d" and choice.network.sparse:
            fit_to_target(field, group, target, shape, recipe, full_range, processes, report, passed)
        elif choice.grow:
            grow_to_target(field, group, target, shape, recipe, full_range, processes, report, passed)
        else:
            start = recipe.start
            fit_last_layers(field, group, target, shape, start.ridge, processes, report, start.iterations)
            passed()
    for number in range(recipe.start.sweeps):
        report = _reporter(progress, f"sweep {number + 1} of {recipe.start.sweeps}")
        if not sweep_field(field, target, shape, recipe, processes, contributions, report):
            break
        if solved:
            solved(contributions)
    return contributions


def sweep_field(
    field: Field,
    target: ReadTarget,
    shape: tuple[int, int],
    recipe: Recipe,
    processes: Processes,
    contributions: list[dict] | None = None,
    report: Callable[[float], None] | None = None,
) -> bool:
    """One sweep over every level whose hidden layers are solved for; undone where it does not lower the error or ends
    early. True where it did.
    """
    groups = recipe.swept_levels
    before = mean_squared_error(field, len(field.groups), target, shape, processes)
    swept = [value for group in groups for k in field.groups[group] for value in field.levels[k].parameters()]
    kept = [value.detach().clone() for value in swept]
    after = math.inf
    try:
        for group in groups:
            if recipe.field.levels[group].grow:
                sweep(field, group, recipe.field.levels[group], target, shape, processes, report)
            else:
                sweep_grid(field, group, target, shape, processes, report)
        after = mean_squared_error(field, len(field.groups), target, shape, processes)
    finally:
        if not after < before:
            with torch.no_grad():
                for value, before_it in zip(swept, kept, strict=True):
                    value.copy_(before_it)
    if not after < before:
        return False
    if contributions:
        contributions[-1]["rmse"] = math.sqrt(after)
    return True


def _reporter(progress: Progress | None, label: str) -> Callable[[float], None] | None:
    return None if progress is None else lambda fraction: progress(label, fraction)


@torch.no_grad()
def normalise(field: Field, target: ReadTarget, shape: tuple[int, int], recipe: Recipe) -> None:
    """Principal channels and the levels' scales, from a decimated look at the picture."""
    values, weight, _ = target(0, shape[0], 0, shape[1], max(1, max(shape) // 512))
    known = torch.from_numpy(values[weight > 0]).double()
    if not len(known):
        return
    if field.mix.shape[0] > 1 and recipe.field.channels == "principal":
        centred = known - known.mean(0)
        _, vectors = torch.linalg.eigh(centred.T @ centred / len(known))
        field.mix.copy_(vectors.flip(1).T)
    mixed = known.to(field.mix) @ field.mix.T
    field.spread.copy_(mixed.std(0).clamp_min(1e-6) if len(known) > 1 else torch.ones(len(field.spread)))
    for number, level in enumerate(field.levels):
        level.scale[:] = field.spread
        if level.per_tile and number == 0:
            level.mean[:] = mixed.mean(0)


def merit(error: float, params: float, wanted: tuple[float | None, float | None]) -> tuple[float, float, float]:
    """Orders passes, least is best: within the parameters allowed, then the error as wanted, then few parameters."""
    wanted_error, limit = wanted
    over = params if limit is not None and params > limit else 0.0
    missed = error if wanted_error is None or error > wanted_error else 0.0
    return over, missed, params


def fit_to_target(
    field: Field,
    group: int,
    target: ReadTarget,
    shape: tuple[int, int],
    recipe: Recipe,
    full_range: float,
    processes: Processes,
    report: Callable[[float], None] | None,
    passed: Passed,
) -> None:
    """Sparse Chebyshev tiles that meet the target: a price from a sample, then passes over the picture that mend it.

    The best pass is kept: never more parameters than allowed.
    """
    wanted_error, wanted_terms = wanted_of(recipe.target, full_range)
    if wanted_error is None and wanted_terms is None and recipe.target.seconds is not None:
        wanted_terms = TIMED
    texture = learn(field, group, target, shape, recipe.start)
    if wanted_error is None and wanted_terms is None:
        _fit_at(field, group, target, shape, 0.0, recipe.start, processes, report, texture)
        passed()
        return
    goals = (wanted_error, _left(wanted_terms, field, group, shape))
    found: list[tuple[tuple, float]] = []  # merit and price of every pass

    def fit(price: float) -> tuple[float, float]:
        _fit_at(field, group, target, shape, price, recipe.start, processes, report, texture)
        values = passed()
        found.append((merit(*values, goals), price))
        return values

    sample = Sample(field, group, target, shape, recipe.start, texture=texture)
    aims, passes = list(goals), ([], [])
    for _ in range(PASSES):
        prices = [0.0 if aim is None else sample.price_for(aim, which) for which, aim in enumerate(aims)]
        price, which = max(prices), int(aims[1] is not None and prices[1] >= prices[0])
        value = fit(price)[which]
        goal, close = goals[which], (SLACK, FULL)[which]
        if close * goal <= value <= goal or any(value == other for _, other in passes[which]):
            break  # as wanted; or noise or the number of pixels leave nothing to choose
        passes[which].append((aims[which], value))
        aims[which] = corrected(passes[which], (1 + close) / 2 * goal)
    _raise_price(found, fit)
    if min(found)[1] != found[-1][1]:
        fit(min(found)[1])


def _left(wanted: float | None, field: Field, group: int, shape: tuple[int, int]) -> float | None:
    """What the levels above leave of the parameters allowed, per px and channel."""
    if wanted is None:
        return None
    above = sum(field.levels[k].count_parameters() for g in field.groups[:group] for k in g)
    return max(wanted - above / (shape[0] * shape[1] * field.mix.shape[0]), 0.0)


def _raise_price(found: list[tuple[tuple, float]], fit: Callable[[float], object]) -> None:
    """Further passes until one keeps to the parameters allowed. `found`: merit and price, to which `fit` adds."""
    price = min(found)[1]
    for k in range(RAISES):
        if not min(found)[0][0]:
            return
        price *= 1 + 0.1 * 2**k
        fit(price)


def corrected(passes: list[tuple[float, float]], goal: float) -> float:
    """The next aim on the sample after (aim, value of the whole picture): the secant of the last two, in logarithms."""
    (aim, value), slope = (max(number, 1e-30) for number in passes[-1]), 1.0
    if len(passes) > 1:
        before = [max(number, 1e-30) for number in passes[-2]]
        run, rise = math.log(aim / before[0]), math.log(value / before[1])
        slope = min(max(run / rise, 0.2), 5.0) if rise else 1.0
    return aim * (max(goal, 1e-30) / value) ** slope


def _fit_at(
    field, group, target, shape, price, start: StartOptions, processes: Processes, report, texture: Texture | None
) -> None:
    mine = fit_spectral(field, group, target, shape, price, start, processes.rank, processes.ranks, report, texture)
    set_terms(field, shared(mine, processes))


@torch.no_grad()
def grow_to_target(
    field: Field,
    group: int,
    target: ReadTarget,
    shape: tuple[int, int],
    recipe: Recipe,
    full_range: float,
    processes: Processes,
    report: Callable[[float], None] | None,
    passed: Passed,
) -> None:
    """Grown tiles that meet the target; the best pass is kept: never more parameters than allowed.

    The price comes from ladders on a sample of blocks, which are not fitted twice.
    """
    choice = recipe.field.levels[group]
    wanted_error, wanted_params = wanted_of(recipe.target, full_range)
    aims = (wanted_error, _left(wanted_params, field, group, shape))
    if aims == (None, None):
        raise UserError("target: growing levels need one: give target.psnr, target.rmse or target.params_per_px")
    if group and aims[1] == 0:  # nothing is left for this level
        set_networks(field, group, choice, {})
        passed()
        return
    sample = GrownSample(field, group, choice, target, shape, aims, lambda: report and report(0.0))
    found: list[tuple[tuple, float]] = []  # merit and price of every pass
    best: dict = {}

    def fit(price: float) -> tuple[float, float]:
        nonlocal best
        mine = grow(field, group, choice, target, shape, price, processes.rank, processes.ranks, sample.known, report)
        pieces: dict = {}
        for share in processes.gather(mine):
            for key, piece in share.items():
                pieces.setdefault(key, []).extend(piece)
        set_networks(field, group, choice, pieces)
        values = passed()
        found.append((merit(*values, aims), price))
        if min(found) == found[-1]:
            best = pieces
        return values

    for number in range(ROUNDS + 2):  # the last two only where the target is still missed
        error, params = fit(sample.price)
        if number >= ROUNDS - 1 and sample.met(error, params) or not sample.refine(error, params):
            break
    _raise_price(found, fit)
    if min(found)[0][0] and group:  # not even the coarsest tiles fit into what is left
        best = {}
    if not best or min(found) != found[-1]:
        set_networks(field, group, choice, best)
        passed()


@torch.no_grad()
def mean_squared_error(
    field: Field, groups: int, target: ReadTarget, shape: tuple[int, int], processes: Processes
) -> float:
    """Over the known pixels and channels, of the recipe's first `groups` levels."""
    device = field.mix.device
    sums = torch.zeros(2, dtype=torch.float64, device=device)
    blocks = blocks_of(shape, CELL, at_once(STRIP, device), square=True)  # square: least reaches in from outside

    def compare(numbered: tuple[int, Block]) -> tuple[float, int]:
        block = numbered[1]
        y0, x0 = block.row * CELL, block.column * CELL
        y1, x1 = min(y0 + block.rows * CELL, shape[0]), min(x0 + block.columns * CELL, shape[1])
        values, weight, _ = target(y0, y1, x0, x1, 1)
        error = field.pixels(y0, y1, x0, x1, groups) - torch.from_numpy(values).to(device).movedim(-1, 0)
        known = torch.from_numpy(weight > 0).to(device)
        return float((error.square().sum(0) * known).sum(dtype=torch.float64)), int(known.sum()) * len(error)

    with closing(in_threads(compare, shares_of(blocks, processes.rank, processes.ranks), device)) as compared:
        for squared, count in compared:
            sums += torch.tensor([squared, count], dtype=torch.float64, device=device)
    processes.sum(sums)
    return float(sums[0] / sums[1].clamp_min(1))
