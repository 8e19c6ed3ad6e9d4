# SPDX-License-Identifier: Apache-2.0
"""What the tests on PostgreSQL share: one server a test run's worker, and a fresh database for each test."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest

from openkcm.testing.postgres import PostgresServer

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def postgres_server() -> Iterator[PostgresServer]:
    """A running PostgreSQL for tests that leave it running."""
    with PostgresServer() as server:
        yield server


@pytest.fixture
def postgres_url(postgres_server: PostgresServer) -> str:
    """The URL of an empty database, with its password."""
    return postgres_server.create_database(f"test_{next(_numbers)}")


@pytest.fixture
def own_postgres() -> Iterator[PostgresServer]:
    """A PostgreSQL of the test's own, to stop, kill and restart."""
    with PostgresServer() as server:
        yield server
