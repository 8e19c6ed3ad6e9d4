# SPDX-License-Identifier: Apache-2.0
"""Fixtures for every test."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest

import openkcm
from openkcm.gateway import ServiceHandle
from support import FREE_THREADED, make_vault, open_service

if find_spec("grpc") is not None:
    import openkcm.rpc.tls13  # before the tests that import grpc themselves

pytest_plugins = ["postgres_support", "softhsm", "valkey_support"]


@pytest.fixture(scope="session", autouse=True)
def without_a_gil() -> Iterator[None]:
    """On an interpreter without a GIL: nothing that was imported has turned it on, so that threads met each other."""
    yield
    assert not FREE_THREADED or not sys._is_gil_enabled()  # type: ignore[attr-defined]


@pytest.fixture
def core(tmp_path: Path) -> Iterator[openkcm.Core]:
    """A vault with tenant acme and service records."""
    with make_vault(tmp_path) as core:
        yield core


@pytest.fixture
def service(tmp_path: Path) -> Iterator[ServiceHandle]:
    """A handle on a fresh vault's service."""
    with open_service(tmp_path) as handle:
        yield handle
