# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True
"""Records: AES-256-GCM with key commitment, in batches.

Invariant: plaintext leaves only after its tag and its commitment (32 leading zero bytes, Albertini et al.,
USENIX Security 2022) verified; otherwise the output is wiped. Every nonce is drawn in here. A batch pins
its inputs and allocates its exact outputs, runs one C loop with the GIL released, then maps the status.
"""

from cpython.buffer cimport PyBUF_SIMPLE
from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_CheckExact, PyBytes_FromStringAndSize, PyBytes_GET_SIZE
from cpython.list cimport PyList_GET_ITEM, PyList_New, PyList_SET_ITEM
from cpython.memoryview cimport PyMemoryView_FromObject, PyMemoryView_GET_BUFFER
from cpython.object cimport PyObject
from cpython.ref cimport Py_INCREF
from libc.stdint cimport uint8_t, uint32_t
from libc.stdlib cimport calloc, free, malloc
from libc.string cimport memcmp, memcpy, memset

from .gcm cimport (
    gcm_more_aad, gcm_new, gcm_open_end, gcm_open_part, gcm_open_start, gcm_seal_end, gcm_seal_part,
    gcm_seal_start,
)
from .openssl cimport *
from .secret cimport *

cdef enum:
    VERSION = 4
    JOINED = 512                    # associated data up to here is put together for one call
    SMALL = 2048                    # records up to here are ciphered in one call through a scratch buffer
    PARALLEL_ITEMS = 16             # below these two, releasing the GIL costs more than it gives
    PARALLEL_BYTES = 16384
    ARENA = 1048576                 # CPython's unit of taking memory from the system, since 3.10
    POOLED = 512                    # larger objects do not come from an arena
    BYTES_HEAD = 48
    ANCHORS = 8                     # at most 8 MiB kept
    NONCE_BATCH = 1024              # record nonces drawn at a time within a batch
    MAX_SORTED = 2147483647

cdef Py_ssize_t MAX_RECORD = 2**31 - 1024
cdef uint8_t[COMMITMENT] ZEROS
memset(ZEROS, 0, COMMITMENT)

# ---- one record ----------------------------------------------------------------------------------------

cdef int seal_record(EVP_CIPHER_CTX *context, const uint8_t *data, Py_ssize_t size, uint8_t *output) noexcept nogil:
    """The tail of an envelope: ciphertext of zeros and plaintext, then the tag. The context is started."""
    if size <= SMALL:
        # One call over a copy is faster than two calls while the record is small.
        memset(output, 0, COMMITMENT)
        memcpy(output + COMMITMENT, data, <size_t>size)
        if gcm_seal_part(context, output, output, <int>(COMMITMENT + size)) != DONE:
            return BROKEN
    elif (gcm_seal_part(context, output, ZEROS, COMMITMENT) != DONE
            or gcm_seal_part(context, output + COMMITMENT, data, <int>size) != DONE):
        return BROKEN
    return gcm_seal_end(context, output + COMMITMENT + size)


cdef int open_record(EVP_CIPHER_CTX *context, const uint8_t *data, Py_ssize_t size, uint8_t *output,
                     uint8_t *scratch) noexcept nogil:
    """Open ciphertext and tag (``size`` counts the plaintext only) into ``output``, or wipe it."""
    cdef int status
    if size <= SMALL:
        if gcm_open_part(context, scratch, data, <int>(COMMITMENT + size)) != DONE:
            return BROKEN
        status = gcm_open_end(context, data + COMMITMENT + size)
        if status == DONE and CRYPTO_memcmp(scratch, ZEROS, COMMITMENT) != 0:
            status = REFUSED
        if status == DONE:
            memcpy(output, scratch + COMMITMENT, <size_t>size)
        return status
    if (gcm_open_part(context, scratch, data, COMMITMENT) != DONE
            or gcm_open_part(context, output, data + COMMITMENT, <int>size) != DONE):
        status = BROKEN
    else:
        status = gcm_open_end(context, data + COMMITMENT + size)
        if status == DONE and CRYPTO_memcmp(scratch, ZEROS, COMMITMENT) != 0:
            status = REFUSED
    if status != DONE:
        OPENSSL_cleanse(output, <size_t>size)
    return status


