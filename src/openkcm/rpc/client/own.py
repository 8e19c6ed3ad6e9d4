# SPDX-License-Identifier: Apache-2.0
"""A Gateway's own certificate, its key and its roots, as they change in their files.

Invariant: TLS and the inner channel show the same certificate, since both take theirs from one Reading, whose parts
were read in one go and fit together. Files that are not so, as while one of them is replaced and the other not yet,
change nothing but the log, and are looked at again.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import Final

from ...errors import ConfigurationError
from ..credentials import Reading
from ..frames.format import client_context

logger = logging.getLogger("openkcm.rpc")

SECONDS: Final = 1.0
"""How often the files are looked at, where something is done with them: three small files, some 50 microseconds."""


class OwnFiles:
    """What a Gateway shows and trusts now. Has no lock, so that it is fit for a forked child.

    Args:
        read: reads the files; raises ConfigurationError where they are not what they should be.
        seconds: how often, at the most.

    Attributes:
        reading: the last that was good.

    Raises:
        ConfigurationError: the files cannot be used now.
    """

    def __init__(self, read: Callable[[], Reading], seconds: float = SECONDS) -> None:
        self._read = read
        self._seconds = seconds
        self.reading = read()
        self._next = time.monotonic() + seconds
        self._refused = ""

    def now(self) -> Reading:
        """What the files say, or said up to ``seconds`` ago."""
        if time.monotonic() >= self._next:
            return self.look()
        return self.reading

    def look(self) -> Reading:
        """What the files say now; where that cannot be used, what they said before."""
        self._next = time.monotonic() + self._seconds
        try:
            found = self._read()
            if found.pem == self.reading.pem:
                self._refused = ""
                return self.reading
            client_context(found.pem)  # what OpenSSL does not take must not replace what it took
        except ConfigurationError as error:
            self._keep(str(error))
            return self.reading
        if found.pem != self.reading.pem:  # else another thread has looked at the same time
            self.reading, self._refused = found, ""
            logger.info("a new certificate is in use")
        return self.reading

    def _keep(self, why: str) -> None:
        if why != self._refused:
            self._refused = why
            logger.warning("the certificate files cannot be used now, so the old ones stay in use: %s", why)
