# SPDX-License-Identifier: Apache-2.0
"""Health and reflection, which whoever has a certificate may ask, grants or not.

Invariant: however many such streams are opened and kept open, they take neither threads nor places from the calls that
the server is there for: they have a few of their own, and what is more is turned away.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from ..tls13 import grpc

MOST_STREAMS: Final = 16
THREADS: Final = 2

_OURS: Final = "/openkcm."


class Bystanders(grpc.ServerInterceptor):  # type: ignore[misc]
    """Bounds the streams of every service that is not ours; one a server."""

    def __init__(self) -> None:
        self._places = threading.Semaphore(MOST_STREAMS)
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="openkcm-bystander")

    def intercept_service(self, continuation: Any, handler_call_details: grpc.HandlerCallDetails) -> Any:
        """As gRPC has it."""
        handler = continuation(handler_call_details)
        if handler is None or handler_call_details.method.startswith(_OURS) or not handler.response_streaming:
            return handler
        # Here, before it waits for a thread or for a message that may never come.
        if not self._places.acquire(blocking=False):
            return grpc.stream_stream_rpc_method_handler(_turn_away)
        make = (
            grpc.stream_stream_rpc_method_handler
            if handler.request_streaming
            else grpc.unary_stream_rpc_method_handler
        )
        behaviour = handler.stream_stream if handler.request_streaming else handler.unary_stream
        return make(self._bounded(behaviour), handler.request_deserializer, handler.response_serializer)

    def close(self) -> None:
        """Let the threads go."""
        self._threads.shutdown(wait=False, cancel_futures=True)

    def _bounded(self, behaviour: Callable[..., Any]) -> Callable[..., Any]:
        def bounded(request: Any, context: grpc.ServicerContext, *more: Any) -> Any:
            if not context.add_callback(self._places.release):
                self._places.release()  # it has ended already
            return behaviour(request, context, *more)

        # How gRPC is to call it, which it reads from the function.
        bounded.experimental_non_blocking = getattr(behaviour, "experimental_non_blocking", False)  # type: ignore[attr-defined]
        bounded.experimental_thread_pool = self._threads  # type: ignore[attr-defined]
        return bounded


def _turn_away(requests: Any, context: grpc.ServicerContext) -> Any:
    context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, "too many streams; try again")
