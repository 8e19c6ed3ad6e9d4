# SPDX-License-Identifier: Apache-2.0
"""The native layer: secret memory, key wrapping and record encryption on OpenSSL.

Invariant: nothing here imports the rest of the package or knows its formats; bytes, positions and lengths
come in checked, and only what memory safety needs is checked again.
"""
