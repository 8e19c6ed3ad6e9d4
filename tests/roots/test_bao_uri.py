# SPDX-License-Identifier: Apache-2.0
"""``bao-transit:`` URIs: one spelling each, and no secret in any."""

from __future__ import annotations

import ipaddress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openkcm.errors import RootMisconfigured
from openkcm.roots import open_root
from openkcm.roots.bao.uri import BaoURI, parse_bao_uri
from support import refused


@pytest.mark.parametrize(
    "uri",
    [
        "bao-transit:",
        "bao-transit://",
        "bao-transit://host",
        "bao-transit://host/",
        "bao-transit://host/key",
        "bao-transit://host/transit/",
        "bao-transit://host//key",
        "bao-transit:///transit/key",
        "bao-transit://host/../key",
        "bao-transit://host/a/../key",
        "bao-transit://host/./key",
        "bao-transit://host/tran%73it/key",
        "bao-transit://host/transit/k*",
        "bao-transit://host/+/key",
        "bao-transit://host/transit/key.",
        "bao-transit://host/transit/.key",
        "bao-transit://host/transit/key#x",
        "bao-transit://host/transit/kéy",
        "bao-transit://höst/transit/key",
        "bao-transit://ho st/transit/key",
        "bao-transit://host_name/transit/key",
        "bao-transit://-host/transit/key",
        "bao-transit://a..b/transit/key",
        "bao-transit://host./transit/key",
        "bao-transit://1.2.3/transit/key",
        "bao-transit://1.2.3.4.5/transit/key",
        "bao-transit://1.2.3.256/transit/key",
        "bao-transit://01.2.3.4/transit/key",
        "bao-transit://2130706433/transit/key",
        "bao-transit://::1/transit/key",
        "bao-transit://[::1/transit/key",
        "bao-transit://[::1]x/transit/key",
        "bao-transit://[::1]x80/transit/key",
        "bao-transit://[fe80::1%25eth0]/transit/key",
        "bao-transit://[]/transit/key",
        "bao-transit://host:/transit/key",
        "bao-transit://host:0/transit/key",
        "bao-transit://host:080/transit/key",
        "bao-transit://host:65536/transit/key",
        "bao-transit://host:99999999/transit/key",
        "bao-transit://host:-1/transit/key",
        "bao-transit://host:8200:1/transit/key",
        "bao-transit://host/transit/key?",
        "bao-transit://host/transit/key?login",
        "bao-transit://host/transit/key?login=",
        "bao-transit://host/transit/key?login=ldap",
        "bao-transit://host/transit/key?login=token&login=token",
        "bao-transit://host/transit/key?login=token&",
        "bao-transit://host/transit/key?nonsense=1",
        "bao-transit://host/transit/key?auth=approle",
        "bao-transit://host/transit/key?login=approle&auth=../x",
        "bao-transit://host/transit/key?login=approle&role=x",
        "bao-transit://host/transit/key?login=kubernetes",
        "bao-transit://host/transit/key?login=kubernetes&role=a%20b",
        "bao-transit://host/transit/key?role=x",
        "bao-transit://host/transit/key?namespace=/a",
        "bao-transit://host/transit/key?namespace=a%0ab",
        "bao-transit://host/transit/key?credentials=ACME",
        "bao-transit://host/transit/key?credentials=a_b",
        "bao-transit://host/transit/key?ca=relative.pem",
        "bao-transit://host/transit/key?ca=/a%00b",
        "bao-transit://host/transit/key?ca=/%ff",
        "bao-transit://host/transit/key?ca=/a%2",
        "bao-transit://host/transit/key?tls=on",
        "bao-transit://127.0.0.1/transit/key?tls=on",
        "bao-transit://127.0.0.1/transit/key?tls=off&ca=/x",
        "bao-transit://host/" + "a" * 2100 + "/key",
    ],
)
def test_malformed_uris(uri: str) -> None:
    refused(lambda: parse_bao_uri(uri), RootMisconfigured)


@pytest.mark.parametrize(
    "uri",
    [
        "bao-transit://host/transit/key?token=hunter2",
        "bao-transit://host/transit/key?TOKEN=hunter2",
        "bao-transit://host/transit/key?login=approle&secret-id=hunter2",
        "bao-transit://host/transit/key?login=approle&role_id=hunter2",
        "bao-transit://host/transit/key?login=kubernetes&role=r&jwt=hunter2",
        "bao-transit://hunter2@host/transit/key",
        "bao-transit://user:hunter2@host/transit/key",
        "bao-transit://host/transit/key?hunter2=x",
        "bao-transit://host/transit/key?login=hunter2",
    ],
)
def test_secrets_in_a_uri_are_refused_and_not_repeated(uri: str) -> None:
    assert "hunter2" not in str(refused(lambda: open_root(uri), RootMisconfigured))


