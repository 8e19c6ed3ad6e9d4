# SPDX-License-Identifier: Apache-2.0
"""Roots of trust: one package a provider, behind ``base.Root``."""

from .base import ENTRY_POINTS, Grant, Grantable, Root, Switchable, open_root

__all__ = ["ENTRY_POINTS", "Grant", "Grantable", "Root", "Switchable", "open_root"]
