# SPDX-License-Identifier: Apache-2.0
"""``connect`` and ``Gateway`` for an event loop.

Invariant: nothing here waits before it is awaited; each object belongs to the event loop that it is first used in.
"""

from __future__ import annotations

import os
from collections.abc import Generator, Sequence
from functools import partial
from types import TracebackType
from typing import Any

from ..errors import CoreUnavailable, InvalidInput
from ..gateway import gateway as threaded
from ..gateway.keystore import KeyStore
from ..gateway.policy import DataKeyPolicy, PoolPolicy
from ..keys import KeyService
from ..rpc.client.connect import GRPC, TLS, make_core
from .green import Loop
from .service import ServiceHandle
from .waiting import Green


def connect(addresses: str | Sequence[str], *, tls: TLS, deadline: float = 5.0) -> RemoteCore:
    """As ``openkcm.connect``, for an event loop: ``async with connect(...) as core``, or ``core = await connect(...)``.

    Raises:
        InvalidInput: an address is none, or a gRPC one: frames are what an event loop can wait for.
        ConfigurationError: a certificate or a key cannot be used.
    """
    wanted = [addresses] if isinstance(addresses, str) else list(addresses)
    if any(each.startswith(GRPC) for each in wanted):
        raise InvalidInput(f"openkcm.aio reaches a Core in frames only; give its data port, without {GRPC}")
    return RemoteCore(wanted, tls, deadline)


class RemoteCore:
    """A Core somewhere else, for one event loop; made by ``connect``."""

    def __init__(self, addresses: Sequence[str], tls: TLS, deadline: float) -> None:
        self._waiting = Green(Loop())
        self._core = make_core(addresses, tls, deadline, self._waiting)

    async def close(self) -> None:
        """Close every connection, and end what runs in the background. Idempotent."""
        loop = self._waiting.loop
        await loop.run(self._core.close)
        await loop.settle()

    def __await__(self) -> Generator[Any, None, RemoteCore]:
        return self.__aenter__().__await__()

    async def __aenter__(self) -> RemoteCore:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<aio.{repr(self._core)[1:]}"


class _Near:
    """A Core in this process, whose Gateway waits as an event loop does."""

    def __init__(self, core: KeyService, waiting: Green) -> None:
        self._core = core
        self.waiting = waiting

    def __getattr__(self, name: str) -> Any:
        return getattr(self._core, name)


class Gateway:
    """As ``openkcm.Gateway``, for one event loop; ``async with Gateway(core) as gateway``.

    Args:
        core: ``aio.connect``'s, or a Core in this process (``openkcm.Core``): that one is called as it is, which takes
            microseconds for keys that are loaded, and as long as its database or root takes where one has to be asked.
        keys: as ``openkcm.Gateway``; opened at the first use.
        policy: as ``openkcm.Gateway``.
        pool: as ``openkcm.Gateway``.

    Raises:
        InvalidInput: the Core is ``openkcm.connect``'s, whose calls would hold up the loop.
    """

    def __init__(
        self,
        core: RemoteCore | KeyService,
        *,
        keys: str | os.PathLike[str] | KeyStore | None = None,
        policy: DataKeyPolicy | None = None,
        pool: PoolPolicy | None = None,
    ) -> None:
        if isinstance(core, RemoteCore):
            self._waiting = core._waiting
            inner: Any = core._core
        elif core.far:
            raise InvalidInput("a Gateway for asyncio reaches a Core by aio.connect(...)")
        else:
            self._waiting = Green(Loop())
            inner = _Near(core, self._waiting)
        self._core = core  # hears of kills for as long as there is a Gateway
        self._make = partial(threaded.Gateway, inner, keys=keys, policy=policy, pool=pool)
        self._slow = keys is not None or not inner.far
        self._opening = self._waiting.lock()
        self._gateway: threaded.Gateway | None = None
        self._closed = False

    async def service(self, tenant: str, name: str) -> ServiceHandle:
        """As ``openkcm.Gateway.service``.

        Raises:
            ConfigurationError, StoreUnavailable: the key store cannot be opened.
        """
        loop = self._waiting.loop
        return ServiceHandle(self, loop, await loop.run(self._find, tenant, name))

    def _find(self, tenant: str, name: str) -> threaded.ServiceHandle:
        return self._open().service(tenant, name)

    def _open(self) -> threaded.Gateway:
        with self._opening:
            if self._closed:
                raise CoreUnavailable("this Gateway was closed", retryable=False)
            gateway = self._gateway
            if gateway is None:
                gateway = self._waiting.loop.apart(self._make) if self._slow else self._make()
                self._gateway = gateway
            return gateway

    async def close(self) -> None:
        """Wipe every key held and close the key store. Idempotent; the Core stays open."""
        await self._waiting.loop.run(self._close)

    def _close(self) -> None:
        with self._opening:
            self._closed = True
            if self._gateway is not None:
                self._gateway.close()

    async def __aenter__(self) -> Gateway:
        await self._waiting.loop.run(self._open)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    def __repr__(self) -> str:
        return f"<aio.{repr(self._gateway)[1:]}" if self._gateway else "<aio.Gateway unused>"