# ---- pinning -------------------------------------------------------------------------------------------

cdef int pin(object thing, const uint8_t **data, Py_ssize_t *size, list held, Py_ssize_t index) except -1:
    """Point at a bytes-like object's bytes; anything but exact bytes is held through a memoryview."""
    if PyBytes_CheckExact(thing):
        data[0] = <const uint8_t *>PyBytes_AS_STRING(thing)
        size[0] = PyBytes_GET_SIZE(thing)
        return 0
    try:
        view = memoryview(thing)
        if not view.c_contiguous:
            raise BufferError()
    except (TypeError, ValueError, BufferError):
        raise invalid_error()(_not_bytes(thing), index=None if index == ALONE else index) from None
    held.append(view)
    data[0] = <const uint8_t *>PyMemoryView_GET_BUFFER(view).buf
    size[0] = PyMemoryView_GET_BUFFER(view).len
    return 0


cdef str _not_bytes(thing):
    if isinstance(thing, memoryview):
        return "a buffer must be contiguous"
    if isinstance(thing, str):
        return "bytes are wanted, not str; encode the text first, for example with .encode()"
    return f"bytes-like data is wanted, not {type(thing).__name__}"


cdef class Batch:
    """The pinned inputs and outputs of one call; lives on the stack of that call only."""

    cdef Item *items
    cdef uint32_t *order                # NULL: as they are
    cdef Py_ssize_t count
    cdef Py_ssize_t total
    cdef list held
    cdef list inputs
    cdef object contexts
    cdef object index

    def __cinit__(self, inputs, contexts, index, Py_ssize_t keys):
        self.held = []
        self.inputs = list(inputs)              # our own references: the caller's list may change meanwhile
        self.count = len(self.inputs)
        self.items = <Item *>malloc(<size_t>(self.count if self.count else 1) * sizeof(Item))
        if self.items == NULL:
            raise MemoryError()
        self.pin_inputs()
        self.pin_contexts(contexts)
        self.pin_keys(index, keys)

    def __dealloc__(self):
        free(self.items)
        free(self.order)

    cdef int pin_inputs(self) except -1:
        cdef Py_ssize_t at
        self.total = 0
        for at in range(self.count):
            pin(<object>PyList_GET_ITEM(self.inputs, at), &self.items[at].data, &self.items[at].size, self.held, at)
            self.total += self.items[at].size
        return 0

    cdef int pin_contexts(self, contexts) except -1:
        cdef Py_ssize_t at
        cdef bytes one
        if isinstance(contexts, bytes):
            one = contexts
            self.contexts = one
            for at in range(self.count):
                self.items[at].context = <const uint8_t *>PyBytes_AS_STRING(one)
                self.items[at].context_size = <int>PyBytes_GET_SIZE(one)
            return 0
        self.contexts = list(contexts)
        if len(self.contexts) != self.count:
            raise invalid_error()("there must be one context for each record")
        for at in range(self.count):
            one = <bytes?>self.contexts[at]
            self.items[at].context = <const uint8_t *>PyBytes_AS_STRING(one)
            self.items[at].context_size = <int>PyBytes_GET_SIZE(one)
        return 0

    cdef int pin_keys(self, index, Py_ssize_t keys) except -1:
        cdef Py_ssize_t at
        cdef const uint32_t[::1] positions
        if index is None:
            if keys != 1 and keys != self.count:
                raise invalid_error()("there must be one key, a key for each record, or an index")
            for at in range(self.count):
                self.items[at].key = 0 if keys == 1 else <uint32_t>at
            return 0
        positions = index
        self.index = index
        if positions.shape[0] != self.count:
            raise invalid_error()("there must be one key position for each record")
        for at in range(self.count):
            if positions[at] >= keys:
                raise invalid_error()("no key at that position", index=at)
            self.items[at].key = positions[at]
        return self.sort_by_key(keys)

    cdef int sort_by_key(self, Py_ssize_t keys) except -1:
        """Let records of one key follow each other: setting a key costs nearly as much as a small record."""
        cdef Py_ssize_t at
        cdef uint32_t *next_place
        cdef uint32_t place = 0, size
        if self.count < PARALLEL_ITEMS or self.count > MAX_SORTED or keys > self.count:
            return 0
        next_place = <uint32_t *>calloc(<size_t>keys, sizeof(uint32_t))
        self.order = <uint32_t *>malloc(<size_t>self.count * sizeof(uint32_t))
        if next_place == NULL or self.order == NULL:
            free(next_place)
            raise MemoryError()
        for at in range(self.count):
            next_place[self.items[at].key] += 1
        for at in range(keys):
            size = next_place[at]
            next_place[at] = place
            place += size
        for at in range(self.count):
            self.order[next_place[self.items[at].key]] = <uint32_t>at
            next_place[self.items[at].key] += 1
        free(next_place)
        return 0

    cdef bint parallel(self) noexcept:
        return self.count >= PARALLEL_ITEMS or self.total >= PARALLEL_BYTES


