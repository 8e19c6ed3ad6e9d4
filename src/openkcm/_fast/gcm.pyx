# SPDX-License-Identifier: Apache-2.0
# cython: language_level=3, freethreading_compatible=True
"""AES-256-GCM (NIST SP 800-38D) by one of two engines: OpenSSL's EVP, or intel-ipsec-mb where it is installed.

Invariant: nothing is sealed or opened before ``choose`` has seen the engine agree with EVP, and EVP with a test
vector of the GCM specification. A cipher belongs to one call on one thread; ending it cleanses the key schedule.
The engine is chosen once, before any key exists.
"""

from libc.stdint cimport uint8_t, uint64_t
from libc.string cimport memcmp, memset

from .openssl cimport *

cdef extern from "engine.h" nogil:
    ctypedef struct Libcrypto "okc_libcrypto":
        const char *OpenSSL_version(int kind) noexcept nogil
        int OPENSSL_init_crypto(uint64_t options, const void *settings) noexcept nogil
        int EVP_default_properties_is_fips_enabled(void *library) noexcept nogil
        EVP_CIPHER *EVP_CIPHER_fetch(void *library, const char *name, const char *properties) noexcept nogil
        EVP_CIPHER_CTX *EVP_CIPHER_CTX_new() noexcept nogil
        void EVP_CIPHER_CTX_free(EVP_CIPHER_CTX *context) noexcept nogil
        int EVP_CIPHER_CTX_get_params(EVP_CIPHER_CTX *context, OSSL_PARAM *params) noexcept nogil
        int EVP_CIPHER_CTX_set_params(EVP_CIPHER_CTX *context, const OSSL_PARAM *params) noexcept nogil
        int EVP_EncryptInit_ex(EVP_CIPHER_CTX *context, const EVP_CIPHER *cipher, void *engine,
                               const unsigned char *key, const unsigned char *nonce) noexcept nogil
        int EVP_EncryptUpdate(EVP_CIPHER_CTX *context, unsigned char *output, int *written,
                              const unsigned char *data, int size) noexcept nogil
        int EVP_EncryptFinal_ex(EVP_CIPHER_CTX *context, unsigned char *output, int *written) noexcept nogil
        int EVP_DecryptInit_ex(EVP_CIPHER_CTX *context, const EVP_CIPHER *cipher, void *engine,
                               const unsigned char *key, const unsigned char *nonce) noexcept nogil
        int EVP_DecryptUpdate(EVP_CIPHER_CTX *context, unsigned char *output, int *written,
                              const unsigned char *data, int size) noexcept nogil
        int EVP_DecryptFinal_ex(EVP_CIPHER_CTX *context, unsigned char *output, int *written) noexcept nogil
        int RAND_bytes(unsigned char *output, int size) noexcept nogil
        int RAND_priv_bytes(unsigned char *output, int size) noexcept nogil

    const Libcrypto okc_linked
    size_t OKC_GCM_STATE_ROOM
    void okc_wipe_stack()
    int okc_vectors()
    void okc_wipe_registers(int vectors)
    const char *okc_load_libcrypto(const char *path, Libcrypto *table)
    const char *okc_libcrypto_file(const Libcrypto *table)
    const char *okc_load_ipsec_mb(Method *kept, Method *brief, const char **version)
    int okc_processor()

cdef enum:
    TAG = 16
    BRIEF_BYTES = 512               # up to here a key for one record is set the cheaper way
    COPIED = 16384                  # ciphertext that EVP is given at a time to decrypt, which the processor still has near

cdef Libcrypto lib = okc_linked
cdef EVP_CIPHER *aes_256_gcm = NULL
cdef Method kept_method
cdef Method brief_method
cdef bint wide = False              # libIPSec_MB is in use
cdef int vectors = okc_vectors()
cdef object chosen = None


# ---- a cipher ------------------------------------------------------------------------------------------

