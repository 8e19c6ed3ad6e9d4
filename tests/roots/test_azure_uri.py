# SPDX-License-Identifier: Apache-2.0
"""Azure roots from outside: URIs and hosts, what customers must allow, and the SDK on the provider to test against."""

from __future__ import annotations

import sys

import pytest
from azure.identity import DefaultAzureCredential
from azure.keyvault.keys import KeyClient
from hypothesis import given
from hypothesis import strategies as st

from azure_support import TENANT, VERSION, names
from azure_support import either_key as either_key
from azure_support import provider as provider
from azure_support import root as root
from azure_support import running as running
from openkcm.errors import RootMisconfigured
from openkcm.roots import Root, open_root
from openkcm.roots.azure import AzureRoot
from openkcm.roots.azure.uri import HOSTS_VARIABLE, SUFFIXES, AzureURI, find_service, parse_azure_uri
from openkcm.roots.base import Grantable
from openkcm.testing.azure import AzureKey, AzureKeyVault
from support import refused

# ---- URIs -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "uri",
    [
        "azure-kms:",
        "azure-kms://acme.vault.azure.net",
        "azure-kms://acme.vault.azure.net/",
        "azure-kms://acme.vault.azure.net/keys/",
        "azure-kms://acme.vault.azure.net/secrets/root",
        "azure-kms://acme.vault.azure.net/keys/root/",
        "azure-kms://acme.vault.azure.net/keys/ro_ot",
        "azure-kms://acme.vault.azure.net/keys/ro%6ft",
        f"azure-kms://acme.vault.azure.net/keys/{'r' * 128}",
        "azure-kms://acme.vault.azure.net/keys/root/latest",
        f"azure-kms://acme.vault.azure.net/keys/root/{VERSION.upper()}",
        f"azure-kms://acme.vault.azure.net/keys/root/{VERSION}0",
        f"azure-kms://acme.vault.azure.net/keys/root/{VERSION}/wrapkey",
        "azure-kms://acme.vault.azure.net/keys/root?",
        "azure-kms://acme.vault.azure.net/keys/root?tenant=",
        "azure-kms://acme.vault.azure.net/keys/root?tenant=..",
        "azure-kms://acme.vault.azure.net/keys/root?tenant=contoso.example",
        f"azure-kms://acme.vault.azure.net/keys/root?tenant={TENANT}0",
        "azure-kms://acme.vault.azure.net/keys/root?tenant=a&tenant=b",
        "azure-kms://acme.vault.azure.net/keys/root?api-version=7.4",
        "azure-kms://acme.vault.azure.net/keys/root#x",
        "azure-kms://user:hunter2@acme.vault.azure.net/keys/root",
        "azure-kms:///keys/root",
        "azure-kms://.vault.azure.net/keys/root",
        "azure-kms://-acme.vault.azure.net/keys/root",
        "azure-kms://acme.vault.azure.net:0/keys/root",
        "azure-kms://acme.vault.azure.net:99999/keys/root",
        "azure-kms://acme.vault.azure.net:x/keys/root",
        "azure-kms://äcme.vault.azure.net/keys/root",
        "azure-kms://acme.vault.azure.net/keys/root\n",
        "https://acme.vault.azure.net/keys/root",
    ],
)
def test_malformed_uris(uri: str) -> None:
    error = refused(lambda: parse_azure_uri(uri), RootMisconfigured)
    assert "hunter2" not in str(error)


def test_a_uri_is_read() -> None:
    parsed = parse_azure_uri(
        f"azure-kms://Acme.vault.azure.net/keys/Root-1/{VERSION}?tenant={TENANT.upper()}"
    )
    assert parsed == AzureURI("acme.vault.azure.net", "Root-1", VERSION, TENANT)
    assert str(parsed) == f"azure-kms://acme.vault.azure.net/keys/Root-1/{VERSION}?tenant={TENANT}"
    assert parse_azure_uri("azure-kms://h:8443/keys/r") == AzureURI("h:8443", "r")


