# SPDX-License-Identifier: Apache-2.0
"""How a run of the benchmark suite is planned, merged, judged and written; no figure is taken here."""

from __future__ import annotations

import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyperf
import pytest

import contender
import describe
import environment
import goals
import plots
import registry
import report
from contender import Contender
from goals import Verdict
from results import Results, ratio

BENCH = Path(contender.__file__).parent
MACHINE = {"processor": "a processor", "extensions": ["aes", "vaes"], "openssl": "OpenSSL 3.0.19"}


def load_driver() -> Any:
    """bench/__main__.py, which has no name that could be imported."""
    spec = importlib.util.spec_from_file_location("bench_driver", BENCH / "__main__.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


DRIVER = load_driver()


class Reverser(Contender):
    """Encrypts by reversing."""

    title = "reverser"
    threads = (1, 2)

    def encrypt(self, records: list[bytes]) -> list[bytes]:
        return [record[::-1] for record in records]

    def decrypt(self, sealed: list[bytes]) -> list[bytes]:
        return self.encrypt(sealed)


class Forgetter(Reverser):
    """Gives back something else."""

    def decrypt(self, sealed: list[bytes]) -> list[bytes]:
        return sealed


def test_a_contender_is_timed_in_each_direction_and_number_of_threads() -> None:
    works = contender.works(Reverser(3), [b"one", b"two", b"three"])
    assert set(works) == {("encrypt", 1), ("decrypt", 1), ("encrypt", 2), ("decrypt", 2)}
    assert works["encrypt", 1][0]() == [b"eno", b"owt", b"eerht"]
    assert works["decrypt", 2][0]() == [[b"one", b"two"], [b"three"]]
    assert {count for _, count in works.values()} == {3}


def test_a_contender_that_does_not_give_back_what_went_in_is_not_timed() -> None:
    with pytest.raises(RuntimeError, match="reverser does not give back"):
        contender.works(Forgetter(3), [b"one", b"two"])


def test_a_batch_has_a_record_for_each_thread_and_about_as_many_bytes_at_every_size() -> None:
    assert contender.count_for(Reverser, 16, 1) == contender.BATCH_RECORDS
    assert contender.count_for(Reverser, contender.MIB, 2) == 8
    assert contender.count_for(Reverser, contender.LARGEST, 1) == 1
    assert contender.count_for(Reverser, contender.LARGEST, 2) == 2


def dump(file: Path, **values: list[float]) -> Path:
    """A worker's file: seconds for one record, by name with dots for slashes."""
    suite = []
    for name, seconds in values.items():
        metadata = {"name": name.replace("__", "/").replace("_", "-"), "unit": "second", "ran_on": "x 1"}
        suite.append(pyperf.Benchmark([pyperf.Run(seconds, metadata=metadata, collect_metadata=False)]))
    pyperf.BenchmarkSuite(suite).dump(str(file))
    return file


@pytest.fixture
def results(tmp_path: Path) -> Results:
    """A run of two rounds in which lists take 250 ns, asherah 1500 and the C loop 200."""
    files = [
        dump(
            tmp_path / f"{turn}.json",
            lists_each__encrypt__64__1=[250e-9, 250e-9 + turn * 50e-9],
            asherah__encrypt__64__1=[1500e-9, 1500e-9],
            c_mb_each__encrypt__64__1=[200e-9, 200e-9],
        )
        for turn in range(2)
    ]
    return Results.load(files)


def test_the_processes_of_a_figure_are_merged(results: Results) -> None:
    figure = results.find("lists-each", "encrypt", 64)
    assert figure is not None
    assert (round(figure.median), figure.values, figure.processes) == (250, 4, 2)
    assert figure.deviation == pytest.approx(25)
    assert results.speed("asherah", "encrypt", 64) == pytest.approx(64 / 1500)
    assert results.find("asherah", "decrypt", 64) is None


def test_a_ratio_says_how_many_times_as_fast_the_first_is() -> None:
    assert ratio(250.0, 1000.0) == 4.0
    assert ratio(None, 1000.0) is ratio(250.0, None) is None


def test_goals_are_judged_and_what_was_not_measured_is_not_met(results: Results) -> None:
    found = goals.verdicts(results, "intel-ipsec-mb 1.3.0", {"columns, one thread": 65_537.0})
    by_place = {(verdict.work, verdict.against): verdict for verdict in found}
    each = "encrypt_many, 64 B, a data key each"
    assert by_place[each, "asherah"].measured == pytest.approx(6.0)
    assert by_place[each, "asherah"].met is True
    assert by_place[each, "C loop, intel-ipsec-mb as ours"].measured == pytest.approx(0.8)
    assert by_place["encrypt_many, 64 B, one data key", "asherah"].met is None
    memory = by_place["memory of columns, one thread, beyond input and output", "64 KiB a thread"]
    assert memory.met is False, "one byte too many"


def test_the_c_loop_that_ours_is_held_against_has_the_engine_of_ours(results: Results) -> None:
    against = {verdict.against for verdict in goals.verdicts(results, "EVP", {})}
    assert "C loop, EVP as ours" in against and "C loop, intel-ipsec-mb as ours" not in against


def test_the_page_has_goals_figures_and_whoever_did_not_run(results: Results, tmp_path: Path) -> None:
    cards = {name: {"title": f"T {name}", "less": "no | context"} for name in results.contenders()}
    drawn = plots.draw(results, {name: card["title"] for name, card in cards.items()}, tmp_path)
    page = report.page(MACHINE, results, [], cards, {"tink-one": "pip could not"}, drawn, quick=True)
    assert "| T asherah | 1.5 ± 0 us | - | - | - |" in page
    assert "| extensions | aes, vaes |" in page
    assert "| tink-one | pip could not |" in page
    assert "no / context" in page, "a bar would end the cell"
    assert "its figures are no claims" in page
    assert "![" in page and all((tmp_path / f"{name}.svg").read_text().startswith("<?xml") for name in drawn)
    assert "decrypt-1" not in drawn, "nothing was measured for it"


def test_a_verdict_is_a_line_of_the_table() -> None:
    text = report.goals_table(
        [Verdict("work", "other", 4.0, 3.999), Verdict("memory", "less", 64, 3, True, "KiB")]
    )
    assert "| work | other | at least 4 | 4.00 | **no** |" in text
    assert "| memory | less | at most 64 KiB | 3.00 KiB | yes |" in text


def test_names_beside_a_plot_do_not_overlap_and_stay_within_it() -> None:
    places = plots.spread([0.1, 0.1, 0.5, 0.99, 1.0])
    gaps = [after - before for before, after in itertools.pairwise(places)]
    assert min(gaps) >= plots.APART - 1e-9
    assert places[-1] <= 1.0


def test_contenders_take_turns_at_each_size_in_each_round() -> None:
    plan = DRIVER.Plan(rounds=1, headline_rounds=2, min_time=0.01, values=1)
    turns = list(plan.turns({"a": {16, 64}, "b": {64}}))
    assert turns == [(0, 16, "a"), (0, 64, "a"), (0, 64, "b"), (1, 64, "a"), (1, 64, "b")]


def test_whoever_is_not_installed_takes_no_turn_and_is_named() -> None:
    run = DRIVER.Run(
        DRIVER.QUICK, ["tink-one", "c-mb-each", "loop-one"], {"tink": "no wheel", "c-mb": "no header"}
    )
    assert run.failures == {"tink-one": "no wheel", "c-mb-each": "no header"}
    assert list(run.cards) == ["loop-one"]


def test_every_contender_belongs_to_something_that_can_be_missing_or_is_ours() -> None:
    for name in registry.PEERS:
        assert DRIVER.family(name) in environment.PACKAGES
    for name in registry.OURS:
        assert DRIVER.family(name) in {
            "lists",
            "columns",
            "single",
            "fallback",
            "loop",
            "c-evp",
            "c-mb",
            "c-newer",
        }


def test_contenders_are_described_in_the_environment_they_run_in() -> None:
    command = [sys.executable, str(BENCH / "describe.py"), "lists-each", "asherah"]
    cards = json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
    assert cards["lists-each"]["sizes"] == list(contender.SIZES)
    assert cards["asherah"] == {"problem": "ModuleNotFoundError: No module named 'asherah'"}


@pytest.mark.parametrize(
    "name", ["loop-each", "loop-one", "lists-each", "lists-one", "single", "single-lease"]
)
def test_ours_and_the_plain_loop_give_back_what_went_in(name: str) -> None:
    way = registry.load(name)(64)
    records = [bytes([at]) * 64 for at in range(20)]
    try:
        assert way.records(way.decrypt(way.encrypt(way.prepare(records)))) == records
        assert describe.card(name)["title"] == way.title
    finally:
        way.close()
