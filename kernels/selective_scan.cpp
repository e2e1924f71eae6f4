// Selective scan, forward and backward, vectorised over channels: one vector holds W neighbouring channels, the loop over
// time is serial and all states of a vector stay in registers or L1.
//
// Letters: B batch, D channels, L steps, N states, G groups of B and C, T steps per chunk.
#include "simd.h"

namespace VSSM_LEVEL {
namespace {

// What one call shares between forward and backward: the fields of these names in ScanForward and ScanBackward.
template <class Call>
struct Block {
    const Call& call;
    int64_t item, group, channel, rows;  // `rows` <= W channels from `channel` on, all of `group`

    // Index of step t of the first row in (B, D, L).
    int64_t at(int64_t t) const { return (item * call.size.channels + channel) * call.size.length + t; }

    // Lane r of x[n] <-> array[(r * stride + n)] for (rows, N) matrices of states.
    void load_states(const float* array, int64_t stride, vf* x, float scale = 1) const {
        for (int64_t n = 0; n < call.size.states; n++) {
            x[n] = zero();
            for (int64_t r = 0; r < rows; r++) x[n][r] = array[r * stride + n] * scale;
        }
    }
    void store_states(float* array, int64_t stride, const vf* x) const {
        for (int64_t r = 0; r < rows; r++)
            for (int64_t n = 0; n < call.size.states; n++) array[r * stride + n] = x[n][r];
    }
    vf load_channels(const float* array) const {
        vf x = zero();
        if (array)
            for (int64_t r = 0; r < rows; r++) x[r] = array[channel + r];
        return x;
    }
    // Index of the first row's states in (B, D, N), and in (B, D, S, N) for a chunk.
    int64_t states_at() const { return (item * call.size.channels + channel) * call.size.states; }
    int64_t states_at(int64_t chunk) const { return states_at() * call.size.chunks() + chunk * call.size.states; }

    // u, and dt with its derivative by delta, for `steps` steps from t on.
    void load_inputs(int64_t t, int64_t steps, vf bias, vf* u, vf* dt, vf* slope) const {
        load_tile(call.dtype, call.u, at(t), call.size.length, rows, steps, u);
        load_tile(call.dtype, call.delta, at(t), call.size.length, rows, steps, dt);
        for (int64_t s = 0; s < steps; s++) {
            dt[s] += bias;
            slope[s] = all(1);
            if (call.delta_softplus) dt[s] = softplus(dt[s], slope[s]);
        }
    }

