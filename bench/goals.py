# SPDX-License-Identifier: Apache-2.0
"""The goals as ratios, and what a run says of each. A ratio says how many times as fast ours is as the other."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Final

from contender import KIB, LARGEST, MIB
from results import Results, ratio

HEADLINE: Final = 64
SLOWEST_FALLBACK: Final = 1.3
COLUMN_MEMORY: Final = 64 * KIB
ENGINES: Final = ("c-evp-bare", "c-mb-bare", "c-newer-bare")


@dataclass(frozen=True)
class Verdict:
    """One goal: ``measured`` is at least ``wanted``, or at most where ``at_most``; None where it was not measured."""

    work: str
    against: str
    wanted: float
    measured: float | None
    at_most: bool = False
    unit: str = "x"

    @property
    def met(self) -> bool | None:
        """Whether the goal is met; None if it was not measured."""
        if self.measured is None:
            return None
        return self.measured <= self.wanted if self.at_most else self.measured >= self.wanted


def verdicts(results: Results, engine: str, memory: Mapping[str, float]) -> list[Verdict]:
    """Judge a run; ``engine`` is what OpenKCM used in it, ``memory`` the bytes beyond inputs and outputs."""
    loops = "c-mb" if engine.startswith("intel-ipsec-mb") else "c-evp"
    return [
        *_lists(results, loops),
        *_columns(results, loops),
        *_single(results),
        *_large(results),
        *_fallback(results),
        *_memory(memory),
    ]


class _Pairs:
    """Ratios at the headline size."""

    def __init__(self, results: Results, size: int = HEADLINE) -> None:
        self._results = results
        self._size = size

    def __call__(self, ours: str, other: str, direction: str) -> float | None:
        find = self._results.time
        return ratio(find(ours, direction, self._size), find(other, direction, self._size))


def _lists(results: Results, loops: str) -> Iterator[Verdict]:
    pair = _Pairs(results)
    each, one = "encrypt_many, 64 B, a data key each", "encrypt_many, 64 B, one data key"
    yield Verdict(each, "asherah", 4.0, pair("lists-each", "asherah", "encrypt"))
    yield Verdict(
        f"{each}, held to EVP", "C loop, EVP", 0.75, pair("lists-each-evp", "c-evp-each", "encrypt")
    )
    yield Verdict(
        each, f"C loop, {_engine(loops)} as ours", 0.75, pair("lists-each", f"{loops}-each", "encrypt")
    )
    yield Verdict(
        "decrypt_many, 64 B, a data key each, strict", "asherah", 3.0,
        pair("lists-each", "asherah", "decrypt"),
    )  # fmt: skip
    yield Verdict(one, "asherah", 8.0, pair("lists-one", "asherah", "encrypt"))


def _columns(results: Results, loops: str) -> Iterator[Verdict]:
    pair = _Pairs(results)
    for key, words in (("each", "a data key each"), ("one", "one data key")):
        ours, work = f"columns-{key}", f"columns, 64 B, {words}"
        for direction in ("encrypt", "decrypt"):
            yield Verdict(
                f"{work}, {direction}, held to EVP", "C loop, EVP", 0.9,
                pair(f"{ours}-evp", f"c-evp-{key}", direction),
            )  # fmt: skip
            yield Verdict(
                f"{work}, {direction}", f"C loop, {_engine(loops)} as ours", 0.9,
                pair(ours, f"{loops}-{key}", direction),
            )  # fmt: skip
    for direction in ("encrypt", "decrypt"):
        # What the machine gives to anyone stands beside it: a second core that others use cannot be had.
        loop = _gain(results, f"{loops}-long", direction)
        yield Verdict(
            f"columns of 100,000 rows, 64 B, a data key each, {direction}, two threads"
            + ("" if loop is None else f" (the C loop: {loop:.2f})"),
            "one thread", 1.85, _gain(results, "columns-long", direction),
        )  # fmt: skip


def _gain(results: Results, name: str, direction: str) -> float | None:
    """How many times as fast two threads are as one."""
    return ratio(*(results.time(name, direction, HEADLINE, threads) for threads in (2, 1)))


def _engine(loops: str) -> str:
    return {"c-mb": "intel-ipsec-mb", "c-evp": "EVP"}[loops]


def _single(results: Results) -> Iterator[Verdict]:
    pair = _Pairs(results)
    bare = "cryptography AESGCM with os.urandom"
    yield Verdict("one encrypt, 64 B, warm pool", "asherah", 1.0, pair("single", "asherah", "encrypt"))
    yield Verdict("one encrypt, 64 B, warm pool", bare, 1.0, pair("single", "aesgcm-one", "encrypt"))
    yield Verdict("one decrypt, 64 B, open-lease", "asherah", 1.0, pair("single-lease", "asherah", "decrypt"))
    for ours, direction, words in (
        ("single", "encrypt", "warm pool"),
        ("single-lease", "decrypt", "open-lease"),
    ):
        found = {size: _Pairs(results, size)(ours, "aesgcm-one", direction) for size in results.sizes()}
        known = {size: value for size, value in found.items() if value is not None}
        worst = min(known, key=known.__getitem__, default=None)
        yield Verdict(
            f"one {direction}, any size, {words}" + (f"; worst at {words_for(worst)}" if worst else ""),
            "cryptography AESGCM", 1.0, known[worst] if worst else None,
        )  # fmt: skip


def _large(results: Results) -> Iterator[Verdict]:
    for ours, size, words in (
        ("columns-reused", MIB, "column of 1 MiB records, out="),
        ("columns-each", MIB, "column of 1 MiB records"),
        ("lists-each", MIB, "list of 1 MiB records"),
        ("single", MIB, "one record of 1 MiB"),
        ("single-into", MIB, "one record of 1 MiB into a buffer"),
        ("single", LARGEST, "one record of 64 MiB"),
        ("single-into", LARGEST, "one record of 64 MiB into a buffer"),
    ):
        times = [results.time(engine, "encrypt", size) for engine in ENGINES]
        best = min((time for time in times if time is not None), default=None)
        yield Verdict(
            f"{words}, encrypt", "best bare AES-256-GCM in C", 0.95,
            ratio(results.time(ours, "encrypt", size), best),
        )  # fmt: skip


def _fallback(results: Results) -> Iterator[Verdict]:
    pair = _Pairs(results)
    for key, words in (("each", "a data key each"), ("one", "one data key")):
        for direction in ("encrypt", "decrypt"):
            # How many times as long ours takes, so the loop comes first.
            slower = pair(f"loop-{key}", f"fallback-{key}", direction)
            yield Verdict(
                f"Python backend, {direction}_many, 64 B, {words}", "plain Python loop, time",
                SLOWEST_FALLBACK, slower, at_most=True,
            )  # fmt: skip


def _memory(memory: Mapping[str, float]) -> Iterator[Verdict]:
    for name, threads in (("columns, one thread", 1), ("columns, two threads", 2)):
        extra = memory.get(name)
        yield Verdict(
            f"memory of {name}, beyond input and output", "64 KiB a thread", threads * COLUMN_MEMORY / KIB,
            None if extra is None else extra / KIB, at_most=True, unit="KiB",
        )  # fmt: skip
    extra = memory.get("lists, of the input's size")
    yield Verdict(
        "memory of lists, beyond input and output", "part of the input's size", 0.5, extra, at_most=True
    )


def words_for(size: int) -> str:
    """A size as people say it."""
    if size >= MIB:
        return f"{size // MIB} MiB"
    return f"{size // KIB} KiB" if size >= KIB else f"{size} B"
