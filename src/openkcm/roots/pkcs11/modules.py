# SPDX-License-Identifier: Apache-2.0
"""PKCS#11 modules, their tokens and the logins to them.

Invariant: a module is loaded once a process, whatever paths lead to its file, and has one login a token, which the
roots on that token share. A login that is lost is made anew; one module's trouble is no other module's.

What a module remembers of its tokens can be stale: SoftHSM2 reads them at C_Initialize, and after a token's folder
went away and came back it knows none of its keys. Such a module is initialised anew, which ends every login to it.
Others are not: it would end the sessions of every customer, and see nothing that a new session does not.
"""

from __future__ import annotations

import contextlib
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final, TypeVar

from ...clock import DICE
from ...errors import RootMisconfigured, RootUnavailable
from .answers import LOST, Answer, Lost, ask
from .calls import Caller
from .functions import Functions
from .logins import Login, Logins, Place
from .pins import Pin, PinNeeded, read_pin
from .uri import PKCS11URI

T = TypeVar("T")

MODULE_VARIABLE: Final = "OPENKCM_PKCS11_MODULE"
MODULES_VARIABLE: Final = "OPENKCM_PKCS11_MODULES"
"""Paths with colons between them: if set, no root's URI can load any other module into this process."""

REREADING: Final = frozenset({"SoftHSM"})
"""Manufacturers of modules that read their tokens at C_Initialize only, and can be initialised anew at no risk."""

RELOADS: Final = (20, 5.0)
"""How often in how many seconds such a module is initialised anew at most."""

RELOADS_A_USE: Final = 2
"""How often for one use: a second time in case another process was rewriting the token at the first."""

MISSED_SECONDS: Final = 1.0
"""How long ago a token was missed for it to be missed twice."""

PAUSES: Final = (0.02, 0.1)
"""Before each further session of one use: one to see that the last was lost, one to look for a key that it missed."""

REREADING_PAUSES: Final = (0.02, 0.05, 0.1, 0.2)
"""The same with SoftHSM2.

It rewrites a token's file at each login: another process that logs in at that moment is told that the token is not
there, has no PIN or fails, and is told otherwise a moment later.
"""


