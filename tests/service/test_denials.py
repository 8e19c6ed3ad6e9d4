# SPDX-License-Identifier: Apache-2.0
"""Who was refused, and from where: what is recorded of it, and how much."""

from __future__ import annotations

import random
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from frame_support import eventually
from openkcm.errors import StoreUnavailable
from openkcm.pki import DevelopmentCA
from openkcm.rpc.peer import Peers
from openkcm.rpc.server.denials import MOST_ALIKE, MOST_TEXT, NEW_SECONDS, QUIET_SECONDS, Denials
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


# ---- how much ----------------------------------------------------------------------------------------


class Record:
    """Refusals and what is recorded of them, on a clock that a test moves; nothing is recorded unasked."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.lines: list[str] = []
        self.away = False
        self.denials = Denials(self._take, seconds=3600, clock=lambda: self.now)

    def _take(self, line: str) -> None:
        if self.away:
            raise StoreUnavailable("the database is away")
        self.lines.append(line)

    def after(self, seconds: float = 1) -> list[str]:
        """What is recorded when that time has passed."""
        self.now += seconds
        known = len(self.lines)
        self.denials.record_due()
        return self.lines[known:]

    def counted(self) -> int:
        """How many refusals all records tell of."""
        whats = [
            what
            for line in self.lines
            for each in line.split("; ")
            for what in each.split(" refused to ")[0].split(", ")
        ]
        found = [re.match(r"(\d+) x ", what) for what in whats]
        return sum(int(each[1]) if each else 1 for each in found)


@pytest.fixture
def record() -> Iterator[Record]:
    made = Record()
    yield made
    made.away = False
    made.denials.close()


def test_the_first_of_a_kind_is_recorded_at_once_and_more_by_strangers_once_a_minute(record: Record) -> None:
    for second in range(1, 200):
        for at in range(10):
            record.denials.note("", "a connection with no TLS", f"10.0.{second}.{at}:99")
        record.after()
    assert record.lines[0] == (
        "10 x a connection with no TLS refused to an unknown peer at 10.0.1.0, 10.0.1.1, 10.0.1.2 and others"
    )
    assert len(record.lines) == 1 + 198 // QUIET_SECONDS
    assert record.lines[1].startswith("600 x a connection with no TLS refused to an unknown peer at 10.0.2.0")
    record.denials.note("", "TLS handshake (no certificate)")
    (line,) = record.after()
    # In one record, what waited along with it.
    assert re.fullmatch(
        r"\d+ x a connection with no TLS refused to an unknown peer at .* and others; "
        r"TLS handshake \(no certificate\) refused to an unknown peer",
        line,
    )
    assert record.counted() == 1991


def test_who_varies_what_is_refused_is_not_recorded_more_often(record: Record) -> None:
    kinds = [f"a connection with {what}" for what in ("no TLS", "no certificate", "a handshake too slow")]
    for second in range(3600):
        record.denials.note("", kinds[second % 3], "10.0.0.1:1")
        record.after()
    assert len(record.lines) <= len(kinds) + 3600 // QUIET_SECONDS
    record.after(QUIET_SECONDS)
    assert record.counted() == 3600
    record.now += NEW_SECONDS
    for kind in ("a connection with TLS below 1.3", kinds[0]):  # it was long ago: new again
        record.denials.note("", kind)
        assert len(record.after()) == 1


def test_one_with_an_accepted_certificate_is_named_each_second_in_one_record(record: Record) -> None:
    for _ in range(3):
        for what in ("WrapKeys", "UnwrapKeys", "WrapKeys"):
            record.denials.note("cn:one", what, "10.0.0.1:7")
        record.denials.note("cn:two", "WrapKeys", "10.0.0.2:7")
        assert record.after() == [
            "2 x WrapKeys, UnwrapKeys refused to cn:one at 10.0.0.1; WrapKeys refused to cn:two at 10.0.0.2"
        ]
    for _ in range(30):
        record.denials.note("cn:gone", "WrapKeys", "10.0.0.3:7", accepted=False)
        record.after()
    assert len(record.lines) == 4  # a name that nobody answers for: as strangers
    record.denials.flush()
    assert record.lines[-1] == "29 x WrapKeys refused to cn:gone at 10.0.0.3"


def test_no_count_is_lost_whatever_there_is_room_for(record: Record) -> None:
    dice, noted = random.Random(7), 0
    for turn in range(40):
        record.away = turn % 5 == 0
        for _ in range(dice.randrange(200)):
            noted += 1
            record.denials.note(
                dice.choice(["", "cn:one", "cn:" + "x" * 500, *(f"cn:{at}" for at in range(200))]),
                dice.choice(["WrapKeys", "UnwrapKeys", "ShredKeys", "a connection with no TLS"]),
                f"{dice.randrange(256)}.0.0.1:{turn}",
                accepted=dice.random() < 0.8,
            )
        assert len(record.denials._seen) <= MOST_ALIKE + 2
        assert len(record.after()) <= 1
    record.away = False
    record.denials.close()
    assert record.counted() == noted
    assert max(map(len, record.lines)) <= MOST_TEXT
    assert any("more refused to others" in line for line in record.lines)


def test_what_cannot_be_recorded_is_recorded_later_and_once(record: Record) -> None:
    record.away = True
    record.denials.note("", "a connection with no TLS", "10.0.0.1:1")
    for _ in range(3):
        assert record.after() == []
    record.denials.note("", "a connection with no TLS", "10.0.0.2:1")
    record.away = False
    assert record.after() == ["2 x a connection with no TLS refused to an unknown peer at 10.0.0.1, 10.0.0.2"]
    assert record.after() == []
    record.denials.flush()
    assert len(record.lines) == 1


def test_it_is_recorded_unasked() -> None:
    lines: list[str] = []
    denials = Denials(lines.append, seconds=0.01, clock=time.monotonic)
    denials.note("", "a connection with no TLS", "[::1]:4")
    eventually(lambda: lines == ["a connection with no TLS refused to an unknown peer at [::1]"])
    denials.note("", "a connection with no TLS", "[::1]:5")
    denials.close()
    assert len(lines) == 2
