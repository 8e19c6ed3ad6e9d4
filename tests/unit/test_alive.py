# SPDX-License-Identifier: Apache-2.0
"""What is known as long as somebody else has it, also while threads make and let go of such things."""

from __future__ import annotations

import gc

from crowd import Going, crowd
from openkcm.alive import Alive


class Thing:
    """Something that can be referred to weakly."""


def test_it_keeps_nothing() -> None:
    alive: Alive[Thing] = Alive()
    kept, gone = Thing(), Thing()
    for each in (kept, gone, kept):
        alive.add(each)
    assert len(alive.all()) == 2
    del gone, each
    gc.collect()
    assert alive.all() == [kept]


def test_things_come_and_go_while_it_is_gone_through() -> None:
    alive: Alive[Thing] = Alive()
    stays = Thing()
    alive.add(stays)

    def make(going: Going) -> None:
        while going():
            things = [Thing() for _ in range(50)]
            for each in things:
                alive.add(each)

    def look(going: Going) -> None:
        while going():
            assert stays in alive.all()

    crowd([make, make, look], rounds=300)
    gc.collect()
    assert alive.all() == [stays]
