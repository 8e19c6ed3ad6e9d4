# SPDX-License-Identifier: Apache-2.0
"""A vault of one tenant and a Gateway on it, for whoever measures them."""

from __future__ import annotations

import tempfile
from pathlib import Path

import openkcm
from contender import Contender

TENANT = "bench"
SERVICE = "records"
ONE_KEY = openkcm.DataKeyPolicy(records=2**31)


def open_vault(folder: Path) -> openkcm.Core:
    """Make a vault on a development root; the root is on no timed path."""
    core = openkcm.Core.open(f"sqlite:///{folder / 'vault.db'}")
    core.link_tenant(TENANT, root=f"local:{folder / 'root.key'}")
    core.create_service(TENANT, SERVICE)
    return core


class OpenKCM(Contender):
    """A contender with a service of its own; strict, as is the default: every decrypt asks the Core.

    Class attributes:
        policy: how long a data key serves.
    """

    policy = openkcm.DataKeyPolicy()

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._folder = tempfile.TemporaryDirectory(prefix="bench-vault-")
        self.core = open_vault(Path(self._folder.name))
        self._gateway = openkcm.Gateway(self.core, policy=self.policy)
        self.service = self._gateway.service(TENANT, SERVICE)

    def close(self) -> None:
        self._gateway.close()
        self.core.close()
        self._folder.cleanup()

    def version(self) -> str:
        info = openkcm.backend_info()
        return (
            f"OpenKCM {openkcm.__version__}, {info['backend']} backend, {info['engine']}, {info['openssl']}"
        )
