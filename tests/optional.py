# SPDX-License-Identifier: Apache-2.0
"""Packages without a wheel for every interpreter that we test: polars, for CPython 3.13 without a GIL."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import pytest


class Missing:
    """Stands for a package; a test that asks it for something is skipped."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        pytest.skip(f"{self._name} is not installed; it has no wheel for some interpreters")


def optional(name: str) -> Any:
    """The package, or what skips each test that uses it."""
    try:
        return import_module(name)
    except ModuleNotFoundError:
        return Missing(name)
