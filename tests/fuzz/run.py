# SPDX-License-Identifier: Apache-2.0
"""Fuzz one target with atheris, guided by the coverage of ``openkcm``.

    python tests/fuzz/run.py TARGET [libFuzzer's arguments]

A target is a module ``fuzz_TARGET.py`` with ``check(data)``, which raises on anything that should not be, and
``seeds()``, from which ``make_corpus.py`` wrote the corpus.
"""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import atheris

FOLDER = Path(__file__).resolve().parent


def main() -> None:
    target, arguments = sys.argv[1], sys.argv[2:]
    sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]
    with atheris.instrument_imports(include=["openkcm"], enable_loader_override=False):
        module = importlib.import_module(f"fuzz_{target}")
    atheris.Setup([f"fuzz_{target}", *arguments], module.check)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
