"""`docs/recipes.md` from the types: `python -m cpikan_hr.recipe_docs > docs/recipes.md`."""

import re

from pydantic_core import PydanticUndefined

from cpikan_hr import recipe


def table(section: type[recipe.Section]) -> str:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section.model_fields.items():
        kind = getattr(field.annotation, "__name__", None) if "[" not in str(field.annotation) else None
        kind = kind or re.sub(r"(typing|cpikan_hr\.recipe\.\w+)\.", "", str(field.annotation))
        kind = kind.replace("|", "or")
        default = "required" if field.default is PydanticUndefined else f"`{field.default}`"
        if isinstance(field.default, recipe.Section):
            default = "see its section"
        lines.append(f"| `{name}` | {kind} | {default} | {field.description or ''} |")
    return "\n".join(lines)


def document() -> str:
    sections = [
        ("The recipe", recipe.Recipe), ("problem: image", recipe.ImageProblem),
        ("problem: interferometry", recipe.InterferometryProblem), ("problem: pde", recipe.PDEProblem),
        ("problem: pde, points", recipe.PointOptions), ("problem: pde, measurements", recipe.MeasurementOptions),
        ("problem: pde, balance", recipe.BalanceOptions), ("problem: pde, attention", recipe.AttentionOptions),
        ("problem: pde, causal", recipe.CausalOptions), ("problem: pde, refine", recipe.RefineOptions),
        ("field", recipe.FieldOptions),
        ("field.levels", recipe.LevelOptions), ("network: cpikan", recipe.CPIKANNetwork),
        ("network: siren", recipe.SIRENNetwork), ("network: fourier_mlp", recipe.FourierMLPNetwork),
        ("network: chebyshev2d", recipe.Chebyshev2DNetwork), ("start", recipe.StartOptions),
        ("target", recipe.TargetOptions), ("batch", recipe.BatchOptions), ("training", recipe.TrainingOptions),
        ("solve", recipe.SolveOptions), ("solve, march", recipe.MarchOptions),
    ]  # fmt: skip
    parts = ["# Recipes: every key", "Generated from the types by `python -m cpikan_hr.recipe_docs > docs/recipes.md`."]
    for title, section in sections:
        first = (section.__doc__ or "").strip().splitlines()[0] if section.__doc__ != recipe.Section.__doc__ else ""
        parts += [f"## {title}", *([first] if first else []), table(section)]
    return "\n\n".join(parts) + "\n"


if __name__ == "__main__":
    print(document(), end="")
