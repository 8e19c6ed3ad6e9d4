# SPDX-License-Identifier: Apache-2.0
"""``pkcs11:`` roots on real SoftHSM2 tokens: blobs, keys, mechanisms, modules, and what a customer must do."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any
from unittest import mock

import pytest

from openkcm.context import encode_context
from openkcm.errors import (
    DecryptError,
    InvalidInput,
    RootDenied,
    RootDestroyed,
    RootMisconfigured,
    RootUnavailable,
)
from openkcm.roots import Root, open_root, pkcs11
from openkcm.roots.base import Grantable
from openkcm.roots.binding import bind
from openkcm.roots.pkcs11.keys import AES_WRAP, RSA
from openkcm.roots.pkcs11.modules import module_at
from openkcm.roots.pkcs11.oaep import unpad_oaep
from openkcm.roots.pkcs11.uri import PKCS11URI
from softhsm import Token
from support import refused, run_python
from token_support import (
    CONTEXT,
    KEY,
    NONCE,
    SEALED,
    VECTOR,
    WRAPPED_VECTOR,
    make,
    run,
    use,
)

# ---- the blob ------------------------------------------------------------------------------------------------


def test_a_blob_of_today_opens_for_ever(token: Token) -> None:
    """AES-256-GCM with the context as associated data; written here by hand."""
    from cryptography.hazmat.primitives.ciphers.aead import AESGCM

    by_hand = b"\x01\x01" + NONCE + AESGCM(KEY).encrypt(NONCE, SEALED, encode_context(CONTEXT))
    assert by_hand == VECTOR
    uri = make(token, "known", 9, VALUE=KEY, ENCRYPT=True, DECRYPT=True, SENSITIVE=True, EXTRACTABLE=False)
    assert open_root(uri).unwrap(VECTOR, CONTEXT) == SEALED
    refused(lambda: open_root(uri).unwrap(VECTOR, CONTEXT | {"tenant": "globex"}), DecryptError)


def test_a_key_wrap_blob_of_today_opens_for_ever(token: Token) -> None:
    """RFC 5649 over the context's digest and the sealed key; SoftHSM2 numbers it CKM_AES_KEY_WRAP_PAD."""
    from cryptography.hazmat.primitives.keywrap import aes_key_wrap_with_padding

    assert b"\x01\x03" + aes_key_wrap_with_padding(KEY, bind(SEALED, CONTEXT)) == WRAPPED_VECTOR
    uri = make(token, "known", 9, VALUE=KEY, WRAP=True, UNWRAP=True, ENCRYPT=False, DECRYPT=False)
    root = open_root(uri)
    assert root.unwrap(WRAPPED_VECTOR, CONTEXT) == SEALED
    assert root.wrap(SEALED, CONTEXT) == WRAPPED_VECTOR, "key wrap has no nonce"


@pytest.mark.parametrize(
    "blob",
    [
        b"",
        b"\x01",
        b"\x01\x01",
        b"\x02\x01" + bytes(100),
        b"\x01\x00" + bytes(100),
        b"\x01\x05" + bytes(256),
        b"\x01\x01" + bytes(27),
        b"\x01\x02" + bytes(111),
        b"\x01\x03" + bytes(40),
        b"\x01\x04" + bytes(255),
        b"\x01\x01" + bytes(5000),
    ],
)
def test_malformed_blobs_are_refused_before_anybody_is_asked(blob: bytes) -> None:
    root = open_root("pkcs11:object=a?module-path=/nonexistent.so")
    refused(lambda: root.unwrap(blob, CONTEXT), DecryptError)
    refused(lambda: root.unwrap(VECTOR, CONTEXT), RootMisconfigured)


# ---- keys and mechanisms --------------------------------------------------------------------------------------


def test_the_key_stays_on_the_token(token: Token) -> None:
    from pkcs11 import Attribute
    from pkcs11.exceptions import AttributeSensitive

    root = open_root(token.uri)
    assert root.warnings() == []
    with pytest.raises(AttributeSensitive):
        root._use(lambda key: key.handle[Attribute.VALUE])  # type: ignore[attr-defined]


