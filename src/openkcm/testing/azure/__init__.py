# SPDX-License-Identifier: Apache-2.0
"""An Azure Key Vault, a Managed HSM and Entra ID to test against, over their wire protocols."""

from .vault import AzureKey, AzureKeyVault

__all__ = ["AzureKey", "AzureKeyVault"]
