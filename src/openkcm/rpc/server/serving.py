# SPDX-License-Identifier: Apache-2.0
"""A Core that serves: opens the vault, listens, and ends in order.

Invariant: it listens only when everything behind it is open, says that it is healthy only while it listens, and when it
is told to end it takes no new call, lets those under way finish, and zeroes every key last.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

from ...core import Core
from ...systemd import notify
from .. import admin_messages, wire
from ..frames.gate import Bounds
from ..frames.server import FrameServer
from ..session import SessionTable
from . import admin_handlers, grpc_server
from .arrivals import Arrivals
from .bystanders import MOST_STREAMS, Bystanders
from .certificates import Certificates
from .config import ServeConfig
from .denials import Denials
from .failures import Answers, Logged
from .handlers import KeyHandlers
from .streams import OPENINGS, Streams

logger = logging.getLogger("openkcm.rpc")

ADMIN_THREADS: Final = 4
ADMIN_CALLS: Final = 64
"""Administrative calls under way and waiting; most wait for a root or the store."""

LAST_WORDS_SECONDS: Final = 0.25
"""For answers on their way, when the last call was carried out."""

KILL_THREADS: Final = 8
"""A kill waits for no other call: only for kills of others who may."""


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
        self._stopping = threading.Lock()
        self._stopped = False
        self._frames: FrameServer | None = None
        self._servers: list[Any] = []
        self._health: list[Any] = []
        self._calls: list[Logged] = []
        self._bounds: list[Bystanders] = []
        self.ports: dict[str, int] = {}
        self.certificates = Certificates(config.tls)
        try:
            self.core = self._open_core()
        except BaseException:
            self.certificates.close()
            raise
        self.denials = Denials(lambda line: self.core.note("refused", line))
        self.streams = Streams(self.core, config.limits.streams, config.limits.peer_streams)
        self.handlers = KeyHandlers(self.core, self.certificates.credentials, SessionTable(), self.denials)
        self.certificates.listen(self._take_up)
        # A few more, so that a stream above the limit is told so.
        self._watchers = ThreadPoolExecutor(
            config.limits.streams + OPENINGS, thread_name_prefix="openkcm-stream"
        )
        self._arrivals = Arrivals()
        self._killers = ThreadPoolExecutor(KILL_THREADS, thread_name_prefix="openkcm-kill")

    def start(self) -> None:
        """Listen on every address of the configuration."""
        listen = self.config.listen
        try:
            if listen.data:
                self.ports["data"] = self._start_frames(listen.data)
            if listen.grpc:
                self.ports["grpc"] = self._start_grpc(listen.grpc)
            if listen.admin:
                self.ports["admin"] = self._start_admin(listen.admin)
        except BaseException:
            self.stop(0)
            raise
        notify("READY=1")

    def stop(self, drain: float | None = None) -> None:
        """End: no new calls; those under way have ``drain`` seconds; then everything is closed. Idempotent."""
        with self._stopping:
            if self._stopped:
                return
            self._stopped = True
            notify("STOPPING=1")
            seconds = self.config.drain if drain is None else drain
            for health in self._health:
                health.enter_graceful_shutdown()
            ends = [server.stop(seconds) for server in self._servers]
            frames = threading.Thread(target=self._stop_frames, args=(seconds,), name="openkcm-drain")
            frames.start()
            self.streams.close()  # only now: who is told to look elsewhere must not come back here
            self._await_calls(seconds)
            # What is left are streams of others, as of health checks, which end only when they are ended.
            for server in self._servers:
                server.stop(min(seconds, LAST_WORDS_SECONDS))
            for ended in ends:
                ended.wait(seconds + 5)
            frames.join(seconds + 5)
            for threads in (self._watchers, self._killers):
                threads.shutdown(wait=False, cancel_futures=True)
            for bounds in self._bounds:
                bounds.close()
            self._arrivals.close()
            self.denials.close()
            self.certificates.close()
            self.handlers.close()
            self.core.close()

    def note_handshake(self, reason: str) -> None:
        """Have a handshake that failed recorded among the refusals."""
        self.denials.note("", f"TLS handshake ({reason})")

    # ---- inside --------------------------------------------------------------------------------------

    def _open_core(self) -> Core:
        config = self.config
        return Core.open(
            config.store,
            seal=config.seal,
            region=config.region,
            poll_interval=config.poll_interval,
            probe_interval=config.probe_interval,
            grace=config.grace,
            store_grace=config.store_grace,
            create=False,  # a mistyped store must not quietly become a new vault
        )

    def _take_up(self, credentials: Any) -> None:
        self.handlers.credentials = credentials

    def _await_calls(self, seconds: float) -> None:
        """Wait until no call has been under way for a moment."""
        until, quiet = time.monotonic() + seconds, 0
        while time.monotonic() < until and quiet < 3:
            quiet = 0 if any(each.under_way for each in self._calls) else quiet + 1
            time.sleep(0.02)

    def _bystanders(self) -> Bystanders:
        made = Bystanders()
        self._bounds.append(made)
        return made

    def _logged(self, handlers: Answers) -> Logged:
        logged = Logged(handlers)
        self._calls.append(logged)
        return logged

    def _stop_frames(self, seconds: float) -> None:
        if self._frames is not None:
            self._frames.stop(seconds)

    def _start_frames(self, address: str) -> int:
        limits = self.config.limits
        bounds = Bounds(
            connections=limits.connections,
            peer_connections=limits.peer_connections,
            threads=limits.threads,
            waiting=limits.calls,
        )
        self._frames = FrameServer(
            address, self.certificates.pem, self._logged(self.handlers), self.streams, self.denials, bounds
        )
        self._frames.start()
        return self._frames.port

    def _start_grpc(self, address: str) -> int:
        limits, who = self.config.limits, grpc_server.Identifier()
        server = grpc_server.make_server(
            [
                grpc_server.unary_handlers(
                    wire.SERVICE_NAME, self._logged(self.handlers), who, self._arrivals
                ),
                grpc_server.WatchHandler(self.handlers, self.streams, who, self._arrivals, self._watchers),
            ],
            threads=limits.threads,
            most_calls=limits.calls + limits.streams,
            interceptors=(self._bystanders(),),
        )
        return self._serve(server, address, (wire.SERVICE_NAME,))

    def _start_admin(self, address: str) -> int:
        handlers = admin_handlers.AdminHandlers(self.core, self.denials, self.config.roots)
        server = grpc_server.make_server(
            [
                grpc_server.unary_handlers(
                    admin_handlers.SERVICE_NAME,
                    self._logged(handlers),
                    grpc_server.Identifier(),
                    self._arrivals,
                    failure_of=admin_messages.failure_of,
                    pools={"KillTenant": self._killers},
                )
            ],
            threads=ADMIN_THREADS,
            most_calls=ADMIN_CALLS + MOST_STREAMS,
            interceptors=(self._bystanders(),),
            largest=(admin_handlers.MAX_REQUEST_BYTES, admin_handlers.MAX_REPLY_BYTES),
        )
        return self._serve(server, address, (admin_handlers.SERVICE_NAME,))

    def _serve(self, server: Any, address: str, services: Sequence[str]) -> int:
        """Add what every port has, listen, and only then call it healthy."""
        from grpc_health.v1 import health, health_pb2, health_pb2_grpc
        from grpc_reflection.v1alpha import reflection

        servicer = health.HealthServicer()
        health_pb2_grpc.add_HealthServicer_to_server(servicer, server)
        names = (*services, health.SERVICE_NAME, reflection.SERVICE_NAME)
        reflection.enable_server_reflection(names, server)
        credentials = grpc_server.server_credentials(self.certificates.pem)
        port = grpc_server.listen(server, address, credentials)
        server.start()
        for name in services:
            servicer.set(name, health_pb2.HealthCheckResponse.SERVING)
        self._servers.append(server)
        self._health.append(servicer)
        return port
