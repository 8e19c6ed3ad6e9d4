# SPDX-License-Identifier: Apache-2.0
"""The AWS Encryption SDK with the material providers library, and with its caching of data keys.

The suite is the one its guide names for parties who trust each other equally: committing, without a signature (which
is the default and costs more). A raw AES keyring stands in the KMS's place, so that no network is timed. Data key
caching exists for the older master key providers only, so the cached one uses those, as its guide shows.
"""

from __future__ import annotations

import os
from typing import Any

import aws_encryption_sdk as sdk
from aws_cryptographic_material_providers.mpl import AwsCryptographicMaterialProviders
from aws_cryptographic_material_providers.mpl.config import MaterialProvidersConfig
from aws_cryptographic_material_providers.mpl.models import AesWrappingAlg, CreateRawAesKeyringInput
from aws_encryption_sdk.identifiers import Algorithm, EncryptionKeyType, WrappingAlgorithm
from aws_encryption_sdk.internal.crypto.wrapping_keys import WrappingKey
from aws_encryption_sdk.key_providers.raw import RawMasterKeyProvider

from contender import Contender

SUITE = Algorithm.AES_256_GCM_HKDF_SHA512_COMMIT_KEY
NAMESPACE = "bench"
NAME = b"key"


class _Aws(Contender):
    package = "aws-encryption-sdk"
    most = 20

    def __init__(self, size: int) -> None:
        super().__init__(size)
        self._client = sdk.EncryptionSDKClient()
        self._source: dict[str, Any] = self._key_source()

    def _key_source(self) -> dict[str, Any]:
        raise NotImplementedError

    def encrypt(self, records: list[bytes]) -> list[bytes]:
        call, source = self._client.encrypt, self._source
        # Framing is for streams; without it a message is one ciphertext.
        return [call(source=record, algorithm=SUITE, frame_length=0, **source)[0] for record in records]

    def decrypt(self, sealed: list[bytes]) -> list[bytes]:
        call, source = self._client.decrypt, self._source
        return [call(source=blob, **source)[0] for blob in sealed]


class KeyEach(_Aws):
    """A data key a record, from a keyring."""

    title = "aws-encryption-sdk, a data key each"
    less = "the wrapping key in plain memory; otherwise the nearest in what it promises"

    def _key_source(self) -> dict[str, Any]:
        keyring = AwsCryptographicMaterialProviders(config=MaterialProvidersConfig()).create_raw_aes_keyring(
            input=CreateRawAesKeyringInput(
                key_namespace=NAMESPACE,
                key_name=NAME.decode(),
                wrapping_key=os.urandom(32),
                wrapping_alg=AesWrappingAlg.ALG_AES256_GCM_IV12_TAG16,
            )
        )
        return {"keyring": keyring}


class _RawProvider(RawMasterKeyProvider):  # type: ignore[misc]
    provider_id = NAMESPACE

    def _get_raw_key(self, key_id: bytes) -> WrappingKey:
        return WrappingKey(
            wrapping_algorithm=WrappingAlgorithm.AES_256_GCM_IV12_TAG16_NO_PADDING,
            wrapping_key=b"k" * 32,
            wrapping_key_type=EncryptionKeyType.SYMMETRIC,
        )


class Cached(_Aws):
    """One data key for many records, from its cache."""

    title = "aws-encryption-sdk, cached data keys"
    less = "one data key for many records, kept in plain memory"
    most = 100

    def _key_source(self) -> dict[str, Any]:
        provider = _RawProvider()
        provider.add_master_key(NAME)
        manager = sdk.CachingCryptoMaterialsManager(
            master_key_provider=provider,
            cache=sdk.LocalCryptoMaterialsCache(capacity=100),
            max_age=3600.0,
            max_messages_encrypted=2**32,
        )
        return {"materials_manager": manager}
