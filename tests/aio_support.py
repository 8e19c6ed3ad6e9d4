# SPDX-License-Identifier: Apache-2.0
"""An event loop in a thread, and what is awaited there called as tests for threads call it."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Coroutine
from typing import Any, TypeVar

from openkcm import aio
from openkcm.rpc.client.remote import RemoteCore
from remote_support import SECONDS, FarCore

T = TypeVar("T")


class LoopThread:
    """An event loop of its own."""

    def __enter__(self) -> LoopThread:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="test-loop")
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.call(self.loop.shutdown_default_executor())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        left = asyncio.all_tasks(self.loop)
        self.loop.close()
        assert not left, "tasks were left behind"

    def is_here(self) -> bool:
        """Whether this is the loop's thread, where a test that was called back must not wait for it."""
        return threading.current_thread() is self._thread

    def call(self, work: Coroutine[Any, Any, T]) -> T:
        """What something that is awaited comes to."""
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(4 * SECONDS)


class Called:
    """A service handle whose methods are awaited in a loop, and called here; what is inside is that of its Gateway."""

    def __init__(self, thread: LoopThread, handle: aio.ServiceHandle, core: object) -> None:
        self._thread = thread
        self._awaited = handle
        self._core = core

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._awaited, name, None)
        if not inspect.iscoroutinefunction(found) or self._thread.is_here():
            return getattr(self._awaited._handle, name)
        return lambda *args, **options: self._thread.call(found(*args, **options))


class SeenBy(FarCore):
    """A server's Core as another Gateway has it; what this tells, a Gateway on an event loop has acted on as well."""

    def __init__(self, remote: RemoteCore, core: Any, seen_by: aio.RemoteCore) -> None:
        super().__init__(remote, core)
        self._seen_by = FarCore(seen_by._core, core)

    def _telling(self, act: Callable[..., Any]) -> Callable[..., Any]:
        return super()._telling(self._seen_by._telling(act))