    // Rows n < N of (B, G, N, L) as float32: x[n * width + s] is step t + s.
    void load_rows(const void* array, int64_t t, int64_t steps, int64_t width, float* x) const {
        const ScanSizes& size = call.size;
        for (int64_t n = 0; n < size.states; n++) {
            int64_t row = ((item * size.groups + group) * size.states + n) * size.length;
            for (int64_t s = 0; s < steps; s += W)
                store(VSSM_FLOAT32, x, n * width + s, load_clipped(call.dtype, array, row + t + s, row + t + steps));
        }
    }
};

// STATES is N where it is known when compiling, 0 elsewhere.
template <int STATES>
constexpr int64_t capacity = STATES ? STATES : VSSM_MAX_STATES;

// h <- exp(dt * A) * h + dt * u * B for one step; `A` comes multiplied by log2(e), `B` is that step's column.
template <int STATES>
inline void advance(vf* h, const vf* A, vf dt, vf dtu, const float* B, int64_t width, int64_t states) {
    const int64_t N = STATES ? STATES : states;
#pragma GCC unroll 16
    for (int64_t n = 0; n < N; n++) h[n] = exp2(dt * A[n]) * h[n] + dtu * B[n * width];
}

template <int STATES>
void forward_block(const Block<ScanForward>& block) {
    const ScanForward& call = block.call;
    const ScanSizes& size = call.size;
    const int64_t N = STATES ? STATES : size.states;
    vf A[capacity<STATES>], h[capacity<STATES>], saved[capacity<STATES>];
    float B[capacity<STATES> * W], C[capacity<STATES> * W];
    vf u[W], dt[W], slope[W], y[W], z[W];
    block.load_states(call.A + block.channel * N, N, A, LOG2_E);
    vf D = block.load_channels(call.D), bias = block.load_channels(call.delta_bias);
    for (int64_t n = 0; n < N; n++) h[n] = zero();

    for (int64_t t = 0; t < size.length; t += W) {
        int64_t steps = min(W, size.length - t);
        if (t % size.chunk == 0) {
            for (int64_t n = 0; n < N; n++) saved[n] = h[n];
            block.store_states(call.chunk_states + block.states_at(t / size.chunk), size.chunks() * N, saved);
        }
        block.load_inputs(t, steps, bias, u, dt, slope);
        block.load_rows(call.B, t, steps, W, B);
        block.load_rows(call.C, t, steps, W, C);
        for (int64_t s = 0; s < steps; s++) {
            advance<STATES>(h, A, dt[s], dt[s] * u[s], B + s, W, N);
            vf sum = D * u[s];
#pragma GCC unroll 16
            for (int64_t n = 0; n < N; n++) sum += C[n * W + s] * h[n];
            y[s] = sum;
        }
        if (call.z) {
            load_tile(call.dtype, call.z, block.at(t), size.length, block.rows, steps, z);
            for (int64_t s = 0; s < steps; s++) y[s] *= z[s] * sigmoid(z[s]);
        }
        store_tile(call.dtype, call.out, block.at(t), size.length, block.rows, steps, y);
    }
    for (int64_t n = 0; n < N; n++) saved[n] = h[n];
    block.store_states(call.last_state + block.states_at(), N, saved);
}

// ---- backward ----
//
// A job walks the chunks of at most SLICE channels of one group backwards. In a chunk it first recomputes the states at
// the start of every sub-chunk; then, last sub-chunk first, all states and decays of that sub-chunk, which stay in cache
// while the adjoint walks back over them. dB and dC are sums over the channels of a group: taken over the vectors of a
// slice as the walk goes, over lanes when a sub-chunk is done and over slices at the very end, always in an order that
// depends on nothing but D and G.

constexpr int64_t SLICE = 32, BLOCKS = SLICE / W, MAX_SUB_CHUNK = 64;

int64_t slices(const ScanSizes& size) { return divide_up(size.group_channels(), SLICE); }

// Steps whose states are kept at a time: fewer for more states, so that they fit the cache; a multiple of 16.
int64_t sub_chunk(const ScanSizes& size) {
    int64_t cached = min(512 / size.states / 16 * 16, MAX_SUB_CHUNK);
    return min(size.chunk, cached < 16 ? 16 : cached);
}

// Hands out parts of the caller's workspace; without a start it only counts.
struct Arena {
    float* start;
    int64_t used = 0;

    float* floats(int64_t count) {
        float* part = start ? start + used : nullptr;
        used += divide_up(count, 16) * 16;
        return part;
    }
    vf* vectors(int64_t count) { return (vf*)floats(count * W); }
};

// Sums that jobs leave for the final addition.
struct Partial {
    float *dB, *dC;           // (B, G, slices, N, L)
    float *dA;                // (B, D, N)
    float *dD, *ddelta_bias;  // (B, D)

    Partial(Arena& arena, const ScanSizes& size) {
        int64_t rows = size.batch * size.groups * slices(size) * size.states, channels = size.batch * size.channels;
        dB = arena.floats(rows * size.length), dC = arena.floats(rows * size.length);
        dA = arena.floats(channels * size.states);
        dD = arena.floats(channels), ddelta_bias = arena.floats(channels);
    }
};

// Private memory of a thread.
struct Scratch {
    vf *A, *adjoint, *dA;           // (BLOCKS, N); the adjoint multiplied by the decay of the step after
    vf* starts;                     // (BLOCKS, sub-chunks, N)
    vf *h, *decay, *dB_sum, *dC_sum;  // (steps, N); h has the start in front
    float *B, *C;                   // (N, steps)

