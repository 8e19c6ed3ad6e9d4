# SPDX-License-Identifier: Apache-2.0
"""OpenKCM: customer-held keys at the speed of local encryption."""

__version__ = "0.1.0"
