# SPDX-License-Identifier: Apache-2.0
"""What a Core that serves is made of: configuration, handlers for both interfaces, streams, and what ends in order.

Invariant: that of ``openkcm.rpc``; a transport turns bytes into calls of the handlers here, and knows nothing of keys.
"""
