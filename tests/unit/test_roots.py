# SPDX-License-Identifier: Apache-2.0
"""What is particular to each root: URIs, PINs, files, and what a token answers."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openkcm.errors import (
    RootDenied,
    RootDestroyed,
    RootDisabled,
    RootMisconfigured,
    RootUnavailable,
)
from openkcm.roots import Root, open_root, pkcs11
from openkcm.roots.pkcs11_uri import PKCS11URI, parse_pkcs11_uri
from softhsm import Token
from support import refused, run_python

CONTEXT = {"tenant": "acme"}


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
        "pkcs11:object=a;type=private",
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
)
def test_serialising_and_parsing_is_the_identity(
    token: str | None,
    serial: str | None,
    slot: int | None,
    label: str | None,
    key_id: bytes,
    module: str | None,
    pin: str | None,
) -> None:
    uri = PKCS11URI(
        token=token, serial=serial, slot_id=slot, object=label, id=key_id, module_path=module, pin_source=pin
    )
    assert parse_pkcs11_uri(str(uri)) == uri


# ---- pkcs11: on a real token -------------------------------------------------------------------------------


def use(root: Root) -> None:
    assert root.unwrap(root.wrap(b"x" * 72, CONTEXT), CONTEXT) == b"x" * 72


def test_the_key_stays_on_the_token(token: Token) -> None:
    from pkcs11 import Attribute
    from pkcs11.exceptions import AttributeSensitive

    root = open_root(token.uri)
    assert root.warnings() == []

    def read(key: object) -> bytes:
        return key[Attribute.VALUE]  # type: ignore[index, no-any-return]

    with pytest.raises((AttributeSensitive, RootMisconfigured)):
        root._on_key(read)  # type: ignore[attr-defined]


def test_a_weak_key_is_warned_of(token: Token) -> None:
    from pkcs11 import Attribute, KeyType

    root = open_root(token.uri.replace("object=root;id=%01", "object=weak;id=%09"))
    with pkcs11._lock:
        session = open_root(token.uri)._session()  # type: ignore[attr-defined]
        session.generate_key(
            KeyType.AES,
            256,
            label="weak",
            id=b"\x09",
            store=False,
            template={Attribute.EXTRACTABLE: True, Attribute.SENSITIVE: False},
        )
    use(root)
    assert len(root.warnings()) == 2


def test_a_key_that_is_not_an_aes_256_key(token: Token) -> None:
    from pkcs11 import KeyType

    with pkcs11._lock:
        session = open_root(token.uri)._session()  # type: ignore[attr-defined]
        session.generate_key(KeyType.AES, 128, label="short", id=b"\x08", store=False)
    refused(
        lambda: use(open_root(token.uri.replace("object=root;id=%01", "object=short;id=%08"))),
        RootMisconfigured,
    )


def test_a_key_that_may_not_decrypt(token: Token) -> None:
    from pkcs11 import Attribute, KeyType

    with pkcs11._lock:
        session = open_root(token.uri)._session()  # type: ignore[attr-defined]
        session.generate_key(
            KeyType.AES, 256, label="oneway", id=b"\x07", store=False, template={Attribute.DECRYPT: False}
        )
    root = open_root(token.uri.replace("object=root;id=%01", "object=oneway;id=%07"))
    refused(lambda: use(root), RootDenied)


def test_what_is_not_there(token: Token) -> None:
    refused(lambda: use(open_root(token.uri.replace("object=root", "object=none"))), RootDestroyed)
    refused(lambda: use(open_root(token.uri.replace(f"token={token.label}", "token=none"))), RootUnavailable)
    missing = re.sub(r"module-path=[^&]*", "module-path=/nonexistent.so", token.uri)
    assert "/nonexistent.so" in str(refused(lambda: use(open_root(missing)), RootMisconfigured))


def test_a_module_that_is_none(token: Token, tmp_path: Path) -> None:
    (tmp_path / "fake.so").write_bytes(b"not a shared object")
    fake = re.sub(r"module-path=[^&]*", f"module-path={tmp_path / 'fake.so'}", token.uri)
    refused(lambda: use(open_root(fake)), RootMisconfigured)
    libc = next(path for path in (Path("/lib"), Path("/lib64")) if path.exists())
    for found in list(libc.rglob("libz.so*"))[:1]:
        other = re.sub(r"module-path=[^&]*", f"module-path={found}", token.uri)
        refused(lambda other=other: use(open_root(other)), RootMisconfigured)


def test_no_module_named(monkeypatch: pytest.MonkeyPatch, token: Token) -> None:
    monkeypatch.delenv(pkcs11.MODULE_VARIABLE, raising=False)
    bare = re.sub(r"module-path=[^&]*&", "", token.uri)
    refused(lambda: open_root(bare), RootMisconfigured)
    monkeypatch.setenv(pkcs11.MODULE_VARIABLE, token.module)
    use(open_root(bare))


def test_where_the_pin_comes_from(token: Token, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def fresh(source: str | None) -> Root:
        pkcs11._drop_session((token.module, token.label, "None"))
        rest = "" if source is None else f"&pin-source={source}"
        return open_root(re.sub(r"&pin-source=.*", rest, token.uri))

    use(fresh(f"file:{token.pin_file}"))
    use(fresh(str(token.pin_file)))
    monkeypatch.setenv("THE_PIN", token.pin)
    use(fresh("env:THE_PIN"))
    monkeypatch.setenv(pkcs11.PIN_VARIABLE, token.pin)
    use(fresh(None))
    monkeypatch.delenv(pkcs11.PIN_VARIABLE)
    with mock.patch("sys.stdin", None):
        assert "pin-source" in str(refused(lambda: use(fresh(None)), RootMisconfigured))
    refused(lambda: use(fresh("env:NOT_SET")), RootMisconfigured)
    refused(lambda: use(fresh(f"file:{tmp_path / 'none'}")), RootMisconfigured)
    token.pin_file.chmod(0o644)
    assert "chmod" in str(refused(lambda: use(fresh(f"file:{token.pin_file}")), RootMisconfigured))


def pin_attempts_left(token: Token) -> str:
    """SoftHSM2's flags for the user PIN: it reports a count that is low, a last try, or a lock."""
    shown = subprocess.run(
        ["softhsm2-util", "--show-slots"], capture_output=True, text=True, check=True
    ).stdout
    assert token.label in shown
    return shown


