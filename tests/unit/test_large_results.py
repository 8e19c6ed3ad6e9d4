# SPDX-License-Identifier: Apache-2.0
"""Large results cost what the cipher costs, and not what the system takes to give memory for each page of them."""

from __future__ import annotations

import os
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
