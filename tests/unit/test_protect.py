# SPDX-License-Identifier: Apache-2.0
"""The table engine: what comes back is what went in, and what is wrong is named by its line.

The service here is a stand-in that keeps the subject and context inside the envelope, so that a test can see
what each value was encrypted with; test_cli_protect.py runs tables through the real one.
"""

from __future__ import annotations

import base64
import csv
import io
import json
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openkcm.cli.csv_table import CsvTable, FlatBlock
from openkcm.cli.ndjson_table import NdjsonTable
from openkcm.cli.tables import ColumnCipher, Columns, Shredded
from openkcm.errors import DecryptError, FormatError, InvalidInput, KeyDestroyed, LimitExceeded, OpenKCMError

HEAD = b"OKC\x01\x01\x02\0\0" + b"s" * 12 + b"\0" * 4 + b"k" * 16 + b"n" * 12 + b"\0" * 48


class Visible:
    """A service whose envelopes show their subject and context."""

    def __init__(self) -> None:
        self.shredded: set[str] = set()

    def encrypt_many(
        self,
        records: Sequence[bytes],
        *,
        contexts: Sequence[Mapping[str, str]] | None = None,
        subjects: Sequence[str] | None = None,
    ) -> list[bytes]:
        every = contexts if contexts is not None else [{}] * len(records)
        names = subjects if subjects is not None else [""] * len(records)
        for index, record in enumerate(records):
            if record == b"too long":
                raise LimitExceeded("the record is too long", index=index)
        return [
            HEAD + json.dumps([name, dict(about), record.hex()]).encode()
            for name, about, record in zip(names, every, records, strict=True)
        ]

    def decrypt_many(
        self,
        blobs: Sequence[bytes],
        *,
        contexts: Sequence[Mapping[str, str]] | None = None,
        errors: str = "raise",
    ) -> list[Any]:
        every = contexts if contexts is not None else [{}] * len(blobs)
        outcomes: list[bytes | OpenKCMError] = []
        for index, (about, blob) in enumerate(zip(every, blobs, strict=True)):
            name, bound, record = show(blob)
            outcome: bytes | OpenKCMError = bytes.fromhex(record)
            if name in self.shredded:
                outcome = KeyDestroyed("shredded", index=index)
            elif bound != dict(about):
                outcome = DecryptError(index=index)
            if isinstance(outcome, OpenKCMError) and errors == "raise":
                raise outcome
            outcomes.append(outcome)
        return outcomes


def show(blob: bytes) -> Any:
    assert blob.startswith(HEAD)
    return json.loads(blob[len(HEAD) :])


def protect(data: bytes, columns: Columns, kind: Any = CsvTable, **options: Any) -> bytes:
    target = io.BytesIO()
    kind(ColumnCipher(Visible()), columns, **options).protect(io.BytesIO(data), target)
    return target.getvalue()


def unprotect(
    data: bytes,
    columns: Columns,
    kind: Any = CsvTable,
    *,
    service: Visible | None = None,
    shredded: Shredded = Shredded.FAIL,
    **options: Any,
) -> bytes:
    target = io.BytesIO()
    table = kind(ColumnCipher(service or Visible(), shredded), columns, **options)
    table.unprotect(io.BytesIO(data), target)
    return target.getvalue()


FLIGHTS = b"carrier,tailnum,flight,dep\nUA,N1,10,517\nUA,N2,11,533\nDL,,12,\n"
COLUMNS = Columns(("tailnum", "flight", "dep"), "tailnum")


def test_a_table_comes_back_byte_for_byte() -> None:
    stored = protect(FLIGHTS, COLUMNS)
    assert stored.splitlines()[0] == FLIGHTS.splitlines()[0]
    assert b",N1," not in stored
    assert unprotect(stored, COLUMNS) == FLIGHTS


