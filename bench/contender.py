# SPDX-License-Identifier: Apache-2.0
"""What stands side by side in a run: one way of encrypting records, ours or a peer's, behind one small interface.

Invariant: nothing here knows OpenKCM or any peer, so that a worker needs only the packages of what it measures. A
contender is set up as its own documentation recommends for speed, and says what it does less of than OpenKCM.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

KIB = 1024
MIB = 1024 * KIB
SIZES = (16, 64, 256, KIB, 4 * KIB, 64 * KIB, MIB)
LARGEST = 64 * MIB
BATCH_RECORDS = 10_000


class Contender:
    """One way of encrypting and decrypting records of one size.

    Class attributes:
        title: how tables and plots call it.
        less: what it does less of than OpenKCM, for the tables; empty for our own.
        package: the distribution whose version is stated, if any.
        most: the most records in a batch; slow ones take fewer, so that every figure takes about as long.
        most_bytes: the most bytes in a batch. Where a record is a call, few results are held at a time.
        sizes: the record sizes it is measured at.
        threads: how many threads it is measured with.
        directions: ``encrypt`` and ``decrypt``, or one of them.
        environment: variables its worker is started with.
    """

    title: ClassVar[str]
    less: ClassVar[str] = ""
    package: ClassVar[str | None] = None
    most: ClassVar[int] = BATCH_RECORDS
    most_bytes: ClassVar[int] = 8 * MIB
    sizes: ClassVar[Sequence[int]] = SIZES
    threads: ClassVar[Sequence[int]] = (1,)
    directions: ClassVar[Sequence[str]] = ("encrypt", "decrypt")
    environment: ClassVar[Mapping[str, str]] = {}

    def __init__(self, size: int) -> None:
        self.size = size

    def prepare(self, records: list[bytes]) -> Any:
        """What ``encrypt`` takes: the records in the form its users hold them in."""
        return records

    def encrypt(self, records: Any) -> Any:
        """Encrypt a batch; what it returns goes to ``decrypt``."""
        raise NotImplementedError

    def decrypt(self, sealed: Any) -> Any:
        """Decrypt a batch."""
        raise NotImplementedError

    def records(self, opened: Any) -> list[bytes]:
        """What ``decrypt`` returned, as records, to compare with what went in."""
        return list(opened)

    def ways(self, records: list[bytes], threads: int) -> dict[str, Callable[[], Any]]:
        """The two calls on a batch that is cut in a share for each thread, after a round trip that gives it back.

        Raises:
            RuntimeError: it did not.
        """
        shares = [self.prepare(share) for share in split(records, threads)]
        sealed = [self.encrypt(share) for share in shares]
        self.check(records, [self.decrypt(share) for share in sealed])
        return {"encrypt": together(self.encrypt, shares), "decrypt": together(self.decrypt, sealed)}

    def check(self, records: list[bytes], opened: list[Any]) -> None:
        """Compare what came out of ``decrypt`` with what went in."""
        if [record for share in opened for record in self.records(share)] != records:
            raise RuntimeError(f"{self.title} does not give back what went in")

    def close(self) -> None:
        """Let go of whatever ``__init__`` started."""

    def version(self) -> str:
        """What it runs on, where that is more than its package's version."""
        return ""


def count_for(contender: type[Contender], size: int, threads: int) -> int:
    """Records in a batch: at least one for each thread, and about as many bytes at every size."""
    return min(contender.most, max(threads, contender.most_bytes // size))


def works(contender: Contender, records: list[bytes]) -> dict[tuple[str, int], tuple[Callable[[], Any], int]]:
    """What is timed and how many records it does, by direction and number of threads."""
    found = {}
    for threads in contender.threads:
        batch = records[: count_for(type(contender), contender.size, threads)]
        for direction, work in contender.ways(batch, threads).items():
            if direction in contender.directions:
                found[direction, threads] = (work, len(batch))
    return found


def split(records: list[bytes], parts: int) -> list[list[bytes]]:
    """Cut a batch into equal shares, one a thread."""
    step = -(-len(records) // parts)
    return [records[at : at + step] for at in range(0, len(records), step)]


def together(work: Callable[[Any], Any], shares: list[Any]) -> Callable[[], Any]:
    """A function that does all shares: in this thread, or each in a thread of a pool that stands ready."""
    if len(shares) == 1:
        share = shares[0]
        return lambda: work(share)
    pool = ThreadPoolExecutor(len(shares))
    return lambda: list(pool.map(work, shares))
