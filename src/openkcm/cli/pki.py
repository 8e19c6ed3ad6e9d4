# SPDX-License-Identifier: Apache-2.0
"""`openkcm pki`: certificates of a development CA, and which certificates a vault refuses.

Invariant: whoever makes a CA is told that it is for development; a certificate is refused by the vault before its
own CA says so, since the vault is what a Core goes by.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import FormatError, InvalidInput
from .commands import NETWORK, command

if TYPE_CHECKING:
    from datetime import datetime

    from ..pki import DevelopmentCA, Issued

DEFAULT_FOLDER = "pki"
LEAF_DAYS = 90
CA_DAYS = 3650
STATE_STYLES = {"valid": "green", "replaced": "yellow", "expired": "dim", "revoked": "bold red"}

FolderOption = Annotated[
    str | None,
    typer.Option(
        "--pki",
        metavar="FOLDER",
        help=f"The CA's folder. [dim]default: {DEFAULT_FOLDER}, or $OPENKCM_PKI[/]",
        show_default=False,
    ),
]
NameArgument = Annotated[
    str, typer.Argument(metavar="NAME", help="The certificate's name.", show_default=False)
]
DaysOption = Annotated[float, typer.Option(metavar="DAYS", help="How long it is valid.")]


def register(app: typer.Typer) -> None:
    """Add the commands."""
    group = typer.Typer(no_args_is_help=True, help="Certificates of a development CA; revoking any.")
    command(group, "init")(init)
    issue = typer.Typer(no_args_is_help=True, help="Issue a certificate and its key.")
    command(issue, "server")(server)
    command(issue, "gateway")(gateway)
    command(issue, "operator")(operator)
    group.add_typer(issue, name="issue")
    command(group, "renew")(renew)
    command(group, "revoke", remote=True)(revoke)
    command(group, "list")(list_certificates)
    command(group, "revoked", remote=True)(list_revoked)
    app.add_typer(group, name="pki", rich_help_panel=NETWORK)


def init(pki: FolderOption = None, days: DaysOption = CA_DAYS) -> None:
    """Make a development CA in a new folder."""
    from ..pki import WARNING, DevelopmentCA
    from .output import answer, plain, warn

    ca = DevelopmentCA.create(_folder(pki), days=days)
    warn(WARNING)
    answer(
        {
            "pki": str(ca.folder),
            "certificate": str(ca.certificate_path),
            "not_after": _time(ca.expires),
            "development": True,
        },
        f"made a development CA in [bold]{plain(str(ca.folder))}[/], valid to {ca.expires:%Y-%m-%d}",
        "[dim]next: openkcm pki issue server core --dns localhost[/]",
    )


def server(
    name: NameArgument,
    dns: Annotated[
        list[str] | None, typer.Option(metavar="HOST", help="A host name of it.", show_default=False)
    ] = None,
    ip: Annotated[
        list[str] | None, typer.Option(metavar="ADDRESS", help="An IP address of it.", show_default=False)
    ] = None,
    days: DaysOption = LEAF_DAYS,
    pki: FolderOption = None,
) -> None:
    """Issue a certificate for a Core to show to its callers."""
    _answer_issued(_open(pki).issue_server(name, dns=dns or (), ips=ip or (), days=days))


def gateway(
    name: NameArgument,
    spiffe: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Its SPIFFE ID; without one, its identity is cn:NAME.", show_default=False
        ),
    ] = None,
    days: DaysOption = LEAF_DAYS,
    pki: FolderOption = None,
) -> None:
    """Issue a certificate for a Gateway to show to a Core."""
    _answer_issued(_open(pki).issue_client(name, spiffe=spiffe, days=days))


def operator(
    name: NameArgument,
    spiffe: Annotated[
        str | None,
        typer.Option(
            metavar="ID", help="Their SPIFFE ID; without one, the identity is cn:NAME.", show_default=False
        ),
    ] = None,
    days: DaysOption = LEAF_DAYS,
    pki: FolderOption = None,
) -> None:
    """Issue a certificate for an operator to show to a Core's administrative interface."""
    _answer_issued(_open(pki).issue_client(name, spiffe=spiffe, days=days))


def renew(name: NameArgument, days: DaysOption = LEAF_DAYS, pki: FolderOption = None) -> None:
    """Issue a certificate for the same names and a new key; files are switched in one step."""
    _answer_issued(_open(pki).renew(name, days=days))


def revoke(
    name: Annotated[
        str | None, typer.Argument(metavar="[NAME]", help="A certificate of the development CA.")
    ] = None,
    certificate: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="A certificate of any CA, PEM or DER.", show_default=False),
    ] = None,
    fingerprint: Annotated[
        str | None,
        typer.Option(
            metavar="HEX", help="Its SHA-256 fingerprint, if it is not at hand.", show_default=False
        ),
    ] = None,
    reason: Annotated[str, typer.Option(metavar="TEXT", help="Why, for the record.")] = "",
    crl_only: Annotated[
        bool, typer.Option("--crl-only", metavar="", help="Only in the CA's CRL, which a Core does not read.")
    ] = False,
    pki: FolderOption = None,
) -> None:
    """Refuse a certificate for good: in the vault, and in the CRL of the development CA."""
    if [name, certificate, fingerprint].count(None) != 2:
        raise InvalidInput("name one certificate: a NAME, --certificate FILE or --fingerprint HEX")
    if name is not None:
        _revoke_own(_open(pki), name, reason, vault=not crl_only)
        return
    if crl_only:
        raise InvalidInput("--crl-only goes with a NAME; other CAs have their own lists")
    from .output import answer
    from .session import open_administration

    named = _read_certificate(certificate) if certificate is not None else _parse_fingerprint(fingerprint)
    with open_administration() as core:
        found = core.revoke_certificate(named, reason)
    answer(
        {"revoked": [{"fingerprint": found.hex()}]}, f"the vault refuses [bold]{found.hex()}[/] from now on"
    )


