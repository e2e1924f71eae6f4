// What both passes of Mamba-2's scan share: access to the arrays of one head, and the walk of its states over time.
//
// Letters: B batch, L steps, H heads, P channels of a head, G groups of B and C, N states.
#pragma once
#include "simd.h"

namespace VSSM_LEVEL {

static inline int64_t blocks_of(const SsdSizes& size) { return divide_up(size.width, W); }

// One head of one item, and access to the arrays that both passes have.
template <class Call>
struct Head {
    const Call& call;
    int64_t item, head;

    int64_t row() const { return item * call.size.heads + head; }

    // Channels first .. first + W - 1 of a (B, L, H, P) array at step t.
    int64_t at(int64_t t, int64_t first) const {
        const SsdSizes& size = call.size;
        return ((item * size.length + t) * size.heads + head) * size.width + first;
    }
    int64_t count(int64_t first) const { return min(W, call.size.width - first); }
    vf load(const void* array, int64_t t, int64_t first) const {
        int64_t index = at(t, first);
        return load_clipped(call.dtype, array, index, index + count(first));
    }
    void store(void* array, int64_t t, int64_t first, vf x) const {
        store_first(call.dtype, array, at(t, first), x, count(first));
    }
    // Of a (H, P) array.
    vf load_channels(const float* array, int64_t first) const {
        int64_t index = head * call.size.width + first;
        return array ? load_clipped(VSSM_FLOAT32, array, index, index + count(first)) : zero();
    }

    // The steps' rows of a (B, L, G, N) array as float32: x[s * N + n] is step t + s. Zeros up to whole fours.
    void load_rows(const void* array, int64_t t, int64_t steps, float* x) const {
        const SsdSizes& size = call.size;
        int64_t group = head / (size.heads / size.groups), N = size.states;
        for (int64_t s = 0; s < steps; s++) {
            int64_t index = ((item * size.length + t + s) * size.groups + group) * N;
            for (int64_t n = 0; n < N; n += W)
                store_first(VSSM_FLOAT32, x, s * N + n, load_clipped(call.dtype, array, index + n, index + N), N - n);
        }
        for (int64_t k = steps * N; k < divide_up(steps, 4) * 4 * N; k++) x[k] = 0;
    }

    // Step sizes and decays; steps added to whole fours change nothing.
    void load_steps(int64_t t, int64_t steps, float* dt, float* decay) const {
        int64_t index = row() * call.size.length + t;
        for (int64_t s = 0; s < divide_up(steps, 4) * 4; s++) {
            dt[s] = s < steps ? call.dt[index + s] : 0;
            decay[s] = s < steps ? call.decay[index + s] : 1;
        }
    }

    // A block of channels of a (B, L, H, P) array; zeros up to whole fours. Fetches the block `ahead` steps from here
    // into the cache: steps lie far apart in memory, where the processor does not look for them.
    void load_block(const void* array, int64_t t, int64_t steps, int64_t first, int64_t ahead, vf* x) const {
        for (int64_t s = 0; s < divide_up(steps, 4) * 4; s++) {
            x[s] = s < steps ? load(array, t + s, first) : zero();
            // May lie outside of the array: fetching cannot fail.
            __builtin_prefetch((const char*)array + at(t + s + ahead, first) * bytes_of(call.dtype), 0, 2);
        }
    }

    // States of a block of channels of a (B, H, P, N) array; zeros where there is no array.
    void load_states(const float* array, int64_t first, vf* x) const {
        const SsdSizes& size = call.size;
        for (int64_t n = 0; n < size.states; n++) {
            x[n] = zero();
            for (int64_t r = 0; array && r < count(first); r++)
                x[n][r] = array[(row() * size.width + first + r) * size.states + n];
        }
    }
    void store_states(float* array, int64_t first, const vf* x) const {
        const SsdSizes& size = call.size;
        for (int64_t r = 0; r < count(first); r++)
            for (int64_t n = 0; n < size.states; n++)
                array[(row() * size.width + first + r) * size.states + n] = x[n][r];
    }
};

// Takes the states h through `steps` steps, h <- decay * h + drive * B, four at a time so that each state is loaded and
// stored once for four. Steps added to whole fours change nothing. With READ, y[s] grows by the sum over n of C * h.
// visit(s, n, h) sees every state after every step.
template <bool READ, class Visit>
static inline void walk(int64_t states, int64_t steps, const float* decay, const vf* drive, const float* B, const float* C,
                 vf* h, vf* y, Visit visit) {
    for (int64_t s = 0; s < steps; s += 4) {
        vf sum[4] = {};
        for (int64_t n = 0; n < states; n++) {
            vf x = h[n];
#pragma GCC unroll 4
            for (int64_t i = 0; i < 4; i++) {
                int64_t at = (s + i) * states + n;
                x = decay[s + i] * x + drive[s + i] * B[at];
                if constexpr (READ) sum[i] += C[at] * x;
                visit(s + i, n, x);
            }
            h[n] = x;
        }
        if constexpr (READ)
            for (int64_t i = 0; i < 4; i++) y[s + i] += sum[i];
    }
}

}  // namespace VSSM_LEVEL
