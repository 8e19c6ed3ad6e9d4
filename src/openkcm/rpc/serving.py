# SPDX-License-Identifier: Apache-2.0
"""A Core that serves: opens the vault, listens, and ends in order.

Invariant: it listens only when everything behind it is open, says that it is healthy only while it listens, and when it
is told to end it takes no new call, lets those under way finish, and zeroes every key last.
"""

from __future__ import annotations

import logging
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from ..core import Core
from . import wire
from .config import ServeConfig
from .denials import Denials
from .frame_server import Bounds, FrameServer
from .handlers import KeyHandlers
from .session import Credentials, SessionTable
from .streams import Streams

logger = logging.getLogger("openkcm.rpc")


class CoreServer:
    """One replica of a Core's service.

    Args:
        config: what ``config.read_config`` gives.

    Raises:
        SealError, StoreUnavailable, ConfigurationError: the vault cannot be opened, or a file cannot be used.
        CoreUnavailable: an address cannot be listened on.
    """

    def __init__(self, config: ServeConfig) -> None:
        self.config = config
        tls = config.tls
        self._credentials = Credentials.load(tls.certificate, tls.key, tls.clients)
        self.core = Core.open(
            config.store,
            seal=config.seal,
            region=config.region,
            poll_interval=config.poll_interval,
            probe_interval=config.probe_interval,
            grace=config.grace,
        )
        self.denials = Denials(lambda line: self.core.note("refused", line))
        self.streams = Streams(self.core, config.limits.streams)
        self.handlers = KeyHandlers(self.core, self._credentials, SessionTable(), self.denials)
        self._watchers = ThreadPoolExecutor(config.limits.streams, thread_name_prefix="openkcm-stream")
        self._frames: FrameServer | None = None
        self._servers: list[Any] = []
        self._health: list[Any] = []
        self.ports: dict[str, int] = {}
        self._stopping = threading.Lock()
        self._stopped = False

    def start(self) -> None:
        """Listen on every address of the configuration."""
        try:
            if self.config.listen.data:
                self.ports["data"] = self._start_frames(self.config.listen.data)
            if self.config.listen.grpc:
                self.ports["grpc"] = self._start_grpc(self.config.listen.grpc)
        except BaseException:
            self.stop(0)
            raise

    def stop(self, drain: float | None = None) -> None:
        """End: no new calls; those under way have ``drain`` seconds; then everything is closed. Idempotent."""
        with self._stopping:
            if self._stopped:
                return
            self._stopped = True
            seconds = self.config.drain if drain is None else drain
            for health in self._health:
                health.enter_graceful_shutdown()
            self.streams.close()
            if self._frames is not None:
                self._frames.stop(seconds)
            for ended in [server.stop(seconds) for server in self._servers]:
                ended.wait(seconds + 5)
            self._watchers.shutdown(wait=False, cancel_futures=True)
            self.denials.close()
            self.handlers.close()
            self.core.close()

    def _start_frames(self, address: str) -> int:
        limits = self.config.limits
        bounds = Bounds(connections=limits.connections, threads=limits.threads, waiting=limits.calls)
        self._frames = FrameServer(
            address, self.config.tls.pem, self.handlers, self.streams, self.denials, bounds
        )
        self._frames.start()
        return self._frames.port

    def _start_grpc(self, address: str) -> int:
        from grpc_health.v1 import health, health_pb2, health_pb2_grpc
        from grpc_reflection.v1alpha import reflection

        from . import grpc_server

        who = grpc_server.Identifier()
        server = grpc_server.make_server(
            [
                grpc_server.unary_handlers(wire.SERVICE_NAME, self.handlers, who),
                grpc_server.WatchHandler(self.handlers, self.streams, who, self._watchers),
            ],
            threads=self.config.limits.threads,
            most_calls=self.config.limits.calls + self.config.limits.streams,
        )
        servicer = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        reflection.enable_server_reflection(
            (wire.SERVICE_NAME, health.SERVICE_NAME, reflection.SERVICE_NAME), server
        )
        credentials = grpc_server.server_credentials(self.config.tls.pem)
        port = grpc_server.listen(server, address, credentials)
        server.start()
        servicer.set(wire.SERVICE_NAME, health_pb2.HealthCheckResponse.SERVING)
        self._servers.append(server)
        self._health.append(servicer)
        return port
