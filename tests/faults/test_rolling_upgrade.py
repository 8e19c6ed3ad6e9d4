# SPDX-License-Identifier: Apache-2.0
"""Old and new Cores and Gateways work together across one version of the protocol.

There is one version so far. The next is made here of this one: a process that is started as ``newer`` speaks version 2
as well, and adds a field that nobody knows to every message it sends. ``future`` speaks version 3 alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest

import openkcm
from rpc_support import Site
from support import SOURCE, refused, run_python

UNKNOWN_FIELD = bytes((0xC0, 0x3E, 0x01))
"""Field 1000 with the number 1 (the Protocol Buffers encoding): a message of before knows no such field."""

NEWER = f"""
import openkcm.rpc.session as session
from openkcm.rpc.client.endpoint import Endpoint
from openkcm.rpc.server.handlers import KeyHandlers

session.HIGHEST_VERSION = 2
call, handle = Endpoint.call, KeyHandlers.call
Endpoint.call = lambda self, method, request, *more: call(self, method, request + {UNKNOWN_FIELD!r}, *more)
KeyHandlers.call = lambda self, *arguments: handle(self, *arguments) + {UNKNOWN_FIELD!r}
"""

FUTURE = "import openkcm.rpc.session as session\nsession.LOWEST_VERSION = session.HIGHEST_VERSION = 3\n"

WORK = """
import sys, openkcm
certificate, key, roots, keys, *addresses = sys.argv[1:]
with openkcm.connect(addresses, tls=openkcm.TLS(certificate, key, roots)) as core:
    with openkcm.Gateway(core, keys=keys) as gateway:
        service = gateway.service("acme", "records")
        for index in range(3):
            records = [b"record %d" % at for at in range(100)]
            assert service.decrypt_many(service.encrypt_many(records)) == records
            blob = service.encrypt(b"one", subject=f"subject-{index}")
            assert service.decrypt(blob) == b"one"
            service.rewrap_many([blob])
            service.shred(f"subject-{index}")
            try:
                service.decrypt(blob)
                raise SystemExit("a shredded key opens")
            except openkcm.KeyDestroyed:
                pass
"""


def build(folder: Path, name: str, source: str) -> Mapping[str, str]:
    """The environment of a process that runs another version of the protocol."""
    (folder / name).mkdir(exist_ok=True)
    (folder / name / "sitecustomize.py").write_text(source)
    return {"PYTHONPATH": f"{folder / name}:{SOURCE}"}


def work(site: Site, addresses: list[str], environment: Mapping[str, str]) -> None:
    """What a Gateway does all day, in a process of its own."""
    tls = site.tls()
    keys = site.folder / "gateway.db"
    run_python(WORK, str(tls.certificate), str(tls.key), str(tls.roots), str(keys), *addresses, **environment)


@pytest.mark.parametrize("transport", ["data", "grpc"])
def test_old_and_new_work_together(transport: str, tmp_path: Path) -> None:
    site = Site(tmp_path)
    newer = build(tmp_path, "newer", NEWER)
    scheme = "grpc://" if transport == "grpc" else ""
    with site.start("old") as old, site.start("new", newer) as new:
        addresses = [f"{scheme}127.0.0.1:{each.ports[transport]}" for each in (old, new)]
        for gateway in ({}, newer):
            for address in addresses:
                work(site, [address], gateway)
        # In the middle of the upgrade: both behind one Gateway, the one it prefers going away.
        for order in (addresses, addresses[::-1]):
            work(site, order, newer)
        old.stop()
        work(site, addresses, {})
        work(site, addresses, newer)


def test_two_without_a_common_version_are_told_so(tmp_path: Path) -> None:
    site = Site(tmp_path)
    with (
        site.start("future", build(tmp_path, "future", FUTURE)) as replica,
        site.connect(replica.ports) as core,
    ):
        gateway = openkcm.Gateway(core)
        service = gateway.service("acme", "records")
        error = refused(lambda: service.encrypt(b"x"), openkcm.InvalidInput)
        assert "version" in str(error) and "upgrade" in str(error)
        gateway.close()
