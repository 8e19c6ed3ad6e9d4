# SPDX-License-Identifier: Apache-2.0
"""The Gateway: the factory of data keys, beside the application."""

from .column import Column
from .gateway import Gateway, ServiceHandle
from .keystore import KeyStore, StoredKey
from .policy import DataKeyPolicy, PoolPolicy

__all__ = ["Column", "DataKeyPolicy", "Gateway", "KeyStore", "PoolPolicy", "ServiceHandle", "StoredKey"]
