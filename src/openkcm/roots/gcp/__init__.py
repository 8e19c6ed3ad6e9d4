# SPDX-License-Identifier: Apache-2.0
"""``gcp-kms:`` roots: a key in Google Cloud KMS. ``root`` has what it promises."""

from .answers import ANSWERS
from .root import MAX_CIPHERTEXT_BYTES, GCPRoot, open_gcp, parse_blob

__all__ = ["ANSWERS", "MAX_CIPHERTEXT_BYTES", "GCPRoot", "open_gcp", "parse_blob"]