cdef int gcm_begin(Gcm *cipher, bint encrypt, bint brief) noexcept nogil:
    """Make a cipher with no key yet; -1 when memory is short. To be ended in either case."""
    cdef int status
    cipher.method = NULL
    cipher.used = 0
    cipher.evp = NULL
    cipher.encrypt = encrypt
    cipher.brief = brief
    if wide:
        return 1
    cipher.evp = lib.EVP_CIPHER_CTX_new()
    if cipher.evp == NULL:
        return -1
    cipher.tag[0] = OSSL_PARAM_construct_octet_string(OSSL_CIPHER_PARAM_AEAD_TAG, NULL, TAG)
    cipher.tag[1] = OSSL_PARAM_construct_end()
    if encrypt:
        status = lib.EVP_EncryptInit_ex(cipher.evp, aes_256_gcm, NULL, NULL, NULL)
    else:
        status = lib.EVP_DecryptInit_ex(cipher.evp, aes_256_gcm, NULL, NULL, NULL)
    return 1 if status == 1 else -1


cdef int gcm_begin_made(Gcm *cipher, bint encrypt, const uint8_t *schedule) noexcept nogil:
    """Make a cipher with the key of a schedule of ``gcm_make_schedule``, which stays where it is."""
    cipher.method = &kept_method
    cipher.schedule = schedule
    cipher.used = 0
    cipher.evp = NULL
    cipher.encrypt = encrypt
    cipher.brief = False
    return 1


cdef size_t gcm_schedule_bytes() noexcept nogil:
    return kept_method.key_bytes if wide else 0


cdef void gcm_make_schedule(const uint8_t *key, uint8_t *schedule) noexcept nogil:
    kept_method.pre(key, schedule)
    okc_wipe_registers(vectors)


cdef void gcm_end(Gcm *cipher) noexcept nogil:
    """Cleanse the schedule and what is left of the last record, here and where the engine worked."""
    if cipher.method != NULL:
        okc_wipe(cipher.key, cipher.used)
        okc_wipe(cipher.state, OKC_GCM_STATE_ROOM)
        cipher.method = NULL
    if cipher.evp != NULL:
        lib.EVP_CIPHER_CTX_free(cipher.evp)
        cipher.evp = NULL
        okc_wipe_stack()            # libIPSec_MB does so itself, and is not used if it does not
    okc_wipe_registers(vectors)


cdef inline bint set_key(Gcm *cipher, const uint8_t *key, bint brief) noexcept nogil:
    """Whether a key is set now."""
    if key != NULL:
        cipher.method = &brief_method if brief else &kept_method
        cipher.used = cipher.method.key_bytes if cipher.method.key_bytes > cipher.used else cipher.used
        cipher.method.pre(key, cipher.key)
        cipher.schedule = cipher.key
    return cipher.method != NULL


cdef int gcm_seal(Gcm *cipher, const uint8_t *key, const uint8_t *nonce, const uint8_t *aad, int aad_size,
                  uint8_t *output, const uint8_t *data, int size, uint8_t *tag) noexcept nogil:
    if cipher.evp == NULL:
        if not set_key(cipher, key, cipher.brief and size <= BRIEF_BYTES):
            return -1
        cipher.method.enc(cipher.schedule, cipher.state, output, data, <uint64_t>size, nonce, aad,
                          <uint64_t>aad_size, tag, TAG)
        return 1
    if gcm_start(cipher, key, nonce, aad, aad_size) != 1 or evp_seal_part(cipher, output, data, size) != 1:
        return -1
    return gcm_seal_end(cipher, tag)


cdef int gcm_open(Gcm *cipher, const uint8_t *key, const uint8_t *nonce, const uint8_t *aad, int aad_size,
                  uint8_t *output, const uint8_t *data, int size, const uint8_t *tag) noexcept nogil:
    cdef uint8_t computed[TAG]
    if cipher.evp == NULL:
        if not set_key(cipher, key, cipher.brief and size <= BRIEF_BYTES):
            return -1
        okc_spoil(computed, tag)
        cipher.method.dec(cipher.schedule, cipher.state, output, data, <uint64_t>size, nonce, aad,
                          <uint64_t>aad_size, computed, TAG)
        return okc_same_tag(computed, tag)
    if gcm_start(cipher, key, nonce, aad, aad_size) != 1 or evp_open_part(cipher, output, data, size) != 1:
        return -1
    return gcm_open_end(cipher, tag)


