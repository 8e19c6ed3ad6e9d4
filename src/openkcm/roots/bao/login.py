# SPDX-License-Identifier: Apache-2.0
"""Logging in to OpenBao and Vault: by token, AppRole or Kubernetes service account.

Invariant: what proves who we are comes from files and variables, is read when it is needed, and is sent to the URI's
host and nowhere else. A token is renewed or replaced before it ends, by one thread while the others go on with the old
one. A secret id that the server refused is not tried again for ``REFUSED_SECONDS``, so that no probing locks the role;
a new one is tried at once.
"""

from __future__ import annotations

import contextlib
import hashlib
import math
import os
import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ...errors import OpenKCMError, RootMisconfigured, RootUnavailable
from .answers import Answer, known, malformed, refusal
from .uri import BaoURI

if TYPE_CHECKING:
    from .http import BoundedAdapter

PREFIX: Final = "OPENKCM_BAO_"
SERVICE_ACCOUNT_TOKEN: Final = "/var/run/secrets/kubernetes.io/serviceaccount/token"
MAX_SECRET_BYTES: Final = 16 * 1024
REFUSED_SECONDS: Final = 300.0
"""OpenBao and Vault lock a role after 5 wrong secret ids within 15 minutes."""

REFUSED_KEPT: Final = 1000
RELOGIN_SECONDS: Final = 60.0
"""A token has the policies that its role had when it was made: one that is refused is exchanged, this often at most."""

POSTPONE_SECONDS: Final = 15.0
MAX_LEASE_SECONDS: Final = 10 * 366 * 86400

_SECRET: Final = re.compile(r"[\x21-\x7e]{1,16384}", re.ASCII)
_refused: dict[bytes, float] = {}


@dataclass(frozen=True, slots=True)
class Token:
    """A token, and when to do something about it; times are seconds of ``time.monotonic``.

    ``renewable`` is None until the server was asked. ``lease`` is how long it was first given for, ``born`` when.
    """

    value: str = field(repr=False)
    renewable: bool | None
    lease: float
    due: float
    expires: float
    born: float

    @classmethod
    def found(cls, value: str) -> Token:
        """A token from our own settings, of which nothing is known yet."""
        return cls(value, None, math.inf, 0.0, math.inf, time.monotonic())

    @classmethod
    def given(cls, value: str, lease: float, renewable: bool) -> Token:
        """A token that the server gives for ``lease`` seconds from now."""
        now = time.monotonic()
        return cls(value, renewable, lease, now + lease / 2, now + lease, now)

    def postponed(self) -> Token:
        """The same token, to be looked at a little later."""
        return replace(self, due=time.monotonic() + POSTPONE_SECONDS)


