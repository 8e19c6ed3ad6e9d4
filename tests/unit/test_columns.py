# SPDX-License-Identifier: Apache-2.0
"""Columns: the same envelopes as single calls make, in every layout, and nothing written when something is wrong."""

from __future__ import annotations

import threading
from array import array
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import openkcm
from openkcm.crypto import Places
from openkcm.envelope import INLINE_OVERHEAD, STORED_OVERHEAD
from openkcm.errors import DecryptError
from openkcm.gateway import Column, DataKeyPolicy, ServiceHandle
from optional import optional
from support import ON_FAST, refused, run_python

pl = optional("polars")
ROWS: list[bytes | None] = [None if at % 7 == 3 else bytes([at % 256]) * (at % 90) for at in range(1500)]
PLAIN = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
TEXT = ["ann", None, "", "bøb", "a longer name than a view holds", None, "ann"]


def other(core: openkcm.Core, **options: object) -> ServiceHandle:
    return openkcm.Gateway(core, **options).service("acme", "records")  # type: ignore[arg-type]


def as_bytes(rows: list[Any]) -> list[bytes | None]:
    return [row.encode() if isinstance(row, str) else row for row in rows]


# ---- the same as single calls ---------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("context", [None, b"", b"raw", {"table": "cards"}])
@pytest.mark.parametrize("subject", [None, "ann"])
def test_cells_are_envelopes(service: ServiceHandle, threads: int, context: Any, subject: str | None) -> None:
    column = pa.array(ROWS, pa.binary())
    sealed = service.encrypt_column(column, context=context, subject=subject, threads=threads)
    sealed.validate(full=True)
    assert sealed.type == pa.binary()
    overhead = INLINE_OVERHEAD if subject is None else STORED_OVERHEAD
    cells = sealed.to_pylist()
    for row, cell in zip(ROWS[::50], cells[::50], strict=True):
        assert (cell is None) == (row is None)
        if row is not None:
            assert len(cell) == len(row) + overhead
            assert service.decrypt(cell, context=context) == row
    found = [cell for cell in cells if cell is not None]
    assert len(set(found)) == len(found)
    assert service.decrypt_many(found, context=context) == [row for row in ROWS if row is not None]
    assert service.decrypt_column(sealed, context=context, threads=threads).equals(column)
    wrong = b"other" if context != b"other" else None
    error = refused(lambda: service.decrypt_column(sealed, context=wrong, threads=threads), DecryptError)
    assert error.index == 0  # type: ignore[attr-defined]


@pytest.mark.parametrize("threads", [1, 2])
def test_what_lists_encrypt_columns_decrypt(service: ServiceHandle, threads: int) -> None:
    records = [bytes(at % 100) for at in range(2000)]
    contexts = [None if at % 5 == 0 else b"row %d" % at for at in range(2000)]
    blobs = service.encrypt_many(records, contexts=contexts)
    opened = service.decrypt_column(
        pa.array(blobs), contexts=pa.array(contexts, pa.binary()), threads=threads
    )
    assert opened.to_pylist() == records


def test_a_row_context_means_what_it_means_to_encrypt(service: ServiceHandle) -> None:
    values = ["", "row 1", None, "a" * 600, "b" * 65_535, "ü"]
    for contexts in (
        pa.array(values),
        pa.array(values, pa.large_string()),
        pa.array(values).dictionary_encode(),
        pa.array(as_bytes(values), pa.binary()),
        pl.Series(values),
        pd.Series(values, dtype="str"),
    ):
        for subject in (None, "ann"):
            sealed = service.encrypt_column(pa.array([b"x"] * 6), contexts=contexts, subject=subject)
            for cell, context in zip(sealed.to_pylist(), as_bytes(values), strict=True):
                assert service.decrypt(cell, context=context) == b"x"
            assert service.decrypt_column(sealed, contexts=contexts).to_pylist() == [b"x"] * 6
            refused(lambda sealed=sealed: service.decrypt_column(sealed), DecryptError)


def test_each_row_has_a_key_and_a_nonce_of_its_own(service: ServiceHandle) -> None:
    cells = service.encrypt_column(pa.array([b"same"] * 2000), threads=2).to_pylist()
    assert len({cell[24:96] for cell in cells}) == len({cell[96:108] for cell in cells}) == 2000


class Counting:
    """How the threads of a call wait, and how many it asked for."""

    def __init__(self, waiting: Any) -> None:
        self._waiting = waiting
        self.counts: list[int] = []

    def together(self, count: int, work: Callable[[], None]) -> None:
        self.counts.append(count)
        self._waiting.together(count, work)


