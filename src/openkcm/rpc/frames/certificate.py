# SPDX-License-Identifier: Apache-2.0
"""The frame server's own certificate, which can be replaced while it serves.

Invariant: what cannot be used leaves in use what was there, and is complained of once.
"""

from __future__ import annotations

import logging
import ssl

from . import format as frames

logger = logging.getLogger("openkcm.rpc")


class OwnCertificate:
    """Key, chain and clients' authorities, as new connections get them.

    Args:
        fetch: reads them.

    Attributes:
        context: made of the last ones that can be used.

    Raises:
        ConfigurationError: they cannot be used.
    """

    def __init__(self, fetch: frames.Fetch) -> None:
        self._fetch = fetch
        self._pem = fetch()
        self._complained = ""
        self.context: ssl.SSLContext = frames.server_context(self._pem)

    def refresh(self) -> None:
        """Read them anew, and use them if they have changed and can be used."""
        try:
            pem = self._fetch()
            if pem != self._pem:
                self.context = frames.server_context(pem)
                self._pem = pem
                logger.info("the certificate was replaced")
            self._complained = ""
        except Exception as error:
            if str(error) != self._complained:
                logger.error("the certificate cannot be replaced, the old one stays in use: %s", error)
            self._complained = str(error)
