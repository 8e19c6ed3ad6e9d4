# SPDX-License-Identifier: Apache-2.0
"""Logging in to a token, without ever locking it.

Invariant: a PIN that a token refused is not tried again by this process, a token's last try is never taken, and a
session whose login failed is closed: an HSM has few.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import os
import time
import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Final

from ...errors import RootDenied, RootMisconfigured
from .answers import (
    ANSWERS,
    LOCKED_PIN,
    REFUSED_PIN,
    REFUSED_PINS,
    Answer,
    ask,
)
from .functions import Functions
from .pins import Pin

Place = tuple[int, bytes]
"""A slot's number and its token's serial number."""

MAX_REFUSED_PINS: Final = 2
"""How many different PINs a token may refuse before this process tries none again."""

_ENOUGH: Final = (
    "the token refused several PINs, and no more are tried; find the right one and start this process anew"
)
_LAST_TRY: Final = (
    "the token has one try left for its PIN, which is not taken; log in by hand, which resets the tries"
)


@dataclass(eq=False)
class Login:
    """A session with a token, logged in; ``typed`` if its PIN was, ``at`` when."""

    session: Any
    offered: Mapping[int, Any]
    at: float
    typed: bool
    users: weakref.WeakSet[Any] = field(default_factory=weakref.WeakSet)

    def close(self) -> None:
        """Close the session, if it is not gone already."""
        with contextlib.suppress(Answer):
            ask(self.session.close)


class Logins:
    """Logs in to the tokens of one module, and remembers which PINs they refused.

    A refused PIN is kept as its HMAC under a key of this process, so that a corrected one is told from it.
    """

    def __init__(self) -> None:
        self._key = os.urandom(32)
        self._refused: dict[Place, set[bytes]] = {}

    def log_in(self, functions: Functions, token: Any, place: Place, pin: Pin) -> Login:
        """Open a session and log in.

        Raises:
            RootDenied: the PIN is not tried.
            Answer: the token refuses it, or answers otherwise.
        """
        digest = hmac.digest(self._key, pin.text.encode(), hashlib.sha256)
        self._check_tries(token, self._refused.get(place, set()), digest)
        offered = _offered(token.slot)
        login = Login(_open(token), offered, time.monotonic(), pin.prompted)
        try:
            functions.log_in(login.session.handle, pin.text)
        except Answer as answer:
            # With another session of this process logged in, its login counts for this one too.
            if answer.code != "CKR_USER_ALREADY_LOGGED_IN":
                login.close()
                if answer.code in REFUSED_PINS:
                    self._refused.setdefault(place, set()).add(digest)
                raise
        self._refused.pop(place, None)
        return login

    def forget_refusals(self) -> None:
        """Try every PIN again."""
        self._refused.clear()

    @staticmethod
    def _check_tries(token: Any, refused: set[bytes], digest: bytes) -> None:
        from pkcs11 import TokenFlag

        if digest in refused:
            raise RootDenied(REFUSED_PIN)
        if len(refused) >= MAX_REFUSED_PINS:
            raise RootDenied(_ENOUGH)
        if token.flags & TokenFlag.USER_PIN_LOCKED:
            raise RootDenied(LOCKED_PIN)
        if token.flags & TokenFlag.USER_PIN_FINAL_TRY:
            raise RootDenied(_LAST_TRY)


def _open(token: Any) -> Any:
    """Open a session, read-only where the module has such."""
    try:
        return ask(token.open, attribute_mapper=_mapper())
    except Answer as answer:
        if ANSWERS.get(answer.code) is not RootMisconfigured:
            raise
    return ask(token.open, rw=True, attribute_mapper=_mapper())


def _offered(slot: Any) -> dict[int, Any]:
    """The token's mechanisms, and what each is offered for."""
    offered: dict[int, Any] = {}
    for mechanism in ask(slot.get_mechanisms):
        with contextlib.suppress(Answer):
            offered[int(mechanism)] = ask(slot.get_mechanism_info, mechanism).flags
    return offered


def _mapper() -> Any:
    """How attributes are read: the binding's way, and a list that it knows no way to read."""
    from pkcs11 import Attribute
    from pkcs11.attributes import AttributeMapper

    mapper = AttributeMapper()
    mapper.register_handler(
        Attribute.ALLOWED_MECHANISMS, bytes, lambda value: memoryview(value).cast("L").tolist()
    )
    return mapper
