# SPDX-License-Identifier: Apache-2.0
"""The demo of regions: real servers, real processes, and a screen that shows what they do.

Invariant: every figure and state on the screen was measured or asked for in this run; nothing is left running.
"""
