# SPDX-License-Identifier: Apache-2.0
"""A pyperf runner whose workers use the backend that OPENKCM_BACKEND picks, and whose results name it."""

from __future__ import annotations

from typing import Any

import pyperf

import openkcm


def make_runner(script: str, **settings: Any) -> pyperf.Runner:
    """A runner for a script; pyperf starts its workers with an almost empty environment otherwise."""
    runner = pyperf.Runner(program_args=(script,), **settings)
    arguments = runner.parse_args()
    arguments.inherit_environ = [*(arguments.inherit_environ or ()), "OPENKCM_BACKEND", "PYTHONPATH"]
    info = openkcm.backend_info()
    runner.metadata["openkcm_backend"] = info["backend"]
    runner.metadata["openssl"] = info["openssl"]
    return runner
