// Attention to cached keys and values. Plain C functions on plain pointers: knows no torch and no model.
//
// A row's result has the same bits whatever rows are beside it, in a prompt or alone: it goes by its own positions in
// chunks that begin at the same places for all, and what a chunk of another's has more of adds zeros.

#include <limits>
#include <vector>

#include "crew.h"
#include "lanes.h"

namespace {

constexpr int64_t CHUNK = 128;  // positions; a row's chunks begin at the multiples of it
constexpr int TOGETHER = 4;     // queries that share a reading of the keys and values
constexpr int64_t TALL = 8;     // rows of a prompt that share a chunk while it is in cache

enum Kind : int64_t { FLOAT32, FLOAT16, BFLOAT16 };

template <int64_t KIND>
inline Floats numbers(const char* at, int64_t count) {
    if (count >= LANES) {
        if (KIND == FLOAT32) return load((const float*)at);
        return KIND == FLOAT16 ? half((const uint16_t*)at) : brain((const uint16_t*)at);
    }
    char whole[LANES * 4] = {};
    std::memcpy(whole, at, count * (KIND == FLOAT32 ? 4 : 2));
    return numbers<KIND>(whole, LANES);
}

// e to the power of each: within 2 units in the last place, and 0 below what is a normal number.
inline Floats exponential(Floats x) {
    const Floats bounded = smaller(larger(all(-87.0f), x), all(88.0f));  // in this order no number stays none
    const Floats whole = nearest(multiply(bounded, all(1.44269504f)));
    Floats rest = fused(whole, all(-0.693359375f), bounded);
    rest = fused(whole, all(2.12194440e-4f), rest);
    Floats sum = all(1.9875691500e-4f);
    for (const float next : {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f})
        sum = fused(sum, rest, all(next));
    sum = add(fused(sum, multiply(rest, rest), rest), all(1.0f));
    return where_above(x, -87.0f, power_of_two(sum, whole));
}

inline Floats capped(Floats x, float cap) {  // cap · tanh(x / cap)
    const Floats power = exponential(multiply(x, all(2.0f / cap)));
    return multiply(all(cap), subtract(all(1.0f), divide(all(2.0f), add(power, all(1.0f)))));
}

struct Attention {
    const float* queries;
    int64_t query_row, query_head;  // strides, here and below of elements
    const char *keys, *values;      // [slots, kv heads, positions, dim]
    int64_t kind, slot, head, position;
    const int64_t *slots, *positions;  // of each row; it sees its slot from its window's start to its position
    int64_t rows, heads, kv_heads, dim, window;
    float scale, softcap;
    float* out;  // [rows, heads, dim]

    int64_t bytes() const { return kind == FLOAT32 ? 4 : 2; }
    int64_t padded() const { return (dim + LANES - 1) / LANES * LANES; }
    int64_t first(int64_t row) const {
        return window > 0 ? std::max<int64_t>(0, positions[row] + 1 - window) : 0;
    }
};

// Of one query and some of its positions, or all: the largest score, and by it the sums of the exponentials and of
// the values weighted by them.
struct Partial {
    float most = -std::numeric_limits<float>::infinity(), sum = 0;

