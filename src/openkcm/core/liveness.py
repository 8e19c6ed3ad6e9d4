# SPDX-License-Identifier: Apache-2.0
"""Whether each tenant's root still says yes, and for how long its keys may be used on the last answer.

Invariant: keys are used only until ``until``: the last yes plus one probe interval, or the hard end of a grace. Use
never moves it, only an answer of the root does, and a moment is counted from when the root was asked. Where no probe
has come in time the user's own thread asks. A refusal zeroes the keys before anything else is done with it.

=======  ========================================================================  ==================
state    how a tenant comes to it                                                  its keys
=======  ========================================================================  ==================
live     the root unwrapped its tenant key                                         usable
grace    a live tenant's root did not answer, or only "too many requests"           usable to the end
dark     the root said no, or answered wrongly, or grace is over                    zeroed
=======  ========================================================================  ==================

A dark tenant is probed like a live one, and comes back by itself with the first yes. An operator's kill is not a
state of this table: a killed tenant is not watched until it is restored.
"""

from __future__ import annotations

import hashlib
import hmac
import logging
import math
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Final

from ..errors import (
    DecryptError,
    OpenKCMError,
    RootMisconfigured,
    RootUnavailable,
    StoreUnavailable,
    TenantDark,
)
from ..keys import TenantState
from .patience import patiently
from .prober import MAX_THREADS, QUICK_THREADS, SUSPECT_THREADS, Lane, Turns

if TYPE_CHECKING:
    from .rows import TenantRow
    from .vault import Vault

logger = logging.getLogger("openkcm.liveness")

SLACK_SECONDS: Final = 0.5
"""What a probe may be late before the keys' user asks by himself."""

REFUSAL_SECONDS: Final = 1.0
"""How long an answer, or its absence, is repeated without asking again: a busy tenant must not flood its root."""

JITTER: Final = 0.1
"""A probe comes up to this part of the interval early, so that many tenants spread."""

PATIENCE_SECONDS: Final = 6.0
"""How long a probe under way is waited for, more than any provider may take; then the root counts as silent."""

RELIEF_SECONDS: Final = 0.05
"""How soon more threads are set to roots that turn out not to be quick."""

MAX_GRACE: Final = 3600.0

REFUSES: Final = "refuses"
SILENT: Final = "has not answered for too long"
"""Why a tenant is dark, for those who are not to have the root's own words."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What the last probe of a tenant found.

    ``seconds`` is how long the root took. The moments are of the Core's clock: when it was asked, when it last said
    no, when it first did since it last said yes, and when the keys were zeroed for that (-inf if never).
    """

    state: TenantState
    reason: str
    seconds: float
    asked_at: float
    refused_at: float
    first_refused_at: float
    zeroed_at: float


@dataclass(slots=True, eq=False)
class _Watched:
    row: TenantRow
    digest: bytes | None
    state: TenantState = TenantState.LIVE
    reason: str = ""
    kind: str = f"{REFUSES}, or {SILENT}"
    asked: float = -math.inf
    refused: float = -math.inf
    first_refused: float = -math.inf
    zeroed: float = -math.inf
    until: float = -math.inf
    under_way: float | None = None
    queued: bool = False
    generation: int = 0
    seconds: float = 0.0
    recorded: bool = True
    lock: threading.RLock = field(default_factory=threading.RLock)
    asking: threading.Lock = field(default_factory=threading.Lock)
    recording: threading.Lock = field(default_factory=threading.Lock)

    def found(self) -> Probe:
        return Probe(
            self.state,
            self.reason,
            self.seconds,
            self.asked,
            self.refused,
            self.first_refused,
            self.zeroed,
        )