cdef int gcm_start(Gcm *cipher, const uint8_t *key, const uint8_t *nonce, const uint8_t *aad,
                   int aad_size) noexcept nogil:
    cdef int written
    if cipher.evp == NULL:
        if not set_key(cipher, key, False):
            return -1
        cipher.method.init(cipher.schedule, cipher.state, nonce, aad, <uint64_t>aad_size)
        return 1
    if cipher.encrypt:
        if lib.EVP_EncryptInit_ex(cipher.evp, NULL, NULL, key, nonce) != 1:
            return -1
        if aad_size and lib.EVP_EncryptUpdate(cipher.evp, NULL, &written, aad, aad_size) != 1:
            return -1
    else:
        if lib.EVP_DecryptInit_ex(cipher.evp, NULL, NULL, key, nonce) != 1:
            return -1
        if aad_size and lib.EVP_DecryptUpdate(cipher.evp, NULL, &written, aad, aad_size) != 1:
            return -1
    return 1


cdef int gcm_part(Gcm *cipher, uint8_t *output, const uint8_t *data, int size) noexcept nogil:
    if cipher.evp != NULL:
        if cipher.encrypt:
            return evp_seal_part(cipher, output, data, size)
        return evp_open_part(cipher, output, data, size)
    if size == 0:
        return 1
    if cipher.encrypt:
        cipher.method.enc_update(cipher.schedule, cipher.state, output, data, <uint64_t>size)
    else:
        cipher.method.dec_update(cipher.schedule, cipher.state, output, data, <uint64_t>size)
    return 1


cdef inline int evp_seal_part(Gcm *cipher, uint8_t *output, const uint8_t *data, int size) noexcept nogil:
    cdef int written
    return 1 if size == 0 or lib.EVP_EncryptUpdate(cipher.evp, output, &written, data, size) == 1 else -1


cdef int evp_open_part(Gcm *cipher, uint8_t *output, const uint8_t *data, int size) noexcept nogil:
    """Decrypt by EVP, which may read a ciphertext twice: for the tag, and for the plaintext.

    What lies in a caller's buffer may be changed in between, and then something would come out that did not verify. So
    it is read once, to where the plaintext goes. libIPSec_MB reads each block once itself.
    """
    cdef int written, step
    while size > 0:
        step = size if size < COPIED else COPIED
        if output != data:
            okc_copy(output, data, <size_t>step)
        if lib.EVP_DecryptUpdate(cipher.evp, output, &written, output, step) != 1:
            return -1
        output += step
        data += step
        size -= step
    return 1


cdef int gcm_seal_end(Gcm *cipher, uint8_t *tag) noexcept nogil:
    cdef int written
    if cipher.evp == NULL:
        cipher.method.enc_end(cipher.schedule, cipher.state, tag, TAG)
        return 1
    if lib.EVP_EncryptFinal_ex(cipher.evp, tag, &written) != 1:
        return -1
    # Asking the provider itself, in words that are there already, is cheaper than the control call that makes them.
    cipher.tag[0].data = tag
    return 1 if lib.EVP_CIPHER_CTX_get_params(cipher.evp, cipher.tag) == 1 else -1


cdef int gcm_open_end(Gcm *cipher, const uint8_t *tag) noexcept nogil:
    cdef int written
    cdef uint8_t computed[TAG]
    if cipher.evp == NULL:
        okc_spoil(computed, tag)
        cipher.method.dec_end(cipher.schedule, cipher.state, computed, TAG)
        return okc_same_tag(computed, tag)
    cipher.tag[0].data = <void *>tag
    if lib.EVP_CIPHER_CTX_set_params(cipher.evp, cipher.tag) != 1:
        return -1
    return 1 if lib.EVP_DecryptFinal_ex(cipher.evp, computed, &written) == 1 else 0


