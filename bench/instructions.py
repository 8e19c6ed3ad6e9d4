# SPDX-License-Identifier: Apache-2.0
"""Count the instructions of the hot loops, so that a slowdown is seen without timing anything.

``python bench/instructions.py`` prints the counts for one record beside those in ``instructions.json``;
``--renew`` writes them there, for this platform. ``tests/unit/test_instruction_counts.py`` compares.

What is compared is ours to change: instructions within the native layer's own modules, those of the interpreter
that it and the Python above it cause, and calls from the native layer into libcrypto. What libcrypto does inside
depends on its version and the processor, and is only noted. valgrind knows no AVX-512, so the engine is EVP. The counts
depend on the interpreter and the compiler, so they are kept by both.
"""

from __future__ import annotations

import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Final

BENCH: Final = Path(__file__).resolve().parent
KEPT: Final = BENCH / "instructions.json"
NATIVE: Final = "/openkcm/_fast/"
TOLERANCE: Final = {"native": 0.05, "interpreter": 0.10, "libcrypto_calls": 0.02}
"""How far a count may be from the one that is kept, as a part of it, up or down."""

LEAST: Final = 20.0
"""Instructions a record; below it a batch's own cost moves a count more than the tolerance, which is taken of this."""

_OBJECT: Final = re.compile(r"(c?ob)=\((\d+)\)(?: (.*))?")
_COST: Final = re.compile(r"[+\-*\d]\S* (\d+)")
_TRIGGER: Final = "desc: Trigger: Client Request: "


@dataclass
class Counts:
    """For one record: instructions in the native layer and in the interpreter, calls of libcrypto, and all there is."""

    native: float = 0.0
    interpreter: float = 0.0
    libcrypto_calls: float = 0.0
    everything: float = 0.0


@dataclass
class Dump:
    """One of callgrind's files: whose instructions, and who called libcrypto how often."""

    name: str = ""
    own: Counter[str] = field(default_factory=Counter)
    libcrypto_calls: int = 0


def read_dump(lines: Iterable[str]) -> Dump:
    """Read a file of callgrind's format (its manual, "Callgrind Format Specification")."""
    dump, names = Dump(), dict[str, str]()
    here = called = ""
    inclusive = False
    for line in lines:
        if line.startswith(_TRIGGER):
            dump.name = line.removeprefix(_TRIGGER).strip()
        elif line.startswith("fn="):
            called = here
        elif found := _OBJECT.match(line):
            what, number, name = found.groups()
            names.setdefault(number, name or "")
            called = names[number]
            here = called if what == "ob" else here
        elif line.startswith("calls="):
            if "libcrypto" in called and NATIVE in here:
                dump.libcrypto_calls += int(line.removeprefix("calls=").split()[0])
            called, inclusive = here, True  # the next line is what the callee cost
        elif found := _COST.match(line):
            dump.own[here] += 0 if inclusive else int(found[1])
            inclusive = False
    return dump


def counts_of(dump: Dump) -> tuple[str, Counts]:
    """The loop's name and its counts for one record."""
    records, _, name = dump.name.partition(" ")
    counts = Counts(libcrypto_calls=dump.libcrypto_calls)
    for place, cost in dump.own.items():
        counts.everything += cost
        if NATIVE in place:
            counts.native += cost
        elif Path(place).name.startswith(("libpython", "python")):
            counts.interpreter += cost
    return name, Counts(**{part: round(value / int(records), 1) for part, value in asdict(counts).items()})


def count() -> dict[str, Counts]:
    """Run the loops under callgrind.

    Raises:
        RuntimeError: a tool failed.
    """
    with tempfile.TemporaryDirectory(prefix="bench-counting-") as name:
        folder = Path(name)
        library = folder / "counting.so"
        run([compiler(), "-O1", "-shared", "-fPIC", str(BENCH / "counting.c"), "-o", str(library)])
        run(
            [
                "valgrind", "--tool=callgrind", "--instr-atstart=no", "--separate-threads=yes",
                f"--callgrind-out-file={folder / 'out'}", sys.executable, str(BENCH / "hot_loops.py"), str(library),
            ],
            PYTHONHASHSEED="0",
            OPENKCM_AES="evp",
            OPENKCM_BACKEND="fast",
        )  # fmt: skip
        # out.PART-THREAD; what the other threads did is theirs. The last part, at the end, has no trigger.
        dumps = [read_dump(file.read_text().splitlines()) for file in sorted(folder.glob("out.*-01"))]
    found: dict[str, Counts] = {}
    for name, counts in (counts_of(dump) for dump in dumps if dump.name):
        if name not in found or counts.everything < found[name].everything:
            found[name] = counts
    return found


def run(command: list[str], **variables: str) -> None:
    """Run a tool to its end, or raise with what it said."""
    done = subprocess.run(
        command, env={**os.environ, **variables}, stdin=subprocess.DEVNULL, capture_output=True, text=True
    )
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed with {done.returncode}:\n{done.stderr[-2000:]}")


def compiler() -> str:
    """The C compiler."""
    return os.environ.get("CC", "cc")


def here() -> str:
    """What counts are kept by: interpreter, compiler, machine."""
    version = subprocess.run([compiler(), "-dumpversion"], capture_output=True, text=True, check=True).stdout
    python = ".".join(platform.python_version_tuple()[:2])
    return f"{platform.python_implementation()} {python}, cc {version.split('.')[0].strip()}, {platform.machine()}"


def kept() -> dict[str, Any]:
    """The counts that are kept, by platform: ``noted`` (versions) and ``counts`` by loop."""
    found: dict[str, Any] = json.loads(KEPT.read_text()) if KEPT.exists() else {}
    return found


def differences(counted: dict[str, Counts], wanted: dict[str, dict[str, float]]) -> list[str]:
    """Where counts left the tolerance, up or down, or loops came or went; each in words."""
    found = [f"{name}: counted before, not now" for name in wanted.keys() - counted.keys()]
    for name, counts in counted.items():
        if name not in wanted:
            found.append(f"{name}: not counted before")
            continue
        for part, tolerance in TOLERANCE.items():
            now, before = getattr(counts, part), wanted[name][part]
            if abs(now - before) > tolerance * max(before, LEAST):
                found.append(
                    f"{name}: {part.replace('_', ' ')} a record {before} -> {now} ({now / max(before, 0.1) - 1:+.0%})"
                )
    return sorted(found)


def renew(counted: dict[str, Counts]) -> None:
    """Keep these counts for this platform."""
    import openkcm

    noted = {"python": platform.python_version(), "openssl": openkcm.backend_info()["openssl"]}
    entry = {"noted": noted, "counts": {name: asdict(counts) for name, counts in counted.items()}}
    KEPT.write_text(json.dumps({**kept(), here(): entry}, indent=1) + "\n")


def main(arguments: list[str]) -> int:
    """Count, and show or keep; returns 1 if the counts are not those that are kept."""
    counted = count()
    before = kept().get(here(), {}).get("counts", {})
    print(f"{here()}: instructions a record, and libcrypto calls from the native layer")
    for name, counts in counted.items():
        print(f"  {name:40}" + "".join(f"  {part} {value:g}" for part, value in asdict(counts).items()))
    found = differences(counted, before)
    print("\n".join(found) or "as they were")
    if arguments == ["--renew"]:
        renew(counted)
        return 0
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