class Liveness:
    """Watches the roots of the tenants whose keys were used in this process.

    Args:
        vault: whose tenants.
        interval: seconds between two probes of a tenant.
        grace: seconds for which a root that does not answer is put up with, 0 to ``MAX_GRACE``.
    """

    def __init__(self, vault: Vault, interval: float, grace: float) -> None:
        self._vault = vault
        self._interval = interval
        self._grace = grace
        self._clock = vault.clock
        self._lock = threading.RLock()
        self._watched: dict[str, _Watched] = {}
        self._silent: dict[str, tuple[float, Callable[[], RootUnavailable]]] = {}
        self._turns: Turns[_Watched] = Turns(vault.clock, interval, JITTER)
        self._quick = Lane("openkcm-probe", QUICK_THREADS, MAX_THREADS)
        self._suspect = Lane("openkcm-probe-suspect", SUSPECT_THREADS, SUSPECT_THREADS)
        self.counts: Counter[str] = Counter()
        self._counting = threading.Lock()

    # ---- on the path of every use --------------------------------------------------------------------

    def check(self, tenant: str) -> None:
        """Raise TenantDark unless the tenant's open keys may be used now."""
        watched = self._watched.get(tenant)
        if watched is not None and self._clock() >= watched.until:
            if watched.state is TenantState.DARK:
                # No lock: whoever brought the state about zeroes and records, and the users of a dark tenant, who may
                # be many and busy, must cost its neighbours little.
                raise self._explain(watched)
            self._overdue(watched)

    def _overdue(self, watched: _Watched) -> None:
        try:
            if self._settled_by_time(watched):
                return
            if watched.state is not TenantState.DARK:  # grace may just have ended
                self.probe(watched)
        finally:
            self._record(watched)
        if watched.state is TenantState.DARK:
            raise self._explain(watched)

    def _settled_by_time(self, watched: _Watched) -> bool:
        """Whether the keys may be used without asking: somebody else's answer came, or is waited for."""
        with watched.lock:
            now, started = self._clock(), watched.under_way
            if now < watched.until:
                return True
            if watched.state is TenantState.GRACE:
                self._grace_over(watched)
            elif watched.state is TenantState.LIVE and started is not None:
                if now - started < PATIENCE_SECONDS:
                    return True
                self._no_answer(watched, started)
                return now < watched.until
            return False

    # ---- what the vault tells ------------------------------------------------------------------------

    def opened(self, row: TenantRow, sealed: bytes, asked: float) -> None:
        """A tenant key was opened: its root said yes when asked at ``asked``. To be called before the key is used."""
        watched = self._watch(row)
        with watched.lock:
            watched.row, watched.digest = row, hashlib.sha256(sealed).digest()
            self._yes(watched, asked)
        self._record(watched)

    def refused(self, row: TenantRow, error: OpenKCMError) -> TenantDark:
        """A root said no to an opening; returns what to raise."""
        watched = self._watch(row)
        with watched.lock:
            watched.asked = self._clock()
            self._no(watched, error)
        self._record(watched)
        return self._explain(watched)

    def silent(self, tenant: str, error: RootUnavailable) -> None:
        """A root did not answer an opening; it is not asked again for a moment."""
        # Not the error itself, which holds on to every frame that it passes and to the caller's data in them.
        again = partial(type(error), str(error), retryable=error.retryable)
        self._silent[tenant] = (self._clock() + REFUSAL_SECONDS, again)

    def last_word(self, tenant: str) -> TenantDark | None:
        """Why the tenant is dark, if its root said so just now and need not be asked again; else None."""
        watched = self._watched.get(tenant)
        if watched is None or watched.state is not TenantState.DARK:
            return None
        return self._explain(watched) if self._clock() < watched.asked + REFUSAL_SECONDS else None

    def check_silent(self, tenant: str) -> None:
        """Raise RootUnavailable if the root did not answer a moment ago, so that it is too early to ask again."""
        known = self._silent.get(tenant)
        if known is not None and self._clock() < known[0]:
            raise known[1]()

    def forget(self, tenant: str) -> None:
        """Watch a tenant no more: it was killed or unlinked, or is another root's now."""
        with self._lock:
            self._watched.pop(tenant, None)
            self._silent.pop(tenant, None)

    def news(self, tenant: str, generation: int) -> None:
        """Another process says that a tenant which is dark here is live: do not wait for its turn."""
        watched = self._watched.get(tenant)
        if watched is not None and watched.state is TenantState.DARK and generation > watched.generation:
            watched.generation = generation
            self._turns.once(watched, self._clock())

    def dark(self) -> list[str]:
        """The watched tenants that are dark."""
        return [name for name, each in list(self._watched.items()) if each.state is TenantState.DARK]

    def state_of(self, tenant: str) -> Probe | None:
        """What is known of a tenant in this process; None if it is not watched."""
        watched = self._watched.get(tenant)
        return None if watched is None else watched.found()

    def tally(self) -> Mapping[str, int]:
        """How many watched tenants are in each state now."""
        return Counter(watched.state.value for watched in list(self._watched.values()))

    def close(self) -> None:
        """Probe no more."""
        with self._lock:
            self._watched.clear()
        self._turns.clear()
        self._quick.close()
        self._suspect.close()

    # ---- probing -------------------------------------------------------------------------------------

    def probe_now(self, row: TenantRow) -> Probe:
        """Ask a tenant's root in this thread."""
        known = row.tenant in self._watched
        watched = self._watch(row)
        self.probe(watched)
        if not known and not self._vault.ring.is_open(row.tenant):
            self.forget(row.tenant)  # nothing of it is in use here
        return watched.found()

    def probe_all(self, rows: list[TenantRow], seconds: float = PATIENCE_SECONDS + 1) -> dict[str, Probe]:
        """Ask the roots of several tenants side by side; those that answered within ``seconds``."""
        found: dict[str, Probe] = {}
        left = threading.Semaphore(0)

        def ask(row: TenantRow) -> None:
            try:
                found[row.tenant] = self.probe_now(row)
            finally:
                left.release()

        for row in rows:
            self._lane(self._watched.get(row.tenant)).submit(partial(ask, row))
        end, answers = self._clock() + seconds, 0
        while answers < len(rows) and self._clock() < end:
            self._quick.relieve()
            self._suspect.relieve()
            answers += left.acquire(timeout=RELIEF_SECONDS)
        return dict(found)

    def run_due(self, *, run: Callable[[Callable[[], None]], None] | None = None) -> float:
        """Start the probes that are due; returns the seconds until the next one."""
        # What was left over since the last time; what comes now has a thread of its own to begin with.
        waits = self._quick.relieve() | self._suspect.relieve()
        due: dict[Lane, list[Callable[[], None]]] = {self._quick: [], self._suspect: []}
        for watched in self._turns.take(self._is_watched):
            self._late(watched)
            if watched.under_way is None and not watched.queued:
                watched.queued = True
                due[self._lane(watched)].append(partial(self._take_turn, watched))
        for lane, calls in due.items():
            if run is None:
                lane.submit(*calls)
            else:
                for call in calls:
                    run(call)
        return 0.0 if waits or any(due.values()) else self._turns.wait()

    def _is_watched(self, watched: _Watched) -> bool:
        return self._watched.get(watched.row.tenant) is watched

    def _lane(self, watched: _Watched | None) -> Lane:
        return self._suspect if watched is not None and watched.state is not TenantState.LIVE else self._quick

    def _take_turn(self, watched: _Watched) -> None:
        watched.queued = False
        if self._is_watched(watched):
            self.probe(watched)

    def probe(self, watched: _Watched) -> None:
        """Ask the root with the very bytes that opened the tenant key, unless somebody has just done so."""
        before = watched.asked
        with watched.asking:
            if watched.asked != before:
                return
            asked = watched.under_way = self._clock()
            self._count("probes")
            try:
                self._heard(watched, asked, self._answer(watched))
            finally:
                watched.under_way = None
        self._record(watched)

    def _answer(self, watched: _Watched) -> OpenKCMError | None:
        """Ask the root: what it says against the keys' use; None is a yes.

        No frame that a raised error passes keeps the error: that would be a cycle, with all that a provider's SDK has
        in its frames, until the collector comes.
        """
        try:
            sealed = patiently(self._vault.ask_root, watched.row)
            if self._genuine(watched, sealed):
                return None
            return RootMisconfigured("the root answers with another plaintext than it wrapped")
        except DecryptError:
            return RootMisconfigured("the root does not know the tenant key that it once wrapped")
        except OpenKCMError as raised:
            return raised
        except Exception:
            logger.exception("the root of tenant %s failed in an unknown way", watched.row.tenant)
            return RootMisconfigured("the root's provider failed in an unknown way; see the log")

    def _heard(self, watched: _Watched, asked: float, error: OpenKCMError | None) -> None:
        """Act on the answer to what was asked at ``asked``."""
        with watched.lock:
            watched.asked = asked
            watched.seconds = self._clock() - asked
            if not self._is_watched(watched):
                return
            if error is None:
                self._yes(watched, asked)
            elif isinstance(error, RootUnavailable):
                self._no_answer(watched, asked, error)
            else:
                self._no(watched, error)

    def _genuine(self, watched: _Watched, sealed: bytes) -> bool:
        if watched.digest is not None:
            return hmac.compare_digest(hashlib.sha256(sealed).digest(), watched.digest)
        # The key was not opened here yet, so that there is nothing to compare with: see whether it opens.
        self._vault.check_sealed(watched.row, sealed)
        return True

    def _late(self, watched: _Watched) -> None:
        """Do what time alone brings about: grace ends, and a probe that takes too long is no answer."""
        with watched.lock:
            now, started = self._clock(), watched.under_way
            if watched.state is TenantState.GRACE and watched.until <= now:
                self._grace_over(watched)
            elif (
                watched.state is TenantState.LIVE
                and started is not None
                and now - started >= PATIENCE_SECONDS
            ):
                self._no_answer(watched, started)
        self._record(watched)

    # ---- the three answers; each with watched.lock held ------------------------------------------------

    def _yes(self, watched: _Watched, asked: float) -> None:
        if asked < watched.refused:
            return  # a refusal came meanwhile, and is the newer word
        watched.asked = max(watched.asked, asked)
        until = asked + self._interval + SLACK_SECONDS
        watched.until = until if watched.state is TenantState.GRACE else max(watched.until, until)
        self._silent.pop(watched.row.tenant, None)
        if watched.state is not TenantState.LIVE:
            self._change(watched, TenantState.LIVE, "")

    def _no(self, watched: _Watched, error: OpenKCMError) -> None:
        watched.refused = self._clock()
        watched.until = -math.inf
        watched.kind = REFUSES
        if watched.state is not TenantState.DARK:
            watched.first_refused = watched.refused
            self._change(watched, TenantState.DARK, str(error))
        else:
            watched.reason = str(error)
            self._vault.zero_again(watched.row.tenant)  # what was opened while the answer was on its way

    def _no_answer(self, watched: _Watched, asked: float, error: RootUnavailable | None = None) -> None:
        reason = str(error) if error is not None else "the root has not answered yet"
        if watched.state is TenantState.LIVE:
            watched.until = asked + self._grace
            if watched.until > self._clock():
                self._change(watched, TenantState.GRACE, reason)
                self._turns.once(watched, watched.until)
                return
            watched.kind = SILENT
            self._change(watched, TenantState.DARK, reason)
            watched.until = -math.inf
        elif watched.state is TenantState.GRACE and self._clock() >= watched.until:
            self._grace_over(watched)

    def _grace_over(self, watched: _Watched) -> None:
        watched.until = -math.inf
        watched.kind = SILENT
        self._change(watched, TenantState.DARK, f"grace is over: {watched.reason}")

    def _change(self, watched: _Watched, state: TenantState, reason: str) -> None:
        tenant, before = watched.row.tenant, watched.state
        watched.reason, watched.state = reason, state  # in this order: who sees dark may explain it at once
        if state is TenantState.DARK:
            self._vault.zero(tenant)
            watched.zeroed = self._clock()
        elif before is TenantState.DARK:
            self._vault.tell_live(tenant)
        watched.recorded = False
        self._count(state.value)
        logger.log(
            logging.INFO if state is TenantState.LIVE else logging.WARNING,
            "tenant %s: %s, was %s%s",
            tenant,
            state.value,
            before.value,
            f": {reason}" if reason else "",
        )

    def _count(self, what: str) -> None:
        with self._counting:  # tenants change side by side, and without a GIL one would be lost
            self.counts[what] += 1

    def _record(self, watched: _Watched) -> None:
        """Write a change into the vault, once for all processes; if that cannot be, then with the next probe.

        Not with ``watched.lock`` held: whoever asks whether the keys may be used must not wait for a disk.
        """
        while not watched.recorded and watched.recording.acquire(blocking=False):
            state, reason = watched.state, watched.reason
            try:
                self._vault.record_liveness(watched.row.tenant, state, reason)
            except StoreUnavailable as error:
                logger.warning(
                    "tenant %s: its change could not be recorded yet: %s", watched.row.tenant, error
                )
                return
            finally:
                watched.recording.release()
            with watched.lock:
                watched.recorded = watched.state is state

    def _explain(self, watched: _Watched) -> TenantDark:
        root = f"the root of tenant {watched.row.tenant}"
        return TenantDark(
            f"{root} refuses, or is gone for too long: {watched.reason}", told=f"{root} {watched.kind}"
        )

    def _watch(self, row: TenantRow) -> _Watched:
        with self._lock:
            watched = self._watched.get(row.tenant)
            if watched is None:
                state = TenantState.DARK if row.liveness == TenantState.DARK else TenantState.LIVE
                watched = _Watched(
                    row, None, state, generation=row.generation, recorded=row.liveness == state
                )
                self._watched[row.tenant] = watched
                self._turns.join(watched)
            return watched
