# SPDX-License-Identifier: Apache-2.0
"""A column that one backend sealed the other opens, row for row and reason for reason."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest

from support import run_python

COMMON = """
import sys
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq
import openkcm
folder = Path(sys.argv[1])
rows = pa.array([None if n % 6 == 5 else bytes([n % 256]) * (n * 37 % 3000) for n in range(1200)], pa.binary())
contexts = pa.array([None if n % 4 == 0 else f"row {n}" * (n % 90) for n in range(1200)])
subjects = pa.array([f"user-{n * 7 % 50}" for n in range(1200)])
core = openkcm.Core.open(f"sqlite:///{folder / 'vault.db'}")
"""

SEAL = (
    COMMON
    + """
core.link_tenant("acme", root=f"local:{folder / 'acme.root'}")
core.create_service("acme", "records")
service = openkcm.Gateway(core).service("acme", "records")
pq.write_table(pa.table({
    "each": service.encrypt_column(rows, contexts=contexts, threads=2),
    "named": service.encrypt_column(rows, contexts=contexts, subjects=subjects),
}), folder / "sealed.parquet")
print(openkcm.backend_info()["backend"])
"""
)

OPEN = (
    COMMON
    + """
service = openkcm.Gateway(core).service("acme", "records")
sealed = pq.read_table(folder / "sealed.parquet")
for name in ("each", "named"):
    assert service.decrypt_column(sealed[name], contexts=contexts, threads=2).combine_chunks().equals(rows), name
    for cell, row, context in list(zip(sealed[name], rows, contexts))[::40]:
        if row.is_valid:
            context = None if context.as_py() is None else context.as_py().encode()
            assert service.decrypt(cell.as_py(), context=context) == row.as_py()
print(openkcm.backend_info()["backend"])
"""
)


@pytest.mark.parametrize("first", ["fast", "python"])
def test_each_opens_the_columns_that_the_other_sealed(tmp_path: Path, first: str) -> None:
    if find_spec("openkcm._fast.arena") is None:
        pytest.skip("the native layer is not built, so there is no second backend to compare with")
    second = {"fast": "python", "python": "fast"}[first]
    assert run_python(SEAL, str(tmp_path), OPENKCM_BACKEND=first).stdout.strip() == first
    assert run_python(OPEN, str(tmp_path), OPENKCM_BACKEND=second).stdout.strip() == second
    assert run_python(OPEN, str(tmp_path), OPENKCM_BACKEND=first).stdout.strip() == first
