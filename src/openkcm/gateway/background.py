# SPDX-License-Identifier: Apache-2.0
"""What a Gateway of a Core that is far away does in the background: it refills pools, and delivers tombstones.

Invariant: a tombstone leaves the key store only when the Core has it. It is told to the Core again and again until
then, by every Gateway that shares the store, and after a restart too: telling it twice does no harm. A refusal is
logged and the tombstone kept.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator
from itertools import groupby
from typing import Final

from ..clock import DICE
from ..errors import OpenKCMError, Unavailable
from ..keys import KeyService, Service
from ..waiting import waiting_of
from .errands import Errands
from .keystore import Buried, KeyStore, NoKeyStore

logger = logging.getLogger("openkcm.gateway")

FIRST_PAUSE_SECONDS: Final = 0.5
LONGEST_PAUSE_SECONDS: Final = 10.0
"""After how long a delivery that found no Core is tried again; doubled each time, and drawn from half of it up."""

REFUSED_SECONDS: Final = 300.0
"""After how long tombstones that the Core refused are offered again: somebody has to grant something first."""

TOGETHER: Final = 4096


class Delivery:
    """Tells the Core of keys that were shredded while it could not be reached."""

    def __init__(self, core: KeyService, store: KeyStore, errands: Errands) -> None:
        self._core = core
        self._store = store
        self._errands = errands
        self._pause = FIRST_PAUSE_SECONDS
        self._refused: set[bytes] = set()

    def wake(self) -> None:
        """There may be tombstones to deliver."""
        self._errands.ask(self.deliver)

    def deliver(self) -> float | None:
        """Deliver what there is; returns after how many seconds to try again, None where nothing is left."""
        refused = False
        try:
            for service, ids in self._pending():
                refused |= not self._tell(service, ids)
        except Unavailable as error:
            logger.info("shredded keys of which the Core is yet to hear wait on: %s", error)
            pause, self._pause = self._pause, min(2 * self._pause, LONGEST_PAUSE_SECONDS)
            return pause * DICE.uniform(0.5, 1.0)
        self._pause = FIRST_PAUSE_SECONDS
        return REFUSED_SECONDS if refused else None

    def _pending(self) -> Iterator[tuple[Service, list[bytes]]]:
        after = b""
        while part := self._store.pending(after, TOGETHER):
            after = part[-1].place
            yield from _by_service(part)

    def _tell(self, service: Service, ids: list[bytes]) -> bool:
        """Tell the Core of one service's tombstones; False where it refuses them."""
        try:
            self._core.shred_keys(service, b"".join(ids))
        except Unavailable:
            raise
        except OpenKCMError as error:
            if service.service_id not in self._refused:
                self._refused.add(service.service_id)
                logger.warning(
                    "the Core refuses %d tombstones of %s/%s, which are kept; grant 'shred' to this Gateway: %s",
                    len(ids),
                    service.tenant,
                    service.name,
                    error,
                )
            return False
        self._refused.discard(service.service_id)
        self._store.delivered(service.service_id, ids)
        logger.info("delivered %d tombstones of %s/%s", len(ids), service.tenant, service.name)
        return True


class Background:
    """The threads of one Gateway, which are there only while there is something to do; none where the Core is near.

    Attributes:
        refills: fetches data keys in advance.
        delivery: keeps what the Core is yet to hear of; None too where there is no key store.
    """

    def __init__(self, core: KeyService, store: KeyStore) -> None:
        waiting = waiting_of(core)
        names = ("openkcm-refill", "openkcm-shred") if core.far else ()
        self._every = [Errands(name, waiting) for name in names]
        self.refills: Errands | None = None
        self.delivery: Delivery | None = None
        if self._every:
            self.refills, shreds = self._every
            self.delivery = None if isinstance(store, NoKeyStore) else Delivery(core, store, shreds)

    def wake(self) -> None:
        """The Gateway is used: deliver what an earlier one left."""
        if self.delivery is not None:
            self.delivery.wake()

    def stop(self) -> None:
        """Begin nothing more."""
        for each in self._every:
            each.stop()

    def after_fork(self) -> None:
        """In a forked child: what was to be done is the parent's."""
        for each in self._every:
            each.after_fork()


def _by_service(part: Iterable[Buried]) -> Iterator[tuple[Service, list[bytes]]]:
    for service, group in groupby(part, key=lambda each: each.service):
        yield service, [each.key_id for each in group]