class Module:
    """A PKCS#11 module. ``run`` is for every thread; the rest is for calls that ``run`` makes."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._caller = Caller()
        self._tokens = Logins()
        self._lib: Any = None
        self._functions: Functions | None = None
        self._process = 0
        self._stale = False
        self._logins: dict[Place, Login] = {}
        self._typed: set[Place] = set()
        self._places: dict[tuple[str | int | None, ...], Place] = {}
        self._begun = 0.0
        self._missed: dict[tuple[str | int | None, ...], float] = {}
        self._reloads: list[float] = []

    def run(self, call: Callable[[], T], seconds: float) -> T:
        """Make a call in the module's thread, and wait for it no longer than this.

        Raises:
            RootUnavailable: it, or an earlier one, does not return.
        """
        return self._caller.run(call, seconds)

    def use(
        self, pin_source: str | None, attempt: Callable[[Module, Pin | None, float], T], seconds: float
    ) -> T:
        """Make an attempt in the module's thread, with a PIN if it asks for one, and again while a login is lost.

        Args:
            pin_source: where the PIN is, read in this thread and only when it is needed.
            attempt: called with the module, the PIN or None, and when this use began.
            seconds: how long all of it may take, typing apart.

        Raises:
            RootDenied, RootDestroyed, RootUnavailable, RootMisconfigured: by what the module answers.
        """
        pin: Pin | None = None
        pauses: Iterator[float] | None = None
        started = time.monotonic()
        try:
            while True:
                try:
                    left = started + seconds - time.monotonic()
                    return self.run(partial(_attempted, attempt, self, pin, started), left)
                except PinNeeded as needed:
                    asked = time.monotonic()
                    pin = read_pin(pin_source, needed)
                    started += time.monotonic() - asked
                except Lost as lost:
                    otherwise = lost.otherwise
                    pauses = pauses or iter(REREADING_PAUSES if self._rereads() else PAUSES)
                    pause = next(pauses, None)
                    if pause is None or time.monotonic() + pause >= started + seconds:
                        break
                    time.sleep(pause * DICE.uniform(0.5, 1.5))
        finally:
            pin = None  # this frame outlives the call where an error is kept
        raise otherwise

    def is_in_use(self) -> bool:
        """Whether anything of it is open in this process."""
        return bool(self._logins) and self._process == os.getpid()

    def forget_tokens(self) -> None:
        """Have the module read its tokens anew before its next use."""
        self._stale = True

    def begin(self, started: float) -> None:
        """Take note of when the use began that an attempt is part of."""
        self._begun = started

    # ---- the library ---------------------------------------------------------------------------------

    def library(self) -> Any:
        """The loaded and initialised module.

        Raises:
            RootMisconfigured: it cannot be loaded.
            RootUnavailable: it does not start.
        """
        if self._functions is None:
            self._lib = _load(self.path)
            self._functions = Functions(self.path)
            self._process = os.getpid()
        elif self._process != os.getpid():
            self._initialise_in_child(self._functions)
        elif self._stale:
            self._initialise_anew(self._functions)
        self._stale = False
        return self._lib

    def _initialise_in_child(self, functions: Functions) -> None:
        """A child must call C_Initialize before anything else (PKCS#11 v2.40 usage guide, section 2.5.2).

        The parent's sessions are its own, and are not closed here.
        """
        self._logins, self._places, self._reloads = {}, {}, []
        try:
            functions.initialize()
        except Answer:  # a module that does not notice the fork says that it is initialised already
            self._initialise_anew(functions)
        self._process = os.getpid()

    def _initialise_anew(self, functions: Functions) -> None:
        self._logins.clear()
        self._places.clear()
        # Somebody else in this process may have done it, or the module may have lost itself.
        with contextlib.suppress(Answer):
            functions.finalize()
        try:
            functions.initialize()
        except Answer as answer:
            raise RootUnavailable(f"the PKCS#11 module cannot be initialised anew ({answer.code})") from None

    def _rereads(self) -> bool:
        return self._lib is not None and self._lib.manufacturer_id in REREADING

    def reread(self) -> bool:
        """Initialise the module anew if it is of those that need it; whether that was done."""
        self.library()
        count, seconds = RELOADS
        now = time.monotonic()
        self._reloads = [at for at in self._reloads if now - at < seconds]
        ours = sum(at >= self._begun for at in self._reloads)
        typed = any(login.typed for login in self._logins.values())  # could not be made again
        functions = self._functions
        if functions is None or not self._rereads() or typed or ours >= RELOADS_A_USE:
            return False
        if len(self._reloads) >= count:
            return False
        self._reloads.append(now)
        self._initialise_anew(functions)
        return True

    def was_reread(self) -> bool:
        """Whether the module was initialised anew since the use began."""
        return bool(self._reloads) and self._reloads[-1] >= self._begun

    # ---- tokens --------------------------------------------------------------------------------------

    def token(self, wanted: PKCS11URI) -> Any:
        """The token that a URI names.

        Raises:
            RootUnavailable: it is not there.
            RootMisconfigured: there are several.
        """
        found = self._matching(wanted)
        if not found and self._was_missed(wanted) and self.reread():
            found = self._matching(wanted)
        if not found:
            raise Lost(
                RootUnavailable(
                    "the token is not there; plug it in, or check token= and serial= in the root's URI",
                    retryable=False,
                )
            )
        if len(found) > 1:
            raise RootMisconfigured("several tokens match the root's URI; add token= or serial=")
        return found[0]

    def _was_missed(self, wanted: PKCS11URI) -> bool:
        """Whether a token was missed a moment ago too: once alone, another process's login may have hidden it."""
        now, part = time.monotonic(), wanted.token_part()
        missed, self._missed[part] = self._missed.get(part), now
        return missed is not None and now - missed < MISSED_SECONDS

    def _matching(self, wanted: PKCS11URI) -> list[Any]:
        found = []
        try:
            slots = ask(self.library().get_slots, token_present=True)
        except Answer as answer:
            if answer.code == "CKR_CRYPTOKI_NOT_INITIALIZED":
                self._stale = True
            if answer.code in LOST:  # SoftHSM2 fails for all of its tokens when the folder of one is gone
                return []
            raise
        for slot in slots:
            try:
                token = ask(slot.get_token)
            except Answer:
                continue  # another customer's, or none
            if _matches(wanted, slot, token):
                found.append(token)
        return found

    # ---- logins --------------------------------------------------------------------------------------

    def log_in(self, wanted: PKCS11URI, pin: Pin | None) -> Login:
        """The login to a token, made if there is none.

        Raises:
            PinNeeded: there is none, and no PIN was given.
            RootDenied: the token refuses the PIN.
            Lost, Answer: for another reason.
        """
        self.library()
        known = self._places.get(wanted.token_part())
        if known is not None and known in self._logins:
            # Without asking for slots, which another customer's token may make fail.
            return self._logins[known]
        token = self.token(wanted)
        place = (token.slot.slot_id, token.serial)
        if place not in self._logins:
            if pin is None:
                raise PinNeeded(_printable(token.label), typed_before=place in self._typed)
            self._logins[place] = self._log_in(token, place, pin)
            if pin.prompted:
                self._typed.add(place)
        self._places[wanted.token_part()] = place
        return self._logins[place]

    def _log_in(self, token: Any, place: Place, pin: Pin) -> Login:
        assert self._functions is not None
        try:
            return self._tokens.log_in(self._functions, token, place, pin)
        except Answer as answer:
            if answer.code == "CKR_USER_PIN_NOT_INITIALIZED":
                self.reread()  # it may have read a half-written token, and would remember it so
            raise

    def holds(self, login: Login) -> bool:
        """Whether a login is still the one that roots share."""
        return self.is_in_use() and not self._stale and login in self._logins.values()

    def drop(self, login: Login) -> None:
        """Close a login that is lost; the next use makes another."""
        for place, held in list(self._logins.items()):
            if held is login:
                del self._logins[place]
        login.close()

    def leave(self, user: object) -> None:
        """Forget a user of its login, and log out with the last."""
        if not self.is_in_use():
            return
        for login in list(self._logins.values()):
            login.users.discard(user)
            if not login.users:
                self.drop(login)

    def write(self, wanted: PKCS11URI, pin: Pin | None, use: Callable[[Any], T]) -> T:
        """Run ``use`` with a session that may make objects, beside the login to the token."""
        login = self.log_in(wanted, pin)
        session = ask(self.token(wanted).open, rw=True)
        try:
            return use(session)
        finally:
            with contextlib.suppress(Answer):
                ask(session.close)
            if not login.users:
                self.drop(login)


def _attempted(
    attempt: Callable[[Module, Pin | None, float], T], module: Module, pin: Pin | None, started: float
) -> T:
    """Make an attempt, and put a return code into our vocabulary: Lost if a new session may help."""
    module.begin(started)
    try:
        return attempt(module, pin, started)
    except Answer as answer:
        lost, error = answer.code in LOST, answer.error()
    raise Lost(error) if lost else error


# ---- the modules of this process -------------------------------------------------------------------------

_modules: dict[tuple[int, int], Module] = {}
_lock = threading.Lock()


def module_at(path: str) -> Module:
    """The module in a file, by whatever path.

    Raises:
        RootMisconfigured: there is none, or others could put their own code there.
    """
    try:
        status = os.stat(path)
    except (OSError, ValueError):
        raise RootMisconfigured(
            f"the PKCS#11 module {path} is not there; check module-path or {MODULE_VARIABLE}"
        ) from None
    if not stat.S_ISREG(status.st_mode):
        raise RootMisconfigured(f"the PKCS#11 module {path} is not a file")
    if status.st_uid not in (0, os.geteuid()) or status.st_mode & 0o022:
        raise RootMisconfigured(
            f"the PKCS#11 module {path} can be changed by others than root and this user; its code would run in here"
        )
    allowed = os.environ.get(MODULES_VARIABLE)
    if allowed is not None and not any(_is_same(path, other) for other in allowed.split(":") if other):
        raise RootMisconfigured(
            f"the PKCS#11 module {path} is not among those that {MODULES_VARIABLE} allows"
        )
    file = status.st_dev, status.st_ino
    with _lock:
        if file not in _modules:
            _modules[file] = Module(Path(path).absolute())
        return _modules[file]


def _is_same(path: str, other: str) -> bool:
    with contextlib.suppress(OSError):
        return os.path.samefile(path, other)
    return False


def _load(path: Path) -> Any:
    try:
        import pkcs11
    except ImportError:
        raise RootMisconfigured("pkcs11: roots need the extra: pip install 'openkcm[pkcs11]'") from None
    try:
        return ask(pkcs11.lib, str(path))
    except Answer as answer:
        code = answer.code
    if code in LOST:
        raise RootUnavailable(
            f"the PKCS#11 module {path} does not start ({code}); look after the HSM, and the module's own configuration"
        )
    raise RootMisconfigured(f"the file {path} cannot be loaded as a PKCS#11 module ({code})")


def _matches(wanted: PKCS11URI, slot: Any, token: Any) -> bool:
    from pkcs11 import TokenFlag

    return (
        bool(token.flags & TokenFlag.TOKEN_INITIALIZED)
        and (wanted.token is None or token.label == wanted.token)
        and (wanted.serial is None or token.serial.decode(errors="replace") == wanted.serial)
        and (wanted.manufacturer is None or token.manufacturer_id == wanted.manufacturer)
        and (wanted.model is None or token.model == wanted.model)
        and (wanted.slot_id is None or slot.slot_id == wanted.slot_id)
    )


def _printable(label: str) -> str:
    """A token's label for a terminal: what a token says of itself is nothing to trust."""
    return "".join(letter if letter.isprintable() else "?" for letter in label)


def _after_fork_in_child() -> None:
    global _lock
    _lock = threading.Lock()


os.register_at_fork(after_in_child=_after_fork_in_child)
