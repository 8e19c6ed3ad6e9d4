# SPDX-License-Identifier: Apache-2.0
"""Fork: no nonce and no data key twice, and no child reads the parent's secret memory."""

from __future__ import annotations

import ctypes
import faulthandler
import multiprocessing
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from attacker import read_vault

import openkcm
from openkcm import crypto
from openkcm.errors import SecretMemoryError
from openkcm.gateway import DataKeyPolicy, PoolPolicy, ServiceHandle
from support import make_vault, refused, url

WORKERS = 8
RECORDS = 1_000_000 // (WORKERS + 1) + 1


def in_child(work: Callable[[], None]) -> int:
    """Fork and run; the child's pid."""
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            work()
            status = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(status)
    return pid


def wait(*pids: int) -> None:
    assert [os.waitpid(pid, 0)[1] for pid in pids] == [0] * len(pids)


def encrypt_into(handle: ServiceHandle, path: Path) -> None:
    """Encrypt in single calls and in batches; keep nonces and wrapped keys (the batch's key material) of each."""
    with path.open("wb") as file:
        for _ in range(1_000):
            file.write(handle.encrypt(b"x"))
        for start in range(1_000, RECORDS, 10_000):
            file.write(b"".join(handle.encrypt_many([b"x"] * min(10_000, RECORDS - start))))


def test_a_million_records_of_nine_processes(tmp_path: Path) -> None:
    """Eight forked workers and the parent go on from one warm Gateway.

    Nonces and data keys are compared for every record; an independent reader opens the data keys.
    """
    with make_vault(tmp_path) as core, openkcm.Gateway(core, pool=PoolPolicy(keys=4096)) as gateway:
        handle = gateway.service("acme", "records")
        handle.encrypt(b"warm")
        paths = [tmp_path / f"out-{number}" for number in range(WORKERS + 1)]
        children = [in_child(lambda path=path: encrypt_into(handle, path)) for path in paths[1:]]  # type: ignore[misc]
        encrypt_into(handle, paths[0])
        wait(*children)
        secrets = read_vault(tmp_path)
        nonces: set[bytes] = set()
        keys: set[bytes] = set()
        total = 0
        size = 157
        for path in paths:
            data = path.read_bytes()
            assert len(data) == RECORDS * size
            total += RECORDS
            nonces.update(data[at + 96 : at + 108] for at in range(0, len(data), size))
            keys.update(secrets.data_key(data[at : at + 96])[:16] for at in range(0, len(data), size))
        assert total >= 1_000_000
        assert (len(nonces), len(keys)) == (total, total)


def test_a_current_key_is_not_shared_with_a_child(tmp_path: Path) -> None:
    with make_vault(tmp_path) as core:
        handle = openkcm.Gateway(core, policy=DataKeyPolicy(records=1000)).service("acme", "records")
        first = handle.encrypt(b"x")
        wait(in_child(lambda: (tmp_path / "child").write_bytes(handle.encrypt(b"x")) and None))
        child = (tmp_path / "child").read_bytes()
        assert handle.encrypt(b"y")[24:96] == first[24:96]
        assert child[24:96] != first[24:96]
        assert handle.decrypt(child) == b"x"


def secret_mappings() -> list[tuple[int, int]]:
    """Where this process has memfd_secret mappings, without their guard pages."""
    spans = []
    for line in Path("/proc/self/maps").read_text().splitlines():
        if "secretmem" in line and " rw" in line:
            start, end = (int(part, 16) for part in re.match(r"([0-9a-f]+)-([0-9a-f]+)", line).groups())  # type: ignore[union-attr]
            spans.append((start, end))
    return spans


