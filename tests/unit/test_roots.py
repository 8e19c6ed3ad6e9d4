# SPDX-License-Identifier: Apache-2.0
"""The registry of roots, URIs, and development roots in files."""

from __future__ import annotations

import stat
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openkcm.errors import RootDisabled, RootMisconfigured
from openkcm.roots import open_root
from openkcm.roots.pkcs11.uri import PKCS11URI, parse_pkcs11_uri
from support import refused, run_python

# ---- the registry ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri", ["", "vault.key", "nothing:x", "LOCAL:x", ":x", "aws-kms://x", "pkcs11", None, 5]
)
def test_unknown_schemes(uri: object) -> None:
    refused(lambda: open_root(uri), RootMisconfigured)  # type: ignore[arg-type]


def test_third_parties_add_providers(tmp_path: Path) -> None:
    package = tmp_path / "thirdparty-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: thirdparty\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[openkcm.roots]\nmine = thirdparty:open_mine\n")
    (tmp_path / "thirdparty.py").write_text(
        "from openkcm.roots.local import open_local\n"
        "def open_mine(uri, *, create=False):\n    return open_local('local:' + uri[5:], create=create)\n"
    )
    code = f"""
import sys
sys.path.insert(0, {str(tmp_path)!r})
from openkcm.roots import open_root
root = open_root("mine:{tmp_path / "key"}", create=True)
assert root.unwrap(root.wrap(b"x", {{}}), {{}}) == b"x"
"""
    run_python(code)


# ---- local: ----------------------------------------------------------------------------------------------


def test_a_local_root_is_made_once_and_private(tmp_path: Path) -> None:
    path = tmp_path / "root"
    open_root(f"local:{path}", create=True)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = path.read_bytes()
    assert len(key) == 32
    open_root(f"local:{path}", create=True)
    assert path.read_bytes() == key
    assert list(tmp_path.iterdir()) == [path]


def test_a_relative_path_is_kept_absolute(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert open_root("local:here", create=True).uri == f"local:{tmp_path / 'here'}"


def test_without_create_nothing_is_made(tmp_path: Path) -> None:
    root = open_root(f"local:{tmp_path / 'root'}")
    refused(lambda: root.wrap(b"x", {}), RootDisabled)
    assert list(tmp_path.iterdir()) == []
    refused(lambda: open_root("local:"), RootMisconfigured)
    refused(lambda: open_root(f"local:{tmp_path / 'no' / 'root'}", create=True), RootMisconfigured)


@pytest.mark.parametrize("change", ["mode", "short", "long", "folder"])
def test_unsafe_local_roots_are_refused(tmp_path: Path, change: str) -> None:
    path = tmp_path / "root"
    root = open_root(f"local:{path}", create=True)
    if change == "mode":
        path.chmod(0o644)
    elif change == "folder":
        path.unlink()
        path.mkdir(0o700)
    else:
        path.write_bytes(b"x" * (31 if change == "short" else 33))
    refused(lambda: root.wrap(b"x", {}), RootMisconfigured)


# ---- pkcs11: URIs -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        "pkcs11:",
        "pkcs11:token=a",
        "pkcs11:object=",
        "pkcs11:object=a;object=b",
        "pkcs11:object=a;nonsense=b",
        "pkcs11:object=a;type=public",
        "pkcs11:object=a;type=cert",
        "pkcs11:object=a;type=",
        "pkcs11:object=a b",
        "pkcs11:object=a%",
        "pkcs11:object=a%0",
        "pkcs11:object=%ff",
        "pkcs11:object=a%00b",
        "pkcs11:object=a;slot-id=x",
        "pkcs11:object=a;slot-id=01",
        "pkcs11:object=a?module-path=",
        "pkcs11:object=a?module-path=/m&module-path=/n",
        "pkcs11:object=a;",
        "pkcs11:object=ä",
    ],
)
def test_malformed_uris(uri: str) -> None:
    refused(lambda: parse_pkcs11_uri(uri), RootMisconfigured)


def test_a_pin_in_the_uri_is_refused_and_not_repeated() -> None:
    error = refused(lambda: open_root("pkcs11:object=a?pin-value=hunter2"), RootMisconfigured)
    assert "pin-source" in str(error)
    assert "hunter2" not in str(error)


def test_a_uri_is_read_as_rfc_7512_says() -> None:
    parsed = parse_pkcs11_uri(
        "pkcs11:token=The%20Token;serial=1;object=key;id=%01%02;slot-id=7;type=secret-key?module-path=/m.so&pin-source=file:/p"
    )
    assert parsed == PKCS11URI("The Token", "1", None, None, 7, "key", b"\x01\x02", "/m.so", "file:/p")
    assert parse_pkcs11_uri(str(parsed)) == parsed


def test_a_uri_says_which_kind_of_key() -> None:
    assert parse_pkcs11_uri("pkcs11:object=a").type == "secret-key"
    private = parse_pkcs11_uri("pkcs11:type=private;object=a")
    assert private.type == "private"
    assert str(private) == "pkcs11:object=a;type=private"


_TEXT = st.none() | st.text(
    st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=20
)


@given(
    _TEXT,
    _TEXT,
    st.none() | st.integers(0, 2**64 - 1),
    _TEXT,
    st.binary(min_size=1, max_size=8),
    _TEXT,
    _TEXT,
    st.sampled_from(["secret-key", "private"]),
)
def test_serialising_and_parsing_is_the_identity(
    token: str | None,
    serial: str | None,
    slot: int | None,
    label: str | None,
    key_id: bytes,
    module: str | None,
    pin: str | None,
    kind: str,
) -> None:
    uri = PKCS11URI(
        token=token,
        serial=serial,
        slot_id=slot,
        object=label,
        id=key_id,
        module_path=module,
        pin_source=pin,
        type=kind,
    )
    assert parse_pkcs11_uri(str(uri)) == uri
