# SPDX-License-Identifier: Apache-2.0
"""The table of answers: what the documentation says is what the code does, and nobody forgot a row."""

from __future__ import annotations

import importlib.util
import re
from importlib import import_module
from pathlib import Path

import pytest

from openkcm.errors import OpenKCMError, RootThrottled, RootUnavailable

ROOT = Path(__file__).resolve().parents[2]
MODULES = ["aws.answers", "azure.answers", "gcp.answers", "pkcs11.answers", "bao.answers"]


def test_the_page_is_made_of_the_code() -> None:
    specification = importlib.util.spec_from_file_location("answers", ROOT / "scripts" / "answers.py")
    assert specification is not None
    assert specification.loader is not None
    script = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(script)
    assert (ROOT / "docs" / "answers.md").read_text() == script.page(), (
        "run: python scripts/answers.py > docs/answers.md"
    )


@pytest.mark.parametrize("module", MODULES)
def test_every_row_is_named_in_that_providers_tests(module: str) -> None:
    """Each provider's tests are parametrised over its table, or name each row."""
    answers = import_module(f"openkcm.roots.{module}").ANSWERS
    provider = module.partition(".")[0]
    files = sorted((ROOT / "tests" / "roots").glob(f"test_{provider}*.py"))
    assert files
    text = "".join(path.read_text() for path in files)
    over_table = re.search(
        r"parametrize\([^)]*ANSWERS|in ANSWERS|set\(ANSWERS\)|ANSWERS\.items\(\)|== ANSWERS", text
    )
    missing = [name for name in answers if f'"{name}"' not in text and f"'{name}'" not in text]
    assert over_table or not missing, missing


@pytest.mark.parametrize("module", MODULES)
def test_only_silence_gets_grace(module: str) -> None:
    answers = import_module(f"openkcm.roots.{module}").ANSWERS
    assert all(issubclass(kind, OpenKCMError) for kind in answers.values())
    for kind in set(answers.values()):
        assert issubclass(kind, RootUnavailable) is kind.retryable
    assert {RootUnavailable, RootThrottled} & set(answers.values())
