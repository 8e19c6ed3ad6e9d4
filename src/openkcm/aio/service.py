# SPDX-License-Identifier: Apache-2.0
"""A handle on one service, for an event loop.

Invariant: every method is that of ``openkcm.ServiceHandle`` by the same name, which says what it does and raises.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

from ..context import Buffer, Context, encode_context
from ..gateway import service as threaded
from ..gateway.batches import Errors
from ..gateway.streams import Reader, Writer
from .green import Blocked, Loop


class ServiceHandle:
    """One service of one tenant; made by ``Gateway.service``, for any number of tasks of one event loop."""

    def __init__(self, owner: object, loop: Loop, handle: threaded.ServiceHandle) -> None:
        self._owner = owner
        self._run = loop.run
        self._handle = handle

    @property
    def tenant(self) -> str:
        """The tenant's name."""
        return self._handle.tenant

    @property
    def name(self) -> str:
        """The service's name."""
        return self._handle.name

    @property
    def service_id(self) -> bytes:
        """The 12 random bytes that envelopes of this service carry."""
        return self._handle.service_id

    def __repr__(self) -> str:
        return f"<aio.{repr(self._handle)[1:]}"

    async def encrypt(self, data: Buffer, *, context: Context = None, subject: str | None = None) -> bytes:
        """As ``openkcm.ServiceHandle.encrypt``; does not give way to the loop where a data key waits ready."""
        handle = self._handle
        ready = handle._pool.ready
        if subject is None and handle._single_use and ready is not None and ready.good():
            try:
                return handle.encrypt(data, context=context)
            except Blocked:
                pass  # the data is large, or the key's time was up between the look and the use
        return await self._run(handle.encrypt, data, context=context, subject=subject)

    async def decrypt(self, blob: Buffer, *, context: Context = None) -> bytes:
        """As ``openkcm.ServiceHandle.decrypt``; does not give way to the loop where the data key is kept."""
        handle = self._handle
        leases = handle._leases
        if leases.kept:
            encoded = encode_context(context)
            try:
                record: bytes | None = handle._open_kept(
                    leases.kept, leases.stands, leases.clock, encoded, blob
                )
                if record is not None:
                    return record
            except Blocked:
                pass  # it is large
        return await self._run(handle.decrypt, blob, context=context)

    async def encrypt_into(
        self, data: Buffer, out: Any, *, context: Context = None, subject: str | None = None
    ) -> int:
        """As ``openkcm.ServiceHandle.encrypt_into``."""
        return await self._run(self._handle.encrypt_into, data, out, context=context, subject=subject)

    async def decrypt_into(self, blob: Buffer, out: Any, *, context: Context = None) -> int:
        """As ``openkcm.ServiceHandle.decrypt_into``."""
        return await self._run(self._handle.decrypt_into, blob, out, context=context)

    async def encrypt_many(
        self,
        records: Sequence[Buffer],
        *,
        context: Context = None,
        contexts: Sequence[Context] | None = None,
        subject: str | None = None,
        subjects: Sequence[str] | None = None,
        errors: Errors = "raise",
    ) -> list[Any]:
        """As ``openkcm.ServiceHandle.encrypt_many``."""
        return await self._run(
            self._handle.encrypt_many,
            records,
            context=context,
            contexts=contexts,
            subject=subject,
            subjects=subjects,
            errors=errors,
        )

    async def decrypt_many(
        self,
        blobs: Sequence[Buffer],
        *,
        context: Context = None,
        contexts: Sequence[Context] | None = None,
        errors: Errors = "raise",
    ) -> list[Any]:
        """As ``openkcm.ServiceHandle.decrypt_many``."""
        return await self._run(
            self._handle.decrypt_many, blobs, context=context, contexts=contexts, errors=errors
        )

    async def rewrap_many(self, blobs: Sequence[Buffer], *, errors: Errors = "raise") -> list[Any]:
        """As ``openkcm.ServiceHandle.rewrap_many``."""
        return await self._run(self._handle.rewrap_many, blobs, errors=errors)

    async def encrypt_column(
        self,
        column: Any,
        *,
        context: Context = None,
        contexts: Any = None,
        subject: str | None = None,
        subjects: Any = None,
        out: Any = None,
        threads: int = 1,
    ) -> Any:
        """As ``openkcm.ServiceHandle.encrypt_column``; ``threads`` are the loop's executor's."""
        return await self._run(
            self._handle.encrypt_column,
            column,
            context=context,
            contexts=contexts,
            subject=subject,
            subjects=subjects,
            out=out,
            threads=threads,
        )

    async def decrypt_column(
        self,
        column: Any,
        *,
        context: Context = None,
        contexts: Any = None,
        out: Any = None,
        threads: int = 1,
        errors: Literal["raise", "null"] = "raise",
        text: bool = False,
    ) -> Any:
        """As ``openkcm.ServiceHandle.decrypt_column``; ``threads`` are the loop's executor's."""
        return await self._run(
            self._handle.decrypt_column,
            column,
            context=context,
            contexts=contexts,
            out=out,
            threads=threads,
            errors=errors,
            text=text,
        )

    async def shred(self, subject: str) -> bool:
        """As ``openkcm.ServiceHandle.shred``."""
        return await self._run(self._handle.shred, subject)

    async def rewrap_subjects(self) -> int:
        """As ``openkcm.ServiceHandle.rewrap_subjects``."""
        return await self._run(self._handle.rewrap_subjects)

    async def encrypt_stream(
        self, source: Reader, target: Writer, *, context: Context = None, subject: str | None = None
    ) -> int:
        """As ``openkcm.ServiceHandle.encrypt_stream``; the files are read and written in the loop's executor."""
        return await self._run(self._handle.encrypt_stream, source, target, context=context, subject=subject)

    async def decrypt_stream(self, source: Reader, target: Writer, *, context: Context = None) -> int:
        """As ``openkcm.ServiceHandle.decrypt_stream``; the files are read and written in the loop's executor."""
        return await self._run(self._handle.decrypt_stream, source, target, context=context)
