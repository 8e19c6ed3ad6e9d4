# SPDX-License-Identifier: Apache-2.0
"""Who was refused, and from where: what is recorded of it, and how much."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from openkcm.pki import DevelopmentCA
from openkcm.rpc.peer import Peers
from openkcm.rpc.server.grpc_server import Identifier


@pytest.fixture
def pem(tmp_path: Path) -> bytes:
    """A certificate."""
    return DevelopmentCA.create(tmp_path / "pki").issue_client("gateway").certificate.read_bytes()


# ---- from where --------------------------------------------------------------------------------------


class Call:
    """What gRPC tells of a call: by whom, from where."""

    def __init__(self, pem: bytes, address: str) -> None:
        self._pem = pem
        self._address = address

    def auth_context(self) -> dict[str, list[bytes]]:
        return {"x509_pem_cert": [self._pem]}

    def peer(self) -> str:
        return self._address


@pytest.mark.parametrize("way", ["gRPC", "frames"])
def test_a_peer_is_where_it_calls_from_and_not_where_another_one_did(pem: bytes, way: str) -> None:
    who, peers = Identifier(), Peers()

    def read(address: str) -> Any:
        return who(Call(pem, address)) if way == "gRPC" else peers.read(pem, address)  # type: ignore[arg-type]

    owner, thief = read("ipv4:10.0.0.1:1"), read("ipv4:203.0.113.9:5")
    assert (owner.address, thief.address) == ("ipv4:10.0.0.1:1", "ipv4:203.0.113.9:5")
    assert (owner.identity, owner.leaf, owner.until) == (thief.identity, thief.leaf, thief.until)
    assert read("").address == ""