cdef int random_public(uint8_t *output, int size) noexcept nogil:
    return lib.RAND_bytes(output, size)


cdef int random_private(uint8_t *output, int size) noexcept nogil:
    return lib.RAND_priv_bytes(output, size)


cdef const void *libcrypto() noexcept nogil:
    return &lib


cdef void forget() noexcept nogil:
    """Wipe what libcrypto's functions left on the stack below the caller, and in vector registers."""
    okc_wipe_stack()
    okc_wipe_registers(vectors)


# ---- choosing ------------------------------------------------------------------------------------------

def choose(str engine, str libcrypto):
    """Choose what does AES-256-GCM: once, before any key exists.

    Args:
        engine: "evp", "ipsec-mb", or nothing: the second where it can be used, else the first. Who names a libcrypto,
            or has OpenSSL keep to FIPS 140, wants AES done by that one: there nothing means "evp".
        libcrypto: the path of the libcrypto.so.3 to use instead of the one that is linked, or nothing.

    Returns:
        A dict of ``engine`` (what is in use), ``why``, ``openssl`` (its version and file), ``modern`` (whether
        the processor has VAES and AVX-512, which OpenSSL uses from 3.2 on).

    Raises:
        ValueError: what was asked for cannot be had, or OpenSSL does not compute AES-256-GCM.
    """
    global wide, chosen
    cdef const char *problem
    cdef const char *version = NULL
    cdef str why
    if chosen is not None:
        return chosen
    use_libcrypto(libcrypto)
    if engine == "evp":
        why = "OPENKCM_AES asks for it"
    elif not engine and libcrypto:
        why = "OPENKCM_LIBCRYPTO names it"
    elif not engine and lib.EVP_default_properties_is_fips_enabled(NULL) == 1:
        why = "OpenSSL's configuration asks for FIPS 140"
    else:
        problem = okc_load_ipsec_mb(&kept_method, &brief_method, &version)
        why = None if problem == NULL else problem.decode()
        if why is None and not agrees_with_evp():
            why = "this libIPSec_MB disagrees with OpenSSL"
        if why is None:
            wide = True
        elif engine == "ipsec-mb":
            raise ValueError(f"OPENKCM_AES asks for ipsec-mb, but {why}")
    chosen = {
        "engine": f"intel-ipsec-mb {version.decode()}" if wide else "EVP",
        "why": "it agrees with OpenSSL, and is the fastest here" if wide else why,
        "openssl": lib.OpenSSL_version(OPENSSL_VERSION).decode(),
        "file": (okc_libcrypto_file(&lib) or b"").decode(),
        "modern": okc_processor() == 2,
    }
    return chosen


cdef int use_libcrypto(str path) except -1:
    global lib, aes_256_gcm
    cdef Libcrypto pinned
    cdef const char *problem
    if path:
        problem = okc_load_libcrypto(path.encode(), &pinned)
        if problem != NULL:
            raise ValueError(f"OPENKCM_LIBCRYPTO names a library that cannot be used: {problem.decode()}")
        lib = pinned
    # Before the first fetch, which would read the configuration only after looking at the default properties.
    if lib.OPENSSL_init_crypto(OPENSSL_INIT_LOAD_CONFIG, NULL) != 1:
        raise ValueError("OpenSSL cannot be initialised with its configuration (OPENSSL_CONF)")
    aes_256_gcm = lib.EVP_CIPHER_fetch(NULL, b"AES-256-GCM", NULL)
    if aes_256_gcm == NULL:
        raise ValueError("OpenSSL offers no AES-256-GCM as it is configured here")
    if not knows_the_vector():
        raise ValueError("this OpenSSL does not compute AES-256-GCM")
    return 0