@pytest.mark.parametrize(
    ("rows", "size", "threads"), [(5, 1 << 20, [2]), (8, 1 << 16, []), (1, 5 << 20, []), (100, 1 << 16, [3])]
)
@pytest.mark.parametrize("keys", [1, 1 << 20])
def test_few_rows_are_shared_out_if_they_are_large(
    core: openkcm.Core, rows: int, size: int, threads: list[int], keys: int
) -> None:
    service = other(core, policy=DataKeyPolicy(records=keys))
    column = pa.array([bytes([at]) * size for at in range(rows)])
    sealer, opener = service._sealer, service._column_opener
    sealer._waiting = opener._waiting = counting = Counting(sealer._waiting)  # type: ignore[assignment]
    sealed = service.encrypt_column(column, threads=3)
    assert counting.counts == threads
    assert service.decrypt_column(sealed, threads=3).equals(column)
    assert counting.counts == threads * 2


@pytest.mark.parametrize(
    "policy",
    [DataKeyPolicy(records=700), DataKeyPolicy(records=2**20, bytes=4000), DataKeyPolicy(records=2**31)],
)
def test_policies_hold(core: openkcm.Core, policy: DataKeyPolicy) -> None:
    service = other(core, policy=policy)
    column = pa.array(ROWS, pa.binary())
    sealed = service.encrypt_column(column, threads=2)
    assert service.decrypt_column(sealed).equals(column)
    uses: dict[bytes, list[int]] = {}
    for row, cell in zip(ROWS, sealed.to_pylist(), strict=True):
        if row is not None:
            uses.setdefault(cell[24:96], []).append(len(row))
    assert max(map(len, uses.values())) <= policy.records
    if policy.bytes is not None:
        assert max(map(sum, uses.values())) <= policy.bytes
        assert len(uses) < 40
    elif policy.records > 2000:
        assert len(uses) == 1
    else:
        assert len(uses) <= 4


# ---- layouts ---------------------------------------------------------------------------------------------


def layouts(values: list[str | None]) -> dict[str, Callable[[], Any]]:
    """The same rows in every layout."""
    raw = as_bytes(values)
    sliced = pa.array([*as_bytes(values)[:1], *raw, b"behind"], pa.binary()).slice(1, len(values))
    return {
        "binary": lambda: pa.array(raw, pa.binary()),
        "large_binary": lambda: pa.array(raw, pa.large_binary()),
        "string": lambda: pa.array(values, pa.string()),
        "large_string": lambda: pa.array(values, pa.large_string()),
        "binary_view": lambda: pa.array(raw, pa.binary_view()),
        "string_view": lambda: pa.array(values, pa.string_view()),
        "dictionary": lambda: pa.array(values, pa.string()).dictionary_encode(),
        "small dictionary": lambda: pa.array(values, pa.dictionary(pa.int8(), pa.string())),
        "unsigned dictionary": lambda: pa.array(values, pa.dictionary(pa.uint16(), pa.large_binary())),
        "sliced": lambda: sliced,
        "sliced dictionary": lambda: sliced.dictionary_encode().slice(0, len(values)),
        "polars": lambda: pl.Series(values, dtype=pl.String),
        "polars binary": lambda: pl.Series(raw, dtype=pl.Binary),
        "polars categorical": lambda: pl.Series(values, dtype=pl.Categorical),
        "pandas": lambda: pd.Series(values, dtype="str"),
        "pandas arrow": lambda: pd.Series(raw, dtype=pd.ArrowDtype(pa.binary())),
        "capsule": lambda: Capsule(pa.array(raw, pa.binary())),
        "stream": lambda: Stream(
            pa.chunked_array([pa.array(raw[:2], pa.binary()), pa.array(raw[2:], pa.binary())])
        ),
    }


class Capsule:
    """Nothing but the interface: what another library's array looks like to us."""

    def __init__(self, held: Any) -> None:
        self._held = held

    def __arrow_c_array__(self, requested_schema: object = None) -> Any:
        return self._held.__arrow_c_array__()


class Stream:
    """Nothing but the interface for chunks."""

    def __init__(self, held: Any) -> None:
        self._held = held

    def __arrow_c_stream__(self, requested_schema: object = None) -> Any:
        return self._held.__arrow_c_stream__()


@pytest.mark.parametrize("layout", sorted(layouts(TEXT)))
def test_every_layout_is_read(service: ServiceHandle, layout: str) -> None:
    column = layouts(TEXT)[layout]()
    sealed = service.encrypt_column(column)
    assert isinstance(sealed, (Column, pa.Array))
    opened = service.decrypt_column(sealed)
    assert (
        list(opened) == as_bytes(TEXT) if isinstance(opened, Column) else opened.to_pylist() == as_bytes(TEXT)
    )
    text = service.decrypt_column(sealed, text=True)
    assert (list(text) if isinstance(text, Column) else text.to_pylist()) == TEXT
    cells = pa.array(sealed)
    cells.validate(full=True)
    for row, cell in zip(as_bytes(TEXT), cells.to_pylist(), strict=True):
        assert cell is None if row is None else service.decrypt(cell) == row