class Login:
    """Who we are to one server, in one process."""

    def __init__(self, parsed: BaoURI, reach: Callable[[str | None, float], BoundedAdapter]) -> None:
        self._parsed = parsed
        self._reach = reach
        self._credentials = Credentials(parsed)
        self._lock = threading.Lock()
        self._token: Token | None = None

    @property
    def _is_static(self) -> bool:
        return self._parsed.login == "token"

    def current(self, deadline: float) -> Token:
        """Return a token to use now.

        Raises:
            RootMisconfigured, RootDenied, RootUnavailable: we could not log in.
        """
        token = self._held()
        now = time.monotonic()
        if token is not None and now < token.due:
            return token
        # A token of our settings may be renewed by others: whether it is over, the server knows.
        good = token if token is not None and (self._is_static or now < token.expires) else None
        if not self._lock.acquire(timeout=0 if good is not None else max(0.0, deadline - now)):
            if good is not None:
                return good  # another thread sees to it
            raise _took_too_long()
        try:
            token = self._held()
            if token is None or time.monotonic() >= token.due:
                self._token = (
                    self._log_in(deadline) if good is None else self._refreshed(token or good, deadline)
                )
                return self._token
            return token
        finally:
            self._lock.release()

    def replaced(self, token: Token, deadline: float) -> Token | None:
        """Return another token in the place of one that the server no longer knows; None if there is no other."""
        if not self._lock.acquire(timeout=max(0.0, deadline - time.monotonic())):
            raise _took_too_long()
        try:
            if self._token is not None and self._token.value != token.value:
                return self._token
            if self._is_static:
                held = self._held()
                return held if held is not None and held.value != token.value else None
            self._token = self._log_in(deadline)
            return self._token
        finally:
            self._lock.release()

    def exchanged(self, token: Token, deadline: float) -> Token | None:
        """Return a token with the policies of today in the place of an older one; None if it is as young as can be."""
        if self._is_static or time.monotonic() - token.born < RELOGIN_SECONDS:
            return None
        fresh = self.replaced(token, deadline)
        if fresh is not None:
            with contextlib.suppress(OpenKCMError):  # it would end by itself, some day
                self._method(token, deadline).revoke_self()
        return fresh

    def look_up(self, token: Token, deadline: float) -> Answer:
        """Ask the server what it knows about a token."""
        answer: Answer = self._method(token, deadline).lookup_self()
        return answer

    def _method(self, token: Token, deadline: float) -> Any:
        reach = self._reach(token.value, deadline)  # first, since it says what to install
        from hvac.api.auth_methods import Token as TokenMethod  # type: ignore[import-untyped]

        return TokenMethod(reach)

    def _held(self) -> Token | None:
        """The token that is held; for ``login=token`` it is what its source holds now."""
        token = self._token
        if self._is_static:
            value = self._credentials.token()
            if token is None or token.value != value:
                return Token.found(value)
        return token

    # ---- inside, under the lock ------------------------------------------------------------------------

    def _refreshed(self, token: Token, deadline: float) -> Token:
        """What follows a token that is half over and still good; it is kept if nothing better comes of it."""
        if token.renewable is None:
            return self._looked_up(token, deadline)
        if token.renewable:
            fresh = self._renewed(token, deadline)
            # A lease that shrinks nears the end of all renewing (max_ttl): time to log in anew.
            if fresh is not None and (self._is_static or fresh.lease * 2 >= token.lease):
                return replace(fresh, lease=max(fresh.lease, token.lease), born=token.born)
        if self._is_static:
            return token.postponed()
        try:
            return self._log_in(deadline)
        except OpenKCMError:
            return token.postponed()

    def _looked_up(self, token: Token, deadline: float) -> Token:
        answer = self.look_up(token, deadline)
        if answer.status != 200:
            # Without the policy "default" a token may not look at itself, nor renew itself.
            return (
                token.postponed() if answer.status >= 429 else replace(token, renewable=False, due=math.inf)
            )
        data = answer.part("data")
        lease = _seconds(data.get("ttl"))
        return Token.given(token.value, lease, data.get("renewable") is True)

    def _renewed(self, token: Token, deadline: float) -> Token | None:
        answer: Answer = self._method(token, deadline).renew_self()
        if answer.status != 200:
            return None
        lease = _seconds(answer.part("auth").get("lease_duration"))
        return Token.given(token.value, lease, answer.part("auth").get("renewable") is True)

    def _log_in(self, deadline: float) -> Token:
        answer = self._kubernetes(deadline) if self._parsed.login == "kubernetes" else self._approle(deadline)
        if answer.status != 200:
            raise refusal(answer)
        return _granted(answer.part("auth"))

    def _approle(self, deadline: float) -> Answer:
        reach = self._reach(None, deadline)
        from hvac.api.auth_methods import AppRole

        role_id, secret_id = self._credentials.role_id(), self._credentials.secret_id()
        mount, address = self._parsed.login_mount, self._parsed.address
        shape = "\0".join((address, self._parsed.namespace or "", mount, role_id, secret_id))
        mark = hashlib.sha256(shape.encode()).digest()
        if time.monotonic() < _refused.get(mark, 0.0):
            raise known("invalid role or secret ID")
        answer: Answer = AppRole(reach).login(role_id, secret_id, use_token=False, mount_point=mount)
        if any("invalid role or secret ID" in text for text in answer.texts()):
            if len(_refused) >= REFUSED_KEPT:
                _refused.clear()
            _refused[mark] = time.monotonic() + REFUSED_SECONDS
        return answer

    def _kubernetes(self, deadline: float) -> Answer:
        reach = self._reach(None, deadline)
        from hvac.api.auth_methods import Kubernetes

        answer: Answer = Kubernetes(reach).login(
            self._parsed.role, self._credentials.jwt(), use_token=False, mount_point=self._parsed.login_mount
        )
        return answer


