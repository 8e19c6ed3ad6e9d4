# SPDX-License-Identifier: Apache-2.0
"""The pytest plugin as somebody else's tests use it."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

from support import environment

THEIRS = """
import time
import openkcm
import pytest


@pytest.mark.parametrize("name", ["aws_kms", "azure_key_vault", "gcp_kms", "openbao", "softhsm"])
def test_we_survive_a_customer_who_unplugs(name, request, tmp_path):
    key = request.getfixturevalue(name).make_key("acme")
    with openkcm.Core.open(f"sqlite:///{tmp_path / 'vault.db'}", probe_interval=0.2) as core:
        core.link_tenant("acme", root=key.uri)
        core.create_service("acme", "records")
        records = openkcm.Gateway(core).service("acme", "records")
        blob = records.encrypt(b"x")
        key.disable()
        end = time.monotonic() + 30
        with pytest.raises(openkcm.TenantDark):
            while time.monotonic() < end:
                records.decrypt(blob)
                time.sleep(0.01)
        key.enable()
        while time.monotonic() < end:
            try:
                assert records.decrypt(blob) == b"x"
                break
            except openkcm.TenantDark:
                time.sleep(0.01)
        else:
            pytest.fail("it did not come back")


def test_nothing_of_a_provider_stays(aws_kms, monkeypatch):
    import os
    assert os.environ["AWS_ENDPOINT_URL_KMS"].startswith("https://127.0.0.1:")


def test_nor_after_it():
    import os
    assert "AWS_ENDPOINT_URL_KMS" not in os.environ
"""


def test_somebody_elses_tests(tmp_path: Path) -> None:
    (tmp_path / "test_theirs.py").write_text(THEIRS)
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path)],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        timeout=180,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "7 passed" in done.stdout


def test_the_plugin_costs_nothing_until_it_is_used() -> None:
    heavy = "{'boto3', 'botocore', 'cryptography', 'pkcs11', 'hvac', 'azure'}"
    code = f"import sys, openkcm.testing.plugin; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert done.stdout == "[]\n"
