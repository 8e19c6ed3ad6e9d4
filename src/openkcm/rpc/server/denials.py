# SPDX-License-Identifier: Apache-2.0
"""Who was refused, for the audit record.

Invariant: every refusal is counted, and the first of its kind is recorded within ``SECONDS``. What was counted since
the last record is told in one, which is one transaction, however many peers it was from however many addresses; and of
peers without an accepted certificate, who may be anybody, more of the same waits for ``QUIET_SECONDS``. So an attacker
can fill neither the store nor the chain, keeps the store's lock from nobody, and nobody waits for a disk to hear a no.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final, NamedTuple

from ...errors import OpenKCMError

logger = logging.getLogger("openkcm.rpc")

SECONDS: Final = 1.0
"""How often what was refused is written down."""

QUIET_SECONDS: Final = 60.0
"""How often that is where only peers without an accepted certificate were refused, as they were before."""

NEW_SECONDS: Final = 3600.0
"""After how long a kind that was not seen is new again."""

MOST_ALIKE: Final = 100
"""Kinds of refusal told apart between two records; the rest are counted together."""

MOST_PLACES: Final = 3
"""Addresses that a record names of those whom it tells of together."""

MOST_TEXT: Final = 1000
"""Characters of a record, which keeps no more; what does not fit is in the next."""


class _Kind(NamedTuple):
    """Refusals that are counted together; ``identity`` is nothing where it is not known."""

    identity: str
    what: str
    accepted: bool


@dataclass(slots=True)
class _Seen:
    """How many there were, and the first addresses that they came from."""

    count: int = 0
    places: dict[str, None] = field(default_factory=dict)


class Denials:
    """Collects refusals and records them.

    Args:
        record: writes one line into the audit record.
        seconds: how often.
        clock: seconds that only ever grow.
    """

    def __init__(
        self,
        record: Callable[[str], None],
        seconds: float = SECONDS,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._record = record
        self._seconds = seconds
        self._clock = clock
        self._lock = threading.Lock()
        self._seen: dict[_Kind, _Seen] = {}
        self._recorded: dict[_Kind, float] = {}
        self._last = -math.inf
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def note(self, identity: str, what: str, address: str = "", *, accepted: bool = True) -> None:
        """Count a refusal.

        Args:
            identity: of whom; nothing where it is not known.
            what: was refused.
            address: ``HOST:PORT``, where it came from.
            accepted: whether the certificate that says who it is was accepted.
        """
        host = address.rsplit(":", 1)[0]
        kind = _Kind(identity, what, accepted and bool(identity))
        with self._lock:
            _count(self._seen, kind, 1, [host] if host else [])
            if self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(target=self._run, name="openkcm-denials", daemon=True)
                self._thread.start()

    def flush(self) -> None:
        """Record now all that was counted; what cannot be recorded is kept for the next time."""
        while self._record_some():
            pass

    def record_due(self) -> None:
        """Record what was counted, if that is due."""
        with self._lock:
            due = self._is_due(self._clock())
        if due:
            self._record_some()

    def close(self) -> None:
        """Record what is left, and stop."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        self.flush()

    # ---- inside --------------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            try:
                self.record_due()
            except Exception:
                logger.exception("refusals could not be recorded yet")

    def _is_due(self, now: float) -> bool:
        """With the lock held."""
        if now - self._last >= QUIET_SECONDS:
            return bool(self._seen)
        return any(kind.accepted or kind not in self._recorded for kind in self._seen)

    def _record_some(self) -> bool:
        """Make one record; whether there is more for another."""
        with self._lock:
            seen, self._seen = self._seen, {}
        if not seen:
            return False
        text, told = _compose(seen)
        recorded: set[_Kind] = set()
        try:
            self._record(text)
            recorded.update(told)
            logger.warning("%s", text)
        except OpenKCMError as error:
            logger.warning("%s; not recorded yet: %s", text, error)
        finally:
            self._settle(seen, recorded)
        return bool(recorded) and len(recorded) < len(seen)

    def _settle(self, seen: dict[_Kind, _Seen], recorded: set[_Kind]) -> None:
        """Keep what was not recorded, before what came meanwhile; and remember what was."""
        now = self._clock()
        with self._lock:
            left = {kind: each for kind, each in seen.items() if kind not in recorded}
            for kind, each in self._seen.items():
                _count(left, kind, each.count, each.places)
            self._seen = left
            if recorded:
                self._last = now
                known = {kind: at for kind, at in self._recorded.items() if now - at < NEW_SECONDS}
                self._recorded = known | {kind: now for kind in recorded if not kind.accepted}


def _count(seen: dict[_Kind, _Seen], kind: _Kind, count: int, places: Iterable[str]) -> None:
    if kind not in seen and len(seen) >= MOST_ALIKE:
        kind = _Kind("others", "more", kind.accepted)
    each = seen.setdefault(kind, _Seen())
    each.count += count
    for place in places:
        if len(each.places) <= MOST_PLACES:  # one more than are named, to know that there are more
            each.places[place] = None


def _compose(seen: Mapping[_Kind, _Seen]) -> tuple[str, list[_Kind]]:
    """A record's text, and the kinds that it tells of: all, or as many as it has room for."""
    told: list[_Kind] = []
    for together in _grouped(seen):
        for kind in together:
            if told and len(_text([*told, kind], seen)) > MOST_TEXT:
                return _text(told, seen), told
            told.append(kind)
    return _text(told, seen), told


def _grouped(kinds: Iterable[_Kind]) -> Iterable[list[_Kind]]:
    """Those of one identity together; where that is not known, each for itself."""
    groups: dict[tuple[str, str], list[_Kind]] = {}
    for kind in kinds:
        groups.setdefault((kind.identity, "" if kind.identity else kind.what), []).append(kind)
    return groups.values()


def _text(kinds: Iterable[_Kind], seen: Mapping[_Kind, _Seen]) -> str:
    return "; ".join(_line(together, seen) for together in _grouped(kinds))


def _line(kinds: list[_Kind], seen: Mapping[_Kind, _Seen]) -> str:
    whats = ", ".join(
        f"{seen[kind].count} x {kind.what}" if seen[kind].count > 1 else kind.what for kind in kinds
    )
    places = list(dict.fromkeys(place for kind in kinds for place in seen[kind].places))
    where = ", ".join(places[:MOST_PLACES]) + (" and others" if len(places) > MOST_PLACES else "")
    return f"{whats} refused to {kinds[0].identity or 'an unknown peer'}{f' at {where}' if where else ''}"
