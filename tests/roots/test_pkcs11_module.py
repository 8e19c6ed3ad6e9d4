# SPDX-License-Identifier: Apache-2.0
"""What a ``pkcs11:`` root makes of each answer of a module, and of modules that are slow, old, new or odd.

The module is real, SoftHSM2 or NSS, behind one that answers as it is told (``tests/pkcs11_shim.c``), so that each code
goes the whole way through the binding.
"""

from __future__ import annotations

import contextlib
import os
import re
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest

from openkcm.errors import (
    DecryptError,
    OpenKCMError,
    RootDenied,
    RootDestroyed,
    RootMisconfigured,
    RootUnavailable,
)
from openkcm.roots import Root, open_root
from openkcm.roots.pkcs11 import modules
from openkcm.roots.pkcs11 import root as provider
from openkcm.roots.pkcs11.answers import ANSWERS, DOUBTFUL, LOST, NO_SUCH_OBJECT, REFUSED_PINS, code_of
from openkcm.roots.pkcs11.keys import AES, AES_WRAP, RSA, create_token_key
from openkcm.roots.pkcs11.modules import module_at
from openkcm.roots.pkcs11.softhsm import init_token
from pkcs11_shim import Shim, over_nss, over_softhsm
from support import refused

CONTEXT = {"tenant": "acme"}
SEALED = bytes(range(72))

# PKCS#11 v3.2, for each code of the table.
NUMBERS = {
    "CKR_HOST_MEMORY": 0x02,
    "CKR_SLOT_ID_INVALID": 0x03,
    "CKR_GENERAL_ERROR": 0x05,
    "CKR_FUNCTION_FAILED": 0x06,
    "CKR_ARGUMENTS_BAD": 0x07,
    "CKR_CANT_LOCK": 0x0A,
    "CKR_ATTRIBUTE_SENSITIVE": 0x11,
    "CKR_ATTRIBUTE_TYPE_INVALID": 0x12,
    "CKR_ATTRIBUTE_VALUE_INVALID": 0x13,
    "CKR_ACTION_PROHIBITED": 0x1B,
    "CKR_DATA_INVALID": 0x20,
    "CKR_DATA_LEN_RANGE": 0x21,
    "CKR_DEVICE_ERROR": 0x30,
    "CKR_DEVICE_MEMORY": 0x31,
    "CKR_DEVICE_REMOVED": 0x32,
    "CKR_ENCRYPTED_DATA_INVALID": 0x40,
    "CKR_ENCRYPTED_DATA_LEN_RANGE": 0x41,
    "CKR_AEAD_DECRYPT_FAILED": 0x42,
    "CKR_FUNCTION_CANCELED": 0x50,
    "CKR_FUNCTION_NOT_SUPPORTED": 0x54,
    "CKR_KEY_HANDLE_INVALID": 0x60,
    "CKR_KEY_SIZE_RANGE": 0x62,
    "CKR_KEY_TYPE_INCONSISTENT": 0x63,
    "CKR_KEY_FUNCTION_NOT_PERMITTED": 0x68,
    "CKR_KEY_NOT_WRAPPABLE": 0x69,
    "CKR_KEY_UNEXTRACTABLE": 0x6A,
    "CKR_MECHANISM_INVALID": 0x70,
    "CKR_MECHANISM_PARAM_INVALID": 0x71,
    "CKR_OBJECT_HANDLE_INVALID": 0x82,
    "CKR_OPERATION_ACTIVE": 0x90,
    "CKR_OPERATION_NOT_INITIALIZED": 0x91,
    "CKR_PIN_INCORRECT": 0xA0,
    "CKR_PIN_INVALID": 0xA1,
    "CKR_PIN_LEN_RANGE": 0xA2,
    "CKR_PIN_EXPIRED": 0xA3,
    "CKR_PIN_LOCKED": 0xA4,
    "CKR_SESSION_CLOSED": 0xB0,
    "CKR_SESSION_COUNT": 0xB1,
    "CKR_SESSION_HANDLE_INVALID": 0xB3,
    "CKR_SESSION_READ_ONLY": 0xB5,
    "CKR_TEMPLATE_INCOMPLETE": 0xD0,
    "CKR_TEMPLATE_INCONSISTENT": 0xD1,
    "CKR_TOKEN_NOT_PRESENT": 0xE0,
    "CKR_TOKEN_NOT_RECOGNIZED": 0xE1,
    "CKR_TOKEN_WRITE_PROTECTED": 0xE2,
    "CKR_UNWRAPPING_KEY_HANDLE_INVALID": 0xF0,
    "CKR_UNWRAPPING_KEY_TYPE_INCONSISTENT": 0xF2,
    "CKR_USER_NOT_LOGGED_IN": 0x101,
    "CKR_USER_PIN_NOT_INITIALIZED": 0x102,
    "CKR_USER_ANOTHER_ALREADY_LOGGED_IN": 0x104,
    "CKR_USER_TOO_MANY_TYPES": 0x105,
    "CKR_WRAPPED_KEY_INVALID": 0x110,
    "CKR_WRAPPED_KEY_LEN_RANGE": 0x112,
    "CKR_WRAPPING_KEY_HANDLE_INVALID": 0x113,
    "CKR_WRAPPING_KEY_TYPE_INCONSISTENT": 0x115,
    "CKR_CRYPTOKI_NOT_INITIALIZED": 0x190,
    "CKR_CRYPTOKI_ALREADY_INITIALIZED": 0x191,
    "CKR_FUNCTION_REJECTED": 0x200,
    "CKR_TOKEN_RESOURCE_EXCEEDED": 0x201,
}
CODES = sorted(NUMBERS)


