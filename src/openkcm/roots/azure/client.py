# SPDX-License-Identifier: Apache-2.0
"""Requests to one vault, through the SDK's own pipeline.

Invariant: one attempt a call, in ``CALL_SECONDS`` whatever logging in takes; nothing but our own errors comes out; and
what a vault answers is returned as it is, to be distrusted by whoever reads it.

``CryptographyClient`` is not used: where it may read the key it wraps with the public half in this process, so that
neither the permission nor the key's state would be asked about. ``KeyClient.send_request`` is public, goes through the
same challenge, login and verification, and leaves wrapping to the vault.

The SDK's client keeps the state of its login in itself and is not safe for threads at once, so each call borrows one.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final, cast

from azure.core.rest import HttpRequest
from azure.keyvault.keys import KeyClient

from ...errors import OpenKCMError, RootMisconfigured
from .login import Login, Timer, make_session, make_transport, network_error
from .uri import Service

if TYPE_CHECKING:
    from azure.core.credentials import TokenCredential

MAX_IDLE_CLIENTS: Final = 32


class Client:
    """One process's connections to a vault and to Entra ID; safe for threads."""

    def __init__(self, host: str, service: Service, tenant: str | None) -> None:
        self._host = host
        self._service = service
        self._timer = Timer()
        self._session = make_session(self._timer)
        self.login = Login(service.audience, tenant, self._session)
        self._refused = False
        self._idle: list[KeyClient] = []

    @property
    def usable(self) -> bool:
        """Whether this client's login is good; after a refusal a new one reads the environment anew."""
        return not (self._refused or self.login.failed)

    def ask(self, method: str, path: str, body: dict[str, str] | None = None) -> tuple[int, Any]:
        """Send a request and return the answer's status and document, None if that is not JSON.

        Raises:
            RootUnavailable (RootThrottled), RootDenied, RootMisconfigured: the vault or Entra ID did not answer, or
                gave us no token.
        """
        status: list[int] = []
        request = HttpRequest(method, path, headers={"Accept": "application/json"}, json=body)
        client = self._borrow()
        self._timer.start()
        try:
            response = client.send_request(
                request, raw_response_hook=lambda answer: status.append(answer.http_response.status_code)
            )
            status.append(response.status_code)
            answer = response.json()
        except OpenKCMError:
            raise  # from our login, through the SDK's pipeline
        except Exception as error:
            trouble = self._trouble(error, status)
            if trouble is not None:
                raise trouble from None
            answer = None
        finally:
            self._give_back(client)
        self._refused = self._refused or status[-1] == 401
        return status[-1], answer

    def close(self) -> None:
        """Close the connections that are idle, and each other one when its request is done."""
        self._idle.clear()
        self._session.close()

    def _borrow(self) -> KeyClient:
        try:
            return self._idle.pop()
        except IndexError:
            return KeyClient(
                f"https://{self._host}",
                cast("TokenCredential", self.login),  # it gives token infos, which the SDK prefers
                transport=make_transport(self._session),
                retry_total=0,
                permit_redirects=False,
                verify_challenge_resource=self._service.verifiable,
            )

    def _give_back(self, client: KeyClient) -> None:
        if len(self._idle) < MAX_IDLE_CLIENTS:
            self._idle.append(client)

    def _trouble(self, error: Exception, status: list[int]) -> OpenKCMError | None:
        """Say what went wrong below the vault's answer; None if there is one, though it cannot be read."""
        trouble = network_error(error, "the vault")
        if trouble is not None:
            return trouble
        if status and status[-1] != 401:
            return None
        # A challenge that names another resource than the vault's own domain, or that makes no sense.
        return RootMisconfigured(
            "the vault's challenge is not Azure Key Vault's, so it gets no token; check the root's host, and what lies"
            " in between"
        )
