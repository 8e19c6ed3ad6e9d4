# SPDX-License-Identifier: Apache-2.0
"""The `openkcm` command: puts the nouns together and turns every failure into one line and an exit code.

Invariant: no OpenKCM error, operating-system error or interrupt ever shows a traceback, and whatever ends a
command unwinds it, so that unfinished files are taken away.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from types import FrameType
from typing import Annotated, Any, NoReturn

import typer

from ..errors import OpenKCMError
from . import (
    crypt,
    demo,
    demo_regions,
    doctor,
    drill,
    grant,
    init,
    inspect,
    pki,
    plan,
    protect,
    root,
    seal,
    serve,
    service,
    shred,
    status,
    tenant,
)
from .commands import JsonOption, QuietOption, ReaderGone, VaultOption, set_globals
from .exits import ExitCode
from .output import DEFAULT_VAULT, fail, print_error, settings, silence_stdout

_EPILOG = "Exit codes: " + " · ".join(
    f"[bold]{code.value}[/] {text}"
    for code, text in (
        (ExitCode.OK, "ok"),
        (ExitCode.INTERNAL, "our bug"),
        (ExitCode.USAGE, "usage"),
        (ExitCode.FORMAT, "format"),
        (ExitCode.DECRYPT, "decrypt"),
        (ExitCode.NOT_FOUND, "not found"),
        (ExitCode.EXISTS, "exists"),
        (ExitCode.DISABLED, "dark"),
        (ExitCode.DESTROYED, "destroyed"),
        (ExitCode.DENIED, "denied"),
        (ExitCode.CONFIGURATION, "configuration"),
        (ExitCode.UNAVAILABLE, "unavailable, try again"),
        (ExitCode.SECRET_MEMORY, "secret memory"),
        (ExitCode.UNSAFE, "unsafe (doctor, drill)"),
        (ExitCode.IO, "input/output"),
        (ExitCode.INTERRUPTED, "interrupted"),
    )
)

app = typer.Typer(
    name="openkcm",
    help="Encrypt your customers' data under keys that they can unplug.",
    epilog=_EPILOG,
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
for module in (
    init,
    tenant,
    root,
    service,
    status,
    crypt,
    protect,
    shred,
    grant,
    pki,
    inspect,
    plan,
    drill,
    seal,
    serve,
    doctor,
    demo,
    demo_regions,
):
    module.register(app)


class Terminated(BaseException):
    """SIGTERM came: unwind, as for Ctrl-C."""


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import PackageNotFoundError, version

        try:
            print(f"openkcm {version('openkcm')}")
        except PackageNotFoundError:
            print("openkcm (not installed)")
        raise typer.Exit


@app.callback()
def options(
    vault: VaultOption = None,
    json: JsonOption = False,
    quiet: QuietOption = False,
    version: Annotated[
        bool,
        typer.Option("--version", metavar="", help="Print the version.", is_eager=True, callback=_version),
    ] = False,
) -> None:
    """Encrypt your customers' data under keys that they can unplug."""
    settings.vault = os.environ.get("OPENKCM_VAULT") or settings.vault
    set_globals(vault, json, quiet)


def main() -> NoReturn:
    """Run the command line and exit."""
    # Commands say themselves what became of a tenant.
    logging.getLogger("openkcm.liveness").setLevel(logging.CRITICAL)
    signal.signal(signal.SIGTERM, _terminate)
    code = int(run())
    # What was done is done and said; an interrupt while the interpreter shuts down must not deny it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    sys.exit(code)


def run(arguments: list[str] | None = None) -> int:
    """Run one command and return its exit code."""
    settings.vault, settings.quiet, settings.command = DEFAULT_VAULT, False, None
    settings.core, settings.vault_named = "", False
    # Known at once, for mistakes that are found before the options are read.
    settings.json = "--json" in (sys.argv if arguments is None else arguments)
    try:
        code = app(args=arguments, prog_name="openkcm", standalone_mode=False)
        if code == ExitCode.INTERRUPTED:  # what Typer makes of Ctrl-C
            raise KeyboardInterrupt
        return code if isinstance(code, int) else ExitCode.OK
    except KeyboardInterrupt:
        return _stopped(ExitCode.INTERRUPTED, "interrupted; nothing was left half done")
    except Terminated:
        return _stopped(ExitCode.TERMINATED, "terminated; nothing was left half done")
    except (ReaderGone, BrokenPipeError):
        silence_stdout()
        return ExitCode.BROKEN_PIPE
    except (OpenKCMError, OSError) as error:
        return fail(error)
    except Exception as error:
        if (code := _usage(error)) is not None:
            return code
        if os.environ.get("OPENKCM_TRACEBACK"):
            raise
        return fail(error)


def _stopped(code: ExitCode, message: str) -> ExitCode:
    if settings.json:
        import json

        document = {"code": code.name.lower(), "message": message, "hint": None, "retryable": True}
        print(json.dumps({"error": {**document, "exit_code": int(code)}}), file=sys.stderr)
    else:
        print_error(message)
    return code


def _usage(error: Exception) -> int | None:
    """Report a mistake in the command line, which Typer raises as an exception of the Click inside it."""
    if isinstance(error, typer.Abort):
        return _stopped(ExitCode.INTERRUPTED, "interrupted; nothing was left half done")
    describe: Any = getattr(error, "format_message", None)
    if describe is None:
        return None
    context: Any = getattr(error, "ctx", None)
    path = context.command_path if context is not None else "openkcm"
    message = " ".join(describe().split())
    if not message:
        return ExitCode.USAGE  # no_args_is_help has printed the help already
    if settings.json:
        import json

        document = {"code": "usage", "message": message, "hint": f"{path} --help", "retryable": False}
        print(json.dumps({"error": {**document, "exit_code": 2}}), file=sys.stderr)
    else:
        print_error(message[:1].lower() + message[1:], f"`{path} --help` shows what it takes")
    return ExitCode.USAGE


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated
