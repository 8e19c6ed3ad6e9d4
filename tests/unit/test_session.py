# SPDX-License-Identifier: Apache-2.0
"""How two ends agree on a session: everybody who is not who they should be, and every altered word, is refused."""

from __future__ import annotations

import copy
import gc
import ipaddress
import os
import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.serialization import Encoding
from hypothesis import given, settings
from hypothesis import strategies as st

from certificates import CLIENT, HOUR, NOW, SERVER, Authority, key_of
from openkcm import crypto
from openkcm.errors import AccessDenied, ConfigurationError, DecryptError, InvalidInput, SecretMemoryError
from openkcm.rpc import session as sessions
from openkcm.rpc.session import (
    Answer,
    ChannelHello,
    ChannelReply,
    Credentials,
    Session,
    answer,
    begin,
    finish,
)
from support import refused

NAME = "core.example"
URI = x509.UniformResourceIdentifier("spiffe://example/gateway/one")
DNS = x509.DNSName(NAME)

CA = Authority()
MIDDLE = Authority("middle", CA)
OTHER = Authority("another CA")


def client(kind: str = "p256", number: int = 0, ca: Authority = CA, **more: Any) -> Credentials:
    key = key_of(kind, number)
    return Credentials(ca.issue(key, CLIENT, URI, **more), key, [CA.certificate])


def server(kind: str = "p256", number: int = 1, ca: Authority = CA, *names: x509.GeneralName) -> Credentials:
    key = key_of(kind, number)
    return Credentials(ca.issue(key, SERVER, *(names or (DNS,))), key, [CA.certificate])


ONE, TWO, CORE = client(), client(number=2), server()


def agree(one: Credentials = ONE, core: Credentials = CORE, name: str = NAME) -> tuple[Session, Answer]:
    """Both ends of a session between two that are who they say."""
    offer, hello = begin(one)
    answered = answer(core, hello, one.leaf)
    return finish(offer, answered.reply, name), answered


def understand(first: crypto.Channel, second: crypto.Channel) -> bool:
    """Whether two channels are ends of one."""
    keys = crypto.generate_keys(2)
    try:
        crypto.open_keys(second, crypto.seal_keys(first, keys, b"there"), b"there")
        crypto.open_keys(first, crypto.seal_keys(second, keys, b"back"), b"back")
    except DecryptError:
        return False
    return True


def refused_alike(call: Callable[[], object]) -> None:
    """Refused, in the words in which everybody is."""
    assert str(refused(call, AccessDenied)) == sessions.REFUSED


# ---- who agrees ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("one", ["p256", "p384", "ed25519", "rsa"])
@pytest.mark.parametrize("core", ["p256", "p384", "ed25519", "rsa"])
def test_two_ends_agree(one: str, core: str) -> None:
    gateway, service = client(one), server(core)
    session, answered = agree(gateway, service)
    assert understand(session.channel, answered.channel)
    assert answered.leaf == gateway.leaf
    session_id, channel = session
    assert session_id == session.id == answered.reply.session
    assert channel is session.channel
    assert len(session_id) == 16
    assert repr(session) == "<Session>"


def test_a_chain_is_verified_where_tls_gave_no_certificate() -> None:
    for ca in (CA, MIDDLE):
        offer, hello = begin(client(ca=ca))
        answered = answer(CORE, hello)
        assert understand(finish(offer, answered.reply, NAME).channel, answered.channel)
    strangers = Credentials(OTHER.issue(key_of("p256"), CLIENT, URI), key_of("p256"), [CA.certificate])
    refused_alike(lambda: answer(CORE, begin(strangers)[1]))
    # A server's certificate does not make a client.
    refused_alike(lambda: answer(CORE, begin(CORE)[1]))
    # Nor does one below a certificate that is no authority's.
    chain = [*client().certificates, *TWO.certificates]
    assert answer(CORE, replace(begin(ONE)[1], certificates=(ONE.leaf, *chain[1:]))).leaf == ONE.leaf


def test_only_the_certificate_of_the_connection_speaks() -> None:
    _, hello = begin(ONE)
    refused_alike(lambda: answer(CORE, hello, TWO.leaf))
    refused_alike(lambda: answer(CORE, hello, b""))
    assert answer(CORE, hello, ONE.leaf).leaf == ONE.leaf


