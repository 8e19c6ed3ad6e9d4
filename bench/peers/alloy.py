# SPDX-License-Identifier: Apache-2.0
"""IronCore Alloy, standalone (no vendor's service): ``encrypt_batch`` of its standard client, the fastest it offers.

A document of one field is a record; each document has a data key of its own.
"""

from __future__ import annotations

import asyncio

import ironcore_alloy as alloy

from contender import Contender

FIELD = "field"


class Alloy(Contender):
    """Batches through its asynchronous calls, on one event loop."""

    title = "ironcore-alloy, a data key each"
    less = "no context, no key commitment, the root secret in the process"
    package = "ironcore-alloy"
    most = 200

    def __init__(self, size: int) -> None:
        super().__init__(size)
        secret = alloy.StandaloneSecret(id=1, secret=alloy.Secret(secret=b"s" * 64))
        configuration = alloy.StandaloneConfiguration(
            standard=alloy.StandardSecrets(primary_secret_id=1, secrets=[secret]), deterministic={}, vector={}
        )
        self._client = alloy.Standalone(configuration).standard()
        self._tenant = alloy.AlloyMetadata.new_simple("tenant")
        self._loop = asyncio.new_event_loop()

    def encrypt(self, records: list[bytes]) -> alloy.EncryptedDocuments:
        documents = {str(at): {FIELD: record} for at, record in enumerate(records)}
        done = self._loop.run_until_complete(self._client.encrypt_batch(documents, self._tenant))
        return done.successes

    def decrypt(self, sealed: alloy.EncryptedDocuments) -> alloy.PlaintextDocuments:
        return self._loop.run_until_complete(self._client.decrypt_batch(sealed, self._tenant)).successes

    def records(self, opened: alloy.PlaintextDocuments) -> list[bytes]:
        return [opened[str(at)][FIELD] for at in range(len(opened))]

    def close(self) -> None:
        self._loop.close()
