# SPDX-License-Identifier: Apache-2.0
"""What many tests need: a vault in a folder, its tenants, and a fresh Python process beside the tests."""

from __future__ import annotations

import mmap
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import openkcm
import stand_in
from openkcm.gateway import ServiceHandle

SOURCE = Path(openkcm.__file__).resolve().parents[1]
FREE_THREADED = "t" in sys.abiflags
ON_FAST = openkcm.backend_info()["backend"] == "fast"


def url(folder: Path) -> str:
    """The store's URL for a vault in a folder."""
    return f"sqlite:///{folder / 'vault.db'}"


def make_vault(folder: Path, *tenants: str, service: str = "records") -> openkcm.Core:
    """A vault with these tenants, each on a development root of its own and with one service."""
    core = openkcm.Core.open(url(folder))
    for tenant in tenants or ("acme",):
        core.link_tenant(tenant, root=f"local:{folder / f'{tenant}.root'}")
        core.create_service(tenant, service)
    return core


@contextmanager
def open_service(folder: Path, tenant: str = "acme", service: str = "records") -> Iterator[ServiceHandle]:
    """A handle on a fresh vault's service."""
    with make_vault(folder, tenant, service=service) as core, openkcm.Gateway(core) as gateway:
        yield gateway.service(tenant, service)


def environment(**more: str) -> dict[str, str]:
    """This process's environment for a child that imports the same package."""
    return os.environ | {"PYTHONPATH": f"{SOURCE}:{Path(__file__).parent}", "PYTHONHASHSEED": "random"} | more


def run_python(
    code: str, *arguments: str, check: bool = True, **more: str
) -> subprocess.CompletedProcess[str]:
    """Run code in a fresh interpreter; its output as text."""
    done = subprocess.run(
        [sys.executable, "-c", f"import stand_in\n{code}" if stand_in.NEEDED else code, *arguments],
        capture_output=True,
        text=True,
        env=environment(**more),
        timeout=120,
        check=False,
    )
    if check:
        assert done.returncode == 0, done.stderr
    return done


def released(size: int = 300) -> memoryview:
    """A view whose bytes are not to be had any more."""
    view = memoryview(bytes(size))
    view.release()
    return view


def closed(size: int = 300) -> mmap.mmap:
    """A mapping that was closed."""
    mapping = mmap.mmap(-1, size)
    mapping.close()
    return mapping


def refused(call: object, kind: type[BaseException]) -> BaseException:
    """Call and expect exactly this class, not a subclass of it; returns the error."""
    try:
        call()  # type: ignore[operator]
    except BaseException as error:
        assert type(error) is kind, f"{type(error).__name__}: {error}"
        return error
    raise AssertionError(f"{kind.__name__} was not raised")


SECONDS = 20.0
"""How long tests wait for what takes a moment: longer than any of it takes on a machine that is busy."""


def until(condition: Callable[[], object], seconds: float = SECONDS) -> None:
    """Wait for something to become true."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not become true in time"
        time.sleep(0.005)


class NoThread:
    """Stands where a Core keeps its threads, so that it starts none."""

    def stop(self) -> None:
        """There is nothing to stop."""

    def wake(self) -> None:
        """It looks when a test tells it to."""


def without_threads(core: openkcm.Core) -> openkcm.Core:
    """A Core that looks and probes only when a test tells it to."""
    core._repeaters = [NoThread()]  # type: ignore[list-item]
    return core


class Clock:
    """Time that moves when it is told to."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now