def test_who_shows_another_certificate_cannot_sign_for_it() -> None:
    """Two has One's certificate, as everybody may, and TLS's word for it is what a bad proxy would give."""
    _, hello = begin(TWO)
    refused_alike(lambda: answer(CORE, replace(hello, certificates=ONE.certificates), ONE.leaf))
    refused_alike(lambda: answer(CORE, replace(hello, certificates=ONE.certificates)))


def test_the_server_must_be_the_one_that_was_meant() -> None:
    def reach(core: Credentials, name: str = NAME) -> Session:
        return agree(core=core, name=name)[0]

    address = x509.IPAddress(ipaddress.ip_address("127.0.0.1"))
    assert reach(server(ca=MIDDLE)).is_good()
    assert reach(server("p256", 1, CA, address), "127.0.0.1").is_good()
    assert reach(server("p256", 1, CA, DNS, address), NAME.upper()).is_good()
    for name in ("core.exampl", "a.core.example", "127.0.0.1", "::1", "localhost"):
        refused_alike(lambda name=name: reach(CORE, name))
    refused_alike(lambda: reach(server("p256", 1, CA, address), "127.0.0.2"))
    refused_alike(lambda: reach(server(ca=OTHER)))
    # A Gateway of the same authority is no Core, even if its certificate bears the name.
    key = key_of("p256", 3)
    refused_alike(lambda: reach(Credentials(CA.issue(key, CLIENT, DNS), key, [CA.certificate])))
    for name in ("kern.münchen", "a b", "-", "", "core.example:7443"):
        refused(lambda name=name: reach(CORE, name), ConfigurationError)


def test_expired_certificates_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    offer, hello = begin(ONE)
    reply = answer(CORE, hello, ONE.leaf).reply
    monkeypatch.setattr("openkcm.rpc.credentials._now", lambda: NOW + 2 * HOUR)
    refused_alike(lambda: finish(offer, reply, NAME))
    refused_alike(lambda: answer(CORE, begin(ONE)[1]))


@pytest.mark.parametrize("kind", ["p521", "rsa1024"])
def test_weak_and_unknown_keys_are_refused(kind: str) -> None:
    key = key_of(kind)
    chain = CA.issue(key, CLIENT, URI)
    refused(lambda: Credentials(chain, key, [CA.certificate]), ConfigurationError)
    leaf = chain[0].public_bytes(Encoding.DER)
    hello = replace(begin(ONE)[1], certificates=(leaf,))
    refused_alike(lambda: answer(CORE, hello, leaf))


# ---- what they say -------------------------------------------------------------------------------------


def flipped(data: bytes) -> bytes:
    return data[:-1] + bytes([data[-1] ^ 1])


HELLOS: dict[str, Callable[[ChannelHello], ChannelHello]] = {
    "lowest version 0": lambda hello: replace(hello, lowest_version=0),
    "highest version": lambda hello: replace(hello, highest_version=2),
    "versions the wrong way round": lambda hello: replace(hello, lowest_version=2, highest_version=1),
    "version too high": lambda hello: replace(hello, highest_version=1 << 32),
    "public key": lambda hello: replace(hello, public_key=flipped(hello.public_key)),
    "another's public key": lambda hello: replace(hello, public_key=crypto.offer_channel().public),
    "short public key": lambda hello: replace(hello, public_key=hello.public_key[:31]),
    "long public key": lambda hello: replace(hello, public_key=hello.public_key + b"\0"),
    "no certificate": lambda hello: replace(hello, certificates=()),
    "another certificate": lambda hello: replace(hello, certificates=TWO.certificates),
    "altered certificate": lambda hello: replace(hello, certificates=(flipped(hello.certificates[0]),)),
    "a longer certificate": lambda hello: replace(hello, certificates=(hello.certificates[0] + b"\0",)),
    "rubbish": lambda hello: replace(hello, certificates=(b"rubbish",)),
    "rubbish above": lambda hello: replace(hello, certificates=(*hello.certificates, b"rubbish")),
    "too many": lambda hello: replace(hello, certificates=hello.certificates * 9),
    "huge": lambda hello: replace(hello, certificates=(*hello.certificates, bytes(1 << 20))),
    "signature": lambda hello: replace(hello, signature=flipped(hello.signature)),
    "no signature": lambda hello: replace(hello, signature=b""),
    "huge signature": lambda hello: replace(hello, signature=bytes(1 << 20)),
    "another's signature": lambda hello: replace(hello, signature=begin(TWO)[1].signature),
    "signature of another hello": lambda hello: replace(hello, signature=begin(ONE)[1].signature),
}


