# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True
"""Keys in secret memory, and the handles on them.

Invariant: a key is only ever in its slot; a handle that was wiped, or that another process made, cannot be
used; and a wipe waits for the uses in flight, so that no batch ever runs under a zeroed key.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint32_t
from libc.string cimport memcpy, memset
from posix.unistd cimport read, write

from .arena cimport OK, Slot, arena_lock, arena_unlock, exhausted, fork_count, slot_give, slot_take
from .gcm cimport gcm_make_schedule, gcm_schedule_bytes, random_private, random_public
from .openssl cimport OPENSSL_cleanse

from .arena import secret_memory_info

cdef extern from "unistd.h" nogil:
    int usleep(unsigned int microseconds)

cdef enum:
    NONCES = 340                    # record nonces drawn at a time for single calls
    DRAWN = 65536                   # bytes asked of OpenSSL at a time
    HELD_WHILE = 16384              # so few bytes are drawn sooner than the GIL is had again from another thread

cdef uint8_t[NONCES * NONCE] nonces
cdef int nonces_left = 0
cdef unsigned long nonces_born = 0


# ---- errors, given by the facade because nothing of ours is imported here ---------------------------------

cdef dict errors = {"invalid": ValueError, "limit": ValueError, "decrypt": ValueError,
                    "memory": MemoryError, "internal": RuntimeError, "configuration": RuntimeError}


def install_errors(*, invalid, limit, decrypt, memory, internal, configuration):
    """Set the exception classes that the native layer raises."""
    errors.update(invalid=invalid, limit=limit, decrypt=decrypt, memory=memory, internal=internal,
                  configuration=configuration)


cdef object invalid_error():
    return errors["invalid"]


cdef object limit_error():
    return errors["limit"]


cdef object decrypt_error():
    return errors["decrypt"]


cdef object memory_error():
    return errors["memory"]


cdef object internal_error():
    return errors["internal"]


cdef object configuration_error():
    return errors["configuration"]


# ---- handles -------------------------------------------------------------------------------------------

cdef class Secret:
    """A handle on a slot; the base of the two kinds of key."""

    def __cinit__(self):
        self.slot.data = NULL
        self.closing = 0
        self.uses = 0
        self.born = fork_count()

    cdef int allocate(self, size_t size) except -1:
        if slot_take(&self.slot, size) != OK:
            raise memory_error()(exhausted())
        return 0

    cdef uint8_t *enter(self) except NULL:
        """Begin a use: until ``leave`` the slot stays where it is and unwiped."""
        if self.born != fork_count():
            raise memory_error()("this key belongs to the process before the fork; open it again in this one")
        okc_atomic_add(&self.uses, 1)
        if okc_atomic_get(&self.closing) or self.slot.data == NULL:
            okc_atomic_add(&self.uses, -1)
            raise memory_error()("this key was wiped")
        return self.slot.data

    cdef void leave(self) noexcept nogil:
        okc_atomic_add(&self.uses, -1)

    def wipe(self):
        """Zero the key; refuses new uses first and waits for those in flight. Idempotent."""
        if self.born != fork_count() or okc_atomic_swap(&self.closing, 1):
            return
        if okc_atomic_get(&self.uses):
            with nogil:
                while okc_atomic_get(&self.uses):
                    usleep(20)
        slot_give(&self.slot)

    @property
    def wiped(self):
        """Whether the key is gone: wiped, or left behind by a fork."""
        return self.born != fork_count() or bool(okc_atomic_get(&self.closing))

    def __dealloc__(self):
        if self.born == fork_count() and self.slot.data != NULL:
            slot_give(&self.slot)

    def __reduce_ex__(self, protocol):
        raise TypeError("secret keys cannot be pickled or copied")

    def __copy__(self):
        raise TypeError("secret keys cannot be pickled or copied")

    def __deepcopy__(self, memo):
        raise TypeError("secret keys cannot be pickled or copied")


cdef class SecretKeys(Secret):
    """Data keys, 32 bytes each, side by side in secret memory."""

    def __len__(self):
        return self.count

    def __repr__(self):
        return f"<SecretKeys n={self.count}{' wiped' if self.wiped else ''}>"

    cdef uint8_t *enter_at(self, Py_ssize_t position) except NULL:
        if not 0 <= position < self.count:
            raise invalid_error()("no key at that position")
        return self.enter() + position * KEY

    def select(self, positions):
        """Copy the keys at these positions into a handle of their own."""
        cdef list wanted = list(positions)
        cdef SecretKeys chosen = new_keys(len(wanted))
        cdef uint8_t *source = self.enter()
        cdef Py_ssize_t target = 0
        cdef Py_ssize_t position
        try:
            for position in wanted:
                if not 0 <= position < self.count:
                    raise invalid_error()("no key at that position")
                memcpy(chosen.slot.data + target * KEY, source + position * KEY, KEY)
                target += 1
        finally:
            self.leave()
        return chosen

    def move(self, Py_ssize_t position):
        """Move one key into a handle of its own: where it was is zeroed."""
        cdef SecretKeys moved = new_keys(1)
        cdef uint8_t *source = self.enter_at(position)
        memcpy(moved.slot.data, source, KEY)
        OPENSSL_cleanse(source, KEY)
        self.leave()
        return moved

    def keep(self, Py_ssize_t position):
        """Copy one key into a handle of its own that will be used again and again.

        Where the engine lets us, what it makes of a key lies beside it, so that it is not made again at each use.
        """
        cdef size_t size = gcm_schedule_bytes()
        cdef SecretKeys kept = SecretKeys.__new__(SecretKeys)
        kept.allocate(SCHEDULE + size if size else <size_t>KEY)
        kept.count = 1
        memcpy(kept.slot.data, self.enter_at(position), KEY)
        self.leave()
        if size:
            gcm_make_schedule(kept.slot.data, kept.slot.data + SCHEDULE)
            kept.schedule = kept.slot.data + SCHEDULE
        return kept


cdef class WrappingKey(Secret):
    """A tenant key, service key or seal key: its AES-256 schedule and XAES subkey mask in secret memory."""

    def __repr__(self):
        return f"<WrappingKey{' wiped' if self.wiped else ''}>"


cdef SecretKeys new_keys(Py_ssize_t count):
    if not 1 <= count <= MOST_KEYS:
        raise limit_error()(f"1 to {MOST_KEYS} keys at a time, not {count}")
    cdef SecretKeys keys = SecretKeys.__new__(SecretKeys)
    keys.allocate(<size_t>(count * KEY))
    keys.count = count
    return keys


cdef WrappingKey new_wrapping_key():
    """An empty handle; fill its first 32 bytes, then ``expand`` it."""
    cdef WrappingKey key = WrappingKey.__new__(WrappingKey)
    key.allocate(<size_t>OKC_SCHEDULE_BYTES + 16)
    return key


cdef int expand(WrappingKey key, uint8_t *data) except -1:
    """Make the schedule and, behind it, K1 = doubled AES_K(0) (C2SP XAES-256-GCM) of the key in the slot."""
    cdef uint8_t *mask = data + OKC_SCHEDULE_BYTES
    cdef uint8_t carry = 0
    cdef uint8_t top
    cdef int at
    memset(mask, 0, 16)
    if not okc_aes256_expand(data) or not okc_aes256_block(data, mask, mask):
        raise internal_error()("an AES block could not be computed")
    top = mask[0] >> 7
    for at in range(15, -1, -1):
        carry, mask[at] = <uint8_t>(mask[at] >> 7), <uint8_t>((mask[at] << 1) | carry)
    # Without a branch: the condition is a bit derived from the key.
    mask[15] = <uint8_t>(mask[15] ^ (0x87 & (0 - top)))
    return 0


# ---- making keys ---------------------------------------------------------------------------------------

cdef int random_into(uint8_t *target, size_t size, bint private) noexcept nogil:
    cdef int status = 1
    cdef size_t at = 0
    cdef int part
    while at < size and status == 1:
        part = <int>(size - at if size - at < DRAWN else <size_t>DRAWN)
        status = random_private(target + at, part) if private else random_public(target + at, part)
        at += <size_t>part
    return status


cdef int random_fill(uint8_t *target, size_t size, bint private) except -1:
    cdef int status
    if size <= HELD_WHILE:
        status = random_into(target, size, private)
    else:
        with nogil:
            status = random_into(target, size, private)
    if status != 1:
        raise internal_error()("OpenSSL's random generator failed")
    return 0


def generate_keys(Py_ssize_t count):
    """Draw ``count`` data keys straight into secret memory."""
    cdef SecretKeys keys = new_keys(count)
    random_fill(keys.slot.data, <size_t>(count * KEY), True)
    return keys


def import_keys(data):
    """Copy 32-byte data keys into secret memory; the caller's bytes stay where they are."""
    cdef const uint8_t[::1] view = memoryview(data).cast("B")
    cdef SecretKeys keys
    if view.shape[0] == 0 or view.shape[0] % KEY:
        raise invalid_error()("data keys have 32 bytes each")
    keys = new_keys(view.shape[0] // KEY)
    memcpy(keys.slot.data, &view[0], <size_t>view.shape[0])
    return keys


def generate_wrapping_key():
    """Draw a wrapping key straight into secret memory."""
    cdef WrappingKey key = new_wrapping_key()
    random_fill(key.slot.data, KEY, True)
    expand(key, key.slot.data)
    return key


def import_wrapping_key(data):
    """Copy a 32-byte wrapping key into secret memory; the caller's bytes stay where they are."""
    cdef const uint8_t[::1] view = memoryview(data).cast("B")
    cdef WrappingKey key
    if view.shape[0] != KEY:
        raise invalid_error()("a wrapping key has 32 bytes")
    key = new_wrapping_key()
    memcpy(key.slot.data, &view[0], KEY)
    expand(key, key.slot.data)
    return key


def read_wrapping_key(int descriptor):
    """Read a 32-byte wrapping key from a file descriptor straight into secret memory."""
    cdef WrappingKey key = new_wrapping_key()
    cdef size_t got = 0
    cdef ssize_t part
    while got < KEY:
        with nogil:
            part = read(descriptor, key.slot.data + got, KEY - got)
        if part < 0 and errno == EINTR:
            continue
        if part <= 0:
            raise invalid_error()("the key file holds fewer than 32 bytes")
        got += <size_t>part
    expand(key, key.slot.data)
    return key


def write_wrapping_key(WrappingKey key not None, int descriptor):
    """Write the 32 bytes of a wrapping key from secret memory to a file descriptor."""
    cdef uint8_t *data = key.enter()
    cdef size_t done = 0
    cdef ssize_t part
    try:
        while done < KEY:
            with nogil:
                part = write(descriptor, data + done, KEY - done)
            if part < 0 and errno == EINTR:
                continue
            if part <= 0:
                raise OSError(errno, "the key could not be written")
            done += <size_t>part
    finally:
        key.leave()


def random_bytes(Py_ssize_t size):
    """Draw ``size`` bytes of OpenSSL's randomness; for identifiers, never for keys."""
    if not 0 <= size <= 1 << 24:
        raise limit_error()("at most 16 MiB of randomness at a time")
    cdef bytes result = PyBytes_FromStringAndSize(NULL, size)
    random_fill(<uint8_t *>PyBytes_AS_STRING(result), <size_t>size, False)
    return result


cdef int next_nonce(uint8_t *nonce) noexcept nogil:
    """Hand out one nonce of a supply drawn in bulk; a single RAND call costs as much as a record."""
    global nonces_left, nonces_born
    cdef int status = 1
    arena_lock()
    # What was drawn before a fork is the parent's: both would hand out the same nonces.
    if nonces_left == 0 or nonces_born != fork_count():
        nonces_born = fork_count()
        status = random_public(nonces, NONCES * NONCE)
        nonces_left = NONCES if status == 1 else 0
    if status == 1:
        nonces_left -= 1
        memcpy(nonce, nonces + nonces_left * NONCE, NONCE)
    arena_unlock()
    return status