def test_key_wrap(token: Token) -> None:
    root = open_root(token.add_key("wrapping", b"\x06", AES_WRAP))
    other = open_root(token.add_key("other", b"\x07", AES_WRAP))
    assert root.warnings() == []
    wrapped = root.wrap(SEALED, CONTEXT)
    assert wrapped[:2] == b"\x01\x03"
    assert len(wrapped) == 2 + 112
    assert root.unwrap(wrapped, CONTEXT) == SEALED
    for wrong in (CONTEXT | {"version": "2"}, CONTEXT | {"x": "y"}, {}):
        refused(lambda wrong=wrong: root.unwrap(wrapped, wrong), DecryptError)
    refused(lambda: other.unwrap(wrapped, CONTEXT), DecryptError)
    for at in range(len(wrapped)):
        altered = wrapped[:at] + bytes([wrapped[at] ^ 0x80]) + wrapped[at + 1 :]
        refused(lambda altered=altered: root.unwrap(altered, CONTEXT), DecryptError)
    for sealed in (b"x" * 8, b"x" * 1000):
        assert root.unwrap(root.wrap(sealed, {}), {}) == sealed
    refused(lambda: root.wrap(b"x" * 7, {}), InvalidInput)


def test_gcm_is_preferred_where_the_key_may(token: Token) -> None:
    every = {"ENCRYPT": True, "DECRYPT": True, "WRAP": True, "UNWRAP": True}
    root = open_root(make(token, "every", 9, **every))
    wrapped = root.wrap(SEALED, CONTEXT)
    assert wrapped[:2] == b"\x01\x01"
    assert root.unwrap(wrapped, CONTEXT) == SEALED


def test_the_keys_allowed_mechanisms_decide(token: Token) -> None:
    """CKA_ALLOWED_MECHANISMS, which the binding cannot write; pkcs11-tool can, see the test of the grant's commands."""
    root = open_root(make(token, "every", 9, ENCRYPT=True, DECRYPT=True, WRAP=True, UNWRAP=True))
    with mock.patch("openkcm.roots.pkcs11.mechanisms.Key._allowed", lambda self: [0x210A]):
        wrapped = root.wrap(SEALED, CONTEXT)
    assert wrapped[:2] == b"\x01\x03"
    assert root.unwrap(wrapped, CONTEXT) == SEALED


def test_rsa(token: Token) -> None:
    """SoftHSM2 2.6 does OAEP with SHA-1 alone: it is asked for the bare operation, never for SHA-1."""
    root, other = (
        open_root(token.add_key("rsa", b"\x06", RSA)),
        open_root(token.add_key("rsa2", b"\x07", RSA)),
    )
    assert root.warnings() == []
    wrapped = root.wrap(SEALED, CONTEXT)
    assert wrapped[:2] == b"\x01\x04"
    assert len(wrapped) == 2 + 384
    assert root.wrap(SEALED, CONTEXT) != wrapped
    assert root.unwrap(wrapped, CONTEXT) == SEALED
    for wrong in (CONTEXT | {"version": "2"}, {}):
        refused(lambda wrong=wrong: root.unwrap(wrapped, wrong), DecryptError)
    refused(lambda: other.unwrap(wrapped, CONTEXT), DecryptError)
    for at in (0, 1, 2, 3, 200, len(wrapped) - 1):
        altered = wrapped[:at] + bytes([wrapped[at] ^ 0x80]) + wrapped[at + 1 :]
        refused(lambda altered=altered: root.unwrap(altered, CONTEXT), DecryptError)
    for body in (os.urandom(384), os.urandom(256), b"\xff" * 384, bytes(384)):
        refused(lambda body=body: root.unwrap(b"\x01\x04" + body, CONTEXT), DecryptError)
    assert root.unwrap(wrapped, CONTEXT) == SEALED


