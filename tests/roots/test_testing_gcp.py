# SPDX-License-Identifier: Apache-2.0
"""Cloud KMS to test against, as Google's own client and a customer's administrator use it."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any

import pytest

from gcp_support import CONTEXT, SEALED
from gcp_support import cloud as cloud
from openkcm.errors import RootDestroyed, RootDisabled
from openkcm.roots import open_root
from openkcm.testing.gcp import GCPKMS
from support import refused


@pytest.fixture
def administrator(cloud: GCPKMS) -> Iterator[Any]:
    """The SDK as a customer's administrator uses it, unmodified."""
    from google.cloud import kms_v1
    from google.oauth2 import service_account

    credentials = service_account.Credentials.from_service_account_file(str(cloud.customer_file))
    with kms_v1.KeyManagementServiceClient(
        credentials=credentials, transport="rest", client_options={"api_endpoint": cloud.url}
    ) as client:
        yield client


def test_the_customer_acts_by_the_sdk(cloud: GCPKMS, administrator: Any) -> None:
    from google.api_core.exceptions import BadRequest, Forbidden
    from google.cloud.kms_v1.types import CryptoKeyVersion

    states = CryptoKeyVersion.CryptoKeyVersionState
    key = cloud.make_key("root")
    root = open_root(key.uri)
    wrapped = root.wrap(SEALED, CONTEXT)
    one = f"{key.resource}/cryptoKeyVersions/1"

    def set_state(state: int) -> None:
        administrator.update_crypto_key_version(
            crypto_key_version={"name": one, "state": state}, update_mask={"paths": ["state"]}
        )

    assert administrator.get_crypto_key(name=key.resource).primary.name == one
    set_state(states.DISABLED)
    refused(lambda: root.unwrap(wrapped, CONTEXT), RootDisabled)
    assert key.first_no is not None
    set_state(states.ENABLED)
    assert root.unwrap(wrapped, CONTEXT) == SEALED
    administrator.destroy_crypto_key_version(name=one)
    refused(lambda: root.unwrap(wrapped, CONTEXT), RootDestroyed)
    with pytest.raises(BadRequest):
        administrator.destroy_crypto_key_version(name=one)
    administrator.restore_crypto_key_version(name=one)
    refused(lambda: root.unwrap(wrapped, CONTEXT), RootDisabled)
    set_state(states.ENABLED)
    two = administrator.create_crypto_key_version(parent=key.resource, crypto_key_version={})
    administrator.update_crypto_key_primary_version(name=key.resource, crypto_key_version_id="2")
    listed = list(administrator.list_crypto_key_versions(parent=key.resource))
    assert [(version.name, version.state) for version in listed] == [
        (one, states.ENABLED),
        (two.name, states.ENABLED),
    ]
    assert root.unwrap(wrapped, CONTEXT) == SEALED
    with pytest.raises(Forbidden):  # who administers the keys may not use them
        administrator.encrypt(name=key.resource, plaintext=b"x")
    root.close()


def test_what_the_provider_says_of_keys_that_are_not_there(cloud: GCPKMS, administrator: Any) -> None:
    from google.api_core.exceptions import NotFound

    with pytest.raises(NotFound):
        administrator.get_crypto_key(name=cloud.make_key("one").resource + "-none")


def test_the_provider_cleans_up() -> None:
    with GCPKMS() as cloud:
        settings = dict(cloud.settings())
        assert all(os.environ[name] == value for name, value in settings.items())
        files = [settings["GOOGLE_APPLICATION_CREDENTIALS"], settings["REQUESTS_CA_BUNDLE"]]
        assert all(map(os.path.exists, files))
        assert os.stat(files[0]).st_mode & 0o077 == 0
    assert not any(map(os.path.exists, files))
    cloud.stop()
