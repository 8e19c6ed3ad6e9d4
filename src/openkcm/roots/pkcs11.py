# SPDX-License-Identifier: Apache-2.0
"""``pkcs11:`` a root key in an HSM (PKCS#11 v2.40, URI by RFC 7512): hold your own key.

Invariant: the key never leaves the token; the PIN is read when it is needed and kept nowhere; a PIN that was refused
is not tried again by this process, so that no retry locks the token. Every call into a module is made under one
process-wide lock, since PKCS#11 modules make no promise about threads.

A wrapped blob is ``01 || mechanism 1 || nonce 12 || AES-256-GCM ciphertext and tag``, mechanism 01, the context being
associated data. The nonce is 96 random bits: a root wraps a handful of keys in its life.
"""

from __future__ import annotations

import getpass
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from ..context import encode_context
from ..errors import (
    DecryptError,
    OpenKCMError,
    RootDenied,
    RootDestroyed,
    RootMisconfigured,
    RootUnavailable,
)
from ..limits import NONCE_BYTES, TAG_BYTES
from .pkcs11_uri import PKCS11URI, parse_pkcs11_uri

T = TypeVar("T")

FORMAT: Final = 1
AES_GCM: Final = 1
MODULE_VARIABLE: Final = "OPENKCM_PKCS11_MODULE"
PIN_VARIABLE: Final = "OPENKCM_PKCS11_PIN"
RELOAD_SECONDS: Final = 5.0
RETRY_PAUSES: Final = (0.02, 0.1)

_lock = threading.RLock()
_modules: dict[str, Any] = {}
_sessions: dict[tuple[str, str, str], Any] = {}
_refused: set[tuple[str, str, str]] = set()
_reloaded: dict[str, list[float]] = {}
_stale = False

_REFUSED_PIN: Final = (
    "the token refused the PIN; correct it and start anew (it is not tried again, lest the token lock)"
)
_DENIED: Final = {
    "PinIncorrect": _REFUSED_PIN,
    "PinInvalid": _REFUSED_PIN,
    "PinLenRange": _REFUSED_PIN,
    "PinExpired": "the token's PIN has expired; its officer must set a new one",
    "PinLocked": "the token's PIN is locked; its security officer must unlock it",
    "UserPinNotInitialized": "the token has no user PIN yet; its security officer must set one",
    "KeyFunctionNotPermitted": "the key may not encrypt and decrypt; the customer must set CKA_ENCRYPT and CKA_DECRYPT",
    "UserNotLoggedIn": "the token did not let us in; check the PIN's source",
}
_LOST: Final = {
    "DeviceError",
    "DeviceMemory",
    "DeviceRemoved",
    "FunctionFailed",
    "GeneralError",
    "HostMemory",
    "KeyHandleInvalid",
    "NoSuchToken",
    "ObjectHandleInvalid",
    "SessionClosed",
    "SessionCount",
    "SessionHandleInvalid",
    "SlotIDInvalid",
    "TokenNotPresent",
    "TokenNotRecognised",
    "UserNotLoggedIn",
    "UserPinNotInitialized",
}
"""A session may be gone (token removed, module restarted): worth one new session."""

_ALTERED: Final = {
    "EncryptedDataInvalid",
    "EncryptedDataLenRange",
    "DataInvalid",
    "DataLenRange",
    "GeneralError",
    "FunctionFailed",
}
"""What modules answer to a tag that does not verify; SoftHSM2 says GeneralError."""


