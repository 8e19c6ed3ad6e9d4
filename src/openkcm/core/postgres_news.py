# SPDX-License-Identifier: Apache-2.0
"""Learns what other processes committed to a store in PostgreSQL, without asking it at each use.

Invariant: ``version`` moves within a poll interval of another process's commit, as long as the database answers: every
change has an audit record in its transaction, and the newest number is read each interval. A notification only makes
it sooner, so that none has to arrive. While the database does not answer the version stands still, and ``silence``
tells for how long.

The thread holds only a weak reference, so that it ends with the store that nobody holds any more.
"""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import select
import threading
import weakref
from collections.abc import Callable
from typing import Final

import psycopg

from ..clock import awake_clock
from ..postgres import Address, BoundedConnection, store_error
from .store import WHAT

logger = logging.getLogger("openkcm")

CHANNEL: Final = "openkcm"
LAST_NUMBER: Final = "SELECT max(number) FROM audit"
LONGEST_PAUSE_SECONDS: Final = 1.0

# What a server answers that has no such statement.
_UNKNOWN: Final = (
    psycopg.errors.FeatureNotSupported,
    psycopg.errors.SyntaxError,
    psycopg.errors.UndefinedFunction,
)


class News:
    """The version of one process's store, and the thread that moves it.

    ``token`` is in this process's own notifications, which are no news to it; ``listening`` says whether the database
    passes notifications on.
    """

    clock = staticmethod(awake_clock)

    def __init__(self, address: Address, interval: float) -> None:
        self.version = 0
        self.interval = interval
        self.token = secrets.token_hex(8)
        self.listening = address.listen
        self.heard = self.tried = awake_clock()
        self._address = address
        self.number: int | None = None
        self._counting = threading.Lock()
        self._looking = threading.Lock()
        self._thread: threading.Thread | None = None
        self._bell: int | None = None
        self._stopped = False
        self._wake: Callable[[], None] | None = None

    def start(self) -> None:
        """Start the thread, if it does not run."""
        with self._counting:
            if self._thread is not None or self._stopped:
                return
            self._bell = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
            self._thread = threading.Thread(
                target=_follow, args=(weakref.ref(self), self._bell), name="openkcm-store-news", daemon=True
            )
            self._thread.start()

    def stop(self) -> None:
        """End the thread."""
        with self._counting:
            self._stopped = True
            thread = self._thread
            if thread is not None and self._bell is not None:
                with contextlib.suppress(OSError):  # it has ended
                    os.eventfd_write(self._bell, 1)
        if thread is not None and thread is not threading.current_thread():
            thread.join(timeout=5)

    def wake(self, call: Callable[[], None]) -> None:
        """Call this when the version was moved by another process."""
        self._wake = call

    # ---- at each use ---------------------------------------------------------------------------------

    def current(self, last_number: Callable[[], int]) -> int:
        """The version. The thread may be starved: a use after twice its interval looks for itself, one at a time."""
        if self._thread is None:
            self.start()
        if awake_clock() - self.tried > 2 * self.interval and self._looking.acquire(blocking=False):
            try:
                self.tried = awake_clock()
                # It stands still while the database is away, which the thread tells of.
                with contextlib.suppress(Exception):
                    self.note(last_number())
            finally:
                self._looking.release()
        return self.version

    def moved(self) -> None:
        """This process has committed."""
        with self._counting:
            self.version += 1

    def note(self, number: int) -> None:
        """The newest audit record's number, as the database has it now."""
        self.heard = awake_clock()
        if number != self.number:
            self.number = number
            self.news()

    def news(self) -> None:
        """Another process has committed."""
        self.moved()
        if self._wake is not None:
            self._wake()

    # ---- the thread ----------------------------------------------------------------------------------

    def connect(self) -> BoundedConnection:
        """A connection that hears notifications, where the database has them."""
        link = self._address.connect(autocommit=True)
        if self.listening:
            try:
                link.execute(f"LISTEN {CHANNEL}")
            except _UNKNOWN:
                self.listening = False
                logger.info("%s has no LISTEN: changes are seen within %s s", WHAT, self.interval)
        return link

    def step(self, link: BoundedConnection) -> None:
        """Read the newest number, and what was notified meanwhile."""
        with self._looking:
            self.tried = awake_clock()
            found = link.execute(LAST_NUMBER).fetchone()
            self.note(int(found[0] or 0) if found else 0)
        self.hear(link)

    def hear(self, link: BoundedConnection) -> None:
        """Take what other processes notified."""
        if any(notify.payload != self.token for notify in link.notifies(timeout=0)):
            self.news()


def _follow(reference: weakref.ref[News], bell: int) -> None:
    link: BoundedConnection | None = None
    failing = False
    pause = 0.0
    try:
        while (news := reference()) is not None and not news._stopped:
            try:
                link = link or news.connect()
                news.step(link)
                if failing:
                    logger.warning("%s answers again", WHAT)
                failing, pause = False, news.interval
            except Exception as error:
                if not failing:  # once for each outage
                    logger.warning("changes by other processes are not seen: %s", _told(error))
                failing, pause = True, min(max(pause * 2, 0.05), LONGEST_PAUSE_SECONDS)
                _close(link)
                link = None
            listening = link is not None and news.listening
            del news  # not held while waiting
            if _wait(link if listening else None, bell, pause):
                _hear(reference, link)
    finally:
        _close(link)
        os.close(bell)


def _told(error: Exception) -> str:
    if isinstance(error, psycopg.Error):
        return str(store_error(error, WHAT))
    return f"{WHAT}: unexpected {type(error).__name__}"


def _wait(link: BoundedConnection | None, bell: int, seconds: float) -> bool:
    """Wait, for no longer than until the bell rings or the server says something; whether it did."""
    poll = select.poll()
    poll.register(bell, select.POLLIN)
    spoken = -1
    if link is not None and not link.closed:
        spoken = link.fileno()
        poll.register(spoken, select.POLLIN)
    return any(descriptor == spoken for descriptor, _ in poll.poll(seconds * 1000))


def _hear(reference: weakref.ref[News], link: BoundedConnection | None) -> None:
    news = reference()
    if news is not None and link is not None:
        # A connection that was cut is met, and told, in the next step.
        with contextlib.suppress(psycopg.Error):
            news.hear(link)


def _close(link: BoundedConnection | None) -> None:
    if link is not None:
        with contextlib.suppress(psycopg.Error):
            link.close()
