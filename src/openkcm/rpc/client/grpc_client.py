# SPDX-License-Identifier: Apache-2.0
"""A Core's data interface over gRPC.

Invariant: that of ``transport``; TLS 1.3 with both certificates verified, or there is no connection. A channel does not
survive a fork: the child makes its own.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Final

from ...errors import CoreUnavailable, InternalError, OpenKCMError
from .. import keys_pb2 as pb
from .. import tls13, wire
from ..tls13 import grpc
from ..transport import Stream

OPTIONS: Final = (
    ("grpc.max_send_message_length", wire.MAX_MESSAGE_BYTES),
    ("grpc.keepalive_time_ms", 10_000),
    ("grpc.keepalive_timeout_ms", 2_000),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 1_000),
    ("grpc.max_reconnect_backoff_ms", 1_000),
    ("grpc.enable_retries", 0),
    ("grpc.use_local_subchannel_pool", 1),
)

_RETRYABLE: Final = {
    grpc.StatusCode.UNAVAILABLE: "the Core at {} does not answer",
    grpc.StatusCode.DEADLINE_EXCEEDED: "the Core at {} did not answer in time",
    grpc.StatusCode.RESOURCE_EXHAUSTED: "the Core at {} has more calls than it takes; try again",
    grpc.StatusCode.CANCELLED: "the connection to the Core at {} was closed",
}


class GrpcTransport:
    """One address of a Core, over gRPC.

    Args:
        address: ``HOST:PORT``.
        credentials: private key, certificate chain and roots, each in PEM; asked for when the connection is made.
        server_name: what the server's certificate must be for, if not the host.
        service: the gRPC service that is called.
        most: the largest reply, in bytes.

    Raises:
        ConfigurationError: gRPC was loaded by others before, so that it cannot be kept to TLS 1.3.
    """

    def __init__(
        self,
        address: str,
        credentials: Callable[[], tuple[bytes, bytes, bytes]],
        server_name: str | None = None,
        *,
        service: str = wire.SERVICE_NAME,
        most: int = wire.MAX_MESSAGE_BYTES,
    ) -> None:
        tls13.check()
        self.address = address
        self._service = service
        key, chain, roots = credentials()
        options: list[tuple[str, str | int]] = [*OPTIONS, ("grpc.max_receive_message_length", most)]
        if server_name is not None:
            options.append(("grpc.ssl_target_name_override", server_name))
        self._channel = grpc.secure_channel(
            address, grpc.ssl_channel_credentials(roots, key, chain), options=options
        )
        self._calls: dict[str, grpc.UnaryUnaryMultiCallable] = {}
        self._under_way: set[object] = set()
        self._retired = False

    def call(self, method: str, request: bytes, seconds: float) -> bytes:
        """As ``Transport.call``."""
        call = self._calls.get(method)
        if call is None:
            call = self._calls[method] = self._channel.unary_unary(f"/{self._service}/{method}")
        here = object()
        self._under_way.add(here)
        try:
            answer: bytes = call(request, timeout=seconds)
            return answer
        except grpc.RpcError as error:
            raise self._translated(error) from None
        except ValueError:
            # Of one that was retired, its successor may be asked.
            raise CoreUnavailable("the connection to the Core was closed", retryable=self._retired) from None
        finally:
            self._end(here)

    def stream(self, method: str, request: bytes) -> Stream:
        """As ``Transport.stream``."""
        try:
            call = self._channel.unary_stream(f"/{self._service}/{method}")(request)
        except ValueError:
            raise CoreUnavailable("the connection to the Core was closed", retryable=self._retired) from None
        except RuntimeError:
            raise CoreUnavailable("no thread can be started to listen to the Core") from None
        stream = GrpcStream(call, self._translated, self._end)
        self._under_way.add(stream)
        return stream

    def retire(self) -> None:
        """As ``Transport.retire``: gRPC ends what is under way when its channel is closed."""
        self._retired = True
        self._close_unused()

    def close(self) -> None:
        """As ``Transport.close``."""
        self._channel.close()

    def _end(self, what: object) -> None:
        """A call or a stream is over; it may be said twice."""
        self._under_way.discard(what)
        if self._retired:
            self._close_unused()

    def _close_unused(self) -> None:
        if not self._under_way:
            self._channel.close()

    def _translated(self, error: grpc.RpcError) -> OpenKCMError:
        call: grpc.Call = error  # what gRPC raises is both
        for key, value in call.trailing_metadata() or ():
            if key == wire.FAILURE_KEY:
                return wire.error_of(wire.parse(pb.Failure.FromString, value))
        advice = _RETRYABLE.get(call.code())
        if advice is not None:
            return CoreUnavailable(advice.format(self.address))
        return InternalError(f"the Core at {self.address} answered with gRPC's {call.code().name}")


class GrpcStream:
    """As ``transport.Stream``."""

    def __init__(
        self,
        call: grpc.Call,
        translated: Callable[[grpc.RpcError], OpenKCMError],
        ended: Callable[[object], None],
    ) -> None:
        self._call = call
        self._translated = translated
        self._ended = ended

    def __iter__(self) -> GrpcStream:
        return self

    def __next__(self) -> bytes:
        try:
            reply: bytes = next(self._call)
            return reply
        except BaseException as error:
            self._ended(self)
            if isinstance(error, grpc.RpcError):
                raise self._translated(error) from None
            raise

    def cancel(self) -> None:
        """As ``Stream.cancel``."""
        self._call.cancel()
        self._ended(self)
