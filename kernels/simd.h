// Vectors of floats for one instruction set: loads and stores of every dtype, transposition, exp, log1p, sigmoid.
//
// Every kernel source is compiled once per instruction set, with VSSM_LEVEL naming it. All code lies in a namespace of
// that name and uses nothing inline of the standard library: the linker keeps one copy of an inline function for the
// whole library, which could be one with instructions that the processor lacks.
#pragma once
#include <cstdint>
#include <cstring>

#if defined(_OPENMP)
#include <omp.h>
#else
static inline int omp_get_thread_num() { return 0; }
#endif

#if defined(__AVX512F__)
#include <immintrin.h>
#endif

#include "calls.h"

// For functions within long loops: a call would spill all vectors in registers.
#define VSSM_INLINE __attribute__((always_inline)) static inline

namespace VSSM_LEVEL {

#if defined(__AVX512F__)
constexpr int W = 16;
#elif defined(__AVX__)
constexpr int W = 8;
#else
constexpr int W = 4;
#endif

typedef float vf __attribute__((vector_size(W * 4)));
typedef uint32_t vu __attribute__((vector_size(W * 4)));
typedef int32_t vi __attribute__((vector_size(W * 4)));
typedef uint16_t vh __attribute__((vector_size(W * 2)));

static inline int64_t min(int64_t a, int64_t b) { return a < b ? a : b; }
static inline int64_t divide_up(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t bytes_of(int64_t dtype) { return dtype == VSSM_FLOAT32 ? 4 : 2; }
static inline vf zero() { return vf{}; }
static inline vf all(float x) { return vf{} + x; }
static inline vu bits(vf x) { return (vu)x; }

// ---- dtypes ----

static inline vf from_bfloat16(vh x) { return (vf)(__builtin_convertvector(x, vu) << 16); }

static inline vh to_bfloat16(vf x) {
    vu u = bits(x);
    vu rounded = (u + 0x7fff + ((u >> 16) & 1)) >> 16;
    return __builtin_convertvector(x == x ? rounded : vu{} + 0x7fc0, vh);
}

static inline vf from_float16(vh x) {
    vu wide = __builtin_convertvector(x, vu);
    vu magnitude = (wide & 0x7fff) << 13;
    // Moves the exponent bias from 15 to 127; a multiplication so that subnormal numbers come out normalised.
    vu finite = bits((vf)magnitude * 0x1p112f);
    return (vf)((magnitude >= 0x0f800000 ? (magnitude | 0x7f800000) : finite) | ((wide & 0x8000) << 16));
}

static inline vh to_float16(vf x) {
    vu u = bits(x), magnitude = u & 0x7fffffff;
    vu normal = (magnitude + 0xfff + ((magnitude >> 13) & 1) - 0x38000000) >> 13;
    // 0.5 has the spacing of subnormal float16 numbers, so that the addition rounds to them.
    vu subnormal = bits((vf)magnitude + 0.5f) - 0x3f000000;
    vu half = magnitude < 0x38800000 ? subnormal : normal;
    half = magnitude >= 0x47800000 ? vu{} + 0x7c00 : half;
    half = magnitude > 0x7f800000 ? vu{} + 0x7e00 : half;
    return __builtin_convertvector(half | ((u >> 16) & 0x8000), vh);
}

// Elements index .. index + W - 1 of `array`.
static inline vf load(int64_t dtype, const void* array, int64_t index) {
    if (dtype == VSSM_FLOAT32) {
        vf x;
        memcpy(&x, (const float*)array + index, sizeof x);
        return x;
    }
    vh x;
    memcpy(&x, (const uint16_t*)array + index, sizeof x);
    return dtype == VSSM_BFLOAT16 ? from_bfloat16(x) : from_float16(x);
}

static inline void store(int64_t dtype, void* array, int64_t index, vf x) {
    if (dtype == VSSM_FLOAT32) {
        memcpy((float*)array + index, &x, sizeof x);
    } else {
        vh half = dtype == VSSM_BFLOAT16 ? to_bfloat16(x) : to_float16(x);
        memcpy((uint16_t*)array + index, &half, sizeof half);
    }
}

// Elements index .. index + W - 1 of a row of `length`, zeros outside the row.
static inline vf load_clipped(int64_t dtype, const void* row, int64_t index, int64_t length) {
    if (index >= 0 && index + W <= length) return load(dtype, row, index);
    int64_t begin = index < 0 ? 0 : index, end = min(index + W, length), bytes = bytes_of(dtype);
    float inside[W] = {};
    if (begin < end)
        memcpy((char*)inside + (begin - index) * bytes, (const char*)row + begin * bytes, (end - begin) * bytes);
    return load(dtype, inside, 0);
}

// The first `count` lanes of x.
static inline void store_first(int64_t dtype, void* array, int64_t index, vf x, int64_t count) {
    if (count >= W) return store(dtype, array, index, x);
#if defined(__AVX512F__)
    if (dtype == VSSM_FLOAT32)
        return _mm512_mask_storeu_ps((float*)array + index, (__mmask16)((1u << count) - 1), (__m512)x);
#endif
    float inside[W];
    store(dtype, inside, 0, x);
    memcpy((char*)array + index * bytes_of(dtype), inside, count * bytes_of(dtype));
}

// ---- exchange of lanes ----

#if defined(__clang__)
#define VSSM_SHUFFLE(a, b, ...) __builtin_shufflevector(a, b, __VA_ARGS__)
#else
#define VSSM_SHUFFLE(a, b, ...) __builtin_shuffle(a, b, vi{__VA_ARGS__})
#endif

// Lanes a0 b0 a1 b1 ... of the lower (upper) halves of a and b.
static inline void interleave(vf a, vf b, vf& lower, vf& upper) {
#if defined(__AVX512F__)
    lower = VSSM_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    upper = VSSM_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX__)
    lower = VSSM_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
    upper = VSSM_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
    lower = VSSM_SHUFFLE(a, b, 0, 4, 1, 5);
    upper = VSSM_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}

// Transposes the W x W matrix whose rows are x[0], x[1], ...
static inline void transpose(vf* x) {
#pragma GCC unroll 4
    for (int width = 1; width < W; width *= 2) {
        vf y[W];
#pragma GCC unroll 8
        for (int i = 0; i < W / 2; i++) interleave(x[i], x[i + W / 2], y[2 * i], y[2 * i + 1]);
#pragma GCC unroll 16
        for (int i = 0; i < W; i++) x[i] = y[i];
    }
}

// ---- exchange of quads: four neighbouring lanes ----

// A shuffle of a and b that is the same for every quad: lanes i, j, k, l of those of the quad of a, 0 to 3, and of b,
// W to W + 3.
#if defined(__AVX512F__)
#define VSSM_SHUFFLE_QUADS(a, b, i, j, k, l) \
    VSSM_SHUFFLE(a, b, i, j, k, l, i + 4, j + 4, k + 4, l + 4, i + 8, j + 8, k + 8, l + 8, i + 12, j + 12, k + 12, l + 12)
#elif defined(__AVX__)
#define VSSM_SHUFFLE_QUADS(a, b, i, j, k, l) VSSM_SHUFFLE(a, b, i, j, k, l, i + 4, j + 4, k + 4, l + 4)
#else
#define VSSM_SHUFFLE_QUADS(a, b, i, j, k, l) VSSM_SHUFFLE(a, b, i, j, k, l)
#endif

// Lane j of a quad of x[i] changes places with lane i of the same quad of x[j].
static inline void transpose_quads(vf* x) {
    vf lower01 = VSSM_SHUFFLE_QUADS(x[0], x[1], 0, W, 1, W + 1);
    vf upper01 = VSSM_SHUFFLE_QUADS(x[0], x[1], 2, W + 2, 3, W + 3);
    vf lower23 = VSSM_SHUFFLE_QUADS(x[2], x[3], 0, W, 1, W + 1);
    vf upper23 = VSSM_SHUFFLE_QUADS(x[2], x[3], 2, W + 2, 3, W + 3);
    x[0] = VSSM_SHUFFLE_QUADS(lower01, lower23, 0, 1, W, W + 1);
    x[1] = VSSM_SHUFFLE_QUADS(lower01, lower23, 2, 3, W + 2, W + 3);
    x[2] = VSSM_SHUFFLE_QUADS(upper01, upper23, 0, 1, W, W + 1);
    x[3] = VSSM_SHUFFLE_QUADS(upper01, upper23, 2, 3, W + 2, W + 3);
}

// Moves the quads of x up by `count`, 1 or 2; those of `below` fill the gap.
static inline vf shift_quads(vf x, vf below, int count) {
#if defined(__AVX512F__)
    return count == 1 ? VSSM_SHUFFLE(below, x, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23, 24, 25, 26, 27)
                      : VSSM_SHUFFLE(below, x, 8, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22, 23);
#elif defined(__AVX__)
    (void)count;
    return VSSM_SHUFFLE(below, x, 4, 5, 6, 7, 8, 9, 10, 11);
#else
    (void)x, (void)count;
    return below;
#endif
}

// The last quad of x in every quad.
static inline vf last_quad(vf x) {
#if defined(__AVX512F__)
    return VSSM_SHUFFLE(x, x, 12, 13, 14, 15, 12, 13, 14, 15, 12, 13, 14, 15, 12, 13, 14, 15);
#elif defined(__AVX__)
    return VSSM_SHUFFLE(x, x, 4, 5, 6, 7, 4, 5, 6, 7);
#else
    return x;
#endif
}

// x in the first `count` lanes, 0 in the others.
static inline vf first_lanes(vf x, int64_t count) {
    vi lane;
    for (int i = 0; i < W; i++) lane[i] = i;
    return lane < (int32_t)count ? x : zero();
}

// Lane i of the result is the sum over the lanes of x[i]. Overwrites x.
static inline vf sum_lanes(vf* x) {
#pragma GCC unroll 4
    for (int half = W / 2; half > 0; half /= 2) {
#pragma GCC unroll 8
        for (int i = 0; i < half; i++) {
            vf lower, upper;
            interleave(x[i], x[i + half], lower, upper);
            x[i] = lower + upper;
        }
    }
    return x[0];
}

static inline float sum_lanes(vf x) {
    float sum = 0;
    for (int i = 0; i < W; i++) sum += x[i];
    return sum;
}

// ---- functions; all pass NaN on ----

constexpr float LOG2_E = 1.44269504088896341f, LN_2 = 0.693147180559945309f;

// 2^x; relative error 1e-7. x below -127 may give 0.
VSSM_INLINE vf exp2(vf x) {
#if defined(__AVX512F__)
    vf fraction = (vf)_mm512_reduce_ps((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    vf integer = x - fraction;
#else
    x = x < -127.f ? all(-127.f) : x;
    x = x > 128.f ? all(128.f) : x;
    // Adding 1.5 * 2^23 rounds to an integer; adding 127 more leaves the biased exponent in the lowest bits of the sum.
    constexpr float shift = 0x1.8p23f + 127;
    vf shifted = x + shift;
    vf fraction = x - (shifted - shift);
#endif
    // Minimax for the relative error on [-0.5, 0.5] with p(0) = 1, so that slow decays stay exact.
    vf p = fraction * 1.3264727e-3f + 9.6715129e-3f;
    p = p * fraction + 5.5507337e-2f;
    p = p * fraction + 0.24022242f;
    p = p * fraction + 0.69314698f;
    p = p * fraction + 1.f;
#if defined(__AVX512F__)
    return (vf)_mm512_scalef_ps((__m512)p, (__m512)integer);
#else
    // A product rather than an addition to the exponent: that would turn some NaNs into numbers.
    return p * (vf)(bits(shifted) << 23);
#endif
}

static inline vf sigmoid(vf x) { return 1.f / (1.f + exp2(x * -LOG2_E)); }

static inline vf minus_magnitude(vf x) { return (vf)(bits(x) | 0x80000000u); }

// x where that is positive, 0 elsewhere and for NaN.
static inline vf positive_part(vf x) {
#if defined(__AVX512F__)
    return (vf)_mm512_max_ps((__m512)x, (__m512)zero());
#else
    return x > 0.f ? x : zero();
#endif
}

// log(1 + exp(x)), relatively exact for every x; no branch is needed for large x. `e` is exp(-|x|).
VSSM_INLINE vf softplus_given(vf x, vf e) {
    // log(1 + e) = 2 artanh(s) with s = e / (2 + e) <= 1/3: minimax in s^2.
    vf s = e / (2.f + e), v = s * s;
    vf p = v * 0.3422605f + 0.39589456f;
    p = p * v + 0.66676f;
    p = p * v + 1.9999996f;
    return positive_part(x) + p * s;
}

VSSM_INLINE vf softplus(vf x) {
    vf e = exp2(minus_magnitude(x) * LOG2_E);
    return softplus_given(x, e);
}

static inline vf softplus(vf x, vf& derivative) {
    vf e = exp2(minus_magnitude(x) * LOG2_E), one_plus = 1.f / (1.f + e);
    derivative = x > 0.f ? one_plus : e * one_plus;
    return softplus_given(x, e);
}

// ---- tiles: `rows` <= W rows of any dtype, as one vector of W rows per step ----

// Lane r of x[t] is array[index + r * stride + t] for t < steps; lanes from `rows` on and steps up to the next multiple
// of W become zeros. Fetches the tile `ahead` steps from here into the cache, as the processor loses track of so many rows.
static inline void load_tile(int64_t dtype, const void* array, int64_t index, int64_t stride, int64_t rows,
                             int64_t steps, int64_t ahead, vf* x) {
    for (int64_t t = 0; t < steps; t += W) {
        for (int64_t r = 0; r < W; r++) {
            int64_t row = index + r * stride;
            x[t + r] = r < rows ? load_clipped(dtype, array, row + t, row + steps) : zero();
            // May lie outside of the array: fetching cannot fail.
            __builtin_prefetch((const char*)array + (row + t + ahead) * bytes_of(dtype), 0, 2);
        }
        transpose(x + t);
    }
}

// The inverse of load_tile; overwrites x.
static inline void store_tile(int64_t dtype, void* array, int64_t index, int64_t stride, int64_t rows, int64_t steps,
                              vf* x) {
    for (int64_t t = 0; t < steps; t += W) {
        transpose(x + t);
        for (int64_t r = 0; r < rows; r++) store_first(dtype, array, index + r * stride + t, x[t + r], steps - t);
    }
}

}  // namespace VSSM_LEVEL
