# SPDX-License-Identifier: Apache-2.0
"""What a PKCS#11 module answers (``CKR_*``), in the vocabulary of ``openkcm.errors``.

Invariant: each return code means one thing, by the table ``ANSWERS``, whichever call gave it; a code that is not in the
table is ``RootMisconfigured`` and named. Only ``RootUnavailable`` gets grace. No text of the module is passed on.

The binding raises one exception class a code and keeps no number, so that the names are made from the classes'. Codes
that the binding does not know, ``CKR_KEY_FUNCTION_NOT_PERMITTED`` among them, it raises as their number.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from typing import Final, ParamSpec, TypeVar

from ...errors import (
    DecryptError,
    OpenKCMError,
    RootDenied,
    RootDestroyed,
    RootMisconfigured,
    RootThrottled,
    RootUnavailable,
)

P = ParamSpec("P")
T = TypeVar("T")

NO_SUCH_OBJECT: Final = "no such object"
"""What stands in the table for a search that finds nothing; PKCS#11 has no code for it."""

ANSWERS: Final[Mapping[str, type[OpenKCMError]]] = {
    # The customer, or the token on the customer's behalf, says no.
    "CKR_PIN_INCORRECT": RootDenied,
    "CKR_PIN_INVALID": RootDenied,
    "CKR_PIN_LEN_RANGE": RootDenied,
    "CKR_PIN_EXPIRED": RootDenied,
    "CKR_PIN_LOCKED": RootDenied,
    "CKR_USER_PIN_NOT_INITIALIZED": RootDenied,
    "CKR_USER_NOT_LOGGED_IN": RootDenied,
    "CKR_KEY_FUNCTION_NOT_PERMITTED": RootDenied,
    "CKR_FUNCTION_REJECTED": RootDenied,
    "CKR_ACTION_PROHIBITED": RootDenied,
    NO_SUCH_OBJECT: RootDestroyed,
    # Not what this key wrapped.
    "CKR_ENCRYPTED_DATA_INVALID": DecryptError,
    "CKR_ENCRYPTED_DATA_LEN_RANGE": DecryptError,
    "CKR_AEAD_DECRYPT_FAILED": DecryptError,
    "CKR_WRAPPED_KEY_INVALID": DecryptError,
    "CKR_WRAPPED_KEY_LEN_RANGE": DecryptError,
    # The token does not answer as it should.
    "CKR_TOKEN_NOT_PRESENT": RootUnavailable,
    "CKR_TOKEN_NOT_RECOGNIZED": RootUnavailable,
    "CKR_DEVICE_ERROR": RootUnavailable,
    "CKR_DEVICE_MEMORY": RootUnavailable,
    "CKR_DEVICE_REMOVED": RootUnavailable,
    "CKR_HOST_MEMORY": RootUnavailable,
    "CKR_GENERAL_ERROR": RootUnavailable,
    "CKR_FUNCTION_FAILED": RootUnavailable,
    "CKR_FUNCTION_CANCELED": RootUnavailable,
    "CKR_SESSION_CLOSED": RootUnavailable,
    "CKR_SESSION_HANDLE_INVALID": RootUnavailable,
    "CKR_SLOT_ID_INVALID": RootUnavailable,
    "CKR_KEY_HANDLE_INVALID": RootUnavailable,
    "CKR_OBJECT_HANDLE_INVALID": RootUnavailable,
    "CKR_WRAPPING_KEY_HANDLE_INVALID": RootUnavailable,
    "CKR_UNWRAPPING_KEY_HANDLE_INVALID": RootUnavailable,
    "CKR_OPERATION_ACTIVE": RootUnavailable,
    "CKR_OPERATION_NOT_INITIALIZED": RootUnavailable,
    "CKR_CRYPTOKI_NOT_INITIALIZED": RootUnavailable,
    # It is up, and has nothing to spare for us now.
    "CKR_SESSION_COUNT": RootThrottled,
    "CKR_TOKEN_RESOURCE_EXCEEDED": RootThrottled,
    # Something is set up wrongly.
    "CKR_MECHANISM_INVALID": RootMisconfigured,
    "CKR_MECHANISM_PARAM_INVALID": RootMisconfigured,
    "CKR_ARGUMENTS_BAD": RootMisconfigured,
    "CKR_DATA_INVALID": RootMisconfigured,
    "CKR_DATA_LEN_RANGE": RootMisconfigured,
    "CKR_FUNCTION_NOT_SUPPORTED": RootMisconfigured,
    "CKR_KEY_TYPE_INCONSISTENT": RootMisconfigured,
    "CKR_KEY_SIZE_RANGE": RootMisconfigured,
    "CKR_KEY_NOT_WRAPPABLE": RootMisconfigured,
    "CKR_KEY_UNEXTRACTABLE": RootMisconfigured,
    "CKR_WRAPPING_KEY_TYPE_INCONSISTENT": RootMisconfigured,
    "CKR_UNWRAPPING_KEY_TYPE_INCONSISTENT": RootMisconfigured,
    "CKR_TEMPLATE_INCOMPLETE": RootMisconfigured,
    "CKR_TEMPLATE_INCONSISTENT": RootMisconfigured,
    "CKR_ATTRIBUTE_TYPE_INVALID": RootMisconfigured,
    "CKR_ATTRIBUTE_VALUE_INVALID": RootMisconfigured,
    "CKR_ATTRIBUTE_SENSITIVE": RootMisconfigured,
    "CKR_SESSION_READ_ONLY": RootMisconfigured,
    "CKR_TOKEN_WRITE_PROTECTED": RootMisconfigured,
    "CKR_USER_ANOTHER_ALREADY_LOGGED_IN": RootMisconfigured,
    "CKR_USER_TOO_MANY_TYPES": RootMisconfigured,
    "CKR_CANT_LOCK": RootMisconfigured,
    "CKR_CRYPTOKI_ALREADY_INITIALIZED": RootMisconfigured,
}
"""Our class for each answer to an unwrap; ``DOUBTFUL`` ones are ``DecryptError`` where the key otherwise works."""

