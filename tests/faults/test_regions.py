# SPDX-License-Identifier: Apache-2.0
"""A region is a fence: what belongs to Germany opens nowhere else, whoever carries it there.

The customer's root is a key of a real OpenBao. The German Core has a token that may use it; the Core in the US has one
that may not, as its machine, its cloud account or its network would not. That is the one part of the fence that stands
outside of OpenKCM, and the last test says so: with the German Core's own credentials, its machine is what one has.
"""

from __future__ import annotations

import shutil
import sqlite3
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

import openkcm
from openkcm.testing.openbao import OpenBao
from rpc_support import GATEWAY, VERBS, NotStarted, Replica, Site
from support import refused

PLAINTEXT = b"Deutsche Kundendaten"


@pytest.fixture(scope="module")
def bao() -> Iterator[OpenBao]:
    """The customer's OpenBao."""
    provider = OpenBao()
    provider.start()
    yield provider
    provider.stop()


class Germany(Site):
    """The German region: a vault whose tenant's root is the customer's, and an envelope made there."""

    def __init__(self, folder: Path, bao: OpenBao, monkeypatch: pytest.MonkeyPatch) -> None:
        folder.mkdir()
        for name, value in bao.settings().items():
            monkeypatch.setenv(name, value)
        with openkcm.Core.open(f"sqlite:///{folder / 'vault.db'}", region="de") as core:
            core.link_tenant("acme", bao.make_key(f"root-{folder.parent.name}").uri)
            core.create_service("acme", "records")
            core.grant(GATEWAY, "acme", "*", VERBS)
        super().__init__(folder, store=f"sqlite:///{folder / 'vault.db'}")
        with openkcm.Core.open(self.store) as core, openkcm.Gateway(core) as gateway:
            self.blob = gateway.service("acme", "records").encrypt(PLAINTEXT)

    def hand_over(self, to: Path) -> Site:
        """Give away a copy of everything: database, seal key, configuration and certificates."""
        shutil.copytree(self.folder, to)
        site = Site.__new__(Site)
        site.__dict__.update(self.__dict__)
        site.folder, site.store = to, f"sqlite:///{to / 'vault.db'}"
        return site


@pytest.fixture
def germany(tmp_path: Path, bao: OpenBao, monkeypatch: pytest.MonkeyPatch) -> Germany:
    """The German region, as its operators have it."""
    return Germany(tmp_path / "de", bao, monkeypatch)


@pytest.fixture
def abroad(tmp_path: Path, bao: OpenBao) -> Mapping[str, str]:
    """What the Core in the US has for the customer's OpenBao: an identity of its own, without the right."""
    answer = bao.server.ask(
        "POST", "auth/token/create", {"policies": ["default"], "no_parent": True, "period": "1h"}
    )
    token = tmp_path / "us-token"
    token.touch(mode=0o600)
    token.write_text(answer["auth"]["client_token"] + "\n")
    return {"OPENKCM_BAO_TOKEN_FILE": str(token)}


def opened_by(site: Site, replica: Replica, blob: bytes) -> bytes:
    with (
        site.connect(replica.ports) as core,
        openkcm.Gateway(core, keys=site.folder / "gateway.db") as gateway,
    ):
        return gateway.service("acme", "records").decrypt(blob)


def test_germany_opens_its_own(germany: Germany) -> None:
    with germany.start(region="de") as replica:
        assert opened_by(germany, replica, germany.blob) == PLAINTEXT


def test_a_core_in_the_us_does_not_even_start_on_the_german_vault(
    germany: Germany, abroad: Mapping[str, str], tmp_path: Path
) -> None:
    taken = germany.hand_over(tmp_path / "us")
    with pytest.raises(NotStarted, match="belongs to region de, not us"):
        taken.start(environment=abroad, region="us")


def test_the_german_vault_with_its_region_altered_is_no_vault(
    germany: Germany, abroad: Mapping[str, str], tmp_path: Path
) -> None:
    taken = germany.hand_over(tmp_path / "us")
    with sqlite3.connect(taken.folder / "vault.db") as database:
        database.execute("UPDATE vault SET region = 'us'")
        database.execute("UPDATE tenants SET region = 'us'")
    database.close()
    with pytest.raises(NotStarted, match="was given another region"):
        taken.start(environment=abroad, region="us")


def test_the_german_configuration_word_for_word_opens_nothing_in_the_us(
    germany: Germany, abroad: Mapping[str, str], tmp_path: Path
) -> None:
    taken = germany.hand_over(tmp_path / "us")
    with taken.start(environment=abroad, region="de") as replica:
        error = refused(lambda: opened_by(taken, replica, germany.blob), openkcm.TenantDark)
    assert PLAINTEXT.decode() not in str(error)
    # Germany is none the worse for it: a no to a stranger is not the customer's no.
    with germany.start(region="de") as replica:
        assert opened_by(germany, replica, germany.blob) == PLAINTEXT


def test_rows_of_the_german_vault_open_nothing_in_the_vault_of_the_us(
    germany: Germany, tmp_path: Path
) -> None:
    """Even with the German Core's rights on the root, and the German seal key: the region is bound into every wrap."""
    target = tmp_path / "us" / "vault.db"
    target.parent.mkdir()
    shutil.copy(germany.folder / "vault.seal", target.with_suffix(".seal"))
    with openkcm.Core.open(f"sqlite:///{target}", region="us") as core:
        assert core.region == "us"
    with sqlite3.connect(target) as database:
        database.execute("ATTACH ? AS de", (str(germany.folder / "vault.db"),))
        for table in ("tenants", "tenant_keys", "services", "service_keys"):
            database.execute(f"INSERT INTO {table} SELECT * FROM de.{table}")
        database.execute("UPDATE tenants SET region = 'us'")
    database.close()
    with openkcm.Core.open(f"sqlite:///{target}") as core, openkcm.Gateway(core) as gateway:
        refused(lambda: gateway.service("acme", "records").decrypt(germany.blob), openkcm.DecryptError)


def test_one_tenant_in_two_regions_has_two_tenant_keys(germany: Germany, tmp_path: Path) -> None:
    with openkcm.Core.open(f"sqlite:///{tmp_path / 'us.db'}", region="us") as core:
        core.link_tenant("acme", f"local:{tmp_path / 'us.root'}")
        core.create_service("acme", "records")
        with openkcm.Gateway(core) as gateway:
            service = gateway.service("acme", "records")
            assert service.decrypt(service.encrypt(b"here")) == b"here"
            refused(lambda: service.decrypt(germany.blob), openkcm.DecryptError)
            core.kill("acme")
    with openkcm.Core.open(germany.store) as core, openkcm.Gateway(core) as gateway:
        assert gateway.service("acme", "records").decrypt(germany.blob) == PLAINTEXT