def test_rsa_without_the_bare_operation(token: Token) -> None:
    """No silent weakening: SHA-1 does not stand in."""
    root = open_root(token.add_key("rsa", b"\x06", RSA))
    with mock.patch("openkcm.roots.pkcs11.mechanisms.Key._allowed", lambda self: [0x09]):
        try:
            use(root)
        except RootMisconfigured as error:
            assert "SHA-1 is not used" in str(error)
            assert "CKR_ARGUMENTS_BAD" in str(error)
        else:
            pytest.skip("this SoftHSM2 does OAEP with SHA-256")
    with mock.patch("openkcm.roots.pkcs11.mechanisms.Key._allowed", lambda self: [0x01]):
        assert "no mechanism" in str(refused(lambda: use(root), RootMisconfigured))


@pytest.mark.parametrize("length", [0, 1, 104, 190])
def test_oaep_padding(length: int) -> None:
    """What ``cryptography`` pads is unpadded here; one bit anywhere, and it is not."""
    from cryptography.hazmat.primitives.asymmetric.padding import MGF1, OAEP
    from cryptography.hazmat.primitives.asymmetric.rsa import generate_private_key
    from cryptography.hazmat.primitives.hashes import SHA256

    key = generate_private_key(65537, 2048)
    message = os.urandom(length)
    ciphertext = key.public_key().encrypt(message, OAEP(MGF1(SHA256()), SHA256(), None))
    numbers = key.private_numbers()
    bare = pow(int(ciphertext.hex(), 16), numbers.d, numbers.public_numbers.n)
    block = bytes.fromhex(f"{bare:0512x}")
    assert unpad_oaep(block) == message
    for at in range(0, 256, 5):
        altered = block[:at] + bytes((block[at] ^ 1,)) + block[at + 1 :]
        refused(lambda altered=altered: unpad_oaep(altered), DecryptError)
    for wrong in (b"", block[1:], block[:65], bytes(256), b"\xff" * 256):
        refused(lambda wrong=wrong: unpad_oaep(wrong), DecryptError)


def test_another_type_than_the_uri_says(token: Token) -> None:
    rsa = token.add_key("rsa", b"\x06", RSA)
    refused(lambda: use(open_root(rsa.replace("type=private", "type=secret-key"))), RootDestroyed)
    error = refused(
        lambda: use(open_root(token.uri.replace("type=secret-key", "type=private"))), RootDestroyed
    )
    assert "type=" in str(error)


def test_weak_keys_are_warned_of(token: Token) -> None:
    weak = open_root(make(token, "weak", 9, EXTRACTABLE=True, SENSITIVE=False))
    use(weak)
    assert len(weak.warnings()) == 2
    imported = open_root(
        make(token, "imported", 8, VALUE=KEY, ENCRYPT=True, DECRYPT=True, SENSITIVE=True, EXTRACTABLE=False)
    )
    assert len(imported.warnings()) == 1
    assert "CKA_NEVER_EXTRACTABLE" in imported.warnings()[0]


def test_keys_that_are_none_for_a_root(token: Token) -> None:
    short = open_root(make(token, "short", 9, VALUE_LEN=16))
    assert "AES-256" in str(refused(lambda: use(short), RootMisconfigured))
    for at, (attributes, permission) in enumerate(
        (
            ({"ENCRYPT": True, "DECRYPT": False, "WRAP": False, "UNWRAP": False}, "CKA_DECRYPT"),
            ({"ENCRYPT": False, "DECRYPT": True, "WRAP": False, "UNWRAP": False}, "CKA_ENCRYPT"),
            ({"ENCRYPT": False, "DECRYPT": False, "WRAP": False, "UNWRAP": True}, "CKA_WRAP"),
            ({"ENCRYPT": False, "DECRYPT": False, "WRAP": True, "UNWRAP": False}, "CKA_UNWRAP"),
        )
    ):
        root = open_root(make(token, f"half-{at}", 20 + at, **attributes))
        error = refused(lambda root=root: root.wrap(SEALED, CONTEXT), RootDenied)
        assert error.permission == permission  # type: ignore[attr-defined]
    make(token, "twice", 10)
    twice = open_root(make(token, "twice", 11).replace(";id=%0b", ""))
    assert "several keys" in str(refused(lambda: use(twice), RootMisconfigured))


