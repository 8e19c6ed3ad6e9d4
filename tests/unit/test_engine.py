# SPDX-License-Identifier: Apache-2.0
"""What computes AES-256-GCM: chosen once, obeyed or refused, and byte for byte the same whichever it is."""

from __future__ import annotations

import ctypes.util
import json
import platform
import shutil
import subprocess
from pathlib import Path

import pytest

from openkcm import crypto
from openkcm.errors import LimitExceeded
from support import ON_FAST, refused, run_python

pytestmark = pytest.mark.skipif(
    not ON_FAST, reason="the Python backend has one engine, that of `cryptography`"
)

INFO = """
import json, openkcm
print(json.dumps(openkcm.backend_info()))
"""

SEAL = """
import hashlib, random
from openkcm import crypto
dice, seen = random.Random(7), hashlib.sha256()
for size in (*range(0, 300), 511, 512, 513, 1000, 2015, 2016, 2017, 4096, 65535, 65536, 1 << 20):
    key, nonce = dice.randbytes(32), dice.randbytes(12)
    aad, record = dice.randbytes(dice.choice((0, 1, 16, 100, 512, 513, 70000))), dice.randbytes(size)
    sealed = crypto._gcm_seal(key, nonce, aad, record)
    assert crypto._gcm_open(key, nonce, aad, sealed) == record
    seen.update(sealed)
    bad = bytearray(sealed)
    bad[dice.randrange(len(bad))] ^= 1 << dice.randrange(8)
    assert crypto._gcm_open(key, nonce, aad, bytes(bad)) is None
print(crypto.backend_info()["engine"], seen.hexdigest())
"""

ROUND_TRIP = """
import sys
from openkcm import crypto
from pathlib import Path
keys = crypto.import_keys(bytes(range(96)))
cipher = crypto.RecordCipher(b"HEAD", 8, True, b"aad")
sizes = [0, 1, 31, 64, 480, 481, 2047, 2048, 2049, 70000]
records = [bytes([size % 251]) * size for size in sizes]
contexts = [b"c" * (size % 700) for size in sizes]
from array import array
index = array("I", [at % 3 for at in range(len(sizes))])
if sys.argv[1] == "seal":
    for name, chosen, n in (("index", index, 3), ("one", None, 1)):
        sealed = cipher.seal_many(keys if n == 3 else crypto.import_keys(bytes(32)), chosen, 5, b"m" * 8 * n,
                                  contexts, records)
        for at, blob in enumerate(sealed):
            Path(sys.argv[2], f"{name}-{at}").write_bytes(blob)
else:
    for name, chosen, n in (("index", index, 3), ("one", None, 1)):
        blobs = [Path(sys.argv[2], f"{name}-{at}").read_bytes() for at in range(len(sizes))]
        opener = keys if n == 3 else crypto.import_keys(bytes(32))
        assert cipher.open_many(opener, chosen, contexts, blobs, False) == (records, [])
        for at, blob in enumerate(blobs):
            position = index[at] if n == 3 else 0
            assert cipher.open_one(opener, position, contexts[at], blob) == records[at]
            assert cipher.open_one(opener, position, contexts[at] + b"x", blob) is None
print(crypto.backend_info()["engine"])
"""

PARTS = ("", "_update", "_finalize")
MODERN = platform.machine() == "x86_64" and "avx2" in Path("/proc/cpuinfo").read_text()


def info(**settings: str) -> dict[str, object]:
    """What a fresh process says is in use."""
    found: dict[str, object] = json.loads(run_python(INFO, **settings).stdout)
    return found


def needs_ipsec_mb() -> None:
    """The bootstrap installs it where the processor can run it: there it must be in use, not skipped."""
    if not MODERN:
        pytest.skip("this processor has no AVX2: intel-ipsec-mb is not for it")
    if ctypes.util.find_library("IPSec_MB") is None and not shutil.which("apt-get"):
        pytest.skip("this system's package manager does not bring libIPSec_MB.so.1")


def test_the_fastest_engine_is_the_default_and_says_so() -> None:
    needs_ipsec_mb()
    found = info()
    assert str(found["engine"]).startswith("intel-ipsec-mb 1.")
    assert "agrees with OpenSSL" in str(found["engine_reason"])


def test_evp_can_be_pinned() -> None:
    found = info(OPENKCM_AES="evp")
    assert (found["engine"], found["engine_reason"]) == ("EVP", "OPENKCM_AES asks for it")
    assert str(found["openssl"]).startswith("OpenSSL 3") or str(found["openssl"]).startswith("OpenSSL 4")


def test_both_engines_seal_the_same_bytes() -> None:
    needs_ipsec_mb()
    evp, wide = (run_python(SEAL, OPENKCM_AES=engine).stdout.split() for engine in ("evp", "ipsec-mb"))
    assert evp[0] == "EVP"
    assert wide[0] == "intel-ipsec-mb"
    assert evp[-1] == wide[-1]


