# SPDX-License-Identifier: Apache-2.0
"""What both interfaces of a Core do before they carry a call out, and when they do not."""

from __future__ import annotations

import logging

from ...core import Core
from ...errors import AccessDenied, OpenKCMError
from .. import wire
from ..peer import Peer
from .denials import Denials

logger = logging.getLogger("openkcm.rpc")


class Gatekeeper:
    """Knows whose certificate is good, and notes who was refused.

    Args:
        core: which knows the certificates that were revoked.
        denials: where refusals are recorded.
    """

    def __init__(self, core: Core, denials: Denials) -> None:
        self.core = core
        self._denials = denials

    def check_peer(self, peer: Peer) -> None:
        """Raise AccessDenied if the peer's certificate has expired or was revoked."""
        peer.check_time()
        if self.core.access.is_revoked(*peer.fingerprints):
            raise AccessDenied(wire.REFUSED)

    def refused(self, error: Exception, name: str, peer: Peer | None) -> None:
        """Note what became of a call: who was refused for the audit record, and our own bugs for the log."""
        # A root that refuses the Core (RootDenied) is an answer to its question, not a refusal of who asks.
        if type(error) is AccessDenied:
            who, where = (peer.identity, peer.address) if peer else ("", "")
            self._denials.note(who, name, where, accepted=peer is not None and self._is_accepted(peer))
        elif not isinstance(error, OpenKCMError):
            logger.exception("%s failed", name)

    def _is_accepted(self, peer: Peer) -> bool:
        try:
            self.check_peer(peer)
        except OpenKCMError:
            return False
        return True