class PKCS11Root:
    """An AES key on a token."""

    development = False

    def __init__(self, parsed: PKCS11URI) -> None:
        self._parsed = parsed
        self._module = parsed.module_path or os.environ.get(MODULE_VARIABLE, "")
        if not self._module:
            raise RootMisconfigured(f"name the PKCS#11 module: module-path= in the URI, or {MODULE_VARIABLE}")
        self.uri = str(parsed)

    def __repr__(self) -> str:
        return f"<PKCS11Root {self.uri}>"

    def wrap(self, sealed: bytes, context: Mapping[str, str]) -> bytes:
        """Encrypt on the token, binding the context as associated data."""
        nonce = os.urandom(NONCE_BYTES)
        ciphertext = self._on_key(lambda key: key.encrypt(sealed, **_gcm(nonce, context)))
        return bytes((FORMAT, AES_GCM)) + nonce + bytes(ciphertext)

    def unwrap(self, wrapped: bytes, context: Mapping[str, str]) -> bytes:
        """Decrypt on the token; DecryptError for what it did not wrap, or under another context."""
        nonce, ciphertext = parse_blob(wrapped)

        def decrypt(key: Any) -> bytes:
            try:
                with _translated():
                    return bytes(key.decrypt(ciphertext, **_gcm(nonce, context)))
            except _Altered:
                # The same code may mean a tag that does not verify or a token that failed: see which.
                if _round_trip(key):
                    raise DecryptError from None
                raise

        return self._on_key(decrypt)

    def warnings(self) -> list[str]:
        """What is weak about the key's attributes, in words for an operator."""
        from pkcs11 import Attribute

        def read(key: Any) -> list[str]:
            found = []
            if key[Attribute.EXTRACTABLE]:
                found.append("the root key can be extracted from the token (CKA_EXTRACTABLE)")
            if not key[Attribute.SENSITIVE]:
                found.append("the root key can be read in plaintext (CKA_SENSITIVE is not set)")
            return found

        return list(self._on_key(read))

    def close(self) -> None:
        """Nothing of its own is open: sessions belong to the process and are shared by roots on one token."""

    # ---- inside --------------------------------------------------------------------------------------

    def _place(self) -> tuple[str, str, str]:
        token = self._parsed.serial or self._parsed.token or ""
        return self._module, token, str(self._parsed.slot_id)

    def _on_key(self, use: Callable[[Any], T]) -> T:
        """Run ``use`` with the key; in a new session, twice at most, if the token fails or the old one is gone.

        SoftHSM2 rewrites a token's file at each login: another process that logs in at that moment is told that the
        token is not there, has no PIN or fails, and is told otherwise a moment later.
        """
        with _lock:
            for pause in (*RETRY_PAUSES, None):
                try:
                    with _translated():
                        return use(_check(self._find_key(self._session())))
                except (RootUnavailable, _Lost) as error:
                    _drop_session(self._place())
                    if pause is None:
                        raise error.otherwise if isinstance(error, _Lost) else error from None
                    time.sleep(pause)
        raise AssertionError

    def _session(self) -> Any:
        _renew_after_fork()
        place = self._place()
        if place in _sessions:
            return _sessions[place]
        if place in _refused:
            raise RootDenied(_REFUSED_PIN)
        session = _log_in(self._find_token(_module(self._module)), self._parsed.pin_source, place)
        _sessions[place] = session
        return session

    def _find_token(self, module: Any) -> Any:
        found = self._matching(module)
        if not found and _reload(self._module):
            found = self._matching(module)
        if not found:
            raise RootUnavailable(
                "the token is not there; plug it in, or check token= and serial= in the root's URI"
            )
        if len(found) > 1:
            raise RootMisconfigured("several tokens match the root's URI; add token= or serial=")
        return found[0]

    def _matching(self, module: Any) -> list[Any]:
        wanted = self._parsed
        found = []
        for slot in module.get_slots(token_present=True):
            token = slot.get_token()
            if (
                (wanted.token is None or token.label == wanted.token)
                and (wanted.serial is None or token.serial.decode(errors="replace") == wanted.serial)
                and (wanted.manufacturer is None or token.manufacturer_id == wanted.manufacturer)
                and (wanted.model is None or token.model == wanted.model)
                and (wanted.slot_id is None or slot.slot_id == wanted.slot_id)
            ):
                found.append(token)
        return found

    def _find_key(self, session: Any) -> Any:
        from pkcs11 import ObjectClass
        from pkcs11.exceptions import MultipleObjectsReturned, NoSuchKey

        try:
            return session.get_key(
                object_class=ObjectClass.SECRET_KEY, label=self._parsed.object, id=self._parsed.id
            )
        except NoSuchKey:
            raise RootDestroyed(
                "the token has no such key: it was deleted, or object= or id= in the root's URI is wrong"
            ) from None
        except MultipleObjectsReturned:
            raise RootMisconfigured("several keys match the root's URI; name one by id=") from None