@pytest.mark.parametrize("layout", sorted(layouts(TEXT)))
def test_envelopes_contexts_and_subjects_come_in_every_layout(service: ServiceHandle, layout: str) -> None:
    names = [name or "somebody" for name in TEXT]
    rows = pa.array([b"%d" % at for at in range(len(TEXT))])
    sealed = service.encrypt_column(rows, contexts=layouts(TEXT)[layout](), subjects=layouts(names)[layout]())
    for at, (cell, context) in enumerate(zip(sealed.to_pylist(), as_bytes(TEXT), strict=True)):
        assert service.decrypt(cell, context=context) == b"%d" % at
    assert len({cell[24:40] for cell in sealed.to_pylist()}) == len(set(names))
    views = sealed.cast(pa.binary_view())
    assert service.decrypt_column(views, contexts=layouts(TEXT)[layout]()).to_pylist() == rows.to_pylist()


def test_chunks_stay(service: ServiceHandle) -> None:
    chunks = pa.chunked_array([[b"a", None], [], [b"b"], [b"c" * 100] * 900])
    sealed = service.encrypt_column(chunks)
    assert isinstance(sealed, pa.ChunkedArray)
    assert list(map(len, sealed.chunks)) == [2, 0, 1, 900]
    sealed.validate(full=True)
    opened = service.decrypt_column(sealed, threads=2)
    assert opened.equals(chunks)
    assert list(map(len, opened.chunks)) == [2, 0, 1, 900]
    empty = pa.chunked_array([], pa.binary())
    assert service.decrypt_column(service.encrypt_column(empty)).equals(empty)


def test_large_kinds_stay_large(service: ServiceHandle) -> None:
    sealed = service.encrypt_column(pa.array([b"a"], pa.large_binary()))
    assert sealed.type == pa.large_binary()
    assert service.decrypt_column(sealed, text=True).type == pa.large_string()


def test_offsets_grow_with_the_result() -> None:
    # 14 million empty rows make envelopes over 2 GiB; here only the question is asked.
    assert Places(3, 2**31 - 1, False).width == 4
    assert Places(3, 2**31, False).width == 8


@pytest.mark.parametrize(
    "rows",
    [
        np.array([b"ann", b"bob\0x", b""], dtype="S6"),
        np.arange(5, dtype=np.int64),
        np.zeros(3, dtype=np.dtype([("a", "i4"), ("b", "f8")])),
        np.array([b"12345678" * 2] * 3, dtype="V16"),
        np.array([], dtype="S4"),
        array("d", [1.0, 2.0]),
    ],
    ids=lambda rows: str(getattr(rows, "dtype", "array")),
)
def test_items_of_a_fixed_width(service: ServiceHandle, rows: Any) -> None:
    sealed = service.encrypt_column(rows)
    assert isinstance(sealed, Column)
    width = memoryview(rows).itemsize
    whole = bytes(memoryview(rows))
    assert list(service.decrypt_column(sealed)) == [
        whole[at : at + width] for at in range(0, len(whole), width)
    ]
    assert bytes(service.decrypt_column(sealed).data) == whole


def test_offsets_and_data(service: ServiceHandle) -> None:
    for kind in ("i", "q"):
        sealed = service.encrypt_column((array(kind, [0, 3, 3, 5]), b"annbo"))
        assert sealed.large == (kind == "q")
        assert list(service.decrypt_column((sealed.offsets, sealed.data))) == [b"ann", b"", b"bo"]
    nulls = service.encrypt_column((np.array([1, 3, 3, 5], np.int32), bytearray(b"xannbo"), b"\x05"))
    assert list(service.decrypt_column(nulls)) == [b"an", None, b"nb"]
    assert nulls.null_count == 1


@PLAIN
@given(
    chunks=st.lists(st.lists(st.one_of(st.none(), st.binary(max_size=40)), max_size=12), max_size=4),
    kind=st.sampled_from(
        [pa.binary(), pa.large_binary(), pa.binary_view(), pa.dictionary(pa.int16(), pa.binary())]
    ),
    cut=st.tuples(st.integers(0, 9), st.integers(0, 30)),
    threads=st.sampled_from([1, 2]),
    subjects=st.booleans(),
    context=st.booleans(),
)
def test_any_slice_of_any_chunks(
    service: ServiceHandle,
    chunks: list[list[bytes | None]],
    kind: Any,
    cut: tuple[int, int],
    threads: int,
    subjects: bool,
    context: bool,
) -> None:
    column = pa.chunked_array([pa.array(chunk, pa.binary()).cast(kind) for chunk in chunks], kind).slice(*cut)
    names = pa.array([f"user-{at % 3}" for at in range(len(column))]) if subjects else None
    contexts = column.cast(pa.binary()) if context else None
    sealed = service.encrypt_column(column, subjects=names, contexts=contexts, threads=threads)
    sealed.validate(full=True)
    assert list(map(len, sealed.chunks)) == list(map(len, column.chunks))
    opened = service.decrypt_column(sealed, contexts=contexts, threads=threads)
    assert opened.to_pylist() == column.to_pylist()


