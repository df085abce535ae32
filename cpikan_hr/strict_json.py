"""JSON as its standard has it: what is not finite is null, since NaN and Infinity are no JSON and many readers refuse
them.

Invariant: every JSON text that this program writes is made here.
"""

import json
import math
from typing import Any


def dumps(data: Any) -> str:
    """The text of plain values; null for every float that is not finite."""
    return json.dumps(finite(data), allow_nan=False)


def finite(data: Any) -> Any:
    """The same values with None for every float that is not finite."""
    if isinstance(data, dict):
        return {key: finite(value) for key, value in data.items()}
    if isinstance(data, list | tuple):
        return [finite(value) for value in data]
    return None if isinstance(data, float) and not math.isfinite(data) else data
