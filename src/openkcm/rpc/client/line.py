# SPDX-License-Identifier: Apache-2.0
"""The connection to one address, of the certificate that is in use.

Invariant: with a new certificate comes a new transport; what is under way on the old one ends there, and nothing new
begins on it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import NamedTuple

from ...alive import Alive
from ..credentials import Reading
from ..transport import Connector, Transport
from .own import OwnFiles


class Line(NamedTuple):
    """A transport, and the certificate that it shows."""

    reading: Reading
    transport: Transport


class Lines:
    """One address, line after line.

    Args:
        address: ``HOST:PORT``.
        connector: makes a transport that shows a certificate.
        own: this end's certificate.
        replaced: is called between a new line and the end of the old one.

    Attributes:
        line: the newest, if there is one.
    """

    def __init__(
        self,
        address: str,
        connector: Connector,
        own: OwnFiles,
        replaced: Callable[[], None] = lambda: None,
    ) -> None:
        self._address = address
        self._connector = connector
        self._own = own
        self._replaced = replaced
        self._lock = threading.Lock()
        self._retired: Alive[Transport] = Alive()
        self.line: Line | None = None

    def now(self) -> Line:
        """One that shows the certificate in use."""
        reading, line = self._own.now(), self.line
        if line is None or line.reading is not reading:
            line = self._connect()
        return line

    def _connect(self) -> Line:
        """Have a line with the newest certificate, which whoever came here with may no longer be."""
        with self._lock:
            reading, old = self._own.reading, self.line
            if old is not None and old.reading is reading:
                return old
            line = self.line = Line(reading, self._connector(self._address, reading))
            if old is not None:
                self._retired.add(old.transport)
        if old is not None:
            self._replaced()
            old.transport.retire()
        return line

    def close(self) -> None:
        """Close the connections, those that end too."""
        with self._lock:
            line, self.line = self.line, None
            transports = [*self._retired.all(), *([line.transport] if line else [])]
        for each in transports:
            each.close()