cdef bint knows_the_vector() except -1:
    """Test case 16 of the GCM specification (McGrew and Viega, 2005), sealed by the engine in use."""
    cdef bytes key = bytes.fromhex("feffe9928665731c6d6a8f9467308308") * 2
    cdef bytes nonce = bytes.fromhex("cafebabefacedbaddecaf888")
    cdef bytes aad = bytes.fromhex("feedfacedeadbeeffeedfacedeadbeefabaddad2")
    cdef bytes plain = bytes.fromhex(
        "d9313225f88406e5a55909c5aff5269a86a7a9531534f7da2e4c303d8a318a72"
        "1c3c0c95956809532fcf0e2449a6b525b16aedf5aa0de657ba637b39")
    cdef bytes wanted = bytes.fromhex("76fc6ece0f4e1768cddf8853bb2d551b")
    cdef uint8_t output[64]
    cdef uint8_t tag[TAG]
    cdef Gcm cipher
    cdef int status = gcm_begin(&cipher, True, True)
    if status == 1:
        status = gcm_seal(&cipher, key, nonce, aad, <int>len(aad), output, plain, <int>len(plain), tag)
    gcm_end(&cipher)
    return status == 1 and memcmp(tag, <const uint8_t *>wanted, TAG) == 0


cdef bint agrees_with_evp() except -1:
    """Seal and open records of many sizes on both engines, in one call and in parts, with keys kept and brief."""
    global wide
    cdef bytearray data = bytearray(range(256)) * 9
    cdef bytearray first = bytearray(2400)
    cdef bytearray second = bytearray(2400)
    cdef int size, aad_size, brief
    cdef bint agreed = True
    for size, aad_size in ((1, 0), (15, 1), (16, 16), (32, 20), (33, 100), (96, 48), (127, 17), (128, 64), (129, 0),
                           (255, 31), (257, 200), (512, 128), (513, 129), (767, 5), (1024, 300), (2049, 512), (2304, 0)):
        for brief in range(2):
            wide = False
            agreed = agreed and exercise(data, size, aad_size, brief, first)
            wide = True
            agreed = agreed and exercise(data, size, aad_size, brief, second)
            agreed = agreed and first == second
    wide = False
    return agreed


cdef bint exercise(bytearray data, int size, int aad_size, bint brief, bytearray output) except -1:
    """Seal into ``output`` (ciphertext, tag) and open it again: whole, in parts, and with another tag."""
    cdef uint8_t *source = <uint8_t *>data
    cdef uint8_t *target = <uint8_t *>output
    cdef uint8_t *tag = target + size
    cdef uint8_t again[2400]
    cdef uint8_t other[TAG]
    cdef Gcm cipher
    cdef int half = (size >> 1) & ~15
    cdef bint good
    memset(target, 0, 2400)
    good = gcm_begin(&cipher, True, brief) == 1
    good = good and gcm_seal(&cipher, source + 7, source + 1, source + 3, aad_size, target, source, size, tag) == 1
    # The same record in parts, under the key that is set.
    good = good and gcm_start(&cipher, NULL, source + 1, source + 3, aad_size) == 1
    good = good and gcm_part(&cipher, again, source, half) == 1
    good = good and gcm_part(&cipher, again + half, source + half, size - half) == 1
    good = good and gcm_seal_end(&cipher, other) == 1
    good = good and memcmp(again, target, <size_t>size) == 0 and memcmp(other, tag, TAG) == 0
    gcm_end(&cipher)
    good = gcm_begin(&cipher, False, brief) == 1 and good
    good = good and gcm_open(&cipher, source + 7, source + 1, source + 3, aad_size, again, target, size, tag) == 1
    good = good and memcmp(again, source, <size_t>size) == 0
    good = good and gcm_start(&cipher, source + 7, source + 1, source + 3, aad_size) == 1
    good = good and gcm_part(&cipher, again, target, half) == 1
    good = good and gcm_part(&cipher, again + half, target + half, size - half) == 1
    good = good and gcm_open_end(&cipher, tag) == 1 and memcmp(again, source, <size_t>size) == 0
    other[0] ^= 1
    good = good and gcm_open(&cipher, NULL, source + 1, source + 3, aad_size, again, target, size, other) == 0
    gcm_end(&cipher)
    return good
