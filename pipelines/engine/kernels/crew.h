// Work shared among threads. Knows no arithmetic.
//
// Operators follow one another by microseconds, and other processes want the same cores. So nobody waits for a thread
// that has not come: the caller works itself, and at the end waits for those alone that are at a piece. Threads with
// nothing to do turn for a moment, for the next operator, and then sleep.

#pragma once

#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <climits>
#include <cstdint>

// Hidden: another build of this library in the same process has a crew of its own.
namespace crew __attribute__((visibility("hidden"))) {

using Piece = void (*)(const void* work, int64_t at);

constexpr int MOST = 64;                               // threads beside the caller
constexpr auto AWAKE = std::chrono::microseconds(20);  // how long one turns before it sleeps

// Whether `ready` became true while turning.
template <typename Ready>
bool turn_until(const Ready& ready) {
    const auto since = std::chrono::steady_clock::now();
    do {
        for (int times = 0; times < 16; times++) {
            if (ready()) return true;
            _mm_pause();
        }
    } while (std::chrono::steady_clock::now() - since < AWAKE);
    return ready();
}

class Crew {
    // The gate: whether there is a job to join, how many threads are inside, and a number that the next job changes.
    // What describes the job is written while the gate is closed and nobody is inside, and read inside.
    static constexpr uint32_t OPEN = 1, INSIDE = 2, INSIDES = 0xfe, JOB = 0x100;

    alignas(64) std::atomic<uint32_t> gate{0};
    std::atomic<int> wanted{0};  // threads beside the caller; those of higher numbers stay away
    std::atomic<int> asleep{0};
    std::atomic<bool> caller_asleep{false}, taken{false}, helped{false};
    int enlisted = 0;
    int calls_in_vain = 0, calls_left_out = 0;
    Piece piece = nullptr;
    const void* work = nullptr;
    int64_t pieces = 0;
    alignas(64) std::atomic<int64_t> next{0};

    struct Recruit {
        Crew* crew;
        int number;
    } recruits[MOST];

    bool take_pieces() {
        bool any = false;
        for (int64_t at; (at = next.fetch_add(1, std::memory_order_relaxed)) < pieces; any = true) piece(work, at);
        return any;
    }

    void sleep_while(uint32_t seen) { syscall(SYS_futex, &gate, FUTEX_WAIT_PRIVATE, seen, nullptr, nullptr, 0); }
    void wake() { syscall(SYS_futex, &gate, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0); }

    [[noreturn]] void serve(int number) {
        for (uint32_t seen;;) {
            const auto called = [&] { return ((seen = gate.load()) & OPEN) && number < wanted.load(); };
            if (!turn_until(called)) {
                asleep++;  // before the kernel looks at the gate, as the caller looks here after it changed that
                sleep_while(seen);
                asleep--;
                continue;
            }
            if (!gate.compare_exchange_strong(seen, seen + INSIDE)) continue;
            if (take_pieces()) helped.store(true);
            gate.fetch_and(~OPEN);  // nothing is left for others; no other job begins while this thread is inside
            const bool last = ((gate -= INSIDE) & INSIDES) == 0;
            if (last && caller_asleep.load()) wake();
        }
    }

    // Wakes those asleep, but seldom while all cores are taken: whoever came would only take the caller's.
    bool call() {
        if (!asleep.load() || calls_left_out-- > 0) return false;
        wake();
        return true;
    }

    void learn(bool called) {
        if (helped.load())
            calls_in_vain = calls_left_out = 0;
        else if (called)
            calls_left_out = 1 << (calls_in_vain = std::min(calls_in_vain + 1, 6));
    }

    // As many threads as are wanted, or as the system gives.
    void enlist(int threads) {
        for (; enlisted < threads; enlisted++) {
            recruits[enlisted] = {this, enlisted};
            const auto begin = [](void* given) -> void* {
                const auto* recruit = (const Recruit*)given;
                recruit->crew->serve(recruit->number);
            };
            sigset_t all, before;
            sigfillset(&all);
            pthread_t thread;
            pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are for the process's own threads
            const int failed = pthread_create(&thread, nullptr, begin, &recruits[enlisted]);
            pthread_sigmask(SIG_SETMASK, &before, nullptr);
            if (failed) return;
            pthread_detach(thread);
        }
    }

public:
    // False where another caller has the crew.
    bool run(int64_t count, int threads, Piece of, const void* with) {
        if (taken.exchange(true)) return false;
        const int helpers = (int)std::min<int64_t>({threads - 1, count - 1, MOST});
        enlist(helpers);
        piece = of, work = with, pieces = count;
        next.store(0), wanted.store(helpers), helped.store(false);
        gate.store((gate.load() & ~(OPEN | INSIDES)) + JOB + OPEN);
        const bool called = call();
        take_pieces();
        gate.fetch_and(~OPEN);
        while (!turn_until([&] { return (gate.load() & INSIDES) == 0; })) {
            // One of them has lost its core, which this one's may become.
            caller_asleep.store(true);
            const uint32_t seen = gate.load();
            if (seen & INSIDES) sleep_while(seen);
            caller_asleep.store(false);
        }
        learn(called);
        taken.store(false);
        return true;
    }

    // The process's one; never destroyed, since threads are in it until the process ends.
    static Crew& here() {
        static const bool told = pthread_atfork(nullptr, nullptr, [] { place() = nullptr; }) == 0;
        (void)told;
        Crew* found = place().load();
        if (!found) {
            Crew* fresh = new Crew;
            if (place().compare_exchange_strong(found, fresh)) return *fresh;
            delete fresh;
        }
        return *found;
    }

private:
    static std::atomic<Crew*>& place() {
        static std::atomic<Crew*> crew{nullptr};  // a child of fork has none of its parent's threads: it begins anew
        return crew;
    }
};

}  // namespace crew

namespace {

// Numbers 0 … count − 1 to `work`, on several threads, the caller's among them. Each takes the next one when it is done
// with its last, so that one that loses its core for a while holds up no more than the piece of work it has.
template <typename Work>
void share(int64_t count, int threads, const Work& work) {
    const auto piece = [](const void* work, int64_t at) { (*(const Work*)work)(at); };
    if (threads > 1 && count > 1 && crew::Crew::here().run(count, threads, piece, &work)) return;
    for (int64_t at = 0; at < count; at++) work(at);
}

}  // namespace
