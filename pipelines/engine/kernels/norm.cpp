// Root mean square norms. Plain C functions on plain pointers: knows no torch and no model.

#include "crew.h"
#include "lanes.h"

extern "C" {

// out [rows, width] = inputs / √(mean of their squares + epsilon) · (weight + added), a row at a time.
void triptych_rms_norm(const float* inputs, int64_t rows, int64_t stride, const float* weight, float added,
                       float epsilon, int64_t width, float* out, int64_t threads) {
    const int64_t whole = width / LANES * LANES;
    share(rows, rows * width < 65536 ? 1 : (int)threads, [&](int64_t row) {
        const float* from = inputs + row * stride;
        float* into = out + row * width;
        Floats squares = all(0.0f);
        for (int64_t at = 0; at < whole; at += LANES) squares = fused(load(from + at), load(from + at), squares);
        float total = sum(squares);
        for (int64_t at = whole; at < width; at++) total += from[at] * from[at];
        const float factor = 1.0f / std::sqrt(total / (float)width + epsilon);
        for (int64_t at = 0; at < whole; at += LANES)
            store(into + at, multiply(multiply(load(from + at), all(factor)), add(load(weight + at), all(added))));
        for (int64_t at = whole; at < width; at++) into[at] = from[at] * factor * (weight[at] + added);
    });
}

}  // extern "C"
