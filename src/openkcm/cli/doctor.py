# SPDX-License-Identifier: Apache-2.0
"""`openkcm doctor`: what protects the keys on this machine, and what does not.

Invariant: it reports what is in force, never what was asked for, and it changes nothing. Anything that breaks
a promise of the documentation is *unsafe* and makes the exit code 13; what is merely less than the best is
*weak*.
"""

from __future__ import annotations

import enum
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from typing import Annotated, Any, Final

import typer

from .commands import INSIGHT, command
from .exits import ExitCode

LOCKABLE_BYTES_WANTED: Final = 1024 * 1024
"""Below this, a Gateway cannot hold a full batch of data keys beside its pools."""


class Level(enum.StrEnum):
    """How a check came out."""

    OK = "ok"
    INFO = "info"
    WEAK = "weak"
    UNSAFE = "unsafe"


_STYLES: Final = {Level.OK: "green", Level.INFO: "dim", Level.WEAK: "yellow", Level.UNSAFE: "bold red"}


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at; ``advice`` says what to do when it is not ok."""

    area: str
    name: str
    level: Level
    found: str
    advice: str = ""


def register(app: typer.Typer) -> None:
    """Add the command."""
    command(app, "doctor", rich_help_panel=INSIGHT)(doctor)


def doctor(
    allow_development: Annotated[
        bool,
        typer.Option("--allow-development", metavar="", help="Count local: roots as weak, not as unsafe."),
    ] = False,
) -> None:
    """Check what protects the keys here: backend, OpenSSL, memory, seal file, roots."""
    from .output import answer

    checks = [*_machine(), *_vault(Level.WEAK if allow_development else Level.UNSAFE)]
    worst = max(checks, key=lambda check: list(Level).index(check.level)).level
    document = {"verdict": worst.value, "checks": [asdict(check) for check in checks]}
    answer(document, _table(checks), _verdict(checks))
    if worst is Level.UNSAFE:
        raise typer.Exit(ExitCode.UNSAFE)


def _machine() -> Iterator[Check]:
    yield from _guarded("cryptography", _backend)
    yield from _guarded("memory", _memory)
    yield from _guarded("process", _process)


def _guarded(area: str, checks: Callable[[], Iterator[Check]]) -> Iterator[Check]:
    """Run checks; one that fails is itself a finding."""
    from ..errors import OpenKCMError
    from .exits import hint

    try:
        yield from checks()
    except (OpenKCMError, OSError) as error:
        yield Check(area, "check", Level.UNSAFE, str(error), hint(error, "doctor") or "")


def _backend() -> Iterator[Check]:
    from .. import crypto

    info = crypto.backend_info()
    area = "cryptography"
    if info["backend"] == "fast":
        yield Check(area, "backend", Level.OK, "fast (native)")
    else:
        yield Check(
            area,
            "backend",
            Level.WEAK,
            "python: slower, and keys pass through the Python heap while they are used",
            "install a compiler and OpenSSL's headers, then reinstall openkcm",
        )
    yield Check(area, "AES-256-GCM", Level.OK, f"{info['engine']}: {info['engine_reason']}")
    yield Check(area, "OpenSSL", Level.OK, " at ".join(filter(None, (info["openssl"], info["openssl_file"]))))
    yield Check(area, "raw AES blocks", Level.OK, str(info["aes"]))
    for text in info.get("notes", ()):
        yield Check(area, "note", Level.WEAK, str(text))


def _memory() -> Iterator[Check]:
    import resource

    from .. import crypto

    info: dict[str, Any] = crypto.secret_memory_info()
    if info["kind"] == "memfd_secret":
        yield Check("memory", "secret memory", Level.OK, "memfd_secret: not even the kernel maps it")
    else:
        yield Check(
            "memory",
            "secret memory",
            Level.WEAK,
            f"{info['kind']}: locked and kept out of core dumps, but root can read it",
            "a kernel 5.14 or newer with secretmem.enable=1 has memfd_secret",
        )
    soft, hard = resource.getrlimit(resource.RLIMIT_MEMLOCK)
    unlimited = resource.RLIM_INFINITY
    text = "no limit" if soft == unlimited else f"{soft // 1024:,} KiB"
    if hard != soft:
        text += " (can be raised " + ("without limit)" if hard == unlimited else f"to {hard // 1024:,} KiB)")
    enough = soft == unlimited or soft >= LOCKABLE_BYTES_WANTED
    yield Check(
        "memory",
        "RLIMIT_MEMLOCK",
        Level.OK if enough else Level.WEAK,
        text,
        "" if enough else "raise it: `ulimit -l 65536`, LimitMEMLOCK= of systemd, or limits.conf",
    )


def _process() -> Iterator[Check]:
    import resource

    soft, _ = resource.getrlimit(resource.RLIMIT_CORE)
    yield Check(
        "process", "core dumps", Level.OK, "off" if soft == 0 else "on; secret memory is left out of them"
    )
    if os.geteuid() == 0:
        yield Check("process", "user", Level.INFO, "root", "a service should run as a user of its own")
    try:
        with open("/proc/sys/kernel/yama/ptrace_scope") as scope:
            allowed = scope.read().strip() == "0"
    except OSError:
        return
    yield Check(
        "process",
        "ptrace",
        Level.WEAK if allowed else Level.OK,
        "any process of this user may read this one" if allowed else "limited to descendants, or less",
        "set kernel.yama.ptrace_scope to 1" if allowed else "",
    )


def _vault(development: Level) -> Iterator[Check]:
    from .session import vault_path

    path = vault_path()
    if path is None:
        server = list(_guarded("vault", _server))
        yield from server
        if not any(check.name == "database" and check.level is Level.OK for check in server):
            return
    elif not os.path.exists(path):
        yield Check("vault", "database", Level.INFO, f"there is none at {path}", "`openkcm init` makes one")
        return
    else:
        yield from _guarded("vault", lambda: _files(path))
    yield from _guarded("roots", lambda: _roots(development))


def _server() -> Iterator[Check]:
    """A vault in PostgreSQL: whether it is there, whom it is taken for, and its seal file."""
    from ..core.store import open_store
    from .session import seal_option, vault_url

    seal = seal_option()
    if seal is None:
        yield Check("vault", "seal file", Level.UNSAFE, "none is named; nothing opens", "set OPENKCM_SEAL")
    else:
        yield from _seal(seal)
    store = open_store(vault_url())
    try:
        found = "a vault" if store.exists() else "no vault yet"
        advice = "" if found == "a vault" else "`openkcm init` makes one"
        yield Check(
            "vault", "database", Level.INFO if advice else Level.OK, f"{store.place}: {found}", advice
        )
        weakness = store.weakness()
    finally:
        store.retire()
    yield Check(
        "vault",
        "connection",
        Level.WEAK if weakness else Level.OK,
        weakness or "TLS with the server verified, or on this machine",
        "put sslmode=verify-full and sslrootcert=PATH into the URL" if weakness else "",
    )


def _files(path: str) -> Iterator[Check]:
    from .session import seal_path

    yield _private("database", path, Level.WEAK)
    yield from _seal(seal_path(path))
    directory = os.path.dirname(os.path.abspath(path))
    mode = os.stat(directory).st_mode
    loose = bool(mode & stat.S_IWOTH) and not mode & stat.S_ISVTX
    yield Check(
        "vault",
        "directory",
        Level.UNSAFE if loose else Level.OK,
        "anybody may replace the files in it" if loose else "not writable by others",
        f"chmod o-w {directory}" if loose else "",
    )


def _seal(seal: str) -> Iterator[Check]:
    if os.path.exists(seal):
        yield _private("seal file", seal, Level.UNSAFE)
        yield Check("vault", "seal copy", Level.INFO, "keep one elsewhere: without it nothing here opens")
    else:
        yield Check(
            "vault", "seal file", Level.UNSAFE, f"{seal} is missing; nothing opens", "put its copy back"
        )


def _private(name: str, path: str, level: Level) -> Check:
    status = os.stat(path)
    mode = stat.S_IMODE(status.st_mode)
    if mode & 0o077:
        return Check("vault", name, level, f"{path} is open to others ({mode:04o})", f"chmod 600 {path}")
    if status.st_uid != os.geteuid():
        return Check(
            "vault", name, level, f"{path} belongs to another user", f"chown it to uid {os.geteuid()}"
        )
    return Check("vault", name, Level.OK, f"{path} ({mode:04o})")


def _roots(development: Level) -> Iterator[Check]:
    from .session import open_core

    with open_core() as core:
        tenants = core.status()
    for tenant in tenants:
        if tenant.development:
            yield Check(
                "roots",
                tenant.tenant,
                development,
                f"{tenant.root} is for development only: the key lies in a file",
                f"link {tenant.tenant} to an HSM or KMS",
            )
        else:
            yield from _root(tenant.tenant, tenant.root)


def _root(tenant: str, uri: str) -> Iterator[Check]:
    """What a root says about itself. One that does not answer is the customer's business, and not unsafe."""
    from ..errors import OpenKCMError
    from ..roots import open_root

    try:
        root = open_root(uri)
        try:
            warnings = root.warnings()
        finally:
            root.close()
    except OpenKCMError as error:
        yield Check("roots", tenant, Level.WEAK, f"{uri}: {error}")
        return
    yield Check("roots", tenant, Level.WEAK if warnings else Level.OK, "; ".join((uri, *warnings)))


def _table(checks: list[Check]) -> Any:
    from rich.table import Table
    from rich.text import Text

    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True, min_width=6)
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    area = ""
    for check in checks:
        if check.area != area:
            area = check.area
            grid.add_row("", "", "") if area != checks[0].area else None
            grid.add_row(Text(area, style="bold"), "", "")
        style = _STYLES[check.level]
        word = check.level.value.upper() if check.level is Level.UNSAFE else check.level.value
        found = Text(check.found, style=style if check.level is Level.UNSAFE else "")
        if check.advice:
            found.append(f"\n→ {check.advice}", style="dim")
        grid.add_row(Text(f"  {word}", style=style), check.name, found)
    return grid


def _verdict(checks: list[Check]) -> str:
    unsafe = sum(check.level is Level.UNSAFE for check in checks)
    weak = sum(check.level is Level.WEAK for check in checks)
    if unsafe:
        return f"\n[bold red]{unsafe} unsafe[/], {weak} weak"
    return f"\n[yellow]nothing unsafe, {weak} weak[/]" if weak else "\n[green]all is well[/]"
