# SPDX-License-Identifier: Apache-2.0
"""Customers' HSMs to test against: real SoftHSM2 tokens in a private folder, with the levers of their owners.

Invariant: the key's owner acts from another process, on the token itself, as a real one does: so that the levers also
work on a Core that runs in a process of its own. Faults of the module (``slow``, ``throttle``, ``fail``, ``lie``,
``answer``) and the count of requests are put between this process's roots and the binding, and exist in this process
alone.

=================  ====================================================================  ====================
lever              what it does to the token                                             a root answers
=================  ====================================================================  ====================
``disable, deny``  ``CKA_ENCRYPT``, ``CKA_DECRYPT`` (or ``CKA_WRAP``, ``CKA_UNWRAP``) false  ``RootDenied``
``delete``         takes the key's object away; ``enable`` restores it                   ``RootDestroyed``
``destroy``        C_DestroyObject                                                       ``RootDestroyed``
``unplug``         takes the token out of its slot; ``plug_in`` puts it back             ``RootUnavailable``
``black_hole``     holds the lock of the key's file, for which SoftHSM2 waits            ``RootUnavailable``
=================  ====================================================================  ====================
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from ..errors import RootMisconfigured, RootUnavailable
from ..roots.pkcs11 import root
from ..roots.pkcs11.answers import ANSWERS, NO_SUCH_OBJECT, code_of
from ..roots.pkcs11.keys import AES, AES_WRAP, RSA, create_token_key
from ..roots.pkcs11.logins import Login
from ..roots.pkcs11.mechanisms import Key, encrypt_to
from ..roots.pkcs11.modules import module_at
from ..roots.pkcs11.oaep import unpad_oaep
from ..roots.pkcs11.softhsm import CONFIGURATION_VARIABLE, Token, configure, find_module, init_token
from ..roots.pkcs11.uri import PKCS11URI
from .base import FakeKey, FakeProvider, KeyCondition

__all__ = ["AES", "AES_WRAP", "RSA", "SoftHSM", "SoftHSMKey"]

USES: Final[Mapping[str, tuple[str, ...]]] = {
    AES: ("CKA_ENCRYPT", "CKA_DECRYPT"),
    AES_WRAP: ("CKA_WRAP", "CKA_UNWRAP"),
    RSA: ("CKA_DECRYPT",),
}
"""Which attributes allow a root what it does, by the kind of its key."""

THROTTLED: Final = 429
"""What ``FakeKey.throttle`` sets; the nearest that PKCS#11 has is ``CKR_TOKEN_RESOURCE_EXCEEDED``."""

OWNER_PAUSES: Final = (0.05, 0.2, 0.0)
OWNER_SECONDS: Final = 30
"""How long the owner's process may take, for example because the token is locked."""

# Another process with the owner's PIN, which is in a file.
_OWNER: Final = """
import sys
import pkcs11
module, label, pin_file, *changes = sys.argv[1:]
with open(pin_file) as file:
    pin = file.read()
session = pkcs11.lib(module).get_token(token_label=label).open(rw=True, user_pin=pin)
for key in list(session.get_objects()):
    for change in changes:
        name, _, value = change.partition("=")
        if name == "destroy":
            key.destroy()
        elif key[pkcs11.Attribute.CLASS] != pkcs11.ObjectClass.PUBLIC_KEY:
            key[pkcs11.Attribute[name.removeprefix("CKA_")]] = value == "true"
"""

# SoftHSM2 takes this lock before it reads a key; a process does not wait for its own, hence another one.
_HOLDER: Final = """
import fcntl
import sys
files = [open(path, "r+b") for path in sys.argv[1:]]
for file in files:
    fcntl.lockf(file, fcntl.LOCK_EX)
print("held", flush=True)
sys.stdin.read()
"""


