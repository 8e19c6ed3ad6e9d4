# SPDX-License-Identifier: Apache-2.0
"""What may import what, which names are public, and what importing costs."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import openkcm
import openkcm.errors

SOURCE = Path(__file__).resolve().parents[2] / "src" / "openkcm"

VOCABULARY = {"alive", "clock", "errors", "limits", "keys", "context", "envelope", "identity", "waiting"}
# What a part may import besides itself. Core and Gateway do not know each other.
MAY_IMPORT = {
    "_fast": set(),
    **dict.fromkeys(VOCABULARY, VOCABULARY | {"hands"}),
    "sqlite": VOCABULARY,
    "heap": set(),
    "hands": set(),
    "systemd": set(),
    "postgres": VOCABULARY,
    "crypto": VOCABULARY | {"heap", "_fast"},
    "roots": VOCABULARY | {"crypto"},
    "core": VOCABULARY | {"sqlite", "systemd", "postgres", "crypto", "roots"},
    "gateway": VOCABULARY | {"sqlite", "postgres", "crypto"},
    # Customers' roots to test against: a user of them needs no Core.
    "testing": VOCABULARY | {"roots"},
    "pki": VOCABULARY,
    "rpc": VOCABULARY | {"systemd", "crypto", "roots", "core", "gateway"},
    "aio": VOCABULARY | {"gateway", "rpc"},
    "cli": VOCABULARY | {"crypto", "roots", "core", "gateway", "rpc", "pki", "testing", ""},
    # The package itself: the errors and the vocabulary at once, the rest when a name is first used.
    "": {"errors", "keys"},
}
ERRORS = {name for name, value in vars(openkcm.errors).items() if isinstance(value, type)}
PUBLIC = {
    *ERRORS,
    *("Core", "Probe", "TenantStatus", "ServiceStatus", "ServiceKeyStatus", "AuditRecord"),
    *("Grant", "Grants", "RevokedCertificate", "Verb"),
    *("Gateway", "ServiceHandle", "Column", "DataKeyPolicy", "PoolPolicy", "KeyStore"),
    *("KeyService", "Service", "Event", "Change", "Kind", "KeyState", "TenantState"),
    *("connect", "RemoteCore", "connect_admin", "RemoteAdmin", "TLS"),
    *("Root", "open_root", "backend_info", "__version__"),
}


def modules() -> list[str]:
    """Return every module as a path below the package."""
    found = sorted(str(path.relative_to(SOURCE)) for path in SOURCE.rglob("*.py"))
    assert len(found) > 20, "this test looks in the wrong place"
    return found


def dotted(module: str) -> list[str]:
    """Return the names that lead to a module, without the package's own."""
    parts = list(Path(module).with_suffix("").parts)
    return parts[:-1] if parts[-1] == "__init__" else parts


def part(names: list[str]) -> str:
    """Return the part of the package that names lead to; the package itself is ''."""
    return names[0] if names else ""


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"


def running_nodes(tree: ast.AST) -> Iterator[ast.AST]:
    """Walk what runs: at import or in a call, but not what only a type checker reads."""
    yield tree
    for child in [*getattr(tree, "orelse", [])] if is_type_checking(tree) else ast.iter_child_nodes(tree):
        yield from running_nodes(child)