LOST: Final = frozenset(
    {code for code, kind in ANSWERS.items() if kind is RootUnavailable}
    | {"CKR_KEY_FUNCTION_NOT_PERMITTED", "CKR_USER_NOT_LOGGED_IN", "CKR_USER_PIN_NOT_INITIALIZED"}
)
"""Worth a second look before it is believed: a session may be gone, or what is known of the key be old."""

STALE_KEYS: Final = frozenset(
    {code for code in ANSWERS if code.endswith(("KEY_HANDLE_INVALID", "OBJECT_HANDLE_INVALID"))}
    | {"CKR_KEY_FUNCTION_NOT_PERMITTED"}
)
"""Of these, what is no fault of the login: the key is gone or has changed, or the session's view of it has."""

DOUBTFUL: Final = frozenset(
    {
        "CKR_GENERAL_ERROR",
        "CKR_FUNCTION_FAILED",
        "CKR_DEVICE_ERROR",
        "CKR_DATA_INVALID",
        "CKR_DATA_LEN_RANGE",
        "CKR_ARGUMENTS_BAD",
        "CKR_MECHANISM_PARAM_INVALID",
    }
)
"""What modules also answer to altered ciphertext: SoftHSM2 the first, NSS the arguments and lengths."""

REFUSED_PINS: Final = frozenset({"CKR_PIN_INCORRECT", "CKR_PIN_INVALID", "CKR_PIN_LEN_RANGE"})

REFUSED_PIN: Final = (
    "the token refused the PIN; correct it (the same PIN is not tried again, lest the token lock)"
)
LOCKED_PIN: Final = "the token's PIN is locked; its security officer must unlock it"

_ADVICE: Final[Mapping[str, str]] = {
    "CKR_PIN_INCORRECT": REFUSED_PIN,
    "CKR_PIN_INVALID": REFUSED_PIN,
    "CKR_PIN_LEN_RANGE": REFUSED_PIN,
    "CKR_PIN_EXPIRED": "the token's PIN has expired; its user must set a new one",
    "CKR_PIN_LOCKED": LOCKED_PIN,
    "CKR_USER_PIN_NOT_INITIALIZED": "the token has no user PIN yet; its security officer must set one",
    "CKR_USER_NOT_LOGGED_IN": "the token did not let us in; check the PIN's source",
    "CKR_KEY_FUNCTION_NOT_PERMITTED": "the key may not be used for this; the customer must set its attributes",
    "CKR_FUNCTION_REJECTED": "the token's policy rejected the operation; ask whoever runs it",
    "CKR_ACTION_PROHIBITED": "the token's policy prohibits the operation; ask whoever runs it",
    NO_SUCH_OBJECT: "the token has no such key: it was deleted, or object=, id= or type= in the root's URI is wrong",
    "CKR_DEVICE_MEMORY": "the token is full; remove objects or sessions that are not needed",
    "CKR_SESSION_COUNT": "the token has no session to spare; close those of other programs",
    "CKR_TOKEN_RESOURCE_EXCEEDED": "the token has no resources to spare; close what other programs keep open",
    "CKR_USER_ANOTHER_ALREADY_LOGGED_IN": "this process is logged in to the token as another user; log out first",
    "CKR_USER_TOO_MANY_TYPES": "this process is logged in to the token as another user; log out first",
}
_BY_CLASS: Final[Mapping[type[OpenKCMError], str]] = {
    RootDenied: "the token refuses",
    RootUnavailable: "the token does not answer as it should",
    RootThrottled: "the token has nothing to spare for us now",
    RootMisconfigured: "the token cannot do with this key what a root must; see its grant for what the key needs",
}