def test_each_value_is_bound_to_its_column_its_subject_and_the_chosen_columns() -> None:
    stored = protect(FLIGHTS, Columns(("flight", "dep"), "tailnum", ("carrier",)))
    rows = list(csv.DictReader(io.StringIO(stored.decode())))
    assert show(base64.b64decode(rows[1]["dep"])) == [
        "N2",
        {"column": "dep", "row.carrier": "UA"},
        b"533".hex(),
    ]
    assert show(base64.b64decode(rows[2]["flight"])) == [
        "",
        {"column": "flight", "row.carrier": "DL"},
        b"12".hex(),
    ]


def test_a_value_moved_to_another_column_is_refused_with_its_line() -> None:
    lines = protect(FLIGHTS, COLUMNS).split(b"\n")
    fields = lines[2].split(b",")
    fields[2], fields[3] = fields[3], fields[2]
    lines[2] = b",".join(fields)
    with pytest.raises(DecryptError, match=r"^line 3, column 'flight'"):
        unprotect(b"\n".join(lines), COLUMNS)


def test_a_changed_context_column_is_refused() -> None:
    columns = Columns(("flight",), None, ("carrier",))
    stored = protect(FLIGHTS, columns).replace(b"DL", b"AA")
    with pytest.raises(DecryptError, match=r"^line 4, column 'flight'"):
        unprotect(stored, columns)


def test_values_without_a_subject_are_counted() -> None:
    cipher = ColumnCipher(Visible())
    counts = CsvTable(cipher, COLUMNS).protect(io.BytesIO(FLIGHTS), io.BytesIO())
    assert (counts.rows, counts.values, counts.without_subject) == (3, 9, 3)
    assert counts.read == len(FLIGHTS)


@pytest.mark.parametrize(
    "data",
    [
        pytest.param(b"a,b\r\n1,2\r\n3,4\r\n", id="CRLF"),
        pytest.param(b"a,b\n1,2\n3,4", id="no line end at the end"),
        pytest.param(b"a,b\r\n1,2\r\n3,4", id="CRLF but at the end"),
        pytest.param(b"\xef\xbb\xbfa,b\n1,2\n", id="byte order mark"),
        pytest.param(b'\xef\xbb\xbf"a",b\n1,2\n', id="byte order mark before a quote"),
        pytest.param(b'a,b\n"x,y",2\n"say ""hi""",4\n', id="quotes where needed"),
        pytest.param(b'a,b\n1,"two\nlines"\n"three\r\nmore\r\nlines",4\n5,6\n', id="line ends inside quotes"),
        pytest.param(b'"a","b\nc",b\n1,2,3\n', id="a header that needs quotes"),
        pytest.param(b'a\n""\n1\n\n2\n', id="one column, empty and blank"),
        pytest.param(b"a\n\n\n", id="one column, only blank"),
        pytest.param(b"a,b\n1,2\n\n3,4\n\n", id="blank lines"),
        pytest.param(b"a,b\n,\n,\n", id="empty values"),
        pytest.param("a,b\nçé,日本\n".encode(), id="UTF-8"),
        pytest.param(b"a,b\n\xe9\xff,\xa0\n", id="not UTF-8"),
        pytest.param(b'a,b\n"\xe9,\xff",\xa0\n', id="not UTF-8 in quotes"),
        pytest.param(b"a,b\n x , y \n", id="spaces"),
        pytest.param(b"a,b\n", id="no rows"),
        pytest.param(b"a,b", id="no rows and no line end"),
        pytest.param(b"a,b\n\x00,1\n", id="a zero byte"),
    ],
)
def test_the_form_of_a_canonical_file_is_kept(data: bytes) -> None:
    columns = Columns(("a",))
    stored = protect(data, columns)
    assert unprotect(stored, columns) == data


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_every_delimiter(delimiter: str) -> None:
    data = f'a{delimiter}b\n"x{delimiter}y"{delimiter}1\n2,;3{delimiter}4\n'.encode()
    if delimiter in ",;":
        data = f'a{delimiter}b\n"x{delimiter}y"{delimiter}1\n'.encode()
    assert (
        unprotect(protect(data, Columns(("a",)), delimiter=delimiter), Columns(("a",)), delimiter=delimiter)
        == data
    )


