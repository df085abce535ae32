"""Documents that are generated, or that name commands and files, are true."""

import re
from pathlib import Path

from cpikan_hr.cli import parser
from cpikan_hr.recipe_docs import document

ROOT = Path(__file__).parents[1]


def test_the_table_of_keys_is_the_one_of_the_types():
    assert (ROOT / "docs" / "recipes.md").read_text() == document()


def test_commands_of_the_readme_parse_and_name_files_that_exist():
    text = (ROOT / "README.md").read_text()
    commands = re.findall(r"^    cpikan-hr (.+?)(?:\s+#.*)?$", text, flags=re.M)
    assert len(commands) >= 4
    for command in commands:
        parser().parse_args(command.split())
    for path in re.findall(r"\b((?:accelerate_configs|recipes|docs)/[\w./-]+\.\w+)", text):
        assert (ROOT / path).exists(), path
