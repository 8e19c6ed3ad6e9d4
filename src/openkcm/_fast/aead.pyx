# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True
"""Records: AES-256-GCM with key commitment, in batches.

Invariant: plaintext leaves only after its tag and its commitment (32 leading zero bytes, Albertini et al.,
USENIX Security 2022) verified; otherwise the output is wiped. Every nonce is drawn in here. A batch pins
its inputs and allocates its exact outputs, runs one C loop with the GIL released, then maps the status.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.list cimport PyList_GET_ITEM
from cpython.tuple cimport PyTuple_GetItem
from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport free, malloc
from libc.string cimport memcmp, memcpy, memset

from .batch cimport ALONE, Batch, Item, bound_size, pin, place_output
from .gcm cimport (
    Gcm, gcm_begin, gcm_begin_made, gcm_end, gcm_open, gcm_open_end, gcm_part, gcm_seal, gcm_seal_end, gcm_start,
    okc_is_zero32, okc_wipe, random_public,
)
from .openssl cimport *
from .secret cimport *

cdef enum:
    PARALLEL_BYTES = 16384          # below this, releasing the GIL costs more than it gives
    NONCE_BATCH = 1024              # record nonces drawn at a time within a batch

cdef extern from "native.h":
    bint FREE_THREADED "OKC_FREE_THREADED"
    object okc_find(dict dictionary, object key)
    double okc_awake_seconds() nogil

cdef object known_clock = None


def install_clock(clock):
    """Say which Python callable is CLOCK_BOOTTIME in seconds: to read it here costs a third."""
    global known_clock
    known_clock = clock


MAX_RECORD = 2**31 - 1024
cdef uint8_t[COMMITMENT] ZEROS
memset(ZEROS, 0, COMMITMENT)

# ---- one record ----------------------------------------------------------------------------------------

cdef int seal_long(Gcm *cipher, const uint8_t *key, const uint8_t *nonce, const uint8_t *aad, int aad_size,
                   const uint8_t *data, Py_ssize_t size, uint8_t *output) noexcept nogil:
    """As ``seal_record``, from where the record lies."""
    if (gcm_start(cipher, key, nonce, aad, aad_size) != DONE
            or gcm_part(cipher, output, ZEROS, COMMITMENT) != DONE
            or gcm_part(cipher, output + COMMITMENT, data, <int>size) != DONE):
        return BROKEN
    return gcm_seal_end(cipher, output + COMMITMENT + size)


cdef int open_long(Gcm *cipher, const uint8_t *key, const uint8_t *nonce, const uint8_t *aad, int aad_size,
                   const uint8_t *data, Py_ssize_t size, uint8_t *output, uint8_t *scratch) noexcept nogil:
    """As ``open_record``, to where the record goes; it is wiped there unless it verifies."""
    cdef int status
    if (gcm_start(cipher, key, nonce, aad, aad_size) != DONE
            or gcm_part(cipher, scratch, data, COMMITMENT) != DONE
            or gcm_part(cipher, output, data + COMMITMENT, <int>size) != DONE):
        status = BROKEN
    else:
        status = gcm_open_end(cipher, data + COMMITMENT + size)
        if status == DONE and not okc_is_zero32(scratch):
            status = REFUSED
    if status != DONE:
        OPENSSL_cleanse(output, <size_t>size)
    return status


# ---- records -------------------------------------------------------------------------------------------

cdef class RecordCipher:
    """One layout of record: head || version (4, big-endian) || middle || nonce 12 || ciphertext || tag 16.

    The associated data of a record is ``aad``, then the middle if it is bound, then the record's context.
    """

    def __init__(self, bytes head not None, int middle_bytes, bint bind_middle, bytes aad not None):
        if not 0 < len(head) <= ROOM or not 0 <= middle_bytes <= 256 or len(aad) > 256:
            raise invalid_error()("the layout's parts are out of bounds")
        self.head = head
        self.aad = aad
        self.head_data = <const uint8_t *>PyBytes_AS_STRING(head)
        self.aad_data = <const uint8_t *>PyBytes_AS_STRING(aad)
        self.head_size = <int>len(head)
        self.middle_size = middle_bytes
        self.aad_size = <int>len(aad)
        memcpy(self.head_room, self.head_data, <size_t>self.head_size)
        memcpy(self.aad_room, self.aad_data, <size_t>min(self.aad_size, <int>ROOM))
        self.bound = bind_middle
        self.body = self.head_size + VERSION + middle_bytes + NONCE

    cdef const uint8_t *bind(self, const uint8_t *middle, const Item *item, uint8_t *joined,
                             int *size) noexcept nogil:
        """The associated data in one piece: in ``joined`` if it fits, else to be freed; NULL when memory is short."""
        cdef int bound = self.middle_size if self.bound else 0
        cdef uint8_t *whole = joined
        size[0] = self.aad_size + bound + item.context_size
        if size[0] == self.aad_size:
            return self.aad_data
        if size[0] > JOINED:
            whole = <uint8_t *>malloc(<size_t>size[0])
            if whole == NULL:
                return NULL
        if self.aad_size <= ROOM and whole == joined:
            memcpy(whole, self.aad_room, ROOM)
        else:
            memcpy(whole, self.aad_data, <size_t>self.aad_size)
        if bound:
            memcpy(whole + self.aad_size, middle, <size_t>bound)
        if item.context_size == 1:
            whole[self.aad_size + bound] = item.context[0]
        else:
            memcpy(whole + self.aad_size + bound, item.context, <size_t>item.context_size)
        return whole

    cdef int seal(self, Gcm *cipher, const uint8_t *key, const uint8_t *nonce, uint32_t version,
                  const uint8_t *middle, const Item *item) noexcept nogil:
        cdef uint8_t joined[JOINED]
        cdef const uint8_t *aad
        cdef int status, aad_size
        aad = self.bind(middle, item, joined, &aad_size)
        if aad == NULL:
            return BROKEN
        status = self.seal_bound(cipher, key, nonce, version, middle, item, aad, aad_size)
        if aad_size > JOINED:
            free(<void *>aad)
        return status

    cdef int open(self, Gcm *cipher, const uint8_t *key, const Item *item, uint8_t *scratch) noexcept nogil:
        cdef uint8_t joined[JOINED]
        cdef const uint8_t *aad
        cdef int status, aad_size
        aad = self.bind(self.middle(item.data), item, joined, &aad_size)
        if aad == NULL:
            return BROKEN
        status = self.open_bound(cipher, key, item, scratch, aad, aad_size)
        if aad_size > JOINED:
            free(<void *>aad)
        return status

    # -- sealing --

    def seal_one(self, SecretKeys keys not None, Py_ssize_t position, uint32_t version, bytes middles not None,
                 bytes context not None, record, bint consume=False, out=None):
        """Seal one record under the key at ``position``; ``consume`` zeroes that key afterwards.

        Returns it as bytes, or writes it to ``out``, a buffer, and returns its size.
        """
        cdef Item item
        cdef uint8_t nonce[NONCE]
        cdef list held = None
        cdef Gcm cipher
        cdef uint8_t *key
        cdef const uint8_t *middle
        cdef int status = BROKEN
        if out is not None or not PyBytes_CheckExact(record):
            held = []
        pin(record, &item.data, &item.size, held, ALONE)
        self.check_size(item.size, ALONE)
        if PyBytes_GET_SIZE(middles) != keys.count * self.middle_size:
            raise invalid_error()("each key needs its own middle part")
        output = place_output(&item, item.size + self.overhead(), out, held)
        item.context = <const uint8_t *>PyBytes_AS_STRING(context)
        item.context_size = bound_size(context)
        middle = <const uint8_t *>PyBytes_AS_STRING(middles) + position * self.middle_size
        key = keys.enter_at(position)
        if gcm_begin(&cipher, True, True) == DONE and next_nonce(nonce) == 1:
            if item.size < PARALLEL_BYTES:
                status = self.seal(&cipher, key, nonce, version, middle, &item)
            else:
                with nogil:
                    status = self.seal(&cipher, key, nonce, version, middle, &item)
        gcm_end(&cipher)
        if consume:
            OPENSSL_cleanse(key, KEY)
        keys.leave()
        if status != DONE:
            OPENSSL_cleanse(item.output, <size_t>(item.size + self.overhead()))
            raise internal_error()("the cipher could not encrypt")
        return output

    cdef int check_size(self, Py_ssize_t size, Py_ssize_t index) except -1:
        if size > MAX_RECORD:
            raise limit_error()(
                f"a record has at most {MAX_RECORD} bytes, not {size}; use a stream for larger data",
                index=None if index == ALONE else index)
        return 0

    def seal_many(self, SecretKeys keys not None, index, uint32_t version, bytes middles not None, contexts,
                  records):
        """Seal a batch; record i uses the key at index[i], or its own key, or the only one."""
        cdef Batch batch = Batch(records, contexts, index, keys.count)
        cdef const uint8_t *middle = <const uint8_t *>PyBytes_AS_STRING(middles)
        cdef Py_ssize_t at
        cdef list outputs
        cdef uint8_t *data
        cdef int status
        if PyBytes_GET_SIZE(middles) != keys.count * self.middle_size:
            raise invalid_error()("each key needs its own middle part")
        for at in range(batch.count):
            self.check_size(batch.items[at].size, at)
        outputs = batch.allocate(self.overhead())
        data = keys.enter()
        if batch.parallel():
            with nogil:
                status = self.seal_loop(data, version, middle, batch)
        else:
            status = self.seal_loop(data, version, middle, batch)
        keys.leave()
        if status != DONE:
            raise internal_error()("the cipher could not encrypt")
        return outputs

    cdef int seal_loop(self, uint8_t *keys, uint32_t version, const uint8_t *middles,
                       Batch batch) noexcept nogil:
        cdef uint8_t nonces[NONCE_BATCH * NONCE]
        cdef Gcm cipher
        cdef const Item *item
        cdef Py_ssize_t at, drawn
        cdef uint32_t last = 0
        cdef uint8_t *key
        cdef int status = DONE
        if gcm_begin(&cipher, True, batch.brief) != DONE:
            gcm_end(&cipher)
            return BROKEN
        for at in range(batch.count):
            if at % NONCE_BATCH == 0:
                drawn = batch.count - at if batch.count - at < NONCE_BATCH else NONCE_BATCH
                if random_public(nonces, <int>(drawn * NONCE)) != 1:
                    status = BROKEN
                    break
            # The same key as before keeps its schedule in the context; only the nonce is set.
            item = batch.items + (at if batch.order == NULL else <Py_ssize_t>batch.order[at])
            key = NULL if at and item.key == last else keys + <Py_ssize_t>item.key * KEY
            last = item.key
            status = self.seal(&cipher, key, nonces + (at % NONCE_BATCH) * NONCE, version,
                               middles + <Py_ssize_t>last * self.middle_size, item)
            if status != DONE:
                break
        gcm_end(&cipher)
        return status

    # -- opening --

    def open_one(self, SecretKeys keys not None, Py_ssize_t position, bytes context not None, blob, out=None):
        """Open one record: its bytes, or how many were written to ``out``, a buffer; None when it does not verify."""
        return self.open_alone(keys, position, context, blob, out)

    def open_kept(self, dict kept not None, double stands, clock, bytes context not None, blob, out=None):
        """Open one record under the key that is kept for its version and middle; None if there is none to be had.

        ``kept`` maps what ``place`` returns to tuples of (keys, since, until), in seconds of ``clock``: a key is used before
        ``until``, and none from ``stands`` on. What does not verify, or was wiped meanwhile, is None too: the caller finds
        out the long way.
        """
        cdef double now = okc_awake_seconds() if clock is known_clock else clock()
        if now >= stands:
            return None
        place = self.place(blob)
        entry = None if place is None else okc_find(kept, place)
        if entry is None:
            return None
        if now >= <double><object>PyTuple_GetItem(entry, 2):
            return None
        try:
            return self.open_alone(<SecretKeys?><object>PyTuple_GetItem(entry, 0), 0, context, blob, out)
        except Exception as error:
            if not isinstance(error, memory_error()):
                raise
            return None

    cdef object open_alone(self, SecretKeys keys, Py_ssize_t position, bytes context, blob, out):
        """Open one record under the key at a position, which is the only one if its schedule is kept."""
        cdef Item item
        cdef uint8_t scratch[SMALL + COMMITMENT]
        cdef list held = None
        cdef Gcm cipher
        cdef uint8_t *key
        cdef int status = BROKEN
        if out is not None or not PyBytes_CheckExact(blob):
            held = []
        pin(blob, &item.data, &item.size, held, ALONE)
        if item.size < self.overhead() or item.size - self.overhead() > MAX_RECORD:
            return None
        output = place_output(&item, item.size - self.overhead(), out, held)
        item.context = <const uint8_t *>PyBytes_AS_STRING(context)
        item.context_size = bound_size(context)
        key = keys.enter_at(position)
        if keys.schedule != NULL:
            status = gcm_begin_made(&cipher, False, keys.schedule)
            key = NULL
        else:
            status = gcm_begin(&cipher, False, True)
        if status == DONE:
            if item.size < PARALLEL_BYTES:
                status = self.open(&cipher, key, &item, scratch)
            else:
                with nogil:
                    status = self.open(&cipher, key, &item, scratch)
        gcm_end(&cipher)
        keys.leave()
        wipe_scratch(scratch, item.size - self.overhead())
        if status == BROKEN:
            raise internal_error()("the cipher could not decrypt")
        return output if status == DONE else None

    def open_many(self, SecretKeys keys not None, index, contexts, blobs, bint outcomes):
        """Open a batch: (records, positions that did not verify).

        With ``outcomes`` a record that did not verify is None; without, the first one ends the batch, what
        was opened before it is wiped and the list is empty.
        """
        cdef Batch batch = Batch(blobs, contexts, index, keys.count)
        cdef bytearray failed = bytearray(batch.count)
        cdef uint8_t *marks = <uint8_t *>failed
        cdef Py_ssize_t at, first
        cdef list outputs
        cdef uint8_t *data
        for at in range(batch.count):
            if batch.items[at].size < self.overhead() or batch.items[at].size - self.overhead() > MAX_RECORD:
                raise invalid_error()("too short or too long for a record", index=at)
        outputs = batch.allocate(-self.overhead())
        data = keys.enter()
        if batch.parallel():
            with nogil:
                first = self.open_loop(data, batch, marks, outcomes)
        else:
            first = self.open_loop(data, batch, marks, outcomes)
        keys.leave()
        if first == batch.count:
            return outputs, []
        if first >= 0 and outcomes:
            refused = [at for at in range(batch.count) if marks[at]]
            for at in refused:
                outputs[at] = None
            return outputs, refused
        for at in range(batch.count):
            OPENSSL_cleanse(batch.items[at].output, <size_t>(batch.items[at].size - self.overhead()))
        if first < 0:
            raise internal_error()("the cipher could not decrypt")
        return [], [first]

    cdef Py_ssize_t open_loop(self, uint8_t *keys, Batch batch, uint8_t *failed,
                              bint outcomes) noexcept nogil:
        """Position of the first record that did not verify, ``count`` when all did, -1 when the cipher failed."""
        cdef uint8_t scratch[SMALL + COMMITMENT]
        cdef Gcm cipher
        cdef const Item *items = batch.items
        cdef Py_ssize_t turn, at, first = batch.count
        cdef uint32_t last = 0
        cdef uint8_t *key
        cdef int status = DONE
        if gcm_begin(&cipher, False, batch.brief) != DONE:
            gcm_end(&cipher)
            return -1
        for turn in range(batch.count):
            at = turn if batch.order == NULL else <Py_ssize_t>batch.order[turn]
            if at > first and not outcomes:
                continue                # one before it has failed already
            key = NULL if turn and items[at].key == last else keys + <Py_ssize_t>items[at].key * KEY
            last = items[at].key
            status = self.open(&cipher, key, items + at, scratch)
            if status == BROKEN:
                break
            if status == REFUSED:
                failed[at] = 1
                first = at if at < first else first
        gcm_end(&cipher)
        OPENSSL_cleanse(scratch, SMALL + COMMITMENT)
        return -1 if status == BROKEN else first

    cpdef object place(self, blob):
        """The version and the middle of one record, side by side; None if it is not exact bytes of this layout."""
        cdef const uint8_t *data
        if not PyBytes_CheckExact(blob) or PyBytes_GET_SIZE(blob) < self.overhead():
            return None
        data = <const uint8_t *>PyBytes_AS_STRING(blob)
        if memcmp(data, self.head_data, <size_t>self.head_size) != 0:
            return None
        return PyBytes_FromStringAndSize(<const char *>data + self.head_size, VERSION + self.middle_size)

    def gather(self, blobs, bint runs=False):
        """Collect the middles of a batch, if every blob has this head and layout and all share one version.

        Returns None, or (version, packed middles, index). With ``runs``, neighbours with the same middle share one,
        and the index tells which is each blob's; it is None where they are all one's own, or all the same.
        """
        # While the GIL is held nobody changes the caller's list; without a GIL it has to be ours.
        cdef list items = blobs if type(blobs) is list and not FREE_THREADED else list(blobs)
        cdef Py_ssize_t count = len(items)
        cdef bytes packed = PyBytes_FromStringAndSize(NULL, count * self.middle_size)
        cdef uint8_t *target = <uint8_t *>PyBytes_AS_STRING(packed)
        cdef const uint8_t *first = NULL
        cdef const uint8_t *data = NULL
        cdef Py_ssize_t at, distinct = 0
        cdef bytes index = PyBytes_FromStringAndSize(NULL, count * <Py_ssize_t>sizeof(uint32_t) if runs else 0)
        cdef uint32_t *places = <uint32_t *>PyBytes_AS_STRING(index)
        cdef object blob
        if count == 0:
            return None
        for at in range(count):
            blob = <object>PyList_GET_ITEM(items, at)
            if not PyBytes_CheckExact(blob) or PyBytes_GET_SIZE(blob) < self.overhead():
                return None
            data = <const uint8_t *>PyBytes_AS_STRING(blob)
            if first == NULL:
                first = data
                if memcmp(data, self.head_data, <size_t>self.head_size) != 0:
                    return None
            elif memcmp(data, first, <size_t>(self.head_size + VERSION)) != 0:
                return None
            data += self.head_size + VERSION
            if (not runs or distinct == 0
                    or memcmp(data, target + (distinct - 1) * self.middle_size, <size_t>self.middle_size) != 0):
                memcpy(target + distinct * self.middle_size, data, <size_t>self.middle_size)
                distinct += 1
            if runs:
                places[at] = <uint32_t>(distinct - 1)
        data = first + self.head_size
        return (
            <uint32_t>data[0] << 24 | <uint32_t>data[1] << 16 | <uint32_t>data[2] << 8 | data[3],
            packed if distinct == count else packed[:distinct * self.middle_size],
            None if distinct == count or distinct == 1 else memoryview(index).cast("I"),
        )


cdef inline void wipe_scratch(uint8_t *scratch, Py_ssize_t size) noexcept nogil:
    okc_wipe(scratch, <size_t>(COMMITMENT + (size if size < SMALL else <Py_ssize_t>SMALL)))


# ---- for test vectors only: nothing in the package calls these ------------------------------------------

def _gcm_seal(bytes key not None, bytes nonce not None, bytes aad not None, bytes plaintext not None):
    """AES-256-GCM with a given nonce and no commitment: ciphertext || tag."""
    cdef bytes output = PyBytes_FromStringAndSize(NULL, len(plaintext) + TAG)
    cdef uint8_t *target = <uint8_t *>PyBytes_AS_STRING(output)
    cdef Gcm cipher
    cdef int status = BROKEN
    if len(key) != KEY or len(nonce) != NONCE:
        raise invalid_error()("a key has 32 bytes and a nonce 12")
    if gcm_begin(&cipher, True, True) == DONE:
        status = gcm_seal(&cipher, key, nonce, aad, <int>len(aad), target, plaintext, <int>len(plaintext),
                          target + len(plaintext))
    gcm_end(&cipher)
    if status != DONE:
        raise internal_error()("the cipher could not encrypt")
    return output


def _gcm_open(bytes key not None, bytes nonce not None, bytes aad not None, bytes ciphertext not None):
    """The inverse of ``_gcm_seal``; None when the tag does not verify."""
    cdef Py_ssize_t size = len(ciphertext) - TAG
    cdef const uint8_t *source = <const uint8_t *>PyBytes_AS_STRING(ciphertext)
    cdef bytes output
    cdef Gcm cipher
    cdef int status = BROKEN
    if len(key) != KEY or len(nonce) != NONCE:
        raise invalid_error()("a key has 32 bytes and a nonce 12")
    if size < 0:
        return None
    output = PyBytes_FromStringAndSize(NULL, size)
    if gcm_begin(&cipher, False, True) == DONE:
        status = gcm_open(&cipher, key, nonce, aad, <int>len(aad), <uint8_t *>PyBytes_AS_STRING(output), source,
                          <int>size, source + size)
    gcm_end(&cipher)
    return output if status == DONE else None
