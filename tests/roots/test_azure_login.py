# SPDX-License-Identifier: Apache-2.0
"""Logging in to Entra ID: what it refuses, when it fails, other tenants, and each source of an identity."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from azure_support import CONTEXT, SEALED, in_time, use
from azure_support import hsm_key as hsm_key
from azure_support import provider as provider
from azure_support import root as root
from azure_support import running as running
from openkcm.errors import OpenKCMError, RootMisconfigured, RootThrottled, RootUnavailable
from openkcm.roots import Root, open_root
from openkcm.roots.azure import AzureRoot
from openkcm.roots.azure.uri import HOSTS_VARIABLE
from openkcm.testing.azure import AzureKey, AzureKeyVault
from openkcm.testing.https import Response
from support import refused

# ---- logging in -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("status", "kind"),
    [(429, RootThrottled), (500, RootUnavailable), (503, RootUnavailable)],
)
def test_a_failing_entra(provider: AzureKeyVault, root: Root, status: int, kind: type[OpenKCMError]) -> None:
    provider.entra.fail(status)
    with in_time():
        refused(lambda: root.wrap(SEALED, CONTEXT), kind)
    assert provider.entra.requests
    provider.entra.heal()
    use(root)


@pytest.mark.parametrize("status", [429, 503])
def test_entra_fails_after_it_was_found(provider: AzureKeyVault, root: Root, status: int) -> None:
    provider.entra.token_seconds = 60  # so short that each call asks for a new one
    try:
        wrapped = use(root)
        provider.entra.fail(status)
        expected = RootThrottled if status == 429 else RootUnavailable
        refused(lambda: root.unwrap(wrapped, CONTEXT), expected)
        provider.entra.heal()
        assert root.unwrap(wrapped, CONTEXT) == SEALED
    finally:
        provider.entra.token_seconds = 3599


@pytest.mark.parametrize(
    ("status", "body", "kind"),
    [
        (200, b"", "application/json"),
        (200, b"{}", "application/json"),
        (200, b"[]", "application/json"),
        (200, b'{"access_token": 7, "expires_in": "x"}', "application/json"),
        (200, b'{"token_endpoint": 7, "authorization_endpoint": []}', "application/json"),
        (200, b"[" * 100_000, "application/json"),
        (200, b"<html>", "text/html"),
        (400, b"<html>", "text/html"),
        (400, b'{"error": {}, "error_description": []}', "application/json"),
        (404, b"", ""),
    ],
)
def test_an_entra_that_speaks_no_sense(
    provider: AzureKeyVault, root: Root, status: int, body: bytes, kind: str
) -> None:
    """At its first word, and in answer to a request for a token."""
    answer = Response(status, body, (("Content-Type", kind),))
    provider.entra.raw_answer = answer
    refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured)
    provider.entra.heal()
    token, provider.entra._token = provider.entra._token, lambda *_: answer  # type: ignore[method-assign]
    try:
        refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured)
    finally:
        provider.entra._token = token  # type: ignore[method-assign]
    use(root)


def test_a_token_that_is_no_longer_accepted(provider: AzureKeyVault, root: Root) -> None:
    wrapped = use(root)
    provider.entra._signing = os.urandom(32)
    assert "(Unauthorized)" in str(refused(lambda: root.unwrap(wrapped, CONTEXT), RootMisconfigured))
    assert root.unwrap(wrapped, CONTEXT) == SEALED  # logged in anew


def test_no_identity(key: AzureKey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_CLIENT_SECRET")
    root = open_root(key.uri)
    with in_time():
        missing = refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured)
    assert "AZURE_CLIENT_SECRET" in str(missing)
    assert "(CredentialUnavailableError)" in str(missing)
    monkeypatch.undo()
    use(root)  # the environment is read anew
    root.close()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("AZURE_TENANT_ID", "not a tenant"),
        ("AZURE_AUTHORITY_HOST", "http://127.0.0.1"),
        ("AZURE_TOKEN_CREDENTIALS", "Nonsense"),
        ("AZURE_TOKEN_CREDENTIALS", "AzurePowerShellCredential"),
    ],
)
def test_malformed_settings(key: AzureKey, monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    root = open_root(key.uri)
    monkeypatch.setenv(name, value)
    assert name in str(refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured))
    root.close()


def test_a_certificate_file_that_is_not_there(key: AzureKey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_CLIENT_SECRET")
    monkeypatch.setenv("AZURE_CLIENT_CERTIFICATE_PATH", "/nowhere/client.pem")
    root = open_root(key.uri)
    missing = refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured)
    assert "AZURE_CLIENT_CERTIFICATE_PATH" in str(missing)
    root.close()


def test_wrong_settings(provider: AzureKeyVault, key: AzureKey, monkeypatch: pytest.MonkeyPatch) -> None:
    root = open_root(key.uri)
    for name, number in (("AZURE_CLIENT_SECRET", "7000215"), ("AZURE_CLIENT_ID", "700016")):
        with monkeypatch.context() as changed:
            changed.setenv(name, "00000000-0000-0000-0000-000000000000")
            assert number in str(refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured))
    monkeypatch.setenv("AZURE_TENANT_ID", "00000000-0000-0000-0000-000000000000")
    other = refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured)
    assert "?tenant=" in str(other)
    root.close()


def test_a_vault_of_another_tenant() -> None:
    with AzureKeyVault() as provider:
        theirs = "11111111-2222-3333-4444-555555555555"
        provider.entra.tenants.append(theirs)
        provider.vault_tenant = theirs
        key = provider.make_hsm_key("root")
        root = open_root(key.uri)
        assert "?tenant=" in str(refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured))
        cross = open_root(f"{key.uri}?tenant={theirs}")
        use(cross)
        wrong = open_root(f"{key.uri}?tenant={provider.entra.tenants[0]}")
        assert "tenant=" in str(refused(lambda: wrong.wrap(SEALED, CONTEXT), RootMisconfigured))
        for each in (root, cross, wrong):
            each.close()


def test_a_tenant_that_is_not_there() -> None:
    with AzureKeyVault() as provider:
        provider.vault_tenant = theirs = "11111111-2222-3333-4444-555555555555"
        root = open_root(f"{provider.make_hsm_key('root').uri}?tenant={theirs}")
        assert "(AADSTS90002)" in str(refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured))
        root.close()


@pytest.mark.parametrize(
    "audience", ["https://graph.microsoft.com", "https://vault.azure.net.evil.example", "nonsense", ""]
)
def test_a_token_is_for_the_vault_only(audience: str) -> None:
    """A host cannot have a token for something else by naming it in its challenge."""
    with AzureKeyVault() as provider:
        provider.challenge_audience = audience or " "
        root = open_root(provider.make_hsm_key("root").uri)
        refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured)
        assert provider.entra.tokens_given == 0
        root.close()


def test_the_sdks_own_check_of_a_challenge(monkeypatch: pytest.MonkeyPatch) -> None:
    """For a host below its audience's domain it is on; here the domain is made up of an address's last numbers."""
    with AzureKeyVault() as provider, monkeypatch.context() as changed:
        host = provider.host(managed_hsm=False)
        changed.setenv(HOSTS_VARIABLE, f"{host}=https://0.0.1:{host.partition(':')[2]}")
        root = open_root(provider.make_key("root").uri)
        assert isinstance(root, AzureRoot)
        assert root._service.verifiable
        assert "challenge" in str(refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured))
        assert provider.entra.requests == 0
        root.close()


# ---- other sources of an identity -------------------------------------------------------------------------


def test_a_managed_identity(provider: AzureKeyVault, key: AzureKey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("AZURE_CLIENT_ID")
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "ManagedIdentityCredential")
    monkeypatch.setenv("AZURE_POD_IDENTITY_AUTHORITY_HOST", f"https://{provider.entra.host}")
    monkeypatch.setattr(provider.entra, "token_seconds", 60)
    root = open_root(key.uri)
    wrapped = use(root)
    provider.entra.black_hole()
    with in_time():
        silent = refused(lambda: root.unwrap(wrapped, CONTEXT), RootUnavailable)
    assert "managed identity" in str(silent)
    provider.entra.heal()
    assert root.unwrap(wrapped, CONTEXT) == SEALED
    root.close()


def test_no_metadata_service(provider: AzureKeyVault, key: AzureKey, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "prod")
    monkeypatch.delenv("AZURE_CLIENT_SECRET")
    monkeypatch.setenv("AZURE_POD_IDENTITY_AUTHORITY_HOST", "http://127.0.0.1:9")
    root = open_root(key.uri)
    with in_time():
        missing = refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured)
    assert "no Azure identity is configured" in str(missing)
    root.close()


def test_a_workload_identity(
    provider: AzureKeyVault, key: AzureKey, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "token").write_text("signed.by.kubernetes")
    monkeypatch.setattr(provider.entra, "federated_token", "signed.by.kubernetes")
    monkeypatch.delenv("AZURE_CLIENT_SECRET")
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "WorkloadIdentityCredential")
    monkeypatch.setenv("AZURE_FEDERATED_TOKEN_FILE", str(tmp_path / "token"))
    root = open_root(key.uri)
    use(root)
    root.close()
    (tmp_path / "token").unlink()
    missing = refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured)
    assert "AZURE_FEDERATED_TOKEN_FILE" in str(missing)
    root.close()


def test_the_command_line_tool(
    provider: AzureKeyVault, key: AzureKey, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    tool = tmp_path / "az"
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setenv("AZURE_TOKEN_CREDENTIALS", "AzureCliCredential")
    tool.write_text("#!/bin/sh\necho 'ERROR: Please run az login to setup account.' >&2\nexit 1\n")
    tool.chmod(0o755)
    root = open_root(key.uri)
    assert "az login" in str(refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured))
    token = provider.entra.sign("https://managedhsm.azure.net", provider.entra.tenants[0])
    answer = f'{{"accessToken": "{token}", "expires_on": {int(time.time()) + 3600}}}'
    tool.write_text(f"#!/bin/sh\necho '{answer}'\n")
    use(root)
    root.close()
