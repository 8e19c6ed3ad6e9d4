# SPDX-License-Identifier: Apache-2.0
"""A Gateway does with a Core on the network what it does with one in its process: the same tests, over mutual TLS."""

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
    test_a_closed_gateway,
    test_a_key_serves_so_many_records,
    test_a_kill_wipes_what_waits,
    test_a_lost_key_row_is_not_a_shredded_one,
    test_a_pool_of_none,
    test_a_refill_that_a_kill_overtakes_is_thrown_away,
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
    test_waiting_keys_expire,
)
from test_streams import (  # noqa: F401
    test_a_kill_stops_a_running_stream,
    test_a_stored_streams_subject_can_be_shredded,
    test_records_and_streams_are_told_apart,
    test_streams_outlive_rotation,
)

import openkcm
from openkcm.gateway import ServiceHandle
from remote_support import FarCore
from rpc_support import Site


@pytest.fixture
def core(tmp_path: Path) -> Iterator[FarCore]:
    """A server in this process, and what a Gateway has of it."""
    site = Site(tmp_path)
    with site.serve() as server, site.connect(server.ports) as remote:
        yield FarCore(remote, server.core)


@pytest.fixture
def service(core: FarCore) -> Iterator[ServiceHandle]:
    with openkcm.Gateway(core) as gateway:
        yield gateway.service("acme", "records")
