# SPDX-License-Identifier: Apache-2.0
"""A Core that serves, and Gateways that reach it: real certificates, a real server, in this process or in another."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import openkcm
from openkcm.pki import DevelopmentCA
from openkcm.rpc.server.config import read_config
from openkcm.rpc.server.serving import CoreServer
from support import environment, make_vault

REGION = "local"
GATEWAY = "spiffe://example/gateway/one"
CHIEF = "spiffe://example/operator/chief"
VERBS = ("wrap", "unwrap", "shred")


class Site:
    """A folder with a CA, a vault with one tenant and one service, and a configuration.

    The identity ``GATEWAY`` may do all with the data keys of ``acme``.
    """

    def __init__(self, folder: Path, *tenants: str, store: str | None = None) -> None:
        self.folder = folder
        self.ca = DevelopmentCA.create(folder / "pki")
        self.server = self.ca.issue_server("core", dns=["localhost"], ips=["127.0.0.1"])
        self.issue("gateway", GATEWAY)
        self.store = store or f"sqlite:///{folder / 'vault.db'}"
        if store is None:
            with make_vault(folder, *tenants) as core:
                core.grant(GATEWAY, "acme", "*", VERBS)

    def issue(self, name: str, spiffe: str | None = None, days: float = 30) -> openkcm.TLS:
        """A client's certificate."""
        self.ca.issue_client(name, spiffe=spiffe, days=days)
        return self.tls(name)

    def appoint(self, name: str = "chief", spiffe: str = CHIEF, tenant: str = "*") -> openkcm.TLS:
        """An operator of a tenant, or of all: a certificate, and the grant to administer."""
        with openkcm.Core.open(self.store) as core:
            core.grant(spiffe, tenant, "*", ["administer"])
        return self.issue(name, spiffe)

    def tls(self, name: str = "gateway") -> openkcm.TLS:
        """What a client of this name connects with."""
        found = self.ca.find(name)
        return openkcm.TLS(found.certificate, found.key, self.ca.certificate_path)

    def config(self, name: str = "core", **settings: object) -> Path:
        """Write a configuration: on free ports of loopback; ``settings`` are TOML values by dotted name."""
        values: dict[str, object] = {
            "store": self.store,
            "seal": str(self.folder / "vault.seal"),
            "region": REGION,
            "tls.certificate": str(self.server.certificate),
            "tls.key": str(self.server.key),
            "tls.clients": str(self.ca.certificate_path),
            "listen.data": "127.0.0.1:0",
            "listen.grpc": "127.0.0.1:0",
        } | settings
        path = self.folder / f"{name}.toml"
        path.touch(0o600)
        # JSON's texts and numbers are TOML's.
        path.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
        return path

    @contextlib.contextmanager
    def serve(self, **settings: object) -> Iterator[CoreServer]:
        """A server in this process."""
        server = CoreServer(read_config(self.config(**settings)))
        try:
            server.start()
            yield server
        finally:
            server.stop(1)

    def start(
        self, name: str = "core", environment: Mapping[str, str] | None = None, **settings: object
    ) -> Replica:
        """A server in a process of its own."""
        return Replica(self.config(name, **settings), environment)

    def connect(
        self, ports: Mapping[str, int] | Sequence[Mapping[str, int]], name: str = "gateway", **options: object
    ) -> openkcm.RemoteCore:
        """A client of servers by their ports."""
        every = [ports] if isinstance(ports, Mapping) else ports
        addresses = [f"127.0.0.1:{each['data']}" for each in every]
        return openkcm.connect(addresses, tls=self.tls(name), **options)  # type: ignore[arg-type]


class NotStarted(Exception):
    """A server ended before it listened; the text is what it said."""


class Replica:
    """``openkcm serve core`` as a process."""

    def __init__(self, config: Path, environment: Mapping[str, str] | None = None) -> None:
        self.config = config
        self._environment = dict(environment or {})
        self.log = config.with_suffix(".log")
        self.start()

    def start(self) -> None:
        """Start it, and wait until it listens."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "openkcm.cli",
                    "--json",
                    "serve",
                    "core",
                    "--config",
                    str(self.config),
                ],
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment(**self._environment),
            )
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        if not line:
            self.process.stdout.close()
            self.process.wait(10)
            raise NotStarted(self.log.read_text()[-4000:])
        self.ports: dict[str, int] = json.loads(line)["ready"]["ports"]

    @property
    def pid(self) -> int:
        """The process's id."""
        return self.process.pid

    def kill(self) -> None:
        """SIGKILL."""
        self.process.kill()
        self.process.wait(10)
        if self.process.stdout is not None:
            self.process.stdout.close()

    def stop(self, seconds: float = 30) -> int:
        """SIGTERM; returns the exit code."""
        if self.process.poll() is None:
            os.kill(self.process.pid, signal.SIGTERM)
        try:
            return self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.kill()
            raise
        finally:
            if self.process.stdout is not None:
                self.process.stdout.close()

    def __enter__(self) -> Replica:
        return self

    def __exit__(self, *error: object) -> None:
        self.stop()
