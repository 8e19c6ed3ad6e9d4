/* SPDX-License-Identifier: Apache-2.0 */
/* A PKCS#11 module for tests that passes every call on to a real one, and does as it is told on the way.
 *
 * It is told by C functions, which ctypes finds in the same library:
 *
 *   shim_answer(function, code, which)  of the next 64 calls of a function, by its place in CK_FUNCTION_LIST, those
 *                                       whose bit is set return a code; with all bits set every call
 *   shim_flags(set)                     further flags of every token
 *   shim_calls(function)                how often a function was called
 *   shim_rename(from, to)               offer a mechanism under another number
 *   shim_longer(bytes)                  what is encrypted comes out longer, as with a nonce of the token's own
 *   shim_hang(function, on)             a function returns only when it is told to
 *
 * SHIM_MODULE is the real module, SHIM_PARAMETERS the string that NSS wants at C_Initialize.
 *
 * Every argument of every PKCS#11 function is an integer or a pointer, and none has more than eight, so that one shape
 * of function passes all of them on (with the calling conventions of x86-64 and AArch64).
 */
#include <dlfcn.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

typedef unsigned long word;
typedef word (*function)(word, word, word, word, word, word, word, word);

enum {
    INITIALIZE = 0,
    GET_TOKEN_INFO = 6,
    GET_MECHANISM_LIST = 7,
    GET_MECHANISM_INFO = 8,
    ENCRYPT_INIT = 29,
    ENCRYPT = 30,
    DECRYPT_INIT = 33,
    WRAP_KEY = 60,
    UNWRAP_KEY = 61,
    FUNCTIONS = 68
};
enum { OK = 0, GENERAL_ERROR = 5, MECHANISM_INVALID = 0x70 };

typedef struct { unsigned char major, minor; function call[FUNCTIONS]; } list;
typedef struct { void *create, *destroy, *lock, *unlock; word flags; const char *parameters; void *reserved; } arguments;
typedef struct { word type; void *parameter; word length; } mechanism;

static list *real;
static list ours;
static word answers[FUNCTIONS], which[FUNCTIONS], calls[FUNCTIONS];
static const char *parameters;
static word more_flags, renamed_from, renamed_to, longer;
static volatile int hanging[FUNCTIONS];

void shim_answer(int at, word code, word bits) { answers[at] = code; which[at] = bits; }
void shim_flags(word flags) { more_flags = flags; }
word shim_calls(int at) { return calls[at]; }
void shim_rename(word from, word to) { renamed_from = from; renamed_to = to; }
void shim_longer(word bytes) { longer = bytes; }
void shim_hang(int at, int on) { hanging[at] = on; }

static word initialize(void) {
    arguments given;
    memset(&given, 0, sizeof given);
    given.flags = 2; /* CKF_OS_LOCKING_OK, without which NSS refuses its parameters */
    given.parameters = parameters;
    return real->call[INITIALIZE](parameters ? (word)&given : 0, 0, 0, 0, 0, 0, 0, 0);
}

/* Token information ends with 18 bytes of text after eleven numbers; the flags come after 96 bytes of names. */
static void add_flags(word info) { *(word *)(info + 96) |= more_flags; }

static word pass(int at, word a, word b, word c, word d, word e, word f, word g, word h) {
    mechanism changed;
    word code, told;
    calls[at]++;
    while (hanging[at])
        usleep(1000);
    told = which[at] & 1;
    if (~which[at])
        which[at] >>= 1;
    if (told)
        return answers[at];
    if (at == INITIALIZE)
        return initialize();
    if (renamed_to && (at == ENCRYPT_INIT || at == DECRYPT_INIT || at == WRAP_KEY || at == UNWRAP_KEY)) {
        changed = *(mechanism *)b;
        if (changed.type == renamed_from)
            return MECHANISM_INVALID;
        if (changed.type == renamed_to)
            changed.type = renamed_from;
        b = (word)&changed;
    }
    if (renamed_to && at == GET_MECHANISM_INFO && b == renamed_to)
        b = renamed_from;
    code = real->call[at](a, b, c, d, e, f, g, h);
    if (code == OK && at == ENCRYPT)
        *(word *)e += longer;
    if (code == OK && at == GET_TOKEN_INFO)
        add_flags(b);
    if (code == OK && renamed_to && at == GET_MECHANISM_LIST && b)
        for (word i = 0; i < *(word *)c; i++)
            if (((word *)b)[i] == renamed_from)
                ((word *)b)[i] = renamed_to;
    return code;
}

#define CALL(n) \
    static word call_##n(word a, word b, word c, word d, word e, word f, word g, word h) { \
        return pass(n, a, b, c, d, e, f, g, h); \
    }
#define EACH(X) \
    X(0) X(1) X(2) X(3) X(4) X(5) X(6) X(7) X(8) X(9) X(10) X(11) X(12) X(13) X(14) X(15) X(16) X(17) X(18) X(19) \
    X(20) X(21) X(22) X(23) X(24) X(25) X(26) X(27) X(28) X(29) X(30) X(31) X(32) X(33) X(34) X(35) X(36) X(37) \
    X(38) X(39) X(40) X(41) X(42) X(43) X(44) X(45) X(46) X(47) X(48) X(49) X(50) X(51) X(52) X(53) X(54) X(55) \
    X(56) X(57) X(58) X(59) X(60) X(61) X(62) X(63) X(64) X(65) X(66) X(67)
EACH(CALL)

word C_GetFunctionList(list **out) {
    if (!real) {
        const char *path = getenv("SHIM_MODULE");
        void *module = path ? dlopen(path, RTLD_NOW | RTLD_LOCAL) : 0;
        word (*get)(list **) = module ? (word(*)(list **))dlsym(module, "C_GetFunctionList") : 0;
        if (!get || get(&real) != OK)
            return GENERAL_ERROR;
        parameters = getenv("SHIM_PARAMETERS") ? strdup(getenv("SHIM_PARAMETERS")) : 0;
        ours.major = real->major;
        ours.minor = real->minor;
#define PLACE(n) ours.call[n] = call_##n;
        EACH(PLACE)
    }
    *out = &ours;
    return OK;
}