class Credentials:
    """Where this process keeps what proves who it is; read anew at every use.

    With ``credentials=NAME`` in the URI only variables that begin with ``OPENKCM_BAO_NAME_`` count; without, those that
    begin with ``OPENKCM_BAO_``, and for a token what OpenBao's and Vault's own clients use.
    """

    def __init__(self, parsed: BaoURI) -> None:
        name = parsed.credentials
        self._place = f"{parsed.host}:{parsed.port}"
        self._own = name is not None
        self._prefix = PREFIX + (f"{name.upper().replace('-', '_')}_" if name is not None else "")

    def token(self) -> str:
        """The token of ``login=token``."""
        token = self._find("TOKEN")
        if token is None and not self._own:
            token = _variable("BAO_TOKEN") or _variable("VAULT_TOKEN") or _token_file()
        if token is None:
            others = "" if self._own else ", or BAO_TOKEN or VAULT_TOKEN"
            raise RootMisconfigured(f"where is the token? name its file in {self._prefix}TOKEN_FILE{others}")
        return token

    def role_id(self) -> str:
        """The role id of ``login=approle``."""
        return self._need("ROLE_ID", "role id")

    def secret_id(self) -> str:
        """The secret id of ``login=approle``."""
        return self._need("SECRET_ID", "secret id")

    def jwt(self) -> str:
        """The service account's token of ``login=kubernetes``."""
        self._check_host()
        path = os.environ.get(self._prefix + "JWT_FILE") or SERVICE_ACCOUNT_TOKEN
        return _read(Path(path), private=False)  # mounted by Kubernetes, which makes it readable by all

    def _need(self, name: str, words: str) -> str:
        found = self._find(name)
        if found is None:
            raise RootMisconfigured(f"where is the {words}? name its file in {self._prefix}{name}_FILE")
        return found

    def _find(self, name: str) -> str | None:
        self._check_host()
        path = os.environ.get(f"{self._prefix}{name}_FILE")
        return _read(Path(path), private=True) if path else _variable(self._prefix + name)

    def _check_host(self) -> None:
        """Who may name a root's URI must not have our credentials sent to a host of their own."""
        hosts = os.environ.get(self._prefix + "HOSTS")
        if hosts and self._place not in hosts.replace(",", " ").split():
            raise RootMisconfigured(
                f"our credentials are not for {self._place}: it is not among the hosts in {self._prefix}HOSTS"
            )


def _took_too_long() -> RootUnavailable:
    return RootUnavailable("the customer's server took too long to log us in")


def _token_file() -> str | None:
    """The file in which the command lines of OpenBao and Vault keep their token."""
    named = os.environ.get("BAO_TOKEN_PATH") or os.environ.get("VAULT_TOKEN_PATH")
    path = Path(named) if named else Path(os.path.expanduser("~/.vault-token"))
    return _read(path, private=True) if named or path.exists() else None


def _variable(name: str) -> str | None:
    value = os.environ.get(name)
    return _checked(value, f"the variable {name}") if value else None


def _read(path: Path, *, private: bool) -> str:
    try:
        with path.open("rb") as file:
            if private and os.fstat(file.fileno()).st_mode & 0o007:
                raise RootMisconfigured(f"the file {path} can be read by others; run: chmod o= {path}")
            content = file.read(MAX_SECRET_BYTES + 1)
    except OSError as error:
        raise RootMisconfigured(f"the file {path} cannot be read: {error.strerror}") from None
    return _checked(content.decode("ascii", errors="replace").strip(), f"the file {path}")


def _checked(text: str, where: str) -> str:
    if not _SECRET.fullmatch(text):
        raise RootMisconfigured(
            f"{where} holds no token or id: it is empty, too long, or not one word of ASCII"
        )
    return text


def _granted(auth: Mapping[str, Any]) -> Token:
    value = auth.get("client_token")
    if not isinstance(value, str) or not _SECRET.fullmatch(value):
        raise malformed("a login without a token")
    return Token.given(value, _seconds(auth.get("lease_duration")), auth.get("renewable") is True)


def _seconds(value: object) -> float:
    """A lease as it may be believed; 0 is a token that does not end."""
    whole = value if isinstance(value, int) and not isinstance(value, bool) else 0
    return float(whole) if 0 < whole <= MAX_LEASE_SECONDS else math.inf