# ---- results -----------------------------------------------------------------------------------------------


def test_a_column_is_a_sequence_of_rows(service: ServiceHandle) -> None:
    column = service.decrypt_column(service.encrypt_column(Capsule(pa.array([b"a", None, b"ccc"]))))
    assert isinstance(column, Column)
    assert (len(column), column.null_count, column[-1], column[1]) == (3, 1, b"ccc", None)
    assert column[:2] == [b"a", None]
    assert column.nbytes == 4 * 4 + 4 + 1
    assert repr(column) == "<Column binary rows=3 nulls=1>"
    for index in (3, -4):
        with pytest.raises(IndexError):
            column[index]
    assert pa.array(column).to_pylist() == [b"a", None, b"ccc"]
    assert pl.Series(column).to_list() == [b"a", None, b"ccc"]
    assert pa.field(column).type == pa.binary()


def test_an_exported_column_outlives_it(service: ServiceHandle) -> None:
    exported = pa.array(service.encrypt_column(Capsule(pa.array([b"x" * 1000] * 1000))))
    assert service.decrypt_column(exported).to_pylist() == [b"x" * 1000] * 1000
    unused = service.encrypt_column(np.arange(3)).__arrow_c_array__()
    del unused


def test_out_is_used_again(service: ServiceHandle) -> None:
    rows = pa.array([b"r" * 64] * 1000)
    out = np.zeros(1000 * (64 + INLINE_OVERHEAD), np.uint8)
    for _ in range(2):
        sealed = service.encrypt_column(rows, out=out)
        assert sealed.buffers()[2].address == out.ctypes.data
        back = bytearray(64_000)
        assert service.decrypt_column(sealed, out=back).equals(rows)
        assert back == b"r" * 64_000


# ---- memory --------------------------------------------------------------------------------------------------


def test_large_results_do_not_lie_in_each_others_memory(service: ServiceHandle) -> None:
    """Memory of a sealed column is used again for the next one, and only once nobody has the first."""
    columns = [pa.array([bytes([number]) * 2**20] * 6) for number in range(4)]
    results: dict[int, list[Any]] = {number: [] for number in range(4)}

    def work(number: int) -> None:
        for _ in range(6):
            results[number].append(service.encrypt_column(columns[number]))
            if len(results[number]) == 3:
                del results[number][0]  # what comes next may take its place

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for number, kept in results.items():
        assert len(kept) == 2
        for sealed in kept:
            assert service.decrypt_column(sealed) == columns[number].cast(pa.binary())


MEMORY = """
import resource, sys, tempfile, tracemalloc
from array import array
from pathlib import Path
import openkcm
from openkcm.crypto import secret_memory_info
folder = Path(sys.argv[1])
core = openkcm.Core.open(f"sqlite:///{folder / 'vault.db'}")
core.link_tenant("acme", root=f"local:{folder / 'acme.root'}")
core.create_service("acme", "records")
service = openkcm.Gateway(core).service("acme", "records")

def resident():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

def measure(rows):
    offsets, data = array("i", range(0, 64 * rows + 1, 64)), bytes(64 * rows)
    sealed, opened = bytearray(220 * rows), bytearray(64 * rows)
    service.decrypt_column(service.encrypt_column((offsets[:5001], data), out=sealed), out=opened)
    before = resident()
    tracemalloc.start()
    column = service.encrypt_column((offsets, data), out=sealed)
    service.decrypt_column(column, out=opened)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    return peak, resident() - before

first, second = measure(200_000), measure(200_000)
# The Core's own threads work in the same process; resident memory only ever grows, so the first counts.
print(min(first[0], second[0]), first[1])
"""


def test_a_column_takes_its_result_and_little_more(tmp_path: Any) -> None:
    if not ON_FAST:
        pytest.skip("the promise is the native backend's; the Python backend has an object a record of a run")
    objects, pages = map(int, run_python(MEMORY, str(tmp_path)).stdout.split())
    assert objects < 64 * 1024
    # The offsets of both results, 4 bytes a row, are part of them; the rest is a thread's and the interpreter's.
    assert pages < 2 * 4 * 200_000 + 512 * 1024