def test_a_child_cannot_read_the_parents_secret_memory() -> None:
    keys = crypto.generate_keys(100)
    if crypto.secret_memory_info()["kind"] != "memfd_secret":
        spans = []
    else:
        spans = secret_mappings()
        assert spans

    def use() -> None:
        refused(lambda: keys.select([0]), SecretMemoryError)
        refused(lambda: crypto.wrap_many(crypto.generate_wrapping_key(), keys, b""), SecretMemoryError)
        assert keys.wiped
        keys.wipe()

    wait(in_child(use))
    # And by address, past every check: there is nothing mapped.
    for start, _ in spans[:2]:
        pid = os.fork()
        if pid == 0:
            faulthandler.disable()  # the fault is wanted; no report of it
            ctypes.string_at(start + 64, 16)
            os._exit(0)
        status = os.waitpid(pid, 0)[1]
        assert os.WIFSIGNALED(status)
        assert os.WTERMSIG(status) == signal.SIGSEGV
    assert crypto.wrap_many(crypto.generate_wrapping_key(), keys, b"")
    if not spans:
        pytest.skip(
            "not checked by address: this kernel has no memfd_secret, so the mappings are not told apart"
        )


def test_no_descriptor_of_secret_memory_stays_open() -> None:
    crypto.generate_keys(10)
    links = []
    for name in os.listdir("/proc/self/fd"):
        try:
            links.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError:
            continue
    assert links
    assert not [link for link in links if "secretmem" in link]


def test_forking_while_threads_encrypt(tmp_path: Path) -> None:
    with make_vault(tmp_path) as core, openkcm.Gateway(core) as gateway:
        handle = gateway.service("acme", "records")
        stop = threading.Event()

        def work() -> None:
            while not stop.is_set():
                handle.decrypt_many(handle.encrypt_many([b"x"] * 100))
                handle.decrypt(handle.encrypt(b"x", subject="s"))

        def child() -> None:
            assert handle.decrypt(handle.encrypt(b"y")) == b"y"
            assert handle.decrypt(handle.encrypt(b"y", subject="s")) == b"y"

        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        try:
            for _ in range(12):
                wait(in_child(child))
        finally:
            stop.set()
            for thread in threads:
                thread.join(30)


def test_a_fork_from_a_thread_and_a_grandchild(tmp_path: Path) -> None:
    with make_vault(tmp_path) as core, openkcm.Gateway(core) as gateway:
        handle = gateway.service("acme", "records")
        blob = handle.encrypt(b"x")

        def grandchild() -> None:
            assert handle.decrypt(blob) == b"x"

        def child() -> None:
            assert handle.decrypt(blob) == b"x"
            wait(in_child(grandchild))

        seen: list[int] = []
        thread = threading.Thread(target=lambda: seen.append(in_child(child)))
        thread.start()
        thread.join(60)
        wait(*seen)
        assert len(seen) == 1


def _elsewhere(location: str, blob: bytes) -> bytes:
    with openkcm.Core.open(location) as core, openkcm.Gateway(core) as gateway:
        return gateway.service("acme", "records").decrypt(blob)


def test_multiprocessing(tmp_path: Path) -> None:
    with make_vault(tmp_path) as core, openkcm.Gateway(core) as gateway:
        blob = gateway.service("acme", "records").encrypt(b"x")
        for method in ("fork", "spawn"):
            with multiprocessing.get_context(method).Pool(2) as pool:
                assert pool.starmap(_elsewhere, [(url(tmp_path), blob)] * 4) == [b"x"] * 4


def test_a_kill_reaches_a_forked_child(tmp_path: Path) -> None:
    with make_vault(tmp_path) as core, openkcm.Gateway(core) as gateway:
        handle = gateway.service("acme", "records")
        blob = handle.encrypt(b"x")
        ready, go = os.pipe(), os.pipe()

        def child() -> None:
            assert handle.decrypt(blob) == b"x"
            handle.encrypt(b"warm")
            os.write(ready[1], b"x")
            os.read(go[0], 1)
            # The parent has killed: within a second neither direction works here.
            deadline = time.monotonic() + 1
            while time.monotonic() < deadline:
                try:
                    handle.encrypt(b"y")
                except openkcm.TenantDark:
                    break
                time.sleep(0.01)
            refused(lambda: handle.encrypt(b"y"), openkcm.TenantDark)
            refused(lambda: handle.decrypt(blob), openkcm.TenantDark)

        pid = in_child(child)
        os.read(ready[0], 1)
        core.kill("acme")
        os.write(go[1], b"x")
        wait(pid)
        for end in (*ready, *go):
            os.close(end)
