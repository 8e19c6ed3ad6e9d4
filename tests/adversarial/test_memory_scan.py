# SPDX-License-Identifier: Apache-2.0
"""A second process that knows every secret looks for L2, L3, the seal key and resting L4 keys in a Core under load."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from attacker import read_vault
from scan import Patterns, scan_file, scan_process

import openkcm
from support import ON_FAST, environment, make_vault, url

LOAD = """
import os, resource, sys, threading, traceback
resource.setrlimit(resource.RLIMIT_CORE, (resource.getrlimit(resource.RLIMIT_CORE)[1],) * 2)
os.chdir(sys.argv[2])
import openkcm
core = openkcm.Core.open(sys.argv[1])
gateway = openkcm.Gateway(core)
handles = [gateway.service(tenant, "records") for tenant in ("acme", "globex")]
planted = b"".join(bytes([number, 255 - number]) for number in range(16))
dark = threading.Event()

def work(handle):
    number = 0
    while True:
        number += 1
        try:
            blobs = handle.encrypt_many([b"record"] * 200)
            handle.decrypt_many(blobs)
            handle.decrypt(handle.encrypt(b"one", subject=f"s{number % 20}"))
            handle.encrypt(b"pooled")
            if number % 5 == 0:
                keys = openkcm.crypto.generate_keys(5)
                core.rewrap_keys(handle._service, core.wrap_keys(handle._service, keys, openkcm.Kind.INLINE))
            if number % 7 == 0 and handle is handles[1]:
                core._vault.ring.drop("globex")        # so that keys are opened again and again under load
        except openkcm.TenantDark:
            dark.wait(0.01)
        except BaseException:
            traceback.print_exc()
            os._exit(3)                                    # a scan of an idle process would prove nothing

threads = [threading.Thread(target=work, args=(handle,), daemon=True) for handle in handles]
for thread in threads:
    thread.start()
print("ready", flush=True)
for line in sys.stdin:
    if line == "kill\\n":
        core.kill("acme")
        core.kill("globex")
        print("killed", flush=True)
"""
PLANTED = b"".join(bytes([number, 255 - number]) for number in range(16))


@contextmanager
def loaded(folder: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that keeps a vault of two tenants busy."""
    make_vault(folder, "acme", "globex").close()
    process = subprocess.Popen(
        [sys.executable, "-c", LOAD, url(folder), str(folder)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env=environment(),
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        time.sleep(0.5)
        yield process
    finally:
        process.kill()
        process.communicate()


def cpu_seconds(pid: int) -> float:
    """How long a process has computed."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def test_nothing_is_found_in_a_core_under_load(tmp_path: Path) -> None:
    with loaded(tmp_path) as process:
        secrets = read_vault(tmp_path)
        assert len(secrets.all_keys()) == 4
        patterns = Patterns([*secrets.all_keys(), secrets.seal])
        hits = 0
        for _ in range(5):
            found, total = scan_process(process.pid, patterns)
            hits += found
            assert total > 20 * 2**20
        assert process.poll() is None, "the load ended by itself"
        assert cpu_seconds(process.pid) > 1, "the process was idle"
        # The scanner sees what is there to be seen.
        assert scan_process(process.pid, Patterns([PLANTED]))[0] > 0
        if ON_FAST:
            assert hits == 0
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write("kill\n")
        process.stdin.flush()
        assert process.stdout.readline() == "killed\n"
        killed = time.monotonic()
        # Nothing, on either backend. The scan may take longer than the second, but what it reads lies there now.
        if not ON_FAST:
            time.sleep(max(0.0, killed + 0.5 - time.monotonic()))
        found, _ = scan_process(process.pid, Patterns(secrets.all_keys()))
        assert found == 0
        assert time.monotonic() - killed < 5
    if not ON_FAST:
        pytest.skip(
            f"the Python backend promises nothing under load ({hits} copies of halves were found); none after the kill"
        )


def test_nothing_is_found_in_a_core_dump(tmp_path: Path) -> None:
    pattern = Path("/proc/sys/kernel/core_pattern").read_text().strip()
    hard = subprocess.run(
        ["sh", "-c", "ulimit -Hc"], capture_output=True, text=True, check=True
    ).stdout.strip()
    if pattern.startswith("|") or "/" in pattern or hard == "0":
        pytest.skip(
            f"not checked: this machine writes no core files here (core_pattern {pattern}, hard limit {hard})"
        )
    with loaded(tmp_path) as process:
        secrets = read_vault(tmp_path)
        assert process.poll() is None, "the load ended by itself"
        os.kill(process.pid, signal.SIGABRT)
        process.wait(60)
        dumps = [path for path in tmp_path.iterdir() if path.name.startswith("core")]
        assert len(dumps) == 1, [path.name for path in tmp_path.iterdir()]
        hits, total = scan_file(dumps[0], Patterns([*secrets.all_keys(), secrets.seal]))
        assert total > 10 * 2**20
        assert scan_file(dumps[0], Patterns([PLANTED]))[0] > 0
        if ON_FAST:
            assert hits == 0
    if not ON_FAST:
        pytest.skip(f"the Python backend promises nothing here; {hits} copies of halves were in the dump")


def test_resting_data_keys_are_not_found(tmp_path: Path) -> None:
    """Keys of the pool, before they are used; the test reads them out of its own secret memory to know them."""
    if not ON_FAST:
        pytest.skip("the Python backend promises nothing here")
    code = """
import sys, openkcm, openkcm.envelope
core = openkcm.Core.open(sys.argv[1])
gateway = openkcm.Gateway(core, pool=openkcm.PoolPolicy(seconds=3600))    # longer than a scan may take
handle = gateway.service("acme", "records")
handle.encrypt(b"x")
print(handle._pool.ready.wrapped.hex(), flush=True)
sys.stdin.readline()
"""
    make_vault(tmp_path).close()
    process = subprocess.Popen(
        [sys.executable, "-c", code, url(tmp_path)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    assert process.stdout is not None
    wrapped = bytes.fromhex(process.stdout.readline())
    secrets = read_vault(tmp_path)
    ((service_id, version),) = secrets.service_keys
    head = b"OKC\x01\x01\x01\x00\x00" + service_id + version.to_bytes(4, "big")
    keys = [secrets.data_key(head + wrapped[at : at + 72]) for at in range(0, len(wrapped), 72)]
    assert len(set(keys)) == 256
    # A few of them: each one searched for costs a pass over the process.
    hits, total = scan_process(process.pid, Patterns(keys[::16]))
    process.communicate("\n", timeout=30)
    assert total > 10 * 2**20
    assert hits == 0


def test_the_reader_opens_what_the_package_wrote(tmp_path: Path) -> None:
    """The formats page is true: an implementation that shares no code opens every layer."""
    with make_vault(tmp_path) as core, openkcm.Gateway(core) as gateway:
        handle = gateway.service("acme", "records")
        blobs = handle.encrypt_many([b"a", b"b"], context={"row": "7", "a": "ü"})
        secrets = read_vault(tmp_path)
        encoded = b"\x02\0\0\0\x01a\0\0\0\x02\xc3\xbc\0\0\0\x03row\0\0\0\x017"
        assert [secrets.open(blob, encoded) for blob in blobs] == [b"a", b"b"]
        core.rotate_service("acme", "records")
        core.rotate_tenant("acme")
        secrets = read_vault(tmp_path)
        assert secrets.open(handle.rewrap_many(blobs)[0], encoded) == b"a"
        assert secrets.open(handle.encrypt(b"c")) == b"c"
