# SPDX-License-Identifier: Apache-2.0
"""Running an unplug drill: real traffic, a root that is taken away and given back, and what happened when.

Invariant: every moment is of one clock and was observed in this process: a decrypt that returned plaintext, the root's
answer as it arrived, the zeroing as it was done. Nothing is inferred from the settings.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Final

from ..clock import awake_clock
from ..errors import InternalError, OpenKCMError, RootUnavailable
from ..keys import Change, Event, TenantState

if TYPE_CHECKING:
    from ..core import Core
    from ..gateway import Gateway
    from ..gateway.gateway import ServiceHandle

CONTEXT: Final = {"openkcm": "drill"}
RECORD: Final = b"openkcm drill: a record that is decrypted again and again"
BASELINE_SECONDS: Final = 2.0
AFTER_SECONDS: Final = 1.0
ALLOWANCE_SECONDS: Final = 1.0
"""Beside the probe interval: what the promise allows."""


@dataclass(slots=True)
class Outcomes:
    """What became of each decrypt: when it ended, and the error's name or nothing."""

    at: list[float] = field(default_factory=list)
    error: list[str] = field(default_factory=list)

    def add(self, at: float, error: str) -> None:
        """Note one decrypt."""
        self.error.append(error)
        self.at.append(at)

    def successes(self) -> list[float]:
        """When decrypts gave plaintext."""
        return [at for at, error in zip(list(self.at), self.error, strict=False) if not error]

    def failures(self) -> dict[str, int]:
        """How many decrypts failed, by the name of their error."""
        counts: dict[str, int] = {}
        for error in self.error:
            if error:
                counts[error] = counts.get(error, 0) + 1
        return counts


class Traffic:
    """Decrypts one record again and again, at a steady rate, from the block's beginning to its end."""

    def __init__(self, service: ServiceHandle, rate: float) -> None:
        self._service = service
        self._pause = 1.0 / rate
        self._blob = service.encrypt(RECORD, context=CONTEXT)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="openkcm-drill", daemon=True)
        self.outcomes = Outcomes()
        self.wrong = False

    def __enter__(self) -> Traffic:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join(30)

    def _run(self) -> None:
        due = time.monotonic()
        while not self._stop.is_set():
            self._once()
            due += self._pause
            wait = due - time.monotonic()
            if wait > 0:
                time.sleep(wait)
            elif wait < -1:
                due = time.monotonic()  # a second behind: do not catch up in a burst

    def _once(self) -> None:
        try:
            self.wrong |= self._service.decrypt(self._blob, context=CONTEXT) != RECORD
            self.outcomes.add(awake_clock(), "")
        except OpenKCMError as error:
            self.outcomes.add(awake_clock(), type(error).__name__)


@dataclass(slots=True)
class Findings:
    """The moments of a drill on the Core's clock; None for what did not happen or could not be known."""

    tenant: str
    interval: float
    started: float
    unplugged: float | None = None
    first_no: float | None = None
    zeroed: float | None = None
    last_success: float | None = None
    replugged: float | None = None
    recovered: float | None = None
    outcomes: Outcomes = field(default_factory=Outcomes)

    @property
    def passed(self) -> bool:
        """Whether the promise was kept: dark within one probe interval and a second, and back within the same."""
        if (
            self.first_no is None
            or self.zeroed is None
            or self.last_success is None
            or self.recovered is None
        ):
            return False
        bound = self.interval + ALLOWANCE_SECONDS
        dark = self.last_success - (self.unplugged if self.unplugged is not None else self.first_no)
        back = self.recovered - self.replugged if self.replugged is not None else 0.0
        return dark <= bound and self.zeroed - self.first_no <= ALLOWANCE_SECONDS and back <= bound


@dataclass(frozen=True, slots=True)
class Lever:
    """How the root is taken away and given back; ``known`` if the moment is this process's own."""

    off: Callable[[], None]
    on: Callable[[], None]
    known: bool


def run_drill(
    core: Core,
    gateway: Gateway,
    place: tuple[str, str],
    lever: Lever,
    *,
    interval: float,
    rate: float,
    patience: float,
    say: Callable[[str], None],
) -> Findings:
    """Run the drill on a tenant's service.

    Args:
        place: the tenant and its service.
        interval: the Core's probe interval in seconds, for the verdict.
        rate: decrypts a second.
        patience: seconds to wait for the root's no, and for its yes.
        say: is told, in a few words, what is going on.

    Raises:
        RootUnavailable: the no, or the yes, did not come.
    """
    tenant, name = place
    found = Findings(tenant, interval, awake_clock())
    dark = threading.Event()
    unwatch = core.watch(_on_dark(tenant, dark))
    try:
        with Traffic(gateway.service(tenant, name), rate) as traffic:
            found.outcomes = traffic.outcomes
            say(f"{rate:,.0f} decrypts a second of one record")
            time.sleep(BASELINE_SECONDS)
            _unplug(core, found, lever, dark, patience, say)
            _replug(core, found, lever, patience, say)
            time.sleep(AFTER_SECONDS)
            if traffic.wrong:
                raise InternalError("a decrypt gave another plaintext")
    finally:
        unwatch()
    return found


def _on_dark(tenant: str, dark: threading.Event) -> Callable[[Event], None]:
    def listen(event: Event) -> None:
        if event.tenant == tenant and event.change is Change.DARK:
            dark.set()

    return listen


def _unplug(
    core: Core,
    found: Findings,
    lever: Lever,
    dark: threading.Event,
    patience: float,
    say: Callable[[str], None],
) -> None:
    began = awake_clock()
    found.unplugged = began if lever.known else None
    lever.off()
    say("the root is off; waiting for the Core to hear its no")
    if not dark.wait(patience):
        raise RootUnavailable(f"the root did not say no within {patience:.0f} seconds; the drill was ended")
    time.sleep(AFTER_SECONDS)
    probe = core.last_probe(found.tenant)
    if probe is None or probe.state is not TenantState.DARK:
        raise InternalError("the tenant went dark, and was not dark a second later")
    found.first_no, found.zeroed = probe.first_refused_at, probe.zeroed_at
    found.last_success = max(found.outcomes.successes(), default=began)
    say(f"dark: {probe.reason}")


def _replug(core: Core, found: Findings, lever: Lever, patience: float, say: Callable[[str], None]) -> None:
    began = awake_clock()
    found.replugged = began if lever.known else None
    lever.on()
    say("the root is on; waiting for the first decrypt")
    end = time.monotonic() + patience
    while time.monotonic() < end:
        first = next((at for at in found.outcomes.successes()[-200:] if at > began), None)
        if first is not None:
            found.recovered = first
            say("recovered")
            return
        time.sleep(0.02)
    raise RootUnavailable(f"the tenant did not come back within {patience:.0f} seconds; enable its root key")
