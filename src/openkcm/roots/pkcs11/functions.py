# SPDX-License-Identifier: Apache-2.0
"""The functions of a PKCS#11 module that the binding cannot be asked for as a root needs them.

Invariant: Python's lock is never held while a module runs. The binding holds it during C_Finalize, where a module may
wait for an HSM on the network, or in a forked child for a lock that another thread of the parent had. And the binding
logs in only while it opens a session, which it leaves open where the login fails, and logs every user of the token in
this process out when it closes one.

They are called through the table that the module itself gives out (CK_FUNCTION_LIST, the same since PKCS#11 v2.0).
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, Final

from .answers import Answer, name_of

_C_INITIALIZE: Final = 0
_C_FINALIZE: Final = 1
_C_LOGIN: Final = 18
_CKU_USER: Final = 1


class _FunctionList(ctypes.Structure):
    _fields_ = (("version", ctypes.c_ubyte * 2), ("functions", ctypes.c_void_p * (_C_LOGIN + 1)))


_NUMBER: Final = ctypes.c_ulong
_GET_FUNCTION_LIST: Final = ctypes.CFUNCTYPE(_NUMBER, ctypes.POINTER(ctypes.POINTER(_FunctionList)))
_ON_NOTHING: Final = ctypes.CFUNCTYPE(_NUMBER, ctypes.c_void_p)
_ON_LOGIN: Final = ctypes.CFUNCTYPE(_NUMBER, _NUMBER, _NUMBER, ctypes.c_char_p, _NUMBER)


class Functions:
    """What a loaded module's table points to."""

    def __init__(self, path: Path) -> None:
        library = ctypes.CDLL(str(path))  # which the binding has loaded already, hence the same one
        table = ctypes.POINTER(_FunctionList)()
        _check(ctypes.cast(library.C_GetFunctionList, _GET_FUNCTION_LIST)(ctypes.byref(table)))
        self._places = table.contents.functions

    def initialize(self) -> None:
        """C_Initialize, without arguments: calls are made one at a time.

        Raises:
            Answer: what it returns.
        """
        _check(_ON_NOTHING(self._at(_C_INITIALIZE))(None))

    def finalize(self) -> None:
        """C_Finalize.

        Raises:
            Answer: what it returns.
        """
        _check(_ON_NOTHING(self._at(_C_FINALIZE))(None))

    def log_in(self, session: int, pin: str) -> None:
        """C_Login as the token's user, to a session that is open.

        Raises:
            Answer: what it returns.
        """
        text = pin.encode()
        _check(_ON_LOGIN(self._at(_C_LOGIN))(session, _CKU_USER, text, len(text)))

    def _at(self, place: int) -> Any:
        address = self._places[place]
        if not address:
            raise Answer("CKR_FUNCTION_NOT_SUPPORTED")
        return address


def _check(code: int) -> None:
    if code:
        raise Answer(name_of(code))