@pytest.mark.parametrize(("sealing", "opening"), [("evp", "ipsec-mb"), ("ipsec-mb", "evp")])
def test_each_engine_opens_what_the_other_sealed(sealing: str, opening: str, tmp_path: Path) -> None:
    needs_ipsec_mb()
    run_python(ROUND_TRIP, "seal", str(tmp_path), OPENKCM_AES=sealing)
    run_python(ROUND_TRIP, "open", str(tmp_path), OPENKCM_AES=opening)


def test_another_libcrypto_can_be_pinned(tmp_path: Path) -> None:
    original = Path(str(info()["openssl_file"]))
    copy = tmp_path / "libcrypto-validated.so"
    shutil.copyfile(original, copy)
    found = info(OPENKCM_LIBCRYPTO=str(copy), OPENKCM_AES="evp")
    assert found["openssl_file"] == str(copy)
    digest = run_python(SEAL, OPENKCM_AES="evp").stdout
    assert run_python(SEAL, OPENKCM_AES="evp", OPENKCM_LIBCRYPTO=str(copy)).stdout == digest


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"OPENKCM_AES": "fastest"}, "'evp' or 'ipsec-mb'"),
        ({"OPENKCM_LIBCRYPTO": "/nowhere/libcrypto.so.3"}, "/nowhere/libcrypto.so.3"),
        ({"OPENKCM_LIBCRYPTO": "libz.so.1"}, "it has no OpenSSL_version"),
        ({"OPENKCM_AES": "ipsec-mb", "OPENKCM_BACKEND": "python"}, "native backend"),
        ({"OPENKCM_LIBCRYPTO": "libcrypto.so.3", "OPENKCM_BACKEND": "python"}, "native backend"),
    ],
)
def test_a_wish_that_cannot_be_met_stops_the_import(settings: dict[str, str], said: str) -> None:
    done = run_python("import openkcm.crypto", check=False, **settings)
    assert done.returncode != 0
    assert "BackendUnavailable" in done.stderr
    assert said in done.stderr


def test_sizes_that_do_not_fit_are_refused_before_they_wrap_round() -> None:
    """The engines count associated data in an int: 2 GiB and 5 bytes would look like less than none."""
    keys, parent = crypto.import_keys(bytes(32)), crypto.import_wrapping_key(bytes(32))
    cipher = crypto.RecordCipher(b"HEAD", 8, True, b"aad")
    blob, wrapped = cipher.seal_one(keys, 0, 1, bytes(8), b"", b"r"), crypto.wrap_many(parent, keys, b"")
    huge = bytes(2**31 + 5)  # never written to, so never in memory
    for call in (
        lambda: cipher.seal_one(keys, 0, 1, bytes(8), huge, b"r"),
        lambda: cipher.seal_many(keys, None, 1, bytes(8), huge, [b"r"]),
        lambda: cipher.seal_many(keys, None, 1, bytes(8), [huge], [b"r"]),
        lambda: cipher.open_one(keys, 0, huge, blob),
        lambda: cipher.open_many(keys, None, [huge], [blob], False),
        lambda: crypto.wrap_many(parent, keys, huge),
        lambda: crypto.unwrap_many(parent, wrapped, huge),
        lambda: crypto.wrap_key(parent, parent, huge),
        lambda: crypto.unwrap_key(parent, wrapped, huge),
        lambda: crypto.StreamCipher(keys, 0, huge),
        lambda: cipher.seal_one(keys, 0, 1, bytes(8), b"", huge),
    ):
        refused(call, LimitExceeded)


# ---- libraries that are not what they seem ---------------------------------------------------------------

NAMES = [
    f"aes_gcm_{name}_{suffix}"
    for suffix in ("avx_gen4", "vaes_avx512")
    for name in ("pre_256", "init_256", *(f"{way}_256{part}" for way in ("enc", "dec") for part in PARTS))
]
VERSION = 'const char *imb_get_version_str(void) { return "1.9.0"; }\n'
FEATURES = "unsigned long imb_get_feature_flags(void) { return %s; }\n"
FORWARD = """
#include <dlfcn.h>
#include <stdint.h>
#include <string.h>
typedef uintptr_t word;
typedef void (*function)(word, word, word, word, word, word, word, word, word, word);
static function found(const char *name)
{
    static void *library;
    if (library == NULL)
        library = dlopen("%s", RTLD_NOW | RTLD_LOCAL);
    return (function)dlsym(library, name);
}
"""
ONE = """
void %(name)s(word a, word b, word c, word d, word e, word f, word g, word h, word i, word j)
{
    static function real;
    if (real == NULL)
        real = found("%(name)s");
    real(a, b, c, d, e, f, g, h, i, j);
    %(more)s
}
"""