@pytest.mark.parametrize("change", HELLOS)
def test_an_altered_hello_is_refused(change: str) -> None:
    _, hello = begin(ONE)
    altered = HELLOS[change](hello)
    gc.collect()
    before = crypto.secret_memory_info()["handles"]
    refused_alike(lambda: answer(CORE, altered, ONE.leaf))
    refused_alike(lambda: answer(CORE, altered))
    assert crypto.secret_memory_info()["handles"] == before
    assert answer(CORE, hello, ONE.leaf).reply.version == 1


REPLIES: dict[str, Callable[[ChannelReply], ChannelReply]] = {
    "version 0": lambda reply: replace(reply, version=0),
    "version not offered": lambda reply: replace(reply, version=2),
    "session": lambda reply: replace(reply, session=flipped(reply.session)),
    "short session": lambda reply: replace(reply, session=reply.session[:15]),
    "lifetime": lambda reply: replace(reply, lifetime=reply.lifetime + 1),
    "no lifetime": lambda reply: replace(reply, lifetime=0),
    "endless lifetime": lambda reply: replace(reply, lifetime=1 << 31),
    "public key": lambda reply: replace(reply, public_key=flipped(reply.public_key)),
    "short public key": lambda reply: replace(reply, public_key=b""),
    "no certificate": lambda reply: replace(reply, certificates=()),
    "another Core's certificate": lambda reply: replace(reply, certificates=server(number=4).certificates),
    "the same key's other certificate": lambda reply: replace(reply, certificates=server().certificates),
    "altered certificate": lambda reply: replace(reply, certificates=(flipped(reply.certificates[0]),)),
    "rubbish": lambda reply: replace(reply, certificates=(b"rubbish",)),
    "huge": lambda reply: replace(reply, certificates=(*reply.certificates, bytes(1 << 20))),
    "signature": lambda reply: replace(reply, signature=flipped(reply.signature)),
    "no signature": lambda reply: replace(reply, signature=b""),
    "the reply to another": lambda reply: answer(CORE, begin(TWO)[1], TWO.leaf).reply,
    "the reply to an earlier hello": lambda reply: answer(CORE, begin(ONE)[1], ONE.leaf).reply,
}


@pytest.mark.parametrize("change", REPLIES)
def test_an_altered_reply_is_refused(change: str) -> None:
    offer, hello = begin(ONE)
    altered = REPLIES[change](answer(CORE, hello, ONE.leaf).reply)
    refused_alike(lambda: finish(offer, altered, NAME))
    assert offer.key.wiped


def test_an_offer_is_used_once() -> None:
    offer, hello = begin(ONE)
    reply = answer(CORE, hello, ONE.leaf).reply
    finish(offer, reply, NAME)
    refused(lambda: finish(offer, reply, NAME), SecretMemoryError)


def test_a_hello_that_is_sent_again_gives_a_session_that_nobody_can_use() -> None:
    offer, hello = begin(ONE)
    first, again = answer(CORE, hello, ONE.leaf), answer(CORE, hello, ONE.leaf)
    assert first.reply.session != again.reply.session
    session = finish(offer, first.reply, NAME)
    assert understand(session.channel, first.channel)
    assert not understand(session.channel, again.channel)


