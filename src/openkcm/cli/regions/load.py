# SPDX-License-Identifier: Apache-2.0
"""An application of the demo: a process with a Gateway that encrypts and decrypts at a steady pace.

Run by the demo as ``python -m openkcm.cli.regions.load``, with its settings as one line of JSON on standard input. It
prints a line of JSON for each ``REPORT_SECONDS`` and ends when its standard input does.
"""

from __future__ import annotations

import json
import sys
import threading
import time
from collections import Counter
from typing import Any, Final

import openkcm

REPORT_SECONDS: Final = 0.25
BATCH: Final = 400
PACE_SECONDS: Final = 0.05
"""Between two rounds: a demo leaves the machine to others as well."""


class Application:
    """Records of one service, written and read again."""

    def __init__(self, settings: dict[str, Any]) -> None:
        self._core = openkcm.connect(
            settings["addresses"],
            tls=openkcm.TLS(settings["certificate"], settings["key"], settings["roots"]),
            deadline=2.0,
        )
        self._gateway = openkcm.Gateway(self._core, keys=settings["keys"])
        self._settings = settings
        self._records = [f"passenger {at:05}".encode() * 4 for at in range(BATCH)]
        self._service: openkcm.ServiceHandle | None = None
        self._blobs: list[bytes] = []
        self.records = 0
        self.errors: Counter[str] = Counter()
        self.times: list[float] = []
        self.state = "starting"

    def round(self) -> None:
        """Write a batch, read one back, and read a single record as a user who waits for it would."""
        try:
            if self._service is None:
                self._service = self._gateway.service("acme", "records")
            blobs = self._service.encrypt_many(self._records)
            self._blobs = self._blobs or blobs
            self.records += len(blobs)
        except openkcm.OpenKCMError as error:
            self.errors[error.code] += 1
        if self._service is None or not self._blobs:
            return
        try:
            self.records += len(self._service.decrypt_many(self._blobs))
            start = time.perf_counter()
            self._service.decrypt(self._blobs[0])
            self.times.append(time.perf_counter() - start)
            self.state = "ok"
        except openkcm.OpenKCMError as error:
            self.errors[error.code] += 1
            self.state = error.code

    def report(self) -> dict[str, Any]:
        """What happened since the last report."""
        times = sorted(self.times)
        found = {
            "name": self._settings["name"],
            "records": self.records,
            "errors": dict(self.errors),
            "p50": times[len(times) // 2] if times else None,
            "worst": times[-1] if times else None,
            "state": self.state,
            "at": time.monotonic(),
        }
        self.records = 0
        self.errors.clear()
        self.times.clear()
        return found


def main() -> None:
    """Work until standard input ends."""
    settings = json.loads(sys.stdin.readline())
    application = Application(settings)
    over = threading.Event()
    threading.Thread(target=_wait_for_end, args=(over,), daemon=True).start()
    reported = time.monotonic()
    while not over.is_set():
        application.round()
        now = time.monotonic()
        if now - reported >= REPORT_SECONDS:
            print(json.dumps(application.report() | {"seconds": now - reported}), flush=True)
            reported = now
        over.wait(PACE_SECONDS)


def _wait_for_end(over: threading.Event) -> None:
    sys.stdin.read()
    over.set()


if __name__ == "__main__":
    main()
