# SPDX-License-Identifier: Apache-2.0
"""Test OpenKCM on an interpreter without a GIL: ``make free-threaded PYTHON=/path/to/python3.14t``.

Makes an environment of its own below ``build/free-threaded``, with what has wheels for that interpreter, builds the
native layer with it, and runs what is about threads and columns. What cannot be run for want of a package is named at
the end, with the package. Arguments go to pytest, after the tests.
"""

from __future__ import annotations

import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parents[1]
BUILD: Final = ROOT / "build" / "free-threaded"

NEEDED: Final = (
    *("setuptools>=77", "cython>=3.1", "SQLAlchemy>=2.0.36", "alembic>=1.14", "tenacity>=9", "psutil>=6"),
    *("pytest>=8.3", "pytest-timeout>=2.3", "hypothesis>=6.120", "numpy>=2", "pandas>=2.2", "pyarrow>=18"),
)
WELCOME: Final = {
    "cryptography": "cryptography>=44",
    "cffi": "cffi>=1.17",
    "polars": "polars>=1.20",
}
"""By the name that is imported: what some such interpreters have no wheel for."""

TESTS: Final = {
    "unit": (
        "alive changed_columns channel column_envelopes column_input column_keys column_shred columns columns_page "
        "core_races gateway golden hands ids into leases liveness protect refusals rows streams"
    ),
    "adversarial": "threads side_by_side columns_side_by_side",
}
WANTS: Final = {
    "tests/unit/test_crypto.py": ("cryptography", "cffi"),
    "tests/adversarial/test_fork.py": ("cryptography",),
    "tests/adversarial/test_native_memory.py": ("cryptography",),
    "tests/contract/test_columns_agree.py": ("cryptography", "cffi"),
    "tests/contract/test_backends_agree.py": ("cryptography", "cffi"),
}
"""Tests that are run where these packages are."""

LOOK: Final = """
import importlib, pkgutil, sys
import openkcm, openkcm._fast as native
for each in pkgutil.iter_modules(native.__path__):
    importlib.import_module(f"openkcm._fast.{each.name}")
assert not sys._is_gil_enabled()
"""


def run(*command: str, **more: str) -> None:
    """Run a command, and end with its status where it fails."""
    done = subprocess.run(command, cwd=ROOT, env=os.environ | more, check=False)
    if done.returncode:
        sys.exit(done.returncode)


def install() -> tuple[str, list[str]]:
    """Make the environment; its interpreter, and which of the welcome packages it has not."""
    python = str(BUILD / "venv" / "bin" / "python")
    run(sys.executable, "-m", "venv", str(BUILD / "venv"))
    # Wheels alone: what is compiled here for want of one would mostly turn the GIL on.
    pip = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--only-binary", ":all:"]
    run(*pip, *NEEDED)
    without = []
    for name, wanted in WELCOME.items():
        if subprocess.run([*pip, wanted], capture_output=True, check=False).returncode:
            without.append(name)
    return python, without


def build(python: str) -> str:
    """Build the native layer; the folder to import the package from."""
    log = BUILD / "build.log"
    print(f"Building the native layer ({log.relative_to(ROOT)})", flush=True)
    folders = ("--build-base", str(BUILD), "--build-lib", str(BUILD / "lib"))
    with log.open("wb") as file:
        done = subprocess.run(
            [python, "setup.py", "build", *folders],
            cwd=ROOT,
            env=os.environ | {"OPENKCM_BUILD": "require"},
            stdout=file,
            stderr=subprocess.STDOUT,
            check=False,
        )
    if done.returncode:
        sys.exit(log.read_text())
    return str(BUILD / "lib")


def main() -> None:
    """Do all of it."""
    if not sysconfig.get_config_var("Py_GIL_DISABLED"):
        sys.exit(
            f"{sys.executable} has a GIL; name one without: make free-threaded PYTHON=/path/to/python3.14t"
        )
    python, without = install()
    library = build(python)
    run(python, "-W", "error", "-c", LOOK, PYTHONPATH=library)
    tests = [f"tests/{kind}/test_{name}.py" for kind, names in TESTS.items() for name in names.split()]
    left_out = {test: [each for each in wants if each in without] for test, wants in WANTS.items()}
    tests += [test for test, missing in left_out.items() if not missing]
    arguments = ["-m", "pytest", "-p", "no:cacheprovider", *tests, *sys.argv[1:]]
    done = subprocess.run(
        [python, *arguments],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": library, "OPENKCM_BACKEND": "fast"},
        stdin=subprocess.DEVNULL,
        check=False,
    )
    print(f"Without a GIL, on CPython {sysconfig.get_config_var('py_version')}.")
    for name in without:
        print(f"  {name} has no wheel for it.")
    for test, missing in left_out.items():
        if missing:
            print(f"  Left out: {test}, which needs {' and '.join(missing)}.")
    print("  Left out: servers, remote Cores, databases, roots of providers and the Python backend.")
    sys.exit(done.returncode)


if __name__ == "__main__":
    main()
