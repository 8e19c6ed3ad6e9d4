# SPDX-License-Identifier: Apache-2.0
"""Fixtures for every test."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

import openkcm
import openkcm.rpc.tls13  # before the tests that import grpc themselves
from openkcm.gateway import ServiceHandle
from support import make_vault, open_service

pytest_plugins = ["postgres_support", "softhsm", "valkey_support"]


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
