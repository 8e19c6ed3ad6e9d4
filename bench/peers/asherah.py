# SPDX-License-Identifier: Apache-2.0
"""Asherah (GoDaddy): envelope encryption in Rust; a data key a record under an intermediate key per partition.

Set up as its README's Performance section is measured: in-memory metastore, static KMS, one session that is kept (the
session API is what it recommends for new code). It has no batch call; its threads release the GIL or not as it likes.
"""

from __future__ import annotations

import asherah

from contender import MIB, Contender

CONFIGURATION = {
    "ServiceName": "bench",
    "ProductID": "records",
    "Metastore": "memory",
    "KMS": "static",
    "StaticMasterKeyHex": "22" * 32,
    "EnableSessionCaching": True,
}


class Asherah(Contender):
    """One session, a call a record."""

    title = "asherah, a data key each"
    less = "no context, no key commitment, base64 in JSON, a root it holds itself"
    package = "asherah"
    most = 2000
    most_bytes = MIB
    threads = (1, 2)

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._factory = asherah.SessionFactory(CONFIGURATION)
        self._session = self._factory.get_session("partition")

    def encrypt(self, records: list[bytes]) -> list[str]:
        call = self._session.encrypt_bytes
        return [call(record) for record in records]

    def decrypt(self, sealed: list[str]) -> list[bytes]:
        call = self._session.decrypt_bytes
        return [call(record) for record in sealed]

    def close(self) -> None:
        self._session.close()
        self._factory.close()
