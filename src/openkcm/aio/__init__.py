# SPDX-License-Identifier: Apache-2.0
"""OpenKCM for asyncio: the same Gateway, awaited.

::

    from openkcm import aio

    async with aio.connect("core.example:7443", tls=...) as core, aio.Gateway(core) as gateway:
        payments = await gateway.service("acme", "payments")
        blob = await payments.encrypt(b"4111 1111 1111 1111", context={"row": "7"})

Invariant: this is the Gateway of ``openkcm`` and no other; what it does, raises and promises is said there. A call
takes no thread, and one whose data key waits ready or is kept does not give way to the loop. docs/aio.md has what is
different.
"""

from __future__ import annotations

from .gateway import Gateway, RemoteCore, connect
from .service import ServiceHandle

__all__ = ["Gateway", "RemoteCore", "ServiceHandle", "connect"]
