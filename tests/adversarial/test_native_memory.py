# SPDX-License-Identifier: Apache-2.0
"""The secret-memory allocator attacked from inside its own process and from another one, on both backends."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
from pathlib import Path

import attacker
import probe
import pytest
from cryptography.exceptions import InvalidTag

from openkcm import crypto
from openkcm.errors import SecretMemoryError
from support import refused

KNOWN = bytes(range(100, 132))
KIND = crypto.secret_memory_info()["kind"]

PRELUDE = """
import os, sys
import probe
from openkcm import crypto
KNOWN = bytes(range(100, 132))
"""


# ---- where it lies ---------------------------------------------------------------------------------------


def test_a_key_is_only_in_locked_memory_out_of_dumps_and_forks() -> None:
    keys = crypto.import_keys(KNOWN)
    places = probe.find(KNOWN)
    assert len(places) == 1
    (home,) = [each for each in probe.regions() if each.start <= places[0] < each.end]
    assert {"lo", "dd", "dc"} <= home.flags
    assert ("secretmem" in home.name) == (KIND == "memfd_secret")
    del keys


def test_guard_pages_stand_before_and_after_each_region() -> None:
    held = [crypto.generate_keys(5_000) for _ in range(4)]
    everything = probe.mappings()
    guards = {each.end: each for each in everything} | {-each.start: each for each in everything}
    found = probe.regions()
    assert len(found) >= 2
    for region in found:
        for guard in (guards[region.start], guards[-region.end]):
            assert guard.permissions[:3] == "---"
            assert guard.end - guard.start >= os.sysconf("SC_PAGESIZE")
    del held


@pytest.mark.parametrize("touch", ["peek(region.start - 1, 1)", "poke(region.end, b'x')"])
def test_touching_a_guard_page_ends_the_process(touch: str) -> None:
    code = f"keys = crypto.import_keys(KNOWN); region = probe.regions()[0]; print('there', flush=True); probe.{touch}"
    done = probe.attempt(PRELUDE + code)
    assert done.stdout == "there\n"
    assert done.returncode == -signal.SIGSEGV


def test_every_byte_inside_a_region_can_be_touched() -> None:
    """The counterpart of the guard pages: they, and nothing else, made the process end."""
    probe.run(
        PRELUDE + "keys = crypto.import_keys(KNOWN)\nfor region in probe.regions():\n"
        "    probe.poke(region.end - 1, b'x'); probe.peek(region.start, region.end - region.start)"
    )


def test_no_descriptor_is_left_open() -> None:
    code = """
before = sorted(os.listdir("/proc/self/fd"))
held = [crypto.generate_keys(9_000) for _ in range(8)] + [crypto.generate_wrapping_key() for _ in range(50)]
assert len(probe.regions()) >= 8
assert sorted(os.listdir("/proc/self/fd")) == before
"""
    probe.run(PRELUDE + code)


def test_another_process_cannot_read_it() -> None:
    if KIND != "memfd_secret":
        pytest.skip("not checked: this kernel has no memfd_secret, so root can read locked memory of others")
    code = """
keys = crypto.import_keys(KNOWN)
plain = bytearray(KNOWN)
print(probe.find(KNOWN)[0], probe.ctypes.addressof(probe.ctypes.c_char.from_buffer(plain)), flush=True)
sys.stdin.readline()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=probe.child_environment(),
    )
    try:
        assert process.stdout is not None
        secret, plain = (int(word) for word in process.stdout.readline().split())
        with open(f"/proc/{process.pid}/mem", "rb", buffering=0) as memory:
            # The way works, for what is not secret.
            memory.seek(plain)
            assert memory.read(32) == KNOWN
            for address in (secret, secret & ~0xFFF):
                memory.seek(address)
                with pytest.raises(OSError, match="Input/output error"):
                    memory.read(32)
    finally:
        process.communicate("\n", timeout=60)


def test_a_forked_child_has_no_mapping_and_cannot_hand_it_to_the_kernel() -> None:
    keys = crypto.import_keys(KNOWN)
    (address,) = probe.find(KNOWN)
    code_to_status = {"mapped": 3, "written": 4}
    pid = os.fork()
    if pid == 0:
        status = 1
        try:
            if any(each.start <= address < each.end for each in probe.mappings()):
                status = code_to_status["mapped"]
            else:
                reader, writer = os.pipe()
                written = probe._libc.write(writer, probe.ctypes.c_void_p(address), 32)
                status = code_to_status["written"] if written > 0 else 0
                if status == 0 and probe.ctypes.get_errno() != 14:  # EFAULT
                    status = 5
                os.close(reader)
        finally:
            os._exit(status)
    assert os.waitpid(pid, 0)[1] == 0
    # And plainly by address.
    pid = os.fork()
    if pid == 0:
        probe.crash_quietly()
        probe.peek(address, 32)
        os._exit(0)
    status = os.waitpid(pid, 0)[1]
    assert os.WIFSIGNALED(status)
    assert os.WTERMSIG(status) == signal.SIGSEGV
    assert probe.find(KNOWN) == [address]
    del keys


