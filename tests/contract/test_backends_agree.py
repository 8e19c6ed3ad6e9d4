# SPDX-License-Identifier: Apache-2.0
"""The two backends are one format: each opens what the other sealed, in the same vault, in fresh processes.

Everything goes through files: a child on one backend encrypts into a folder, a child on the other opens it.
"""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from support import run_python

SEAL = """
import io, json, sys
from pathlib import Path
import openkcm
folder = Path(sys.argv[1])
with openkcm.Core.open(f"sqlite:///{folder / 'vault.db'}") as core, openkcm.Gateway(core) as gateway:
    if not (folder / "acme.root").exists():
        core.link_tenant("acme", root=f"local:{folder / 'acme.root'}")
        core.create_service("acme", "records")
    else:
        core.rotate_service("acme", "records")
        core.rotate_tenant("acme")
    handle = gateway.service("acme", "records")
    made = []
    for size in (0, 1, 31, 32, 33, 1000, 70_000):
        for context in (None, b"raw", {"a": "1", "b": "2"}):
            for subject in (None, "ann"):
                made.append(handle.encrypt(bytes(size), context=context, subject=subject))
    contexts = [str(n).encode() for n in range(300)]
    made += handle.encrypt_many([bytes([n % 256]) * n for n in range(300)], contexts=contexts)
    streams = []
    for size in (0, 65_536, 200_000):
        for subject in (None, "ann"):
            target = io.BytesIO()
            handle.encrypt_stream(io.BytesIO(bytes(size)), target, subject=subject)
            streams.append(target.getvalue().hex())
(folder / "out.json").write_text(json.dumps([[blob.hex() for blob in made], streams]))
print(openkcm.backend_info()["backend"])
"""

OPEN = """
import io, json, sys
from pathlib import Path
import openkcm
folder = Path(sys.argv[1])
made, streams = json.loads((folder / "out.json").read_text())
made = [bytes.fromhex(blob) for blob in made]
with openkcm.Core.open(f"sqlite:///{folder / 'vault.db'}") as core, openkcm.Gateway(core) as gateway:
    handle = gateway.service("acme", "records")
    rest = iter(made)
    for size in (0, 1, 31, 32, 33, 1000, 70_000):
        for context in (None, b"raw", {"a": "1", "b": "2"}):
            for subject in (None, "ann"):
                blob = next(rest)
                assert handle.decrypt(blob, context=context) == bytes(size)
                (moved,) = handle.rewrap_many([blob])
                assert handle.decrypt(moved, context=context) == bytes(size)
                try:
                    handle.decrypt(blob, context=b"another")
                except openkcm.DecryptError:
                    continue
                raise AssertionError
    contexts = [str(n).encode() for n in range(300)]
    assert handle.decrypt_many(list(rest), contexts=contexts) == [bytes([n % 256]) * n for n in range(300)]
    for size, blob in zip((0, 0, 65_536, 65_536, 200_000, 200_000), streams, strict=True):
        target = io.BytesIO()
        handle.decrypt_stream(io.BytesIO(bytes.fromhex(blob)), target)
        assert target.getvalue() == bytes(size)
print(openkcm.backend_info()["backend"])
"""


@pytest.mark.parametrize("first", ["fast", "python"])
def test_each_opens_what_the_other_sealed(tmp_path: Path, first: str) -> None:
    other = {"fast": "python", "python": "fast"}
    if find_spec("openkcm._fast.arena") is None:
        pytest.skip("the native layer is not built, so there is no second backend to compare with")
    for sealing, opening in (
        (first, other[first]),
        (other[first], first),
    ):  # one vault, made by one, used by both
        assert run_python(SEAL, str(tmp_path), OPENKCM_BACKEND=sealing).stdout.strip() == sealing
        assert run_python(OPEN, str(tmp_path), OPENKCM_BACKEND=opening).stdout.strip() == opening
        assert run_python(OPEN, str(tmp_path), OPENKCM_BACKEND=sealing).stdout.strip() == sealing
