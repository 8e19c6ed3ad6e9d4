# SPDX-License-Identifier: Apache-2.0
"""How a ``bao-transit:`` root logs in: where credentials come from, and what becomes of a token."""

from __future__ import annotations

import math
import time
from dataclasses import replace
from pathlib import Path

import pytest

from bao_support import CONTEXT, SEALED, use
from bao_support import bao as bao
from bao_support import key as key
from openkcm.errors import RootDenied, RootMisconfigured, RootUnavailable
from openkcm.roots import open_root
from openkcm.roots.bao import BaoRoot, open_bao
from openkcm.roots.bao import login as bao_login
from openkcm.roots.bao.login import Login, Token
from openkcm.testing.openbao import ACCOUNT, NAMESPACE, ROLE, OpenBao, OpenBaoKey
from support import refused

WRONG = "00000000-0000-0000-0000-000000000000"


@pytest.fixture
def bare(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An environment without credentials, and a home without a token file."""
    for kind in ("TOKEN", "ROLE_ID", "SECRET_ID", "JWT"):
        monkeypatch.delenv(f"OPENKCM_BAO_{kind}_FILE", raising=False)
    for name in ("BAO_TOKEN", "VAULT_TOKEN", "BAO_TOKEN_PATH", "VAULT_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    return home


def private(path: Path, content: str, mode: int = 0o600) -> str:
    path.touch()
    path.chmod(mode)
    path.write_text(content)
    return str(path)


def login_of(root: BaoRoot) -> Login:
    return root._place().login


def events(bao: OpenBao, path: str) -> int:
    return sum(event.path == path and event.kind == "request" for event in bao.server.events())


# ---- where credentials come from -----------------------------------------------------------------------------


def test_each_source_of_a_token(
    bao: OpenBao, key: OpenBaoKey, bare: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ours first, then what the command lines of OpenBao and Vault use, in their order."""
    token = bao.file("token").read_text().strip()
    error = refused(lambda: use(open_root(key.uri)), RootMisconfigured)
    assert "OPENKCM_BAO_TOKEN_FILE" in str(error)
    assert "BAO_TOKEN" in str(error)

    private(bare / ".vault-token", token)
    use(open_root(key.uri))
    for better in (
        ("VAULT_TOKEN_PATH", private(tmp_path / "1", token), private(tmp_path / "w1", WRONG)),
        ("BAO_TOKEN_PATH", private(tmp_path / "2", token), private(tmp_path / "w2", WRONG)),
        ("VAULT_TOKEN", token, WRONG),
        ("BAO_TOKEN", token, WRONG),
        ("OPENKCM_BAO_TOKEN", token, WRONG),
        ("OPENKCM_BAO_TOKEN_FILE", private(tmp_path / "3", f"{token}\n"), private(tmp_path / "w3", WRONG)),
    ):
        name, right, wrong = better
        monkeypatch.setenv(name, wrong)
        refused(lambda: use(open_root(key.uri)), RootMisconfigured)
        monkeypatch.setenv(name, right)
        use(open_root(key.uri))


@pytest.mark.parametrize("content", ["", "\n", "two words", "a\nb", "ä", "x" * 20_000, "a\0b"])
def test_what_is_no_token(key: OpenBaoKey, bare: Path, content: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENKCM_BAO_TOKEN_FILE", private(bare / "token", content))
    error = refused(lambda: use(open_root(key.uri)), RootMisconfigured)
    assert "holds no token" in str(error)
    if "\0" not in content and content:
        monkeypatch.delenv("OPENKCM_BAO_TOKEN_FILE")
        monkeypatch.setenv("BAO_TOKEN", content)
        error = refused(lambda: use(open_root(key.uri)), RootMisconfigured)
        assert "BAO_TOKEN" in str(error)
        assert "two words" not in str(error)


@pytest.mark.parametrize(
    ("login", "name"),
    [("token", "TOKEN"), ("approle", "ROLE_ID"), ("approle", "SECRET_ID"), ("kubernetes", "JWT")],
)
def test_files_of_credentials(
    bao: OpenBao, key: OpenBaoKey, login: str, name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    variable = f"OPENKCM_BAO_{name}_FILE"
    uri = key.uri if login == "token" else key.uri_by(login)
    content = bao.file(name.lower().replace("_", "-")).read_text()
    path = tmp_path / "it"
    monkeypatch.setenv(
        variable, private(path, content, 0o640)
    )  # of a group, as Kubernetes mounts for fsGroup
    use(open_root(uri))
    path.chmod(0o644)
    if name == "JWT":
        use(open_root(uri))  # as Kubernetes mounts it
    else:
        assert "chmod" in str(refused(lambda: use(open_root(uri)), RootMisconfigured))
    path.unlink()
    assert str(path) in str(refused(lambda: use(open_root(uri)), RootMisconfigured))
    path.mkdir()
    refused(lambda: use(open_root(uri)), RootMisconfigured)
    monkeypatch.delenv(variable)
    missing = "kubernetes.io/serviceaccount" if name == "JWT" else variable
    if name == "TOKEN":
        monkeypatch.setenv("HOME", "/nowhere")
    assert missing in str(refused(lambda: use(open_root(uri)), RootMisconfigured))


def test_a_tenant_may_have_credentials_of_its_own(
    bao: OpenBao, key: OpenBaoKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    root = open_root(f"{key.uri}?credentials=acme-eu")
    error = refused(lambda: use(root), RootMisconfigured)  # ours are not lent to it
    assert "OPENKCM_BAO_ACME_EU_TOKEN_FILE" in str(error)
    assert "VAULT_TOKEN" not in str(error)
    monkeypatch.setenv("BAO_TOKEN", bao.file("token").read_text().strip())
    refused(lambda: use(root), RootMisconfigured)
    monkeypatch.setenv("OPENKCM_BAO_ACME_EU_TOKEN_FILE", str(bao.file("token")))
    use(root)
    other = open_root(f"{key.uri_by('approle')}&credentials=acme-eu")
    refused(lambda: use(other), RootMisconfigured)
    monkeypatch.setenv("OPENKCM_BAO_ACME_EU_ROLE_ID_FILE", str(bao.file("role-id")))
    monkeypatch.setenv("OPENKCM_BAO_ACME_EU_SECRET_ID", bao.file("secret-id").read_text().strip())
    use(other)


@pytest.mark.parametrize("login", ["token", "approle", "kubernetes"])
def test_credentials_may_be_kept_to_hosts(
    key: OpenBaoKey, login: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = key.uri if login == "token" else key.uri_by(login)
    port = key.uri.split(":")[2].split("/")[0]
    monkeypatch.setenv("OPENKCM_BAO_HOSTS", f"bao.example:8200, 127.0.0.1:{port}")
    use(open_root(uri))
    monkeypatch.setenv("OPENKCM_BAO_HOSTS", "bao.example:8200")
    error = refused(lambda: use(open_root(uri)), RootMisconfigured)
    assert "OPENKCM_BAO_HOSTS" in str(error)
    assert key.requests == 2


def test_another_mount_of_a_login(bao: OpenBao, key: OpenBaoKey, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = bao.server.ask
    ask("POST", "sys/auth/team/machines", {"type": "approle"})
    ask("POST", "auth/team/machines/role/core", {"token_policies": "openkcm"})
    role_id = ask("GET", "auth/team/machines/role/core/role-id")["data"]["role_id"]
    secret_id = ask("POST", "auth/team/machines/role/core/secret-id")["data"]["secret_id"]
    for name in ("ROLE_ID", "SECRET_ID"):
        monkeypatch.delenv(f"OPENKCM_BAO_{name}_FILE")
    monkeypatch.setenv("OPENKCM_BAO_ROLE_ID", role_id)
    monkeypatch.setenv("OPENKCM_BAO_SECRET_ID", secret_id)
    root = open_bao(f"{key.uri}?login=approle&auth=team/machines")
    use(root)
    assert root.grant().identity == "auth/team/machines/role/core"
    refused(lambda: use(open_root(f"{key.uri}?login=approle&auth=nowhere")), RootDenied)


# ---- logins that are refused ----------------------------------------------------------------------------------


def test_a_secret_id_that_was_refused_is_not_tried_again(
    bao: OpenBao, key: OpenBaoKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    """OpenBao locks a role after five attempts, and answers 403 then, to the right secret id too."""
    bao.write("secret-id", WRONG)
    before = events(bao, "auth/approle/login")
    for _ in range(8):
        error = refused(lambda: use(open_root(key.uri_by("approle"))), RootMisconfigured)
        assert "invalid role or secret ID" in str(error)
    assert events(bao, "auth/approle/login") == before + 1
    bao.make_secret_id()
    use(open_root(key.uri_by("approle")))
    assert events(bao, "auth/approle/login") == before + 2

    # After a while it is tried once more.
    bao.write("secret-id", WRONG)
    monkeypatch.setattr(bao_login, "_refused", dict.fromkeys(bao_login._refused, time.monotonic() - 1))
    refused(lambda: use(open_root(key.uri_by("approle"))), RootMisconfigured)
    assert events(bao, "auth/approle/login") == before + 3
    bao.make_secret_id()


def test_a_secret_id_that_is_used_up(bao: OpenBao, key: OpenBaoKey) -> None:
    path = f"auth/approle/role/{ROLE}"
    bao.server.ask("POST", path, {"secret_id_num_uses": 1})
    bao.make_secret_id()
    root = open_bao(key.uri_by("approle"))
    use(root)
    root.close()
    refused(lambda: use(root), RootMisconfigured)
    bao.server.ask("POST", path, {"secret_id_num_uses": 0})
    bao.make_secret_id()
    use(root)


def test_service_accounts_that_are_not_admitted(bao: OpenBao, key: OpenBaoKey) -> None:
    """Each as the real server says it, after a TokenReview that really checks the token."""
    root = open_bao(key.uri_by("kubernetes"))
    reviews = bao.kubernetes.reviews
    use(root)
    assert bao.kubernetes.reviews == reviews + 1
    root.close()
    try:
        bao.write("jwt", bao.kubernetes.token(NAMESPACE, "other"))
        assert "bound_service_account_names" in str(refused(lambda: use(root), RootDenied))
        bao.write("jwt", bao.kubernetes.token("elsewhere", ACCOUNT))
        refused(lambda: use(root), RootDenied)
        bao.write("jwt", bao.kubernetes.token(NAMESPACE, ACCOUNT, seconds=-3600))
        assert "expired" in str(refused(lambda: use(root), RootMisconfigured))
        good = bao.kubernetes.token(NAMESPACE, ACCOUNT)
        bao.write("jwt", good[:-4] + ("AAAA" if good[-4:] != "AAAA" else "BBBB"))
        refused(lambda: use(root), RootDenied)
        bao.write("jwt", "no.jwt")
        refused(lambda: use(root), RootDenied)
        bao.write("jwt", good)
        bao.kubernetes.remove(NAMESPACE, ACCOUNT)
        refused(lambda: use(root), RootDenied)
    finally:
        bao.write("jwt", bao.kubernetes.token(NAMESPACE, ACCOUNT))
    use(root)
    unknown = key.uri_by("kubernetes").replace(f"role={ROLE}", "role=unknown")
    assert "invalid role name" in str(refused(lambda: use(open_root(unknown)), RootMisconfigured))


# ---- the life of a token --------------------------------------------------------------------------------------


@pytest.mark.parametrize("login", ["approle", "kubernetes"])
def test_a_token_that_was_revoked_is_replaced(bao: OpenBao, key: OpenBaoKey, login: str) -> None:
    root = open_bao(key.uri_by(login))
    use(root)
    for _ in range(2):
        bao.server.ask("POST", "auth/token/revoke", {"token": login_of(root)._token.value})  # type: ignore[union-attr]
        use(root)


def test_a_token_of_ours_that_was_revoked(bao: OpenBao, key: OpenBaoKey) -> None:
    root = open_bao(key.uri)
    use(root)
    bao.server.ask("POST", "auth/token/revoke", {"token": bao.file("token").read_text().strip()})
    error = refused(lambda: use(root), RootMisconfigured)
    assert "expired or was revoked" in str(error)
    bao.make_token()  # as an agent does, that renews the file
    use(root)


def test_a_token_that_expires(bao: OpenBao, key: OpenBaoKey) -> None:
    bao.make_token(period=0, ttl="1s", explicit_max_ttl="1s")
    root = open_bao(key.uri)
    use(root)
    time.sleep(2.5)  # the server's clock, not ours
    refused(lambda: use(root), RootMisconfigured)
    bao.make_token()
    use(root)


def test_a_token_is_renewed_before_it_ends(bao: OpenBao, key: OpenBaoKey) -> None:
    for uri, path in ((key.uri, None), (key.uri_by("approle"), "auth/approle/login")):
        root = open_bao(uri)
        use(root)
        login = login_of(root)
        token = login._token
        assert token is not None
        assert token.renewable is True
        assert token.lease == pytest.approx(3600, abs=60)
        assert token.due < token.expires
        renewals, logins = events(bao, "auth/token/renew-self"), path and events(bao, path)
        use(root)
        assert events(bao, "auth/token/renew-self") == renewals
        login._token = replace(token, due=time.monotonic() - 1)
        use(root)
        assert events(bao, "auth/token/renew-self") == renewals + 1
        assert login._token.value == token.value
        assert login._token.due > time.monotonic() + 1000
        assert login._token.born == token.born
        assert (path and events(bao, path)) == logins


def test_a_token_that_cannot_be_renewed_is_exchanged(bao: OpenBao, key: OpenBaoKey) -> None:
    """A batch token, or one at the end of its max_ttl."""
    root = open_bao(key.uri_by("approle"))
    use(root)
    login = login_of(root)
    old = login._token
    assert old is not None
    for ending in (
        replace(old, renewable=False, due=0.0),
        replace(old, lease=old.lease * 10, due=0.0),  # renewed, but for a tenth
        replace(old, expires=0.0, due=0.0),
    ):
        login._token = ending
        use(root)
        assert login._token.value != old.value


def test_a_login_that_fails_while_the_token_is_good(bao: OpenBao, key: OpenBaoKey) -> None:
    root = open_bao(key.uri_by("approle"))
    use(root)
    login = login_of(root)
    assert login._token is not None
    old = login._token = replace(login._token, renewable=False, due=0.0)
    bao.write("secret-id", WRONG)
    try:
        use(root)
        assert login._token.value == old.value
        assert login._token.due > time.monotonic()
        login._token = replace(old, expires=0.0)
        refused(lambda: use(root), RootMisconfigured)
    finally:
        bao.make_secret_id()
    use(root)


def test_a_token_that_may_not_look_at_itself(bao: OpenBao, key: OpenBaoKey) -> None:
    """Without the policy "default": it works, and its refusal is told from its end all the same."""
    bao.make_token(no_default_policy=True)
    try:
        root = open_bao(key.uri)
        looks = events(bao, "auth/token/lookup-self")
        use(root)
        use(root)
        assert events(bao, "auth/token/lookup-self") == looks + 1
        key.deny()
        refused(lambda: use(root), RootDenied)
        key.allow()
        use(root)
        bao.server.ask("POST", "auth/token/revoke", {"token": bao.file("token").read_text().strip()})
        refused(lambda: use(root), RootMisconfigured)
    finally:
        bao.make_token()


def test_batch_tokens(bao: OpenBao, key: OpenBaoKey) -> None:
    path = f"auth/approle/role/{ROLE}"
    bao.server.ask("POST", path, {"token_type": "batch"})
    try:
        root = open_bao(key.uri_by("approle"))
        use(root)
        token = login_of(root)._token
        assert token is not None
        assert token.value.startswith("b.")
        assert token.renewable is False
    finally:
        bao.server.ask("POST", path, {"token_type": "default"})


def test_policies_given_later_reach_a_process_that_runs(bao: OpenBao, key: OpenBaoKey) -> None:
    """A token has the policies that its role had when it was made: one that is refused is exchanged once a minute."""
    path = f"auth/approle/role/{ROLE}"
    bao.server.ask("POST", path, {"token_policies": "none"})
    root = open_bao(key.uri_by("approle"))
    refused(lambda: use(root), RootDenied)
    bao.server.ask("POST", path, {"token_policies": "openkcm"})
    logins = events(bao, "auth/approle/login")
    for _ in range(3):
        refused(lambda: use(root), RootDenied)
    assert events(bao, "auth/approle/login") == logins  # no login a probe
    login = login_of(root)
    assert login._token is not None
    old = login._token = replace(login._token, born=time.monotonic() - bao_login.RELOGIN_SECONDS - 1)
    use(root)
    assert events(bao, "auth/approle/login") == logins + 1
    assert login._token.value != old.value
    with pytest.raises(RuntimeError, match="403"):  # it is not left behind
        bao.server.ask("GET", "auth/token/lookup-self", token=old.value)


def test_an_exchange_that_fails_leaves_the_refusal(bao: OpenBao, key: OpenBaoKey) -> None:
    root = open_bao(key.uri_by("approle"))
    use(root)
    login = login_of(root)
    assert login._token is not None
    login._token = replace(login._token, born=time.monotonic() - bao_login.RELOGIN_SECONDS - 1)
    bao.write("secret-id", WRONG)
    try:
        key.deny()
        refused(lambda: root.wrap(SEALED, CONTEXT), RootDenied)
        key.allow()
        use(root)
    finally:
        bao.make_secret_id()


def test_an_outage_of_the_login_alone(bao: OpenBao, key: OpenBaoKey) -> None:
    root = open_bao(key.uri_by("approle"))
    key.black_hole()
    refused(lambda: root.wrap(SEALED, CONTEXT), RootUnavailable)
    key.heal()
    use(root)


def test_a_token_shows_nothing() -> None:
    token = Token.given("hunter2", 10, True)
    assert "hunter2" not in repr(token)
    assert token.due < token.expires
    assert Token.found("hunter2").expires == math.inf