def test_a_wrong_pin_is_tried_once(token: Token, tmp_path: Path) -> None:
    """Many operations with a wrong PIN make one login, and the error never holds the PIN."""
    wrong = tmp_path / "wrong"
    wrong.touch(mode=0o600)
    wrong.write_text("0000-wrong")
    code = f"""
import pkcs11 as module
from openkcm.errors import RootDenied
from openkcm.roots import open_root, pkcs11
root = open_root({token.uri.replace(str(token.pin_file), str(wrong))!r})
logins = []
opened = module.Token.open if hasattr(module, "Token") else None
find = type(root)._find_token

class Counting:
    def __init__(self, token): self.token = token
    def open(self, **options):
        logins.append(1)
        return self.token.open(**options)

type(root)._find_token = lambda self, module: Counting(find(self, module))
for _ in range(50):
    try:
        root.wrap(b"x", {{}})
    except RootDenied as error:
        assert "0000-wrong" not in repr(error) + str(error)
    else:
        raise SystemExit("it was not refused")
print(len(logins))
"""
    assert run_python(code).stdout == "1\n"
    use(open_root(token.uri))


def test_a_token_taken_out_and_put_back(token: Token, softhsm_folder: Path) -> None:
    """The token's files are moved away and back, and the module looks again."""
    root = open_root(token.uri)
    wrapped = root.wrap(b"x", CONTEXT)
    tokens, away = softhsm_folder / "tokens", softhsm_folder / "away"
    shutil.move(tokens, away)
    tokens.mkdir()
    pkcs11._drop_session((token.module, token.label, "None"))
    pkcs11._modules[token.module].reinitialize()
    pkcs11._sessions.clear()
    refused(lambda: root.unwrap(wrapped, CONTEXT), RootUnavailable)
    tokens.rmdir()
    shutil.move(away, tokens)
    pkcs11._reloaded.clear()
    assert root.unwrap(wrapped, CONTEXT) == b"x"


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # the binding's own clean-up
def test_a_session_that_was_lost_is_opened_again(token: Token) -> None:
    root = open_root(token.uri)
    wrapped = root.wrap(b"x", CONTEXT)
    for session in list(pkcs11._sessions.values()):
        session.close()
    assert root.unwrap(wrapped, CONTEXT) == b"x"


def test_two_roots_on_one_token_share_its_login(token: Token) -> None:
    one, two = open_root(token.uri), open_root(token.add_key("second", b"\x05"))
    use(one)
    use(two)
    one.close()
    use(two)


def test_nothing_secret_is_shown(token: Token) -> None:
    root = open_root(token.uri)
    use(root)
    assert token.pin not in repr(root) + root.uri + str(vars(root))
    assert token.pin not in repr(token)
    assert os.path.basename(token.pin_file) in root.uri