def test_rights_that_are_withdrawn_and_given_back(token: Token) -> None:
    from pkcs11 import Attribute

    root = open_root(make(token, "mine", 9))
    wrapped = root.wrap(SEALED, CONTEXT)

    def allow(decrypt: bool) -> None:
        def change(session: Any) -> None:
            session.get_key(label="mine")[Attribute.DECRYPT] = decrypt

        run(token, lambda module, pin, started: module.write(PKCS11URI(token=token.label), pin, change))

    allow(False)
    for _ in range(2):
        error = refused(lambda: root.unwrap(wrapped, CONTEXT), RootDenied)
        assert error.permission == "CKA_DECRYPT"  # type: ignore[attr-defined]
    allow(True)
    assert root.unwrap(wrapped, CONTEXT) == SEALED


# ---- modules and tokens ---------------------------------------------------------------------------------------


def test_what_is_not_there(token: Token) -> None:
    refused(lambda: use(open_root(token.uri.replace("object=root", "object=none"))), RootDestroyed)
    refused(lambda: use(open_root(token.uri.replace(f"token={token.label}", "token=none"))), RootUnavailable)
    missing = re.sub(r"module-path=[^&]*", "module-path=/nonexistent.so", token.uri)
    assert "/nonexistent.so" in str(refused(lambda: use(open_root(missing)), RootMisconfigured))


def test_several_tokens(token: Token, softhsm_folder: Path) -> None:
    """A URI without a token fits only where there is one; a slot that waits for a token to be made is none."""
    bare = token.uri.replace(f"token={token.label};", "")
    tokens = [path for path in (softhsm_folder / "tokens").iterdir() if path != token.place]
    aside = softhsm_folder / "aside"
    aside.mkdir()
    try:
        if tokens:
            assert "several tokens" in str(refused(lambda: use(open_root(bare)), RootMisconfigured))
        for path in tokens:
            path.rename(aside / path.name)
        module_at(token.module).forget_tokens()
        use(open_root(bare))
    finally:
        for path in tokens:
            (aside / path.name).rename(path)
        aside.rmdir()


def test_files_that_are_no_modules(token: Token, tmp_path: Path) -> None:
    def at(path: Path) -> str:
        return re.sub(r"module-path=[^&]*", f"module-path={path}", token.uri)

    (tmp_path / "fake.so").write_bytes(b"not a shared object")
    refused(lambda: use(open_root(at(tmp_path / "fake.so"))), RootMisconfigured)
    assert "not a file" in str(refused(lambda: use(open_root(at(tmp_path))), RootMisconfigured))
    libc = next(path for path in (Path("/lib"), Path("/lib64")) if path.exists())
    for found in list(libc.rglob("libz.so*"))[:1]:
        refused(lambda found=found: use(open_root(at(found))), RootMisconfigured)


def test_a_module_that_others_can_change_is_not_loaded(token: Token, tmp_path: Path) -> None:
    path = Path(shutil.copy(token.module, tmp_path / "module.so"))
    path.chmod(0o666)
    uri = re.sub(r"module-path=[^&]*", f"module-path={path}", token.uri)
    assert "changed by others" in str(refused(lambda: use(open_root(uri)), RootMisconfigured))


