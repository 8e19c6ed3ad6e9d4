# SPDX-License-Identifier: Apache-2.0
"""`openkcm encrypt` and `openkcm decrypt`: files of any size, and pipes.

Invariant: an output file is there whole or not at all. On a pipe, decrypted data is written as its segments
verify, so a reader must look at the exit code before it trusts that it has everything.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, BinaryIO, Final, cast

import typer

from ..limits import MAX_RECORD_BYTES
from .commands import (
    DATA,
    ContextOption,
    ForceOption,
    ServiceArgument,
    TenantArgument,
    command,
    parse_context,
)

if TYPE_CHECKING:
    from ..gateway.gateway import ServiceHandle

SUFFIX: Final = ".okc"

InputArgument = Annotated[str, typer.Argument(metavar="FILE", help="A file, or - for standard input.")]
OutputOption = Annotated[
    str | None,
    typer.Option(
        "--output", "-o", metavar="FILE", help="Where to, - for standard output.", show_default=False
    ),
]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(app, "encrypt", rich_help_panel=DATA)(encrypt)
    command(app, "decrypt", rich_help_panel=DATA)(decrypt)


def encrypt(
    tenant: TenantArgument,
    service: ServiceArgument,
    file: InputArgument = "-",
    output: OutputOption = None,
    subject: Annotated[
        str | None,
        typer.Option(help="The person whose key it is, so that `shred` can end it.", show_default=False),
    ] = None,
    context: ContextOption = None,
    force: ForceOption = False,
) -> None:
    """Encrypt a file (to FILE.okc) or a pipe."""
    from . import files
    from .session import open_service

    target = output or (files.STANDARD if file == files.STANDARD else file + SUFFIX)
    pairs = parse_context(context)
    with open_service(tenant, service) as handle:

        def work(source: BinaryIO, sink: BinaryIO) -> None:
            handle.encrypt_stream(source, sink, context=pairs, subject=subject)

        _convert("encrypt", file, target, force, work)


def decrypt(
    tenant: TenantArgument,
    service: ServiceArgument,
    file: InputArgument = "-",
    output: OutputOption = None,
    context: ContextOption = None,
    force: ForceOption = False,
) -> None:
    """Decrypt a file (FILE.okc to FILE) or a pipe; a single value, binary or base64, too."""
    from ..errors import InvalidInput
    from . import files
    from .session import open_service

    if output is None and file != files.STANDARD:
        if not file.endswith(SUFFIX) or file == SUFFIX:
            raise InvalidInput(f"{file} does not end in {SUFFIX}; name the result with --output")
        output = file.removesuffix(SUFFIX)
    target = output or files.STANDARD
    pairs = parse_context(context)
    with open_service(tenant, service) as handle:

        def work(source: BinaryIO, sink: BinaryIO) -> None:
            _open_any(handle, source, sink, pairs)

        _convert("decrypt", file, target, force, work)


def _convert(
    verb: str, file: str, target: str, force: bool, work: Callable[[BinaryIO, BinaryIO], None]
) -> None:
    """Read, work, write, and say what was done."""
    from . import files
    from .output import answer, plain
    from .progress import PATIENCE_SECONDS, CountedReader, CountedWriter, meter, rate

    with (
        files.reading(file) as source,
        files.writing(target, force=force, like=file) as sink,
        meter(f"{verb}ing {file}", files.size_of(source)) as shown,
    ):
        counted = CountedWriter(sink)
        work(cast(BinaryIO, CountedReader(source, shown)), cast(BinaryIO, counted))
    document = {"file": file, "output": target, "read": shown.done, "written": counted.done}
    to_stdout = target == files.STANDARD
    if to_stdout:
        remarks = [f"{verb}ed {rate(shown)}"] if shown.seconds > PATIENCE_SECONDS else []
        answer(document, *remarks, data_on_stdout=True)
    else:
        answer(document, f"{verb}ed [bold]{plain(file)}[/] to [bold]{plain(target)}[/], {rate(shown)}")


def _open_any(
    handle: ServiceHandle, source: BinaryIO, sink: BinaryIO, context: dict[str, str] | None
) -> None:
    """Decrypt a stream, or one record, binary or as base64 text."""
    from ..envelope import FIXED_BYTES, MAGIC
    from ..keys import Kind
    from .progress import Rewound
    from .tables import ENVELOPE_TEXT

    head = source.read(FIXED_BYTES)
    text = head.startswith(ENVELOPE_TEXT)
    if not text and (
        len(head) < FIXED_BYTES or head[:4] != MAGIC or head[5] not in (Kind.INLINE, Kind.STORED)
    ):
        handle.decrypt_stream(cast(BinaryIO, Rewound(head, source)), sink, context=context)
        return
    blob = head + source.read(MAX_RECORD_BYTES)
    sink.write(handle.decrypt(_from_base64(blob) if text else blob, context=context))


def _from_base64(text: bytes) -> bytes:
    import binascii

    from ..errors import FormatError

    try:
        return binascii.a2b_base64(text.strip(), strict_mode=True)
    except ValueError:
        raise FormatError("the input begins like the base64 text of an envelope, but is not base64") from None