cdef list anchors = []


cdef int anchor(Py_ssize_t size) except -1:
    """Hold a byte in one more of the interpreter's arenas, up to a few.

    CPython unmaps an arena (1 MiB) when its last object goes. A caller that encrypts batch after batch
    would fault every page of its results anew, which costs half as much as the cipher.
    """
    if len(anchors) < ANCHORS:
        anchors.append(PyBytes_FromStringAndSize(NULL, size))
    return 0


# ---- records -------------------------------------------------------------------------------------------

cdef class RecordCipher:
    """One layout of record: head || version (4, big-endian) || middle || nonce 12 || ciphertext || tag 16.

    The associated data of a record is ``aad``, then the middle if it is bound, then the record's context.
    """

    cdef bytes head, aad
    cdef const uint8_t *head_data
    cdef const uint8_t *aad_data
    cdef int head_size, middle_size, aad_size, body
    cdef bint bound

    def __init__(self, bytes head not None, int middle_bytes, bint bind_middle, bytes aad not None):
        if not 0 < len(head) <= 64 or not 0 <= middle_bytes <= 256 or len(aad) > 256:
            raise invalid_error()("the layout's parts are out of bounds")
        self.head = head
        self.aad = aad
        self.head_data = <const uint8_t *>PyBytes_AS_STRING(head)
        self.aad_data = <const uint8_t *>PyBytes_AS_STRING(aad)
        self.head_size = <int>len(head)
        self.middle_size = middle_bytes
        self.aad_size = <int>len(aad)
        self.bound = bind_middle
        self.body = self.head_size + VERSION + middle_bytes + NONCE

    cdef Py_ssize_t overhead(self) noexcept nogil:
        return self.body + COMMITMENT + TAG

    cdef int begin(self, EVP_CIPHER_CTX *cipher, bint encrypt, const uint8_t *key, const uint8_t *nonce,
                   const uint8_t *middle, const Item *item) noexcept nogil:
        """Set key and nonce and take the associated data; in one call when it is short, as it nearly always is."""
        cdef uint8_t joined[JOINED]
        cdef int bound = self.middle_size if self.bound else 0
        cdef int size = self.aad_size
        cdef const uint8_t *aad = self.aad_data
        cdef bint short = size + bound + item.context_size <= JOINED
        cdef int status
        if short:
            memcpy(joined, aad, <size_t>size)
            memcpy(joined + size, middle, <size_t>bound)
            memcpy(joined + size + bound, item.context, <size_t>item.context_size)
            size += bound + item.context_size
            aad = joined
        if encrypt:
            status = gcm_seal_start(cipher, key, nonce, aad, size)
        else:
            status = gcm_open_start(cipher, key, nonce, aad, size)
        if short or status != DONE:
            return status
        if gcm_more_aad(cipher, encrypt, middle, bound) != DONE:
            return BROKEN
        return gcm_more_aad(cipher, encrypt, item.context, item.context_size)

    cdef int seal(self, EVP_CIPHER_CTX *cipher, const uint8_t *key, const uint8_t *nonce, uint32_t version,
                  const uint8_t *middle, const Item *item) noexcept nogil:
        cdef uint8_t *output = item.output
        memcpy(output, self.head_data, <size_t>self.head_size)
        output += self.head_size
        output[0] = <uint8_t>(version >> 24)
        output[1] = <uint8_t>((version >> 16) & 255)
        output[2] = <uint8_t>((version >> 8) & 255)
        output[3] = <uint8_t>(version & 255)
        output += VERSION
        memcpy(output, middle, <size_t>self.middle_size)
        output += self.middle_size
        memcpy(output, nonce, NONCE)
        if self.begin(cipher, True, key, nonce, middle, item) != DONE:
            return BROKEN
        return seal_record(cipher, item.data, item.size, output + NONCE)

    cdef int open(self, EVP_CIPHER_CTX *cipher, const uint8_t *key, const Item *item, uint8_t *scratch) noexcept nogil:
        cdef const uint8_t *middle = item.data + self.head_size + VERSION
        if self.begin(cipher, False, key, middle + self.middle_size, middle, item) != DONE:
            return BROKEN
        return open_record(cipher, item.data + self.body, item.size - self.overhead(), item.output, scratch)

    # -- sealing --

    def seal_one(self, SecretKeys keys not None, Py_ssize_t position, uint32_t version, bytes middles not None,
                 bytes context not None, record, bint consume=False):
        """Seal one record under the key at ``position``; ``consume`` zeroes that key afterwards."""
        cdef Item item
        cdef uint8_t nonce[NONCE]
        cdef list held = []
        cdef EVP_CIPHER_CTX *cipher
        cdef uint8_t *key
        cdef const uint8_t *middle
        cdef bytes output
        cdef int status = BROKEN
        pin(record, &item.data, &item.size, held, ALONE)
        self.check_size(item.size, ALONE)
        if PyBytes_GET_SIZE(middles) != keys.count * self.middle_size:
            raise invalid_error()("each key needs its own middle part")
        output = PyBytes_FromStringAndSize(NULL, item.size + self.overhead())
        item.output = <uint8_t *>PyBytes_AS_STRING(output)
        item.context = <const uint8_t *>PyBytes_AS_STRING(context)
        item.context_size = <int>PyBytes_GET_SIZE(context)
        middle = <const uint8_t *>PyBytes_AS_STRING(middles) + position * self.middle_size
        key = keys.enter_at(position)
        cipher = gcm_new(True)
        if cipher != NULL and next_nonce(nonce) == 1:
            if item.size < PARALLEL_BYTES:
                status = self.seal(cipher, key, nonce, version, middle, &item)
            else:
                with nogil:
                    status = self.seal(cipher, key, nonce, version, middle, &item)
        EVP_CIPHER_CTX_free(cipher)
        if consume:
            OPENSSL_cleanse(key, KEY)
        keys.leave()
        if status != DONE:
            raise internal_error()("OpenSSL could not encrypt")
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
        outputs = self.allocate(batch, self.overhead())
        data = keys.enter()
        if batch.parallel():
            with nogil:
                status = self.seal_loop(data, version, middle, batch.items, batch.order, batch.count)
        else:
            status = self.seal_loop(data, version, middle, batch.items, batch.order, batch.count)
        keys.leave()
        if status != DONE:
            raise internal_error()("OpenSSL could not encrypt")
        return outputs

    cdef list allocate(self, Batch batch, Py_ssize_t more):
        """One bytes object for each record, ``more`` longer (or shorter) than its input."""
        cdef list outputs = PyList_New(batch.count)
        cdef Py_ssize_t at, since = 0
        cdef bytes output
        for at in range(batch.count):
            if batch.items[at].size + more + BYTES_HEAD <= POOLED:
                since += batch.items[at].size + more + BYTES_HEAD
            if since > ARENA:
                since = 0
                anchor(batch.items[at].size + more)
            output = PyBytes_FromStringAndSize(NULL, batch.items[at].size + more)
            batch.items[at].output = <uint8_t *>PyBytes_AS_STRING(output)
            Py_INCREF(output)
            PyList_SET_ITEM(outputs, at, output)
        return outputs

    cdef int seal_loop(self, uint8_t *keys, uint32_t version, const uint8_t *middles, const Item *items,
                       const uint32_t *order, Py_ssize_t count) noexcept nogil:
        cdef uint8_t nonces[NONCE_BATCH * NONCE]
        cdef EVP_CIPHER_CTX *cipher = gcm_new(True)
        cdef const Item *item
        cdef Py_ssize_t at, drawn
        cdef uint32_t last = 0
        cdef uint8_t *key
        cdef int status = DONE
        if cipher == NULL:
            return BROKEN
        for at in range(count):
            if at % NONCE_BATCH == 0:
                drawn = count - at if count - at < NONCE_BATCH else NONCE_BATCH
                if RAND_bytes(nonces, <int>(drawn * NONCE)) != 1:
                    status = BROKEN
                    break
            # The same key as before keeps its schedule in the context; only the nonce is set.
            item = items + (at if order == NULL else <Py_ssize_t>order[at])
            key = NULL if at and item.key == last else keys + <Py_ssize_t>item.key * KEY
            last = item.key
            status = self.seal(cipher, key, nonces + (at % NONCE_BATCH) * NONCE, version,
                               middles + <Py_ssize_t>last * self.middle_size, item)
            if status != DONE:
                break
        EVP_CIPHER_CTX_free(cipher)
        return status

    # -- opening --

    def open_one(self, SecretKeys keys not None, Py_ssize_t position, bytes context not None, blob):
        """Open one record; None when it does not verify."""
        cdef Item item
        cdef uint8_t scratch[SMALL + COMMITMENT]
        cdef list held = []
        cdef EVP_CIPHER_CTX *cipher
        cdef uint8_t *key
        cdef bytes output
        cdef int status = BROKEN
        pin(blob, &item.data, &item.size, held, ALONE)
        if item.size < self.overhead() or item.size - self.overhead() > MAX_RECORD:
            return None
        output = PyBytes_FromStringAndSize(NULL, item.size - self.overhead())
        item.output = <uint8_t *>PyBytes_AS_STRING(output)
        item.context = <const uint8_t *>PyBytes_AS_STRING(context)
        item.context_size = <int>PyBytes_GET_SIZE(context)
        key = keys.enter_at(position)
        cipher = gcm_new(False)
        if cipher != NULL:
            if item.size < PARALLEL_BYTES:
                status = self.open(cipher, key, &item, scratch)
            else:
                with nogil:
                    status = self.open(cipher, key, &item, scratch)
        EVP_CIPHER_CTX_free(cipher)
        keys.leave()
        wipe_scratch(scratch, item.size - self.overhead())
        if status == BROKEN:
            raise internal_error()("OpenSSL could not decrypt")
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
        outputs = self.allocate(batch, -self.overhead())
        data = keys.enter()
        if batch.parallel():
            with nogil:
                first = self.open_loop(data, batch.items, batch.order, batch.count, marks, outcomes)
        else:
            first = self.open_loop(data, batch.items, batch.order, batch.count, marks, outcomes)
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
            raise internal_error()("OpenSSL could not decrypt")
        return [], [first]

    cdef Py_ssize_t open_loop(self, uint8_t *keys, const Item *items, const uint32_t *order, Py_ssize_t count,
                              uint8_t *failed, bint outcomes) noexcept nogil:
        """Position of the first record that did not verify, ``count`` when all did, -1 when OpenSSL failed."""
        cdef uint8_t scratch[SMALL + COMMITMENT]
        cdef EVP_CIPHER_CTX *cipher = gcm_new(False)
        cdef Py_ssize_t turn, at, first = count
        cdef uint32_t last = 0
        cdef uint8_t *key
        cdef int status = DONE
        if cipher == NULL:
            return -1
        for turn in range(count):
            at = turn if order == NULL else <Py_ssize_t>order[turn]
            if at > first and not outcomes:
                continue                # one before it has failed already
            key = NULL if turn and items[at].key == last else keys + <Py_ssize_t>items[at].key * KEY
            last = items[at].key
            status = self.open(cipher, key, items + at, scratch)
            if status == BROKEN:
                break
            if status == REFUSED:
                failed[at] = 1
                first = at if at < first else first
        EVP_CIPHER_CTX_free(cipher)
        OPENSSL_cleanse(scratch, SMALL + COMMITMENT)
        return -1 if status == BROKEN else first

    def gather(self, blobs):
        """Collect the middles of a batch: (version, packed middles) if every blob has this head and layout and
        all share one version, else None."""
        cdef list items = blobs if type(blobs) is list else list(blobs)
        cdef Py_ssize_t count = len(items)
        cdef bytes packed = PyBytes_FromStringAndSize(NULL, count * self.middle_size)
        cdef uint8_t *target = <uint8_t *>PyBytes_AS_STRING(packed)
        cdef const uint8_t *first = NULL
        cdef const uint8_t *data = NULL
        cdef Py_ssize_t at
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
            memcpy(target + at * self.middle_size, data + self.head_size + VERSION, <size_t>self.middle_size)
        data = first + self.head_size
        return (<uint32_t>data[0] << 24 | <uint32_t>data[1] << 16 | <uint32_t>data[2] << 8 | data[3]), packed


