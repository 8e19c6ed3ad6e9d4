# SPDX-License-Identifier: Apache-2.0
"""The promise with a number on it: from a root's no to the last decrypt, under load, with the memory looked through.

A Core in a process of its own, on KMS keys that are disabled, denied or deleted at the provider while every tenant
decrypts one record a thousand times a second. All moments are CLOCK_MONOTONIC, which both processes share.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from attacker import read_vault
from scan import Patterns, scan_process

import openkcm
from openkcm.testing.aws import AWSKMS, AWSKey
from support import environment, url

CHILD = Path(__file__).with_name("unplug_child.py")
LEVERS: dict[str, Callable[[AWSKey], None]] = {
    "disabled": AWSKey.disable,
    "denied": AWSKey.deny,
    "deleted": AWSKey.delete,
}


class Loaded:
    """A child process under load."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.pid = process.pid
        self._process = process

    def report(self) -> dict[str, dict[str, Any]]:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        self._process.stdin.write("report\n")
        self._process.stdin.flush()
        answer: dict[str, dict[str, Any]] = json.loads(self._process.stdout.readline())
        return answer

    def wait(self, done: Callable[[dict[str, dict[str, Any]]], bool], seconds: float) -> None:
        end = time.monotonic() + seconds
        while not done(self.report()):
            assert time.monotonic() < end, self.report()
            time.sleep(0.05)


@contextmanager
def loaded(folder: Path, interval: float, tenants: list[str]) -> Iterator[Loaded]:
    process = subprocess.Popen(
        [sys.executable, str(CHILD), url(folder), str(interval), *tenants],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
        env=environment(),
    )
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        yield Loaded(process)
    finally:
        process.kill()
        process.communicate()


def make_tenants(folder: Path, provider: AWSKMS, names: list[str]) -> dict[str, AWSKey]:
    keys = {name: provider.make_key(name) for name in names}
    with openkcm.Core.open(url(folder)) as core:
        for name, key in keys.items():
            core.link_tenant(name, root=key.uri)
            core.create_service(name, "records")
    return keys


def secrets_of(folder: Path, keys: dict[str, AWSKey]) -> Patterns:
    """L2 and L3 of every tenant, read as nobody but customer, operator and provider together could."""

    def unwrap(uri: str, wrapped: bytes, context: dict[str, str]) -> bytes:
        key = next(key for key in keys.values() if key.uri == uri)
        bound = {f"openkcm:{name}": value for name, value in context.items()}
        return key.decrypt(wrapped[1:], bound)[0]

    found = read_vault(folder, unwrap)
    assert len(found.all_keys()) == 2 * len(keys)
    return Patterns(found.all_keys())


def root_acts(folder: Path) -> Counter[tuple[str, str]]:
    with openkcm.Core.open(url(folder)) as core:
        return Counter(
            (each.tenant, each.act) for each in core.audit_records() if each.act.startswith("root-")
        )


def rounds(
    folder: Path, interval: float, names: list[str], plan: list[dict[str, str]]
) -> dict[str, list[float]]:
    """Unplug and plug in rounds; each says by which lever each tenant is unplugged. Returns what was measured."""
    measured: dict[str, list[float]] = {"no to last": [], "lever to last": [], "lever to no": [], "back": []}
    with AWSKMS() as provider:
        keys = make_tenants(folder, provider, names)
        patterns = secrets_of(folder, keys)
        with loaded(folder, interval, names) as child:
            child.wait(lambda report: all(each["succeeded"] > 20 for each in report.values()), 60)
            for number, levers in enumerate(plan, 1):
                one_round(child, keys, levers, interval, patterns, measured)
                # Each tenant went dark once and came back once in each round: one event each, not one a probe.
                acts = root_acts(folder)
                for name in names:
                    assert acts[name, "root-dark"] == acts[name, "root-live"] == number
            assert all(set(each["errors"]) == {"TenantDark"} for each in child.report().values())
    return measured


def one_round(
    child: Loaded,
    keys: dict[str, AWSKey],
    levers: dict[str, str],
    interval: float,
    patterns: Patterns,
    measured: dict[str, list[float]],
) -> None:
    pulled: dict[str, float] = {}
    for name, key in keys.items():
        pulled[name] = time.monotonic()
        LEVERS[levers[name]](key)
    child.wait(
        lambda report: all(time.monotonic() - each["last"] > 0.5 for each in report.values()), interval + 30
    )
    # What is read now lies there now, half a second after the last success.
    hits, total = scan_process(child.pid, patterns)
    assert total > 20 * 2**20
    assert hits == 0
    report = child.report()
    for name, key in keys.items():
        assert key.first_no is not None
        last = report[name]["last"]
        measured["no to last"].append(last - key.first_no)
        measured["lever to last"].append(last - pulled[name])
        measured["lever to no"].append(key.first_no - pulled[name])
    plugged = time.monotonic()
    for key in keys.values():
        key.enable()
        key.allow()
    child.wait(lambda report: all(each["last"] > plugged for each in report.values()), interval + 30)
    measured["back"].append(time.monotonic() - plugged)