@pytest.fixture(scope="module")
def module(softhsm_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Shim:
    """One module over SoftHSM2."""
    return over_softhsm(tmp_path_factory.mktemp("shim"))


class Place:
    """A token behind the module, and roots on it."""

    def __init__(self, shim: Shim, folder: Path, label: str) -> None:
        self.shim = shim
        self.token = init_token(folder, label)
        module_at(shim.path).forget_tokens()
        self.root = self.make("root", b"\x01")

    def make(self, label: str, key_id: bytes, kind: str = AES) -> Root:
        return open_root(
            create_token_key(
                self.shim.path, self.token.label, self.token.pin_source, label, key_id, kind=kind
            )
        )


@pytest.fixture(scope="module")
def one(module: Shim, softhsm_folder: Path) -> Place:
    """One token for all tests of codes."""
    return Place(module, softhsm_folder, "behind")


@pytest.fixture
def place(one: Place, monkeypatch: pytest.MonkeyPatch) -> Iterator[Place]:
    """The token, its module passing everything on to begin with, and no pauses."""
    monkeypatch.setattr(modules, "REREADING_PAUSES", (0.0, 0.0, 0.0, 0.0))
    pkcs11 = module_at(one.shim.path)
    pkcs11._tokens.forget_refusals()
    pkcs11._reloads.clear()
    yield one
    one.shim.reset()
    pkcs11._tokens.forget_refusals()
    one.root.close()
    assert one.root.unwrap(one.root.wrap(b"x", {}), {}) == b"x", "it does not recover"


# ---- the table -------------------------------------------------------------------------------------------


def test_the_table_is_complete() -> None:
    assert set(NUMBERS) | {NO_SUCH_OBJECT} == set(ANSWERS)
    assert set(ANSWERS) >= LOST
    assert set(ANSWERS) >= DOUBTFUL


def test_names_are_those_of_the_standard() -> None:
    """The binding's own table says which class stands for which code."""
    import pkcs11
    from pkcs11 import exceptions

    source = (Path(pkcs11.__file__).parent / "_pkcs11.pxd").read_text()
    pairs = re.findall(r"rv == (CKR_\w+):\s+exc = (\w+)\(\)", source)
    assert len(pairs) > 60
    for code, name in pairs:
        assert code_of(getattr(exceptions, name)()) == code


@pytest.mark.parametrize("code", CODES)
def test_each_code_at_an_unwrap(place: Place, code: str) -> None:
    wrapped = place.root.wrap(SEALED, CONTEXT)
    place.shim.answer("C_DecryptInit", NUMBERS[code])
    error = refused(lambda: place.root.unwrap(wrapped, CONTEXT), ANSWERS[code])
    assert code in str(error) or ANSWERS[code] is DecryptError
    place.shim.reset()
    assert place.root.unwrap(wrapped, CONTEXT) == SEALED


@pytest.mark.parametrize("code", CODES)
def test_each_code_at_a_wrap(place: Place, code: str) -> None:
    place.root.warnings()
    place.shim.answer("C_EncryptInit", NUMBERS[code])
    expected = RootMisconfigured if ANSWERS[code] is DecryptError else ANSWERS[code]
    refused(lambda: place.root.wrap(SEALED, CONTEXT), expected)


@pytest.mark.parametrize("code", CODES)
def test_each_code_at_a_login(place: Place, code: str) -> None:
    place.root.close()
    before = place.shim.calls("C_Login")
    place.shim.answer("C_Login", NUMBERS[code])
    expected = RootMisconfigured if ANSWERS[code] is DecryptError else ANSWERS[code]
    for _ in range(3):
        refused(lambda: place.root.wrap(SEALED, CONTEXT), expected)
    if code in REFUSED_PINS:
        assert place.shim.calls("C_Login") == before + 1


@pytest.mark.parametrize("code", sorted(LOST))
def test_a_session_that_is_lost_is_made_anew(place: Place, code: str) -> None:
    wrapped = place.root.wrap(SEALED, CONTEXT)
    place.shim.answer("C_DecryptInit", NUMBERS[code], 1)
    assert place.root.unwrap(wrapped, CONTEXT) == SEALED


@pytest.mark.parametrize(
    "code", ["CKR_DEVICE_REMOVED", "CKR_SESSION_HANDLE_INVALID", "CKR_CRYPTOKI_NOT_INITIALIZED"]
)
def test_a_module_that_is_not_initialised_anew(
    place: Place, monkeypatch: pytest.MonkeyPatch, code: str
) -> None:
    """As all but SoftHSM2: lost sessions are made anew, and a key that is gone is gone; C_Finalize is not called."""
    monkeypatch.setattr(modules, "REREADING", frozenset())
    monkeypatch.setattr(modules, "PAUSES", (0.0, 0.0))
    wrapped = place.root.wrap(SEALED, CONTEXT)
    finalized = place.shim.calls("C_Finalize")
    place.shim.answer("C_DecryptInit", NUMBERS[code], 1)
    assert place.root.unwrap(wrapped, CONTEXT) == SEALED
    gone = open_root(place.root.uri.replace("object=root", "object=none"))
    for _ in range(3):
        refused(lambda: gone.wrap(SEALED, CONTEXT), RootDestroyed)
    away = open_root(place.root.uri.replace("token=behind", "token=none"))
    refused(lambda: away.wrap(SEALED, CONTEXT), RootUnavailable)
    assert place.shim.calls("C_Finalize") == finalized
    place.root.close()
    place.shim.answer("C_GetSlotList", NUMBERS["CKR_CRYPTOKI_NOT_INITIALIZED"], 1)
    assert place.root.unwrap(wrapped, CONTEXT) == SEALED, "somebody else in the process finalised it"
    assert place.shim.calls("C_Finalize") == finalized + 1


@pytest.mark.parametrize("code", sorted(DOUBTFUL))
def test_a_doubtful_code_from_a_key_that_works_is_altered_data(place: Place, code: str) -> None:
    wrapped = place.root.wrap(SEALED, CONTEXT)
    place.shim.answer("C_DecryptInit", NUMBERS[code], 0b101)  # the one between is the value of the root's own
    refused(lambda: place.root.unwrap(wrapped, CONTEXT), DecryptError)
    place.shim.answer("C_DecryptInit", NUMBERS[code], 0b001)
    assert place.root.unwrap(wrapped, CONTEXT) == SEALED, "a token that failed for a moment"


@pytest.mark.parametrize("number", [0x99, 0x203, 0x80000123, 0xFFFFFFFFFFFFFFFF])
def test_codes_of_nobody(place: Place, number: int) -> None:
    wrapped = place.root.wrap(SEALED, CONTEXT)
    place.shim.answer("C_DecryptInit", number)
    error = refused(lambda: place.root.unwrap(wrapped, CONTEXT), RootMisconfigured)
    assert f"{number:#x}" in str(error)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the binding's own clean-up
@pytest.mark.parametrize(
    "function", ["C_GetSlotList", "C_GetTokenInfo", "C_OpenSession", "C_FindObjectsInit"]
)
@pytest.mark.parametrize("code", ["CKR_DEVICE_REMOVED", "CKR_CRYPTOKI_NOT_INITIALIZED"])
def test_a_code_on_the_way_to_the_key(place: Place, function: str, code: str) -> None:
    place.root.close()
    place.shim.answer(function, NUMBERS[code])
    refused(lambda: place.root.wrap(SEALED, CONTEXT), RootUnavailable)
    place.shim.reset()
    place.root.wrap(SEALED, CONTEXT)
    place.root.close()
    place.shim.answer(function, NUMBERS[code], 1)
    place.root.wrap(SEALED, CONTEXT)


# ---- PINs --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("flag", "words"), [(0x20000, "one try left"), (0x40000, "locked")])
def test_the_last_try_is_not_taken(place: Place, flag: int, words: str) -> None:
    place.root.close()
    before = place.shim.calls("C_Login")
    place.shim.flags(flag)
    assert words in str(refused(lambda: place.root.wrap(SEALED, CONTEXT), RootDenied))
    assert place.shim.calls("C_Login") == before


def test_a_corrected_pin_is_tried_and_a_guesser_is_stopped(place: Place) -> None:
    right = place.token.pin_file.read_text()
    logins = place.shim.calls("C_Login")

    def use() -> None:
        place.root.close()
        place.root.wrap(SEALED, CONTEXT)

    try:
        for count, pin in enumerate(("wrong-1", "wrong-1\n", "wrong-2", "wrong-3", "wrong-4")):
            place.token.pin_file.write_text(pin)
            refused(use, RootDenied)
            assert place.shim.calls("C_Login") - logins == (1, 1, 2, 2, 2)[count]
        place.token.pin_file.write_text(right)
        assert "start this process anew" in str(refused(use, RootDenied))
        module_at(place.shim.path)._tokens.forget_refusals()
        place.token.pin_file.write_text("wrong-1")
        refused(use, RootDenied)
        place.token.pin_file.write_text(right)
        use()
        assert module_at(place.shim.path)._tokens._refused == {}
    finally:
        place.token.pin_file.write_text(right)


# ---- sessions ----------------------------------------------------------------------------------------------


def test_one_session_serves_many_uses_and_ends_with_the_last_root(place: Place) -> None:
    other = place.make("second", b"\x02")
    for root in (place.root, other):
        root.close()
    opened, closed = place.shim.calls("C_OpenSession"), place.shim.calls("C_CloseSession")
    for _ in range(50):
        for root in (place.root, other):
            root.unwrap(root.wrap(SEALED, CONTEXT), CONTEXT)
    assert place.shim.calls("C_OpenSession") == opened + 1
    place.root.close()
    place.root.close()
    assert place.shim.calls("C_CloseSession") == closed
    other.wrap(SEALED, CONTEXT)
    assert place.shim.calls("C_OpenSession") == opened + 1
    other.close()
    assert place.shim.calls("C_CloseSession") == closed + 1


def test_no_session_is_left_behind(place: Place) -> None:
    """Many failures of many kinds, and what was opened was closed."""
    wrapped = place.root.wrap(SEALED, CONTEXT)
    place.root.close()
    left = place.shim.calls("C_OpenSession") - place.shim.calls("C_CloseSession")
    finalized = place.shim.calls("C_Finalize")
    gone = open_root(place.root.uri.replace("object=root", "object=none"))
    for number in range(32):
        place.shim.answer("C_DecryptInit", NUMBERS["CKR_DEVICE_ERROR"], number)
        with contextlib.suppress(RootUnavailable, DecryptError):
            place.root.unwrap(wrapped, CONTEXT)
        place.shim.reset()
        refused(lambda: gone.wrap(SEALED, CONTEXT), RootDestroyed)
        place.root.close()
        place.shim.answer("C_Login", NUMBERS["CKR_DEVICE_ERROR"], number)
        with contextlib.suppress(RootUnavailable):
            place.root.wrap(SEALED, CONTEXT)
        place.shim.reset()
    place.root.close()
    gone.close()
    opened, closed = place.shim.calls("C_OpenSession"), place.shim.calls("C_CloseSession")
    # C_Finalize closes what is open; each was called with one session at most.
    assert opened - closed - left <= place.shim.calls("C_Finalize") - finalized


def test_a_module_without_read_only_sessions(place: Place) -> None:
    place.root.close()
    place.shim.answer("C_OpenSession", NUMBERS["CKR_SESSION_READ_ONLY"], 1)
    place.root.wrap(SEALED, CONTEXT)


# ---- modules that hang --------------------------------------------------------------------------------------


@pytest.mark.parametrize("function", ["C_DecryptInit", "C_Login", "C_GetSlotList", "C_OpenSession"])
def test_a_call_that_hangs(place: Place, monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    """Whoever waits is told in time, others at once; it heals by itself; other modules go on."""
    monkeypatch.setattr(provider, "ANSWER_SECONDS", 0.5)
    wrapped = place.root.wrap(SEALED, CONTEXT)
    second = open_root(place.root.uri)
    if function != "C_DecryptInit":
        place.root.close()
    place.shim.hang(function)
    began = time.monotonic()
    error = refused(lambda: place.root.unwrap(wrapped, CONTEXT), RootUnavailable)
    assert 0.4 < time.monotonic() - began < 3
    assert error.retryable is False  # type: ignore[attr-defined]
    began = time.monotonic()
    for _ in range(20):
        refused(lambda: second.unwrap(wrapped, CONTEXT), RootUnavailable)
    second.close()
    place.root.close()
    assert time.monotonic() - began < 0.4
    place.shim.hang(function, False)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            assert place.root.unwrap(wrapped, CONTEXT) == SEALED
            break
        except RootUnavailable:
            time.sleep(0.01)
    assert second.unwrap(wrapped, CONTEXT) == SEALED
    second.close()


def test_who_waits_behind_a_call_that_hangs_is_told_too(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(provider, "ANSWER_SECONDS", 0.5)
    wrapped = place.root.wrap(SEALED, CONTEXT)
    place.shim.hang("C_DecryptInit")
    answers: list[str] = []

    def use() -> None:
        try:
            open_root(place.root.uri).unwrap(wrapped, CONTEXT)
        except OpenKCMError as error:
            answers.append(type(error).__name__)

    threads = [threading.Thread(target=use) for _ in range(16)]
    began = time.monotonic()
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(10)
    assert time.monotonic() - began < 3
    assert answers == ["RootUnavailable"] * 16
    calls = place.shim.calls("C_DecryptInit")
    place.shim.hang("C_DecryptInit", False)
    place.root.close()
    time.sleep(0.1)
    assert place.shim.calls("C_DecryptInit") <= calls + 1, "what nobody waits for any more is not done"


def test_a_fork_waits_for_a_call(place: Place) -> None:
    """Forks in the middle of others' use: each child can use the root at once."""
    wrapped = place.root.wrap(SEALED, CONTEXT)
    ends = threading.Event()

    def work() -> None:
        while not ends.is_set():
            place.root.unwrap(wrapped, CONTEXT)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    try:
        statuses = [child(lambda: place.root.unwrap(wrapped, CONTEXT) == SEALED) for _ in range(8)]
    finally:
        ends.set()
        for thread in threads:
            thread.join(10)
    assert statuses == [0] * 8


def test_a_fork_while_a_call_hangs(place: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(provider, "ANSWER_SECONDS", 0.3)
    monkeypatch.setattr("openkcm.roots.pkcs11.calls.FORK_SECONDS", 0.2)
    wrapped = place.root.wrap(SEALED, CONTEXT)
    place.shim.hang("C_DecryptInit")
    refused(lambda: place.root.unwrap(wrapped, CONTEXT), RootUnavailable)

    def is_told() -> bool:
        error = refused(lambda: place.root.unwrap(wrapped, CONTEXT), RootUnavailable)
        return "forked" in str(error)

    began = time.monotonic()
    assert child(is_told) == 0
    assert time.monotonic() - began < 3
    place.shim.hang("C_DecryptInit", False)
    time.sleep(0.05)
    assert place.root.unwrap(wrapped, CONTEXT) == SEALED, "the parent's module works on"
    assert child(lambda: place.root.unwrap(wrapped, CONTEXT) == SEALED) == 0


def child(check: Callable[[], bool]) -> int:
    """Run a check in a forked child; 0 if it holds."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            status = 0 if check() else 2
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


# ---- mechanisms ---------------------------------------------------------------------------------------------


def test_a_token_that_makes_nonces_of_its_own(place: Place) -> None:
    place.root.warnings()
    place.shim.longer(16)
    error = refused(lambda: place.root.wrap(SEALED, CONTEXT), RootMisconfigured)
    assert "nonces of its own" in str(error)


def test_key_wrap_by_its_own_number(place: Place) -> None:
    """SoftHSM2 does RFC 5649 under the number of CKM_AES_KEY_WRAP_PAD; newer tokens under CKM_AES_KEY_WRAP_KWP."""
    root = place.make("kwp", b"\x07", AES_WRAP)
    padded = root.wrap(SEALED, CONTEXT)
    assert padded[:2] == b"\x01\x03"
    place.shim.rename(0x210A, 0x210B)
    place.root.close()
    root.close()
    wrapped = root.wrap(SEALED, CONTEXT)
    assert wrapped[:2] == b"\x01\x02"
    assert wrapped[2:] == padded[2:], "the same bytes under either number"
    assert root.unwrap(wrapped, CONTEXT) == SEALED
    assert "CKR_MECHANISM_INVALID" in str(refused(lambda: root.unwrap(padded, CONTEXT), RootMisconfigured))
    root.close()


def test_a_session_object_is_destroyed_whatever_happens(place: Place) -> None:
    root = place.make("tidy", b"\x08", AES_WRAP)
    wrapped = root.wrap(SEALED, CONTEXT)
    before = place.shim.calls("C_DestroyObject")
    assert root.unwrap(wrapped, CONTEXT) == SEALED
    assert place.shim.calls("C_DestroyObject") == before + 1
    place.shim.answer("C_WrapKey", NUMBERS["CKR_KEY_UNEXTRACTABLE"])
    refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured)
    assert place.shim.calls("C_DestroyObject") == before + 2
    root.close()


# ---- hostile answers ------------------------------------------------------------------------------------------


class Hostile:
    """A key of a module that answers with nonsense, or so that the binding fails to read it."""

    def __init__(self, handle: object, attribute: str, answer: object) -> None:
        self._handle = handle
        self._attribute = attribute
        self._answer = answer

    def __getattr__(self, name: str) -> object:
        if name != self._attribute:
            return getattr(self._handle, name)
        return lambda *arguments, **options: self._say()

    def __getitem__(self, attribute: object) -> object:
        if attribute.name != self._attribute:  # type: ignore[attr-defined]
            return self._handle[attribute]  # type: ignore[index]
        return self._say()

    def _say(self) -> object:
        if isinstance(self._answer, Exception):
            raise self._answer
        return self._answer


@contextlib.contextmanager
def hostile(attribute: str, answer: object) -> Iterator[None]:
    """Let the keys that roots find be such."""
    search = provider.search

    def find(*given: object) -> list[Hostile]:
        return [Hostile(key, attribute, answer) for key in search(*given)]  # type: ignore[arg-type]

    with mock.patch.object(provider, "search", find):
        yield


@pytest.fixture(scope="module")
def rsa(one: Place) -> Root:
    """An RSA key, which takes a moment to make."""
    return one.make("rsa", b"\x09", RSA)


FAILURES = [ValueError("secret"), TypeError("secret"), KeyError("secret"), NotImplementedError("secret")]


@pytest.mark.parametrize("answer", FAILURES, ids=lambda answer: type(answer).__name__)
@pytest.mark.parametrize("attribute", ["KEY_TYPE", "VALUE_LEN", "encrypt", "decrypt"])
def test_what_the_binding_cannot_read(place: Place, attribute: str, answer: Exception) -> None:
    wrapped = place.root.wrap(SEALED, CONTEXT)
    root = open_root(place.root.uri)
    with hostile(attribute, answer):
        error = refused(
            lambda: root.unwrap(wrapped, CONTEXT) if attribute == "decrypt" else root.wrap(SEALED, CONTEXT),
            RootMisconfigured,
        )
    assert "secret" not in str(error)
    assert error.__context__ is None


@pytest.mark.parametrize(
    ("attribute", "answer"),
    [
        ("MODULUS", b""),
        ("MODULUS", b"\xff" * 4000),
        ("MODULUS", b"\x80" + bytes(383)),
        ("PUBLIC_EXPONENT", b""),
        ("PUBLIC_EXPONENT", b"\x02"),
        ("PUBLIC_EXPONENT", b"\x03"),
        ("KEY_TYPE", 0x80000001),
        ("ALWAYS_AUTHENTICATE", True),
        ("decrypt", b""),
        ("decrypt", b"x" * 5000),
        ("decrypt", SEALED),
    ],
)
def test_an_rsa_key_of_nonsense(place: Place, rsa: Root, attribute: str, answer: object) -> None:
    with hostile(attribute, answer):
        refused(lambda: open_root(rsa.uri).wrap(SEALED, CONTEXT), RootMisconfigured)


# ---- another module -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def nss(tmp_path_factory: pytest.TempPathFactory) -> str:
    """NSS's token with a PIN; the part of a root URI before the key, and after it."""
    import pkcs11

    folder = tmp_path_factory.mktemp("nss-shim")
    shim = over_nss(folder)
    pin_file = folder / "pin"
    pin_file.touch(0o600)
    pin_file.write_text("a1b2c3d4")
    token = next(
        slot.get_token()
        for slot in pkcs11.lib(shim.path).get_slots()
        if "Certificate" in slot.get_token().label
    )
    session = token.open(rw=True, so_pin="")
    session.init_pin(pin_file.read_text())
    session.close()
    return f"{shim.path}|{token.label}|file:{pin_file}"


def test_rsa_oaep_on_nss(nss: str) -> None:
    path, label, pin = nss.split("|")
    root = open_root(create_token_key(path, label, pin, "rsa", b"\x11", kind=RSA))
    other = open_root(create_token_key(path, label, pin, "rsa2", b"\x12", kind=RSA))
    assert "type=private" in root.uri
    assert root.warnings() == []
    wrapped = root.wrap(SEALED, CONTEXT)
    assert wrapped[:2] == b"\x01\x04"
    assert len(wrapped) == 2 + 384
    assert root.wrap(SEALED, CONTEXT) != wrapped
    assert root.unwrap(wrapped, CONTEXT) == SEALED
    refused(lambda: root.unwrap(wrapped, {"tenant": "globex"}), DecryptError)
    refused(lambda: root.unwrap(wrapped, {}), DecryptError)
    refused(lambda: other.unwrap(wrapped, CONTEXT), DecryptError)
    for at in (*range(10), *range(10, len(wrapped), 37), len(wrapped) - 1):
        altered = wrapped[:at] + bytes([wrapped[at] ^ 0x80]) + wrapped[at + 1 :]
        refused(lambda altered=altered: root.unwrap(altered, CONTEXT), DecryptError)
    for body in (b"\xff" * 384, b"\0" * 384, os.urandom(384), os.urandom(256), b""):
        refused(lambda body=body: root.unwrap(b"\x01\x04" + body, CONTEXT), DecryptError)
    assert root.unwrap(wrapped, CONTEXT) == SEALED


def test_what_others_encrypt_to_the_public_key_opens(nss: str) -> None:
    """By RFC 8017 with SHA-256 throughout, and not with SHA-1; and only with the right context inside."""
    import pkcs11
    from cryptography.hazmat.primitives.asymmetric.padding import MGF1, OAEP
    from cryptography.hazmat.primitives.asymmetric.rsa import RSAPublicNumbers
    from cryptography.hazmat.primitives.hashes import SHA1, SHA256

    from openkcm.roots.binding import bind

    path, label, pin = nss.split("|")
    root = open_root(create_token_key(path, label, pin, "rsa3", b"\x13", kind=RSA))
    numbers: list[bytes] = root._use(  # type: ignore[attr-defined]
        lambda key: [key.handle[pkcs11.Attribute.PUBLIC_EXPONENT], key.handle[pkcs11.Attribute.MODULUS]]
    )
    public = RSAPublicNumbers(*(int(number.hex(), 16) for number in numbers)).public_key()
    plaintext = bind(SEALED, CONTEXT)
    for digest, opens in ((SHA256, True), (SHA1, False)):
        blob = b"\x01\x04" + public.encrypt(plaintext, OAEP(MGF1(digest()), digest(), None))
        if opens:
            assert root.unwrap(blob, CONTEXT) == SEALED
        else:
            refused(lambda blob=blob: root.unwrap(blob, CONTEXT), DecryptError)
    bare = b"\x01\x04" + public.encrypt(SEALED, OAEP(MGF1(SHA256()), SHA256(), None))
    refused(lambda: root.unwrap(bare, CONTEXT), DecryptError)


def test_key_wrap_by_encryption_on_nss(nss: str) -> None:
    """NSS pads CKM_AES_KEY_WRAP_PAD by PKCS#7, and takes it for C_Encrypt."""
    import pkcs11

    path, label, pin = nss.split("|")
    uri = create_token_key(path, label, pin, "aes", b"\x21")
    root = open_root(uri)
    allowed = {int(pkcs11.Mechanism.AES_KEY_WRAP_PAD)}

    def only(key: object) -> None:
        key.offered = {number: flags for number, flags in key.offered.items() if number in allowed}  # type: ignore[attr-defined]

    root._use(only)  # type: ignore[attr-defined]
    wrapped = root.wrap(SEALED, CONTEXT)
    assert wrapped[:2] == b"\x01\x03"
    assert len(wrapped) == 2 + 120
    assert root.unwrap(wrapped, CONTEXT) == SEALED
    refused(lambda: root.unwrap(wrapped, {}), DecryptError)
    for at in range(2, len(wrapped), 7):
        altered = wrapped[:at] + bytes([wrapped[at] ^ 1]) + wrapped[at + 1 :]
        refused(lambda altered=altered: root.unwrap(altered, CONTEXT), DecryptError)
