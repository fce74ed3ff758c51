// What a compiled step calls: the kernels' functions, on torch's tensors.
//
// A compiled step hands over tensors by torch's stable C interface, of which these are the functions used, so that no
// header of torch is needed. Knows the two operators of pipelines/engine/compiled_ops.py and how keys and values are
// stored; the arithmetic is in kernels.cpp, whose functions are given at run time.

#include <cstdint>
#include <cstring>

struct AtenTensorOpaque;
using Tensor = AtenTensorOpaque*;

extern "C" {
int32_t aoti_torch_get_data_ptr(Tensor, void**);
int32_t aoti_torch_get_sizes(Tensor, int64_t**);
int32_t aoti_torch_get_strides(Tensor, int64_t**);
int32_t aoti_torch_get_dtype(Tensor, int32_t*);
int32_t aoti_torch_empty_strided(int64_t dims, const int64_t* sizes, const int64_t* strides, int32_t dtype,
                                 int32_t device, int32_t index, Tensor*);
}

namespace {

constexpr int32_t FLOAT16 = 5, FLOAT32 = 6, BFLOAT16 = 15;  // c10::ScalarType

using Linear = void (*)(const float*, int64_t, int64_t, const uint8_t*, const uint16_t*, const uint16_t*, float,
                        const float*, int64_t, int64_t, int64_t, float*, int64_t, int64_t);
using Rows = int64_t (*)(const int64_t*, int64_t, const uint8_t*, const uint16_t*, const uint16_t*, float, int64_t,
                         int64_t, int64_t, float*, int64_t);
using Attention = void (*)(const float*, int64_t, int64_t, const char*, const char*, int64_t, int64_t, int64_t, int64_t,
                           const int64_t*, const int64_t*, int64_t, int64_t, int64_t, int64_t, int64_t, float, float,
                           float*, int64_t);

Linear linear = nullptr;
Rows rows_of = nullptr;
Attention attention = nullptr;
int64_t threads = 1;

template <typename T>
T* data(Tensor tensor) {
    void* at = nullptr;
    if (tensor) aoti_torch_get_data_ptr(tensor, &at);
    return static_cast<T*>(at);
}

const int64_t* sizes(Tensor tensor) {
    int64_t* found;
    aoti_torch_get_sizes(tensor, &found);
    return found;
}

const int64_t* strides(Tensor tensor) {
    int64_t* found;
    aoti_torch_get_strides(tensor, &found);
    return found;
}

int32_t dtype(Tensor tensor) {
    int32_t found;
    aoti_torch_get_dtype(tensor, &found);
    return found;
}

uint16_t brain(float value) {  // to the nearest, ties to even, as torch rounds
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    if (value != value) return 0x7fc0;
    return (uint16_t)((bits + 0x7fff + ((bits >> 16) & 1)) >> 16);
}

void keep(char* into, int32_t kind, const float* from, int64_t count) {
    if (kind == FLOAT32) {
        std::memcpy(into, from, count * sizeof(float));
    } else if (kind == FLOAT16) {
        for (int64_t at = 0; at < count; at++) reinterpret_cast<_Float16*>(into)[at] = (_Float16)from[at];
    } else {
        for (int64_t at = 0; at < count; at++) reinterpret_cast<uint16_t*>(into)[at] = brain(from[at]);
    }
}

// Each row's keys or values [rows, heads, dim] into its slot, at its position.
void keep(Tensor cache, Tensor states, const int64_t* slots, const int64_t* positions) {
    const int64_t *shape = sizes(states), *from = strides(states), *into = strides(cache);
    const int32_t kind = dtype(cache);
    const int64_t bytes = kind == FLOAT32 ? 4 : 2;
    for (int64_t row = 0; row < shape[0]; row++)
        for (int64_t head = 0; head < shape[1]; head++)
            keep(data<char>(cache) + (slots[row] * into[0] + head * into[1] + positions[row] * into[2]) * bytes, kind,
                 data<float>(states) + row * from[0] + head * from[1], shape[2]);
}

}  // namespace

extern "C" {

void triptych_shim_use(Linear the_linear, Rows the_rows, Attention the_attention, int64_t on_threads) {
    linear = the_linear;
    rows_of = the_rows;
    attention = the_attention;
    threads = on_threads;
}

int32_t aoti_torch_cpu_step_linear(Tensor inputs, Tensor codes, Tensor scale, Tensor* base, Tensor* bias, double gain,
                                   int64_t bits, int64_t outputs, Tensor* out) {
    const int64_t *shape = sizes(inputs), *from = strides(inputs);
    const int64_t to[] = {shape[0], outputs}, steps[] = {outputs, 1};
    if (const int32_t error = aoti_torch_empty_strided(2, to, steps, FLOAT32, 0, 0, out)) return error;
    if (shape[0] == 0) return 0;  // no logits are wanted of a prompt's middle
    linear(data<float>(inputs), shape[0], from[0], data<uint8_t>(codes), data<uint16_t>(scale),
           base ? data<uint16_t>(*base) : nullptr, (float)gain, bias ? data<float>(*bias) : nullptr, bits,
           shape[1] / 32, outputs, data<float>(*out), outputs, threads);
    return 0;
}

int32_t aoti_torch_cpu_step_rows(Tensor ids, Tensor codes, Tensor scale, Tensor* base, double gain, int64_t bits,
                                 int64_t columns, int64_t rows, Tensor* out) {
    const int64_t count = sizes(ids)[0];
    const int64_t to[] = {count, columns}, steps[] = {columns, 1};
    if (const int32_t error = aoti_torch_empty_strided(2, to, steps, FLOAT32, 0, 0, out)) return error;
    return (int32_t)rows_of(data<int64_t>(ids), count, data<uint8_t>(codes), data<uint16_t>(scale),
                            base ? data<uint16_t>(*base) : nullptr, (float)gain, bits, columns / 32, rows,
                            data<float>(*out), threads);
}

int32_t aoti_torch_cpu_step_attend(Tensor queries, Tensor keys, Tensor values, Tensor all_keys, Tensor all_values,
                                   Tensor slots, Tensor positions, double scale, double softcap, int64_t window,
                                   Tensor* out) {
    const int64_t *shape = sizes(queries), *from = strides(queries), *cache = strides(all_keys);
    const int64_t steps[] = {shape[1] * shape[2], shape[2], 1};
    if (const int32_t error = aoti_torch_empty_strided(3, shape, steps, FLOAT32, 0, 0, out)) return error;
    const int64_t *slot = data<int64_t>(slots), *position = data<int64_t>(positions);
    keep(all_keys, keys, slot, position);
    keep(all_values, values, slot, position);
    const int32_t kind = dtype(all_keys);
    attention(data<float>(queries), from[0], from[1], data<char>(all_keys), data<char>(all_values),
              kind == FLOAT32 ? 0 : kind == FLOAT16 ? 1 : 2, cache[0], cache[1], cache[2], slot, position, shape[0],
              shape[1], sizes(keys)[1], shape[2], window, (float)scale, (float)softcap, data<float>(*out), threads);
    return 0;
}

}  // extern "C"