# The classes whose names do not spell the code's.
_SPELLED: Final[Mapping[str, str]] = {
    "AnotherUserAlreadyLoggedIn": "CKR_USER_ANOTHER_ALREADY_LOGGED_IN",
    "FunctionCancelled": "CKR_FUNCTION_CANCELED",
    "RandomNoRNG": "CKR_RANDOM_NO_RNG",
    "SessionReadWriteSOExists": "CKR_SESSION_READ_WRITE_SO_EXISTS",
    "SlotIDInvalid": "CKR_SLOT_ID_INVALID",
    "TokenNotRecognised": "CKR_TOKEN_NOT_RECOGNIZED",
}
# By number (PKCS#11 v3.2): for codes that the binding has no class for, and where it is not asked.
_NUMBERS: Final[Mapping[int, str]] = {
    0x00: "CKR_OK",
    0x02: "CKR_HOST_MEMORY",
    0x03: "CKR_SLOT_ID_INVALID",
    0x05: "CKR_GENERAL_ERROR",
    0x06: "CKR_FUNCTION_FAILED",
    0x07: "CKR_ARGUMENTS_BAD",
    0x0A: "CKR_CANT_LOCK",
    0x11: "CKR_ATTRIBUTE_SENSITIVE",
    0x12: "CKR_ATTRIBUTE_TYPE_INVALID",
    0x13: "CKR_ATTRIBUTE_VALUE_INVALID",
    0x1B: "CKR_ACTION_PROHIBITED",
    0x20: "CKR_DATA_INVALID",
    0x21: "CKR_DATA_LEN_RANGE",
    0x30: "CKR_DEVICE_ERROR",
    0x31: "CKR_DEVICE_MEMORY",
    0x32: "CKR_DEVICE_REMOVED",
    0x40: "CKR_ENCRYPTED_DATA_INVALID",
    0x41: "CKR_ENCRYPTED_DATA_LEN_RANGE",
    0x42: "CKR_AEAD_DECRYPT_FAILED",
    0x50: "CKR_FUNCTION_CANCELED",
    0x54: "CKR_FUNCTION_NOT_SUPPORTED",
    0x60: "CKR_KEY_HANDLE_INVALID",
    0x62: "CKR_KEY_SIZE_RANGE",
    0x63: "CKR_KEY_TYPE_INCONSISTENT",
    0x68: "CKR_KEY_FUNCTION_NOT_PERMITTED",
    0x69: "CKR_KEY_NOT_WRAPPABLE",
    0x6A: "CKR_KEY_UNEXTRACTABLE",
    0x70: "CKR_MECHANISM_INVALID",
    0x71: "CKR_MECHANISM_PARAM_INVALID",
    0x82: "CKR_OBJECT_HANDLE_INVALID",
    0x90: "CKR_OPERATION_ACTIVE",
    0x91: "CKR_OPERATION_NOT_INITIALIZED",
    0xA0: "CKR_PIN_INCORRECT",
    0xA1: "CKR_PIN_INVALID",
    0xA2: "CKR_PIN_LEN_RANGE",
    0xA3: "CKR_PIN_EXPIRED",
    0xA4: "CKR_PIN_LOCKED",
    0xB0: "CKR_SESSION_CLOSED",
    0xB1: "CKR_SESSION_COUNT",
    0xB3: "CKR_SESSION_HANDLE_INVALID",
    0xB5: "CKR_SESSION_READ_ONLY",
    0xD0: "CKR_TEMPLATE_INCOMPLETE",
    0xD1: "CKR_TEMPLATE_INCONSISTENT",
    0xE0: "CKR_TOKEN_NOT_PRESENT",
    0xE1: "CKR_TOKEN_NOT_RECOGNIZED",
    0xE2: "CKR_TOKEN_WRITE_PROTECTED",
    0xF0: "CKR_UNWRAPPING_KEY_HANDLE_INVALID",
    0xF2: "CKR_UNWRAPPING_KEY_TYPE_INCONSISTENT",
    0x100: "CKR_USER_ALREADY_LOGGED_IN",
    0x101: "CKR_USER_NOT_LOGGED_IN",
    0x102: "CKR_USER_PIN_NOT_INITIALIZED",
    0x103: "CKR_USER_TYPE_INVALID",
    0x104: "CKR_USER_ANOTHER_ALREADY_LOGGED_IN",
    0x105: "CKR_USER_TOO_MANY_TYPES",
    0x110: "CKR_WRAPPED_KEY_INVALID",
    0x112: "CKR_WRAPPED_KEY_LEN_RANGE",
    0x113: "CKR_WRAPPING_KEY_HANDLE_INVALID",
    0x115: "CKR_WRAPPING_KEY_TYPE_INCONSISTENT",
    0x150: "CKR_BUFFER_TOO_SMALL",
    0x190: "CKR_CRYPTOKI_NOT_INITIALIZED",
    0x191: "CKR_CRYPTOKI_ALREADY_INITIALIZED",
    0x200: "CKR_FUNCTION_REJECTED",
    0x201: "CKR_TOKEN_RESOURCE_EXCEEDED",
}
_SAYINGS: Final[Mapping[str, str]] = {
    "(not initialized)": "CKR_CRYPTOKI_NOT_INITIALIZED",
    "(already initialized)": "CKR_CRYPTOKI_ALREADY_INITIALIZED",
    "Buffer was too small": "CKR_BUFFER_TOO_SMALL",
    "Parallel not supported": "CKR_SESSION_PARALLEL_NOT_SUPPORTED",
    "User type invalid": "CKR_USER_TYPE_INVALID",
}
_NUMBER: Final = re.compile(r"0x([0-9a-f]{1,16})\b", re.ASCII)
_CAPITAL: Final = re.compile(r"(?<!^)(?=[A-Z])")


