# SPDX-License-Identifier: Apache-2.0
"""``python -m openkcm.cli`` is the same as ``openkcm``."""

from . import main

main()