_LABEL = st.from_regex(r"[0-9a-z]([0-9a-z-]{0,8}[0-9a-z])?", fullmatch=True)
_NAME = st.lists(_LABEL, min_size=1, max_size=4).map(".".join)


@given(
    st.builds(
        AzureURI,
        st.builds(
            lambda host, port: f"{host}:{port}" if port else host, _NAME, st.none() | st.integers(1, 65535)
        ),
        st.from_regex(r"[0-9A-Za-z-]{1,127}", fullmatch=True),
        st.none() | st.from_regex(r"[0-9a-f]{32}", fullmatch=True),
        st.none() | st.uuids().map(str),
    )
)
def test_a_uri_has_one_spelling(parsed: AzureURI) -> None:
    assert parse_azure_uri(str(parsed)) == parsed


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_azures_own_hosts(suffix: str) -> None:
    service = find_service(f"acme.{suffix}")
    assert service.audience == f"https://{suffix}"
    assert service.managed_hsm is suffix.startswith("managedhsm")
    assert service.verifiable
    assert service.resource == "acme"
    assert isinstance(open_root(f"azure-kms://acme.{suffix}/keys/root"), AzureRoot)


@pytest.mark.parametrize(
    "host",
    [
        "vault.azure.net",
        "a.b.vault.azure.net",
        "acme.vault.azure.net.evil.example",
        "acmevault.azure.net",
        "acme.vault.azure.net:8443",
        "vault.example",
        "127.0.0.1:1",
    ],
)
def test_other_hosts_must_be_named(host: str) -> None:
    error = refused(lambda: open_root(f"azure-kms://{host}/keys/root"), RootMisconfigured)
    assert HOSTS_VARIABLE in str(error)


def test_a_host_is_named_together_with_what_its_tokens_are_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(
        HOSTS_VARIABLE,
        "kv.example:8443=https://vault.azure.net, a.vault.new.example=https://vault.new.example",
    )
    service = find_service("kv.example:8443")
    assert (service.managed_hsm, service.audience, service.verifiable) == (
        False,
        "https://vault.azure.net",
        False,
    )
    assert find_service("a.vault.new.example").verifiable
    refused(lambda: find_service("kv.example"), RootMisconfigured)
    monkeypatch.setenv(HOSTS_VARIABLE, "hsm.example=https://managedhsm.new.example")
    assert find_service("hsm.example").managed_hsm


@pytest.mark.parametrize(
    "value", ["kv.example", "kv.example=", "kv.example=vault", "=https://a", "a=https://b/c"]
)
def test_hosts_that_are_named_wrongly(monkeypatch: pytest.MonkeyPatch, value: str) -> None:
    monkeypatch.setenv(HOSTS_VARIABLE, value)
    refused(lambda: find_service("kv.example"), RootMisconfigured)


def test_without_the_sdk(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "openkcm.roots.azure.client", raising=False)
    monkeypatch.delattr("openkcm.roots.azure.client", raising=False)
    monkeypatch.setitem(sys.modules, "azure.keyvault.keys", None)
    error = refused(lambda: open_root("azure-kms://acme.vault.azure.net/keys/root"), RootMisconfigured)
    assert "openkcm[azure]" in str(error)


# ---- grants and warnings ----------------------------------------------------------------------------------


def test_a_grant_for_us(provider: AzureKeyVault, key: AzureKey, root: Root) -> None:
    assert isinstance(root, Grantable)
    key.deny()
    grant = root.grant()
    assert grant.identity == provider.entra.object_id
    assert grant.permissions == key.permissions[:2]
    assert grant.form == "role assignment"
    assert f"--assignee-object-id {provider.entra.object_id}" in grant.text
    assert grant.text.count(key.name) == 1


