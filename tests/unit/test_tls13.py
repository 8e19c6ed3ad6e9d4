# SPDX-License-Identifier: Apache-2.0
"""gRPC speaks TLS 1.3 or is not used, whoever has loaded it first: each time in a fresh interpreter."""

from __future__ import annotations

from pathlib import Path

import pytest

from openkcm.rpc.tls13 import SUITES, VARIABLE
from rpc_support import Site
from support import run_python

GRPC_FIRST = f"import os; os.environ.pop({VARIABLE!r}, None); import grpc\n"
OPENKCM_FIRST = f"import os; os.environ.pop({VARIABLE!r}, None); import openkcm.rpc.tls13, grpc\n"
SET_BEFORE = f"import os; assert os.environ[{VARIABLE!r}] == {SUITES!r}; import grpc\n"

REFUSED = """
import os, sys
import openkcm
from openkcm.rpc.server import grpc_server
folder = sys.argv[1]
tls = openkcm.TLS(*(f"{folder}/{each}" for each in ("certificate", "key", "roots")))
core = openkcm.connect("grpc://127.0.0.1:1", tls=tls)
for call in (
    lambda: core.find_service("acme", "records"),
    lambda: openkcm.connect_admin("127.0.0.1:1", tls=tls),
    lambda: grpc_server.server_credentials(tls.pem),
):
    try:
        call()
    except openkcm.ConfigurationError as error:
        assert "import openkcm.rpc.tls13" in str(error) and "GRPC_SSL_CIPHER_SUITES=" in str(error)
    else:
        raise AssertionError("TLS 1.2 could be agreed on")
assert "GRPC_SSL_CIPHER_SUITES" not in os.environ, "another's gRPC is left as it is"
"""

SPOKEN = """
import socket, ssl, sys, threading
import openkcm
folder, highest = sys.argv[1], ssl.TLSVersion[sys.argv[2]]
context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
context.maximum_version = highest
context.load_cert_chain(f"{folder}/server", f"{folder}/server-key")
context.set_alpn_protocols(["h2"])
listener = socket.create_server(("127.0.0.1", 0))
seen = []

def serve():
    try:
        with context.wrap_socket(listener.accept()[0], server_side=True) as sock:
            seen.append(sock.version())
    except ssl.SSLError as error:
        seen.append(error.reason)

server = threading.Thread(target=serve, daemon=True)
server.start()
tls = openkcm.TLS(*(f"{folder}/{each}" for each in ("certificate", "key", "roots")))
from openkcm.rpc.client.grpc_client import GrpcTransport
transport = GrpcTransport(f"127.0.0.1:{listener.getsockname()[1]}", tls.pem)
try:
    transport.call("FindService", b"", 20.0)
except openkcm.CoreUnavailable:
    pass
server.join(20)
transport.close()
print(seen[0])
"""


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tls")
    site = Site(folder)
    tls = site.tls()
    for name, path in (
        ("certificate", tls.certificate),
        ("key", tls.key),
        ("roots", tls.roots),
        ("server", site.server.certificate),
        ("server-key", site.server.key),
    ):
        (folder / name).touch(0o600)
        (folder / name).write_bytes(Path(path).read_bytes())
    return folder


def test_grpc_that_was_loaded_before_is_not_used(files: Path) -> None:
    run_python(GRPC_FIRST + REFUSED, str(files))


@pytest.mark.parametrize("before", [OPENKCM_FIRST, SET_BEFORE], ids=["openkcm-first", "set-before"])
def test_tls_1_3_and_nothing_else_is_agreed_on(files: Path, before: str) -> None:
    more = {VARIABLE: SUITES} if before is SET_BEFORE else {}
    assert run_python(before + SPOKEN, str(files), "TLSv1_3", **more).stdout.strip() == "TLSv1.3"
    said = run_python(before + SPOKEN, str(files), "TLSv1_2", **more).stdout.strip()
    assert said == "NO_SHARED_CIPHER"
