# SPDX-License-Identifier: Apache-2.0
"""A serving Core's configuration: every mistake at once, and no secret in anything that is said."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from openkcm import ConfigurationError, Core, SealError
from openkcm.core.seal import open_seal
from openkcm.rpc.server.config import ServeConfig, read_config
from rpc_support import Site
from support import run_python

PACKAGING = Path(__file__).resolve().parents[2] / "packaging"
PASSWORD = "correct-horse"


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Certificates and a vault."""
    yield Site(tmp_path_factory.mktemp("site"))


def mistakes(site: Site, **settings: object) -> list[str]:
    """What is wrong with a configuration, each mistake for itself."""
    path = site.config("wrong", **settings)
    with pytest.raises(ConfigurationError) as caught:
        read_config(path)
    return str(caught.value).removeprefix(f"{path}: ").split("; ")


def read(site: Site, **settings: object) -> ServeConfig:
    """A configuration that is right."""
    return read_config(site.config("right", **settings))


def test_every_mistake_is_told_at_once(site: Site) -> None:
    found = mistakes(
        site,
        store="nowhere",
        region="not a region",
        seal="missing.seal",
        probe_interval=0,
        drain="long",
        log="xml",
        roots=["local"],
        conections=7,
        **{"listen.grpc": "no-port", "limits.calls": 0, "limits.threds": 4, "tls.key": "missing.key"},
    )
    for name in (
        "store",
        "region",
        "seal",
        "probe_interval",
        "drain",
        "log",
        "roots",
        "listen.grpc",
        "tls.key",
    ):
        assert sum(each.startswith(f"{name}: ") for each in found) == 1, (name, found)
    for name in ("conections", "limits.threds"):
        assert f"{name} is not a setting" in found
    assert any(each.startswith("limits.calls: is a whole number") for each in found)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"store": "sqlite:///missing.db"}, "there is no vault"),
        ({"store": 7}, "store: is text"),
        ({"seal": "credential:seal"}, "$CREDENTIALS_DIRECTORY is not set"),
        ({"tls.certificate": "{ca}"}, "the private key is not that of the first certificate"),
        ({"tls.clients": "{key}"}, "holds no certificates"),
        (
            {"listen.admin": "127.0.0.1:7445", "listen.grpc": "127.0.0.1:7445"},
            "two interfaces have one address",
        ),
        ({"listen.data": "", "listen.grpc": ""}, "listen.data is missing"),
        ({"limits.threads": True}, "limits.threads: is a whole number"),
        ({"grace": 4000}, "grace: is a number from 0 to 3600"),
        ({"level": "loud"}, "level: is one of"),
        ({"tls": "yes"}, "tls is a table"),
    ],
    ids=str,
)
def test_a_mistake_is_told_by_name(site: Site, settings: dict[str, object], said: str) -> None:
    place = {"{ca}": str(site.ca.certificate_path), "{key}": str(site.server.key)}
    wrong = {name: place.get(str(value), value) for name, value in settings.items()}
    if "tls" in wrong:
        wrong |= {}
        path = site.config("wrong")
        text = "\n".join(line for line in path.read_text().splitlines() if not line.startswith("tls."))
        path.write_text(f"tls = 1\n{text}\n")
        with pytest.raises(ConfigurationError, match="tls is a table"):
            read_config(path)
        return
    assert any(said in each for each in mistakes(site, **wrong)), mistakes(site, **wrong)


def test_one_certificates_share_is_a_part_of_the_whole_and_can_be_set(site: Site) -> None:
    for limits, shares in (
        ({}, (1000, 200)),
        ({"limits.connections": 50, "limits.streams": 4000}, (32, 800)),
        ({"limits.peer_connections": 3, "limits.peer_streams": 7}, (3, 7)),
    ):
        found = read(site, **limits).limits
        assert (found.peer_connections, found.peer_streams) == shares
    assert any(
        each.startswith("limits.peer_streams: is") for each in mistakes(site, **{"limits.peer_streams": 0})
    )


def test_what_is_no_toml_is_said_to_be_none(tmp_path: Path) -> None:
    path = tmp_path / "core.toml"
    for content in (b"store = ", b"\xff\xfe"):
        path.write_bytes(content)
        with pytest.raises(ConfigurationError, match="is not TOML"):
            read_config(path)
    with pytest.raises(ConfigurationError, match="cannot be read"):
        read_config(tmp_path / "missing.toml")