@pytest.mark.parametrize("point", [bytes(32), (1).to_bytes(32, "little")], ids=["zero", "one"])
def test_a_point_of_small_order_is_refused_even_if_it_is_signed(point: bytes) -> None:
    signed = ONE.sign(sessions._hello_bytes(1, 1, point, ONE.leaf))
    hello = ChannelHello(1, 1, point, ONE.certificates, signed)
    refused_alike(lambda: answer(CORE, hello, ONE.leaf))
    offer, mine = begin(ONE)
    transcript = sessions._transcript(mine, 1, point, bytes(16), 600, CORE.leaf)
    reply = ChannelReply(1, bytes(16), 600, point, CORE.certificates, CORE.sign(transcript))
    refused_alike(lambda: finish(offer, reply, NAME))


def test_the_highest_common_version_is_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A newer Gateway and an older Core, and the other way round; what they offered cannot be taken away on the way."""
    monkeypatch.setattr(sessions, "HIGHEST_VERSION", 2)
    newer, hello = begin(ONE)
    both = answer(CORE, hello, ONE.leaf).reply
    assert both.version == 2
    lowered = replace(hello, highest_version=1)
    refused_alike(lambda: answer(CORE, lowered, ONE.leaf))
    monkeypatch.setattr(sessions, "HIGHEST_VERSION", 1)
    older = answer(CORE, hello, ONE.leaf)
    assert older.reply.version == 1
    assert understand(finish(newer, older.reply, NAME).channel, older.channel)
    monkeypatch.setattr(sessions, "LOWEST_VERSION", 2)
    monkeypatch.setattr(sessions, "HIGHEST_VERSION", 2)
    offer, _ = begin(ONE)
    refused_alike(lambda: finish(offer, older.reply, NAME))
    _, hello = begin(ONE)
    monkeypatch.setattr(sessions, "LOWEST_VERSION", 1)
    monkeypatch.setattr(sessions, "HIGHEST_VERSION", 1)
    assert "upgrade" in str(refused(lambda: answer(CORE, hello, ONE.leaf), InvalidInput))


def test_a_lifetime_is_bounded() -> None:
    _, hello = begin(ONE)
    for lifetime in (0, -1, 3601):
        refused(lambda lifetime=lifetime: answer(CORE, hello, ONE.leaf, lifetime=lifetime), InvalidInput)
    assert answer(CORE, hello, ONE.leaf, lifetime=3600).reply.lifetime == 3600


FIELDS = st.one_of(st.binary(max_size=80), st.sampled_from([ONE.leaf, TWO.leaf, CORE.leaf]))


@settings(deadline=None)
@given(
    lowest=st.integers(0, 1 << 32),
    highest=st.integers(0, 1 << 32),
    key=FIELDS,
    chain=st.lists(FIELDS, max_size=3),
    signature=FIELDS,
)
def test_no_hello_does_anything_else(
    lowest: int, highest: int, key: bytes, chain: list[bytes], signature: bytes
) -> None:
    hello = ChannelHello(lowest, highest, key, tuple(chain), signature)
    for leaf in (None, ONE.leaf):
        refused_alike(lambda leaf=leaf: answer(CORE, hello, leaf))


@settings(deadline=None)
@given(
    version=st.integers(0, 1 << 32),
    session=st.binary(max_size=20),
    lifetime=st.integers(0, 1 << 32),
    key=FIELDS,
    chain=st.lists(FIELDS, max_size=3),
    signature=FIELDS,
)
def test_no_reply_does_anything_else(
    version: int, session: bytes, lifetime: int, key: bytes, chain: list[bytes], signature: bytes
) -> None:
    reply = ChannelReply(version, session, lifetime, key, tuple(chain), signature)
    refused_alike(lambda: finish(begin(ONE)[0], reply, NAME))


def test_credentials_stay_where_they_are() -> None:
    assert repr(ONE) == "<Credentials>"
    for leave in (pickle.dumps, copy.copy, copy.deepcopy):
        refused(lambda leave=leave: leave(ONE), TypeError)


def test_an_offer_does_not_survive_a_fork() -> None:
    offer, hello = begin(ONE)
    reply = answer(CORE, hello, ONE.leaf).reply
    session = agree()[0]
    child = os.fork()
    if child == 0:
        status = 1
        try:
            refused(lambda: finish(offer, reply, NAME), SecretMemoryError)
            status = 2 if session.is_good() else 0
        finally:
            os._exit(status)
    assert os.waitpid(child, 0)[1] == 0
    assert finish(offer, reply, NAME).is_good()
