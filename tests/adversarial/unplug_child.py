# SPDX-License-Identifier: Apache-2.0
"""A Core and a Gateway under load, for ``test_unplug``: each tenant's one hot record, a thousand times a second.

Run as ``unplug_child.py URL INTERVAL TENANT...``. Lines on standard input: ``report`` prints, for each tenant, the
moment (CLOCK_MONOTONIC) of its last successful decrypt, how many succeeded, and which errors came how often.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter

import openkcm

RATE = 1000.0
RECORD = b"the hot record"


class Hot(threading.Thread):
    """Decrypts one record at a steady rate."""

    def __init__(self, service: openkcm.ServiceHandle) -> None:
        super().__init__(daemon=True)
        self._service = service
        self._blob = service.encrypt(RECORD)
        self.last = 0.0
        self.succeeded = 0
        self.errors: Counter[str] = Counter()

    def run(self) -> None:
        due = time.monotonic()
        while True:
            try:
                if self._service.decrypt(self._blob) != RECORD:
                    self.errors["wrong plaintext"] += 1
                self.last = time.monotonic()
                self.succeeded += 1
            except openkcm.OpenKCMError as error:
                self.errors[type(error).__name__] += 1
            due += 1 / RATE
            time.sleep(max(0.0, due - time.monotonic()))


def main() -> None:
    """Load until standard input ends."""
    url, interval, *tenants = sys.argv[1:]
    core = openkcm.Core.open(url, probe_interval=float(interval))
    gateway = openkcm.Gateway(core)
    hot = {tenant: Hot(gateway.service(tenant, "records")) for tenant in tenants}
    for thread in hot.values():
        thread.start()
    print("ready", flush=True)
    for _ in sys.stdin:
        report = {
            tenant: {"last": each.last, "succeeded": each.succeeded, "errors": each.errors}
            for tenant, each in hot.items()
        }
        print(json.dumps(report), flush=True)


main()
