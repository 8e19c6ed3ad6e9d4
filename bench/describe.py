# SPDX-License-Identifier: Apache-2.0
"""Say what contenders are, without setting them up: ``describe.py NAME ...`` prints a JSON object by name.

It runs in the environment that the contenders run in. One that cannot even be imported has only a ``problem``.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import registry


def card(name: str) -> dict[str, Any]:
    """A contender's class attributes, or why it cannot be imported."""
    try:
        kind = registry.load(name)
    except Exception as error:
        return {"problem": f"{type(error).__name__}: {error}"}
    return {
        "title": kind.title,
        "less": kind.less,
        "sizes": list(kind.sizes),
        "environment": dict(kind.environment),
    }


if __name__ == "__main__":
    print(json.dumps({name: card(name) for name in sys.argv[1:]}))
