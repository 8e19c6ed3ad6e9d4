# SPDX-License-Identifier: Apache-2.0
"""What the commands say, to people and to machines.

Invariant: with ``--json``, standard output carries exactly one JSON document (or the data itself, when a
command writes data there; the document then goes to standard error), and an error is one JSON document on
standard error. Without it, results go to standard output, and everything else to standard error.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from ..errors import InvalidInput, OpenKCMError, RootDenied
from .exits import ExitCode, error_name, exit_code, hint

if TYPE_CHECKING:
    from rich.console import Console, RenderableType

DEFAULT_VAULT: Final = "vault.db"
PIPE_WIDTH: Final = 1000


@dataclass(slots=True)
class Settings:
    """The options that every command takes."""

    vault: str = DEFAULT_VAULT
    json: bool = False
    quiet: bool = False
    command: str | None = None
    vault_named: bool = False
    core: str = ""
    certificate: str = ""
    key: str = ""
    roots: str = ""


settings = Settings()
"""Those of the command that runs in this process; set once, before it begins."""


def console(*, stderr: bool = False) -> Console:
    """Return a Rich console for standard output, or standard error; into a pipe, lines are not folded."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    wide = None if stream.isatty() or "COLUMNS" in os.environ else PIPE_WIDTH
    return Console(stderr=stderr, highlight=False, width=wide)


def _print(out: Console, renderables: tuple[RenderableType, ...]) -> None:
    for renderable in renderables:
        out.print(renderable, soft_wrap=isinstance(renderable, str))


def note(text: str) -> None:
    """Print a remark (Rich markup) to standard error, unless ``--quiet`` or ``--json``."""
    if not settings.json and not settings.quiet:
        console(stderr=True).print(text, soft_wrap=True)


def warn(text: str) -> None:
    """Print a warning (Rich markup) in red to standard error, also with ``--quiet``."""
    if not settings.json:
        console(stderr=True).print(f"[bold red]warning:[/] [red]{text}[/]", soft_wrap=True)


def warn_of_fallback() -> None:
    """Say that the native backend is missing, to whoever did not ask for the other: a build may have been quiet."""
    from ..crypto import backend_info

    info = backend_info()
    if info["backend"] == "python" and not os.environ.get("OPENKCM_BACKEND"):
        warn(
            f"the native backend is missing, so this is slower and keeps copies of keys on the heap: {info['reason']}; "
            "OPENKCM_BACKEND=python says that this is meant"
        )


def answer(document: Mapping[str, Any], *renderables: RenderableType, data_on_stdout: bool = False) -> None:
    """Give a command's result: the document with ``--json``, else the renderables.

    Args:
        data_on_stdout: standard output carries the data itself, so that the result goes to standard error.
    """
    if settings.json:
        stream = sys.stderr if data_on_stdout else sys.stdout
        print(json.dumps(document, default=str), file=stream)
    elif not settings.quiet:
        _print(console(stderr=data_on_stdout), renderables)


def fail(error: BaseException) -> ExitCode:
    """Print an error on standard error, in one line and a hint, and return the exit code."""
    message, advice = describe(error), hint(error, settings.command)
    if settings.json:
        document = {
            "code": error_name(error),
            "message": message,
            "hint": advice,
            "retryable": bool(getattr(error, "retryable", False)),
            "exit_code": int(exit_code(error)),
        }
        if isinstance(error, RootDenied):
            document["permission"] = error.permission
        print(json.dumps({"error": document}), file=sys.stderr)
    else:
        print_error(message, advice)
    return exit_code(error)


def print_error(message: str, advice: str | None = None) -> None:
    """Print ``error: ...`` and a hint; text only, so that a file name cannot be taken for markup."""
    from rich.text import Text

    out = console(stderr=True)
    out.print(Text.assemble(("error: ", "bold red"), message), soft_wrap=True)
    if advice:
        out.print(Text.assemble(("hint:  ", "bold"), advice), soft_wrap=True)


def describe(error: BaseException) -> str:
    """Return an error's message in one line."""
    if isinstance(error, OSError) and not isinstance(error, OpenKCMError):
        reason = (error.strerror or type(error).__name__).lower()
        text = f"{error.filename}: {reason}" if error.filename else reason
    elif isinstance(error, OpenKCMError):
        text = str(error)
    else:
        text = f"unexpected {type(error).__name__}; run again with OPENKCM_TRACEBACK=1 to see where"
    return printable(" ".join(text.split()))


def printable(text: str) -> str:
    """Return a text with escapes in the place of what could move a terminal's cursor, or cannot be written."""
    if text.isprintable():
        return text
    return "".join(
        one if one.isprintable() else one.encode("unicode_escape", "surrogatepass").decode() for one in text
    )


def plain(text: str) -> str:
    """Return a text that Rich prints as it is, for file and other names inside markup."""
    from rich.markup import escape

    return escape(printable(text))


def confirm(question: str, *, yes: bool, why: str = "this cannot be undone") -> None:
    """Ask before something that cannot be undone, or that others will feel.

    Raises:
        InvalidInput: the answer is not yes, or there is nobody to ask.
    """
    if yes:
        return
    if settings.json or not (sys.stdin.isatty() and sys.stderr.isatty()):
        raise InvalidInput(f"{why}; give --yes to say that it is meant")
    out = console(stderr=True)
    reply = out.input(f"[bold red]{question}[/] Type [bold]yes[/] to go on: ")
    if reply.strip().lower() != "yes":
        raise InvalidInput("nothing was done")


def silence_stdout() -> None:
    """Point standard output at nothing after its reader went away, so that flushing at exit cannot fail."""
    descriptor = os.open(os.devnull, os.O_WRONLY)
    os.dup2(descriptor, sys.stdout.fileno())
    os.close(descriptor)
