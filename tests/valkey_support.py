# SPDX-License-Identifier: Apache-2.0
"""What the tests on Valkey share: one server a test run's worker, emptied for each test."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from openkcm.testing.valkey import ValkeyServer


@pytest.fixture(scope="session")
def valkey_server() -> Iterator[ValkeyServer]:
    """A running Valkey for tests that leave it running."""
    with ValkeyServer() as server:
        yield server


@pytest.fixture
def empty_valkey(valkey_server: ValkeyServer) -> ValkeyServer:
    """The same Valkey, with nothing in it."""
    valkey_server.run("FLUSHALL")
    return valkey_server


@pytest.fixture
def own_valkey() -> Iterator[ValkeyServer]:
    """A Valkey of the test's own, to stop, kill and restart."""
    with ValkeyServer() as server:
        yield server
