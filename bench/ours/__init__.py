# SPDX-License-Identifier: Apache-2.0
"""OpenKCM's own ways, a module each, through Gateway and an embedded Core."""
