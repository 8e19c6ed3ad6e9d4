# SPDX-License-Identifier: Apache-2.0
"""`openkcm serve core`: the Core as a service, until it is told to end.

Invariant: SIGTERM and SIGINT drain, a second one ends at once; SIGHUP is not needed, as certificates that change in
their files are taken up within seconds.
"""

from __future__ import annotations

import json
import logging
import os
import resource
import signal
import threading
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TextIO

import typer

from .commands import KEYS, command
from .output import settings

if TYPE_CHECKING:
    from ..rpc.server.config import ServeConfig
    from ..rpc.server.standard_error import StandardError


OWN_DESCRIPTORS: Final = 512
"""What a server has open beside its Gateways' connections: the store's, the roots', files."""


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, help="Run the Core as a service.")
    command(group, "core")(serve_core)
    app.add_typer(group, name="serve", rich_help_panel=KEYS)


class JsonLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """The record as JSON."""
        line: dict[str, Any] = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created))
            + f".{record.msecs:03.0f}Z",
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, "fields", {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_log(form: str, level: str, stream: TextIO) -> None:
    """Log to a stream, and warnings too."""
    logging.captureWarnings(True)
    handler = logging.StreamHandler(stream)
    if form == "json":
        handler.setFormatter(JsonLines())
    else:
        handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)-7s %(name)s: %(message)s"))
    root = logging.getLogger()
    root.handlers[:] = [handler]
    root.setLevel(level.upper())
    logging.getLogger("openkcm.liveness").setLevel(logging.NOTSET)


def serve_core(
    config: Annotated[
        Path, typer.Option("--config", "-c", metavar="FILE", help="The configuration, in TOML.")
    ],
    check: Annotated[bool, typer.Option("--check", metavar="", help="Only check the configuration.")] = False,
) -> None:
    """Serve a Core's keys to Gateways over mutual TLS.

    Prints a line with its addresses when it is ready, and ends in order on SIGTERM.
    """
    from ..rpc.server.config import read_config

    read = read_config(config)
    if check:
        print(f"{config} is in order")
        return
    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda number, _: _told_to_end(number, stop))
    from ..rpc.server.standard_error import StandardError

    said = StandardError()
    configure_log(read.log, read.level, said.stream)
    try:
        _serve(read, said, stop)
    finally:
        said.close()


def _told_to_end(number: int, stop: threading.Event) -> None:
    """The first signal drains; a second means now. Nothing is lost: what was acknowledged is durable."""
    if stop.is_set():
        os._exit(128 + number)
    stop.set()


def _take_descriptors(connections: int) -> None:
    """Raise our own limit on descriptors to what so many connections need, as far as the machine allows it.

    The soft limit is often 1024, for programs that use select(); without descriptors even the store cannot be asked.
    """
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    needed = connections + OWN_DESCRIPTORS
    allowed = needed if hard == resource.RLIM_INFINITY else min(needed, hard)
    if soft != resource.RLIM_INFINITY and soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < needed:
        logging.getLogger("openkcm.rpc").warning(
            "%d connections need %d descriptors and this process may have %d: lower limits.connections, or raise "
            "LimitNOFILE= in the systemd unit",
            connections,
            needed,
            allowed,
        )


def _serve(config: ServeConfig, said: StandardError, stop: threading.Event) -> None:
    from ..rpc.server.serving import CoreServer

    _take_descriptors(config.limits.connections)
    server = CoreServer(config)
    said.tell_handshakes(server.note_handshake)
    server.start()
    ready = {"region": server.core.region, "ports": server.ports}
    if settings.json:
        print(json.dumps({"ready": ready}), flush=True)
    else:
        ports = ", ".join(f"{name} on port {port}" for name, port in server.ports.items())
        print(f"Serving region {server.core.region}: {ports}", flush=True)
    stop.wait()
    logging.getLogger("openkcm.rpc").info("draining")
    server.stop()
