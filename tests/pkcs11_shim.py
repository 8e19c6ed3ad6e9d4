# SPDX-License-Identifier: Apache-2.0
"""The module of ``pkcs11_shim.c`` over a real one: SoftHSM2, or NSS.

SoftHSM2 is a copy of its file, so that it is another module than the one that tests use directly.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
from pathlib import Path
from unittest import mock

import pytest

from openkcm.roots.pkcs11 import softhsm

SOURCE = Path(__file__).with_name("pkcs11_shim.c")
NSS = (
    "/usr/lib/x86_64-linux-gnu/libsoftokn3.so",
    "/usr/lib/aarch64-linux-gnu/libsoftokn3.so",
    "/usr/lib/x86_64-linux-gnu/nss/libsoftokn3.so",
    "/usr/lib64/libsoftokn3.so",
    "/usr/lib/libsoftokn3.so",
)
FUNCTIONS = {
    "C_Initialize": 0,
    "C_Finalize": 1,
    "C_GetSlotList": 4,
    "C_GetTokenInfo": 6,
    "C_OpenSession": 12,
    "C_CloseSession": 13,
    "C_Login": 18,
    "C_Logout": 19,
    "C_CreateObject": 20,
    "C_DestroyObject": 22,
    "C_GetAttributeValue": 24,
    "C_FindObjectsInit": 26,
    "C_EncryptInit": 29,
    "C_Encrypt": 30,
    "C_DecryptInit": 33,
    "C_Decrypt": 34,
    "C_WrapKey": 60,
    "C_UnwrapKey": 61,
}
ALWAYS = (1 << 64) - 1


class Shim:
    """A module that passes on, and what it can be told."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        self._library = ctypes.CDLL(self.path)
        self._library.shim_calls.restype = ctypes.c_ulong

    def load(self, module: str, parameters: str | None = None) -> None:
        """Choose the module below, for good."""
        settings = {"SHIM_MODULE": module} | ({} if parameters is None else {"SHIM_PARAMETERS": parameters})
        with mock.patch.dict(os.environ, settings):
            assert self._library.C_GetFunctionList(ctypes.byref(ctypes.c_void_p())) == 0

    def answer(self, function: str, code: int, which: int = ALWAYS) -> None:
        """Let of the next calls of a function those return a code whose bit is set: 1 for the next only."""
        self._library.shim_answer(FUNCTIONS[function], ctypes.c_ulong(code), ctypes.c_ulong(which))

    def flags(self, flags: int) -> None:
        """Let every token have these flags too."""
        self._library.shim_flags(ctypes.c_ulong(flags))

    def rename(self, old: int, new: int) -> None:
        """Offer a mechanism under another number."""
        self._library.shim_rename(ctypes.c_ulong(old), ctypes.c_ulong(new))

    def longer(self, count: int) -> None:
        """Let ciphertext be longer than it should."""
        self._library.shim_longer(ctypes.c_ulong(count))

    def hang(self, function: str, on: bool = True) -> None:
        """Let a function not return, or return again."""
        self._library.shim_hang(FUNCTIONS[function], int(on))

    def calls(self, function: str) -> int:
        """How often it was called."""
        return int(self._library.shim_calls(FUNCTIONS[function]))

    def reset(self) -> None:
        """Do nothing but pass on."""
        for name in FUNCTIONS:
            self.answer(name, 0, 0)
            self.hang(name, False)
        self.flags(0)
        self.rename(0, 0)
        self.longer(0)


def build(folder: Path, name: str) -> Shim:
    """Compile the module; skips where there is no compiler."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("no C compiler for the PKCS#11 module that misbehaves on demand")
    path = folder / f"{name}.so"
    command = [compiler, "-O1", "-shared", "-fPIC", "-o", str(path), str(SOURCE), "-ldl"]
    subprocess.run(command, check=True, capture_output=True, timeout=60)
    path.chmod(0o700)
    return Shim(path)


def over_softhsm(folder: Path) -> Shim:
    """The module over SoftHSM2."""
    module = softhsm.find_module() or pytest.fail("SoftHSM2 is not installed")
    shim = build(folder, "over-softhsm")
    shim.load(str(shutil.copy(module, folder / "softhsm-copy.so")))
    return shim


def over_nss(folder: Path) -> Shim:
    """The module over NSS, which does AES key wrap by C_Encrypt and RSA-OAEP with SHA-256."""
    module = next((path for path in NSS if Path(path).is_file()), None)
    if module is None:
        pytest.skip("NSS is not installed (libnss3), the second module to test against")
    shim = build(folder, "over-nss")
    (folder / "nss").mkdir()
    shim.load(module, f"configDir='sql:{folder / 'nss'}'")
    return shim