cdef inline void wipe_scratch(uint8_t *scratch, Py_ssize_t size) noexcept nogil:
    OPENSSL_cleanse(scratch, <size_t>(COMMITMENT + (size if size < SMALL else <Py_ssize_t>SMALL)))


# ---- for test vectors only: nothing in the package calls these ------------------------------------------

def _gcm_seal(bytes key not None, bytes nonce not None, bytes aad not None, bytes plaintext not None):
    """AES-256-GCM with a given nonce and no commitment: ciphertext || tag."""
    cdef bytes output = PyBytes_FromStringAndSize(NULL, len(plaintext) + TAG)
    cdef uint8_t *target = <uint8_t *>PyBytes_AS_STRING(output)
    cdef EVP_CIPHER_CTX *cipher
    cdef int status = BROKEN
    if len(key) != KEY or len(nonce) != NONCE:
        raise invalid_error()("a key has 32 bytes and a nonce 12")
    cipher = gcm_new(True)
    if (cipher != NULL
            and gcm_seal_start(cipher, key, nonce, aad, <int>len(aad)) == DONE
            and gcm_seal_part(cipher, target, plaintext, <int>len(plaintext)) == DONE):
        status = gcm_seal_end(cipher, target + len(plaintext))
    EVP_CIPHER_CTX_free(cipher)
    if status != DONE:
        raise internal_error()("OpenSSL could not encrypt")
    return output


def _gcm_open(bytes key not None, bytes nonce not None, bytes aad not None, bytes ciphertext not None):
    """The inverse of ``_gcm_seal``; None when the tag does not verify."""
    cdef Py_ssize_t size = len(ciphertext) - TAG
    cdef bytes output
    cdef uint8_t *target
    cdef EVP_CIPHER_CTX *cipher
    cdef int status = BROKEN
    if len(key) != KEY or len(nonce) != NONCE:
        raise invalid_error()("a key has 32 bytes and a nonce 12")
    if size < 0:
        return None
    output = PyBytes_FromStringAndSize(NULL, size)
    target = <uint8_t *>PyBytes_AS_STRING(output)
    cipher = gcm_new(False)
    if (cipher != NULL
            and gcm_open_start(cipher, key, nonce, aad, <int>len(aad)) == DONE
            and gcm_open_part(cipher, target, ciphertext, <int>size) == DONE):
        status = gcm_open_end(cipher, <const uint8_t *>PyBytes_AS_STRING(ciphertext) + size)
    EVP_CIPHER_CTX_free(cipher)
    return output if status == DONE else None