# ---- overwriting -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("offset", [-1, -16, 32, 47])
@pytest.mark.parametrize("end", ["keys.wipe()", "del keys"])
def test_an_overwritten_canary_aborts(offset: int, end: str) -> None:
    code = f"""
keys = crypto.import_keys(KNOWN)
(address,) = probe.find(KNOWN)
old = probe.peek(address + {offset}, 1)
probe.poke(address + {offset}, bytes([old[0] ^ 1]))
print("there", flush=True)
{end}
"""
    done = probe.attempt(PRELUDE + code)
    assert done.stdout == "there\n"
    assert done.returncode == -signal.SIGABRT
    assert "secret memory was overwritten" in done.stderr


def test_canaries_are_not_the_same_in_two_processes() -> None:
    code = "keys = crypto.import_keys(KNOWN)\nprint(probe.peek(probe.find(KNOWN)[0] - 16, 16).hex())"
    assert len({probe.run(PRELUDE + code).stdout for _ in range(2)}) == 2


# ---- wiping ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("end", ["keys.wipe()", "del keys", "keys = None; import gc; gc.collect()"])
@pytest.mark.parametrize("make", ["import_keys", "import_wrapping_key"])
def test_nothing_stays_in_a_region_whose_keys_are_gone(make: str, end: str) -> None:
    """Keys, key schedules and canaries; so whoever gets the place next finds zeros."""
    code = f"""
keys = crypto.{make}(KNOWN)
assert len(probe.find(KNOWN)) == 1
{end}
(region,) = probe.regions()
assert probe.peek(region.start, region.end - region.start) == bytes(region.end - region.start)
"""
    probe.run(PRELUDE + code)


def test_a_process_that_ends_zeroes_what_is_open() -> None:
    """The first exit handler that C has runs last: it waits, and another process looks."""
    code = """
import probe
probe._libc.__cxa_atexit(probe._libc.pause, None, None)
probe.deny_memfd_secret(38)                     # so that the other process can look
from openkcm import crypto
KNOWN = bytes(range(100, 132))
keys, parent = crypto.import_keys(KNOWN), crypto.import_wrapping_key(KNOWN)
print(*probe.find(KNOWN), flush=True)
import sys
sys.stdin.readline()
"""
    process = subprocess.Popen(
        [sys.executable, "-c", code],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=probe.child_environment(),
    )
    try:
        assert process.stdout is not None
        assert process.stdin is not None
        addresses = [int(word) for word in process.stdout.readline().split()]
        assert len(addresses) == 2
        with open(f"/proc/{process.pid}/mem", "rb", buffering=0) as memory:

            def read() -> list[bytes]:
                return [memory.seek(address) and memory.read(32) for address in addresses]

            assert read() == [KNOWN, KNOWN]
            process.stdin.write("\n")
            process.stdin.flush()
            probe.wait_until(lambda: read() == [bytes(32), bytes(32)], 30)
            assert process.poll() is None
    finally:
        process.kill()
        process.communicate()


# ---- many ------------------------------------------------------------------------------------------------


def wrapped_key(parent: crypto.WrappingKey, keys: crypto.SecretKeys, position: int) -> bytes:
    """The plaintext of one key, through an independent implementation; the parent is KNOWN."""
    blob = crypto.wrap_many(parent, keys, b"")
    return attacker.unwrap(KNOWN, blob[72 * position : 72 * position + 72], b"")


def test_thousands_of_handles_of_all_sizes_keep_apart() -> None:
    generator = random.Random(2)
    parent = crypto.import_wrapping_key(KNOWN)
    before = crypto.secret_memory_info()["handles"]
    held: list[tuple[bytes, crypto.SecretKeys]] = []
    for _ in range(4_000):
        count = generator.choice((1, 1, 1, 2, 3, 7, 40))
        material = generator.randbytes(32 * count)
        held.append((material, crypto.import_keys(material)))
        if len(held) > 500 and generator.random() < 0.6:
            # Some by wiping, some by letting go.
            _, keys = held.pop(generator.randrange(len(held)))
            if generator.random() < 0.5:
                keys.wipe()
    for material, keys in generator.sample(held, 400):
        position = generator.randrange(len(keys))
        assert wrapped_key(parent, keys, position) == material[32 * position :][:32]
    assert crypto.secret_memory_info()["handles"] == before + len(held)
    held.clear()
    del keys
    info = crypto.secret_memory_info()
    assert info["handles"] == before
    assert info["idle_bytes"] <= 2**20 + 2**18


