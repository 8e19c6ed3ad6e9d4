# SPDX-License-Identifier: Apache-2.0
"""`openkcm protect` and `openkcm unprotect`: chosen columns of CSV or NDJSON files and pipes.

Invariant: in place or not, the original stays as it was until the new file is whole and on disk.
"""

from __future__ import annotations

import enum
from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated, Any, BinaryIO, Final, Literal

import typer

from .commands import DATA, ForceOption, ServiceArgument, TenantArgument, command

if TYPE_CHECKING:
    from .tables import ColumnCipher, Columns, Counts, Table


class TableFormat(enum.StrEnum):
    """How the rows are written."""

    AUTO = "auto"
    CSV = "csv"
    NDJSON = "ndjson"


class ShreddedChoice(enum.StrEnum):
    """What to write for a value whose key was shredded."""

    FAIL = "fail"
    KEEP = "keep"
    BLANK = "blank"
    MARK = "mark"


NDJSON_SUFFIXES: Final = (".ndjson", ".jsonl", ".json")
DELIMITER_NAMES: Final = {"comma": ",", "semicolon": ";", "tab": "\t", "\\t": "\t", "bar": "|"}

FileArgument = Annotated[str, typer.Argument(metavar="FILE", help="A file, or - for standard input.")]
ColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--column", "-C", metavar="NAME", help="A column to work on; repeatable.", show_default=False
    ),
]
ContextColumnOption = Annotated[
    list[str] | None,
    typer.Option(
        "--context-column",
        metavar="NAME",
        help="A column, left readable, to which each value of the row is bound; repeatable.",
        show_default=False,
    ),
]
FormatOption = Annotated[
    TableFormat, typer.Option("--format", help="auto: NDJSON if the file's name says so, else CSV.")
]
DelimiterOption = Annotated[
    str | None,
    typer.Option(
        metavar="CHARACTER", help="Of CSV: comma (default), semicolon, tab or bar.", show_default=False
    ),
]
OutputOption = Annotated[
    str | None,
    typer.Option(
        "--output", "-o", metavar="FILE", help="Where to; standard output if not given.", show_default=False
    ),
]
InPlaceOption = Annotated[bool, typer.Option("--in-place", "-i", metavar="", help="Replace the file itself.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    command(app, "protect", rich_help_panel=DATA)(protect)
    command(app, "unprotect", rich_help_panel=DATA)(unprotect)


def protect(
    tenant: TenantArgument,
    service: ServiceArgument,
    file: FileArgument = "-",
    column: ColumnOption = None,
    subject_column: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="The column that says whose row it is; each such person gets a key, which `shred` can end.",
            show_default=False,
        ),
    ] = None,
    context_column: ContextColumnOption = None,
    form: FormatOption = TableFormat.AUTO,
    delimiter: DelimiterOption = None,
    output: OutputOption = None,
    in_place: InPlaceOption = False,
    force: ForceOption = False,
) -> None:
    """Encrypt chosen columns of a CSV or NDJSON file; all else stays readable.

    Each value becomes the base64 text of an envelope, bound to its column's name. Empty values are encrypted
    too; a JSON null stays null. A value in a row without a subject gets a data key of its own.
    """
    from .tables import Columns

    columns = Columns(tuple(column or ()), subject_column, tuple(context_column or ()))
    job = _Job("protect", (tenant, service), file, columns, form, delimiter, output, in_place, force)
    job.run("fail", lambda table, source, sink: table.protect(source, sink))


