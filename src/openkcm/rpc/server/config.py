# SPDX-License-Identifier: Apache-2.0
"""The configuration of a Core that serves: one TOML file.

Invariant: it is checked whole before anything is opened, and every mistake is told at once; a setting that is not known
is a mistake, so that a mistyped limit cannot quietly be none. Nothing that is said of it holds a secret.

::

    store = "postgresql://core@db.example/openkcm"
    store_password_file = "credential:store-password"   # or OPENKCM_STORE_PASSWORD in the environment
    seal = "credential:seal"         # or a file
    region = "eu-central"
    roots = ["aws-kms://arn:aws:kms:eu-central-1:"]     # what may be linked over the network

    [tls]
    certificate = "core.pem"         # the chain, its own first
    key = "core.key"
    clients = "clients.pem"          # authorities that Gateways' certificates must come from

    [listen]
    data = "0.0.0.0:7443"
    admin = "127.0.0.1:7445"
"""

from __future__ import annotations

import os
import stat
import tomllib
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError

from ...core.core import MAX_PROBE, MIN_PROBE, POLL_SECONDS
from ...core.liveness import MAX_GRACE
from ...core.vault import GRACE_SECONDS, PROBE_SECONDS
from ...errors import ConfigurationError, OpenKCMError
from ...keys import check_name
from ...systemd import is_credential
from ..client.endpoint import host_of
from ..session import Credentials
from .admin_handlers import CLOUD_ROOTS


@dataclass(frozen=True, slots=True)
class ServerTLS:
    """Where the server's certificate, its key and its clients' authorities lie."""

    certificate: Path
    key: Path
    clients: Path

    def load(self) -> Credentials:
        """Read and check the files; ConfigurationError if they are not what they should be."""
        return Credentials.load(self.certificate, self.key, self.clients)

    def pem(self) -> tuple[bytes, bytes, bytes]:
        """Key, chain and authorities as they stand in the files."""
        return self.key.read_bytes(), self.certificate.read_bytes(), self.clients.read_bytes()


@dataclass(frozen=True, slots=True)
class Listen:
    """Addresses, ``HOST:PORT``: of the data interface, the same over gRPC, and the administrative interface."""

    data: str = ""
    grpc: str = ""
    admin: str = ""


@dataclass(frozen=True, slots=True)
class Limits:
    """Bounds: connections, watch streams, calls under way and waiting, threads that carry them out.

    ``peer_connections`` and ``peer_streams`` are those of one certificate.
    """

    connections: int = 5000
    streams: int = 1000
    peer_connections: int = 1000
    peer_streams: int = 200
    calls: int = 256
    threads: int = 16


@dataclass(frozen=True, slots=True)
class ServeConfig:
    """All of it; seconds where a time is meant. ``store`` holds the password, and is therefore never shown."""

    store: str = field(repr=False)
    region: str
    tls: ServerTLS
    seal: Path | None = None
    listen: Listen = field(default_factory=Listen)
    limits: Limits = field(default_factory=Limits)
    probe_interval: float = PROBE_SECONDS
    grace: float = GRACE_SECONDS
    store_grace: float = GRACE_SECONDS
    poll_interval: float = POLL_SECONDS
    drain: float = 10.0
    roots: tuple[str, ...] = CLOUD_ROOTS
    log: str = "json"
    level: str = "info"


