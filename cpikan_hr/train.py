"""Trains a recipe.

accelerate launch --config_file accelerate_configs/<backend>.yaml -m cpikan_hr.train --config recipes/<recipe>.yaml \
    [--section.option value ...]

Without `accelerate launch` it trains on one process.
"""

import sys

from cpikan_hr.errors import UserError, exit_on_user_error
from cpikan_hr.recipe import load_recipe
from cpikan_hr.runtime import prepare_process


@exit_on_user_error
def main(words: list[str] | None = None) -> None:
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] in ("-h", "--help"):
        print(__doc__)
        return
    if words[0] != "--config" or len(words) < 2:
        raise UserError("train: the first option is --config recipes/<recipe>.yaml")
    recipe = load_recipe(words[1], words[2:])
    prepare_process()
    from cpikan_hr.training.loop import train  # after the recipe is known to be good: importing torch takes seconds

    train(recipe)


if __name__ == "__main__":
    sys.exit(main())
