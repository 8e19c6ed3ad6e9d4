# SPDX-License-Identifier: Apache-2.0
"""The process that gets killed: it changes a vault and tells each act, before and after, in one line of JSON.

Usage: ``crash_child.py loop FOLDER SEED`` acts until it is killed; ``crash_child.py open FOLDER START STRIDE``
makes a new vault again and again, killing itself at another call into the system each time.
"""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import openkcm
from openkcm.keys import TenantState

TENANTS = tuple(f"tenant{number}" for number in range(5))
SERVICES = ("first", "second")
SUBJECTS = tuple(f"person{number}" for number in range(4))
CONTEXT = {"table": "crashes"}
MARK = b"plaintext of the crash test "

CALLS = frozenset({"open", "close", "execute", "fsync", "link", "unlink", "write", "connect", "fetchone"})


def tell(**words: Any) -> None:
    """One line, in one write, on standard output."""
    os.write(1, json.dumps(words).encode() + b"\n")


def data_of(number: int) -> bytes:
    """The plaintext of a number."""
    return MARK + random.Random(number).randbytes(number % 300)


def root_of(folder: Path, tenant: str, turn: str = "") -> str:
    """A development root of a tenant."""
    return f"local:{folder / f'{tenant}{turn}.root'}"


class Worker:
    """Does one act at a time, each with what the vault then allows."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.random = random.Random(seed)
        self.core = openkcm.Core.open(f"sqlite:///{folder / 'vault.db'}", poll_interval=0.05)
        self.gateway = openkcm.Gateway(self.core)
        self.recent: list[tuple[str, str, str]] = []

    def step(self) -> None:
        """Choose a tenant and do to it what its state allows."""
        tenant = self.random.choice(TENANTS)
        found = {each.tenant: each for each in self.core.status()}.get(tenant)
        if found is None:
            act: Callable[[str], None] = self.link
        elif found.state is TenantState.DARK:
            act = self.restore
        elif not found.services or (len(found.services) < len(SERVICES) and self.random.random() < 0.5):
            act = self.create
        else:
            act = self.random.choice(self.acts)
        act(tenant)

    def said(self, act: str, **words: Any) -> dict[str, Any]:
        tell(begin=act, **words)
        return {"done": act, **words}

    def link(self, tenant: str) -> None:
        done = self.said("link", tenant=tenant)
        self.core.link_tenant(tenant, root=root_of(self.folder, tenant))
        tell(**done)

    def create(self, tenant: str) -> None:
        there = {each.service for each in self.core.list_services(tenant)}
        name = next(each for each in SERVICES if each not in there)
        done = self.said("create", tenant=tenant, service=name)
        made = self.core.create_service(tenant, name)
        tell(**done, id=made.service_id.hex())

    def kill(self, tenant: str) -> None:
        done = self.said("kill", tenant=tenant)
        self.core.kill(tenant, "a drill")
        tell(**done)

    def restore(self, tenant: str) -> None:
        done = self.said("restore", tenant=tenant)
        self.core.restore(tenant)
        tell(**done)

    def unlink(self, tenant: str) -> None:
        if self.random.random() > 0.2:
            return
        done = self.said("unlink", tenant=tenant)
        self.core.unlink(tenant)
        tell(**done)

    def rotate_tenant(self, tenant: str) -> None:
        done = self.said("rotate-tenant", tenant=tenant)
        tell(**done, version=self.core.rotate_tenant(tenant))

    def replace_root(self, tenant: str) -> None:
        root = root_of(self.folder, tenant, self.random.choice(("", ".next")))
        done = self.said("replace-root", tenant=tenant, root=root)
        self.core.replace_root(tenant, root)
        tell(**done)

    def rotate(self, tenant: str) -> None:
        name = self.some_service(tenant)
        done = self.said("rotate", tenant=tenant, service=name)
        tell(**done, version=self.core.rotate_service(tenant, name))

    def encrypt(self, tenant: str) -> None:
        name = self.some_service(tenant)
        subject = self.random.choice((None, *SUBJECTS, *SUBJECTS))
        number = self.random.getrandbits(40)
        done = self.said("encrypt", tenant=tenant, service=name, subject=subject, number=number)
        blob = self.gateway.service(tenant, name).encrypt(data_of(number), context=CONTEXT, subject=subject)
        tell(**done, blob=blob.hex())

    def rewrap_subjects(self, tenant: str) -> None:
        name = self.some_service(tenant)
        done = self.said("rewrap", tenant=tenant, service=name)
        self.gateway.service(tenant, name).rewrap_subjects()
        tell(**done)

    def shred(self, tenant: str) -> None:
        name, subject = self.some_service(tenant), self.random.choice(SUBJECTS)
        done = self.said("shred", tenant=tenant, service=name, subject=subject)
        self.gateway.service(tenant, name).shred(subject)
        tell(**done)

    def some_service(self, tenant: str) -> str:
        return self.random.choice([each.service for each in self.core.list_services(tenant)])

    @property
    def acts(self) -> tuple[Callable[[str], None], ...]:
        return (
            *(self.encrypt,) * 8,
            *(self.shred,) * 3,
            *(self.rotate, self.kill) * 2,
            self.rewrap_subjects,
            self.rotate_tenant,
            self.replace_root,
            self.unlink,
        )


def die_at(step: int) -> None:
    """Kill this process before its ``step``-th call, counted from 0, that opens, writes, syncs or names something."""
    seen = -1

    def count(frame: FrameType, event: str, called: Any) -> None:
        nonlocal seen
        if event != "c_call" or called.__name__ not in CALLS:
            return
        owner = getattr(called, "__module__", None) or type(called.__self__).__module__
        if owner in ("posix", "sqlite3", "_sqlite3"):
            seen += 1
            if seen == step:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.setprofile(count)


def open_until_killed(folder: Path, step: int) -> bool:
    """Make a vault in a forked process that dies at a step; False if it was done before that."""
    folder.mkdir()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            die_at(step)
            with openkcm.Core.open(f"sqlite:///{folder / 'vault.db'}") as core, openkcm.Gateway(core):
                code = 0
        finally:
            os._exit(code)
    return os.waitpid(pid, 0)[1] == signal.SIGKILL


def main(mode: str, folder: Path, first: int, stride: int = 1) -> None:
    """Run one of the modes."""
    tell(ready=True)
    if mode == "loop":
        worker = Worker(folder, first)
        tell(opened=True)
        while True:
            worker.step()
    step = first
    while open_until_killed(folder / f"{step:04}", step):
        step += stride
    tell(last=step)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), *map(int, sys.argv[3:]))
