# SPDX-License-Identifier: Apache-2.0
"""A short run of every fuzz target, on each backend: its whole corpus, mutations of it, and atheris for seconds.

``make fuzz`` runs them for longer. atheris comes as a wheel for Linux on x86-64 only; elsewhere the mutations still
run and the guided part is reported as skipped.
"""

from __future__ import annotations

import importlib
import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from support import environment

FOLDER = Path(__file__).resolve().parent
TARGETS = sorted(path.stem.removeprefix("fuzz_") for path in FOLDER.glob("fuzz_*.py"))
EXPECTED = [
    *("context", "core_keys", "csv", "decrypt", "envelope"),
    *("inspect", "ndjson", "pkcs11_uri", "rpc", "stream", "wrapped_keys"),
]
RUNS = 3000


def corpus(target: str) -> list[bytes]:
    return [path.read_bytes() for path in sorted((FOLDER / "corpus" / target).iterdir())]


def load(target: str) -> Any:
    return importlib.import_module(f"fuzz_{target}")


def test_every_decoder_has_a_target_and_every_target_seeds() -> None:
    assert TARGETS == EXPECTED
    assert all(len(corpus(target)) >= 4 for target in TARGETS)


@pytest.mark.parametrize("target", TARGETS)
def test_the_corpus_holds(target: str) -> None:
    check, seeds = load(target).check, corpus(target)
    for seed in seeds:
        check(seed)


@pytest.mark.parametrize("target", TARGETS)
def test_mutations_of_the_corpus_hold(target: str) -> None:
    check, seeds = load(target).check, corpus(target)

    @settings(max_examples=200, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(
        st.sampled_from(seeds),
        st.lists(
            st.tuples(st.floats(0, 1), st.integers(0, 3), st.binary(min_size=1, max_size=4)), max_size=4
        ),
    )
    def mutate(seed: bytes, edits: list[tuple[float, int, bytes]]) -> None:
        for at, removed, added in edits:
            place = int(at * len(seed))
            seed = seed[:place] + (added if removed else b"") + seed[place + removed :]
        check(seed)

    mutate()


@pytest.mark.skipif(
    importlib.util.find_spec("atheris") is None,
    reason="atheris is not installed: no coverage-guided fuzzing here",
)
@pytest.mark.parametrize("target", TARGETS)
def test_guided_by_coverage(target: str, tmp_path: Path) -> None:
    """So many runs or ten seconds, whichever is first; a crash would leave its input in the output."""
    found = tmp_path / "found"
    found.mkdir()
    limits = (f"-runs={RUNS}", "-max_total_time=10", "-max_len=2048", "-print_final_stats=1")
    done = subprocess.run(
        [
            sys.executable,
            str(FOLDER / "run.py"),
            target,
            str(found),
            str(FOLDER / "corpus" / target),
            *limits,
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env=environment(),
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    executed = [
        line for line in done.stderr.splitlines() if line.startswith("stat::number_of_executed_units:")
    ]
    assert executed and int(executed[0].split()[1]) >= len(corpus(target))
