# SPDX-License-Identifier: Apache-2.0
"""A TCP proxy on loopback that can be told to delay, hold, cut and refuse.

Invariant: a lever has acted when its call returns, on connections that are open too. Whatever is held is held in
bounded memory and for a bounded time. What passes is not looked into, so TLS passes from end to end.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from collections.abc import Coroutine
from types import TracebackType
from typing import Any, Final, Self, TypeVar

from .base import MAX_HOLD_SECONDS

T = TypeVar("T")

MAX_CONNECTIONS: Final = 256
"""More are closed at once."""

CHUNK_BYTES: Final = 16 * 1024
CHUNKS_HELD: Final = 16
CONNECT_SECONDS: Final = 5.0
LEVER_SECONDS: Final = 10.0
# Linux: to close with a reset, as a machine that fails does.
_RESET: Final = b"\1\0\0\0\0\0\0\0"


class TcpProxy:
    """Forwards from a free port of 127.0.0.1 to ``target``; for any protocol over TCP."""

    def __init__(self, target: tuple[str, int]) -> None:
        self._target = target
        self._delay = 0.0
        self._accepted = 0
        self._tasks: set[asyncio.Task[None]] = set()
        self._sockets: set[socket.socket] = set()
        self._listener = _bound(0)
        self._server: asyncio.Server | None = None
        self._open = asyncio.Event()
        self._open.set()
        self.port = int(self._listener.getsockname()[1])
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="openkcm-tcp-proxy", daemon=True)
        self._thread.start()
        self._do(self._listen())

    @property
    def accepted(self) -> int:
        """How many connections were accepted so far."""
        return self._accepted

    # ---- levers --------------------------------------------------------------------------------------

    def delay(self, seconds: float) -> None:
        """Deliver everything towards the client that much later."""
        self._delay = seconds

    def black_hole(self) -> None:
        """Accept connections and bytes, and pass nothing on."""
        self._do(self._hold(True))

    def refuse(self) -> None:
        """Refuse connections, and reset those that are open; the port stays ours."""
        self._do(self._refuse())

    def cut(self) -> None:
        """Reset every open connection; new ones are served."""
        self._do(self._cut())

    def divert(self, target: tuple[str, int]) -> None:
        """Forward elsewhere from now on; open connections are reset."""
        self._target = target
        self._do(self._cut())

    def heal(self) -> None:
        """Forward again, at once; what was held passes."""
        self._delay = 0.0
        self._do(self._hold(False))
        if self._server is None:
            self._do(self._listen())

    def close(self) -> None:
        """Stop listening and reset what is open; idempotent."""
        if self._loop.is_closed():
            return
        self._do(self._end())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(LEVER_SECONDS)
        self._loop.close()
        self._listener.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # ---- on the loop ---------------------------------------------------------------------------------

    def _do(self, act: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(act, self._loop).result(LEVER_SECONDS)

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(
            self._serve, sock=self._listener, limit=CHUNK_BYTES, backlog=MAX_CONNECTIONS
        )

    async def _hold(self, hold: bool) -> None:
        if hold:
            self._open.clear()
        else:
            self._open.set()

    async def _refuse(self) -> None:
        if self._server is not None:
            server, self._server = self._server, None
            await self._accept_no_more()
            with contextlib.suppress(OSError):
                self._listener.shutdown(socket.SHUT_RDWR)  # also where a forked child holds it open
            server.close()
            self._listener = _bound(self.port)  # bound and not listening: refused, and taken by nobody else
        await self._cut()

    async def _accept_no_more(self) -> None:
        """Have what was accepted be in our hands: asyncio leaves it open where its server is closed in between."""
        self._loop.remove_reader(self._listener.fileno())
        for _ in range(5):  # its task, its transport, the transport's protocol, and our own task
            await asyncio.sleep(0)

    async def _cut(self) -> None:
        for open_socket in self._sockets:
            with contextlib.suppress(OSError):
                open_socket.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def _end(self) -> None:
        if self._server is not None:
            await self._accept_no_more()
            self._server.close()
        await self._cut()
        await asyncio.sleep(0)  # transports close their sockets in the loop's next round

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._accepted += 1
        task = asyncio.current_task()
        if task is None or len(self._tasks) >= MAX_CONNECTIONS:
            writer.transport.abort()
            return
        self._tasks.add(task)
        writers = [writer]
        try:
            await self._may_pass()
            async with asyncio.timeout(CONNECT_SECONDS):
                far_reader, far_writer = await asyncio.open_connection(*self._target, limit=CHUNK_BYTES)
            writers.append(far_writer)
            self._sockets.update(each.get_extra_info("socket") for each in writers)
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, far_writer, answers=False))
                group.create_task(self._pump(far_reader, writer, answers=True))
        except (OSError, TimeoutError, ExceptionGroup, asyncio.CancelledError):
            pass  # one of the two went away, or was cut off
        finally:
            self._tasks.discard(task)
            for each in writers:
                self._sockets.discard(each.get_extra_info("socket"))
                each.transport.abort()

    async def _may_pass(self) -> None:
        async with asyncio.timeout(MAX_HOLD_SECONDS):
            await self._open.wait()

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, *, answers: bool
    ) -> None:
        """Carry bytes one way until their end; a delay adds up to itself once, however many chunks there are."""
        held: asyncio.Queue[tuple[float, bytes]] = asyncio.Queue(CHUNKS_HELD)

        async def deliver() -> None:
            while True:
                due, chunk = await held.get()
                await asyncio.sleep(due - self._loop.time())
                await self._may_pass()
                if not chunk:
                    writer.write_eof()
                    return
                writer.write(chunk)
                await writer.drain()

        async with asyncio.TaskGroup() as group:
            group.create_task(deliver())
            chunk = b"?"
            while chunk:
                chunk = await reader.read(CHUNK_BYTES)
                await held.put((self._loop.time() + (self._delay if answers else 0.0), chunk))


def _bound(port: int) -> socket.socket:
    listener = socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listener.bind(("127.0.0.1", port))
    return listener
