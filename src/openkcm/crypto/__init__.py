# SPDX-License-Identifier: Apache-2.0
"""The one door to cryptography: picks a backend once, and gives both the same names.

Invariant: ``OPENKCM_BACKEND`` is obeyed or raises. Without it the native backend is used where it was built, and
``backend_info`` and ``openkcm doctor`` say when it was not. A processor without AES instructions is refused unless
``OPENKCM_ALLOW_SOFTWARE_AES=1`` says that its speed and its timing leaks are accepted.
"""

from __future__ import annotations

import os
import platform
import time
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from ..clock import awake_clock
from ..errors import (
    BackendUnavailable,
    ConfigurationError,
    DecryptError,
    InternalError,
    InvalidInput,
    LimitExceeded,
    SecretMemoryError,
)
from ..heap import keep_freed_memory
from .parts import CODES, FIXED, NOTHING, OFFSETS, VIEWS, Part

if TYPE_CHECKING:
    from .pure import (
        SecretKeys,
        WrappingKey,
        generate_keys,
        generate_wrapping_key,
        import_keys,
        import_wrapping_key,
        native_info,
        random_bytes,
        read_wrapping_key,
        rewrap_many,
        secret_memory_info,
        unwrap_key,
        unwrap_many,
        wrap_key,
        wrap_many,
        write_wrapping_key,
    )
    from .pure_arrow import export_array, export_schema, read_array, read_stream
    from .pure_cells import Cells, Memory, Places, Shared, Table
    from .pure_channel import Channel, ChannelOffer, offer_channel, open_keys, seal_keys
    from .pure_columns import (
        KeyRing,
        RowContexts,
        Turns,
        gather_rows,
        open_named,
        open_rows,
        seal_named,
        seal_rows,
    )
    from .pure_ids import IdSet
    from .pure_records import RecordCipher, StreamCipher
    from .pure_rows import FlatRows, split_rows

__all__ = [
    "CODES",
    "FIXED",
    "NOTHING",
    "OFFSETS",
    "VIEWS",
    "Cells",
    "Channel",
    "ChannelOffer",
    "FlatRows",
    "IdSet",
    "KeyRing",
    "Memory",
    "Part",
    "Places",
    "RecordCipher",
    "RowContexts",
    "SecretKeys",
    "Shared",
    "StreamCipher",
    "Table",
    "Turns",
    "WrappingKey",
    "backend_info",
    "export_array",
    "export_schema",
    "gather_rows",
    "generate_keys",
    "generate_wrapping_key",
    "import_keys",
    "import_wrapping_key",
    "offer_channel",
    "open_keys",
    "open_named",
    "open_rows",
    "random_bytes",
    "read_array",
    "read_stream",
    "read_wrapping_key",
    "rewrap_many",
    "seal_keys",
    "seal_named",
    "seal_rows",
    "secret_memory_info",
    "split_rows",
    "unwrap_key",
    "unwrap_many",
    "wrap_key",
    "wrap_many",
    "write_wrapping_key",
]

_COMMON: Final = ("CODES", "FIXED", "NOTHING", "OFFSETS", "VIEWS", "Part", "backend_info")
"""What does not come from a backend."""
_FAST_MODULES: Final = (
    *("secret", "wrapping", "aead", "rows", "stream", "channel"),
    *("cells", "places", "table", "ids", "ring", "run", "turns", "column", "named", "arrow"),
)
_PRIVATE: Final = (
    *("native_info", "_gcm_open", "_gcm_seal", "_xaes_open", "_xaes_seal"),
    *("_hkdf", "_offer_of", "_skip_to", "_x25519"),
)


def _load_fast() -> dict[str, Any]:
    gcm = import_module("openkcm._fast.gcm")
    try:
        # First: an OpenSSL that must not do AES here is a reason to stop, not to take the other backend.
        engine = gcm.choose(_aes_wanted(), os.environ.get("OPENKCM_LIBCRYPTO", ""))
    except ValueError as error:
        raise BackendUnavailable(str(error)) from None
    secret, wrapping, *others = (import_module(f"openkcm._fast.{name}") for name in _FAST_MODULES)
    secret.install_errors(
        invalid=InvalidInput,
        limit=LimitExceeded,
        decrypt=DecryptError,
        memory=SecretMemoryError,
        internal=InternalError,
        configuration=ConfigurationError,
    )
    if hasattr(time, "CLOCK_BOOTTIME"):
        import_module("openkcm._fast.aead").install_clock(awake_clock)
    names = {name: value for module in (secret, wrapping, *others) for name, value in vars(module).items()}
    return names | {"native_info": lambda: wrapping.native_info() | engine}


