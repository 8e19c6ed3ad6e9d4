# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True
"""Locked regions, and the slots in them.

Invariant: a slot is inside a locked region, between two guard pages and two canaries, out of core dumps
and out of forked children, and it is zeroed before its place is given to another. A region is
memfd_secret where the kernel has it, otherwise mmap and mlock; there is no third way.
"""

from libc.errno cimport EACCES, EMFILE, ENFILE, ENOSYS, EPERM, errno
from libc.stdint cimport uint8_t
from libc.stdlib cimport abort, calloc, free
from libc.stdio cimport fprintf, stderr
from libc.string cimport memcpy
from posix.unistd cimport close, ftruncate

from .openssl cimport CRYPTO_memcmp, OPENSSL_cleanse, RAND_bytes

cdef extern from "sys/mman.h" nogil:
    void *mmap(void *address, size_t size, int protection, int flags, int descriptor, long offset)
    int munmap(void *address, size_t size)
    int mlock(const void *address, size_t size)
    int madvise(void *address, size_t size, int advice)
    int mprotect(void *address, size_t size, int protection)
    enum:
        PROT_NONE
        PROT_READ
        PROT_WRITE
        MAP_PRIVATE
        MAP_SHARED
        MAP_ANONYMOUS
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


# ---- regions -------------------------------------------------------------------------------------------

cdef uint8_t *map_secret_file(size_t size) noexcept nogil:
    """Map a memfd_secret of ``size`` bytes; NULL when that cannot be done, or the kernel has none."""
    global secret_files, last_errno
    cdef long descriptor = syscall(SYS_memfd_secret, O_CLOEXEC)
    cdef void *mapped = MAP_FAILED
    last_errno = errno
    if descriptor < 0:
        # Not there, or forbidden by a container. Anything else (no file handle, no memory) is exhaustion.
        if secret_files == -1 and (last_errno == ENOSYS or last_errno == EPERM or last_errno == EACCES):
            secret_files = 0
        return NULL
    secret_files = 1
    if ftruncate(<int>descriptor, <long>size) == 0:
        mapped = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_SHARED, <int>descriptor, 0)
    last_errno = errno
    # Closed at once: a child or another thread that holds the descriptor could map the keys.
    close(<int>descriptor)
    return NULL if mapped == MAP_FAILED else <uint8_t *>mapped


cdef uint8_t *map_locked(size_t size) noexcept nogil:
    """Map ``size`` bytes of locked pages; NULL when they cannot be had.

    Never over a reservation (MAP_FIXED): where that fails the kernel may leave a hole that another thread's
    mapping falls into, and unmapping the rest would then take that thread's memory away.
    """
    global last_errno
    cdef void *mapped
    if secret_files != 0:
        mapped = map_secret_file(size)
        if secret_files != 0:
            return <uint8_t *>mapped
    mapped = mmap(NULL, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0)
    if mapped == MAP_FAILED:
        last_errno = errno
        return NULL
    if mlock(mapped, size) != 0:
        last_errno = errno
        munmap(mapped, size)
        return NULL
    return <uint8_t *>mapped


cdef int protect(uint8_t *mapping, size_t size) noexcept nogil:
    """Make the outer pages guards, and keep the whole out of core dumps and forked children."""
    return (mprotect(mapping, page, PROT_NONE) == 0
            and mprotect(mapping + size - page, page, PROT_NONE) == 0
            and madvise(mapping, size, MADV_DONTDUMP) == 0
            and madvise(mapping, size, MADV_DONTFORK) == 0)


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
    region.mapping = map_locked(region.mapped) if region.taken != NULL else NULL
    if region.mapping == NULL or not protect(region.mapping, region.mapped):
        if region.mapping != NULL:
            last_errno = errno
            munmap(region.mapping, region.mapped)
        free(region.taken)
        free(region)
        return NULL
    region.start = region.mapping + page
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
    """Forget the parent's regions, which are not mapped here."""
    global regions, locked_bytes, idle_bytes, live_slots, forks
    pthread_mutex_init(&lock, NULL)
    regions = NULL                  # the parent's bookkeeping is leaked: handles still point into it
    locked_bytes = 0
    idle_bytes = 0
    live_slots = 0
    forks += 1


cdef void at_exit() noexcept nogil:
    # No lock: a thread that was stopped inside the allocator must not keep the keys from being zeroed.
    cdef Region *region = regions
    while region != NULL:
        OPENSSL_cleanse(region.start, region.granules * GRANULE)
        region = region.next


cdef void arena_lock() noexcept nogil:
    pthread_mutex_lock(&lock)


cdef void arena_unlock() noexcept nogil:
    pthread_mutex_unlock(&lock)


cdef str exhausted():
    """Say why no slot was to be had, and what to do."""
    if last_errno == EMFILE or last_errno == ENFILE:
        return (
            "no file handle was left to map memory for keys (RLIMIT_NOFILE); close files, or raise it with "
            "'ulimit -n' or LimitNOFILE= in a systemd unit"
        )
    limit = secret_memory_info()["limit_bytes"]
    allowed = "no limit is set" if limit is None else f"the limit (RLIMIT_MEMLOCK) is {limit // 1024} KiB"
    return (
        f"no more memory could be locked for keys (errno {last_errno}): {locked_bytes // 1024} KiB are locked and "
        f"{allowed}. Raise it with 'ulimit -l', LimitMEMLOCK= in a systemd unit or --ulimit memlock= of a container"
    )


def secret_memory_info():
    """Tell which protection is in force, and how much is locked and in use (bytes)."""
    cdef rlimit limits
    cdef Slot probe
    if secret_files == -1 and slot_take(&probe, CANARY) == OK:
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
    if RAND_bytes(canary, CANARY) != 1:
        raise ImportError("OpenSSL's random generator failed")
    if pthread_atfork(before_fork, after_fork_parent, after_fork_child) != 0 or atexit(at_exit) != 0:
        raise ImportError("the secret memory could not register its fork and exit handlers")
    return 0


start()
