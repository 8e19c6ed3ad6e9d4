# SPDX-License-Identifier: Apache-2.0
"""How the Cloud KMS root logs in: files, federation, a metadata server, and what can be wrong with each."""

from __future__ import annotations

import contextlib
import datetime
import json
import socket
import time
from pathlib import Path
from typing import Any

import pytest

from gcp_support import CONTEXT, SEALED
from gcp_support import cloud as cloud
from gcp_support import key as key
from gcp_support import root as root
from openkcm.errors import RootMisconfigured, RootThrottled, RootUnavailable
from openkcm.roots.gcp import ANSWERS, GCPRoot
from openkcm.roots.gcp import answers as gcp_answers
from openkcm.roots.gcp import session as gcp_session
from openkcm.testing.gcp import GCPKMS, GCPKey
from openkcm.testing.gcp.login import FEDERATED
from openkcm.testing.https import Request, Response, Server
from support import refused, run_python

ENDPOINT = gcp_session.ENDPOINT_VARIABLE
CREDENTIALS = "GOOGLE_APPLICATION_CREDENTIALS"


def use(root: GCPRoot) -> None:
    assert root.unwrap(root.wrap(SEALED, CONTEXT), CONTEXT) == SEALED


# ---- service accounts ----------------------------------------------------------------------------------------


def test_a_service_account_signs_for_itself(cloud: GCPKMS, root: GCPRoot) -> None:
    before = cloud.login.requests
    use(root)
    assert cloud.login.requests == before, "no login service is asked, so none can fail"


def test_a_disabled_account(cloud: GCPKMS, key: GCPKey, root: GCPRoot) -> None:
    use(root)
    cloud.core.enabled = False
    error = refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured)
    assert "ACCOUNT_STATE_INVALID" in str(error)
    cloud.core.enabled = True
    use(root)


@pytest.mark.parametrize("change", ["another key", "another account"])
def test_a_file_that_google_does_not_know(
    cloud: GCPKMS, root: GCPRoot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, change: str
) -> None:
    info = json.loads(Path(cloud.settings()[CREDENTIALS]).read_text())
    if change == "another key":
        info["private_key"] = json.loads(cloud.customer_file.read_text())["private_key"]
    else:
        info["client_email"] = "somebody@openkcm.iam.gserviceaccount.com"
    path = tmp_path / "key.json"
    path.write_text(json.dumps(info))
    monkeypatch.setenv(CREDENTIALS, str(path))
    refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[]",
        "5",
        "{}",
        '{"type": "service_account"}',
        '{"type": "service_account", "private_key": "x"}',
        "\0",
    ],
)
def test_a_file_that_is_none(
    root: GCPRoot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, content: str
) -> None:
    path = tmp_path / "key.json"
    path.write_text(content)
    monkeypatch.setenv(CREDENTIALS, str(path))
    error = refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured)
    assert str(path) not in str(error)


def test_a_file_that_is_put_right_needs_no_restart(
    cloud: GCPKMS, root: GCPRoot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "key.json"
    monkeypatch.setenv(CREDENTIALS, str(path))
    refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured)
    path.write_text(Path(cloud.settings()[CREDENTIALS]).read_text())
    use(root)