def test_the_largest_batches_come_and_go() -> None:
    for _ in range(20):
        keys = crypto.generate_keys(16_384)
        assert len(keys) == 16_384
    keys.wipe()
    assert crypto.secret_memory_info()["idle_bytes"] <= 2**20 + 2**19


# ---- races -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("victim", ["parent", "keys"])
def test_a_wipe_in_mid_use_never_yields_a_result_under_a_zeroed_key(victim: str) -> None:
    count = 300
    material = random.Random(3).randbytes(32 * count)
    results: list[bytes] = []
    for _ in range(25):
        parent, keys = crypto.import_wrapping_key(KNOWN), crypto.import_keys(material)
        started = probe.threading.Event()

        def use(
            parent: crypto.WrappingKey = parent,
            keys: crypto.SecretKeys = keys,
            started: probe.threading.Event = started,
        ) -> None:
            mine: list[bytes] = []
            try:
                while True:
                    mine.append(crypto.wrap_many(parent, keys, b""))
                    started.set()
            except SecretMemoryError as error:
                assert "wiped" in str(error)
            results.extend(mine[-2:])

        def wipe(
            parent: crypto.WrappingKey = parent,
            keys: crypto.SecretKeys = keys,
            started: probe.threading.Event = started,
        ) -> None:
            assert started.wait(30)
            chosen = parent if victim == "parent" else keys
            chosen.wipe()
            assert chosen.wiped
            refused(lambda: crypto.wrap_many(parent, keys, b""), SecretMemoryError)

        probe.together(use, use, use, wipe, wipe)
        parent.wipe()
        keys.wipe()
    assert len(results) > 25
    for blob in results:
        for at in (0, count - 1):
            assert (
                attacker.unwrap(KNOWN, blob[72 * at : 72 * at + 72], b"") == material[32 * at : 32 * at + 32]
            )


def test_handles_made_and_let_go_by_many_threads_keep_apart() -> None:
    def work(seed: int) -> None:
        generator = random.Random(seed)
        parent = crypto.import_wrapping_key(KNOWN)
        held: list[tuple[bytes, crypto.SecretKeys]] = []
        for _ in range(300):
            material = generator.randbytes(32 * generator.choice((1, 2, 9)))
            held.append((material, crypto.import_keys(material)))
            material, keys = held[generator.randrange(len(held))]
            assert wrapped_key(parent, keys, len(keys) - 1) == material[-32:]
            if len(held) > 20:
                held.pop(generator.randrange(len(held)))[1].wipe()

    probe.together(*[lambda seed=seed: work(seed) for seed in range(6)])  # type: ignore[misc]


def test_a_zero_key_opens_nothing_that_a_race_sealed() -> None:
    """Guards the checks above: they would see a batch under a zeroed parent."""
    parent = crypto.import_wrapping_key(bytes(32))
    blob = crypto.wrap_many(parent, crypto.import_keys(KNOWN), b"")
    assert attacker.unwrap(bytes(32), blob, b"") == KNOWN
    with pytest.raises(InvalidTag):
        attacker.unwrap(KNOWN, blob, b"")


# ---- exhaustion ------------------------------------------------------------------------------------------

HOARD = """
from openkcm.errors import SecretMemoryError
def hoard(count=2000):
    held = []
    while True:
        try:
            held.append(crypto.generate_keys(count))
        except SecretMemoryError as error:
            assert type(error) is SecretMemoryError and error.code == "secret_memory"
            return held, str(error)
"""


def test_exhaustion_in_an_unprivileged_process() -> None:
    code = """
probe.limit_locked_memory(1024 * 1024)
parent = crypto.import_wrapping_key(KNOWN)
first = crypto.import_keys(KNOWN)
held, message = hoard()
assert len(held) >= 3, len(held)
for part in ("RLIMIT_MEMLOCK", "1024 KiB", "ulimit -l", "LimitMEMLOCK=", "--ulimit memlock="):
    assert part in message, message
info = crypto.secret_memory_info()
assert info["limit_bytes"] == 1024 * 1024 and info["locked_bytes"] <= 1024 * 1024
# Not an unlocked byte was handed out: all that is mapped is locked.
assert sum(region.end - region.start for region in probe.regions()) == info["locked_bytes"]
# What was open keeps working, small things still fit, and room that is given back is used again.
import attacker
assert attacker.unwrap(KNOWN, crypto.wrap_many(parent, first, b""), b"") == KNOWN
assert crypto.wrap_many(parent, held[0], b"") and crypto.wrap_many(parent, held[-1], b"")
held.pop().wipe()
held.append(crypto.generate_keys(2000))
again, message = hoard()
assert not again and "RLIMIT_MEMLOCK" in message
held.clear()
held, message = hoard()
assert len(held) >= 3
"""
    probe.run(PRELUDE + HOARD + code)