def test_needless_quotes_and_mixed_line_ends_become_canonical() -> None:
    data = b'a,b\n"1",2\r\n3,"4"\n'
    assert unprotect(protect(data, Columns(("a",))), Columns(("a",))) == b"a,b\n1,2\n3,4\n"


def test_an_unprotected_value_that_looks_like_a_row_end_stays_in_its_row() -> None:
    data = b'a,b,c\n1,"x,\n,y",2\n3,4,5\n'
    columns = Columns(("b",))
    stored = protect(data, columns)
    assert stored.count(b"\n") == 3
    assert unprotect(stored, columns) == data


def test_blocks_do_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("openkcm.cli.csv_table.FIRST_BLOCK_BYTES", 64)
    monkeypatch.setattr("openkcm.cli.csv_table.ROWS_PER_BLOCK", 3)
    rows = [
        f'{i},{"x" * (i % 50)},"a\n{i},""q"""' if i % 7 == 0 else f"{i},{i * i},plain" for i in range(300)
    ]
    data = ("id,b,c\n" + "\n".join(rows)).encode()
    columns = Columns(("b", "c"), "id")
    assert unprotect(protect(data, columns), columns) == data


fields = st.text(alphabet=st.sampled_from('ab,"\n\r ;é\x00'), max_size=6)


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.lists(fields, min_size=3, max_size=3), max_size=8),
    end=st.sampled_from(["\n", "\r\n"]),
    chosen=st.sets(st.sampled_from(["a", "b", "c"]), min_size=1),
)
def test_what_another_csv_reader_reads_survives(rows: list[list[str]], end: str, chosen: set[str]) -> None:
    written = io.StringIO()
    csv.writer(written, lineterminator=end, quoting=csv.QUOTE_ALL).writerows([["a", "b", "c"], *rows])
    columns = Columns(tuple(sorted(chosen)))
    back = unprotect(protect(written.getvalue().encode(), columns), columns)
    assert list(csv.reader(io.StringIO(back.decode(), newline=""))) == [["a", "b", "c"], *rows]
    # What came back is canonical, so from here on it is kept byte for byte.
    assert unprotect(protect(back, columns), columns) == back