class Lost(Exception):
    """Worth one more try in a new session; ``otherwise`` is what to raise if that does not help."""

    def __init__(self, otherwise: OpenKCMError) -> None:
        super().__init__()
        self.otherwise = otherwise


class Answer(Exception):
    """A return code of the module."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code

    def error(self) -> OpenKCMError:
        """The same in our vocabulary."""
        return error_of(self.code)


def ask(call: Callable[P, T], /, *arguments: P.args, **options: P.kwargs) -> T:
    """Call into the binding.

    Raises:
        Answer: the module returned an error, or something that the binding cannot read.
    """
    try:
        return call(*arguments, **options)
    except Exception as error:  # the binding raises what it likes when a module's answer is malformed
        code = code_of(error)
    # Outside the handler: an exception that was being handled would keep the call's frames, and what is in them.
    raise Answer(code)


def code_of(error: Exception) -> str:
    """The code's name as an operator looks it up, from an exception of the binding."""
    from pkcs11.exceptions import PKCS11Error

    name = type(error).__name__
    if not isinstance(error, PKCS11Error):
        return f"unreadable, {name}"
    if type(error) is not PKCS11Error:
        return _SPELLED.get(name) or "CKR_" + _CAPITAL.sub("_", name).upper()
    text = str(error)
    number = _NUMBER.search(text)
    if number is not None:
        return name_of(int(number[1], 16))
    return next((code for saying, code in _SAYINGS.items() if saying in text), "CKR unknown")


def name_of(number: int) -> str:
    """The name of a return code by its number."""
    return _NUMBERS.get(number, f"CKR {number:#x}")


def error_of(code: str) -> OpenKCMError:
    """The error for a code: its class by ``ANSWERS``, its message saying what to do.

    What says that data is not a key's own is an answer to an unwrap alone; to anything else it is misconfigured.
    """
    kind = ANSWERS.get(code, RootMisconfigured)
    if kind is DecryptError:
        kind = RootMisconfigured
    message = _ADVICE.get(code) or _BY_CLASS[kind]
    return kind(message if code == NO_SUCH_OBJECT else f"{message} ({code})")
