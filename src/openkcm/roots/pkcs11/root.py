# SPDX-License-Identifier: Apache-2.0
"""``pkcs11:`` a root key in an HSM (PKCS#11 v2.40, URI by RFC 7512): hold your own key.

Invariant: the key never leaves the token. A use of it ends within ``ANSWER_SECONDS``, whatever the module does, and is
believed only in a session that is known to be logged in: a key that a stale session does not see is not called
destroyed, a token that was taken out is not called empty, and both are looked for in a new session first.

A wrapped blob is ``01 || mechanism 1 || what the mechanism made``; see ``mechanisms``.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, Final, TypeVar

from ...errors import DecryptError, OpenKCMError, RootMisconfigured
from ..base import ANSWER_SECONDS, Grant
from .answers import (
    ANSWERS,
    DOUBTFUL,
    LOST,
    NO_SUCH_OBJECT,
    STALE_KEYS,
    Answer,
    Lost,
    ask,
    error_of,
)
from .keys import create_token_key, grant_for
from .logins import Login
from .mechanisms import (
    FORMAT,
    STRONG_RSA_BITS,
    Key,
    Wrapping,
    check_key,
    choose,
    parse_blob,
    rsa_bits,
    works,
)
from .modules import MODULE_VARIABLE, Module, module_at
from .pins import PIN_VARIABLE, Pin
from .uri import PKCS11URI, PRIVATE_KEY, parse_pkcs11_uri

__all__ = [
    "ANSWERS",
    "MODULE_VARIABLE",
    "PIN_VARIABLE",
    "PKCS11Root",
    "create_token_key",
    "open_pkcs11",
    "parse_blob",
]

T = TypeVar("T")

CLOSE_SECONDS: Final = 1.0


class PKCS11Root:
    """A key on a token."""

    development = False

    def __init__(self, parsed: PKCS11URI) -> None:
        self._parsed = parsed
        self._path = parsed.module_path or os.environ.get(MODULE_VARIABLE, "")
        if not self._path:
            raise RootMisconfigured(f"name the PKCS#11 module: module-path= in the URI, or {MODULE_VARIABLE}")
        self.uri = str(parsed)
        self._module: Module | None = None
        self._held: tuple[Login, Key] | None = None

    def __repr__(self) -> str:
        return f"<PKCS11Root {self.uri}>"

    def wrap(self, sealed: bytes, context: Mapping[str, str]) -> bytes:
        """Wrap on the token, by the best mechanism that it offers for the key, binding the context."""

        def wrap(key: Key) -> bytes:
            wrapping = choose(key)
            return bytes((FORMAT, wrapping.number)) + wrapping.wrap(key, sealed, context)

        try:
            return self._use(wrap)
        except DecryptError:
            raise RootMisconfigured("the token does not open what it has just wrapped") from None

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        """Unwrap on the token; DecryptError for what it did not wrap, or under another context."""
        wrapping, body = parse_blob(wrapped)
        return self._use(lambda key: _unwrap(wrapping, key, body, context))

    def warnings(self) -> list[str]:
        """What is weak about the key's attributes, in words for an operator."""
        return self._use(_weaknesses)

    def grant(self, identity: str | None = None) -> Grant:
        """What the customer must make on the token; it is not asked for anything.

        PKCS#11 has no identity of a caller: whoever has the PIN is the token's user.
        """
        return grant_for(self._parsed, self._path, identity)

    def close(self) -> None:
        """Log out, if no other root of this process uses the token; a later use logs in anew."""
        module, self._held = self._module, None
        if module is not None and module.is_in_use():
            with contextlib.suppress(OpenKCMError):  # a module that hangs is left as it is
                module.run(partial(module.leave, self), CLOSE_SECONDS)

    # ---- inside --------------------------------------------------------------------------------------

    def _use(self, use: Callable[[Key], T]) -> T:
        """Run ``use`` with the key in the module's thread, logging in if need be."""
        if self._module is None:
            self._module = module_at(self._path)
        return self._module.use(self._parsed.pin_source, partial(self._attempt, use), ANSWER_SECONDS)

    # From here on in the module's thread.

    def _attempt(self, use: Callable[[Key], T], module: Module, pin: Pin | None, started: float) -> T:
        held, self._held = self._held, None
        login = None
        try:
            if held is None or not module.holds(held[0]):
                login = module.log_in(self._parsed, pin)
                held = login, self._find(module, login, started)
                check_key(held[1])
            login = held[0]
            result = use(held[1])
        except Answer as answer:
            if login is not None and answer.code in LOST - STALE_KEYS:
                module.drop(login)
            raise
        login.users.add(self)
        self._held = held
        return result

    def _find(self, module: Module, login: Login, started: float) -> Key:
        handles = search(login, self._parsed)
        if len(handles) > 1:
            raise RootMisconfigured("several keys match the root's URI; name one by id=")
        if handles:
            return Key(handles[0], login.session, login.offered, self._parsed.type == PRIVATE_KEY)
        missing = error_of(NO_SUCH_OBJECT)
        # A private key is not seen by a session that somebody logged out, nor in a token that came back.
        if login.at < started and not login.typed:
            module.drop(login)
            raise Lost(missing)
        if not module.was_reread() and module.reread():
            raise Lost(missing)
        raise missing


