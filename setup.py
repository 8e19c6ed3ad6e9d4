# SPDX-License-Identifier: Apache-2.0
"""Build the native layer where that is possible, and say so loudly where it is not.

Invariant: all native modules are installed or none. What a build could not do never fails an installation
unless ``OPENKCM_BUILD=require`` asks for it, and never passes unsaid.

Environment:
    OPENKCM_BUILD     unset: native if it can be built; ``require``: fail without; ``pure``: do not try
    OPENKCM_DEBUG     1: no optimisation, Cython's bounds and None checks, C assertions
    OPENKCM_SANITIZE  1: address and undefined-behaviour sanitizers
"""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext
from setuptools.errors import CompileError, LinkError

NATIVE = Path("src/openkcm/_fast")
MODE = os.environ.get("OPENKCM_BUILD", "")
DEBUG = os.environ.get("OPENKCM_DEBUG") == "1"
SANITIZE = os.environ.get("OPENKCM_SANITIZE") == "1"

if MODE not in ("", "require", "pure"):
    sys.exit(f"OPENKCM_BUILD is 'require', 'pure' or not set, not {MODE!r}")

# With gcc 12 and Cython 3.3 the generated code needs none of them silenced.
WARNINGS = ["-Wall", "-Wextra", "-Wconversion"]

NOTICE = """
==================================================================================================
  OpenKCM is being installed WITHOUT its native backend.

  Why: {reason}

  It works, and reads and writes the same bytes, but it is slower, and tenant and service keys are
  NOT kept out of the Python heap (docs/security.md). `openkcm doctor` repeats this.

  For the native backend install a C compiler, Python's headers and OpenSSL 3's headers
  (Debian/Ubuntu: apt-get install gcc python3-dev libssl-dev), then install OpenKCM again with
  pip's --force-reinstall --no-cache-dir, so that pip does not take the wheel it made just now.
  OPENKCM_BUILD=require turns this notice into an error; OPENKCM_BUILD=pure leaves it out.
==================================================================================================
"""


def shout(text: str) -> None:
    """Print on standard error, and on the terminal too: pip hides what a build prints when it succeeds."""
    print(text, file=sys.stderr, flush=True)
    if not sys.stderr.isatty():
        try:
            with open("/dev/tty", "w") as terminal:
                terminal.write(text)
        except OSError:
            pass  # nobody is watching; `openkcm doctor` says it again


def explain(error: Exception) -> str:
    """Put what stopped a native build into one line."""
    if isinstance(error, CompileError):
        if "No such file" in str(error) or shutil.which("cc") is None:
            return "there is no C compiler"
        return "a native module does not compile; mostly a header is missing (pip install -v shows which)"
    if isinstance(error, LinkError):
        return "a native module does not link with libcrypto (pip install -v shows why)"
    return f"{type(error).__name__}: {error}".splitlines()[0][:90]


def libcrypto() -> tuple[list[str], list[str]]:
    """Return the compiler's and the linker's arguments for OpenSSL's libcrypto."""
    tool = shutil.which(os.environ.get("PKG_CONFIG", "pkg-config"))
    if tool:
        found = [
            subprocess.run([tool, option, "libcrypto"], capture_output=True, text=True, check=False)
            for option in ("--cflags", "--libs")
        ]
        if all(answer.returncode == 0 for answer in found):
            return shlex.split(found[0].stdout), shlex.split(found[1].stdout)
    return [], ["-lcrypto"]


def extensions() -> list[Extension]:
    """Describe the native modules: each .pyx is one."""
    if MODE == "pure":
        return []
    compile_args, link_args = libcrypto()
    # pthread for the fork and signal handling of native.h on C libraries that keep it apart.
    # Python's headers as a system's, which silences their warnings and none of ours.
    headers = [f"-isystem{sysconfig.get_path(name)}" for name in ("include", "platinclude")]
    compile_args = ["-std=gnu11", "-pthread", *headers, *WARNINGS, *compile_args]
    link_args = ["-pthread", *link_args, "-ldl"]
    if SANITIZE:
        flags = ["-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer"]
        compile_args += ["-O1", "-g", *flags]
        link_args += flags
    elif DEBUG:
        compile_args += ["-O0", "-g3", "-UNDEBUG"]
    else:
        compile_args += ["-O3"]
    return [
        Extension(
            f"openkcm._fast.{source.stem}",
            [str(source)],
            include_dirs=[str(NATIVE)],
            depends=[*sorted(str(path) for path in NATIVE.glob("*.h")), "setup.py"],
            extra_compile_args=compile_args,
            extra_link_args=link_args,
        )
        for source in sorted(NATIVE.glob("*.pyx"))
    ]


class BuildNative(build_ext):
    """Translate and compile the native modules: all of them, or none and a notice."""

    def build_extensions(self) -> None:
        asked_for = MODE == "require" or "build_ext" in self.distribution.commands
        try:
            self.translate()
            self.parallel = os.cpu_count()
            super().build_extensions()
        except Exception as error:  # whatever a missing tool raises: the installation goes on without
            if asked_for:
                raise
            self.give_up(explain(error))

    def translate(self) -> None:
        """Turn each .pyx into C below the build directory, so that no stale C lies in the tree."""
        from Cython.Build import cythonize

        # Cython's own defaults (bounds are checked) stay on in every build: the hot loops are on raw
        # pointers, and whatever indexes a Python object is not where the time goes. Not overflowcheck:
        # Cython 3.3 crashes on enums with it, and the sanitizer build looks for overflows.
        checks = {"boundscheck": True, "nonecheck": True, "initializedcheck": True} if DEBUG else {}
        translated = cythonize(
            self.extensions,
            build_dir=self.build_temp,
            include_path=["src"],
            compiler_directives={"language_level": 3, **checks},
            quiet=not self.verbose,
        )
        for extension, result in zip(self.extensions, translated, strict=True):
            extension.sources = result.sources

    def give_up(self, reason: str) -> None:
        """Leave no module behind, so that half a backend is never imported."""
        for extension in self.extensions:
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        self.extensions = []
        self.distribution.ext_modules = []
        shout(NOTICE.format(reason=reason))


class BuildWheel(bdist_wheel):
    """Name a wheel for what is in it: without native modules it runs on every machine."""

    def run(self) -> None:
        self.run_command("build")
        self.root_is_pure = not self.distribution.has_ext_modules()
        super().run()


setup(ext_modules=extensions(), cmdclass={"build_ext": BuildNative, "bdist_wheel": BuildWheel})
