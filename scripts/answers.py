#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Print docs/answers.md, the table of every answer of every provider, out of the providers' own tables.

Run ``python scripts/answers.py > docs/answers.md`` after a change of one; a test holds that both agree.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from importlib import import_module

from openkcm import errors

PROVIDERS = {
    "aws-kms: AWS KMS": "aws.answers",
    "azure-kms: Azure Key Vault and Managed HSM": "azure.answers",
    "gcp-kms: Google Cloud KMS": "gcp.answers",
    "pkcs11: PKCS#11": "pkcs11.answers",
    "bao-transit: OpenBao and Vault": "bao.answers",
}

# What an answer means, the error it becomes, and whether it gets grace.
MEANINGS = {
    errors.RootDisabled: ("disabled", "no"),
    errors.RootDenied: ("denied", "no"),
    errors.RootDestroyed: ("deleted, or pending deletion", "no"),
    errors.DecryptError: ("not this key's ciphertext", "no"),
    errors.RootMisconfigured: ("misconfigured here", "no"),
    errors.RootThrottled: ("throttled", "yes"),
    errors.RootUnavailable: ("unreachable", "yes"),
}

HEAD = """\
# Every answer of every provider

Made by `scripts/answers.py` from the tables that the code uses; [roots.md](roots.md) says what lies behind them. Names
are the provider's, or its SDK's, as an operator would look them up, and stand in parentheses in our messages; what is
added in parentheses here is told apart by the answer's text or details. What is not in a table is *misconfigured
here*: unknown answers never get grace.

Each row is tested: over the wire, by the provider's own SDK or module, where `tests/roots` does not say otherwise.
"""


def rows(answers: Mapping[str, type[errors.OpenKCMError]]) -> Iterator[str]:
    """One row a meaning."""
    assert set(answers.values()) <= set(MEANINGS)
    for kind, (meaning, grace) in MEANINGS.items():
        names = ", ".join(f"`{name}`" for name, found in answers.items() if found is kind)
        yield f"| {meaning} | `{kind.__name__}` | {grace} | {names or 'none'} |"


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    for title, module in PROVIDERS.items():
        scheme, _, name = title.partition(" ")
        parts.append(f"\n## `{scheme}` {name}\n\n| meaning | here | grace | answers |\n|---|---|---|---|\n")
        parts += [f"{row}\n" for row in rows(import_module(f"openkcm.roots.{module}").ANSWERS)]
    return "".join(parts)


if __name__ == "__main__":
    print(page(), end="")
