# SPDX-License-Identifier: Apache-2.0
"""What systemd and a service of it tell each other: states (sd_notify(3)) and credentials (systemd.exec(5)).

Invariant: without ``NOTIFY_SOCKET`` in the environment nothing is told, and no failure to tell is a failure to serve. A
file counts as a credential only if it lies in the folder that systemd made for this service.
"""

from __future__ import annotations

import logging
import os
import socket
from pathlib import Path

logger = logging.getLogger("openkcm")


def is_credential(path: Path) -> bool:
    """Whether systemd gave this file to this service: systemd.exec(5), "LoadCredential".

    It is then root's, in memory, and the service's user reads it by an ACL, whose mask shows as the group's mode.
    """
    folder = os.environ.get("CREDENTIALS_DIRECTORY")
    return bool(folder) and path.parent == Path(str(folder))


def notify(state: str) -> bool:
    """Send a state such as ``READY=1``; returns whether it was sent. Source: sd_notify(3), "Notes"."""
    address = os.environ.get("NOTIFY_SOCKET", "")
    if not address:
        return False
    if address[0] == "@":
        address = "\0" + address[1:]  # the abstract namespace
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as messages:
            messages.sendto(state.encode(), address)
    except OSError as error:
        logger.warning("systemd cannot be told %s: %s", state, error.strerror)
        return False
    return True
