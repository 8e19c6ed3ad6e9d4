# SPDX-License-Identifier: Apache-2.0
"""What the transports cost by themselves: frames and gRPC, in one run, client and server in two processes.

Run ``python bench/transports.py [CALLS]``. The handlers do nothing, so that a call is its transport: mutual TLS 1.3
over loopback. The transports take turns in rounds, so that drift of the machine falls on both alike. A batch is what
unwraps 10,000 data keys: 720 KB there, 320 KB back.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any, Final

from environment import processor
from openkcm.pki import DevelopmentCA, Issued
from openkcm.rpc.frames import format as frames
from openkcm.rpc.frames.client import FrameTransport
from openkcm.rpc.frames.server import FrameServer
from openkcm.rpc.server.denials import Denials

HERE: Final = Path(__file__).resolve()
CALLS: Final = 4000
ROUNDS: Final = 8
BATCHES: Final = 12
"""Batches of each transport in a round."""
REQUEST: Final = bytes(720_000)
REPLY: Final = bytes(320_000)
TRANSPORTS: Final = ("frames", "gRPC")


class Idle:
    """Handlers that do nothing: an empty reply, or a batch's."""

    methods: Final = {"FindShredded": None, "UnwrapKeys": None}

    def check_peer(self, peer: Any) -> None:
        """Anyone."""

    def check_caller(self, peer: Any) -> None:
        """Anyone."""

    def refused(self, *_: Any) -> None:
        """Nobody is."""

    def drop(self, _: Any) -> None:
        """There are no streams."""

    def call(self, name: str, peer: Any, data: bytes) -> bytes:
        """The reply."""
        return REPLY if name == "UnwrapKeys" else b""


def pem(issued: Issued, ca: DevelopmentCA) -> frames.PEM:
    """Key, chain and roots."""
    return issued.key.read_bytes(), issued.certificate.read_bytes(), ca.certificate_path.read_bytes()


def serve(transport: str, folder: Path) -> None:
    """Serve until the standard input ends; says on which port."""
    ca = DevelopmentCA.open(folder)
    server = ca.find("core")
    idle: Any = Idle()
    if transport == "frames":
        framed = FrameServer(
            "127.0.0.1:0",
            lambda: pem(server, ca),
            idle,
            idle,
            Denials(lambda line: print(line, file=sys.stderr)),
        )
        framed.start()
        port = framed.port
    else:
        from openkcm.rpc import wire
        from openkcm.rpc.server import grpc_server
        from openkcm.rpc.server.arrivals import Arrivals

        who = grpc_server.Identifier()
        calls = grpc_server.unary_handlers(wire.SERVICE_NAME, idle, who, Arrivals())
        remote = grpc_server.make_server([calls])
        port = grpc_server.listen(
            remote, "127.0.0.1:0", grpc_server.server_credentials(lambda: pem(server, ca))
        )
        remote.start()
    print(port, flush=True)
    sys.stdin.read()


def connect(transport: str, port: int, credentials: frames.Fetch) -> Any:
    """A client."""
    if transport == "frames":
        return FrameTransport(f"127.0.0.1:{port}", credentials)
    from openkcm.rpc.client.grpc_client import GrpcTransport

    return GrpcTransport(f"127.0.0.1:{port}", credentials)


def time_calls(client: Any, method: str, request: bytes, count: int) -> list[float]:
    """Seconds of each call."""
    found = []
    for _ in range(count):
        start = time.perf_counter()
        client.call(method, request, 5.0)
        found.append(time.perf_counter() - start)
    return found


def calls_a_second(client: Any, threads: int, count: int) -> float:
    """Empty calls a second of several threads over one client."""
    workers = [
        threading.Thread(target=time_calls, args=(client, "FindShredded", b"", count // threads))
        for _ in range(threads)
    ]
    start = time.perf_counter()
    for each in workers:
        each.start()
    for each in workers:
        each.join()
    return count / (time.perf_counter() - start)


def cpu_seconds(pid: int) -> float:
    """What a process has used of the processor."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def report(name: str, calls: list[float], batches: list[float], rates: list[float], cpu: float) -> None:
    """One transport's line."""
    calls, batches = sorted(calls), sorted(batches)
    megabytes = (len(REQUEST) + len(REPLY)) / 1e6
    print(
        f"{name:7} empty call: p50 {calls[len(calls) // 2] * 1e6:5.0f} us,"
        f" p99 {calls[len(calls) * 99 // 100] * 1e6:5.0f} us, server {cpu / len(calls) * 1e6:4.0f} us a call"
        f" | 8 threads: {max(rates):7,.0f} calls/s"
        f" | 720 KB there, 320 KB back: p50 {batches[len(batches) // 2] * 1e3:5.2f} ms"
        f" = {megabytes / batches[len(batches) // 2]:5.0f} MB/s"
    )


def main() -> None:
    """Measure both."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else CALLS
    print(f"{processor()}; load {os.getloadavg()[0]:.1f}")
    with tempfile.TemporaryDirectory() as name:
        ca = DevelopmentCA.create(Path(name) / "pki")
        ca.issue_server("core", dns=["localhost"], ips=["127.0.0.1"])
        client = ca.issue_client("gateway")
        servers, clients = {}, {}
        for each in TRANSPORTS:
            servers[each] = subprocess.Popen(
                [sys.executable, str(HERE), "--serve", each, str(ca.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                text=True,
            )
            clients[each] = connect(each, int(servers[each].stdout.readline()), lambda: pem(client, ca))  # type: ignore[union-attr]
        found: dict[str, tuple[list[float], list[float], list[float], list[float]]]
        found = {each: ([], [], [], []) for each in TRANSPORTS}
        for remote in clients.values():
            time_calls(remote, "FindShredded", b"", 200)
            time_calls(remote, "UnwrapKeys", REQUEST, 3)
        for _ in range(ROUNDS):
            for each, remote in clients.items():
                calls, batches, rates, cpu = found[each]
                before = cpu_seconds(servers[each].pid)
                calls += time_calls(remote, "FindShredded", b"", count // ROUNDS)
                cpu.append(cpu_seconds(servers[each].pid) - before)
                batches += time_calls(remote, "UnwrapKeys", REQUEST, BATCHES)
                rates.append(calls_a_second(remote, 8, count // ROUNDS))
        for each in TRANSPORTS:
            calls, batches, rates, cpu = found[each]
            report(each, calls, batches, rates, sum(cpu))
        for each in TRANSPORTS:
            clients[each].close()
            servers[each].communicate("")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--serve"]:
        serve(sys.argv[2], Path(sys.argv[3]))
    else:
        main()
