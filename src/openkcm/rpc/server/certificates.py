# SPDX-License-Identifier: Apache-2.0
"""The certificate, the key and the authorities that a server shows and trusts, as they change in their files.

Invariant: what is served was whole, fitted together and was within its time when it was taken up; files that are not
so, as while they are being replaced, change nothing but the log.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from typing import Final, Protocol

from ...errors import ConfigurationError
from ..session import Credentials

logger = logging.getLogger("openkcm.rpc")

SECONDS: Final = 1.0
"""How often the files are looked at."""

Pem = tuple[bytes, bytes, bytes]
"""A private key, its certificate's chain and roots, each in PEM."""


class Files(Protocol):
    """Where they lie."""

    def load(self) -> Credentials:
        """Read and check them; ConfigurationError if they are not what they should be."""

    def pem(self) -> Pem:
        """Key, chain and roots as they stand in the files."""


class Certificates:
    """What a server uses now, renewed by a thread.

    Args:
        files: where it lies.
        seconds: how often to look.

    Raises:
        ConfigurationError: it cannot be used at the start.
    """

    def __init__(self, files: Files, seconds: float = SECONDS) -> None:
        self._files = files
        self._seconds = seconds
        self._pem, self.credentials = self._read()
        self._refused: Pem | None = None
        self._unreadable = ""
        self._listeners: list[Callable[[Credentials], None]] = []
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="openkcm-certificates", daemon=True)
        self._thread.start()

    def pem(self) -> Pem:
        """Key, chain and roots in PEM."""
        return self._pem

    def listen(self, listener: Callable[[Credentials], None]) -> None:
        """Have new ones told; those in use are told at once."""
        self._listeners.append(listener)
        listener(self.credentials)

    def look(self) -> bool:
        """Look at the files now; returns whether new ones were taken up."""
        try:
            now = self._files.pem()
        except OSError as error:
            self._keep(error.strerror or "unreadable")
            return False
        if now in (self._pem, self._refused):
            return False
        try:
            pem, credentials = self._read()
        except ConfigurationError as error:
            self._refused = now  # said once, not every second
            self._keep(str(error))
            return False
        self._pem, self.credentials = pem, credentials
        self._refused, self._unreadable = None, ""
        for listener in self._listeners:
            listener(credentials)
        logger.info("new certificates are in use")
        return True

    def close(self) -> None:
        """Stop looking."""
        self._stop.set()
        self._thread.join(timeout=5)

    # ---- inside --------------------------------------------------------------------------------------

    def _read(self) -> tuple[Pem, Credentials]:
        try:
            pem = self._files.pem()
            credentials = self._files.load()
            if self._files.pem() != pem:
                raise ConfigurationError(
                    "the certificate files are being changed; start again when they are whole"
                )
        except OSError as error:
            raise ConfigurationError(f"a certificate file cannot be read: {error.strerror}") from None
        return pem, credentials

    def _keep(self, why: str) -> None:
        if why != self._unreadable:
            self._unreadable = why
            logger.error("the certificate files cannot be used, so the old ones stay in use: %s", why)

    def _run(self) -> None:
        while not self._stop.wait(self._seconds):
            try:
                self.look()
            except Exception:
                logger.exception("looking at the certificate files failed")
