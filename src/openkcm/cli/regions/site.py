# SPDX-License-Identifier: Apache-2.0
"""What the demo of regions runs: PostgreSQL, two regions of two Core replicas, four applications, a customer's HSM.

Invariant: everything is real and on loopback, in one folder that is taken away; whatever ends the demo ends them.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any, Final

from ...core import Core
from ...errors import CoreUnavailable
from ...pki import DevelopmentCA
from ...testing.guarded import free_port
from ...testing.postgres import PostgresServer
from ...testing.softhsm import SoftHSM, SoftHSMKey

REGIONS: Final = ("eu", "us")
TENANT: Final = "acme"
SERVICE: Final = "records"
PROBE_SECONDS: Final = 1.0
START_SECONDS: Final = 30.0
KEPT: Final = 400
"""Reports kept of each application."""


@dataclass(slots=True)
class Replica:
    """One process of ``openkcm serve core``."""

    name: str
    region: str
    port: int
    config: Path
    environment: dict[str, str]
    process: subprocess.Popen[bytes] | None = None

    @property
    def is_up(self) -> bool:
        """Whether the process is there."""
        return self.process is not None and self.process.poll() is None

    def start(self) -> None:
        """Start it and wait until it listens.

        Raises:
            CoreUnavailable: it ended before that; its log is beside its configuration.
        """
        with self.config.with_suffix(".log").open("ab") as log:
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
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=log,
                env=self.environment,
            )
        assert self.process.stdout is not None
        with self.process.stdout as ready:
            if not ready.readline():
                raise CoreUnavailable(f"the replica {self.name} did not start", retryable=False)

    def kill(self) -> None:
        """SIGKILL."""
        if self.process is not None:
            self.process.kill()
            self.process.wait(10)

    def stop(self) -> None:
        """SIGTERM, and SIGKILL where that is not enough."""
        if self.process is not None and self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(10)
            self.kill()


@dataclass(slots=True)
class Application:
    """One process of ``load``, and what it reported last."""

    name: str
    region: str
    process: subprocess.Popen[str]
    reports: deque[dict[str, Any]] = field(default_factory=lambda: deque(maxlen=KEPT))

    def listen(self) -> None:
        """Read its reports, in a thread."""
        threading.Thread(target=self._read, args=(self.process.stdout,), daemon=True).start()

    def _read(self, lines: IO[str]) -> None:
        with contextlib.suppress(ValueError, OSError):
            for line in lines:
                self.reports.append(json.loads(line))

    def stop(self) -> None:
        """End it."""
        if self.process.stdin is not None:
            self.process.stdin.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait(10)
        if self.process.stdout is not None:
            self.process.stdout.close()


class RegionsSite:
    """All of it; ``close`` ends it.

    Args:
        folder: where everything is written.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._open = contextlib.ExitStack()
        self.replicas: list[Replica] = []
        self.applications: list[Application] = []
        self.keys: dict[str, SoftHSMKey] = {}

    def start(self) -> None:
        """Start everything, in the order in which one needs the other."""
        self.database = self._open.enter_context(PostgresServer())
        hsm = self._open.enter_context(SoftHSM())
        self._ca = DevelopmentCA.create(self._folder / "pki")
        self._server = self._ca.issue_server("core", dns=["localhost"], ips=["127.0.0.1"])
        self._environment = {**os.environ, **hsm.settings()}
        for region in REGIONS:
            self.keys[region] = hsm.make_key(f"{TENANT}-{region}")
            self._make_vault(region)
            self.replicas += [self._replica(region, number) for number in (1, 2)]
        for replica in self.replicas:
            replica.start()
        for region in REGIONS:
            self.applications += [self._application(region, number) for number in (1, 2)]
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end and not all(
            any(report["state"] == "ok" for report in each.reports) for each in self.applications
        ):
            time.sleep(0.05)

    def close(self) -> None:
        """End everything. Idempotent."""
        for application in self.applications:
            application.stop()
        for replica in self.replicas:
            replica.stop()
        self.applications, self.replicas = [], []
        self._open.close()

    def store(self, region: str) -> str:
        """The URL of a region's database."""
        return self.database.url(f"core_{region}")

    def seal(self, region: str) -> Path:
        """A region's seal file."""
        return self._folder / f"{region}.seal"

    def core(self, region: str) -> Core:
        """A Core in this process, as an operator's command has it."""
        return Core.open(self.store(region), seal=self.seal(region), region=region)

    def _make_vault(self, region: str) -> None:
        with Core.open(self.store(region), seal=self.seal(region), region=region, create=True) as core:
            core.link_tenant(TENANT, self.keys[region].uri)
            core.create_service(TENANT, SERVICE)
            for number in (1, 2):
                identity = f"spiffe://demo/{region}/application-{number}"
                core.grant(identity, TENANT, SERVICE, ("wrap", "unwrap", "shred"))

    def _replica(self, region: str, number: int) -> Replica:
        name, port = f"core-{region}-{number}", free_port()
        config = self._folder / f"{name}.toml"
        values = {
            "store": self.store(region),
            "seal": str(self.seal(region)),
            "region": region,
            "probe_interval": PROBE_SECONDS,
            "tls.certificate": str(self._server.certificate),
            "tls.key": str(self._server.key),
            "tls.clients": str(self._ca.certificate_path),
            "listen.data": f"127.0.0.1:{port}",
        }
        config.touch(mode=0o600)
        # JSON's texts and numbers are TOML's.
        config.write_text("".join(f"{key} = {json.dumps(value)}\n" for key, value in values.items()))
        return Replica(name, region, port, config, self._environment)

    def _application(self, region: str, number: int) -> Application:
        name = f"application-{region}-{number}"
        issued = self._ca.issue_client(name, spiffe=f"spiffe://demo/{region}/application-{number}")
        addresses = [f"127.0.0.1:{each.port}" for each in self.replicas if each.region == region]
        settings = {
            "name": name,
            # Each prefers another replica, and both know both.
            "addresses": addresses if number == 1 else addresses[::-1],
            "certificate": str(issued.certificate),
            "key": str(issued.key),
            "roots": str(self._ca.certificate_path),
            "keys": str(self._folder / f"{name}.keys.db"),
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "openkcm.cli.regions.load"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=(self._folder / f"{name}.log").open("wb"),
            env=self._environment,
            text=True,
        )
        assert process.stdin is not None
        process.stdin.write(json.dumps(settings) + "\n")
        process.stdin.flush()
        application = Application(name, region, process)
        application.listen()
        return application