def test_a_person_is_warned_of(
    cloud: GCPKMS, key: GCPKey, root: GCPRoot, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    path = tmp_path / "person.json"
    info = {"type": "authorized_user", "client_id": "i", "client_secret": "s", "refresh_token": "t"}
    path.write_text(json.dumps(info))
    monkeypatch.setenv(CREDENTIALS, str(path))
    assert ["as a person" in warning for warning in root.warnings()] == [True]
    assert "name the identity" in str(refused(root.grant, RootMisconfigured))
    assert root.grant("ann@example.com").identity == "user:ann@example.com"


def test_warnings_swallow_a_missing_login(root: GCPRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(CREDENTIALS, "/nonexistent.json")
    assert root.warnings() == []
    refused(root.grant, RootMisconfigured)


# ---- the clock -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("seconds", "way"), [(7200, "ahead of"), (-7200, "behind")])
def test_a_clock_that_is_off(root: GCPRoot, monkeypatch: pytest.MonkeyPatch, seconds: int, way: str) -> None:
    from google.auth import _helpers

    right = _helpers.utcnow
    monkeypatch.setattr(_helpers, "utcnow", lambda: right() + datetime.timedelta(seconds=seconds))
    monkeypatch.setattr(gcp_answers, "_now", lambda: time.time() + seconds)
    error = refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured)
    assert f"clock is off, {abs(seconds)} seconds {way}" in str(error).replace("7199", "7200").replace(
        "7201", "7200"
    )


@pytest.mark.parametrize("date", [None, "", "yesterday", "Mon, 32 Foo 2026 25:61:61 GMT", "x" * 5000, "5"])
def test_no_clock_is_told_from_such_a_date(date: str | None) -> None:
    assert gcp_answers.clock_off(date) is None


def test_a_clock_within_what_google_puts_up_with(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gcp_answers, "_now", lambda: 1_000_000_100.0)
    assert gcp_answers.clock_off("Sun, 09 Sep 2001 01:46:40 GMT") is None
    monkeypatch.setattr(gcp_answers, "_now", lambda: 1_000_000_121.0)
    assert "121 seconds ahead" in str(gcp_answers.clock_off("Sun, 09 Sep 2001 01:46:40 GMT"))


# ---- federation and the login service --------------------------------------------------------------------------


@pytest.fixture(params=["itself", "impersonating"])
def federated(
    cloud: GCPKMS, root: GCPRoot, monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest
) -> GCPRoot:
    path = cloud.login.federate(cloud.core if request.param == "impersonating" else None)
    monkeypatch.setenv(CREDENTIALS, str(path))
    return root


def test_a_federated_identity(cloud: GCPKMS, federated: GCPRoot) -> None:
    before = cloud.login.requests
    use(federated)
    use(federated)
    account = federated._client.email()  # type: ignore[union-attr]
    assert account in (None, cloud.core.email)
    assert cloud.login.requests - before == (1 if account is None else 2), (
        "one login, and no name of a project"
    )
    if account is None:
        refused(federated.grant, RootMisconfigured)
        assert federated.grant(FEDERATED).identity == FEDERATED
    else:
        assert federated.grant().identity == f"serviceAccount:{account}"
    assert federated.warnings() == []


def test_a_token_that_was_taken_back_is_renewed_once(cloud: GCPKMS, key: GCPKey, federated: GCPRoot) -> None:
    use(federated)
    account = federated._client.email()  # type: ignore[union-attr]
    cloud.login.revoke(account or FEDERATED)
    before = key.requests
    use(federated)
    assert key.requests - before == 3


def test_a_login_that_was_taken_back_is_made_anew(cloud: GCPKMS, federated: GCPRoot) -> None:
    use(federated)
    cloud.login.revoke()
    with contextlib.suppress(RootMisconfigured):  # the SDK keeps the token by which it impersonates
        use(federated)
    use(federated)


LOGIN_ERRORS = sorted(name for name in ANSWERS if name.islower())


@pytest.mark.parametrize("name", LOGIN_ERRORS)
def test_each_answer_of_the_login_service(
    cloud: GCPKMS, key: GCPKey, root: GCPRoot, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setenv(CREDENTIALS, str(cloud.login.federate()))
    cloud.login.error = (name, "SECRET-TEXT")
    before, start = cloud.login.requests, time.monotonic()
    error = refused(lambda: root.wrap(SEALED, CONTEXT), ANSWERS[name])
    assert f"({name})" in str(error)
    assert "SECRET-TEXT" not in str(error)
    assert cloud.login.requests - before == 1
    assert time.monotonic() - start < 5
    assert key.requests == 0


@pytest.mark.parametrize(
    ("status", "kind"),
    [(500, RootUnavailable), (503, RootUnavailable), (408, RootUnavailable), (429, RootThrottled)],
)
def test_a_login_service_that_fails_is_asked_once(
    cloud: GCPKMS, federated: GCPRoot, status: int, kind: type[Exception]
) -> None:
    cloud.login.faults.status = status
    before, start = cloud.login.requests, time.monotonic()
    refused(lambda: federated.wrap(SEALED, CONTEXT), kind)
    assert cloud.login.requests - before == 1
    assert time.monotonic() - start < 5


def test_login_and_request_share_one_deadline(cloud: GCPKMS, key: GCPKey, federated: GCPRoot) -> None:
    cloud.login.faults.latency = 2.5
    key.slow(60)
    start = time.monotonic()
    refused(lambda: federated.wrap(SEALED, CONTEXT), RootUnavailable)
    assert time.monotonic() - start < 8


def test_a_subject_token_that_was_not_renewed(
    cloud: GCPKMS, root: GCPRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = cloud.login.federate()
    monkeypatch.setenv(CREDENTIALS, str(path))
    token = Path(json.loads(path.read_text())["credential_source"]["file"])
    right = token.read_text()
    token.write_text("old")
    assert "invalid_grant" in str(refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured))
    token.unlink()
    refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured)
    token.write_text(right)
    use(root)


def test_the_token_endpoint_verifies_an_assertion(cloud: GCPKMS, monkeypatch: pytest.MonkeyPatch) -> None:
    """By google-auth itself, as a library that signs no tokens of its own would do."""
    from google.auth import _helpers
    from google.auth.exceptions import RefreshError
    from google.auth.transport.requests import Request as Transport
    from google.oauth2 import service_account

    path = cloud.settings()[CREDENTIALS]
    scoped = service_account.Credentials.from_service_account_file(path, scopes=list(gcp_session.SCOPES))
    transport: Any = Transport()
    scoped.refresh(transport)
    assert scoped.token.startswith("ya29.")
    right = _helpers.utcnow
    monkeypatch.setattr(_helpers, "utcnow", lambda: right() - datetime.timedelta(hours=2))
    with pytest.raises(RefreshError, match="short-lived token"):
        scoped.refresh(transport)
    monkeypatch.setattr(_helpers, "utcnow", right)
    cloud.core.enabled = False
    with pytest.raises(RefreshError, match="account not found"):
        scoped.refresh(transport)
    cloud.core.enabled = True
    with pytest.raises(RefreshError, match="invalid_scope"):
        scoped.with_scopes(["https://www.googleapis.com/auth/drive"]).refresh(transport)
    info = json.loads(Path(path).read_text())
    info["private_key"] = json.loads(cloud.customer_file.read_text())["private_key"]
    forged = service_account.Credentials.from_service_account_info(info, scopes=list(gcp_session.SCOPES))
    with pytest.raises(RefreshError, match="Invalid JWT Signature"):
        forged.refresh(transport)
    transport.session.close()


# ---- metadata servers --------------------------------------------------------------------------------------------

METADATA_CODE = """
import sys, time
from openkcm.errors import OpenKCMError
from openkcm.roots import open_root
root = open_root(sys.argv[1])
start = time.monotonic()
try:
    assert root.unwrap(root.wrap(b"x", {"a": "b"}), {"a": "b"}) == b"x"
    print(root.grant().identity)
except OpenKCMError as error:
    print(type(error).__name__, error)
print(time.monotonic() - start < 8)
root.close()
"""


def on_a_machine_with(port: int, uri: str, home: Path, **more: str) -> list[str]:
    """Run in a process that looks for a metadata server at a port (google-auth reads that when it is imported)."""
    place = f"127.0.0.1:{port}"
    settings = {CREDENTIALS: "", "NO_GCE_CHECK": "", "HOME": str(home), "CLOUDSDK_CONFIG": str(home)}
    settings |= {"GCE_METADATA_IP": place, "GCE_METADATA_HOST": place}
    return run_python(METADATA_CODE, uri, **settings | more).stdout.splitlines()


def test_a_metadata_server(cloud: GCPKMS, key: GCPKey, tmp_path: Path) -> None:
    asked: list[str] = []

    def serve(request: Request) -> Response:
        asked.append(request.path)
        flavor = (("Metadata-Flavor", "Google"),)
        if request.path == "/":
            return Response(200, b"computeMetadata/\n", flavor)
        if request.path.endswith("/token"):
            token = cloud.login._issue(cloud.core.email)
            return Response(200, {"access_token": token, "expires_in": 3599, "token_type": "Bearer"}, flavor)
        if request.path.endswith("/service-accounts/default/"):
            return Response(200, {"email": cloud.core.email, "scopes": []}, flavor)
        return Response(200, b"openkcm", (*flavor, ("Content-Type", "text/plain")))

    with contextlib.closing(Server(serve)) as server:
        assert on_a_machine_with(server.port, key.uri, tmp_path) == [
            f"serviceAccount:{cloud.core.email}",
            "True",
        ]
    assert sum(path.endswith("/token") for path in asked) == 1
    assert not any("universe" in path for path in asked)


@pytest.mark.parametrize("status", [404, 503])
def test_a_metadata_server_without_an_account(key: GCPKey, tmp_path: Path, status: int) -> None:
    def serve(request: Request) -> Response:
        given = 200 if request.path == "/" else status
        return Response(given, b"text", (("Metadata-Flavor", "Google"), ("Content-Type", "text/plain")))

    with contextlib.closing(Server(serve)) as server:
        said, in_time = on_a_machine_with(server.port, key.uri, tmp_path)
    assert said.startswith("RootMisconfigured " if status == 404 else "RootUnavailable ")
    assert in_time == "True"


@pytest.mark.parametrize("way", ["closed", "another cloud's", "black hole"])
def test_no_metadata_server(key: GCPKey, tmp_path: Path, way: str) -> None:
    with contextlib.ExitStack() as stack:
        if way == "another cloud's":
            server = stack.enter_context(contextlib.closing(Server(lambda request: Response(401, b"no"))))
            port = server.port
        else:
            listener = stack.enter_context(socket.socket())
            listener.bind(("127.0.0.1", 0))
            port = listener.getsockname()[1]
            if way == "black hole":
                listener.listen(8)
        said, in_time = on_a_machine_with(port, key.uri, tmp_path)
    assert said.startswith("RootMisconfigured no usable credentials")
    assert in_time == "True"


def test_a_machine_that_is_told_not_to_look(key: GCPKey, tmp_path: Path) -> None:
    said, _ = on_a_machine_with(1, key.uri, tmp_path, NO_GCE_CHECK="true")
    assert said.startswith("RootMisconfigured no usable credentials")


# ---- endpoints and universes ---------------------------------------------------------------------------------------


def test_which_endpoint(monkeypatch: pytest.MonkeyPatch) -> None:
    endpoint = gcp_session.endpoint_of
    monkeypatch.delenv(ENDPOINT)
    monkeypatch.delenv(gcp_session.UNIVERSE_VARIABLE, raising=False)
    assert endpoint(None) == "https://cloudkms.googleapis.com:443"
    assert (
        endpoint("europe-west3-cloudkms.googleapis.com") == "https://europe-west3-cloudkms.googleapis.com:443"
    )
    monkeypatch.setenv(gcp_session.UNIVERSE_VARIABLE, "s3nsapis.fr")
    assert endpoint(None) == "https://cloudkms.s3nsapis.fr:443"
    for named in ("kms.example", "https://kms.example", "https://kms.example/", "https://kms.example:443"):
        monkeypatch.setenv(ENDPOINT, named)
        assert endpoint("europe-west3-cloudkms.googleapis.com") == "https://kms.example:443"
    monkeypatch.setenv(ENDPOINT, "[::1]:8443")
    assert endpoint(None) == "https://[::1]:8443"


@pytest.mark.parametrize(
    "named",
    [
        "http://kms.example",
        "https://kms.example/v1",
        "https://user:secret@kms.example",
        "kms.example:0",
        "kms.example:65536",
        "kms.example:x",
        "https://",
        "-x",
        "a b",
        "https://kms.example\n",
    ],
)
def test_what_is_no_endpoint(root: GCPRoot, monkeypatch: pytest.MonkeyPatch, named: str) -> None:
    monkeypatch.setenv(ENDPOINT, named)
    error = refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured)
    assert ENDPOINT in str(error)
    assert "secret" not in str(error)


def test_credentials_of_another_universe_are_not_sent(
    cloud: GCPKMS, key: GCPKey, root: GCPRoot, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(gcp_session.UNIVERSE_VARIABLE, "s3nsapis.fr")
    assert "universe" in str(refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured))
    assert key.requests == 0


def test_an_sdk_with_other_insides_is_refused(root: GCPRoot, monkeypatch: pytest.MonkeyPatch) -> None:
    from google.cloud.kms_v1.services.key_management_service.transports.rest import (
        KeyManagementServiceRestTransport,
    )

    prepare = KeyManagementServiceRestTransport._prep_wrapped_messages

    def prepared(self: Any, client_info: Any) -> None:
        prepare(self, client_info)
        self._session.close()
        del self._session

    monkeypatch.setattr(KeyManagementServiceRestTransport, "_prep_wrapped_messages", prepared)
    assert "version" in str(refused(lambda: root.wrap(SEALED, CONTEXT), RootMisconfigured))