def open_pkcs11(uri: str, *, create: bool = False) -> PKCS11Root:
    """Open a ``pkcs11:`` root; the token is asked when the key is first used. ``create`` has no effect."""
    return PKCS11Root(parse_pkcs11_uri(uri))


def parse_blob(wrapped: bytes) -> tuple[bytes, bytes]:
    """Split a wrapped blob: (nonce, ciphertext and tag); DecryptError for anything malformed."""
    if len(wrapped) < 2 + NONCE_BYTES + TAG_BYTES or wrapped[:2] != bytes((FORMAT, AES_GCM)):
        raise DecryptError
    return wrapped[2 : 2 + NONCE_BYTES], wrapped[2 + NONCE_BYTES :]


def create_token_key(
    module_path: str, token: str, pin_source: str, label: str, key_id: bytes = b"\x01"
) -> str:
    """Make an AES-256 key that cannot be extracted, and return its root URI.

    Args:
        module_path: the PKCS#11 module.
        token: the label of an initialised token.
        pin_source: ``file:PATH`` or ``env:NAME``.
        label, key_id: of the new key.
    """
    from pkcs11 import Attribute, KeyType

    root = PKCS11Root(
        PKCS11URI(token=token, object=label, id=key_id, module_path=module_path, pin_source=pin_source)
    )
    with _lock, _translated():
        _renew_after_fork()
        opened = _log_in(root._find_token(_module(module_path)), pin_source, root._place(), rw=True)
        with opened as session:
            session.generate_key(
                KeyType.AES,
                256,
                label=label,
                id=key_id,
                store=True,
                template={
                    Attribute.SENSITIVE: True,
                    Attribute.EXTRACTABLE: False,
                    Attribute.ENCRYPT: True,
                    Attribute.DECRYPT: True,
                    Attribute.WRAP: False,
                    Attribute.UNWRAP: False,
                    Attribute.SIGN: False,
                    Attribute.VERIFY: False,
                },
            )
    return root.uri


# ---- modules, sessions, PINs -----------------------------------------------------------------------------


class _Lost(Exception):
    """The session is gone; ``otherwise`` is what to raise if a new one does not help."""

    def __init__(self, otherwise: OpenKCMError) -> None:
        super().__init__()
        self.otherwise = otherwise


class _Altered(_Lost):
    """Either the tag did not verify or the device failed."""


@contextmanager
def _translated() -> Iterator[None]:
    """Turn the module's return codes (CKR_*) into this package's vocabulary; see docs/roots.md."""
    from pkcs11.exceptions import PKCS11Error

    try:
        yield
    except PKCS11Error as error:
        name = type(error).__name__
        unavailable = RootUnavailable(f"the token does not answer as it should ({name})")
        if name in _ALTERED:
            raise _Altered(unavailable) from None
        if name in _LOST:
            denied = RootDenied(_DENIED[name]) if name in _DENIED else unavailable
            raise _Lost(denied) from None
        if name in _DENIED or name == "FunctionRejected":
            raise RootDenied(_DENIED.get(name, "the token rejected the operation")) from None
        raise RootMisconfigured(
            f"the token cannot do what a root must ({name}): an AES-256 key with CKM_AES_GCM, encrypt and decrypt"
        ) from None


def _module(path: str) -> Any:
    try:
        import pkcs11
    except ImportError:
        raise RootMisconfigured("pkcs11: roots need the extra: pip install 'openkcm[pkcs11]'") from None
    if path not in _modules:
        if not Path(path).is_file():
            raise RootMisconfigured(
                f"the PKCS#11 module {path} is not there; check module-path or {MODULE_VARIABLE}"
            )
        try:
            _modules[path] = pkcs11.lib(path)
        except (RuntimeError, OSError, pkcs11.exceptions.PKCS11Error):
            raise RootMisconfigured(f"the file {path} cannot be loaded as a PKCS#11 module") from None
    return _modules[path]


