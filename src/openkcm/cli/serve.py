# SPDX-License-Identifier: Apache-2.0
"""`openkcm serve core`: the Core as a service, until it is told to end.

Invariant: SIGTERM and SIGINT drain; SIGHUP is not needed, as certificates are read anew for each connection.
"""

from __future__ import annotations

import json
import logging
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Annotated, Any

import typer

from .commands import KEYS, command
from .output import settings


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
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line)


def configure_log(form: str, level: str) -> None:
    """Log to stderr."""
    handler = logging.StreamHandler(sys.stderr)
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
    from ..rpc.config import read_config

    read = read_config(config)
    if check:
        print(f"{config} is in order")
        return
    configure_log(read.log, read.level)
    from ..rpc.serving import CoreServer

    stop = threading.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: stop.set())
    server = CoreServer(read)
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