def unprotect(
    tenant: TenantArgument,
    service: ServiceArgument,
    file: FileArgument = "-",
    column: ColumnOption = None,
    context_column: ContextColumnOption = None,
    shredded: Annotated[
        ShreddedChoice,
        typer.Option(
            help="For a value whose key was shredded: stop, keep the envelope, leave it blank, or mark it."
        ),
    ] = ShreddedChoice.FAIL,
    form: FormatOption = TableFormat.AUTO,
    delimiter: DelimiterOption = None,
    output: OutputOption = None,
    in_place: InPlaceOption = False,
    force: ForceOption = False,
) -> None:
    """Decrypt what `protect` has encrypted: the columns named, or every protected one."""
    from .tables import Columns

    columns = Columns(tuple(column or ()), None, tuple(context_column or ()))
    job = _Job("unprotect", (tenant, service), file, columns, form, delimiter, output, in_place, force)
    job.run(shredded.value, lambda table, source, sink: table.unprotect(source, sink))


class _Job:
    """One run of either command, its arguments checked before anything is opened."""

    def __init__(
        self,
        verb: Literal["protect", "unprotect"],
        where: tuple[str, str],
        file: str,
        columns: Columns,
        form: TableFormat,
        delimiter: str | None,
        output: str | None,
        in_place: bool,
        force: bool,
    ) -> None:
        from ..errors import InvalidInput
        from .files import STANDARD

        if in_place and (output is not None or file == STANDARD):
            raise InvalidInput("--in-place takes a file, and no --output")
        self.verb = verb
        self.where = where
        self.file = file
        self.columns = columns
        self.ndjson = form is TableFormat.NDJSON or (
            form is TableFormat.AUTO and file.lower().endswith(NDJSON_SUFFIXES)
        )
        self.delimiter = self._delimiter(delimiter)
        self.target = file if in_place else output or STANDARD
        self.force = force or in_place

    def _delimiter(self, given: str | None) -> str:
        if given is None:
            return "\t" if self.file.lower().endswith(".tsv") else ","
        return DELIMITER_NAMES.get(given, given)

    def run(self, shredded: str, work: Callable[[Table, BinaryIO, BinaryIO], Counts]) -> None:
        """Open, work, and say what was done."""
        from . import files
        from .progress import meter
        from .session import open_service
        from .tables import ColumnCipher, Shredded

        with (
            open_service(*self.where) as service,
            files.reading(self.file) as source,
            files.writing(self.target, force=self.force, like=self.file) as sink,
            meter(f"{self.verb}ing {self.file}", files.size_of(source)) as shown,
        ):
            cipher = ColumnCipher(service, Shredded(shredded))
            counts = work(self._table(cipher, shown), source, sink)
        self._report(counts, shown.seconds)

    def _table(self, cipher: ColumnCipher, shown: Any) -> Table:
        if self.ndjson:
            from .ndjson_table import NdjsonTable

            return NdjsonTable(cipher, self.columns, progress=shown.advance_to)
        from .csv_table import CsvTable

        return CsvTable(cipher, self.columns, delimiter=self.delimiter, progress=shown.advance_to)

    def _report(self, counts: Counts, seconds: float) -> None:
        from .files import STANDARD
        from .output import answer, plain
        from .progress import PATIENCE_SECONDS, seconds_text, size_text

        document = {
            "file": self.file,
            "output": self.target,
            "rows": counts.rows,
            "values": counts.values,
            "shredded": counts.shredded,
            "without_subject": counts.without_subject,
            "read": counts.read,
            "written": counts.written,
            "seconds": round(seconds, 3),
        }
        names = ", ".join(counts.columns)
        text = (
            f"{self.verb}ed [bold]{counts.values:,}[/] values ({plain(names)}) in {counts.rows:,} rows, "
            f"{size_text(counts.read)} in {seconds_text(seconds)}"
        )
        if counts.rows > 10_000:
            text += f" ({counts.rows / seconds:,.0f} rows/s)"
        remarks = [text]
        if counts.without_subject:
            remarks.append(
                f"{counts.without_subject:,} values have no subject; each has a data key of its own"
            )
        if counts.shredded:
            remarks.append(f"[yellow]{counts.shredded:,} values were shredded and cannot be read[/]")
        to_stdout = self.target == STANDARD
        if to_stdout and seconds < PATIENCE_SECONDS:
            del remarks[0]
        answer(document, *remarks, data_on_stdout=to_stdout)
