# SPDX-License-Identifier: Apache-2.0
"""A real OpenBao server to test against."""

from .transit import ACCOUNT, NAMESPACE, REPLIES, ROLE, OpenBao, OpenBaoKey

__all__ = ["ACCOUNT", "NAMESPACE", "REPLIES", "ROLE", "OpenBao", "OpenBaoKey"]
