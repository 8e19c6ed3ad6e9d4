# SPDX-License-Identifier: Apache-2.0
"""``azure-kms:`` roots: a key in Azure Key Vault or Managed HSM. ``root`` has what it promises."""

from .answers import ANSWERS
from .root import AzureRoot, open_azure, parse_blob

__all__ = ["ANSWERS", "AzureRoot", "open_azure", "parse_blob"]
