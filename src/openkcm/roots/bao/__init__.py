# SPDX-License-Identifier: Apache-2.0
"""``bao-transit:`` roots: a key in OpenBao or HashiCorp Vault. ``root`` has what it promises."""

from .answers import ANSWERS
from .root import MAX_SEALED_BYTES, BaoRoot, make_blob, open_bao, parse_blob

__all__ = ["ANSWERS", "MAX_SEALED_BYTES", "BaoRoot", "make_blob", "open_bao", "parse_blob"]
