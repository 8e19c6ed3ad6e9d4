# SPDX-License-Identifier: Apache-2.0
"""What a customer must allow a ``bao-transit:`` root, and what of it is weak."""

from __future__ import annotations

import re
import subprocess

import pytest

from bao_support import CONTEXT, SEALED, names, use
from bao_support import bao as bao
from bao_support import key as key
from openkcm.errors import (
    RootDenied,
    RootMisconfigured,
)
from openkcm.roots import open_root
from openkcm.roots.bao import open_bao
from openkcm.testing.openbao import ACCOUNT, NAMESPACE, ROLE, OpenBao, OpenBaoKey
from openkcm.testing.openbao.server import find_binary
from support import refused, run_python


def shell(bao: OpenBao, text: str) -> None:
    """Run what a customer is told to, as the customer."""
    variables = {
        "BAO_ADDR": bao.server.url,
        "BAO_CACERT": str(bao.server.authority),
        "BAO_TOKEN": bao.server.root_token,
        "HOME": str(bao.server.folder),
        "PATH": f"{find_binary().parent}:/usr/bin:/bin",
    }
    subprocess.run(["/bin/sh", "-ec", text], env=variables, check=True, capture_output=True, timeout=60)


def test_the_grant_for_an_app_role(bao: OpenBao, key: OpenBaoKey) -> None:
    root = open_bao(key.uri_by("approle"))
    key.deny()
    refused(lambda: root.wrap(SEALED, CONTEXT), RootDenied)
    grant = root.grant()
    assert grant.identity == f"auth/approle/role/{ROLE}"
    assert grant.permissions == key.permissions
    assert grant.text == (
        f"bao policy write openkcm-transit-{key.name} - <<'EOF'\n"
        f'path "transit/encrypt/{key.name}" {{\n  capabilities = ["update"]\n}}\n'
        f'path "transit/decrypt/{key.name}" {{\n  capabilities = ["update"]\n}}\n'
        "EOF\n"
        f"bao write auth/approle/role/{ROLE} token_policies=openkcm,openkcm-transit-{key.name}\n"
    )
    named = root.grant(ROLE)
    assert named.identity == grant.identity
    assert "# This replaces the role's policies" in named.text
    assert "# This replaces" not in grant.text
    shell(bao, grant.text)
    root.close()  # the old token has the policies of old
    use(root)
    # What else the role has was not touched.
    role = bao.server.ask("GET", f"auth/approle/role/{ROLE}")["data"]
    assert role["token_ttl"] == 3600
    bao.server.ask("POST", f"auth/approle/role/{ROLE}", {"token_policies": "openkcm"})


def test_the_grant_for_a_kubernetes_role(bao: OpenBao, key: OpenBaoKey) -> None:
    root = open_bao(key.uri_by("kubernetes"))
    key.deny()
    grant = root.grant()
    assert grant.identity == f"auth/kubernetes/role/{ROLE}"
    shell(bao, grant.text)
    root.close()
    use(root)
    role = bao.server.ask("GET", f"auth/kubernetes/role/{ROLE}")["data"]
    assert (role["bound_service_account_names"], role["bound_service_account_namespaces"]) == (
        [ACCOUNT],
        [NAMESPACE],
    )
    bao.server.ask("POST", f"auth/kubernetes/role/{ROLE}", {"token_policies": "openkcm"})


def test_the_grant_for_a_token(bao: OpenBao, key: OpenBaoKey) -> None:
    root = open_bao(key.uri)
    grant = root.grant()
    assert grant.identity == "token-openkcm"
    assert "bao token create -orphan -period=24h" in grant.text
    shell(bao, grant.text)
    assert root.grant("some-token").identity == "some-token"
    named = open_bao("bao-transit://h/a/b/K?namespace=team/x&login=approle&auth=ours").grant("core")
    assert named.identity == "auth/ours/role/core"
    assert 'path "a/b/encrypt/K"' in named.text
    assert "bao write -namespace=team/x auth/ours/role/core token_policies=openkcm-a-b-k\n" in named.text