@dataclass
class SoftHSMKey(FakeKey):
    """One customer's key, alone on a token of its own."""

    token: Token = field(kw_only=True)
    kind: str = field(kw_only=True)
    module: str = field(kw_only=True)
    answering: str | None = None
    _uses: dict[str, bool] = field(default_factory=dict, repr=False)
    _holder: subprocess.Popen[bytes] | None = field(default=None, repr=False)

    # ---- the owner's levers --------------------------------------------------------------------------

    def enable(self) -> None:
        """Switch the key on again, or put it back after ``delete``."""
        if self.condition is KeyCondition.PENDING_DELETION:
            self._move(self._aside(), self.token.folder)
        super().enable()
        self._set_uses()

    def disable(self) -> None:
        """Forbid every use of the key by its attributes, the nearest that PKCS#11 has; ``enable`` brings it back."""
        super().disable()
        self._set_uses()
        self.say_no()

    def deny(self, *permissions: str) -> None:
        """Set these attributes of the key to false; all that a root needs if none is named."""
        super().deny(*permissions)
        self._set_uses()
        self.say_no()

    def allow(self) -> None:
        """Set the attributes to true again."""
        super().allow()
        self._set_uses()

    def delete(self) -> None:
        """Take the key off the token, as if deleted from an HSM that has a backup; ``enable`` restores it."""
        super().delete()
        self._aside().mkdir(mode=0o700, exist_ok=True)
        self._move(self.token.folder, self._aside())
        self.say_no()

    def destroy(self) -> None:
        """Destroy the key for good."""
        if self.condition is KeyCondition.PENDING_DELETION:
            shutil.rmtree(self._aside())
        else:
            self._own("destroy")
        super().destroy()
        self.say_no()

    def unplug(self) -> None:
        """Take the token out."""
        os.rename(self.token.folder, self._elsewhere())

    def plug_in(self) -> None:
        """Put the token back."""
        if self._elsewhere().exists():
            os.rename(self._elsewhere(), self.token.folder)

    # ---- the module's faults -------------------------------------------------------------------------

    def black_hole(self) -> None:
        """Let the module wait for ever as soon as it touches the key."""
        if self._holder is not None:
            return
        command = [sys.executable, "-c", _HOLDER, *(str(path) for path in self._objects(self.token.folder))]
        self._holder = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        assert self._holder.stdout is not None
        self._holder.stdout.readline()

    def answer(self, name: str) -> None:
        """Let the module answer each use of the key with a code of ``ANSWERS``, in this process."""
        if name not in ANSWERS:
            raise ValueError(f"{name} is not an answer of a PKCS#11 module")
        self.answering = name

    def heal(self) -> None:
        """End every fault; what the owner did stays."""
        super().heal()
        self.answering = None
        holder, self._holder = self._holder, None
        if holder is not None:
            holder.communicate(timeout=OWNER_SECONDS)  # it ends with its input
            self._await_module()

    def _await_module(self) -> None:
        """Wait until the call that hung in this process, if one did, has returned."""
        ends = time.monotonic() + OWNER_SECONDS
        while time.monotonic() < ends:
            with contextlib.suppress(RootUnavailable):
                return module_at(self.module).run(lambda: None, 1.0)
            time.sleep(0.005)

    # ---- inside --------------------------------------------------------------------------------------

    def _set_uses(self) -> None:
        if self.condition is KeyCondition.PENDING_DELETION or self.condition is KeyCondition.DESTROYED:
            return
        enabled = self.condition is KeyCondition.ENABLED
        wanted = {use: enabled and self.may(use) for use in USES[self.kind]}
        changes = {use: value for use, value in wanted.items() if self._uses.get(use, True) is not value}
        if changes:
            self._own(*(f"{use}={'true' if value else 'false'}" for use, value in changes.items()))
        self._uses = wanted

    def _own(self, *changes: str) -> None:
        arguments = (self.module, self.token.label, str(self.token.pin_file), *changes)
        for pause in OWNER_PAUSES:
            done = subprocess.run(
                [sys.executable, "-c", _OWNER, *arguments],
                capture_output=True,
                timeout=OWNER_SECONDS,
                check=False,
            )
            if done.returncode == 0:
                return
            time.sleep(pause)  # it may have met a login, at which SoftHSM2 rewrites the token
        raise RootMisconfigured(f"the token's owner could not do {', '.join(changes)}")

    def _aside(self) -> Path:
        return self.token.pin_file.with_name(f"deleted-{self.token.folder.name}")

    def _elsewhere(self) -> Path:
        return self.token.pin_file.with_name(f"unplugged-{self.token.folder.name}")

    @staticmethod
    def _objects(folder: Path) -> list[Path]:
        return [path for path in folder.glob("*.object") if path.name != "token.object"]

    def _move(self, source: Path, target: Path) -> None:
        for path in self._objects(source):
            os.rename(path, target / path.name)


