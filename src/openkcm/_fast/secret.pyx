# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True
"""Secret memory: the only place where keys rest.

Invariant: a key is inside a locked region, between two guard pages and two canaries, out of core dumps and
out of forked children; it is zeroed before its place is given to another; and a handle that was wiped, or
that another process made, cannot be used. A region is memfd_secret where the kernel has it, otherwise
mmap and mlock. Nothing is ever put into unlocked memory instead.
"""

from cpython.bytes cimport PyBytes_AS_STRING, PyBytes_FromStringAndSize
from libc.errno cimport EINTR, errno
from libc.stdint cimport uint8_t, uint32_t, uintptr_t
from libc.stdlib cimport abort, calloc, free
from libc.stdio cimport fprintf, stderr
from libc.string cimport memcpy, memset
from posix.unistd cimport close, ftruncate, read, write

from .openssl cimport CRYPTO_memcmp, OPENSSL_cleanse, RAND_bytes, RAND_priv_bytes

cdef extern from "sys/mman.h" nogil:
    void *mmap(void *address, size_t size, int protection, int flags, int descriptor, long offset)
    int munmap(void *address, size_t size)
    int mlock(const void *address, size_t size)
    int madvise(void *address, size_t size, int advice)
    enum:
        PROT_NONE
        PROT_READ
        PROT_WRITE
        MAP_PRIVATE
        MAP_SHARED
        MAP_ANONYMOUS
        MAP_FIXED
        MADV_DONTDUMP
        MADV_DONTFORK
    void *MAP_FAILED

cdef extern from "sys/syscall.h" nogil:
    """
    #ifndef SYS_memfd_secret
    #define SYS_memfd_secret 447
    #endif
    """
    enum:
        SYS_memfd_secret

cdef extern from "sys/resource.h" nogil:
    ctypedef unsigned long rlim_t
    struct rlimit:
        rlim_t rlim_cur
        rlim_t rlim_max
    int getrlimit(int resource, rlimit *limits)
    enum:
        RLIMIT_MEMLOCK
    rlim_t RLIM_INFINITY

cdef extern from "unistd.h" nogil:
    long syscall(long number, ...)
    int usleep(unsigned int microseconds)
    long sysconf(int name)
    enum:
        _SC_PAGESIZE

cdef extern from "fcntl.h" nogil:
    enum:
        O_CLOEXEC

cdef extern from "stdlib.h" nogil:
    int atexit(void (*function)() noexcept nogil)

cdef extern from "pthread.h" nogil:
    ctypedef struct pthread_mutex_t:
        pass
    int pthread_mutex_init(pthread_mutex_t *mutex, void *attributes)
    int pthread_mutex_lock(pthread_mutex_t *mutex)
    int pthread_mutex_unlock(pthread_mutex_t *mutex)
    int pthread_atfork(void (*prepare)() noexcept nogil, void (*parent)() noexcept nogil,
                       void (*child)() noexcept nogil)

cdef enum:
    GRANULE = 64                    # a lone data key with its canaries
    CANARY = 16
    REGION = 256 * 1024             # small enough for the usual 8 MiB RLIMIT_MEMLOCK, large enough to share
    KEEP = 1024 * 1024              # free locked memory kept for reuse; mapping it costs far more than a batch
    NONCES = 340                    # record nonces drawn at a time for single calls
    MOST_KEYS = 16384

cdef enum:
    OK = 0
    NO_MEMORY = 1
    NO_RANDOM = 2

cdef pthread_mutex_t lock
cdef Region *regions = NULL
cdef size_t locked_bytes = 0
cdef size_t idle_bytes = 0
cdef size_t live_slots = 0
cdef uint8_t canary[CANARY]
cdef size_t page = 0
cdef int secret_files = -1          # memfd_secret: -1 not tried, 0 the kernel has none, 1 in use
cdef int last_errno = 0
cdef unsigned long forks = 0
cdef uint8_t nonces[NONCES * NONCE]
cdef int nonces_left = 0


# ---- regions -------------------------------------------------------------------------------------------

