# SPDX-License-Identifier: Apache-2.0
"""Exit codes, one for each family of errors, and the hint that goes with it.

Invariant: this table is the only place that gives a number to a failure; docs/cli.md and ``openkcm --help``
print it.
"""

from __future__ import annotations

import enum
from typing import Final

from .. import errors


class ExitCode(enum.IntEnum):
    """What the process ends with. The text of each is its line in the documentation."""

    def __new__(cls, value: int, meaning: str) -> ExitCode:
        member = int.__new__(cls, value)
        member._value_ = value
        member.__doc__ = meaning
        return member

    OK = 0, "done"
    INTERNAL = 1, "a bug of OpenKCM; please report it"
    USAGE = 2, "wrong arguments or input"
    FORMAT = 3, "not an envelope, or not a well-formed file"
    DECRYPT = 4, "wrong key, context or data"
    NOT_FOUND = 5, "no such tenant, service, key or file"
    EXISTS = 6, "already there; nothing was changed"
    DISABLED = 7, "the tenant is dark, or its root key is disabled"
    DESTROYED = 8, "the key was shredded or deleted; no way back"
    DENIED = 9, "known and not allowed"
    CONFIGURATION = 10, "something here is set up wrongly"
    UNAVAILABLE = 11, "something does not answer; try again later"
    SECRET_MEMORY = 12, "no lockable memory is left"
    UNSAFE = 13, "doctor found something unsafe, or a drill was not passed"
    IO = 14, "a file cannot be read or written"
    INTERRUPTED = 130, "stopped by Ctrl-C"
    BROKEN_PIPE = 141, "the reader of the output went away"
    TERMINATED = 143, "stopped by SIGTERM"


_FAMILIES: Final[tuple[tuple[type[errors.OpenKCMError], ExitCode], ...]] = (
    (errors.InvalidInput, ExitCode.USAGE),
    (errors.LimitExceeded, ExitCode.USAGE),
    (errors.FormatError, ExitCode.FORMAT),
    (errors.DecryptError, ExitCode.DECRYPT),
    (errors.KeyNotFound, ExitCode.NOT_FOUND),
    (errors.AlreadyExists, ExitCode.EXISTS),
    (errors.KeyDisabled, ExitCode.DISABLED),
    (errors.KeyDestroyed, ExitCode.DESTROYED),
    (errors.AccessDenied, ExitCode.DENIED),
    (errors.ConfigurationError, ExitCode.CONFIGURATION),
    (errors.Unavailable, ExitCode.UNAVAILABLE),
    (errors.ChannelExpired, ExitCode.UNAVAILABLE),
    (errors.SecretMemoryError, ExitCode.SECRET_MEMORY),
)

_HINTS: Final[tuple[tuple[type[errors.OpenKCMError], str], ...]] = (
    (errors.TenantNotFound, "`openkcm tenant list` shows the tenants of this vault"),
    (
        errors.ServiceNotFound,
        "`openkcm service list` shows the services; an envelope opens with its own service",
    ),
    (errors.TenantDark, "`openkcm status` shows why; `openkcm tenant restore` brings back a killed tenant"),
    (errors.RootDenied, "`openkcm root grant URI` prints what the customer must allow"),
    (errors.RootDisabled, "the customer has disabled the root key; only they can enable it"),
    (
        errors.DecryptError,
        "check the service, --context and --context-column; `openkcm inspect` shows the envelope",
    ),
    (errors.FormatError, "`openkcm inspect` shows what a file or value is"),
    (errors.SealError, "`openkcm doctor` checks the seal file"),
    (errors.ConfigurationError, "`openkcm doctor` shows what is in force here"),
    (errors.SecretMemoryError, "`openkcm doctor` shows the limit; `ulimit -l` raises it"),
    (errors.InternalError, "please report it, with what you did"),
)


def exit_code(error: BaseException) -> ExitCode:
    """Return the exit code for an error."""
    for family, code in _FAMILIES:
        if isinstance(error, family):
            return code
    if isinstance(error, FileNotFoundError):
        return ExitCode.NOT_FOUND
    if isinstance(error, FileExistsError):
        return ExitCode.EXISTS
    return ExitCode.IO if isinstance(error, OSError) else ExitCode.INTERNAL


def error_name(error: BaseException) -> str:
    """Return the stable code of an error, for machines."""
    if isinstance(error, errors.OpenKCMError):
        return error.code
    if isinstance(error, OSError):
        return {ExitCode.NOT_FOUND: "file_not_found", ExitCode.EXISTS: "file_exists"}.get(
            exit_code(error), "io"
        )
    return "internal"


def hint(error: BaseException, command: str | None = None) -> str | None:
    """Return what to do about an error, where the message alone does not say it."""
    own = getattr(error, "hint", None)
    if isinstance(own, str):
        return own
    for family, text in _HINTS:
        if isinstance(error, family):
            # Who has just called the command that a hint names needs no hint.
            return None if command is not None and f"`openkcm {command}`" in text else text
    return None
