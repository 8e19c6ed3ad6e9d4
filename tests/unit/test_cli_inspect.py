# SPDX-License-Identifier: Apache-2.0
"""`openkcm inspect` needs no key and no vault, and says what is there in whatever form it comes."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

import pytest

from openkcm.cli.app import run
from openkcm.cli.exits import ExitCode
from openkcm.envelope import fixed_header
from openkcm.keys import Kind
from openkcm.limits import COMMITMENT_BYTES, SEGMENT_BYTES, TAG_BYTES

SERVICE_ID = bytes(range(12))


def envelope(kind: Kind, body: int) -> bytes:
    stored = kind.stored
    header = fixed_header(kind, SERVICE_ID, 0 if stored else 7) + b"k" * (16 if stored else 72)
    return header + b"n" * (19 if kind.stream else 12) + b"c" * body


def record(size: int, kind: Kind = Kind.STORED) -> bytes:
    return envelope(kind, COMMITMENT_BYTES + size + TAG_BYTES)


class _Input:
    def __init__(self, data: bytes) -> None:
        self.buffer = io.BytesIO(data)

    def isatty(self) -> bool:
        return False


@pytest.fixture
def inspected(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Any:
    monkeypatch.chdir(tmp_path)

    def inspect(data: bytes, way: str = "file") -> Any:
        what = "-"
        if way == "file":
            what = "envelope"
            Path(what).write_bytes(data)
        elif way == "value":
            what = data.decode()
        else:
            monkeypatch.setattr("sys.stdin", _Input(data))
        code = run(["--json", "inspect", what])
        captured = capsys.readouterr()
        return json.loads(captured.out) if code == 0 else (code, json.loads(captured.err)["error"]["code"])

    return inspect


@pytest.mark.parametrize("way", ["file", "pipe"])
@pytest.mark.parametrize("kind", list(Kind))
def test_every_kind(inspected: Any, kind: Kind, way: str) -> None:
    blob = envelope(kind, 5 + COMMITMENT_BYTES + TAG_BYTES)
    found = inspected(blob, way)
    assert found["kind"] == kind.name.lower()
    assert found["service_id"] == SERVICE_ID.hex()
    assert found["plaintext_bytes"] == 5
    assert found["envelope_bytes"] == len(blob)
    assert found["segments"] == (1 if kind.stream else None)
    assert found["data_key_id"] == ("6b" * 16 if kind.stored else None)
    assert found["service_key_version"] == (None if kind.stored else 7)


@pytest.mark.parametrize(
    ("size", "segments"),
    [(0, 1), (1, 1), (SEGMENT_BYTES, 1), (SEGMENT_BYTES + 1, 2), (SEGMENT_BYTES * 3, 3), (10_000_000, 153)],
)
def test_the_size_of_a_stream(inspected: Any, size: int, segments: int) -> None:
    found = inspected(envelope(Kind.STORED_STREAM, COMMITMENT_BYTES + size + segments * TAG_BYTES), "pipe")
    assert (found["plaintext_bytes"], found["segments"]) == (size, segments)


@pytest.mark.parametrize("way", ["file", "value", "pipe"])
def test_base64(inspected: Any, way: str) -> None:
    found = inspected(base64.b64encode(record(300)), way)
    assert (found["written_as"], found["plaintext_bytes"]) == ("base64 text", 300)
    assert inspected(base64.b64encode(record(300)) + b"\n", "pipe")["plaintext_bytes"] == 300


def test_a_protected_table(inspected: Any) -> None:
    value = base64.b64encode(record(3)).decode()
    other = base64.b64encode(record(3, Kind.INLINE)).decode()
    found = inspected(f'id,"na""me",mail\n1,{value},plain\n2,{other},{value}\n'.encode())
    assert found["kind"] == "table"
    assert found["columns"] == {
        'na"me': {"stored": 1, "inline": 1, "service_ids": [SERVICE_ID.hex()]},
        "mail": {"stored": 1, "inline": 0, "service_ids": [SERVICE_ID.hex()]},
    }
    found = inspected(json.dumps({"a": 1, "b": value}).encode() + b"\n")
    assert (found["written_as"], list(found["columns"])) == ("NDJSON", ["b"])


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"", id="empty"),
        pytest.param(b"hello", id="text"),
        pytest.param(record(5)[:-60], id="cut short"),
        pytest.param(envelope(Kind.INLINE_STREAM, 40), id="stream cut short"),
        pytest.param(b"OKC\x02" + record(5)[4:], id="future version"),
        pytest.param(b"T0tDAQECAAA", id="half a base64 text"),
        pytest.param(b"a,b\nT0tDAQ,1\n", id="a table of something else"),
        pytest.param(b'{"a": "T0tDA', id="half a JSON text"),
    ],
)
def test_anything_else_is_a_format_error(inspected: Any, data: bytes) -> None:
    assert inspected(data) == (ExitCode.FORMAT, "format")


def test_a_file_that_is_not_there(inspected: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(["inspect", "nothing"]) == ExitCode.NOT_FOUND
    assert capsys.readouterr().err == "error: nothing: no such file or directory\n"


def test_the_text_for_people(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "file").write_bytes(record(5))
    assert run(["inspect", str(tmp_path / "file")]) == 0
    shown = capsys.readouterr().out
    assert "an encrypted record" in shown
    assert "id " + "6b" * 16 in shown


def test_a_truncated_stream_has_no_figures(inspected: Any) -> None:
    segment = SEGMENT_BYTES + TAG_BYTES
    whole = envelope(Kind.STORED_STREAM, COMMITMENT_BYTES + segment + 100 + TAG_BYTES)
    assert inspected(whole)["segments"] == 2
    assert inspected(whole[: -(100 + TAG_BYTES) + 1]) == (ExitCode.FORMAT, "format")