@settings(max_examples=200, deadline=None)
@given(data=st.text(alphabet=st.sampled_from("a,\n\r"), max_size=30), end=st.sampled_from([b"\n", b"\r\n"]))
def test_the_quick_parse_agrees_with_the_csv_module(data: str, end: bytes) -> None:
    text = data + end.decode()
    block = FlatBlock.parse(text.encode(), 3, b",", end, 2)
    if block is not None:
        rows = list(csv.reader(io.StringIO(text, newline="")))
        assert [list(row) for row in zip(*(block.column(i) for i in range(3)), strict=True)] == [
            [field.encode() for field in row] for row in rows
        ]
        assert block.dump() == text.encode()


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"a,b\n1,2\n3\n", "line 3: 1 fields where the header has 2"),
        (b"a,b\n1,2\n3,4,5\n6\n", "line 3: 3 fields where the header has 2"),
        (b'a,b\n1,"two\nlines"\n3\n', "line 4: 1 fields"),
        (b'a,b\n1,"never closed\n3,4\n', "line 2: not CSV .*not closed"),
        (b'a,b\n1,"x"y\n', "line 2: not CSV .*not doubled"),
        (b"a,b\n1,x\ry\n", "line 2: not CSV .*carriage return"),
        (b"", "no header"),
        (b"\n1,2\n", "no header"),
        ("a,b\n".encode("utf-16"), "UTF-16"),
    ],
)
def test_a_malformed_file_is_refused_with_its_line(data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        protect(data, Columns(("a",)))
    assert type(caught.value) is FormatError


def test_a_missing_column_lists_those_there_are() -> None:
    with pytest.raises(
        InvalidInput, match="no column 'tail'; the columns are: carrier, tailnum, flight, dep"
    ):
        protect(FLIGHTS, Columns(("tail",)))


def test_a_file_with_another_delimiter_gets_a_hint() -> None:
    with pytest.raises(InvalidInput, match="separated by ';'"):
        protect(b"a;b\n1;2\n", Columns(("a",)))


def test_an_ambiguous_column_is_refused() -> None:
    with pytest.raises(InvalidInput, match="names column 'a' 2 times"):
        protect(b"a,a\n1,2\n", Columns(("a",)))


def test_a_column_named_twice_is_refused() -> None:
    with pytest.raises(InvalidInput, match="named twice"):
        Columns(("a", "a"))


@pytest.mark.parametrize("kind", [CsvTable, NdjsonTable])
def test_protecting_no_column_is_refused(kind: Any) -> None:
    with pytest.raises(InvalidInput, match="at least one column"):
        protect(b"", Columns(()), kind)


def test_unprotecting_without_a_name_opens_every_protected_column() -> None:
    assert unprotect(protect(FLIGHTS, COLUMNS), Columns(())) == FLIGHTS
    columns = Columns(("pay", "id"), "id")
    data = b'{"id":1,"pay":null}\n' * 2000 + b'{"id":2,"pay":6}\n'
    assert unprotect(protect(data, columns, NdjsonTable), Columns(()), NdjsonTable) == data


@pytest.mark.parametrize(("data", "kind"), [(FLIGHTS, CsvTable), (b'{"a":"T0tDAx"}\n', NdjsonTable)])
def test_a_file_without_protected_columns_says_so(data: bytes, kind: Any) -> None:
    with pytest.raises(InvalidInput, match="no column of this file holds protected values"):
        unprotect(data, Columns(()), kind)


def test_a_context_column_cannot_be_protected() -> None:
    with pytest.raises(InvalidInput, match="cannot be protected and a context column"):
        Columns(("a",), None, ("a",))


def test_protecting_twice_is_refused() -> None:
    # The stand-in's envelopes parse as envelopes of a stored key.
    stored = protect(FLIGHTS, Columns(("flight",)))
    with pytest.raises(InvalidInput, match="line 2, column 'flight': the value is protected already"):
        protect(stored, Columns(("dep", "flight")))


def test_a_value_that_only_begins_like_an_envelope_is_protected() -> None:
    data = b"a\nT0tDAQ==\nT0tDA and more\n"
    assert unprotect(protect(data, Columns(("a",))), Columns(("a",))) == data


@pytest.mark.parametrize("value", [b"", b"plain", b"T0tDAQ=", b"T0tDAQ==x"])
def test_a_value_that_is_no_envelope_is_refused_with_its_line(value: bytes) -> None:
    with pytest.raises((FormatError, AssertionError)) as caught:
        unprotect(b"a,b\n1," + value + b"\n", Columns(("b",)))
    if value:
        assert type(caught.value) is FormatError
        assert str(caught.value).startswith("line 2, column 'b'")


def test_a_refused_record_is_named_by_its_line() -> None:
    with pytest.raises(LimitExceeded, match=r"^line 3, column 'b': the record is too long"):
        protect(b"a,b\n1,2\n3,too long\n", Columns(("b",)))
    with pytest.raises(LimitExceeded, match=r"^line 4, column 'b'"):
        protect(b"a,b\n1,2\n,3\n,too long\n", Columns(("b",), "a"))


def test_a_subject_that_is_too_long_is_named_by_its_line() -> None:
    with pytest.raises(LimitExceeded, match=r"^line 3, column 'a'"):
        protect(b"a,b\n1,2\n" + b"x" * 2000 + b",3\n", Columns(("b",), "a"))


def test_a_subject_must_be_utf8() -> None:
    with pytest.raises(FormatError, match=r"^line 3, column 'a': not UTF-8"):
        protect(b"a,b\n1,2\n\xff,3\n", Columns(("b",), "a"))


@pytest.mark.parametrize(
    ("choice", "expected"), [(Shredded.BLANK, b""), (Shredded.MARK, b"[shredded]"), (Shredded.KEEP, None)]
)
def test_shredded_values(choice: Shredded, expected: bytes | None) -> None:
    stored = protect(FLIGHTS, COLUMNS)
    service = Visible()
    service.shredded.add("N1")
    lines = unprotect(stored, COLUMNS, service=service, shredded=choice).split(b"\n")
    kept = stored.split(b"\n")[1] if expected is None else b",".join([b"UA", *[expected] * 3])
    assert lines == [b"carrier,tailnum,flight,dep", kept, *FLIGHTS.split(b"\n")[2:]]


def test_a_shredded_value_stops_by_default_and_says_what_to_do() -> None:
    service = Visible()
    service.shredded.add("N2")
    with pytest.raises(KeyDestroyed, match=r"^line 3, column 'tailnum'.*--shredded"):
        unprotect(protect(FLIGHTS, COLUMNS), COLUMNS, service=service)


def test_other_errors_are_not_taken_for_shredded_ones() -> None:
    lines = protect(FLIGHTS, COLUMNS).split(b"\n")
    fields = lines[2].split(b",")
    fields[2], fields[3] = fields[3], fields[2]
    lines[2] = b",".join(fields)
    service = Visible()
    service.shredded.add("N1")
    with pytest.raises(DecryptError, match=r"^line 3, column 'flight'"):
        unprotect(b"\n".join(lines), COLUMNS, service=service, shredded=Shredded.BLANK)


NDJSON_ODD = (
    b'{"id": 7, "name" : "Ann \\"A\\"", "pay": 1.50, "on": true, "tags": ["a", {"b": 1}], "none": null}\n'
    b"\n"
    b'{"name":"B\xc3\xb6b","pay":-1E+5,"on":false,"none":null,"id":"x"}\r\n'
    b'  { "id" : 123456789012345678901234567890 , "pay" : 0 }  \n'
    b'{"n\\u0061me":"escaped key","pay":"text","id":""}'
)


def test_ndjson_comes_back_byte_for_byte_with_its_types() -> None:
    columns = Columns(("name", "pay", "on", "tags", "none", "id"), "id")
    stored = protect(NDJSON_ODD, columns, NdjsonTable)
    first = json.loads(stored.split(b"\n")[0])
    assert first["none"] is None
    assert all(first[name].startswith("T0tDA") for name in ("id", "name", "pay", "on", "tags"))
    assert show(base64.b64decode(first["pay"])) == ["7", {"column": "pay"}, b"1.50".hex()]
    assert unprotect(stored, columns, NdjsonTable) == NDJSON_ODD


def test_ndjson_contexts() -> None:
    columns = Columns(("pay",), "id", ("name", "on"))
    stored = protect(b'{"id":1,"name":"x","on":true,"pay":5}\n{"pay":6}', columns, NdjsonTable)
    values = [show(base64.b64decode(json.loads(line)["pay"])) for line in stored.splitlines()]
    assert values == [
        ["1", {"column": "pay", "row.name": "x", "row.on": "true"}, b"5".hex()],
        ["", {"column": "pay", "row.name": "", "row.on": ""}, b"6".hex()],
    ]
    assert unprotect(stored, columns, NdjsonTable) == b'{"id":1,"name":"x","on":true,"pay":5}\n{"pay":6}'


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b'{"a":1}\n[1]\n', "line 2: not a JSON object"),
        (b'{"a":1}\n{"a":[1]} x\n', "line 2: something follows"),
        (b'{"a":1}\n{"a":1} x\n', "line 2: not JSON"),
        (b'{"a":1,}\n', "line 1: not JSON"),
        (b'{"a":1,"a":2}\n', "line 1: field 'a' is there twice"),
        (b'{"a":1,"\\u0061":2}\n', "line 1: field 'a' is there twice"),
        (b'{"a":NaN}\n', "line 1: not JSON"),
        (b'{"a":[NaN]}\n', "line 1: not JSON"),
        (b'{"a":"\xff"}\n', "line 1: not UTF-8"),
        (b'{"a":' + b"[" * 100_000 + b"\n", "line 1: not JSON"),
        (b"5\n", "line 1: not a JSON object"),
    ],
)
def test_malformed_ndjson_is_refused_with_its_line(data: bytes, message: str) -> None:
    with pytest.raises(FormatError, match=message) as caught:
        protect(data, Columns(("a",)), NdjsonTable)
    assert type(caught.value) is FormatError


