# SPDX-License-Identifier: Apache-2.0
"""``pkcs11:`` roots: a key in an HSM (PKCS#11). ``root`` has what it promises."""

from .answers import ANSWERS
from .root import MODULE_VARIABLE, PIN_VARIABLE, PKCS11Root, create_token_key, open_pkcs11, parse_blob

__all__ = [
    "ANSWERS",
    "MODULE_VARIABLE",
    "PIN_VARIABLE",
    "PKCS11Root",
    "create_token_key",
    "open_pkcs11",
    "parse_blob",
]
