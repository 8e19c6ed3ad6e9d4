# SPDX-License-Identifier: Apache-2.0
"""``aws-kms:`` roots: a key in AWS KMS. ``root`` has what it promises."""

from .answers import ANSWERS
from .root import AWSRoot, open_aws

__all__ = ["ANSWERS", "AWSRoot", "open_aws"]
