# SPDX-License-Identifier: Apache-2.0
"""Google Cloud KMS and its login to test against, over their wire protocols."""

from .keys import GCPKey, VersionState
from .kms import GCPKMS, USE_TO_DECRYPT, USE_TO_ENCRYPT

__all__ = ["GCPKMS", "USE_TO_DECRYPT", "USE_TO_ENCRYPT", "GCPKey", "VersionState"]
