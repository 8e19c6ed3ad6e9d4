# SPDX-License-Identifier: Apache-2.0
"""Time each key store for named data keys: ``python bench/key_stores.py [KEYS] [ROUNDS]`` (10,000 and 7).

The servers are real, on loopback, and write to disk before they acknowledge (PostgreSQL with ``fsync`` on, Valkey with
``appendfsync always``, SQLite with full syncs). In each round every store has its turn; told is the
median of the rounds.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

from openkcm.crypto import random_bytes
from openkcm.gateway.keystore import KeyStore, StoredKey, open_key_store
from openkcm.limits import KEY_ID_BYTES, SUBJECT_HASH_BYTES, WRAPPED_KEY_BYTES
from openkcm.testing.postgres import PostgresServer
from openkcm.testing.valkey import ValkeyServer

SERVICE = b"service-id-1"
WORK = ("add", "find by id", "find by subject", "rewrap", "remove", "add one", "find one")


def make_keys(count: int) -> list[StoredKey]:
    """Keys of random bytes: a store looks at none of them."""
    return [
        StoredKey(
            random_bytes(KEY_ID_BYTES), random_bytes(SUBJECT_HASH_BYTES), 1, random_bytes(WRAPPED_KEY_BYTES)
        )
        for _ in range(count)
    ]


def measure(store: KeyStore, count: int) -> Iterator[float]:
    """The seconds that each piece of ``WORK`` takes; the store is left as it was."""
    keys, (one,) = make_keys(count), make_keys(1)
    ids, subjects = [key.key_id for key in keys], [key.subject for key in keys]
    yield _seconds(lambda: store.add(SERVICE, keys))
    yield _seconds(lambda: store.find_ids(SERVICE, ids))
    yield _seconds(lambda: store.find_subjects(SERVICE, subjects))
    moved = [key._replace(version=2) for key in keys]
    yield _seconds(lambda: store.rewrap(SERVICE, moved))
    yield _seconds(lambda: store.remove(SERVICE, ids))
    yield _seconds(lambda: store.add(SERVICE, [one]))
    yield _seconds(lambda: store.find_ids(SERVICE, [one.key_id]))
    store.remove(SERVICE, [one.key_id])


def _seconds(work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def main() -> None:
    """Print a line for each store."""
    count = int(sys.argv[1]) if len(sys.argv) > 1 else 10_000
    rounds = int(sys.argv[2]) if len(sys.argv) > 2 else 7
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        postgres = stack.enter_context(PostgresServer({"fsync": "on"}))
        valkey = stack.enter_context(ValkeyServer())
        places = {"SQLite": str(folder / "keys.db"), "PostgreSQL": postgres.url(), "Valkey": valkey.url}
        stores = {name: open_key_store(place) for name, place in places.items()}
        took: dict[str, list[list[float]]] = {name: [] for name in stores}
        for turn in range(rounds + 1):
            for name, store in stores.items():
                seconds = list(measure(store, count))
                if turn:  # the first warms up
                    took[name].append(seconds)
        for store in stores.values():
            store.close()
    print(f"{count} keys, median of {rounds} rounds, load {os.getloadavg()[0]:.1f}; ms")
    print(f"{'':12}" + "".join(f"{each:>17}" for each in WORK))
    for name, rows in took.items():
        medians = [statistics.median(column) * 1000 for column in zip(*rows, strict=True)]
        print(f"{name:12}" + "".join(f"{value:17.2f}" for value in medians))


if __name__ == "__main__":
    main()