def false_library(folder: Path, source: str) -> str:
    """A folder with a libIPSec_MB.so.1 made of this C."""
    cc = shutil.which("cc")
    assert cc is not None
    (folder / "false.c").write_text(source)
    subprocess.run(
        [cc, "-shared", "-fPIC", "-o", str(folder / "libIPSec_MB.so.1"), str(folder / "false.c"), "-ldl"],
        check=True,
    )
    return str(folder)


def forwarding(key_bytes: int, features: str = "~0ul") -> str:
    """C that does what the real library does, and keeps as much of a key as another release would."""
    real = run_python(
        "import ctypes; ctypes.CDLL('libIPSec_MB.so.1')\n"
        "print({line.split()[-1] for line in open('/proc/self/maps') if 'libIPSec_MB' in line}.pop())"
    ).stdout.strip()
    more = f"memset((char *)b + 1008, 0xc3, {key_bytes - 1008});"
    return (
        FORWARD % real
        + "".join(ONE % {"name": name, "more": more if "_pre_" in name else ""} for name in NAMES)
        + VERSION
        + FEATURES % features
    )


def test_a_library_that_computes_something_else_is_not_used(tmp_path: Path) -> None:
    """A libIPSec_MB whose functions do nothing: the comparison with EVP finds it, and EVP is used."""
    needs_ipsec_mb()
    source = "".join(f"void {name}(void) {{}}\n" for name in NAMES) + VERSION + FEATURES % "~0ul"
    folder = false_library(tmp_path, source)
    found = info(LD_LIBRARY_PATH=folder)
    assert (found["engine"], found["engine_reason"]) == ("EVP", "this libIPSec_MB disagrees with OpenSSL")
    done = run_python("import openkcm.crypto", check=False, LD_LIBRARY_PATH=folder, OPENKCM_AES="ipsec-mb")
    assert "disagrees with OpenSSL" in done.stderr


@pytest.mark.parametrize("key_bytes", [1008, 1264, 2288, 2304])
def test_releases_that_keep_more_of_a_key_have_room_for_it(key_bytes: int, tmp_path: Path) -> None:
    """1.4 writes 1,264 bytes where 1.3 writes 1,008, under the same library name."""
    needs_ipsec_mb()
    folder = false_library(tmp_path, forwarding(key_bytes))
    done = run_python(SEAL, LD_LIBRARY_PATH=folder, OPENKCM_AES="ipsec-mb").stdout.split()
    assert done[:2] == ["intel-ipsec-mb", "1.9.0"]
    assert done[-1] == run_python(SEAL, OPENKCM_AES="evp").stdout.split()[-1]


@pytest.mark.parametrize("key_bytes", [2305, 8000])
def test_a_release_that_needs_more_room_still_is_not_used(key_bytes: int, tmp_path: Path) -> None:
    needs_ipsec_mb()
    found = info(LD_LIBRARY_PATH=false_library(tmp_path, forwarding(key_bytes)))
    assert found["engine"] == "EVP"
    assert "more room" in str(found["engine_reason"])


def test_a_library_built_to_leave_keys_behind_is_not_used(tmp_path: Path) -> None:
    needs_ipsec_mb()
    found = info(LD_LIBRARY_PATH=false_library(tmp_path, forwarding(1008, features="~0ul & ~(1ul << 14)")))
    assert found["engine"] == "EVP"
    assert "SAFE_DATA" in str(found["engine_reason"])


# ---- a validated OpenSSL ---------------------------------------------------------------------------------


def test_who_names_a_libcrypto_gets_aes_from_it(tmp_path: Path) -> None:
    """A validated copy that draws the keys while another library does the cipher would be of little use."""
    copy = tmp_path / "libcrypto-validated.so"
    shutil.copyfile(str(info()["openssl_file"]), copy)
    found = info(OPENKCM_LIBCRYPTO=str(copy))
    assert (found["engine"], found["engine_reason"]) == ("EVP", "OPENKCM_LIBCRYPTO names it")
    assert found["openssl_file"] == str(copy)
    if MODERN:
        found = info(OPENKCM_LIBCRYPTO=str(copy), OPENKCM_AES="ipsec-mb")
        assert str(found["engine"]).startswith("intel-ipsec-mb")
        assert found["openssl_file"] == str(copy)


def test_an_openssl_that_must_not_do_it_is_not_gone_around(tmp_path: Path) -> None:
    """Configured for FIPS 140 without a provider for it: neither another engine nor another backend steps in."""
    settings = tmp_path / "openssl.cnf"
    settings.write_text(
        "openssl_conf = init\n[init]\nalg_section = fips\n[fips]\ndefault_properties = fips=yes\n"
    )
    for backend in ("", "fast"):
        done = run_python(
            "import openkcm.crypto", check=False, OPENSSL_CONF=str(settings), OPENKCM_BACKEND=backend
        )
        assert done.returncode != 0
        assert "BackendUnavailable" in done.stderr
        assert "as it is configured here" in done.stderr
