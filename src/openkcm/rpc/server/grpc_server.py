# SPDX-License-Identifier: Apache-2.0
"""The gRPC server: turns a transport's calls into those of ``handlers`` and ``streams``.

Invariant: TLS 1.3 with a verified client certificate, or there is no connection; bounded messages, threads and calls; a
call that fails ends with a code, a Failure and nothing else.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, Protocol

from ...errors import AccessDenied, CoreUnavailable, OpenKCMError, StoreUnavailable
from .. import keys_pb2 as pb
from .. import tls13, wire
from ..peer import Peer, Peers
from ..tls13 import grpc
from .arrivals import Arrivals
from .certificates import Pem
from .handlers import KeyHandlers
from .streams import Streams, Subscriber

logger = logging.getLogger("openkcm.rpc")

THREADS: Final = 16
MOST_CALLS: Final = 256
"""Calls under way and waiting; more are turned away at once with RESOURCE_EXHAUSTED."""

OPTIONS: Final = (
    ("grpc.max_metadata_size", 16 * 1024),
    ("grpc.max_concurrent_streams", 256),
    ("grpc.so_reuseport", 0),
    ("grpc.server_handshake_timeout_ms", 5_000),
    ("grpc.http2.min_ping_interval_without_data_ms", 5_000),
    ("grpc.keepalive_permit_without_calls", 1),
)

_STATUS: Final[Mapping[str, grpc.StatusCode]] = {
    "invalid_input": grpc.StatusCode.INVALID_ARGUMENT,
    "format": grpc.StatusCode.INVALID_ARGUMENT,
    "decrypt": grpc.StatusCode.INVALID_ARGUMENT,
    "limit_exceeded": grpc.StatusCode.OUT_OF_RANGE,
    "key_not_found": grpc.StatusCode.NOT_FOUND,
    "tenant_not_found": grpc.StatusCode.NOT_FOUND,
    "service_not_found": grpc.StatusCode.NOT_FOUND,
    "already_exists": grpc.StatusCode.ALREADY_EXISTS,
    "key_disabled": grpc.StatusCode.FAILED_PRECONDITION,
    "tenant_dark": grpc.StatusCode.FAILED_PRECONDITION,
    "key_destroyed": grpc.StatusCode.FAILED_PRECONDITION,
    "access_denied": grpc.StatusCode.PERMISSION_DENIED,
    "channel_expired": grpc.StatusCode.UNAUTHENTICATED,
}


class Handlers(Protocol):
    """One gRPC service: its methods by name, and how a call is carried out."""

    @property
    def methods(self) -> Mapping[str, Any]:
        """What can be called."""

    def check_caller(self, peer: Peer) -> None:
        """Raise AccessDenied if the peer may not call anything here: before its message is waited for."""

    def call(self, name: str, peer: Peer, data: bytes) -> bytes:
        """A request's bytes in, a reply's bytes out."""

    def refused(self, error: Exception, name: str, peer: Peer | None) -> None:
        """Note a call that failed before ``call`` could be called."""


def status_of(error: BaseException) -> grpc.StatusCode:
    """The code of an error for those who know gRPC and not us."""
    if not isinstance(error, OpenKCMError):
        return grpc.StatusCode.INTERNAL
    if error.retryable and error.code not in _STATUS:
        return grpc.StatusCode.UNAVAILABLE
    return _STATUS.get(error.code, grpc.StatusCode.INTERNAL)


def abort(
    context: grpc.ServicerContext,
    error: BaseException,
    failure_of: Callable[[BaseException], pb.Failure] = wire.failure_of,
) -> None:
    """End a call with an error."""
    failure = failure_of(error)
    context.set_trailing_metadata(((wire.FAILURE_KEY, failure.SerializeToString()),))
    context.abort(status_of(error), failure.message)


class Identifier:
    """Tells who makes a call."""

    def __init__(self) -> None:
        self._peers = Peers()

    def __call__(self, context: grpc.ServicerContext) -> Peer:
        """The peer of a call, by the certificate that TLS has verified."""
        certificate = context.auth_context().get("x509_pem_cert")
        if not certificate:
            raise AccessDenied(wire.REFUSED)
        return self._peers.read(certificate[0], context.peer())


def unary_handlers(
    service: str,
    handlers: Handlers,
    who: Identifier,
    arrivals: Arrivals,
    *,
    failure_of: Callable[[BaseException], pb.Failure] = wire.failure_of,
    pools: Mapping[str, ThreadPoolExecutor] | None = None,
) -> grpc.GenericRpcHandler:
    """A gRPC service of unary calls, bytes to bytes.

    Args:
        service: its full name.
        handlers: carries the calls out.
        who: tells who calls.
        arrivals: waits for their messages.
        failure_of: what a caller is told of an error.
        pools: the threads of those methods that are not to wait for the others'.
    """

    def behaviour(name: str) -> Callable[[Iterator[bytes], grpc.ServicerContext], bytes]:
        def call(messages: Iterator[bytes], context: grpc.ServicerContext) -> bytes:
            peer = None
            try:
                peer = who(context)
                handlers.check_caller(peer)
                data = arrivals.take(messages, context)
            except Exception as error:
                handlers.refused(error, name, peer)
                failed = error
            else:
                try:
                    return handlers.call(name, peer, data)
                except Exception as error:
                    failed = error
            # Not in the handlers above: what gRPC prints of an abort would show the error that led to it.
            abort(context, failed, failure_of)
            raise AssertionError  # abort has raised

        if pools is not None and name in pools:
            call.experimental_non_blocking = False  # type: ignore[attr-defined]
            call.experimental_thread_pool = pools[name]  # type: ignore[attr-defined]
        return call

    # One message and one reply, as a unary call is on the wire; but we are called before the message is there.
    methods = {name: grpc.stream_unary_rpc_method_handler(behaviour(name)) for name in handlers.methods}
    return grpc.method_handlers_generic_handler(service, methods)


class WatchHandler(grpc.GenericRpcHandler):  # type: ignore[misc]  # gRPC has no types
    """The watch stream, on threads of its own: a thousand Gateways that listen must not keep one from asking."""

    def __init__(
        self,
        handlers: KeyHandlers,
        streams: Streams,
        who: Identifier,
        arrivals: Arrivals,
        threads: ThreadPoolExecutor,
    ) -> None:
        self._handlers = handlers
        self._streams = streams
        self._who = who
        self._arrivals = arrivals

        def watch(messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
            return self._watch(messages, context)

        watch.experimental_non_blocking = False  # type: ignore[attr-defined]
        watch.experimental_thread_pool = threads  # type: ignore[attr-defined]
        self._handler = grpc.stream_stream_rpc_method_handler(watch)

    def service(self, details: grpc.HandlerCallDetails) -> grpc.RpcMethodHandler | None:
        """The handler of a call, if it is this one."""
        return self._handler if details.method == f"/{wire.SERVICE_NAME}/Watch" else None

    def _watch(self, messages: Iterator[bytes], context: grpc.ServicerContext) -> Iterator[bytes]:
        peer = None
        try:
            peer = self._who(context)
            self._handlers.check_caller(peer)
            data = self._arrivals.take(messages, context)
            subscriber = self._streams.open(peer, wire.parse(pb.WatchRequest.FromString, data))
        except Exception as error:
            self._handlers.refused(error, "Watch", peer)
            failed = error
        else:
            yield from self._follow(peer, subscriber, context)
            return
        abort(context, failed)

    def _follow(self, peer: Peer, subscriber: Subscriber, context: grpc.ServicerContext) -> Iterator[bytes]:
        context.add_callback(subscriber.close)
        try:
            while (reply := subscriber.take()) is not None:
                self._handlers.check_peer(peer)
                yield reply.SerializeToString()
        except (AccessDenied, StoreUnavailable) as error:
            abort(context, error)
        finally:
            self._streams.drop(subscriber)


def make_server(
    handlers: Sequence[grpc.GenericRpcHandler],
    *,
    threads: int = THREADS,
    most_calls: int = MOST_CALLS,
    largest: tuple[int, int] = (wire.MAX_MESSAGE_BYTES, wire.MAX_MESSAGE_BYTES),
    interceptors: Sequence[grpc.ServerInterceptor] = (),
) -> grpc.Server:
    """A gRPC server with the bounds that all of ours have.

    Args:
        handlers: its services.
        threads: that carry calls out.
        most_calls: under way and waiting; more are turned away.
        largest: request and reply, in bytes.
        interceptors: see gRPC.
    """
    receive, send = largest
    return grpc.server(
        ThreadPoolExecutor(threads, thread_name_prefix="openkcm-call"),
        handlers=handlers,
        interceptors=interceptors,
        options=(
            *OPTIONS,
            ("grpc.max_receive_message_length", receive),
            ("grpc.max_send_message_length", send),
        ),
        maximum_concurrent_rpcs=most_calls,
    )


def server_credentials(fetch: Callable[[], Pem]) -> grpc.ServerCredentials:
    """Credentials that are asked for anew at each handshake, so that certificates can be replaced.

    Args:
        fetch: the private key, the certificate chain and the roots of clients, each in PEM; what cannot be used must
            not come from here.

    Raises:
        ConfigurationError: gRPC was loaded by others before, so that it cannot be kept to TLS 1.3.
    """
    tls13.check()
    last = fetch()

    def configuration(parts: Pem) -> Any:
        key, chain, roots = parts
        return grpc.ssl_server_certificate_configuration([(key, chain)], roots)

    def changed() -> Any:
        nonlocal last
        now = fetch()
        if now == last:
            return None
        last = now
        return configuration(now)

    return grpc.dynamic_ssl_server_credentials(configuration(last), changed, True)


def listen(server: grpc.Server, address: str, credentials: grpc.ServerCredentials) -> int:
    """Have a server listen; returns its port.

    Raises:
        CoreUnavailable: the address is taken, or not this machine's.
    """
    try:
        port = server.add_secure_port(address, credentials)
    except RuntimeError:
        port = 0
    if not port:
        raise CoreUnavailable(f"{address} cannot be listened on; is it in use?", retryable=False)
    return int(port)
