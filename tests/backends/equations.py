"""Small recipes of equations for the launches: trees as in a recipe file, by name."""

CPIKAN = {"kind": "cpikan", "hidden": [5], "degree": 4}
TILES = {"diffusion": [3, 1], "helmholtz": [2, 2], "wave": [1, 2], "reaction_diffusion": [3], "inverse": [1]}
EXTRA = {  # what else there is to go wrong, one thing each
    "diffusion": {"constraints": "hard"},
    "allen_cahn": {"constraints": "hard"},  # and periodic
    "burgers": {"attention": {}, "refine": {"every": 8, "pool": 100}},
    "helmholtz": {"points": {"interior": 61, "condition": 13, "interface": 7}},
    "wave": {"causal": {"slices": 4}},
    "inverse": {"unknown": {"reaction": 0.2}, "measurements": {"points": 31, "noise": 0.01}},
}
EQUATIONS = ("allen_cahn", "burgers", "diffusion", "helmholtz", "poisson", "reaction_diffusion", "wave", "inverse")
GRADIENTS = ("burgers", "helmholtz", "wave", "inverse")  # the last has fewer points on its ends than shares
ONE_STEP = {"steps": 1, "accumulate": 4, "optimizer": "sgd", "lr": 1.0, "schedule": "constant", "warmup": 0}
SOLVERS = {
    "levenberg_marquardt": "burgers", "ssbroyden": "inverse", "additive_schwarz": "diffusion",
    "march": "wave",  # windows of time one after the other, tiles of two slabs
}  # fmt: skip
MARCH = {"method": "levenberg_marquardt", "iterations": 0, "march": {"windows": 2, "iterations": 2, "tolerance": 0.0}}


def recipe(name: str, precision: str, **changes) -> dict:
    problem = {"kind": "pde", "equation": "reaction_diffusion" if name == "inverse" else name}
    problem |= {"points": {"interior": 61, "condition": 13}, "resolution": 11} | EXTRA.get(name, {})
    overlap = 0.0 if name == "helmholtz" else 0.5
    levels = [{"grid": TILES.get(name, [1, 1]), "overlap": overlap, "network": CPIKAN}]
    tree = {
        "problem": problem,
        "field": {"levels": levels, "precision": precision},
        "training": {"steps": 20, "log_every": 1, "lr": 3e-3},
    }
    for section, given in changes.items():
        tree[section] |= given
    return tree


def trained(precision: str) -> dict[str, dict]:
    """Every equation, by gradient steps."""
    return {f"{precision}_{name}": recipe(name, precision) for name in EQUATIONS}


def of_one_step() -> dict[str, dict]:
    """A step of many shares."""
    return {f"gradient_{name}": recipe(name, "double", training=ONE_STEP) for name in GRADIENTS}


def solved() -> dict[str, dict]:
    """The second-order solvers after two gradient steps."""
    found = {}
    for method, name in SOLVERS.items():
        solve = MARCH if method == "march" else {"method": method, "iterations": 4, "local": 2}
        found[method] = recipe(name, "double", training={"steps": 2}) | {"solve": solve}
    return found


def of_both_phases() -> dict:
    """Gradient steps, then a solver, with a checkpoint in each."""
    tree = recipe("burgers", "double", problem={"causal": {"slices": 4}})
    tree["training"] |= {"checkpoint_steps": 7, "schedule": "constant", "keep": 9, "steps": 14}
    tree["solve"] = {"method": "levenberg_marquardt", "iterations": 14}
    return tree