def test_the_stores_password_comes_from_a_file_and_is_shown_nowhere(
    site: Site, monkeypatch: pytest.MonkeyPatch
) -> None:
    secret = site.folder / "password"
    secret.touch(0o600)
    secret.write_text(f"{PASSWORD}\n")
    store = "postgresql://core@db.example/openkcm?sslmode=verify-full"
    config = read(site, store=store, store_password_file=str(secret))
    assert config.store == f"postgresql://core:{PASSWORD}@db.example/openkcm?sslmode=verify-full"
    assert PASSWORD not in repr(config)
    monkeypatch.setenv("OPENKCM_STORE_PASSWORD", PASSWORD)
    assert f":{PASSWORD}@" in read(site, store=store).store
    monkeypatch.delenv("OPENKCM_STORE_PASSWORD")
    assert read(site, store=store).store == store

    secret.chmod(0o640)
    said = mistakes(site, store=store, store_password_file=str(secret), grace=-1)
    assert (
        len(said) == 3
    )  # the remedy of the first has a semicolon of its own, or not: none holds the password
    assert PASSWORD not in str(said)
    secret.chmod(0o600)
    for content in ("", f"{PASSWORD}\n{PASSWORD}\n"):
        secret.write_text(content)
        assert "not a file with one password" in str(mistakes(site, store_password_file=str(secret)))


@pytest.mark.parametrize(
    "store",
    ["postgresql://core:Tr0ub@dor:and3secret@db.example/openkcm", "postgresql://core:and3secret@db:x/y"],
)
def test_a_mistyped_url_is_not_shown(site: Site, store: str) -> None:
    (said,) = mistakes(site, store=store)
    assert "store" in said
    assert "and3secret" not in said


def test_a_password_in_the_url_wants_a_private_file(site: Site) -> None:
    path = site.config("inline", store=f"postgresql://core:{PASSWORD}@db.example/openkcm")
    assert PASSWORD in read_config(path).store
    path.chmod(0o644)
    with pytest.raises(ConfigurationError, match="store_password_file") as caught:
        read_config(path)
    assert PASSWORD not in str(caught.value)


def test_the_seal_comes_as_a_systemd_credential(
    site: Site, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    seal = tmp_path / "seal"
    shutil.copyfile(site.folder / "vault.seal", seal)
    seal.chmod(0o440)  # what systemd's ACL for the service's user shows as
    with pytest.raises(SealError, match="can be read by others"):
        open_seal(seal)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(tmp_path))
    open_seal(seal).wipe()
    config = read(site, seal="credential:seal")
    assert config.seal == seal
    with Core.open(config.store, seal=config.seal) as core:
        assert core.probe("acme").reason == ""
    for wrong in ("credential:", "credential:../seal", "credential:other"):
        assert mistakes(site, seal=wrong)[0].startswith("seal: ")
    seal.chmod(0o444)
    with pytest.raises(SealError, match="can be read by others"):
        open_seal(seal)


def test_the_example_is_accepted(site: Site, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from openkcm.cli.app import run

    shutil.copyfile(PACKAGING / "core.toml", tmp_path / "core.toml")
    credentials = tmp_path / "credentials"
    credentials.mkdir()
    for name, source in {
        "seal": site.folder / "vault.seal",
        "tls-key": site.server.key,
        "tls/core.pem": site.server.certificate,
        "tls/clients.pem": site.ca.certificate_path,
    }.items():
        target = (tmp_path if "/" in name else credentials) / name
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(source, target)
        target.chmod(0o600)
    (credentials / "store-password").touch(0o600)
    (credentials / "store-password").write_text(PASSWORD)
    monkeypatch.setenv("CREDENTIALS_DIRECTORY", str(credentials))
    assert run(["serve", "core", "--check", "--config", str(tmp_path / "core.toml")]) == 0
    monkeypatch.delenv("CREDENTIALS_DIRECTORY")
    assert run(["serve", "core", "--check", "--config", str(tmp_path / "core.toml")]) == 10


def test_the_unit_hands_over_what_the_example_names() -> None:
    unit = (PACKAGING / "openkcm-core.service").read_text()
    named = {
        line.partition("=")[2].partition(":")[0]
        for line in unit.splitlines()
        if line.startswith("LoadCredential=")
    }
    example = (PACKAGING / "core.toml").read_text()
    wanted = {
        word.strip('",').partition(":")[2] for word in example.split() if word.startswith('"credential:')
    }
    assert wanted == named == {"seal", "store-password", "tls-key"}
    for line in (
        "LimitCORE=0",
        "MemorySwapMax=0",
        "NoNewPrivileges=yes",
        "ProtectSystem=strict",
        "Type=notify",
    ):
        assert line in unit.splitlines()
    seconds = read_drain(example)
    assert int(unit.partition("TimeoutStopSec=")[2].split()[0]) > seconds


def read_drain(example: str) -> float:
    """How long the example drains."""
    import tomllib

    return float(tomllib.loads(example)["drain"])


assert os.name == "posix"


def test_what_to_install_is_said() -> None:
    code = """
import sys
sys.modules["google.protobuf"] = None
import openkcm
try:
    openkcm.connect
except openkcm.ConfigurationError as error:
    print(error)
"""
    assert "pip install 'openkcm[rpc]'" in run_python(code).stdout