    void add(const Partial& other, float* weighted, const float* others, int64_t padded) {
        if (other.most == -std::numeric_limits<float>::infinity()) return;
        const float top = std::max(most, other.most), mine = std::exp(most - top), its = std::exp(other.most - top);
        sum = sum * mine + other.sum * its;
        for (int64_t at = 0; at < padded; at += LANES)
            store(weighted + at, fused(load(weighted + at), all(mine), multiply(load(others + at), all(its))));
        most = top;
    }
};

// COUNT queries of `padded` numbers and the positions begin … end − 1, in one chunk; each sees those from its `from`
// and before its `to`.
template <int64_t KIND, int COUNT>
void attend(const Attention& a, const char* keys, const char* values, const float* queries, const int64_t* from,
            const int64_t* to, int64_t begin, int64_t end, Partial* found, float* weighted) {
    const int64_t padded = a.padded(), step = a.position * a.bytes(), base = begin / LANES * LANES;
    alignas(64) float scores[COUNT][CHUNK];
    for (int64_t at = base; at < end; at += LANES) {
        Floats products[COUNT][LANES];
        for (int64_t lane = 0; lane < LANES; lane++) {
            Floats sums[COUNT];
            for (int q = 0; q < COUNT; q++) sums[q] = all(0.0f);
            if (at + lane >= begin && at + lane < end) {
                const char* key = keys + (at + lane) * step;
                for (int64_t d = 0; d < a.dim; d += LANES) {
                    const Floats part = numbers<KIND>(key + d * a.bytes(), a.dim - d);
                    for (int q = 0; q < COUNT; q++) sums[q] = fused(part, load(queries + q * padded + d), sums[q]);
                }
            }
            for (int q = 0; q < COUNT; q++) products[q][lane] = sums[q];
        }
        for (int q = 0; q < COUNT; q++) {
            Floats score = sums_of(products[q]);
            if (a.softcap > 0) score = capped(score, a.softcap);
            float* into = scores[q] + (at - base);
            store(into, score);
            for (int64_t lane = 0; lane < std::min<int64_t>(LANES, from[q] - at); lane++) into[lane] = -INFINITY;
            for (int64_t lane = std::max<int64_t>(0, to[q] - at); lane < LANES; lane++) into[lane] = -INFINITY;
        }
    }
    for (int q = 0; q < COUNT; q++) {
        Floats most = all(-INFINITY), sums = all(0.0f);
        for (int64_t at = 0; at < end - base; at += LANES) most = larger(most, load(scores[q] + at));
        found[q].most = largest(most);
        const Floats top = all(found[q].most == -INFINITY ? 0.0f : found[q].most);
        for (int64_t at = 0; at < end - base; at += LANES) {
            const Floats power = exponential(subtract(load(scores[q] + at), top));
            store(scores[q] + at, power);
            sums = add(sums, power);
        }
        found[q].sum = sum(sums);
    }
    for (int64_t d = 0; d < a.dim; d += 4 * LANES) {
        Floats sums[COUNT][4];
        const int parts = (int)std::min<int64_t>(4, (padded - d) / LANES);
        for (int q = 0; q < COUNT; q++)
            for (int part = 0; part < 4; part++) sums[q][part] = all(0.0f);
        const char* value = values + begin * step + d * a.bytes();
        if (a.dim - d >= 4 * LANES) {
            for (int64_t at = begin - base; at < end - base; at++, value += step)
                for (int part = 0; part < 4; part++) {
                    const Floats some = numbers<KIND>(value + part * LANES * a.bytes(), LANES);
                    for (int q = 0; q < COUNT; q++) sums[q][part] = fused(some, all(scores[q][at]), sums[q][part]);
                }
        } else {
            for (int64_t at = begin - base; at < end - base; at++, value += step)
                for (int part = 0; part < parts; part++) {
                    const Floats some = numbers<KIND>(value + part * LANES * a.bytes(), a.dim - d - part * LANES);
                    for (int q = 0; q < COUNT; q++) sums[q][part] = fused(some, all(scores[q][at]), sums[q][part]);
                }
        }
        for (int q = 0; q < COUNT; q++)
            for (int part = 0; part < parts; part++) store(weighted + q * padded + d + part * LANES, sums[q][part]);
    }
}

using Attend = void (*)(const Attention&, const char*, const char*, const float*, const int64_t*, const int64_t*,
                        int64_t, int64_t, Partial*, float*);

template <int64_t KIND>
Attend attend_of(int64_t count) {
    constexpr Attend by_count[] = {attend<KIND, 1>, attend<KIND, 2>, attend<KIND, 3>, attend<KIND, 4>};
    return by_count[count - 1];
}

Attend attend_of(int64_t kind, int64_t count) {
    if (kind == FLOAT32) return attend_of<FLOAT32>(count);
    return kind == FLOAT16 ? attend_of<FLOAT16>(count) : attend_of<BFLOAT16>(count);
}

// The queries of a key's head in some rows that follow one another in one slot.
struct Crowd {
    int64_t count;
    std::vector<float> queries, weighted, chunk;
    std::vector<int64_t> from, to;
    std::vector<Partial> all;

