# SPDX-License-Identifier: Apache-2.0
"""What carries a client's calls to one address of a Core.

Invariant: a transport knows bytes and deadlines, and nothing of keys. A call that ends in no answer raises
CoreUnavailable; one that the Core refused raises what the Core said.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

from .credentials import Reading


class Stream(Protocol):
    """A stream of replies that is under way."""

    def __next__(self) -> bytes:
        """The next reply; StopIteration or an OpenKCMError at the end."""

    def __iter__(self) -> Stream:
        """Itself."""

    def cancel(self) -> None:
        """End it, from any thread."""


class Transport(Protocol):
    """Calls to one address with one certificate, shared by all threads."""

    def call(self, method: str, request: bytes, seconds: float) -> bytes:
        """Make a call of the data interface.

        Args:
            method: its name in ``keys.proto``.
            request: a message's bytes.
            seconds: until when, from now, an answer is of use.

        Raises:
            CoreUnavailable: no answer came in time.
            OpenKCMError: the Core's answer.
        """

    def stream(self, method: str, request: bytes) -> Stream:
        """Begin a stream."""

    def retire(self) -> None:
        """Another takes its place: calls and streams under way go on, and what none of them needs is closed."""

    def close(self) -> None:
        """Close the connection; calls under way end."""


Connector = Callable[[str, Reading], Transport]
"""Makes the transport to an address, ``HOST:PORT``, that shows a certificate; connects when it is first used."""
