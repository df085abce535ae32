"""From YAML and the command line to a recipe, and back. Every mistake is one `UserError` line."""

import difflib
from pathlib import Path
from typing import Any, get_args

import yaml
from pydantic import ValidationError

from cpikan_hr.errors import UserError
from cpikan_hr.recipe.fields import Network
from cpikan_hr.recipe.section import Section
from cpikan_hr.recipe.whole import Problem, Recipe


def load_recipe(path: str | Path, overrides: list[str] = ()) -> Recipe:
    """Reads a YAML recipe and applies `--section.option value` pairs.

    List items by number (`--field.levels.1.tile 32`).
    Raises UserError with one line for a missing file, broken YAML, an unknown key, a wrong type or a bad value.
    """
    path = Path(path)
    try:
        tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot read the recipe ({getattr(error, 'strerror', None) or 'not text'})") from error
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" at line {mark.line + 1}" if mark else ""
        raise UserError(
            f"{path}: not valid YAML{where}: {getattr(error, 'problem', None) or 'check the syntax'}"
        ) from error
    if not isinstance(tree, dict):
        raise UserError(f"{path}: a recipe is a mapping of sections ({', '.join(Recipe.model_fields)})")
    for key, text in _pairs(list(overrides)):
        _assign(tree, key, text)
    return parse_recipe(tree, str(path))


def parse_recipe(tree: dict[str, Any], where: str) -> Recipe:
    """Validates a tree of plain values; `where` names its origin in messages."""
    try:
        return Recipe.model_validate(tree)
    except ValidationError as error:
        raise UserError(f"{where}: {_explain(error)}") from None


def dump_recipe(recipe: Recipe) -> str:
    """The resolved recipe as YAML, every default written out."""
    return yaml.safe_dump(recipe.model_dump(mode="json"), sort_keys=False)


def _pairs(words: list[str]) -> list[tuple[str, str]]:
    pairs = []
    while words:
        word = words.pop(0)
        if not word.startswith("--") or len(word) == 2:
            raise UserError(f"command line: '{word}' is not an option; write --section.option value")
        key, equals, text = word[2:].partition("=")
        if not equals:
            if not words:
                raise UserError(f"command line: --{key} needs a value")
            text = words.pop(0)
        pairs.append((key, text))
    return pairs


def _assign(tree: Any, key: str, text: str) -> None:
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        value = text
    *parents, last = [int(part) if part.isdigit() else part for part in key.split(".")]
    node = tree
    for part in parents:
        if isinstance(node, list) and isinstance(part, int) and part < len(node):
            node = node[part]
        elif isinstance(node, dict):
            node = node.setdefault(part, {})
        else:
            raise UserError(f"command line: --{key}: there is no '{part}' to set an option in")
    if isinstance(node, list) and isinstance(last, int) and last < len(node) or isinstance(node, dict):
        node[last] = value
    else:
        raise UserError(f"command line: --{key}: there is no '{last}' to set")


def _explain(error: ValidationError) -> str:
    """The first mistake, an unknown key before the errors it may have caused."""
    problems = sorted(error.errors(), key=lambda item: item["type"] != "extra_forbidden")
    item = problems[0]
    path = [part for part in item["loc"] if part not in _TAGS]
    key = ".".join(str(part) for part in path)
    if item["type"] == "extra_forbidden":
        siblings = _keys_at(item["loc"][:-1])
        near = difflib.get_close_matches(str(path[-1]), siblings, n=1, cutoff=0.5)
        hint = f"did you mean '{near[0]}'?" if near else f"known keys: {', '.join(sorted(siblings))}"
        return f"unknown key '{key}'; {hint}"
    if item["type"] == "missing":
        return f"'{key}' is missing; add it"
    if item["type"].startswith("union_tag"):
        return f"'{key}.kind' must be one of {item.get('ctx', {}).get('expected_tags', 'the known kinds')}"
    message = item["msg"].removeprefix("Value error, ")
    value = "" if isinstance(item["input"], dict | list) else f", not {item['input']!r}"
    return f"'{key}': {message[0].lower()}{message[1:]}{value}" if key else message


def _members(annotation: Any) -> list[type[Section]]:
    """The section classes inside an annotation such as list[X], X | None or Annotated[X | Y, ...]."""
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [member for part in get_args(annotation) for member in _members(part)]


def _tags() -> dict[str, type[Section]]:
    kinds = [*_members(Problem), *_members(Network)]
    return {kind.model_fields["kind"].default: kind for kind in kinds}


_TAGS = _tags()


def _keys_at(location: tuple) -> list[str]:
    sections: list[type[Section]] = [Recipe]
    for part in location:
        if part in _TAGS:
            sections = [_TAGS[part]]
        elif isinstance(part, str):
            sections = [
                m for s in sections if part in s.model_fields for m in _members(s.model_fields[part].annotation)
            ]
    return sorted({key for section in sections for key in section.model_fields})
