# SPDX-License-Identifier: Apache-2.0
"""A seal key that opens only through a root of the operator's own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import openkcm
from openkcm import Core, SealError
from openkcm.cli.app import run
from openkcm.core.rooted_seal import MAGIC
from openkcm.core.seal import open_seal, wrap_seal
from openkcm.roots import open_root
from support import make_vault, refused, url


@pytest.fixture
def rooted(tmp_path: Path) -> Path:
    """The rooted form of a vault's seal, whose plain one is gone."""
    make_vault(tmp_path).close()
    open_root(f"local:{tmp_path / 'own.root'}", create=True).close()
    target = tmp_path / "rooted.seal"
    wrap_seal(tmp_path / "vault.seal", f"local:{tmp_path / 'own.root'}", target)
    (tmp_path / "vault.seal").rename(tmp_path / "safe")
    return target


def opens(folder: Path, seal: Path) -> bool:
    """Whether a vault's tenant key opens with a seal file."""
    with Core.open(url(folder), seal=seal) as core:
        return core.probe("acme").state == "live"


def test_a_vault_opens_with_it(rooted: Path, tmp_path: Path) -> None:
    assert opens(tmp_path, rooted)
    assert rooted.stat().st_mode & 0o777 == 0o600
    plain = (tmp_path / "safe").read_bytes()
    assert plain not in rooted.read_bytes()


def test_neither_the_file_nor_the_root_opens_alone(rooted: Path, tmp_path: Path) -> None:
    own = tmp_path / "own.root"
    own.rename(tmp_path / "away")
    with pytest.raises(openkcm.OpenKCMError) as caught:
        opens(tmp_path, rooted)
    assert not isinstance(caught.value, openkcm.InternalError)
    open_root(f"local:{own}", create=True).close()  # another key under its name
    refused(lambda: open_seal(rooted), SealError)
    own.unlink()
    (tmp_path / "away").rename(own)
    # The key in the file is needed too: what the root gives back is ciphertext.
    rooted.write_bytes(bytes(32) + rooted.read_bytes()[32:])
    refused(lambda: open_seal(rooted), SealError)


def test_a_file_with_anything_changed_is_refused(rooted: Path) -> None:
    whole = rooted.read_bytes()
    open_seal(rooted).wipe()
    at = 32 + len(MAGIC)
    wrong = [whole[:-1], whole + b"\0", whole[:at], whole[:33]]
    for position in (0, 32, at - 1, at, at + 1, len(whole) - 1):
        wrong.append(whole[:position] + bytes([whole[position] ^ 1]) + whole[position + 1 :])
    for each in wrong:
        rooted.write_bytes(each)
        with pytest.raises(openkcm.ConfigurationError):
            open_seal(rooted)


def test_it_is_for_its_owner_alone_and_never_replaced(rooted: Path, tmp_path: Path) -> None:
    before = rooted.read_bytes()
    refused(lambda: wrap_seal(tmp_path / "safe", f"local:{tmp_path / 'own.root'}", rooted), SealError)
    assert rooted.read_bytes() == before
    rooted.chmod(0o640)
    refused(lambda: open_seal(rooted), SealError)


def test_the_command_makes_it(rooted: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = tmp_path / "second.seal"
    root = f"local:{tmp_path / 'own.root'}"
    assert run(["--json", "seal", "wrap", str(tmp_path / "safe"), str(target), "--root", root]) == 0
    assert json.loads(capsys.readouterr().out) == {"seal": str(target), "root": root}
    assert opens(tmp_path, target)
    assert target.read_bytes() != rooted.read_bytes()
