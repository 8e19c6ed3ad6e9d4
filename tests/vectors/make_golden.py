# SPDX-License-Identifier: Apache-2.0
"""Write golden envelopes for a format version: once, when the version is made, and never again.

    python tests/vectors/make_golden.py /tmp/openkcm-golden/v1 && cp -r /tmp/openkcm-golden/v1 tests/vectors/golden

The folder then holds a vault with everything that opens it (seal file and roots too: these keys protect nothing), an
envelope of each kind a file, and ``cases.json`` with what is expected of each.
"""

from __future__ import annotations

import hashlib
import io
import json
import sqlite3
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openkcm

RECORD = "Grüezi, OpenKCM".encode()
LONG = hashlib.shake_128(b"golden").digest(2 * 65_536 + 100)
CONTEXTS: dict[str, Any] = {
    "none": None,
    "bytes": b"\x00\x01raw",
    "mapping": {"table": "cards", "row": "7", "": "ü"},
}


def envelopes(core: openkcm.Core, gateway: openkcm.Gateway) -> Iterator[tuple[str, dict[str, Any], bytes]]:
    """Name, expectation and bytes of each."""
    handle = gateway.service("acme", "payments")
    for kind, subject in (("inline", None), ("stored", "ann")):
        for name, context in CONTEXTS.items():
            case = {"stream": False, "context": name, "opens": "record"}
            yield f"{kind}-{name}", case, handle.encrypt(RECORD, context=context, subject=subject)
        yield (
            f"{kind}-empty",
            {"stream": False, "context": "none", "opens": "empty"},
            handle.encrypt(b"", subject=subject),
        )
        for size, data in (("empty", b""), ("record", RECORD), ("long", LONG)):
            target = io.BytesIO()
            handle.encrypt_stream(io.BytesIO(data), target, context=CONTEXTS["mapping"], subject=subject)
            yield (
                f"{kind}-stream-{size}",
                {"stream": True, "context": "mapping", "opens": size},
                target.getvalue(),
            )
    batch = handle.encrypt_many([RECORD, b""], context=CONTEXTS["bytes"])
    yield "inline-batch", {"stream": False, "context": "bytes", "opens": "record"}, batch[0]
    shredded = handle.encrypt(RECORD, subject="eve")
    handle.shred("eve")
    yield "stored-shredded", {"stream": False, "context": "none", "error": "KeyDestroyed"}, shredded
    core.rotate_service("acme", "payments")
    yield "inline-version-2", {"stream": False, "context": "none", "opens": "record"}, handle.encrypt(RECORD)
    (moved,) = handle.rewrap_many(batch[:1])
    yield "inline-rewrapped", {"stream": False, "context": "bytes", "opens": "record"}, moved
    core.rotate_tenant("acme")
    yield (
        "inline-wrong-context",
        {"stream": False, "context": "bytes", "error": "DecryptError"},
        handle.encrypt(RECORD),
    )
    good = handle.encrypt(RECORD)
    changes = {
        "tag": (len(good) - 1, "DecryptError"),
        "commitment": (108, "DecryptError"),
        "wrapped-key": (24, "DecryptError"),
        "reserved": (6, "FormatError"),
        "suite": (4, "FormatError"),
        "magic": (0, "FormatError"),
    }
    for name, (at, error) in changes.items():
        altered = bytearray(good)
        altered[at] ^= 0x40
        yield f"altered-{name}", {"stream": False, "context": "none", "error": error}, bytes(altered)
    yield "cut-short", {"stream": False, "context": "none", "error": "FormatError"}, good[:150]
    yield (
        "future",
        {"stream": False, "context": "none", "error": "FormatError"},
        good[:3] + b"\x02" + good[4:],
    )
    other = gateway.service("globex", "payments").encrypt(RECORD)
    yield "another-tenants", {"stream": False, "context": "none", "error": "DecryptError"}, other


def main(folder: Path) -> None:
    folder.mkdir(parents=True)
    cases = {}
    with (
        openkcm.Core.open(f"sqlite:///{folder.absolute() / 'vault.db'}") as core,
        openkcm.Gateway(core) as gateway,
    ):
        for tenant in ("acme", "globex"):
            core.link_tenant(tenant, root=f"local:{folder.absolute() / f'{tenant}.root'}")
            core.create_service(tenant, "payments")
        for name, case, blob in envelopes(core, gateway):
            (folder / f"{name}.okc").write_bytes(blob)
            cases[name] = case
    for store in folder.glob("*.db"):
        with sqlite3.connect(store) as connection:
            connection.execute("PRAGMA journal_mode = DELETE")
            if store.name == "vault.db":
                # No path of the machine it was made on; the test says where the roots are.
                connection.execute("UPDATE tenants SET root_uri = 'local:' || tenant || '.root'")
        connection.close()
        with sqlite3.connect(store, isolation_level=None) as connection:
            connection.execute("VACUUM")
        connection.close()
    (folder / "cases.json").write_text(json.dumps(cases, indent=1, sort_keys=True) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
