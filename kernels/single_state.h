// Selective scan with one state, forward, vectorised over time: a vector holds W neighbouring steps of one channel, so
// that nothing but the recurrence itself needs lanes exchanged. Transposing all of u, delta and out, as lanes of channels
// want it, would take most of the time that one state takes.
//
// Four channels go together. Within quads (four neighbouring lanes) the decays and inputs of W steps are transposed:
// vector j then holds the steps 4 q + j of the four channels, so that the steps of a quad follow one another serially;
// log2(W / 4) doublings carry the state from quad to quad.
#pragma once
#include "simd.h"

namespace VSSM_LEVEL {
namespace {

constexpr int QUAD = 4;

// Channels `channel` to `channel + rows - 1`, rows <= QUAD, of one item and group.
template <int64_t DTYPE>
struct SingleState {
    // Steps whose dt is computed in advance, in a loop of its own: the way from delta to out is too long for the processor
    // to see several vectors of steps of it at once.
    static constexpr int64_t TILE = 128;

    const ScanForward& call;
    const int64_t parameters, rows;
    int64_t row[QUAD];  // index of the channels' first steps; absent channels repeat the last one
    float A[QUAD], D[QUAD], bias[QUAD];

    SingleState(const ScanForward& call, int64_t item, int64_t group, int64_t channel, int64_t rows)
        : call(call), parameters((item * call.size.groups + group) * call.size.length), rows(rows) {
        for (int64_t r = 0; r < QUAD; r++) {
            int64_t c = channel + min(r, rows - 1);
            row[r] = (item * call.size.channels + c) * call.size.length;
            A[r] = call.A[c] * LOG2_E;
            D[r] = call.D ? call.D[c] : 0;
            bias[r] = call.delta_bias ? call.delta_bias[c] : 0;
        }
    }

    // Steps t to min(t + W, end) - 1 of the row of an array that begins at `row`.
    template <bool WHOLE>
    static inline vf load(const void* array, int64_t row, int64_t t, int64_t end) {
        return WHOLE ? VSSM_LEVEL::load(DTYPE, array, row + t) : load_clipped(DTYPE, array, row + t, row + end);
    }

    // dt[s] has the steps t + s to t + s + W - 1 of the channels, 0 from `end` on.
    template <bool SOFTPLUS>
    void load_dt(int64_t t, int64_t end, vf (*dt)[QUAD]) const {
        for (; t < end; t += W, dt++)
#pragma GCC unroll 4
            for (int64_t r = 0; r < QUAD; r++) {
                bool whole = t + W <= end;
                vf x = whole ? load<true>(call.delta, row[r], t, end) : load<false>(call.delta, row[r], t, end);
                x += bias[r];
                if (SOFTPLUS) x = softplus(x);
                (*dt)[r] = whole ? x : first_lanes(x, end - t);
            }
    }

    // Steps t to min(t + W, end) - 1. `carry` has the state of channel r in lane r of every quad.
    template <bool WHOLE>
    inline void advance(int64_t t, int64_t end, const vf* dt, vf& carry) const {
        vf B = load<WHOLE>(call.B, parameters, t, end), C = load<WHOLE>(call.C, parameters, t, end);
        vf u[QUAD], decay[QUAD], h[QUAD];
#pragma GCC unroll 4
        for (int64_t r = 0; r < QUAD; r++) {
            u[r] = load<WHOLE>(call.u, row[r], t, end);
            decay[r] = exp2(dt[r] * A[r]);
            h[r] = dt[r] * u[r] * B;
        }
        transpose_quads(decay), transpose_quads(h);

        // From the state before a quad to that after it: state * through + end_state.
        vf through = decay[0], end_state = h[0];
#pragma GCC unroll 4
        for (int64_t j = 1; j < QUAD; j++) end_state = decay[j] * end_state + h[j], through = through * decay[j];
#pragma GCC unroll 4
        for (int quads = 1; quads < W / QUAD; quads *= 2) {
            end_state = through * shift_quads(end_state, zero(), quads) + end_state;
            through = through * shift_quads(through, all(1), quads);
        }
        end_state = through * carry + end_state;
        vf state = shift_quads(end_state, carry, 1);
        carry = last_quad(end_state);
#pragma GCC unroll 4
        for (int64_t j = 0; j < QUAD; j++) h[j] = state = decay[j] * state + h[j];
        transpose_quads(h);

#pragma GCC unroll 4
        for (int64_t r = 0; r < QUAD; r++) {
            vf y = C * h[r] + D[r] * u[r];
            if (call.z) {
                vf z = load<WHOLE>(call.z, row[r], t, end);
                y *= z * sigmoid(z);
            }
            WHOLE ? store(DTYPE, call.out, row[r] + t, y) : store_first(DTYPE, call.out, row[r] + t, y, end - t);
        }
    }

    // By value: the state of the loop over time stays in a register.
    void store_state(vf state, float* array, int64_t stride) const {
        float lanes[W];
        store(VSSM_FLOAT32, lanes, 0, state);
        for (int64_t r = 0; r < rows; r++) array[r * stride] = lanes[r];
    }

    void run() const {
        const ScanSizes& size = call.size;
        const int64_t first = row[0] / size.length, chunks = divide_up(size.length, size.chunk);
        vf carry = zero(), dt[TILE / W][QUAD];
        for (int64_t begin = 0, chunk = 0; begin < size.length; begin += TILE) {
            int64_t end = min(begin + TILE, size.length);
            call.delta_softplus ? load_dt<true>(begin, end, dt) : load_dt<false>(begin, end, dt);
            for (int64_t t = begin; t < end; t += W) {
                // W divides chunks.
                if (t == chunk * size.chunk)
                    store_state(carry, call.chunk_states + first * chunks + chunk++, chunks);
                const vf* steps = dt[(t - begin) / W];
                t + W <= end ? advance<true>(t, end, steps, carry) : advance<false>(t, end, steps, carry);
            }
        }
        if (call.last_state) store_state(carry, call.last_state + first, 1);
    }
};

}  // namespace
}  // namespace VSSM_LEVEL
