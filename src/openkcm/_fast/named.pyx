# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True
"""Rows whose keys are those of subjects, in any order: found by name or by id, and worked on key by key.

Invariant: as in ``column``. Rows are put in the order of their keys a few hundred at a time; the column is not sorted.
"""

from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport free
from libc.string cimport memset

from .aead cimport BROKEN, DONE, REFUSED, SMALL, RecordCipher
from .cells cimport FOUND, MISSING, Cells, find_cell, find_piece, piece_cell
from .column cimport Refused, check_call, open_row, refuse, seal_row, settle, told
from .gcm cimport Gcm, gcm_begin, gcm_end
from .openssl cimport *
from .places cimport Places, okc_prefetch
from .ring cimport BLOCK, Block, Held, KeyRing, order_block
from .run cimport CHANGED, Run, run_end, run_place, run_row, run_start
from .secret cimport *
from .table cimport SOUGHT, Sought, Table, begin_search, mark_of, seek, seek_ids, take_known
from .turns cimport turn_begin, turn_end

cdef enum:
    ABSENT = 1                      # a key's mark: it is not there


cdef inline const uint8_t *held_key(const Held *held, Py_ssize_t number) noexcept nogil:
    return held.keys[number // held.stride] + (number % held.stride) * KEY


cdef inline const uint8_t *held_middle(const Held *held, Py_ssize_t number, int size) noexcept nogil:
    return held.middles[number // held.stride] + (number % held.stride) * size


cdef inline int begin_chain(Gcm *context, const Block *block, const Held *held, int chain, int size,
                            const uint8_t **key, const uint8_t **middle) noexcept nogil:
    """Have the key and the middle part, of ``size`` bytes, of a chain's rows at hand; its first row's place in the block."""
    cdef int at = block.heads[block.chains[chain]]
    cdef Py_ssize_t number = <Py_ssize_t>block.keys[at]
    key[0], middle[0] = held_key(held, number), held_middle(held, number, size)
    context.brief = block.nexts[at] < 0
    if chain + 1 < block.chain_count:
        number = <Py_ssize_t>block.keys[block.heads[block.chains[chain + 1]]]
        okc_prefetch(held_key(held, number))
        okc_prefetch(held_middle(held, number, size))
    return at


# ---- sealing -------------------------------------------------------------------------------------------

def seal_named(RecordCipher cipher not None, Cells cells not None, contexts, Places places not None, Py_ssize_t start,
               Py_ssize_t stop, Table table not None, Cells names not None, KeyRing ring not None):
    """Seal those of a run of rows whose name's key is on the ring."""
    cdef Run run
    cdef Held held
    cdef Py_ssize_t status
    check_call(cells, places, start, stop)
    if names.count != cells.count:
        raise invalid_error()("there must be one name for each record")
    run_start(&run, cells, contexts, stop - start)
    ring.enter(&held, cipher.middle_size)
    with nogil:
        turn_end()
        status = seal_blocks(cipher, cells, names, &run, places, start, stop, table, &held)
        run_end(&run)
        turn_begin()
    ring.leave(len(ring.handles))
    settle(status, cells)


cdef int seal_blocks(RecordCipher cipher, Cells cells, Cells names, Run *run, Places places, Py_ssize_t start,
                     Py_ssize_t stop, Table table, const Held *held) noexcept nogil:
    cdef Gcm context
    cdef Block block
    cdef Sought sought
    cdef const uint8_t *data = NULL
    cdef const uint32_t *mark
    cdef Py_ssize_t at = start, number, size = 0, piece = 0, other = 0
    cdef int status = DONE, found
    if gcm_begin(&context, True, False) != DONE:
        gcm_end(&context)
        return BROKEN
    block.count = 0
    while at < stop and status == DONE:
        begin_search(&sought)
        while at < stop and sought.count < SOUGHT:
            if not cells.nulls or find_cell(cells.pieces, cells.firsts, &piece, at, &data, &size) == FOUND:
                find_piece(names.firsts, &other, at)
                mark = mark_of(table, names.pieces, names.firsts, other, at)
                if mark != NULL and mark[0]:
                    take_known(&sought, at, <Py_ssize_t>mark[0] - 1)
                elif piece_cell(names.pieces + other, at - names.firsts[other], &data, &size) == FOUND:
                    seek(&sought, at, data, size)
                else:
                    status = CHANGED
                    break
            at += 1
        if status != DONE:
            break
        table.find_all(&sought)
        for found in range(sought.count):
            number = sought.numbers[found]
            if number < 0:
                status = CHANGED
                break
            if held.first <= number < held.first + held.count:
                block.rows[block.count] = sought.rows[found]
                block.keys[block.count] = <uint32_t>(number - held.first)
                block.count += 1
            if block.count == BLOCK:
                status = seal_block(cipher, &context, run, places, &block, held)
                block.count = 0
                if status != DONE:
                    break
    if status == DONE and block.count:
        status = seal_block(cipher, &context, run, places, &block, held)
    gcm_end(&context)
    return status


cdef int seal_block(RecordCipher cipher, Gcm *context, Run *run, Places places, Block *block,
                    const Held *held) noexcept nogil:
    cdef const uint8_t *key = NULL
    cdef const uint8_t *middle = NULL
    cdef int chain, at, status
    order_block(block)
    for chain in range(block.chain_count):
        at = begin_chain(context, block, held, chain, cipher.middle_size, &key, &middle)
        while at >= 0:
            status = run_row(run, block.rows[at])
            if status == FOUND:
                status = run_place(run, places, block.rows[at], run.item.size + cipher.overhead())
            if status != FOUND:
                return CHANGED if status == MISSING else status
            if seal_row(cipher, context, run, key, 0, middle) != DONE:
                return BROKEN
            places.filled(block.rows[at])
            key = NULL
            at = block.nexts[at]
    return DONE


# ---- opening -------------------------------------------------------------------------------------------

def open_named(RecordCipher cipher not None, Cells cells not None, contexts, Places places not None, Py_ssize_t start,
               Py_ssize_t stop, Table table not None, KeyRing ring not None, bytes without not None):
    """Open those of this cipher's records whose key is on the ring; gives what ``open_rows`` does, with numbers of the
    table.

    ``without`` is empty, or has a byte for each key of the ring: 1 for one that is not there, 2 for one whose rows are
    not to be looked at.
    """
    cdef Run run
    cdef Held held
    cdef const uint8_t *missing = without
    cdef Py_ssize_t status, at
    cdef Refused refused
    check_call(cells, places, start, stop)
    if len(without) != 0 and len(without) != ring.count:
        raise invalid_error()("there must be one mark for each key")
    run_start(&run, cells, contexts, stop - start)
    memset(&refused, 0, sizeof(refused))
    try:
        ring.enter(&held, cipher.middle_size)
        if len(without) == 0:
            missing = NULL
        with nogil:
            turn_end()
            status = open_blocks(cipher, &run, places, start, stop, table, &held, missing, &refused)
            run_end(&run)
            turn_begin()
        ring.leave(len(ring.handles))
        settle(status, cells)
        return told(&refused)
    finally:
        free(refused.rows)


cdef int open_blocks(RecordCipher cipher, Run *run, Places places, Py_ssize_t start, Py_ssize_t stop, Table table,
                     const Held *held, const uint8_t *missing, Refused *refused) noexcept nogil:
    cdef Gcm context
    cdef Block block
    cdef Sought sought
    cdef uint8_t scratch[SMALL + COMMITMENT]
    cdef Py_ssize_t at = start, number, piece = 0
    cdef int status = DONE, found
    if gcm_begin(&context, False, False) != DONE:
        gcm_end(&context)
        return BROKEN
    block.count = 0
    while at < stop and status == DONE:
        at = seek_ids(&sought, cipher, run.pieces, run.firsts, &piece, at, stop)
        table.find_all(&sought)
        for found in range(sought.count):
            number = sought.numbers[found]
            if number < 0:
                status = CHANGED
                break
            number -= held.first
            if not 0 <= number < held.count:
                continue
            if missing != NULL and missing[number]:
                if missing[number] == ABSENT:
                    status = refuse(refused, sought.rows[found], number + held.first)
                    if status != DONE:
                        break
                    places.filled(sought.rows[found])
                continue
            block.rows[block.count] = sought.rows[found]
            block.keys[block.count] = <uint32_t>number
            block.count += 1
            if block.count == BLOCK:
                status = open_block(cipher, &context, run, places, &block, held, scratch, refused)
                block.count = 0
                if status != DONE:
                    break
    if status == DONE and block.count:
        status = open_block(cipher, &context, run, places, &block, held, scratch, refused)
    gcm_end(&context)
    OPENSSL_cleanse(scratch, SMALL + COMMITMENT)
    return status


cdef int open_block(RecordCipher cipher, Gcm *context, Run *run, Places places, Block *block,
                    const Held *held, uint8_t *scratch, Refused *refused) noexcept nogil:
    cdef const uint8_t *key = NULL
    cdef const uint8_t *middle = NULL
    cdef int chain, at, status
    order_block(block)
    for chain in range(block.chain_count):
        at = begin_chain(context, block, held, chain, cipher.middle_size, &key, &middle)
        while at >= 0:
            status = run_row(run, block.rows[at])
            if status != FOUND or not cipher.takes(run.item.data, run.item.size):
                return BROKEN if status == BROKEN else CHANGED
            status = open_row(cipher, context, run, places, block.rows[at], key, middle, scratch)
            if status < 0 or (status == REFUSED and refuse(refused, block.rows[at], -1) != DONE):
                return status if status < 0 else BROKEN
            places.filled(block.rows[at])
            key = NULL
            at = block.nexts[at]
    return DONE
