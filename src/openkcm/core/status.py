# SPDX-License-Identifier: Apache-2.0
"""What a Core tells about itself: the tree of keys and their states, and nothing secret."""

from __future__ import annotations

from dataclasses import dataclass

from ..keys import KeyState, TenantState


@dataclass(frozen=True, slots=True)
class ServiceKeyStatus:
    """One version of a service key."""

    version: int
    state: KeyState
    created_at: str


@dataclass(frozen=True, slots=True)
class ServiceStatus:
    """One service, its active version and every version there is; ``lease`` is its open-lease in seconds, 0 if none."""

    tenant: str
    service: str
    service_id: bytes
    active_version: int
    versions: tuple[ServiceKeyStatus, ...]
    lease: float
    created_at: str


@dataclass(frozen=True, slots=True)
class TenantStatus:
    """One tenant: its root, the state of its keys and its services.

    ``reason`` says why a tenant is dark; ``open`` whether its keys are in this process's memory now;
    ``shredded`` counts the data keys destroyed for good.
    """

    tenant: str
    region: str
    state: TenantState
    reason: str
    root: str
    development: bool
    key_version: int
    open: bool
    shredded: int
    services: tuple[ServiceStatus, ...]
    created_at: str
