# SPDX-License-Identifier: Apache-2.0
"""``openkcm.connect``: from addresses and certificates to a Core that a Gateway can hold.

Invariant: there is no connection without both certificates; nothing is connected before it is used, so that a process
may connect first and fork later.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ...errors import InvalidInput
from ...waiting import THREADS, Waiting
from ..credentials import Reading, read_files
from ..frames.client import FrameTransport
from ..session import Credentials
from ..transport import Transport
from .own import OwnFiles
from .remote import RemoteCore

GRPC: Final = "grpc://"
"""What stands before an address that is to be reached over gRPC."""


@dataclass(frozen=True, slots=True)
class TLS:
    """Where a Gateway's, or a Core's, certificate lies.

    Args:
        certificate: its chain in PEM, its own first.
        key: its private key in PEM, in a file that only its owner can read.
        roots: the certificates, in PEM, of the authorities that the other end's must come from.
        server_name: what the Core's certificate must be for, where that is not the host of its address.
    """

    certificate: str | os.PathLike[str]
    key: str | os.PathLike[str]
    roots: str | os.PathLike[str]
    server_name: str | None = None

    def load(self) -> Credentials:
        """Read the files.

        Raises:
            ConfigurationError: one is missing, unsafe or not what it should be.
        """
        return Credentials.load(self.certificate, self.key, self.roots)

    def read(self) -> Reading:
        """As ``load``, with the PEM of the same reading."""
        return read_files(self.certificate, self.key, self.roots)

    def pem(self) -> tuple[bytes, bytes, bytes]:
        """Key, chain and roots as they stand in the files."""
        return (
            Path(self.key).read_bytes(),
            Path(self.certificate).read_bytes(),
            Path(self.roots).read_bytes(),
        )


def connect(addresses: str | Sequence[str], *, tls: TLS, deadline: float = 5.0) -> RemoteCore:
    """Make a Core's stand-in that reaches it over mutual TLS 1.3.

    Args:
        addresses: ``HOST:PORT`` of a Core, or of each of its replicas in the order of preference; over gRPC where
            ``grpc://`` stands before it, else in frames (docs/formats.md), which is several times quicker.
        tls: this Gateway's certificate and key, and whom to trust; files that are replaced are taken up within seconds.
        deadline: seconds for which an answer is waited for, all addresses taken together.

    Raises:
        InvalidInput: an address is none.
        ConfigurationError: a certificate or a key cannot be used.
    """
    return make_core(addresses, tls, deadline, THREADS)


def make_core(addresses: str | Sequence[str], tls: TLS, deadline: float, waiting: Waiting) -> RemoteCore:
    """As ``connect``, for callers who wait in some way."""
    if not isinstance(tls, TLS):
        raise InvalidInput("tls is an openkcm.TLS(certificate=..., key=..., roots=...)")
    wanted = [addresses] if isinstance(addresses, str) else list(addresses)
    return RemoteCore(
        wanted,
        lambda address, reading: _transport(address, reading, tls.server_name, waiting),
        OwnFiles(tls.read),
        server_name=tls.server_name,
        deadline=deadline,
        waiting=waiting,
    )


def _transport(address: str, reading: Reading, server_name: str | None, waiting: Waiting) -> Transport:
    if not address.startswith(GRPC):
        return FrameTransport(address, lambda: reading.pem, server_name, waiting=waiting)
    # gRPC itself only when it is needed, and in the process that needs it: it does not survive a fork.
    from .grpc_client import GrpcTransport

    return GrpcTransport(address.removeprefix(GRPC), lambda: reading.pem, server_name)
