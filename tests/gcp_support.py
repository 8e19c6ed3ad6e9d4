# SPDX-License-Identifier: Apache-2.0
"""What the tests of ``gcp-kms:`` roots share: values and fixtures.

A module imports a fixture as itself (``root as root``), since only pytest uses the name.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from openkcm.roots.gcp import GCPRoot, open_gcp
from openkcm.testing.gcp import GCPKMS, GCPKey

NAME = "projects/customer-project/locations/europe-west3/keyRings/openkcm/cryptoKeys/root"
CONTEXT = {"layer": "L2", "tenant": "acme", "region": "eu", "version": "1"}
SEALED = bytes(range(72))


@pytest.fixture(scope="module")
def cloud() -> Iterator[GCPKMS]:
    """One provider for all tests of a module."""
    with GCPKMS() as cloud:
        yield cloud


@pytest.fixture
def key(cloud: GCPKMS) -> Iterator[GCPKey]:
    """A fresh key, called ``NAME``; the provider is left without what a test does to it."""
    key = cloud.make_key("root")
    yield key
    key.heal()
    cloud.login.error, cloud.login.faults.status, cloud.login.faults.latency = None, None, 0.0
    cloud.core.enabled = True


@pytest.fixture
def root(key: GCPKey) -> Iterator[GCPRoot]:
    """A root on the key."""
    root = open_gcp(key.uri)
    yield root
    root.close()


@pytest.fixture
def wrapped(root: GCPRoot) -> bytes:
    """What the root wrapped, in a session that is over."""
    wrapped = root.wrap(SEALED, CONTEXT)
    root.close()
    return wrapped
