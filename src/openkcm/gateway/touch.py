# SPDX-License-Identifier: Apache-2.0
"""Keys that are open for longer than a call takes, and a Core that may be out of touch meanwhile.

Invariant: a kill that nobody could tell of ends their use as well. They are used on while the Core is heard, or has
opened them so lately that it is as good; else the Core has to open them once more, or they are not used. A Core in this
process is always in touch, and nothing is asked.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import cast

from ..clock import awake_clock
from ..keys import FarKeyService, KeyService
from ..waiting import waiting_of


class Touch:
    """Whether keys may be used on; to be made before they are opened. Safe for threads.

    Attributes:
        stands: whether they may be used now; None where it need not be asked.
    """

    def __init__(self, core: KeyService) -> None:
        self.stands: Callable[[], bool] | None = None
        if core.far:
            self._in_touch = cast(FarKeyService, core).in_touch
            self._opened = awake_clock()
            self._opening = waiting_of(core).lock()
            self.stands = self._stands

    def check(self, again: Callable[[], None]) -> None:
        """Open the keys ``again`` if they may not be used on otherwise; one thread does for all.

        Raises:
            TenantDark, CoreUnavailable and what else ``again`` raises: they may not.
        """
        if self.stands is None or self._stands():
            return
        with self._opening:
            if not self._stands():
                asked = awake_clock()
                again()
                self._opened = asked

    def _stands(self) -> bool:
        return self._in_touch(self._opened)
