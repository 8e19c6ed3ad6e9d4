# SPDX-License-Identifier: Apache-2.0
"""Customers' roots to test against: providers on loopback whose keys can be disabled, denied, deleted and cut off.

Each speaks its provider's wire protocol to the provider's own SDK, unmodified. None is for production: the keys are
in this process's memory, and whoever can reach the port can use them.
"""

from .base import FakeKey, FakeProvider, KeyCondition

__all__ = ["FakeKey", "FakeProvider", "KeyCondition"]