def imported_parts(module: str, text: str) -> Iterator[tuple[int, str]]:
    """Yield the line and the part of each import of ours in a module."""
    names = dotted(module)
    package = names if module.endswith("__init__.py") else names[:-1]
    for node in running_nodes(ast.parse(text)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                first, *rest = alias.name.split(".")
                if first == "openkcm":
                    yield node.lineno, part(rest)
        elif isinstance(node, ast.ImportFrom):
            target = (node.module or "").split(".") if node.module else []
            if node.level:
                target = [*package[: len(package) - node.level + 1], *target]
            elif target[:1] == ["openkcm"]:
                target = target[1:]
            else:
                continue
            for alias in node.names:
                below = [*target, alias.name]
                known = (SOURCE / below[0]).is_dir() or (SOURCE / f"{below[0]}.py").is_file()
                yield node.lineno, below[0] if known else ""


@pytest.mark.parametrize("module", modules())
def test_imports_go_one_way(module: str) -> None:
    own = part(dotted(module))
    assert own in MAY_IMPORT, f"{own} has no place in the import order yet"
    allowed = MAY_IMPORT[own] | {own}
    text = (SOURCE / module).read_text()
    wrong = [(line, found) for line, found in imported_parts(module, text) if found not in allowed]
    assert not wrong, f"{module} may import {sorted(allowed)} of ours"


@pytest.mark.parametrize(
    ("module", "text", "expected"),
    [
        ("gateway/pool.py", "from ..core import Core", ["core"]),
        ("gateway/pool.py", "def f():\n    from .. import core", ["core"]),
        ("core/vault.py", "import openkcm.gateway.pool", ["gateway"]),
        ("core/migrations/env.py", "from ...roots.base import Root", ["roots"]),
        ("core/__init__.py", "from .core import Core", ["core"]),
        ("roots/base.py", "from openkcm import Core", [""]),
        (
            "keys.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from .crypto import SecretKeys",
            [],
        ),
        ("keys.py", "from .crypto import SecretKeys", ["crypto"]),
    ],
)
def test_the_rule_sees_each_spelling(module: str, text: str, expected: list[str]) -> None:
    assert [found for _, found in imported_parts(module, text)] == expected


def test_native_sources_know_nothing_of_ours() -> None:
    sources = [*SOURCE.glob("_fast/*.pyx"), *SOURCE.glob("_fast/*.pxd")]
    assert sources
    for source in sources:
        text = source.read_text()
        assert not re.search(
            r"^\s*(from\s+\.\.|(from|c?import)\s+openkcm\b(?!\._fast))", text, re.MULTILINE
        ), source


def test_bytes_are_laid_out_in_one_place() -> None:
    # Besides those that own the formats: the algorithms' own counters, and what only a digest reads.
    packs = {
        "envelope.py",
        "context.py",
        "rpc/wire.py",
        "rpc/session.py",
        "rpc/frames/format.py",
        "core/rooted_seal.py",
    }
    cuts = {*packs, "crypto/pure.py"}  # a run of keys or nonces into equal pieces, which is no layout
    converts = {*packs, "core/audit.py", *(name for name in modules() if name.startswith("crypto/"))}
    for module in modules():
        for node in ast.walk(ast.parse((SOURCE / module).read_text())):
            if isinstance(node, ast.Import | ast.ImportFrom) and module not in cuts:
                names = (
                    [node.module]
                    if isinstance(node, ast.ImportFrom)
                    else [alias.name for alias in node.names]
                )
                assert "struct" not in names, f"{module}:{node.lineno}"
            if isinstance(node, ast.Attribute) and module not in converts:
                assert node.attr not in ("to_bytes", "from_bytes"), f"{module}:{node.lineno}"


def test_the_public_names_are_these() -> None:
    assert set(openkcm.__all__) == PUBLIC
    # As ruff sorts: a name all in capitals comes first.
    assert openkcm.__all__ == sorted(openkcm.__all__, key=lambda name: (not name.isupper(), name))
    assert set(openkcm.__all__) <= set(dir(openkcm))


@pytest.mark.parametrize("name", sorted(PUBLIC))
def test_each_public_name_is_there_and_described(name: str) -> None:
    value = getattr(openkcm, name)
    if name != "__version__":
        assert value.__doc__ and value.__doc__.strip()
        assert value is getattr(openkcm, name)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'Nonsense'") as caught:
        openkcm.Nonsense  # noqa: B018
    assert type(caught.value) is AttributeError


def test_every_error_derives_from_one() -> None:
    errors = [getattr(openkcm, name) for name in ERRORS]
    assert len(errors) >= 26
    assert all(issubclass(value, openkcm.OpenKCMError) for value in errors)
    codes = [value.code for value in errors]
    assert len(set(codes)) == len(codes)


def loaded_after(statement: str) -> set[str]:
    """Return the modules that a fresh interpreter has loaded after a statement."""
    script = f"import sys\n{statement}\nprint('\\nLOADED', *sys.modules)"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        check=True,
        env=environment,
        timeout=60,
    )
    return set(result.stdout.rpartition("LOADED ")[2].split())


def test_importing_the_package_is_cheap() -> None:
    loaded = loaded_after("import openkcm; openkcm.DecryptError, openkcm.KeyState, dir(openkcm)")
    assert "openkcm" in loaded
    heavy = {
        "sqlalchemy",
        "alembic",
        "cryptography",
        "cffi",
        "_cffi_backend",
        "typer",
        "rich",
        "pkcs11",
        "sqlite3",
    }
    assert not loaded & heavy
    assert not loaded & {"openkcm.crypto", "openkcm.core", "openkcm.gateway", "openkcm.roots", "openkcm.cli"}


def test_using_a_name_loads_its_home() -> None:
    assert "openkcm.roots" in loaded_after("import openkcm; openkcm.open_root")


def test_asking_the_command_line_for_help_is_cheap() -> None:
    statement = """
from openkcm.cli import main
sys.argv = ["openkcm", "--help"]
try:
    main()
except SystemExit as end:
    assert not end.code
"""
    loaded = loaded_after(statement)
    assert "openkcm.cli.app" in loaded
    assert not loaded & {"sqlalchemy", "alembic", "cryptography", "pkcs11", "openkcm.core", "openkcm.gateway"}
