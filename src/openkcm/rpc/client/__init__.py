# SPDX-License-Identifier: Apache-2.0
"""What a Gateway, or an operator, reaches a Core with: addresses, sessions, failover, the watch stream.

Invariant: that of ``openkcm.rpc``; every call has one deadline, and only what may be made twice is made again.
"""