def test_the_grant_where_nobody_answers() -> None:
    """The Kubernetes role is known without asking; whose a token is, is not."""
    grant = open_bao("bao-transit://127.0.0.1:1/transit/key?login=kubernetes&role=core").grant()
    assert grant.identity == "auth/kubernetes/role/core"
    assert "# This replaces the role's policies" in grant.text
    refused(lambda: open_bao("bao-transit://127.0.0.1:1/transit/key").grant(), RootMisconfigured)


@pytest.mark.parametrize("identity", ["", "a b", "x; rm -rf /", "$(id)", "auth/../x", "a'b", "role\n"])
def test_identities_that_could_not_be_pasted(key: OpenBaoKey, identity: str) -> None:
    refused(lambda: open_bao(key.uri).grant(identity), RootMisconfigured)


def test_no_identity_is_found(bao: OpenBao, key: OpenBaoKey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("OPENKCM_BAO_TOKEN_FILE")
    monkeypatch.setenv("BAO_TOKEN", "s.unknown")
    refused(lambda: open_bao(key.uri).grant(), RootMisconfigured)
    made = bao.server.ask("POST", "auth/token/create", {"policies": ["openkcm"], "no_default_policy": True})
    monkeypatch.setenv("BAO_TOKEN", made["auth"]["client_token"])
    assert "say who we are" in str(refused(lambda: open_bao(key.uri).grant(), RootMisconfigured))
    use(open_bao(key.uri))  # which takes no more than the policy


# ---- what is weak -------------------------------------------------------------------------------------------


def test_weak_keys_and_tokens_are_warned_of(bao: OpenBao, monkeypatch: pytest.MonkeyPatch) -> None:
    key = bao.make_key_of(next(names), "aes128-gcm96", exportable=True)
    use(open_root(key.uri))
    assert open_root(key.uri).warnings() == []  # we may not look at the key
    monkeypatch.delenv("OPENKCM_BAO_TOKEN_FILE")
    monkeypatch.setenv("BAO_TOKEN", bao.server.root_token)
    found = "; ".join(open_root(key.uri).warnings())
    assert "root token" in found
    assert "exportable" in found
    assert "weaker than aes256" in found
    bao.server.ask("POST", f"transit/keys/{key.name}/config", {"deletion_allowed": True})
    assert "deletion_allowed" in "; ".join(open_root(key.uri).warnings())
    key.close()


def test_a_token_that_will_end_is_warned_of(bao: OpenBao, key: OpenBaoKey) -> None:
    bao.make_token(period=0, ttl="5h", renewable=False)
    try:
        assert re.search(r"our token ends in [45] hours", "; ".join(open_root(key.uri).warnings()))
        assert open_root(key.uri_by("approle")).warnings() == []
    finally:
        bao.make_token()


def test_plaintext_is_warned_of_though_nobody_answers() -> None:
    found = open_root("bao-transit://127.0.0.1:1/transit/key?tls=off").warnings()
    assert len(found) == 1
    assert "plaintext" in found[0]
    assert open_root("bao-transit://127.0.0.1:1/transit/key").warnings() == []


def test_the_extra_is_named_where_it_is_missing() -> None:
    code = """
import os, sys
sys.modules["hvac"] = None
from openkcm.errors import RootMisconfigured
from openkcm.roots import open_root
for login in ("", "?login=approle", "?login=kubernetes&role=r"):
    root = open_root("bao-transit://127.0.0.1:1/transit/key" + login)
    try:
        root.wrap(b"x", {})
    except RootMisconfigured as error:
        assert "openkcm[bao]" in str(error), error
    else:
        raise SystemExit("it was not refused")
"""
    run_python(code, BAO_TOKEN="x")


def test_opening_a_root_costs_nothing() -> None:
    code = """
import sys
from openkcm.roots import open_root
open_root("bao-transit://127.0.0.1:1/transit/key").grant("x")
assert not {"hvac", "requests", "urllib3", "cryptography"} & set(sys.modules)
"""
    run_python(code)
