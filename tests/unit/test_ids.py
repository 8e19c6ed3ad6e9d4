# SPDX-License-Identifier: Apache-2.0
"""Sets of data key ids, of either backend: they are what a Python set of the same ids is."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openkcm import crypto
from openkcm.errors import InvalidInput

# Few values, so that members are met and repeated; and some that differ in a single byte at either end.
IDS = st.lists(
    st.builds(lambda a, b: bytes([a]) + bytes(14) + bytes([b]), st.integers(0, 5), st.integers(0, 5)),
    max_size=40,
)


@given(members=IDS, asked=IDS)
def test_it_is_a_set(members: list[bytes], asked: list[bytes]) -> None:
    ids = crypto.IdSet(b"".join(members))
    assert len(ids) == len(set(members))
    assert ids.ids == b"".join(members)
    assert ids.positions(b"".join(asked)) == [at for at, each in enumerate(asked) if each in members]
    assert ids.missing(b"".join(asked)) == b"".join([each for each in asked if each not in members])


def test_a_large_one() -> None:
    members, others = crypto.random_bytes(16 * 100_000), crypto.random_bytes(16 * 100_000)
    ids = crypto.IdSet(members)
    assert ids.positions(others + members) == list(range(100_000, 200_000))
    assert ids.missing(members + others) == others


@pytest.mark.parametrize("size", [1, 15, 17, 31])
def test_ids_have_16_bytes(size: int) -> None:
    with pytest.raises(InvalidInput, match="16 bytes each"):
        crypto.IdSet(bytes(size))
    for ask in (crypto.IdSet(bytes(16)).positions, crypto.IdSet(b"").missing):
        with pytest.raises(InvalidInput, match="16 bytes each"):
            ask(bytes(size))


def test_it_takes_bytes_alone() -> None:
    with pytest.raises(TypeError):
        crypto.IdSet(bytearray(16))  # type: ignore[arg-type]
    with pytest.raises(TypeError):
        crypto.IdSet(None)  # type: ignore[arg-type]