def _aes_wanted() -> str:
    wanted = os.environ.get("OPENKCM_AES", "")
    if wanted not in ("", "evp", "ipsec-mb"):
        raise BackendUnavailable("OPENKCM_AES is 'evp' or 'ipsec-mb', or not set")
    return wanted


def _load_python() -> dict[str, Any]:
    from . import pure, pure_arrow, pure_cells, pure_channel, pure_columns, pure_ids, pure_records, pure_rows

    if _aes_wanted() == "ipsec-mb" or os.environ.get("OPENKCM_LIBCRYPTO"):
        raise BackendUnavailable(
            "OPENKCM_AES=ipsec-mb and OPENKCM_LIBCRYPTO choose for the native backend; "
            "the Python backend always uses the OpenSSL inside `cryptography`"
        )
    modules = (pure, pure_records, pure_rows, pure_arrow, pure_cells, pure_columns, pure_channel, pure_ids)
    return {name: value for module in modules for name, value in vars(module).items()}


def _load() -> tuple[str, str, dict[str, Any]]:
    """Name of the backend, why it is not the native one (or nothing), and its names."""
    wanted = os.environ.get("OPENKCM_BACKEND", "")
    if wanted not in ("", "fast", "python"):
        raise BackendUnavailable("OPENKCM_BACKEND is 'fast' or 'python', or not set")
    if wanted == "python":
        return "python", "OPENKCM_BACKEND asks for it", _load_python()
    try:
        return "fast", "", _load_fast()
    except ImportError as error:
        if wanted == "fast":
            raise BackendUnavailable(
                f"OPENKCM_BACKEND asks for the native backend, which this installation does not have ({error}); "
                "reinstall with a C compiler and OpenSSL's headers (libssl-dev)"
            ) from None
        return "python", f"the native backend was not built ({error})", _load_python()


def _software_aes() -> bool:
    """Whether the processor has no AES instructions, as far as Linux tells on the common platforms."""
    if platform.machine() not in ("x86_64", "AMD64", "aarch64"):
        return False
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    lines = [line for line in text.splitlines() if line.startswith(("flags", "Features"))]
    return bool(lines) and not any("aes" in line.split() for line in lines)


if _software_aes() and os.environ.get("OPENKCM_ALLOW_SOFTWARE_AES") != "1":
    raise BackendUnavailable(
        "this processor has no AES instructions; OPENKCM_ALLOW_SOFTWARE_AES=1 accepts AES in software"
    )

keep_freed_memory()
_backend, _reason, _names = _load()
globals().update((name, _names[name]) for name in (*__all__, *_PRIVATE) if name not in _COMMON)


def backend_info() -> dict[str, Any]:
    """Tell what is in use and why, and a note on each weakness.

    Returns:
        A dict of ``backend`` ("fast" or "python") and ``reason`` (why it is not the native one, or nothing);
        ``engine`` (what computes AES-256-GCM) and ``engine_reason``; ``openssl`` (the version of the libcrypto in
        use) and ``openssl_file``; ``aes`` (how the raw blocks of the key derivation are made); ``secret_memory``;
        ``notes``.
    """
    native = native_info()
    memory = secret_memory_info()
    notes = list(native["notes"])
    if _backend == "python":
        notes.insert(0, f"the Python backend is in use: {_reason}")
    if native["modern"] and native["engine"] == "EVP" and native["openssl"].startswith("OpenSSL 3.0."):
        notes.append(
            "this processor has VAES, which OpenSSL 3.0 does not use: libipsec-mb1 (or OPENKCM_LIBCRYPTO with a "
            "newer libcrypto) makes AES-256-GCM about twice as fast"
        )
    if memory["kind"] != "memfd_secret":
        notes.append("this kernel has no memfd_secret: keys rest in locked memory that root can read")
    if _software_aes():
        notes.append("AES runs in software, as OPENKCM_ALLOW_SOFTWARE_AES allows")
    return {
        "backend": _backend,
        "reason": _reason,
        "engine": native["engine"],
        "engine_reason": native["why"],
        "openssl": native["openssl"],
        "openssl_file": native["file"],
        "aes": native["aes"],
        "secret_memory": memory,
        "notes": notes,
    }
