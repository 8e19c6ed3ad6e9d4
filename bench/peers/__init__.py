# SPDX-License-Identifier: Apache-2.0
"""The peers, a module each. They run in an environment of their own (``environment.py``), without OpenKCM."""