def open_pkcs11(uri: str, *, create: bool = False) -> PKCS11Root:
    """Open a ``pkcs11:`` root; the token is asked when the key is first used. ``create`` has no effect."""
    return PKCS11Root(parse_pkcs11_uri(uri))


def _search(login: Login, wanted: PKCS11URI) -> list[Any]:
    from pkcs11 import Attribute, ObjectClass

    kind = ObjectClass.PRIVATE_KEY if wanted.type == PRIVATE_KEY else ObjectClass.SECRET_KEY
    attributes: dict[Any, Any] = {Attribute.CLASS: kind}
    if wanted.object is not None:
        attributes[Attribute.LABEL] = wanted.object
    if wanted.id is not None:
        attributes[Attribute.ID] = wanted.id

    def two() -> list[Any]:
        with contextlib.closing(login.session.get_objects(attributes)) as found:
            return [handle for handle, _ in zip(found, range(2), strict=False)]

    return ask(two)


search: Callable[[Login, PKCS11URI], list[Any]] = _search
"""Finds a root's key in a session, two of it at most; ``openkcm.testing`` puts something between."""


def _unwrap(wrapping: Wrapping, key: Key, body: bytes, context: Mapping[str, str]) -> bytes:
    for again in (False, True):
        try:
            return wrapping.unwrap(key, body, context)
        except Answer as answer:
            if ANSWERS.get(answer.code) is DecryptError:
                break
            # The same code may mean a tag that does not verify or a token that failed for a moment: see whether the
            # key works on a value of our own, and whether this one fails again.
            if answer.code not in DOUBTFUL or not (again or works(wrapping, key)):
                raise
    raise DecryptError


def _weaknesses(key: Key) -> list[str]:
    from pkcs11 import Attribute

    def has(attribute: Any, otherwise: bool) -> bool:
        try:
            return bool(ask(key.handle.__getitem__, attribute))
        except Answer as answer:
            if answer.code in LOST:
                raise
            return otherwise  # a token that does not say is not warned of

    found = []
    if has(Attribute.EXTRACTABLE, False):
        found.append("the root key can be extracted from the token (CKA_EXTRACTABLE)")
    elif not has(Attribute.NEVER_EXTRACTABLE, True):
        found.append(
            "the root key came from outside the token, or could once be extracted (CKA_NEVER_EXTRACTABLE)"
        )
    if not has(Attribute.SENSITIVE, True):
        found.append("the root key can be read in plaintext (CKA_SENSITIVE is not set)")
    if key.is_private and rsa_bits(key) < STRONG_RSA_BITS:
        found.append(f"the root key is an RSA key of {rsa_bits(key)} bits; {STRONG_RSA_BITS} are better")
    return found
