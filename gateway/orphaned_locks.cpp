// Preloaded into tritonserver: a lock whose owner was killed is taken over, where it would end the server.
//
// Server and stages share memory, and robust locks in it. When a stage is killed while it holds one, whoever comes next
// is told EOWNERDEAD; Boost throws on that in a thread or a destructor where nobody catches, and the server aborts with
// all its models (`terminate called after throwing an instance of 'boost::interprocess::lock_exception'`, Triton 2.51).
// What most locks guard is one message, which nobody will read. That of the memory itself guards the list of what is
// free, which may be half changed: it is begun anew, empty. So the lock is declared consistent, as POSIX has it, and the
// server finds the stage dead as it does when it held nothing. Knows no Triton beyond that; the stages themselves are
// started without it.

#include <cerrno>
#include <cinttypes>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <ctime>

#include <dlfcn.h>
#include <pthread.h>

#include "preloaded.h"

namespace {

// A segment as Boost 1.8x lays it out (managed_external_buffer, rbtree_best_fit, 64 bit), in words of 8 bytes: how many
// blocks are free, the root of their tree and its two ends, as distances from where they are written, and 1 for none.
constexpr uint64_t COUNT = 0, ROOT = 1, FIRST = 2, LAST = 3, BLOCKS = 16, NONE = 1;
// The blocks follow. A block's second word is its length in units, and in two bits whether it is taken and the one
// before it; the first word of the first is how far off the last is, which is empty.
constexpr uint64_t UNIT = 2, LENGTH = ~uint64_t{0} >> 2, TAKEN = ~LENGTH;
// The lock of the memory is an object with a name, which follows it.
constexpr char NAME[] = "shm_mutex";

// The mapping that holds this address, in words: 0 if there is none.
uint64_t* mapping_of(const void* address, uint64_t* words) {
    uint64_t* found = nullptr;
    FILE* maps = fopen("/proc/self/maps", "re");
    if (!maps) return nullptr;
    uintptr_t start, end;
    while (!found && fscanf(maps, "%" SCNxPTR "-%" SCNxPTR "%*[^\n]", &start, &end) == 2)
        if (start <= uintptr_t(address) && uintptr_t(address) < end) {
            found = reinterpret_cast<uint64_t*>(start);
            *words = (end - start) / sizeof(uint64_t);
        }
    fclose(maps);
    return found;
}

// All blocks are taken now, also those that were free: the segment goes with its stage. False, and nothing changed, if
// it is not laid out like this.
bool begun_anew(const void* lock) {
    uint64_t words = 0;
    uint64_t* segment = mapping_of(lock, &words);
    if (!segment || words < BLOCKS + 2) return false;
    uint64_t* last = segment + BLOCKS;
    if (segment[BLOCKS] > words / UNIT) return false;
    last += segment[BLOCKS] * UNIT;
    if (last + 2 > segment + words) return false;
    for (uint64_t* block = segment + BLOCKS; block != last; block += (block[1] & LENGTH) * UNIT) {
        const uint64_t left = uint64_t(last - block) / UNIT, length = block[1] & LENGTH;
        if (length == 0 || length > left) return false;
    }
    for (uint64_t* block = segment + BLOCKS; block != last; block += (block[1] & LENGTH) * UNIT) block[1] |= TAKEN;
    last[1] |= TAKEN;
    segment[COUNT] = 0;
    segment[ROOT] = NONE;
    segment[FIRST] = uint64_t(-1 * int64_t(sizeof(uint64_t)));
    segment[LAST] = uint64_t(-2 * int64_t(sizeof(uint64_t)));
    return true;
}

int taken(pthread_mutex_t* mutex, int result) {
    if (result != EOWNERDEAD) return result;
    if (memcmp(mutex + 1, NAME, sizeof NAME) == 0 && !begun_anew(mutex)) return result;
    return pthread_mutex_consistent(mutex);
}

template <typename Function>
Function next(const char* name, const char* version) {
    void* found = dlvsym(RTLD_NEXT, name, version);
    return reinterpret_cast<Function>(found ? found : dlsym(RTLD_NEXT, name));
}

using Lock = int (*)(pthread_mutex_t*);
using LockUntil = int (*)(pthread_mutex_t*, const timespec*);
using Wait = int (*)(pthread_cond_t*, pthread_mutex_t*);
using WaitUntil = int (*)(pthread_cond_t*, pthread_mutex_t*, const timespec*);

}  // namespace

// A wait ends with the lock taken again, whose owner may have died meanwhile. The versions are those of glibc on
// x86-64: an older `pthread_cond_wait` is another function.
extern "C" {

int pthread_mutex_lock(pthread_mutex_t* mutex) noexcept {
    static const auto real = next<Lock>("pthread_mutex_lock", "GLIBC_2.2.5");
    return taken(mutex, real(mutex));
}

int pthread_mutex_timedlock(pthread_mutex_t* mutex, const timespec* until) noexcept {
    static const auto real = next<LockUntil>("pthread_mutex_timedlock", "GLIBC_2.34");
    return taken(mutex, real(mutex, until));
}

int pthread_cond_wait(pthread_cond_t* condition, pthread_mutex_t* mutex) {
    static const auto real = next<Wait>("pthread_cond_wait", "GLIBC_2.3.2");
    return taken(mutex, real(condition, mutex));
}

int pthread_cond_timedwait(pthread_cond_t* condition, pthread_mutex_t* mutex, const timespec* until) {
    static const auto real = next<WaitUntil>("pthread_cond_timedwait", "GLIBC_2.3.2");
    return taken(mutex, real(condition, mutex, until));
}
}
