# SPDX-License-Identifier: Apache-2.0
"""The frame transport (docs/formats.md): the messages of ``keys.proto`` over TLS 1.3, both ends.

Invariant: that of ``openkcm.rpc``; a header is checked before its payload is read, and no peer keeps another waiting.
"""
