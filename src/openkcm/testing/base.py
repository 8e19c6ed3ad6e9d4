# SPDX-License-Identifier: Apache-2.0
"""What every provider to test against has: keys with levers, and faults of the service itself.

Invariant: a lever acts on the very next request, also on a connection that is open; ``first_no`` is the moment before
the first refusal leaves, so that a delay measured from it is never flattered.
"""

from __future__ import annotations

import abc
import enum
import os
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Final, Self

MAX_HOLD_SECONDS: Final = 60.0
"""A black-holed request is held for so long at most, so that no test hangs for ever."""


class KeyCondition(enum.StrEnum):
    """What a customer did with the key."""

    ENABLED = "enabled"
    DISABLED = "disabled"
    PENDING_DELETION = "pending-deletion"
    DESTROYED = "destroyed"


@dataclass
class Faults:
    """How a service misbehaves, for one key or for all."""

    black_hole: bool = False
    status: int | None = None
    latency: float = 0.0
    lie: bool = False


@dataclass
class FakeKey:
    """One customer's key: what a customer can do with it, and what was asked of it.

    ``uri`` is the root URI for ``openkcm.roots.open_root`` and ``Core.link_tenant``. ``denied`` holds the
    permissions that are withheld, in the provider's own words.
    """

    name: str
    uri: str
    condition: KeyCondition = KeyCondition.ENABLED
    denied: frozenset[str] = frozenset()
    faults: Faults = field(default_factory=Faults)
    requests: int = 0
    first_no: float | None = None
    _healed: threading.Event = field(default_factory=threading.Event, repr=False)

    # ---- the customer's levers -----------------------------------------------------------------------

    def disable(self) -> None:
        """Switch the key off; ``enable`` brings it back."""
        self._change(KeyCondition.DISABLED)

    def enable(self) -> None:
        """Switch the key on again, or take a deletion back while it is pending."""
        self._change(KeyCondition.ENABLED)

    def delete(self) -> None:
        """Schedule the key's deletion, or the nearest that the provider has."""
        self._change(KeyCondition.PENDING_DELETION)

    def destroy(self) -> None:
        """Destroy the key's material for good."""
        self._change(KeyCondition.DESTROYED)

    def rotate(self) -> None:
        """Make a new version of the key's material; what older versions wrapped still opens."""
        raise NotImplementedError(f"{type(self).__name__} has no versions")

    def deny(self, *permissions: str) -> None:
        """Withhold these permissions from us; all of them if none is named."""
        self.first_no = None
        self.denied = frozenset(permissions or ("*",))

    def allow(self) -> None:
        """Withhold nothing."""
        self.first_no = None
        self.denied = frozenset()

    def _change(self, condition: KeyCondition) -> None:
        self.first_no = None
        self.condition = condition

    # ---- the network and the provider ----------------------------------------------------------------

    def black_hole(self) -> None:
        """Accept requests and never answer."""
        self._healed.clear()
        self.faults.black_hole = True

    def throttle(self) -> None:
        """Answer "too many requests"."""
        self.faults.status = 429

    def fail(self, status: int = 503) -> None:
        """Answer with a server error."""
        self.faults.status = status

    def slow(self, seconds: float) -> None:
        """Wait before each answer."""
        self.faults.latency = seconds

    def lie(self) -> None:
        """Answer unwrap requests with another plaintext, well-formed otherwise."""
        self.faults.lie = True

    def heal(self) -> None:
        """End every fault; what the customer did stays."""
        self.faults = Faults()
        self._healed.set()

    # ---- for a provider ------------------------------------------------------------------------------

    def may(self, permission: str) -> bool:
        """Whether a permission is given."""
        return not self.denied & {"*", permission}

    def say_no(self) -> None:
        """To be called just before a refusal is sent."""
        if self.first_no is None:
            self.first_no = time.monotonic()

    def meet(self) -> int | None:
        """Count a request and suffer its faults; an HTTP status to answer with instead of serving it, or None."""
        self.requests += 1
        faults = self.faults
        if faults.black_hole:
            self._healed.wait(MAX_HOLD_SECONDS)
        if faults.latency:
            time.sleep(faults.latency)
        return self.faults.status


class FakeProvider(abc.ABC):
    """A provider's service on loopback; use it as a context manager.

    Inside the block this process's environment has ``settings()``, by which the provider's own SDK finds the service,
    trusts its certificate and logs in.
    """

    permissions: tuple[str, ...] = ()
    """The single permissions that a root needs, in the provider's words: to wrap first, to unwrap second."""

    def __init__(self) -> None:
        self._before: dict[str, str | None] = {}

    @abc.abstractmethod
    def start(self) -> None:
        """Listen on a free port of 127.0.0.1."""

    @abc.abstractmethod
    def stop(self) -> None:
        """Close the port and end every request that is held; idempotent."""

    @abc.abstractmethod
    def settings(self) -> Mapping[str, str]:
        """Environment variables for a process that is to use the service."""

    @abc.abstractmethod
    def make_key(self, name: str) -> FakeKey:
        """Make a customer's key."""

    def __enter__(self) -> Self:
        self.start()
        for name, value in self.settings().items():
            self._before[name] = os.environ.get(name)
            os.environ[name] = value
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for name, value in self._before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        self._before.clear()
        self.stop()
