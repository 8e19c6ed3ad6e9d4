# SPDX-License-Identifier: Apache-2.0
"""Who was refused, for the audit record.

Invariant: every refusal is counted, and recorded within ``SECONDS``; refusals that are alike share a record with
their number, so that an attacker can fill neither the store nor the chain, and nobody waits for a disk to hear a no.
"""

from __future__ import annotations

import logging
import threading
from collections import Counter
from collections.abc import Callable
from typing import Final

from ...errors import OpenKCMError

logger = logging.getLogger("openkcm.rpc")

SECONDS: Final = 1.0
"""How often what was refused is written down."""

MOST_ALIKE: Final = 100
"""Kinds of refusal told apart between two records; the rest are counted together."""


class Denials:
    """Collects refusals and records them.

    Args:
        record: writes one line into the audit record.
        seconds: how often.
    """

    def __init__(self, record: Callable[[str], None], seconds: float = SECONDS) -> None:
        self._record = record
        self._seconds = seconds
        self._lock = threading.Lock()
        self._seen: Counter[str] = Counter()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None

    def note(self, identity: str, what: str, address: str = "") -> None:
        """Count a refusal: of whom (nothing: unknown), of what, and from which address."""
        host = address.rsplit(":", 1)[0]
        line = f"{what} refused to {identity or 'an unknown peer'}{f' at {host}' if host else ''}"
        with self._lock:
            if line not in self._seen and len(self._seen) >= MOST_ALIKE:
                line = "refused to others"
            self._seen[line] += 1
            if self._thread is None and not self._stop.is_set():
                self._thread = threading.Thread(target=self._run, name="openkcm-denials", daemon=True)
                self._thread.start()

    def flush(self) -> None:
        """Record now what was counted; what cannot be recorded is kept for the next time."""
        with self._lock:
            seen, self._seen = self._seen, Counter()
        for line, count in seen.items():
            text = line if count == 1 else f"{line} ({count} times)"
            try:
                self._record(text)
                logger.warning("%s", text)
            except OpenKCMError as error:
                logger.warning("%s; not recorded yet: %s", text, error)
                with self._lock:
                    self._seen[line] += count

    def close(self) -> None:
        """Record what is left, and stop."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)
        self.flush()

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            self.flush()
