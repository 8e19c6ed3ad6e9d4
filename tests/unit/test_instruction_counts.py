# SPDX-License-Identifier: Apache-2.0
"""The hot loops take as many instructions as they did: callgrind counts them, so no clock and no load matters."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

import instructions
from instructions import Counts, Dump

DUMP = """\
part: 1
desc: Trigger: Client Request: 10 encrypt
ob=(1) /x/openkcm/_fast/aead.so
fn=(1) seal
4 20
+1 30
cob=(2) /lib/libcrypto.so.3
cfi=(9) ???
cfn=(2) EVP_EncryptUpdate
calls=3 0
* 999
cfn=(3) count_up
calls=5 0
* 55

ob=(2)
fn=(2)
0 900
cfn=(4) EVP_inside
calls=7 0
* 100
ob=(3) /usr/lib/libpython3.11.so.1.0
fn=(5) PyBytes_FromStringAndSize
-2 70
"""


def test_a_dump_is_read_by_object_without_what_callees_cost() -> None:
    dump = instructions.read_dump(DUMP.splitlines())
    assert dump.own == {
        "/x/openkcm/_fast/aead.so": 50, "/lib/libcrypto.so.3": 900, "/usr/lib/libpython3.11.so.1.0": 70,
    }  # fmt: skip
    assert dump.libcrypto_calls == 3, (
        "calls within libcrypto, and those within the native layer, are not its callers'"
    )


def test_counts_are_for_one_record() -> None:
    name, counts = instructions.counts_of(instructions.read_dump(DUMP.splitlines()))
    assert name == "encrypt"
    assert counts == Counts(native=5.0, interpreter=7.0, libcrypto_calls=0.3, everything=102.0)


def test_a_dump_without_a_name_is_nobodys() -> None:
    assert instructions.read_dump(["part: 4", "desc: Trigger: Program termination"]) == Dump()


@pytest.mark.parametrize(
    ("native", "calls", "parts"), [(100, 14, 0), (106, 14, 1), (94, 14, 1), (100, 15, 1)]
)
def test_a_count_is_held_from_above_and_from_below(native: float, calls: float, parts: int) -> None:
    before = {"loop": {"native": 100.0, "interpreter": 300.0, "libcrypto_calls": 14.0, "everything": 900.0}}
    found = instructions.differences({"loop": Counts(native, 300.0, calls, 5000.0)}, before)
    assert len(found) == parts


def test_a_loop_that_came_or_went_is_a_difference() -> None:
    before = {"old": {"native": 1.0, "interpreter": 1.0, "libcrypto_calls": 1.0, "everything": 3.0}}
    assert instructions.differences({"new": Counts()}, before) == [
        "new: not counted before", "old: counted before, not now",
    ]  # fmt: skip


def test_the_hot_loops_take_as_many_instructions_as_they_did() -> None:
    if os.environ.get("OPENKCM_BACKEND") == "python":
        pytest.skip("the native layer's loops are counted, by the other backend's run")
    if shutil.which("valgrind") is None:
        pytest.skip("not counted: valgrind is not installed")
    if not Path("/usr/include/valgrind/callgrind.h").exists():
        pytest.skip("not counted: valgrind's headers are not installed")
    if os.environ.get("OPENKCM_SANITIZE"):
        pytest.skip("not counted: a sanitizer's build has instructions of its own")
    wanted = instructions.kept().get(instructions.here())
    if wanted is None:
        pytest.skip(
            f"no counts are kept for {instructions.here()}: python bench/instructions.py --renew keeps them"
        )
    found = instructions.differences(instructions.count(), wanted["counts"])
    assert not found, (
        "\n".join(found) + "\nIf this is meant, keep the new counts: python bench/instructions.py --renew"
    )