cdef int map_pages(uint8_t *place, size_t size) noexcept nogil:
    """Put locked pages over the reservation at ``place``."""
    global secret_files, last_errno
    cdef long descriptor
    cdef void *mapped
    if secret_files != 0:
        descriptor = syscall(SYS_memfd_secret, O_CLOEXEC)
        if descriptor >= 0:
            secret_files = 1
            mapped = MAP_FAILED
            if ftruncate(<int>descriptor, <long>size) == 0:
                mapped = mmap(place, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, <int>descriptor, 0)
            last_errno = errno
            # Closed at once: a child or another thread that holds the descriptor could map the keys.
            close(<int>descriptor)
            return mapped != MAP_FAILED
        last_errno = errno
        if secret_files == 1:
            return 0                # it worked before, so this is exhaustion and not an old kernel
        secret_files = 0
    mapped = mmap(place, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED, -1, 0)
    if mapped == MAP_FAILED or mlock(place, size) != 0:
        last_errno = errno
        return 0
    return 1


cdef Region *region_map(size_t size) noexcept nogil:
    """Map a region of at least ``size`` usable bytes between two guard pages; NULL when it cannot be locked."""
    global locked_bytes, idle_bytes, regions, last_errno
    cdef size_t usable = ((size if size > REGION else <size_t>REGION) + page - 1) // page * page
    cdef Region *region = <Region *>calloc(1, sizeof(Region))
    if region == NULL:
        return NULL
    region.granules = usable // GRANULE
    region.taken = <uint8_t *>calloc(region.granules, 1)
    region.mapped = usable + 2 * page
    region.mapping = <uint8_t *>mmap(NULL, region.mapped, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if <void *>region.mapping == MAP_FAILED or region.taken == NULL:
        last_errno = errno
        if <void *>region.mapping != MAP_FAILED:
            munmap(region.mapping, region.mapped)
        free(region.taken)
        free(region)
        return NULL
    region.start = region.mapping + page
    if (not map_pages(region.start, usable)
            or madvise(region.start, usable, MADV_DONTDUMP) != 0
            or madvise(region.start, usable, MADV_DONTFORK) != 0):
        munmap(region.mapping, region.mapped)
        free(region.taken)
        free(region)
        return NULL
    region.available = region.granules
    region.next = regions
    regions = region
    locked_bytes += usable
    idle_bytes += usable
    return region


cdef void region_unmap(Region *region) noexcept nogil:
    """Unlink and unmap a region that holds nothing."""
    global locked_bytes, idle_bytes, regions
    cdef Region **link = &regions
    while link[0] != region:
        link = &link[0].next
    link[0] = region.next
    locked_bytes -= region.granules * GRANULE
    idle_bytes -= region.granules * GRANULE
    munmap(region.mapping, region.mapped)
    free(region.taken)
    free(region)


cdef void release_idle(size_t keep) noexcept nogil:
    """Unmap wholly free regions until at most ``keep`` free bytes are in such regions."""
    cdef Region *region = regions
    cdef Region *following
    while region != NULL and idle_bytes > keep:
        following = region.next
        if region.available == region.granules:
            region_unmap(region)
        region = following


cdef Py_ssize_t find_run(Region *region, size_t wanted) noexcept nogil:
    """First fit from the hint on, then from the start; -1 when no run is long enough."""
    cdef size_t run = 0
    cdef size_t at
    cdef size_t start = region.hint
    cdef int half
    for half in range(2):
        run = 0
        for at in range(start, region.granules):
            run = 0 if region.taken[at] else run + 1
            if run == wanted:
                return <Py_ssize_t>(at + 1 - wanted)
        if start == 0:
            return -1
        start = 0
    return -1


# ---- slots ---------------------------------------------------------------------------------------------

cdef int slot_place(Slot *slot, Region *region, size_t wanted, size_t size) noexcept nogil:
    global idle_bytes, live_slots
    cdef Py_ssize_t at
    cdef uint8_t *start
    cdef size_t index
    if region.available < wanted:
        return 0
    at = find_run(region, wanted)
    if at < 0:
        return 0
    if region.available == region.granules:
        idle_bytes -= region.granules * GRANULE
    for index in range(<size_t>at, <size_t>at + wanted):
        region.taken[index] = 1
    region.available -= wanted
    region.hint = <size_t>at + wanted if region.available else 0
    start = region.start + <size_t>at * GRANULE
    memcpy(start, canary, CANARY)
    memcpy(start + wanted * GRANULE - CANARY, canary, CANARY)
    slot.region = region
    slot.data = start + CANARY
    slot.size = size
    live_slots += 1
    return 1


cdef int slot_take(Slot *slot, size_t size) noexcept nogil:
    """Take a zeroed slot of ``size`` bytes, aligned to 16; returns OK or NO_MEMORY."""
    cdef size_t wanted = (size + 2 * CANARY + GRANULE - 1) // GRANULE
    cdef Region *region
    cdef int done = 0
    pthread_mutex_lock(&lock)
    region = regions
    while region != NULL and not done:
        done = slot_place(slot, region, wanted, size)
        region = region.next
    if not done:
        region = region_map(wanted * GRANULE)
        if region == NULL:
            release_idle(0)
            region = region_map(wanted * GRANULE)
        if region != NULL:
            done = slot_place(slot, region, wanted, size)
    pthread_mutex_unlock(&lock)
    return OK if done else NO_MEMORY


cdef void slot_give(Slot *slot) noexcept nogil:
    """Check the canaries, zero the slot and give it back; a damaged canary ends the process."""
    global idle_bytes, live_slots
    cdef Region *region = slot.region
    cdef uint8_t *start
    cdef size_t wanted, first, index
    if slot.data == NULL:
        return
    wanted = (slot.size + 2 * CANARY + GRANULE - 1) // GRANULE
    start = slot.data - CANARY
    if (CRYPTO_memcmp(start, canary, CANARY) != 0
            or CRYPTO_memcmp(start + wanted * GRANULE - CANARY, canary, CANARY) != 0):
        # Somebody wrote past a key. There is no safe way on: keys may be damaged or exposed.
        fprintf(stderr, b"openkcm: secret memory was overwritten; aborting\n")
        abort()
    OPENSSL_cleanse(start, wanted * GRANULE)
    slot.data = NULL
    pthread_mutex_lock(&lock)
    first = <size_t>(start - region.start) // GRANULE
    for index in range(first, first + wanted):
        region.taken[index] = 0
    region.available += wanted
    if first < region.hint:
        region.hint = first
    live_slots -= 1
    if region.available == region.granules:
        idle_bytes += region.granules * GRANULE
        release_idle(KEEP)
    pthread_mutex_unlock(&lock)


# ---- fork and exit -------------------------------------------------------------------------------------

cdef unsigned long fork_count() noexcept nogil:
    return forks


cdef void before_fork() noexcept nogil:
    pthread_mutex_lock(&lock)


cdef void after_fork_parent() noexcept nogil:
    pthread_mutex_unlock(&lock)


cdef void after_fork_child() noexcept nogil:
    """Forget the parent's regions, which are not mapped here, and every nonce drawn before the fork."""
    global regions, locked_bytes, idle_bytes, live_slots, forks, nonces_left
    pthread_mutex_init(&lock, NULL)
    regions = NULL                  # the parent's bookkeeping is leaked: handles still point into it
    locked_bytes = 0
    idle_bytes = 0
    live_slots = 0
    nonces_left = 0
    forks += 1


cdef void at_exit() noexcept nogil:
    # No lock: a thread that was stopped inside the allocator must not keep the keys from being zeroed.
    cdef Region *region = regions
    while region != NULL:
        OPENSSL_cleanse(region.start, region.granules * GRANULE)
        region = region.next


# ---- errors, given by the facade because nothing of ours is imported here ---------------------------------

cdef dict errors = {"invalid": ValueError, "limit": ValueError, "decrypt": ValueError,
                    "memory": MemoryError, "internal": RuntimeError}


def install_errors(*, invalid, limit, decrypt, memory, internal):
    """Set the exception classes that the native layer raises."""
    errors.update(invalid=invalid, limit=limit, decrypt=decrypt, memory=memory, internal=internal)


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


def _no_memory():
    limit = secret_memory_info()["limit_bytes"]
    allowed = "no limit is set" if limit is None else f"the limit (RLIMIT_MEMLOCK) is {limit // 1024} KiB"
    return memory_error()(
        f"no more memory could be locked for keys (errno {last_errno}): {locked_bytes // 1024} KiB are locked and "
        f"{allowed}. Raise it with 'ulimit -l', LimitMEMLOCK= in a systemd unit or --ulimit memlock= of a container"
    )


# ---- handles -------------------------------------------------------------------------------------------

cdef class Secret:
    """A handle on a slot; the base of the two kinds of key."""

    def __cinit__(self):
        self.slot.data = NULL
        self.closing = 0
        self.uses = 0
        self.born = forks

    cdef int allocate(self, size_t size) except -1:
        if slot_take(&self.slot, size) != OK:
            raise _no_memory()
        return 0

    cdef uint8_t *enter(self) except NULL:
        """Begin a use: until ``leave`` the slot stays where it is and unwiped."""
        if self.born != forks:
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
        if self.born != forks or okc_atomic_swap(&self.closing, 1):
            return
        if okc_atomic_get(&self.uses):
            with nogil:
                while okc_atomic_get(&self.uses):
                    usleep(20)
        slot_give(&self.slot)

    @property
    def wiped(self):
        """Whether the key is gone: wiped, or left behind by a fork."""
        return self.born != forks or bool(okc_atomic_get(&self.closing))

    def __dealloc__(self):
        if self.born == forks and self.slot.data != NULL:
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
        carry, mask[at] = mask[at] >> 7, <uint8_t>((mask[at] << 1) | carry)
    # Without a branch: the condition is a bit derived from the key.
    mask[15] ^= <uint8_t>(0x87 & (0 - top))
    return 0


# ---- making keys ---------------------------------------------------------------------------------------

cdef int random_fill(uint8_t *target, size_t size, bint private) except -1:
    cdef int status = 1
    cdef size_t at = 0
    cdef int part
    with nogil:
        while at < size and status == 1:
            part = <int>(size - at if size - at < 65536 else <size_t>65536)
            status = RAND_priv_bytes(target + at, part) if private else RAND_bytes(target + at, part)
            at += <size_t>part
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
    global nonces_left
    cdef int status = 1
    pthread_mutex_lock(&lock)
    if nonces_left == 0:
        status = RAND_bytes(nonces, NONCES * NONCE)
        nonces_left = NONCES if status == 1 else 0
    if status == 1:
        nonces_left -= 1
        memcpy(nonce, nonces + nonces_left * NONCE, NONCE)
    pthread_mutex_unlock(&lock)
    return status


def secret_memory_info():
    """Tell which protection is in force, and how much is locked and in use (bytes)."""
    cdef rlimit limits
    cdef Slot probe
    if secret_files == -1 and slot_take(&probe, KEY) == OK:
        slot_give(&probe)
    limit = None
    if getrlimit(RLIMIT_MEMLOCK, &limits) == 0 and limits.rlim_cur != RLIM_INFINITY:
        limit = limits.rlim_cur
    return {
        "kind": "memfd_secret" if secret_files == 1 else "mlock",
        "locked_bytes": locked_bytes,
        "idle_bytes": idle_bytes,
        "handles": live_slots,
        "limit_bytes": limit,
    }


cdef int start() except -1:
    global page
    page = <size_t>sysconf(_SC_PAGESIZE)
    pthread_mutex_init(&lock, NULL)
    random_fill(canary, CANARY, False)
    if pthread_atfork(before_fork, after_fork_parent, after_fork_child) != 0 or atexit(at_exit) != 0:
        raise ImportError("the secret memory could not register its fork and exit handlers")
    return 0


start()
