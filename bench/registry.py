# SPDX-License-Identifier: Apache-2.0
"""All contenders by name, and which environment each runs in. Modules are loaded only where their packages are."""

from __future__ import annotations

import importlib

from contender import Contender

OURS = {
    "lists-each": "ours.lists:KeyEach",
    "lists-one": "ours.lists:OneKey",
    "lists-each-evp": "ours.lists:KeyEachEvp",
    "lists-one-evp": "ours.lists:OneKeyEvp",
    "lists-subjects": "ours.lists:Subjects",
    "columns-each": "ours.columns:KeyEach",
    "columns-one": "ours.columns:OneKey",
    "columns-long": "ours.columns:LongKeyEach",
    "columns-reused": "ours.columns:Reused",
    "columns-each-evp": "ours.columns:KeyEachEvp",
    "columns-one-evp": "ours.columns:OneKeyEvp",
    "single": "ours.single:Strict",
    "single-lease": "ours.single:Leased",
    "single-into": "ours.single:Into",
    "fallback-each": "ours.fallback:KeyEach",
    "fallback-one": "ours.fallback:OneKey",
    "loop-each": "ours.fallback:LoopKeyEach",
    "loop-one": "ours.fallback:LoopOneKey",
    "c-evp-each": "cloop:EvpKeyEach",
    "c-evp-one": "cloop:EvpOneKey",
    "c-evp-bare": "cloop:EvpBare",
    "c-evp-long": "cloop:EvpLong",
    "c-mb-long": "cloop:IpsecMbLong",
    "c-mb-each": "cloop:IpsecMbKeyEach",
    "c-mb-one": "cloop:IpsecMbOneKey",
    "c-mb-bare": "cloop:IpsecMbBare",
    "c-newer-each": "cloop:NewerKeyEach",
    "c-newer-one": "cloop:NewerOneKey",
    "c-newer-bare": "cloop:NewerBare",
}
"""Ours and the yardsticks: they run in the project's environment."""

PEERS = {
    "asherah": "peers.asherah:Asherah",
    "aesgcm-each": "peers.bare_aesgcm:KeyEach",
    "aesgcm-one": "peers.bare_aesgcm:OneKey",
    "tink-each": "peers.tink:Envelope",
    "tink-one": "peers.tink:OneKey",
    "alloy": "peers.alloy:Alloy",
    "aws-each": "peers.aws:KeyEach",
    "aws-cached": "peers.aws:Cached",
    "transit": "peers.transit:Transit",
}
"""They run in an environment of their own."""


def load(name: str) -> type[Contender]:
    """Import the contender of that name."""
    module, kind = {**OURS, **PEERS}[name].split(":")
    found: type[Contender] = getattr(importlib.import_module(module), kind)
    return found