class _Reader:
    """Takes settings out of a table, and notes what is wrong with them."""

    def __init__(self, config: Path) -> None:
        self._folder = config.absolute().parent
        self._private = not config.stat().st_mode & 0o077
        self.mistakes: list[str] = []
        self.credentials = os.environ.get("CREDENTIALS_DIRECTORY", "")

    def take(self, table: dict[str, Any], name: str, check: Callable[[Any], Any], default: Any = None) -> Any:
        """A setting by its name, checked; ``default`` where it is missing or wrong."""
        key = name.rsplit(".", 1)[-1]
        if key not in table:
            if default is None:
                self.mistakes.append(f"{name} is missing")
            return default
        try:
            return check(table.pop(key))
        except (OpenKCMError, ValueError, TypeError) as error:
            self.mistakes.append(f"{name}: {error}")
            return default

    def table(self, table: dict[str, Any], name: str) -> dict[str, Any]:
        """A table of settings; an empty one where there is none."""
        found = table.pop(name, {})
        if isinstance(found, dict):
            return found
        self.mistakes.append(f"{name} is a table: [{name}]")
        return {}

    def rest(self, table: dict[str, Any], prefix: str = "") -> None:
        """Note what nobody took."""
        self.mistakes += [f"{prefix}{key} is not a setting" for key in table]

    def path(self, value: Any) -> Path:
        """A file, relative to the configuration's folder; or ``credential:NAME``, which systemd gave this service.

        Source: systemd.exec(5), "LoadCredential".
        """
        scheme, colon, name = text(value).partition(":")
        if colon and scheme == "credential":
            if not self.credentials:
                raise ValueError(
                    f"{value} is a systemd credential, and $CREDENTIALS_DIRECTORY is not set here"
                )
            if not name or "/" in name or name in (".", ".."):
                raise ValueError("a systemd credential is credential:NAME")
            path = Path(self.credentials, name)
        else:
            path = self._folder / text(value)
        if not path.is_file():
            raise ValueError(f"there is no file {path}")
        return path

    def secret(self, value: Any) -> str:
        """The one line of a file that others cannot read."""
        path = self.path(value)
        status = path.stat()
        if status.st_mode & (0o007 if is_credential(path) else 0o077):
            raise ValueError(f"{path} can be read by others; change the password, then: chmod 600 {path}")
        if not stat.S_ISREG(status.st_mode) or status.st_size > _MAX_SECRET:
            raise ValueError(f"{path} is not a file with one password")
        try:
            lines = path.read_text().splitlines()
        except (OSError, UnicodeDecodeError):
            raise ValueError(f"{path} cannot be read as text by this user") from None
        if len(lines) != 1 or not lines[0]:
            raise ValueError(f"{path} is not a file with one password on one line")
        return lines[0]

    def store(self, value: Any, password: str) -> str:
        """A store's URL, with its password put in."""
        given = text(value)
        try:
            url = make_url(given)
        except (
            ArgumentError,
            ValueError,
        ):  # whose text may hold part of a password, as of "user:p@ss:word@host"
            raise ValueError(
                "is a URL such as postgresql://USER@HOST/DATABASE or sqlite:////PATH, with what is special in it "
                "percent-encoded"
            ) from None
        if url.drivername.partition("+")[0] == "sqlite":
            path = self._folder / (url.database or "")
            if not url.database or not path.is_file():
                raise ValueError(f"there is no vault at {path}; `openkcm init` makes one")
            return f"sqlite:///{path}"
        if url.password is not None and not self._private:
            raise ValueError(
                "holds a password in a file that others can read: change it, and name a file with the new one in "
                "store_password_file"
            )
        return url.set(password=password).render_as_string(hide_password=False) if password else given


def root_starts(value: Any) -> tuple[str, ...]:
    """What roots begin with."""
    if not isinstance(value, list) or not all(isinstance(each, str) and ":" in each for each in value):
        raise ValueError('is a list of what URIs of roots begin with, such as ["aws-kms://", "local:"]')
    return tuple(value)


def text(value: Any) -> str:
    """Text that is not empty."""
    if not isinstance(value, str) or not value:
        raise ValueError("is text, in quotes")
    return value


def address(value: Any) -> str:
    """HOST:PORT."""
    host_of(text(value))
    return text(value)


def number(low: float, high: float, kind: type[int] | type[float] = float) -> Callable[[Any], Any]:
    """A check for a number within bounds."""

    def check(value: Any) -> Any:
        if isinstance(value, bool) or not isinstance(value, (int, kind)) or not low <= value <= high:
            what = "a whole number" if kind is int else "a number"
            raise ValueError(f"is {what} from {low:g} to {high:g}")
        return kind(value)

    return check