def test_a_grant_in_azures_words() -> None:
    oid = "7f9a6d9c-1111-2222-3333-444455556666"
    root = open_root("azure-kms://acme.vault.azure.net/keys/root")
    assert isinstance(root, Grantable)
    assert root.grant(oid).text == (
        "# a vault with role-based access (the role allows wrap, unwrap and reading the public key)\n"
        'az role assignment create --role "Key Vault Crypto Service Encryption User"'
        f" --assignee-object-id {oid} --assignee-principal-type ServicePrincipal"
        ' --scope "$(az keyvault show --name acme --query id --output tsv)/keys/root"\n'
        "# a vault with access policies\n"
        f"az keyvault set-policy --name acme --object-id {oid} --key-permissions wrapKey unwrapKey\n"
    )
    hsm = open_root("azure-kms://acme.managedhsm.azure.net/keys/root")
    assert isinstance(hsm, Grantable)
    assert hsm.grant(oid).text == (
        'az keyvault role assignment create --hsm-name acme --role "Managed HSM Crypto Service Encryption User"'
        f" --assignee-object-id {oid} --assignee-principal-type ServicePrincipal --scope /keys/root\n"
    )
    assert "--assignee 'a b; rm'" in hsm.grant("a b; rm").text


def test_a_grant_without_knowing_who_we_are(provider: AzureKeyVault, key: AzureKey) -> None:
    root = open_root(key.uri)
    assert isinstance(root, AzureRoot)
    provider.entra.answer("AADSTS700016")
    refused(root.grant, RootMisconfigured)
    assert root.grant(provider.entra.object_id).identity == provider.entra.object_id
    root.close()


def test_what_is_weak(provider: AzureKeyVault) -> None:
    key = provider.make_key(f"weak-{next(names)}")
    root = open_root(key.uri)
    key.kind = "RSA"
    key.attributes = {"exportable": True, "recoveryLevel": "Recoverable+Purgeable"}
    found = " ".join(root.warnings())
    assert all(word in found for word in ("software", "exportable", "purge"))
    pinned = open_root(f"{key.uri}/{key.versions[0].name}")
    assert len(pinned.warnings()) == 3
    key.attributes = {"exportable": "true", "recoveryLevel": 7, "exp": "soon"}
    key.kind = "RSA-HSM"
    assert root.warnings() == []
    pinned.close()
    root.close()


@pytest.mark.parametrize(("bits", "weak"), [(2048, True), (4096, False)])
def test_sizes_of_rsa(bits: int, weak: bool) -> None:
    with AzureKeyVault(rsa_bits=bits) as provider:
        root = open_root(provider.make_key("root").uri)
        wrapped = root.wrap(bytes(72), {})
        assert len(wrapped) == 18 + bits // 8
        assert root.unwrap(wrapped, {}) == bytes(72)
        assert bool(root.warnings()) is weak
        root.close()


# ---- the provider to test against -------------------------------------------------------------------------


def test_the_sdk_speaks_to_it_unmodified(provider: AzureKeyVault) -> None:
    """Also what the root does not use: reading, listing, rotating, and wrapping in this process."""
    key = provider.make_key(f"sdk-{next(names)}")
    url = f"https://{provider.host(managed_hsm=False)}"
    with (
        DefaultAzureCredential(disable_instance_discovery=True) as credential,
        KeyClient(url, credential, verify_challenge_resource=False) as client,
    ):
        found = client.get_key(key.name)
        assert found.key_type == "RSA-HSM"
        assert client.rotate_key(key.name).properties.version == key.versions[1].name
        listed = [each.version for each in client.list_properties_of_key_versions(key.name)]
        assert listed == [each.name for each in key.versions]
        with client.get_cryptography_client(key.name) as cryptography:
            wrapped = cryptography.wrap_key("RSA-OAEP-256", b"secret")  # type: ignore[arg-type]
            assert cryptography.unwrap_key("RSA-OAEP-256", wrapped.encrypted_key).key == b"secret"  # type: ignore[arg-type]
