# SPDX-License-Identifier: Apache-2.0
"""Write the seed corpus of every target, or of those named: ``python tests/fuzz/make_corpus.py [TARGET...]``.

Each seed is a file named by its digest; what a crash was found with may be added beside them by hand.
"""

from __future__ import annotations

import hashlib
import importlib
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parent


def main() -> None:
    sys.path[:0] = [str(FOLDER), str(FOLDER.parent)]
    for target in sys.argv[1:] or sorted(
        path.stem.removeprefix("fuzz_") for path in FOLDER.glob("fuzz_*.py")
    ):
        corpus = FOLDER / "corpus" / target
        corpus.mkdir(parents=True, exist_ok=True)
        for seed in importlib.import_module(f"fuzz_{target}").seeds():
            (corpus / hashlib.sha256(seed).hexdigest()[:16]).write_bytes(seed)
        print(f"{target}: {len(list(corpus.iterdir()))} seeds")


if __name__ == "__main__":
    main()
