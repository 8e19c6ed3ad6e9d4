# SPDX-License-Identifier: Apache-2.0
"""A Gateway on an event loop does what one in threads does: the same tests, each call awaited, over mutual TLS."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from test_columns import (  # noqa: F401  # run here, with the fixtures of this module
    test_each_row_has_a_key_and_a_nonce_of_its_own,
    test_policies_hold,
    test_what_lists_encrypt_columns_decrypt,
)
from test_gateway import (  # noqa: F401
    test_a_batch_larger_than_a_chunk,
    test_a_kill_wipes_what_waits,
    test_a_lost_key_row_is_not_a_shredded_one,
    test_a_subject_shredded_while_it_is_encrypted_for_gets_another_key,
    test_another_gateway_shreds,
    test_caches_are_bounded,
    test_every_record_has_its_own_key_and_nonce,
    test_outcomes_of_a_mixed_batch,
    test_outcomes_of_encrypting,
    test_rewrapping_all_subjects,
    test_rewrapping_touches_no_data,
    test_rotation_renews_what_waits,
    test_shredding_forgets_one_person,
    test_subjects_under_several_versions,
    test_two_gateways_make_one_key_for_a_subject,
)
from test_into import test_it_is_what_encrypt_and_decrypt_do  # noqa: F401
from test_streams import (  # noqa: F401
    test_a_kill_stops_a_running_stream,
    test_a_stored_streams_subject_can_be_shredded,
    test_records_and_streams_are_told_apart,
    test_streams_outlive_rotation,
)

from aio_support import Called, LoopThread, SeenBy
from openkcm import aio
from rpc_support import Site


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[tuple[SeenBy, Called]]:
    """A server in this process; what is done to it; and a handle on a loop's Gateway of it."""
    site = Site(tmp_path)
    with site.serve() as server, site.connect(server.ports) as remote, LoopThread() as thread:
        core = aio.connect(f"127.0.0.1:{server.ports['data']}", tls=site.tls())
        keys = server.core.default_key_store
        gateway = aio.Gateway(core, keys=keys)
        try:
            handle = thread.call(gateway.service("acme", "records"))
            far = SeenBy(remote, server.core, core)
            yield far, Called(thread, handle, far)
        finally:
            thread.call(gateway.close())
            thread.call(core.close())


@pytest.fixture
def core(parts: tuple[SeenBy, Called]) -> SeenBy:
    return parts[0]


@pytest.fixture
def service(parts: tuple[SeenBy, Called]) -> Called:
    return parts[1]