    Crowd(const Attention& a, int64_t row, int64_t rows, int64_t kv_head) {
        const int64_t group = a.heads / a.kv_heads, padded = a.padded();
        count = rows * group;
        queries.assign(count * padded, 0.0f);
        weighted.assign(count * padded, 0.0f);
        chunk.resize(TOGETHER * padded);
        all.resize(count);
        for (int64_t at = 0; at < count; at++) {
            const int64_t of = row + at / group, head = kv_head * group + at % group;
            const float* query = a.queries + of * a.query_row + head * a.query_head;
            for (int64_t d = 0; d < a.dim; d++) queries[at * padded + d] = query[d] * a.scale;
            from.push_back(a.first(of));
            to.push_back(a.positions[of] + 1);
        }
    }

    void see(const Attention& a, const char* keys, const char* values, int64_t chunk_at) {
        const int64_t padded = a.padded();
        for (int64_t at = 0; at < count; at += TOGETHER) {
            const int64_t some = std::min<int64_t>(TOGETHER, count - at);
            const int64_t begin = std::max(chunk_at, *std::min_element(&from[at], &from[at] + some));
            const int64_t end = std::min(chunk_at + CHUNK, *std::max_element(&to[at], &to[at] + some));
            if (begin >= end) continue;
            Partial found[TOGETHER];
            attend_of(a.kind, some)(a, keys, values, &queries[at * padded], &from[at], &to[at], begin, end, found,
                                    chunk.data());
            for (int64_t q = 0; q < some; q++)
                all[at + q].add(found[q], &weighted[(at + q) * padded], &chunk[q * padded], padded);
        }
    }
};

}  // namespace

extern "C" {

// out [rows, heads, dim] = softmax(scale · queries · keys) · values, of each row's own positions; float32 but for the
// cache, which is [slots, kv heads, positions, dim] of `kind` 0: float32, 1: float16, 2: bfloat16. A row sees from
// `window` positions back (0: from the first) to its own. `softcap` (0: none) bounds the scores.
void triptych_attention(const float* queries, int64_t query_row, int64_t query_head, const char* keys,
                        const char* values, int64_t kind, int64_t slot, int64_t head, int64_t position,
                        const int64_t* slots, const int64_t* positions, int64_t rows, int64_t heads, int64_t kv_heads,
                        int64_t dim, int64_t window, float scale, float softcap, float* out, int64_t threads) {
    const Attention a{queries, query_row, query_head, keys,     values, kind,   slot,  head,    position, slots,
                      positions, rows,    heads,      kv_heads, dim,    window, scale, softcap, out};
    std::vector<int64_t> begins;  // where the rows that share a slot and follow one another begin
    for (int64_t row = 0; row < rows; row++) {
        const bool follows = row && row - begins.back() < TALL && slots[row] == slots[row - 1] &&
                             positions[row] == positions[row - 1] + 1;
        if (!follows) begins.push_back(row);
    }
    begins.push_back(rows);
    const int64_t padded = a.padded();
    share((int64_t)(begins.size() - 1) * kv_heads, (int)threads, [&](int64_t piece) {
        // Prompts' last rows see the most: first come the large pieces, so that no thread ends long after another.
        const int64_t at = (int64_t)begins.size() - 2 - piece / kv_heads, kv_head = piece % kv_heads;
        const int64_t row = begins[at], count = begins[at + 1] - row, place = slots[row] * slot + kv_head * head;
        Crowd crowd(a, row, count, kv_head);
        const int64_t last = positions[row + count - 1];
        for (int64_t chunk = a.first(row) / CHUNK * CHUNK; chunk <= last; chunk += CHUNK)
            crowd.see(a, keys + place * a.bytes(), values + place * a.bytes(), chunk);
        const int64_t group = heads / kv_heads;
        for (int64_t q = 0; q < crowd.count; q++) {
            float* into = out + ((row + q / group) * heads + kv_head * group + q % group) * dim;
            for (int64_t d = 0; d < dim; d++) into[d] = crowd.weighted[q * padded + d] / crowd.all[q].sum;
        }
    });
}

}  // extern "C"