class SoftHSM(FakeProvider):
    """Tokens in a folder of their own; one such provider a process at a time.

    Raises:
        RootMisconfigured: SoftHSM2 is not installed, or another one is in use in this process.
    """

    permissions = USES[AES]

    def __init__(self) -> None:
        super().__init__()
        self._folder: Path | None = None
        self._keys: dict[str, SoftHSMKey] = {}
        module = find_module()
        if module is None:
            raise RootMisconfigured("SoftHSM2 is not installed; apt-get install softhsm2")
        self.module = module

    def start(self) -> None:
        """Make the folder."""
        if isinstance(root.search, _Between):
            raise RootMisconfigured("SoftHSM2 serves one folder a process; another provider is in use")
        self._folder = Path(tempfile.mkdtemp(prefix="openkcm-softhsm-"))
        configure(self._folder)
        root.search = _Between(root.search, self._keys)
        module_at(self.module).forget_tokens()

    def stop(self) -> None:
        """End every fault and remove the tokens."""
        for key in self._keys.values():
            key.heal()
        self._keys.clear()
        if isinstance(root.search, _Between):
            root.search = root.search.search
        if self._folder is not None:
            module_at(self.module).forget_tokens()
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def settings(self) -> Mapping[str, str]:
        """Where SoftHSM2 finds the tokens."""
        return {CONFIGURATION_VARIABLE: str(self._at() / "softhsm2.conf")}

    def make_key(self, name: str, *, kind: str = AES) -> SoftHSMKey:
        """Make a token of this name with one key: ``aes``, ``aes-wrap`` or ``rsa``."""
        if os.environ.get(CONFIGURATION_VARIABLE) != self.settings()[CONFIGURATION_VARIABLE]:
            raise RootMisconfigured("make keys inside the provider's with block")
        token = init_token(self._at(), name)
        module_at(self.module).forget_tokens()
        uri = create_token_key(self.module, name, token.pin_source, "root", kind=kind)
        key = SoftHSMKey(name, uri, token=token, kind=kind, module=self.module)
        self._keys[name] = key
        return key

    def _at(self) -> Path:
        if self._folder is None:
            raise RootMisconfigured("the provider is not started")
        return self._folder


class _Between:
    """Stands for the search for a root's key, and hands out keys that misbehave as they are told to."""

    def __init__(
        self, search: Callable[[Login, PKCS11URI], list[Any]], keys: Mapping[str, SoftHSMKey]
    ) -> None:
        self.search = search
        self._keys = keys

    def __call__(self, login: Login, wanted: PKCS11URI) -> list[Any]:
        found = self.search(login, wanted)
        key = self._keys.get(wanted.token or "")
        if key is None:
            return found
        return [] if key.answering == NO_SUCH_OBJECT else [_Handle(handle, key) for handle in found]


class _Handle:
    """A key of the binding that suffers the faults of its ``SoftHSMKey``."""

    def __init__(self, handle: Any, key: SoftHSMKey) -> None:
        self._handle = handle
        self._key = key

    def __getitem__(self, attribute: Any) -> Any:
        return self._handle[attribute]

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._handle, name)
        if name not in ("encrypt", "decrypt", "wrap_key", "unwrap_key"):
            return found

        from pkcs11 import Mechanism

        def use(*arguments: Any, **options: Any) -> Any:
            status = self._key.meet()
            if status is not None:
                raise _exception("CKR_TOKEN_RESOURCE_EXCEEDED" if status == THROTTLED else "CKR_DEVICE_ERROR")
            if self._key.answering is not None:
                raise _exception(self._key.answering)
            result = found(*arguments, **options)
            if not self._key.faults.lie or name in ("encrypt", "wrap_key"):
                return result
            if name == "unwrap_key":
                return _Lying(result)
            if options["mechanism"] != Mechanism.RSA_X_509:
                return _altered(result)
            # The padding is the root's to take off: what a liar would decrypt is another ciphertext.
            message = _altered(unpad_oaep(result.rjust(len(arguments[0]), b"\0")))
            lie = encrypt_to(Key(self._handle, None, {}, is_private=True), message)
            return found(lie, *arguments[1:], **options)

        return use


class _Lying:
    """A session object whose value is not what it is."""

    def __init__(self, made: Any) -> None:
        self.destroy = made.destroy
        self._made = made

    def __getitem__(self, attribute: Any) -> bytes:
        return _altered(self._made[attribute])


def _altered(plaintext: bytes) -> bytes:
    return plaintext[:-1] + bytes((plaintext[-1] ^ 1,))


def _exception(code: str) -> Exception:
    """What the binding raises for a code."""
    from pkcs11 import exceptions

    if code == NO_SUCH_OBJECT:
        return exceptions.ObjectHandleInvalid()
    sayings = (
        "Unmapped error code 0xa",
        "Unmapped error code 0x1b",
        "Unmapped error code 0x42",
        "Unmapped error code 0x68",
        "Unmapped error code 0x201",
        "Initialisation error (not initialized). Should never see this.",
        "Initialisation error (already initialized). Should never see this.",
    )
    classes = [kind for kind in vars(exceptions).values() if isinstance(kind, type)]
    errors = [kind() for kind in classes if issubclass(kind, exceptions.PKCS11Error)]
    errors += [exceptions.PKCS11Error(saying) for saying in sayings]
    return next(error for error in errors if code_of(error) == code)