    Scratch(Arena& arena, const ScanSizes& size) {
        int64_t N = size.states, steps = sub_chunk(size);
        A = arena.vectors(BLOCKS * N), adjoint = arena.vectors(BLOCKS * N), dA = arena.vectors(BLOCKS * N);
        starts = arena.vectors(BLOCKS * divide_up(size.chunk, steps) * N);
        h = arena.vectors((steps + 1) * N), decay = arena.vectors(steps * N);
        dB_sum = arena.vectors(steps * N), dC_sum = arena.vectors(steps * N);
        B = arena.floats(N * steps), C = arena.floats(N * steps);
    }
};

// The walk of one vector of channels over one sub-chunk of `steps` steps from t on.
template <int STATES>
void backward_sub_chunk(const Block<ScanBackward>& block, const Scratch& scratch, int64_t index, const vf* start,
                        int64_t t, int64_t steps, int64_t width, vf& dD_sum, vf& ddelta_bias_sum) {
    const ScanBackward& call = block.call;
    const int64_t N = STATES ? STATES : call.size.states, length = call.size.length;
    const vf *A = scratch.A + index * N;
    const float *B = scratch.B, *C = scratch.C;
    vf *h = scratch.h, *decay = scratch.decay, D = block.load_channels(call.D);
    vf u[MAX_SUB_CHUNK], dt[MAX_SUB_CHUNK], slope[MAX_SUB_CHUNK], g[MAX_SUB_CHUNK], z[MAX_SUB_CHUNK];
    block.load_inputs(t, steps, block.load_channels(call.delta_bias), u, dt, slope);
    load_tile(call.dtype, call.grad_out, block.at(t), length, block.rows, steps, g);

    for (int64_t n = 0; n < N; n++) h[n] = start[n];
    for (int64_t s = 0; s < steps; s++) {
        vf dtu = dt[s] * u[s];
#pragma GCC unroll 16
        for (int64_t n = 0; n < N; n++) {
            vf a = exp2(dt[s] * A[n]);
            decay[s * N + n] = a;
            h[(s + 1) * N + n] = a * h[s * N + n] + dtu * B[n * width + s];
        }
    }

    if (call.z) {
        load_tile(call.dtype, call.z, block.at(t), length, block.rows, steps, z);
        for (int64_t s = 0; s < steps; s++) {
            vf y = D * u[s], gate = sigmoid(z[s]);
            for (int64_t n = 0; n < N; n++) y += C[n * width + s] * h[(s + 1) * N + n];
            vf grad_out = g[s];
            g[s] *= z[s] * gate;
            z[s] = grad_out * y * gate * (1.f + z[s] * (1.f - gate));
        }
        store_tile(call.dtype, call.dz, block.at(t), length, block.rows, steps, z);
    }

    vf adjoint[capacity<STATES>], dA[capacity<STATES>];
    for (int64_t n = 0; n < N; n++) adjoint[n] = scratch.adjoint[index * N + n], dA[n] = zero();
    for (int64_t s = steps - 1; s >= 0; s--) {
        vf dtu = dt[s] * u[s], by_input = zero(), by_decay = zero();
#pragma GCC unroll 16
        for (int64_t n = 0; n < N; n++) {
            int64_t i = s * N + n;
            vf lambda = C[n * width + s] * g[s] + adjoint[n];
            scratch.dC_sum[i] += g[s] * h[i + N];
            scratch.dB_sum[i] += dtu * lambda;
            by_input += lambda * B[n * width + s];
            adjoint[n] = decay[i] * lambda;
            // lambda * decay * h[t-1]: the same as lambda * (h[t] - dt * B * u), without the cancellation.
            vf carried = adjoint[n] * h[i];
            by_decay += carried * A[n];
            dA[n] += carried * dt[s];
        }
        dD_sum += g[s] * u[s];
        // A carries a factor log2(e).
        vf ddelta = (u[s] * by_input + LN_2 * by_decay) * slope[s];
        ddelta_bias_sum += ddelta;
        u[s] = D * g[s] + dt[s] * by_input;
        dt[s] = ddelta;
    }
    store_tile(call.dtype, call.du, block.at(t), length, block.rows, steps, u);
    store_tile(call.dtype, call.ddelta, block.at(t), length, block.rows, steps, dt);
    // Adding up a sub-chunk at a time keeps the rounding error of long sequences small.
    for (int64_t n = 0; n < N; n++) scratch.adjoint[index * N + n] = adjoint[n], scratch.dA[index * N + n] += dA[n];
}

// Sums (steps, N) vectors over their lanes into rows n of (N, L), from step t on.
void sum_channels(vf* x, int64_t states, int64_t length, int64_t t, int64_t steps, float* rows) {
    for (int64_t s = 0; s < steps; s += W)
        for (int64_t n = 0; n < states; n++) {
            vf lanes[W];
            for (int64_t i = 0; i < W; i++) lanes[i] = s + i < steps ? x[(s + i) * states + n] : zero();
            store_first(VSSM_FLOAT32, rows, n * length + t + s, sum_lanes(lanes), steps - s);
        }
}

template <int STATES>
void backward_slice(const ScanBackward& call, const Partial& partial, const Scratch& scratch, int64_t job) {
    const ScanSizes& size = call.size;
    const int64_t N = STATES ? STATES : size.states, width = sub_chunk(size), sub_chunks = divide_up(size.chunk, width);
    int64_t slice = job % slices(size), group = job / slices(size) % size.groups;
    int64_t item = job / slices(size) / size.groups;
    int64_t first = slice * SLICE, last = min(first + SLICE, size.group_channels()), blocks = divide_up(last - first, W);
    auto block = [&](int64_t index) {
        int64_t channel = first + index * W;
        return Block<ScanBackward>{call, item, group, group * size.group_channels() + channel, min(W, last - channel)};
    };
    vf dD[BLOCKS], ddelta_bias[BLOCKS];
    for (int64_t i = 0; i < blocks; i++) {
        dD[i] = ddelta_bias[i] = zero();
        block(i).load_states(call.A + block(i).channel * N, N, scratch.A + i * N, LOG2_E);
        for (int64_t n = 0; n < N; n++) scratch.adjoint[i * N + n] = scratch.dA[i * N + n] = zero();
        if (call.grad_last_state)
            block(i).load_states(call.grad_last_state + block(i).states_at(), N, scratch.adjoint + i * N);
    }

    for (int64_t chunk = size.chunks() - 1; chunk >= 0; chunk--) {
        int64_t begin = chunk * size.chunk, end = min(begin + size.chunk, size.length);
        int64_t used = divide_up(end - begin, width);
        for (int64_t i = 0; i < blocks; i++) {
            vf* start = scratch.starts + i * sub_chunks * N;
            block(i).load_states(call.chunk_states + block(i).states_at(chunk), size.chunks() * N, start);
        }
        for (int64_t sub = 0; sub + 1 < used; sub++) {
            block(0).load_rows(call.B, begin + sub * width, width, width, scratch.B);
            for (int64_t i = 0; i < blocks; i++) {
                vf u[MAX_SUB_CHUNK], dt[MAX_SUB_CHUNK], slope[MAX_SUB_CHUNK], h[capacity<STATES>];
                vf* start = scratch.starts + (i * sub_chunks + sub) * N;
                block(i).load_inputs(begin + sub * width, width, block(i).load_channels(call.delta_bias), u, dt, slope);
                for (int64_t n = 0; n < N; n++) h[n] = start[n];
                for (int64_t s = 0; s < width; s++)
                    advance<STATES>(h, scratch.A + i * N, dt[s], dt[s] * u[s], scratch.B + s, width, N);
                for (int64_t n = 0; n < N; n++) start[N + n] = h[n];
            }
        }
        for (int64_t sub = used - 1; sub >= 0; sub--) {
            int64_t t = begin + sub * width, steps = min(width, end - t);
            block(0).load_rows(call.B, t, steps, width, scratch.B);
            block(0).load_rows(call.C, t, steps, width, scratch.C);
            for (int64_t i = 0; i < steps * N; i++) scratch.dB_sum[i] = scratch.dC_sum[i] = zero();
            for (int64_t i = 0; i < blocks; i++)
                backward_sub_chunk<STATES>(block(i), scratch, i, scratch.starts + (i * sub_chunks + sub) * N, t, steps,
                                           width, dD[i], ddelta_bias[i]);
            sum_channels(scratch.dB_sum, N, size.length, t, steps, partial.dB + job * N * size.length);
            sum_channels(scratch.dC_sum, N, size.length, t, steps, partial.dC + job * N * size.length);
        }
    }
    for (int64_t i = 0; i < blocks; i++) {
        block(i).store_states(partial.dA + block(i).states_at(), N, scratch.dA + i * N);
        for (int64_t r = 0; r < block(i).rows; r++) {
            int64_t channel = item * size.channels + block(i).channel + r;
            partial.dD[channel] = dD[i][r];
            partial.ddelta_bias[channel] = ddelta_bias[i][r];
        }
    }
}

// out[i] = sum over k < count of terms[k * stride + i], in the order of k, for i < length.
void add_terms(const float* terms, int64_t count, int64_t stride, int64_t length, int64_t dtype, void* out,
               int64_t index) {
    for (int64_t i = 0; i < length; i += W) {
        vf sum = zero();
        for (int64_t k = 0; k < count; k++)
            sum += load_clipped(VSSM_FLOAT32, terms + k * stride, i, length);
        store_first(dtype, out, index + i, sum, length - i);
    }
}

}  // namespace

void scan_forward(const ScanForward& call) {
    const ScanSizes& size = call.size;
    int64_t per_group = divide_up(size.group_channels(), W), jobs = size.batch * size.groups * per_group;
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)size.num_threads)
    for (int64_t job = 0; job < jobs; job++) {
        int64_t first = job % per_group * W, group = job / per_group % size.groups, item = job / per_group / size.groups;
        Block<ScanForward> block{call, item, group, group * size.group_channels() + first,
                                 min(W, size.group_channels() - first)};
        size.states == 1 ? forward_block<1>(block) : size.states == 16 ? forward_block<16>(block) : forward_block<0>(block);
    }
}

