# SPDX-License-Identifier: Apache-2.0
"""Large results cost what the cipher costs, and not what the system takes to give memory for each page of them."""

from __future__ import annotations

import os
import platform
import sysconfig
import textwrap
from pathlib import Path

import pytest

from openkcm import crypto
from support import run_python

LARGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")

FAULTS = """
import resource, tempfile
from pathlib import Path
import openkcm
from support import open_service

def faults(act):
    act()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    act()
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

with tempfile.TemporaryDirectory() as folder, open_service(Path(folder)) as service:
    {prepare}
    print(faults(lambda: {act}))
"""

# A megabyte has 256 pages.
sanitized = pytest.mark.skipif(
    os.environ.get("OPENKCM_SANITIZE") == "1", reason="the sanitizer's allocator is not the C library's"
)
in_large_pages = pytest.mark.skipif(
    not LARGE_PAGES.exists() or "[never]" in LARGE_PAGES.read_text(),
    reason="this system gives no large pages (transparent_hugepage/enabled)",
)
native = pytest.mark.skipif(
    crypto.backend_info()["backend"] != "fast",
    reason="the Python backend has no say in where its results lie",
)


def faults_of(act: str, prepare: str = "pass") -> int:
    return int(run_python(FAULTS.format(act=act, prepare=prepare)).stdout)


@sanitized
def test_a_list_lies_where_the_one_before_lay() -> None:
    records = "records = [bytes(1 << 20)] * 16"
    assert faults_of("service.encrypt_many(records)", records) < 1000
    assert (
        faults_of("service.decrypt_many(blobs)", f"{records}; blobs = service.encrypt_many(records)") < 1000
    )


@sanitized
@native
@in_large_pages
def test_what_is_larger_lies_in_large_pages() -> None:
    record = "record = bytes(64 << 20)"
    assert faults_of("service.encrypt(record)", record) < 8000
    assert faults_of("service.decrypt(blob)", f"{record}; blob = service.encrypt(record)") < 8000
    kept = "records = [bytes(1 << 20)] * 32; kept = []"
    assert faults_of("kept.append(service.encrypt_many(records))", kept) < 5000


WHERE = """
import os, tempfile
from pathlib import Path
from support import open_service

def in_heap(blob):
    for line in Path("/proc/self/maps").read_text().splitlines():
        low, high = (int(end, 16) for end in line.split()[0].split("-"))
        if low <= id(blob) < high:
            return line.endswith("[heap]")

with tempfile.TemporaryDirectory() as folder, open_service(Path(folder)) as service:
    record = os.urandom(40 << 20)
{act}
"""

# The interpreter without the lock has an allocator of its own.
in_the_heap = pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc" or bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    reason="large objects do not come from glibc's heap here",
)


def where(act: str, **environment: str) -> list[str]:
    return run_python(
        WHERE.format(act=textwrap.indent(textwrap.dedent(act), "    ")), **environment
    ).stdout.split()


@sanitized
@native
@in_the_heap
def test_a_large_record_lies_where_the_one_before_lay() -> None:
    again = """
    for _ in range(3):
        blob = service.encrypt(record)
        assert service.decrypt(blob) == record
        print(id(blob), in_heap(blob))
        del blob
    """
    places = where(again)
    assert places[1::2] == ["True"] * 3
    assert places[2] == places[4]


@sanitized
@native
@in_the_heap
@pytest.mark.parametrize(
    "setting",
    [{"MALLOC_TRIM_THRESHOLD_": "131072"}, {"GLIBC_TUNABLES": "glibc.malloc.mmap_max=4096"}],
    ids=lambda setting: next(iter(setting)),
)
def test_settings_of_the_heap_stand(setting: dict[str, str]) -> None:
    assert where("print(in_heap(service.encrypt(record)))", **setting) == ["False"]


@sanitized
@native
@in_the_heap
def test_other_threads_have_no_heap_for_a_large_record() -> None:
    act = """
    from concurrent.futures import ThreadPoolExecutor
    with ThreadPoolExecutor(1) as pool:
        blob = pool.submit(service.encrypt, record).result()
        print(in_heap(blob), service.decrypt(blob) == record)
    """
    assert where(act) == ["False", "True"]
