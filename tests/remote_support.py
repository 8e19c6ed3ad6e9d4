# SPDX-License-Identifier: Apache-2.0
"""A Core that is reached over the network, for tests that were written for one in this process."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import openkcm
from openkcm.keys import Event
from openkcm.rpc.client.remote import RemoteCore
from support import SECONDS as SECONDS
from support import until as until

ACROSS = frozenset(
    {
        *("find_service", "wrap_keys", "unwrap_keys", "lease", "in_touch", "rewrap_keys", "shred_keys"),
        *("shredded", "watch"),
    }
)
"""What a Gateway asks of a Core."""

TELLING = frozenset({"kill", "restore", "rotate_service", "rotate_tenant", "set_lease"})
"""What an operator does that Gateways are told of."""


class FarCore:
    """A server's Core: a Gateway's part of it over the network, all else directly.

    What Gateways are told of is done when they have acted on it.
    """

    def __init__(self, remote: RemoteCore, core: openkcm.Core) -> None:
        self.far = True
        self.remote = remote
        self.core = core

    def __getattr__(self, name: str) -> Any:
        if name in ACROSS:
            return getattr(self.remote, name)
        found = getattr(self.core, name)
        return self._telling(found) if name in TELLING else found

    def _telling(self, act: Callable[..., Any]) -> Callable[..., Any]:
        def do(*arguments: Any, **options: Any) -> Any:
            until(lambda: self.remote._watcher is None or self.remote._watcher.is_heard())
            told = threading.Event()

            def listen(event: Event) -> None:
                told.set()

            remove = self.remote.watch(listen)  # the last to be told
            try:
                result = act(*arguments, **options)
                assert self.remote._watcher is None or told.wait(SECONDS)
            finally:
                remove()
            return result

        return do
