"""u of a loaded field whose equation has hard conditions: lift + factor * field, both of the equation that its recipe
names."""

from functools import cached_property

import torch
from torch import Tensor

from cpikan_hr.errors import UserError
from cpikan_hr.fields.level import differentiated
from cpikan_hr.jets import Jet
from cpikan_hr.problems.equations.base import coordinates
from cpikan_hr.problems.pde import PDE
from cpikan_hr.recipe import Recipe

SAME = 1e-6  # how well lift and factor have to agree with those of the training, over the largest


class Constrained:
    """What a loaded field does with its own jet (`Field.constraint`). The equation is built when it is first called.

    UserError where that is not possible any more: an equation's file that is gone, or says something else by now.
    """

    def __init__(self, recipe: Recipe, about: dict, where: str):
        # What was measured, and what is unknown, is no matter of the constraint; its file may be gone.
        options = recipe.problem.model_copy(update={"measurements": None, "unknown": {}, "weights": {}})
        self._recipe, self._about, self._where = recipe.model_copy(update={"problem": options}), about, where

    @cached_property
    @torch.enable_grad()  # an equation's functions are tried by their derivatives
    def problem(self) -> PDE:
        name = self._recipe.problem.equation
        try:
            problem = PDE(self._recipe)
        except UserError as error:
            raise UserError(
                f"{self._where}: u is not the field alone, it needs the hard conditions of its equation ({error})"
            ) from None
        about, said = self._about, problem.about()
        same = all(about.get(key, said[key]) == said[key] for key in ("axes", "equation"))
        ends = ("low", "high")
        same = same and all(list(about["box"][end]) == list(getattr(problem.box, end)) for end in ends)
        if same and "constraint" in about and about["constraint"] != said["constraint"]:
            then, now = (torch.tensor(numbers or [], dtype=torch.float64) for numbers in (
                about["constraint"], said["constraint"],
            ))  # fmt: skip
            same = then.shape == now.shape and bool((then - now).abs().max() <= SAME * then.abs().max())
        if not same:
            raise UserError(
                f"{self._where}: {name} has another box or other hard conditions than when this field was trained; "
                "put the equation back as it was, or train again"
            )
        return problem

    def __call__(self, jet: Jet, points: Tensor) -> Jet:
        """u and the unknown coefficients, of the field's jet [R, n, C + K] at float64 points [n, D].

        ValueError for derivatives by jets and by torch in one call.
        """
        points = points.cpu()  # where equations compute
        if not differentiated(points):
            return self.problem.solved_at(jet, points)
        if jet.order != "value":
            raise ValueError(
                f"a jet of order {jet.order!r} at points that torch differentiates, of a field with hard conditions: "
                "give points.detach(), or ask for values"
            )
        ansatz, at = self.problem.ansatz, coordinates(points, self.problem.axes)
        if ansatz is None:
            return jet
        lift, factor = (torch.as_tensor(part).to(jet.rows) for part in (ansatz.lift(**at), ansatz.factor(**at)))
        u = lift + factor * jet.rows[..., : self.problem.channels]
        return jet._replace(rows=torch.cat([u, jet.rows[..., self.problem.channels :]], dim=-1))