def one_of(*choices: str) -> Callable[[Any], str]:
    """A check for one of these words."""

    def check(value: Any) -> str:
        if value not in choices:
            raise ValueError(f"is one of {', '.join(choices)}")
        return str(value)

    return check


_TIMES: Final = {
    "probe_interval": (MIN_PROBE, MAX_PROBE, PROBE_SECONDS),
    "grace": (0.0, MAX_GRACE, GRACE_SECONDS),
    "store_grace": (0.0, MAX_GRACE, GRACE_SECONDS),
    "poll_interval": (0.01, 1.0, POLL_SECONDS),
    "drain": (0.0, 600.0, 10.0),
}
_BOUNDS: Final = {"connections": 100_000, "streams": 100_000, "calls": 65_536, "threads": 512}
_SHARES: Final = {"peer_connections": "connections", "peer_streams": "streams"}
"""Of one certificate: a fifth of all is its share where nothing else is said, and ``_LEAST_SHARE`` at the least."""
_LEAST_SHARE: Final = 32


_MAX_SECRET: Final = 4096


def read_config(path: Path) -> ServeConfig:
    """Read and check a configuration file.

    Raises:
        ConfigurationError: with every mistake that is in it.
    """
    try:
        document = tomllib.loads(path.read_text())
    except OSError as error:
        raise ConfigurationError(f"{path} cannot be read: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigurationError(f"{path} is not TOML: {error}") from None
    reader = _Reader(path)
    config = _read(reader, document)
    if reader.mistakes:
        raise ConfigurationError(f"{path}: " + "; ".join(reader.mistakes))
    return config


def _read(reader: _Reader, document: dict[str, Any]) -> ServeConfig:
    take = reader.take
    tls, listen, limits = (reader.table(document, name) for name in ("tls", "listen", "limits"))
    files = [take(tls, f"tls.{name}", reader.path) for name in ("certificate", "key", "clients")]
    addresses = {name: take(listen, f"listen.{name}", address, "") for name in ("data", "grpc", "admin")}
    _check_addresses(reader, list(filter(None, addresses.values())))
    bounds = {
        name: take(limits, f"limits.{name}", number(1, most, int), getattr(Limits(), name))
        for name, most in _BOUNDS.items()
    }
    for name, whole in _SHARES.items():
        share = max(bounds[whole] // 5, _LEAST_SHARE)
        bounds[name] = take(limits, f"limits.{name}", number(1, _BOUNDS[whole], int), share)
    times = {
        name: take(document, name, number(low, high), default)
        for name, (low, high, default) in _TIMES.items()
    }
    password = take(document, "store_password_file", reader.secret, "")
    password = password or os.environ.get("OPENKCM_STORE_PASSWORD", "")
    config = ServeConfig(
        store=take(document, "store", lambda value: reader.store(value, password)),
        region=take(document, "region", lambda value: check_name(value, "region")),
        seal=take(document, "seal", reader.path, False) or None,
        tls=ServerTLS(*files),
        listen=Listen(**addresses),
        limits=Limits(**bounds),
        roots=take(document, "roots", root_starts, CLOUD_ROOTS),
        log=take(document, "log", one_of("json", "text"), "json"),
        level=take(document, "level", one_of("debug", "info", "warning", "error"), "info"),
        **times,
    )
    reader.rest(tls, "tls.")
    reader.rest(listen, "listen.")
    reader.rest(limits, "limits.")
    reader.rest(document)
    if all(files):
        _check_tls(reader, config.tls)
    return config


def _check_addresses(reader: _Reader, addresses: list[str]) -> None:
    if not addresses:
        reader.mistakes.append("listen.data is missing")
    fixed = [each for each in addresses if not each.endswith(":0")]
    if len(set(fixed)) != len(fixed):
        reader.mistakes.append("listen: two interfaces have one address; each has a port of its own")


def _check_tls(reader: _Reader, tls: ServerTLS) -> None:
    try:
        tls.load()
    except ConfigurationError as error:
        reader.mistakes.append(f"tls: {error}")
