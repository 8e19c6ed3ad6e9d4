# SPDX-License-Identifier: Apache-2.0
"""What the tests of ``azure-kms:`` roots share: values, bounds in time, and fixtures.

A module imports a fixture as itself (``root as root``), since only pytest uses the name.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from openkcm.roots import Root, open_root
from openkcm.testing.azure import AzureKey, AzureKeyVault

CONTEXT = {"layer": "L2", "tenant": "acme", "region": "eu", "version": "1"}
SEALED = bytes(range(72))
TENANT = "11111111-2222-3333-4444-55555555aaaa"
VERSION = "0123456789abcdef0123456789abcdef"
LONGEST_SECONDS = 8

names = itertools.count()


@pytest.fixture(scope="module")
def running() -> Iterator[AzureKeyVault]:
    """One provider for all tests of a module."""
    with AzureKeyVault() as provider:
        yield provider


@pytest.fixture
def provider(running: AzureKeyVault) -> Iterator[AzureKeyVault]:
    """The provider, without what a test does to it."""
    yield running
    running.entra.heal()
    running.raw_answer = None


@pytest.fixture(name="key", params=["vault", "hsm"])
def either_key(request: pytest.FixtureRequest, provider: AzureKeyVault) -> AzureKey:
    """A fresh key, in the vault and then in the managed HSM."""
    make = provider.make_key if request.param == "vault" else provider.make_hsm_key
    return make(f"root-{next(names)}")


@pytest.fixture(name="key")
def hsm_key(provider: AzureKeyVault) -> AzureKey:
    """A fresh key in the managed HSM, where it makes no difference which it is in."""
    return provider.make_hsm_key(f"root-{next(names)}")


@pytest.fixture
def root(key: AzureKey) -> Iterator[Root]:
    """A root on the key."""
    opened = open_root(key.uri)
    yield opened
    opened.close()


def use(root: Root) -> bytes:
    """Make a round trip; the wrapped blob."""
    wrapped = root.wrap(SEALED, CONTEXT)
    assert root.unwrap(wrapped, CONTEXT) == SEALED
    return wrapped


@contextmanager
def in_time() -> Iterator[None]:
    """What is done here ends within ``LONGEST_SECONDS``, whatever happens."""
    started = time.monotonic()
    yield
    assert time.monotonic() - started < LONGEST_SECONDS
