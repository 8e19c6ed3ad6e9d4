# SPDX-License-Identifier: Apache-2.0
"""AWS KMS and AWS STS to test against, over their wire protocols."""

from .key import AWSKey
from .kms import ACCOUNT, AWSKMS, REGION

__all__ = ["ACCOUNT", "AWSKMS", "REGION", "AWSKey"]