int64_t scan_backward_workspace(const ScanSizes& size) {
    Arena shared{nullptr}, thread{nullptr};
    Partial(shared, size);
    Scratch(thread, size);
    return shared.used + thread.used * size.num_threads;
}

void scan_backward(const ScanBackward& call) {
    const ScanSizes& size = call.size;
    Arena arena{call.workspace};
    Partial partial(arena, size);
    int64_t N = size.states, L = size.length, parts = slices(size), jobs = size.batch * size.groups * parts;
    float* threads = arena.start + arena.used;
    Arena one{nullptr};
    Scratch(one, size);

#pragma omp parallel num_threads((int)size.num_threads)
    {
        Arena own{threads + omp_get_thread_num() * one.used};
        Scratch scratch(own, size);
#pragma omp for schedule(dynamic, 1)
        for (int64_t job = 0; job < jobs; job++)
            N == 1    ? backward_slice<1>(call, partial, scratch, job)
            : N == 16 ? backward_slice<16>(call, partial, scratch, job)
                      : backward_slice<0>(call, partial, scratch, job);
#pragma omp for
        for (int64_t group = 0; group < size.batch * size.groups; group++) {
            add_terms(partial.dB + group * parts * N * L, parts, N * L, N * L, call.dtype, call.dB, group * N * L);
            add_terms(partial.dC + group * parts * N * L, parts, N * L, N * L, call.dtype, call.dC, group * N * L);
        }
    }
    int64_t D = size.channels;
    add_terms(partial.dA, size.batch, D * N, D * N, VSSM_FLOAT32, call.dA, 0);
    if (call.dD) add_terms(partial.dD, size.batch, D, D, VSSM_FLOAT32, call.dD, 0);
    if (call.ddelta_bias) add_terms(partial.ddelta_bias, size.batch, D, D, VSSM_FLOAT32, call.ddelta_bias, 0);
}

}  // namespace VSSM_LEVEL