def test_a_field_that_no_line_has_refuses_the_file() -> None:
    with pytest.raises(InvalidInput, match="no column 'c'; the columns are: a, b"):
        protect(b'{"a":1}\n{"b":2}\n', Columns(("a", "c")), NdjsonTable)


def test_a_subject_cannot_be_nested() -> None:
    with pytest.raises(InvalidInput, match="line 1, column 'b'"):
        protect(b'{"a":1,"b":[2]}\n', Columns(("a",), "b"), NdjsonTable)


def test_a_csv_value_does_not_become_json() -> None:
    stored = protect(b"a\nnot json\n", Columns(("a",))).split(b"\n")[1]
    with pytest.raises(FormatError, match="not protected as NDJSON"):
        unprotect(b'{"a":"%s"}' % stored, Columns(("a",)), NdjsonTable)


@pytest.mark.parametrize(
    ("choice", "expected"), [(Shredded.BLANK, None), (Shredded.MARK, "[shredded]"), (Shredded.KEEP, "T0t")]
)
def test_shredded_json_values(choice: Shredded, expected: str | None) -> None:
    columns = Columns(("pay",), "id")
    service = Visible()
    service.shredded.add("1")
    stored = protect(b'{"id":1,"pay":5}\n{"id":2,"pay":6}\n', columns, NdjsonTable)
    rows = unprotect(stored, Columns(("pay",)), NdjsonTable, service=service, shredded=choice).splitlines()
    first = json.loads(rows[0])["pay"]
    assert first is None if expected is None else first.startswith(expected)
    assert rows[1] == b'{"id":2,"pay":6}'


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=5,
)
names = st.sampled_from(["a", "b", 'q"', ",", ":", "", "\\", "é", "a b"])


@settings(max_examples=200, deadline=None)
@given(
    rows=st.lists(st.dictionaries(names, json_values, min_size=1), min_size=1, max_size=5),
    spaced=st.booleans(),
    ascii_only=st.booleans(),
    chosen=st.sets(names, min_size=1),
)
def test_any_ndjson_comes_back(
    rows: list[dict[str, Any]], spaced: bool, ascii_only: bool, chosen: set[str]
) -> None:
    separators = (", ", " : ") if spaced else (",", ":")
    data = b"".join(
        json.dumps(row, separators=separators, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
        + b"\n"
        for row in rows
    )
    present = tuple(sorted(chosen & {name for row in rows for name in row}))
    if present and b"T0tDA" not in data:
        columns = Columns(present)
        stored = protect(data, columns, NdjsonTable)
        for before, line in zip(rows, stored.splitlines(), strict=True):
            after = json.loads(line)
            for name, value in before.items():
                if name in present and value is not None:
                    assert after[name].startswith("T0tDA")
                else:
                    assert after[name] == value
        assert unprotect(stored, columns, NdjsonTable) == data