@pytest.mark.parametrize(
    "host", ["host", "10.0.0.1", "[2001:db8::1]", "localhost.example", "127.0.0.1.example"]
)
def test_plaintext_is_for_this_machine_alone(host: str) -> None:
    refused(lambda: parse_bao_uri(f"bao-transit://{host}/transit/key?tls=off"), RootMisconfigured)


@pytest.mark.parametrize("host", ["127.0.0.1", "127.1.2.3", "[::1]", "localhost"])
def test_plaintext_must_be_asked_for_by_name(host: str) -> None:
    parsed = parse_bao_uri(f"bao-transit://{host}:8100/transit/key?tls=off")
    assert parsed.address == f"http://{host}:8100"
    assert parse_bao_uri(f"bao-transit://{host}:8100/transit/key").address == f"https://{host}:8100"


@pytest.mark.parametrize(
    ("uri", "canonical"),
    [
        ("bao-transit://Bao.Example/transit/Key", "bao-transit://bao.example/transit/Key"),
        ("bao-transit://h:8200/transit/k", "bao-transit://h/transit/k"),
        ("bao-transit://h:443/a/b/c/k", "bao-transit://h:443/a/b/c/k"),
        ("bao-transit://[2001:DB8:0:0::1]:1/t/k", "bao-transit://[2001:db8::1]:1/t/k"),
        ("bao-transit://h/t/k?login=token", "bao-transit://h/t/k"),
        ("bao-transit://h/t/k?auth=approle&login=approle", "bao-transit://h/t/k?login=approle"),
        ("bao-transit://h/t/k?ca=%2Fa%20b", "bao-transit://h/t/k?ca=/a%20b"),
        (
            "bao-transit://h/t/k?role=r&namespace=a/b&credentials=acme-1&auth=k8s&login=kubernetes",
            "bao-transit://h/t/k?login=kubernetes&auth=k8s&role=r&namespace=a/b&credentials=acme-1",
        ),
    ],
)
def test_each_root_has_one_spelling(uri: str, canonical: str) -> None:
    assert open_root(uri).uri == canonical
    assert open_root(canonical).uri == canonical


def test_a_uri_is_read_in_parts() -> None:
    parsed = parse_bao_uri(
        "bao-transit://[::1]:8300/team/transit/root-1?login=kubernetes&role=core&ca=/etc/ca.pem"
    )
    assert parsed == BaoURI(
        "::1", "team/transit", "root-1", 8300, login="kubernetes", role="core", ca="/etc/ca.pem"
    )
    assert parsed.address == "https://[::1]:8300"
    assert parsed.login_mount == "kubernetes"


_WORD = st.from_regex(r"\A[A-Za-z0-9_](?:[A-Za-z0-9_.-]{0,20}[A-Za-z0-9_])?\Z")
_PLACE = st.lists(_WORD, min_size=1, max_size=3).map("/".join)
_HOST = st.one_of(
    st.from_regex(r"\A[a-z][a-z0-9]{0,8}(?:\.[a-z][a-z0-9-]{0,8}[a-z0-9])?\Z"),
    st.ip_addresses(v=4).map(str),
    st.ip_addresses(v=6).filter(lambda address: address.scope_id is None).map(str),
)
_CA = st.text(st.characters(exclude_categories=["C", "Z"]) | st.sampled_from(" /"), max_size=20).map(
    lambda rest: "/" + rest
)


@given(
    host=_HOST,
    port=st.integers(1, 65535),
    mount=_PLACE,
    key=_WORD,
    login=st.sampled_from(["token", "approle", "kubernetes"]),
    auth=st.none() | _PLACE,
    role=_WORD,
    namespace=st.none() | _PLACE,
    credentials=st.none() | st.from_regex(r"\A[a-z0-9](?:[a-z0-9-]{0,9}[a-z0-9])?\Z"),
    ca=st.none() | _CA,
    plaintext=st.booleans(),
)
def test_serialising_and_parsing_is_the_identity(
    host: str,
    port: int,
    mount: str,
    key: str,
    login: str,
    auth: str | None,
    role: str,
    namespace: str | None,
    credentials: str | None,
    ca: str | None,
    plaintext: bool,
) -> None:
    here = host == "localhost" or (
        (host[0].isdigit() or ":" in host) and ipaddress.ip_address(host).is_loopback
    )
    off = plaintext and here
    uri = BaoURI(
        host=host,
        mount=mount,
        key=key,
        port=port,
        login=login,
        auth=None if login in ("token", auth) else auth,
        role=role if login == "kubernetes" else None,
        namespace=namespace,
        credentials=credentials,
        ca=None if off else ca,
        tls=not off,
    )
    assert parse_bao_uri(str(uri)) == uri
    assert str(parse_bao_uri(str(uri))) == str(uri)
