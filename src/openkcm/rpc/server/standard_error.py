# SPDX-License-Identifier: Apache-2.0
"""What gRPC says on standard error, and nowhere else: that a handshake failed, and why.

Invariant: of a serving process, every line on descriptor 2 that is not its own log's ends in its log, and every failed
handshake among the refusals. Its own log goes where descriptor 2 led before.
"""

from __future__ import annotations

import logging
import os
import re
import sys
import threading
from collections.abc import Callable
from typing import Final, TextIO

logger = logging.getLogger("openkcm.rpc.grpc")

_FAILED: Final = re.compile(rb"Handshake failed with (?:fatal )?error (.*)")
_REASONS: Final[tuple[tuple[bytes, str], ...]] = (
    (b"PEER_DID_NOT_RETURN_A_CERTIFICATE", "no certificate"),
    (b"certificate has expired", "expired certificate"),
    (b"certificate is not yet valid", "certificate not valid yet"),
    (b"CERTIFICATE_VERIFY_FAILED", "certificate of no authority of ours"),
    (b"NO_SHARED_CIPHER", "TLS below 1.3"),
    (b"UNSUPPORTED_PROTOCOL", "TLS below 1.3"),
    (b"HTTP_REQUEST", "not TLS"),
    (b"HTTPS_PROXY_REQUEST", "not TLS"),
    (b"WRONG_VERSION_NUMBER", "not TLS"),
)
"""What BoringSSL says, and what it is; in this order."""

MOST_LINE: Final = 4096


def reason_of(line: bytes) -> str | None:
    """Why a handshake failed, if a line of gRPC's says that one did."""
    found = _FAILED.search(line)
    if found is None:
        return None
    return next((reason for said, reason in _REASONS if said in found[1]), "malformed")


class StandardError:
    """Reads what is written to descriptor 2, from now until ``close``; one a process."""

    def __init__(self) -> None:
        # Or gRPC might say nothing of handshakes, or say more than belongs into a log.
        for name in ("GRPC_VERBOSITY", "GRPC_TRACE"):
            os.environ.pop(name, None)
        self._refused: Callable[[str], None] | None = None
        sys.stderr.flush()
        self._before = os.dup(2)
        self.stream: TextIO = os.fdopen(
            os.dup(2), "w", buffering=1, encoding="utf-8", errors="backslashreplace"
        )
        self._read_end, write_end = os.pipe()
        os.dup2(write_end, 2)
        os.close(write_end)
        self._thread = threading.Thread(target=self._run, name="openkcm-stderr", daemon=True)
        self._thread.start()

    def tell_handshakes(self, refused: Callable[[str], None]) -> None:
        """Have a function told why a handshake failed."""
        self._refused = refused

    def close(self) -> None:
        """Let descriptor 2 lead where it did; what was written until now is read."""
        sys.stderr.flush()
        os.dup2(self._before, 2)  # the pipe's last writer: its reader comes to the end
        self._thread.join(timeout=5)
        os.close(self._before)

    def _run(self) -> None:
        with os.fdopen(self._read_end, "rb") as lines:
            while line := lines.readline(MOST_LINE):
                try:
                    self._take(line.rstrip())
                except Exception:
                    # Whatever it is, who writes to descriptor 2 must never wait for a reader that is gone.
                    logger.exception("a line on standard error could not be taken")

    def _take(self, line: bytes) -> None:
        reason = reason_of(line)
        if reason is not None and self._refused is not None:
            self._refused(reason)
        elif line:
            logger.warning("%s", line.decode("utf-8", "backslashreplace"))
