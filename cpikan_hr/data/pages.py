"""Which picture of a file that holds several: `FILE[2]` is the third one of FILE, wherever a picture is named.

Invariant: a file whose own name ends so is that file.
"""

import os
import re
from pathlib import Path

from cpikan_hr.errors import UserError

_CHOSEN = re.compile(r"(.+)\[(\d+)\]")


def split_page(path: str | os.PathLike) -> tuple[Path, int | None]:
    """The file that `path` names, and the number of the picture in it; None where it names none."""
    path = Path(path)
    chosen = _CHOSEN.fullmatch(path.name)
    if chosen and not path.exists() and path.with_name(chosen[1]).exists():
        return path.with_name(chosen[1]), int(chosen[2])
    return path, None


def page_of(path: Path, page: int | None, pages: int, what: str = "") -> int:
    """The number of the picture to read: `page`, or 0 where there is but one. UserError: no such page, none chosen.

    `what` says in the message how the pictures are arranged.
    """
    if page is None and pages > 1:
        what = f" ({what})" if what else ""
        raise UserError(f"{path}: holds {pages} pictures{what}; choose one: {path.name}[0] to {path.name}[{pages - 1}]")
    if not 0 <= (page or 0) < pages:
        raise UserError(f"{path}: holds {pages} picture{'s' * (pages > 1)}, so there is no page {page}")
    return page or 0