def _revoke_own(ca: DevelopmentCA, name: str, reason: str, *, vault: bool) -> None:
    from ..errors import KeyNotFound
    from ..identity import fingerprints_of
    from .output import answer, note, plain
    from .session import open_administration

    found = ca.unexpired(name)
    if not found:
        raise KeyNotFound(
            f"there is no valid certificate {name} here; 'openkcm pki list' shows those that are"
        )
    ders = [each.der for each in found]
    if vault:
        with open_administration() as core:
            for der in ders:
                core.revoke_certificate(der, reason)
    revoked = ca.revoke(name)
    identity = found[0].identity
    documents = [
        {**_document(each), "fingerprint": fingerprints_of(each.der)[0].hex(), "vault": vault}
        for each in revoked
    ]
    where = "the vault and the CRL" if vault else "the CRL alone"
    answer(
        {"revoked": documents, "crl": str(ca.crl_path)},
        f"revoked [bold]{plain(name)}[/] in {where}: {len(revoked)} certificate{'s' * (len(revoked) != 1)}",
    )
    note(f"[dim]{plain(identity)} keeps its grants for a new certificate; 'openkcm grant list' shows them[/]")


def list_certificates(pki: FolderOption = None) -> None:
    """List the certificates of the development CA, when they end and what they are worth."""
    from rich.table import Table

    from .output import answer, plain

    ca = _open(pki)
    found = ca.issued()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("name", "role", "identity", "names", "until", "state"):
        table.add_column(column)
    for each in found:
        state = f"[{STATE_STYLES[each.state]}]{each.state}[/]"
        names, until = plain(", ".join(each.sans)), f"{each.not_after:%Y-%m-%d %H:%M}"
        table.add_row(plain(each.name), each.role, plain(each.identity), names, until, state)
    answer(
        {"pki": str(ca.folder), "certificates": [_document(each) for each in found]},
        table if found else "[dim]no certificates yet: openkcm pki issue server NAME --dns HOST[/]",
    )


def list_revoked() -> None:
    """List the certificates that the vault refuses, of whatever CA."""
    from rich.table import Table

    from .output import answer, plain
    from .session import open_administration

    with open_administration() as core:
        found = core.revoked()
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("revoked", "identity", "SHA-256", "reason"):
        table.add_column(column)
    for each in found:
        identity = plain(each.identity) or "[dim]unknown[/]"
        table.add_row(each.revoked_at, identity, each.fingerprint.hex(), plain(each.reason))
    documents = [
        {
            "fingerprint": each.fingerprint.hex(),
            "identity": each.identity,
            "serial": each.serial,
            "reason": each.reason,
            "revoked_at": each.revoked_at,
        }
        for each in found
    ]
    answer({"revoked": documents}, table if found else "[dim]the vault refuses no certificate[/]")


# ---- inside ----------------------------------------------------------------------------------------------------


def _folder(option: str | None) -> str:
    return os.path.expanduser(option or os.environ.get("OPENKCM_PKI") or DEFAULT_FOLDER)


def _open(option: str | None) -> DevelopmentCA:
    from ..pki import DevelopmentCA

    return DevelopmentCA.open(_folder(option))


def _read_certificate(path: str) -> bytes:
    """A certificate's DER, from a file in PEM or DER."""
    from cryptography import x509
    from cryptography.hazmat.primitives.serialization import Encoding

    with open(path, "rb") as source:
        data = source.read()
    try:
        load = x509.load_pem_x509_certificate if b"-----BEGIN" in data else x509.load_der_x509_certificate
        return load(data).public_bytes(Encoding.DER)
    except (ValueError, x509.InvalidVersion):
        raise FormatError(f"{path} holds no certificate in PEM or DER") from None


def _parse_fingerprint(text: str | None) -> bytes:
    """32 bytes, from hexadecimal digits with or without colons, as OpenSSL prints them."""
    try:
        parsed = bytes.fromhex((text or "").replace(":", ""))
    except ValueError:
        parsed = b""
    if len(parsed) != 32:
        raise InvalidInput("a fingerprint is the 64 hexadecimal digits of a certificate's SHA-256")
    return parsed


def _answer_issued(issued: Issued) -> None:
    from .output import answer, plain

    answer(
        _document(issued),
        f"issued [bold]{plain(issued.name)}[/] ({issued.role}), valid to {issued.not_after:%Y-%m-%d}",
        f"identity     {plain(issued.identity)}",
        f"names        {plain(', '.join(issued.sans))}",
        f"certificate  {plain(str(issued.certificate))}",
        f"key          {plain(str(issued.key))}",
    )


def _document(issued: Issued) -> dict[str, Any]:
    return {
        "name": issued.name,
        "role": issued.role.value,
        "identity": issued.identity,
        "sans": list(issued.sans),
        "serial": f"{issued.serial:x}",
        "not_before": _time(issued.not_before),
        "not_after": _time(issued.not_after),
        "state": issued.state.value,
        "certificate": str(issued.certificate),
        "key": str(issued.key) if issued.key.exists() else None,
    }


def _time(moment: datetime) -> str:
    return moment.isoformat(timespec="seconds").replace("+00:00", "Z")