def show(measured: dict[str, list[float]]) -> str:
    lines = []
    for name, values in measured.items():
        ordered = sorted(values)
        lines.append(
            f"{name:<14} n {len(values):>4}  median {ordered[len(ordered) // 2]:7.3f} s  largest {ordered[-1]:7.3f} s"
        )
    return "\n".join(lines)


def test_each_no_is_dark_in_time_and_leaves_nothing_behind(tmp_path: Path) -> None:
    """Three tenants, each unplugged in each of the three ways; the long form is ``make soak``."""
    names = ["acme", "globex", "initech"]
    ways = list(LEVERS)
    plan = [{name: ways[(at + turn) % 3] for at, name in enumerate(names)} for turn in range(3)]
    measured = rounds(tmp_path, 1.0, names, plan)
    print(show(measured))
    # A busy machine is allowed for; what a quiet one measures is in docs/kill-switch.md.
    assert max(measured["lever to last"]) <= 1.0 + 1.0 + 2.0
    assert max(measured["no to last"]) <= 1.0


@pytest.mark.soak
@pytest.mark.parametrize("way", list(LEVERS))
def test_fifty_runs_at_the_default_interval(
    tmp_path: Path, way: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Fifty runs a lever: ten tenants, five rounds, 10 s between probes."""
    names = [f"t{number}" for number in range(10)]
    measured = rounds(tmp_path, 10.0, names, [dict.fromkeys(names, way)] * 5)
    with capsys.disabled():
        print(f"\n{way}\n{show(measured)}")
    assert len(measured["no to last"]) == 50
    assert max(measured["lever to last"]) <= 11.0
    assert max(measured["no to last"]) <= 11.0
    assert max(measured["back"]) <= 11.0


def unplugged_vault(folder: Path) -> tuple[openkcm.Core, list[bytes], Path]:
    """A vault, a thousand envelopes of it, and its root."""
    core = openkcm.Core.open(url(folder))
    core.link_tenant("acme", root=f"local:{folder / 'acme.root'}")
    core.create_service("acme", "records")
    with openkcm.Gateway(core) as gateway:
        blobs = gateway.service("acme", "records").encrypt_many([b"%d" % number for number in range(1000)])
    return core, blobs, folder / "acme.root"


def count_open(core: openkcm.Core, blobs: list[bytes]) -> tuple[int, set[str]]:
    """How many envelopes open, one by one, and which errors the others met."""
    errors = set()
    opened = 0
    with openkcm.Gateway(core) as gateway:
        service = gateway.service("acme", "records")
        for blob in blobs:
            try:
                service.decrypt(blob)
                opened += 1
            except openkcm.OpenKCMError as error:
                errors.add(type(error).__name__)
    return opened, errors


def test_all_but_the_root_opens_nothing(tmp_path: Path) -> None:
    core, blobs, root = unplugged_vault(tmp_path)
    core.close()
    root.rename(tmp_path / "away")
    with openkcm.Core.open(url(tmp_path), probe_interval=0.5) as fresh:
        assert count_open(fresh, blobs) == (0, {"TenantDark"})
        (tmp_path / "away").rename(root)
        plugged = time.monotonic()
        while count_open(fresh, blobs[:1])[0] == 0:
            assert time.monotonic() - plugged < 10
            time.sleep(0.01)
        assert count_open(fresh, blobs) == (1000, set())


def test_the_root_without_the_seal_key_opens_nothing(tmp_path: Path) -> None:
    core, blobs, _ = unplugged_vault(tmp_path)
    core.close()
    seal = tmp_path / "vault.seal"
    kept = seal.read_bytes()
    seal.unlink()
    with pytest.raises(openkcm.SealError):
        openkcm.Core.open(url(tmp_path))
    # Another seal key, and the check that would refuse it taken out of the way: the tenant key still does not open.
    seal.touch(0o600)
    seal.write_bytes(os.urandom(32))
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("openkcm.core.setup.check_seal", lambda *_: None)
        with openkcm.Core.open(url(tmp_path)) as forced:
            opened, errors = count_open(forced, blobs)
    assert opened == 0
    assert errors <= {"DecryptError", "TenantDark"}
    seal.write_bytes(kept)
    with openkcm.Core.open(url(tmp_path)) as core:
        assert count_open(core, blobs) == (1000, set())