def test_no_lockable_memory_at_all() -> None:
    code = """
probe.limit_locked_memory(0)
for make in (lambda: crypto.generate_keys(1), crypto.generate_wrapping_key, lambda: crypto.import_keys(KNOWN)):
    try:
        make()
    except SecretMemoryError as error:
        assert "the limit (RLIMIT_MEMLOCK) is 0 KiB" in str(error), error
    else:
        raise AssertionError("a key was made in unlocked memory")
assert not probe.regions()
"""
    probe.run(PRELUDE + HOARD + code)


def test_exhaustion_through_core_and_gateway(tmp_path: Path) -> None:
    code = """
from pathlib import Path
import openkcm
from support import make_vault, refused, url
folder = Path(sys.argv[1])
core = make_vault(folder, "acme", "globex")
gateway = openkcm.Gateway(core)
acme, globex = (gateway.service(name, "records") for name in ("acme", "globex"))
blob, named, cold = acme.encrypt(b"x"), acme.encrypt(b"y", subject="s"), globex.encrypt(b"z")
globex.wipe()
probe.limit_locked_memory(2 * 1024 * 1024)
held, message = hoard()
while True:                                     # the last gaps too
    try:
        held.append(crypto.generate_keys(1))
    except SecretMemoryError:
        break
for use in (
    lambda: acme.encrypt_many([b"x"] * 16_000),
    lambda: acme.decrypt(blob),
    lambda: acme.decrypt(named),
    lambda: acme.encrypt(b"new", subject="t"),
    lambda: globex.encrypt(b"needs a pool"),
    lambda: core.create_service("acme", "more"),
    lambda: core.rotate_service("acme", "records"),
    lambda: openkcm.Core.open(url(folder)),
):
    error = refused(use, SecretMemoryError)
    assert "RLIMIT_MEMLOCK" in str(error), error
# The warm pool needs no memory.
more = [acme.encrypt(b"m%d" % number) for number in range(50)]
held.clear()
assert acme.decrypt_many([blob, named, *more]) == [b"x", b"y"] + [b"m%d" % number for number in range(50)]
assert globex.decrypt(cold) == b"z" and len(acme.encrypt_many([b"x"] * 16_000)) == 16_000
assert acme.decrypt(acme.encrypt(b"new", subject="t")) == b"new"
core.create_service("acme", "more")
assert core.rotate_service("acme", "records") == 2
assert core.verify_audit() is None
core.kill("acme")
refused(lambda: acme.decrypt(blob), openkcm.TenantDark)
"""
    probe.run(PRELUDE + HOARD + code, str(tmp_path))


# ---- weaker kernels and starved processes ---------------------------------------------------------------


@pytest.mark.parametrize("number", [38, 1])  # ENOSYS: an old kernel; EPERM: a container's filter
def test_without_memfd_secret_memory_is_locked_all_the_same(number: int) -> None:
    code = f"""
probe.deny_memfd_secret({number})
parent, keys = crypto.import_wrapping_key(KNOWN), crypto.import_keys(KNOWN)
info = crypto.backend_info()
assert info["secret_memory"]["kind"] == "mlock"
assert any("memfd_secret" in note for note in info["notes"])
(region,) = probe.regions()
assert "secretmem" not in region.name
neighbours = [each for each in probe.mappings() if region.start in (each.end,) or region.end == each.start]
assert [each.permissions[:3] for each in neighbours] == ["---", "---"]
assert crypto.wrap_many(parent, keys, b"")
probe.limit_locked_memory(512 * 1024)
held, message = hoard()
assert "512 KiB" in message
"""
    probe.run(PRELUDE + HOARD + code)


def test_no_file_handle_left_is_no_reason_for_weaker_memory() -> None:
    code = """
taken = probe.use_up_file_handles()
try:
    crypto.generate_keys(1)
except SecretMemoryError as error:
    assert "RLIMIT_NOFILE" in str(error), error
else:
    raise AssertionError("no memfd_secret could be made, so where is the key?")
for descriptor in taken:
    os.close(descriptor)
keys = crypto.generate_keys(1)
assert crypto.secret_memory_info()["kind"] == "memfd_secret"
"""
    if KIND != "memfd_secret":
        pytest.skip("not checked: this kernel has no memfd_secret")
    probe.run(PRELUDE + HOARD + code)