def _log_in(token: Any, pin_source: str | None, place: tuple[str, str, str], *, rw: bool = False) -> Any:
    """Open a session; a PIN that is refused is remembered as refused, and itself not kept."""
    pin = _read_pin(pin_source)
    try:
        return token.open(user_pin=pin, rw=rw)
    except Exception as error:
        name = type(error).__name__
        if name == "UserAlreadyLoggedIn":
            return token.open(rw=rw)  # by another session of this process, whose login counts for all
        if name in ("PinIncorrect", "PinInvalid", "PinLenRange", "PinLocked"):
            _refused.add(place)
            raise RootDenied(_DENIED[name]) from None
        if name == "UserPinNotInitialized":
            _reload(place[0])  # the module may have read a half-written token, and would remember it so
        raise
    finally:
        del pin


def _reload(path: str) -> bool:
    """Initialise a module anew, some times a few seconds: some list only the tokens that were there at the start.

    The sessions of every root on the module end with it; each logs in again when it is next used.
    """
    now = time.monotonic()
    recent = [at for at in _reloaded.get(path, ()) if now - at < RELOAD_SECONDS]
    if len(recent) > len(RETRY_PAUSES):
        return False
    _reloaded[path] = [*recent, now]
    for place in [place for place in _sessions if place[0] == path]:
        del _sessions[place]
    _modules[path].reinitialize()
    return True


def _read_pin(source: str | None) -> str:
    """The PIN from its source; it is used once and kept nowhere."""
    if source is None:
        pin = os.environ.get(PIN_VARIABLE)
        if pin is None and sys.stdin is not None and sys.stdin.isatty():
            pin = getpass.getpass("PIN of the token: ")
        if pin is None:
            raise RootMisconfigured(
                f"where is the PIN? pin-source=file:PATH or env:NAME in the URI, or {PIN_VARIABLE}"
            )
        return pin
    kind, _, rest = source.partition(":")
    if kind == "env" and rest:
        if rest not in os.environ:
            raise RootMisconfigured(f"the environment variable {rest}, the PIN's source, is not set")
        return os.environ[rest]
    path = Path(rest if kind == "file" else source)
    try:
        if path.stat().st_mode & 0o077:
            raise RootMisconfigured(f"the PIN file {path} can be read by others; run: chmod 600 {path}")
        return path.read_text().rstrip("\r\n")
    except OSError as error:
        raise RootMisconfigured(f"the PIN file {path} cannot be read: {error.strerror}") from None


def _gcm(nonce: bytes, context: Mapping[str, str]) -> dict[str, Any]:
    from pkcs11 import GCMParams, Mechanism

    return {
        "mechanism": Mechanism.AES_GCM,
        "mechanism_param": GCMParams(nonce=nonce, aad=encode_context(context), tag_bits=TAG_BYTES * 8),
    }


def _check(key: Any) -> Any:
    from pkcs11 import KeyType

    if key.key_type != KeyType.AES or key.key_length != 256:
        raise RootMisconfigured("the key that the root's URI names is not an AES-256 key")
    # The binding gives a key only the methods that its attributes allow.
    if not (hasattr(key, "encrypt") and hasattr(key, "decrypt")):
        raise RootDenied(_DENIED["KeyFunctionNotPermitted"])
    return key


def _round_trip(key: Any) -> bool:
    """Whether the key works on a value of our own."""
    from pkcs11.exceptions import PKCS11Error

    parameters = _gcm(os.urandom(NONCE_BYTES), {"openkcm": "check"})
    try:
        return bytes(key.decrypt(bytes(key.encrypt(b"check", **parameters)), **parameters)) == b"check"
    except PKCS11Error:
        return False


def _drop_session(place: tuple[str, str, str]) -> None:
    session = _sessions.pop(place, None)
    if session is not None:
        try:
            session.close()
        except Exception:  # it is gone already, which is why it is dropped
            return


def _after_fork_in_child() -> None:
    global _lock, _stale
    _lock = threading.RLock()
    _stale = bool(_modules)


def _renew_after_fork() -> None:
    """Initialise modules again in a child (PKCS#11 v2.40, section 5.4); the parent's sessions stay its own."""
    global _stale
    if _stale:
        _sessions.clear()
        _reloaded.clear()
        for module in _modules.values():
            module.reinitialize()
        _stale = False


os.register_at_fork(after_in_child=_after_fork_in_child)
