# SPDX-License-Identifier: Apache-2.0
"""The golden vault, open for as long as the process lives, for the targets that need real keys.

Its keys are fixed, so that a seed stays a valid envelope from one run to the next.
"""

from __future__ import annotations

import atexit
import functools
import tempfile
from contextlib import ExitStack
from pathlib import Path

import openkcm
from golden import CASES, open_golden, read_case
from openkcm.gateway import ServiceHandle

VERSION = "v1"


@functools.cache
def opened() -> tuple[openkcm.Core, openkcm.Gateway]:
    """The vault's Core and Gateway."""
    stack = ExitStack()
    atexit.register(stack.close)
    folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="openkcm-fuzz-"))
    return stack.enter_context(open_golden(VERSION, Path(folder)))


@functools.cache
def handle() -> ServiceHandle:
    """The service that the golden envelopes belong to."""
    return opened()[1].service("acme", "payments")


@functools.cache
def originals(*, stream: bool) -> dict[bytes, dict[str, str]]:
    """Each golden envelope, and what is expected of it."""
    return {read_case(version, name): case for version, name, case in CASES if case["stream"] is stream}