def test_modules_can_be_confined(token: Token, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """A module's code runs in this process: whoever links tenants need not be let to choose it."""
    monkeypatch.setenv("OPENKCM_PKCS11_MODULES", f"/nonexistent.so:{token.module}")
    use(open_root(token.uri))
    for allowed in ("/nonexistent.so", "", str(tmp_path)):
        monkeypatch.setenv("OPENKCM_PKCS11_MODULES", allowed)
        error = refused(lambda: open_root(token.uri).wrap(SEALED, CONTEXT), RootMisconfigured)
        assert "OPENKCM_PKCS11_MODULES" in str(error)


def test_paths_to_one_file_are_one_module(token: Token, tmp_path: Path) -> None:
    link = tmp_path / "module.so"
    link.symlink_to(token.module)
    assert module_at(str(link)) is module_at(token.module)
    use(open_root(re.sub(r"module-path=[^&]*", f"module-path={link}", token.uri)))


def test_no_module_named(monkeypatch: pytest.MonkeyPatch, token: Token) -> None:
    monkeypatch.delenv(pkcs11.MODULE_VARIABLE, raising=False)
    bare = re.sub(r"module-path=[^&]*&", "", token.uri)
    refused(lambda: open_root(bare), RootMisconfigured)
    monkeypatch.setenv(pkcs11.MODULE_VARIABLE, token.module)
    use(open_root(bare))


def test_a_module_that_does_not_start(token: Token, tmp_path: Path) -> None:
    """An outage where the module says so: SoftHSM2 without its folder."""
    code = f"""
from openkcm.errors import RootUnavailable
from openkcm.roots import open_root
try:
    open_root({token.uri!r}).wrap(b"x", {{}})
except RootUnavailable as error:
    print(error)
"""
    configuration = tmp_path / "softhsm2.conf"
    configuration.write_text("directories.tokendir = /nonexistent\n")
    assert "does not start" in run_python(code, SOFTHSM2_CONF=str(configuration)).stdout


def test_without_the_extra(token: Token) -> None:
    code = f"""
import sys
sys.modules["pkcs11"] = None
from openkcm.errors import RootMisconfigured
from openkcm.roots import open_root
try:
    open_root({token.uri!r}).wrap(b"x", {{}})
except RootMisconfigured as error:
    print(error)
"""
    assert "openkcm[pkcs11]" in run_python(code).stdout


# ---- what the customer must do -----------------------------------------------------------------------------------


def test_the_grant(token: Token) -> None:
    root = open_root(token.uri)
    assert isinstance(root, Grantable)
    grant = root.grant()
    assert grant.form == "key attributes"
    assert grant.permissions == ("CKA_ENCRYPT", "CKA_DECRYPT")
    assert grant.identity == "CKU_USER"
    for row in (
        r"CKA_CLASS +CKO_SECRET_KEY",
        r"CKA_KEY_TYPE +CKK_AES",
        r"CKA_VALUE_LEN +32",
        r"CKA_LABEL +root",
        r"CKA_ID +01",
        r"CKA_ENCRYPT +true",
        r"CKA_DECRYPT +true",
        r"CKA_WRAP +false",
        r"CKA_SENSITIVE +true",
        r"CKA_EXTRACTABLE +false",
        r"mechanism +CKM_AES_GCM",
    ):
        assert re.search(f"^{row}", grant.text, re.MULTILINE), row
    assert token.pin not in grant.text
    assert root.grant("the HSM's user openkcm").identity == "the HSM's user openkcm"
    private = open_root("pkcs11:object=a;type=private?module-path=/m.so")
    assert isinstance(private, Grantable)
    assert private.grant().permissions == ("CKA_DECRYPT",)
    assert "CKM_RSA_PKCS_OAEP" in private.grant().text


def commands(root: Root) -> list[list[str]]:
    import shlex

    assert isinstance(root, Grantable)
    return [shlex.split(line) for line in root.grant().text.splitlines() if line.startswith("pkcs11-tool ")]


@pytest.mark.skipif(shutil.which("pkcs11-tool") is None, reason="OpenSC's pkcs11-tool is not installed")
def test_the_commands_of_the_grant_make_such_keys(token: Token) -> None:
    for number, kind in enumerate(("secret-key", "private")):
        uri = token.uri.replace("object=root;id=%01", f"object=my%20key;id=%3{number}%ff")
        root = open_root(uri.replace("type=secret-key", f"type={kind}"))
        for command in commands(root):
            done = subprocess.run([*command, "--pin", token.pin], capture_output=True, text=True, check=False)
            assert done.returncode == 0, done.stdout + done.stderr
            assert root.warnings() == []
            use(root)
            expected = 4 if kind == "private" else 3 if "--usage-wrap" in command else 1
            assert root.wrap(SEALED, CONTEXT)[1] == expected
            root.close()
            token.remove_key("my key")
