// Selective scan, forward and backward, vectorised over channels: one vector holds W neighbouring channels, the loop over
// time is serial and all states of a vector stay in registers or L1. With LOCAL it is the locally bi-directional scan,
// which adds a walk back over each window; vssm/ops/local_bidirectional_scan/portable.py derives its adjoint.
//
// Letters: B batch, D channels, L steps, N states, G groups of B and C, T steps per chunk.
#include "arena.h"
#include "single_state.h"

namespace VSSM_LEVEL {
namespace {

int64_t chunks(const ScanSizes& size) { return divide_up(size.length, size.chunk); }
int64_t group_channels(const ScanSizes& size) { return size.channels / size.groups; }

// Channels channel to channel + rows - 1 of an item, all of one group.
struct Rows {
    int64_t item, group, channel, rows;
};

// Cuts the channels of every item and group into `width` and less: how often, and part number `job` of all.
int64_t parts_of_forward(const ScanSizes& size, int64_t width) {
    return size.batch * size.groups * divide_up(group_channels(size), width);
}
Rows part_of_forward(const ScanSizes& size, int64_t width, int64_t job) {
    int64_t per_group = divide_up(group_channels(size), width), first = job % per_group * width;
    int64_t group = job / per_group % size.groups, item = job / per_group / size.groups;
    return {item, group, group * group_channels(size) + first, min(width, group_channels(size) - first)};
}

// One vector of channels of a call, forward or backward, and access to the arrays that both have.
template <class Call>
struct Block {
    const Call& call;
    int64_t item, group, channel, rows;  // `rows` <= W channels from `channel` on, all of `group`

    // Index of step t of the first row in (B, D, L).
    int64_t at(int64_t t) const { return (item * call.size.channels + channel) * call.size.length + t; }

    // Lane r of x[n] is array[r * stride + n] * scale.
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
    int64_t states_at(int64_t chunk) const { return states_at() * chunks(call.size) + chunk * call.size.states; }

    // A tile of a (B, D, L) array: `steps` steps from t on; the next tile of these rows begins `ahead` steps later.
    void load(const void* array, int64_t t, int64_t steps, int64_t ahead, vf* x) const {
        load_tile(call.dtype, array, at(t), call.size.length, rows, steps, ahead, x);
    }
    void store(void* array, int64_t t, int64_t steps, vf* x) const {
        store_tile(call.dtype, array, at(t), call.size.length, rows, steps, x);
    }

    // Tiles of u, and of dt with its derivative by delta.
    void load_inputs(int64_t t, int64_t steps, int64_t ahead, vf bias, vf* u, vf* dt, vf* slope) const {
        load(call.u, t, steps, ahead, u);
        load(call.delta, t, steps, ahead, dt);
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
                VSSM_LEVEL::store(VSSM_FLOAT32, x, n * width + s, load_clipped(call.dtype, array, row + t + s, row + t + steps));
        }
    }
};

// STATES is N where it is known when compiling, 0 elsewhere.
template <int STATES>
constexpr int64_t capacity = STATES ? STATES : VSSM_MAX_STATES;

// Walks back over one window, the steps begin .. end - 1: visit(s, n, r) takes what step s sees of the steps after it.
// `decay` is (end - begin, N), row n of B begins at n * stride.
template <int STATES, class Visit>
inline void look_ahead(int64_t states, int64_t begin, int64_t end, const vf* decay, const vf* dt, const vf* u,
                       const float* B, int64_t stride, Visit visit) {
    const int64_t N = STATES ? STATES : states;
    vf ahead[capacity<STATES>];
    for (int64_t n = 0; n < N; n++) ahead[n] = zero();
    for (int64_t s = end - 1; s >= begin; s--) {
        vf dtu = dt[s] * u[s];
#pragma GCC unroll 16
        for (int64_t n = 0; n < N; n++) {
            vf r = decay[(s - begin) * N + n] * ahead[n];
            visit(s, n, r);
            ahead[n] = r + dtu * B[n * stride + s];
        }
    }
}

template <int STATES, bool LOCAL>
void forward_block(const Block<ScanForward>& block) {
    const ScanForward& call = block.call;
    const ScanSizes& size = call.size;
    const int64_t N = STATES ? STATES : size.states;
    // A whole cache line of every row and more at a time: where L is a power of two, the rows compete for few places in
    // the cache and would lose the rest of a line before the next tile asks for it.
    constexpr int64_t WIDTH = STATES ? 256 : 16;
    vf A[capacity<STATES>], h[capacity<STATES>], saved[capacity<STATES>];
    float B[capacity<STATES> * WIDTH], C[capacity<STATES> * WIDTH];
    vf u[WIDTH], dt[WIDTH], slope[WIDTH], y[WIDTH], z[WIDTH];
    vf decay[LOCAL ? VSSM_MAX_WINDOW * capacity<STATES> : 1];  // of the steps of a window
    block.load_states(call.A + block.channel * N, N, A, LOG2_E);
    vf D = block.load_channels(call.D), bias = block.load_channels(call.delta_bias);
    for (int64_t n = 0; n < N; n++) h[n] = zero();

    for (int64_t chunk = 0; chunk < chunks(size); chunk++) {
        int64_t begin = chunk * size.chunk, end = min(begin + size.chunk, size.length);
        for (int64_t n = 0; n < N; n++) saved[n] = h[n];
        block.store_states(call.chunk_states + block.states_at(chunk), chunks(size) * N, saved);
        for (int64_t t = begin; t < end; t += WIDTH) {
            int64_t steps = min(WIDTH, end - t);
            block.load_inputs(t, steps, steps, bias, u, dt, slope);
            block.load_rows(call.B, t, steps, WIDTH, B);
            block.load_rows(call.C, t, steps, WIDTH, C);
            for (int64_t s = 0; s < steps; s++) {
                vf dtu = dt[s] * u[s], sum = D * u[s];
#pragma GCC unroll 16
                for (int64_t n = 0; n < N; n++) {
                    vf a = exp2(dt[s] * A[n]);
                    h[n] = a * h[n] + dtu * B[n * WIDTH + s];
                    sum += C[n * WIDTH + s] * h[n];
                    if constexpr (LOCAL) decay[s % size.window * N + n] = a;
                }
                y[s] = sum;
                if constexpr (LOCAL) {
                    if ((s + 1) % size.window == 0 || s + 1 == steps)
                        look_ahead<STATES>(N, s / size.window * size.window, s + 1, decay, dt, u, B, WIDTH,
                                           [&](int64_t i, int64_t n, vf r) { y[i] += C[n * WIDTH + i] * r; });
                }
            }
            if (call.z) {
                block.load(call.z, t, steps, steps, z);
                for (int64_t s = 0; s < steps; s++) y[s] *= z[s] * sigmoid(z[s]);
            }
            block.store(call.out, t, steps, y);
        }
    }
    if (!call.last_state) return;
    for (int64_t n = 0; n < N; n++) saved[n] = h[n];
    block.store_states(call.last_state + block.states_at(), N, saved);
}

// ---- backward ----
//
// A job walks the chunks of a slice of the channels of one group backwards: it recomputes all states and decays of a
// chunk, about sqrt(L) steps, which stay in cache while the adjoint walks back over them. dB and dC are sums over the
// channels of a group: taken over lanes every TILE steps, over the vectors of a slice as the job goes on and over slices at
// the very end, in an order that depends on nothing but D and G.

constexpr int64_t TILE = 16, MAX_SLICE = 64, MAX_BLOCKS = MAX_SLICE / W;

// Channels of a slice: many save work and memory, few give small models enough jobs.
int64_t slice_channels(const ScanSizes& size) { return group_channels(size) > 128 ? MAX_SLICE : 32; }
int64_t slices(const ScanSizes& size) { return divide_up(group_channels(size), slice_channels(size)); }

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
    vf *A, *adjoint, *dA;        // (blocks, N); the adjoint multiplied by the decay of the step after
    vf *h, *decay;               // (T, N); h has the start in front
    vf *dB_terms, *dC_terms;     // (TILE, N)
    float *B, *C;                // (N, T)
    vf *u, *dt, *slope, *g, *z;  // (T)

    Scratch(Arena& arena, const ScanSizes& size) {
        int64_t N = size.states, T = size.chunk;
        A = arena.vectors(MAX_BLOCKS * N), adjoint = arena.vectors(MAX_BLOCKS * N), dA = arena.vectors(MAX_BLOCKS * N);
        h = arena.vectors((T + 1) * N), decay = arena.vectors(T * N);
        dB_terms = arena.vectors(TILE * N), dC_terms = arena.vectors(TILE * N);
        B = arena.floats(N * T), C = arena.floats(N * T);
        u = arena.vectors(T), dt = arena.vectors(T), slope = arena.vectors(T), g = arena.vectors(T), z = arena.vectors(T);
    }
};

// Sums (steps, N) vectors over their lanes; rows n of (N, L), from step t on, take the sums or add them.
void sum_channels(const vf* x, int64_t states, int64_t length, int64_t t, int64_t steps, bool add, float* rows) {
    for (int64_t s = 0; s < steps; s += W)
        for (int64_t n = 0; n < states; n++) {
            int64_t index = n * length + t + s;
            vf lanes[W];
            for (int64_t i = 0; i < W; i++) lanes[i] = s + i < steps ? x[(s + i) * states + n] : zero();
            vf sum = sum_lanes(lanes);
            if (add) sum += load_clipped(VSSM_FLOAT32, rows, index, index + steps - s);
            store_first(VSSM_FLOAT32, rows, index, sum, steps - s);
        }
}

// The walk of the vector of channels number `index` of a slice over the chunk of `steps` steps from t on.
template <int STATES, bool LOCAL>
void backward_block(const Block<ScanBackward>& block, const Scratch& scratch, int64_t index, int64_t t, int64_t steps,
                    float* dB, float* dC, vf& dD_sum, vf& ddelta_bias_sum) {
    const ScanBackward& call = block.call;
    const int64_t N = STATES ? STATES : call.size.states, length = call.size.length, T = call.size.chunk;
    const vf* A = scratch.A + index * N;
    const float *B = scratch.B, *C = scratch.C;
    vf *h = scratch.h, *decay = scratch.decay, *dB_terms = scratch.dB_terms, *dC_terms = scratch.dC_terms;
    vf *u = scratch.u, *dt = scratch.dt, *slope = scratch.slope, *g = scratch.g, *z = scratch.z;
    vf D = block.load_channels(call.D);
    block.load_inputs(t, steps, -T, block.load_channels(call.delta_bias), u, dt, slope);
    block.load(call.grad_out, t, steps, -T, g);

    block.load_states(call.chunk_states + block.states_at(t / T), chunks(call.size) * N, h);
    for (int64_t s = 0; s < steps; s++) {
        vf dtu = dt[s] * u[s];
#pragma GCC unroll 16
        for (int64_t n = 0; n < N; n++) {
            vf a = exp2(dt[s] * A[n]);
            decay[s * N + n] = a;
            h[(s + 1) * N + n] = a * h[s * N + n] + dtu * B[n * T + s];
        }
    }

    // With LOCAL dC_terms holds r, dB_terms its adjoint mu and local_decay by_decay until the walk back needs them.
    const int64_t window = call.size.window;
    vf local_decay[TILE];
    auto look_ahead_tile = [&](int64_t begin, int64_t end) {
        for (int64_t s = begin; s < end; s += window)
            look_ahead<STATES>(N, s, min(s + window, end), decay + s * N, dt, u, B, T,
                               [&](int64_t i, int64_t n, vf r) { dC_terms[(i - begin) * N + n] = r; });
    };

    if (call.z) {
        block.load(call.z, t, steps, -T, z);
        for (int64_t s = 0; s < steps; s++) {
            vf y = D * u[s], gate = sigmoid(z[s]), grad_out = g[s];
            for (int64_t n = 0; n < N; n++) y += C[n * T + s] * h[(s + 1) * N + n];
            if constexpr (LOCAL) {
                if (s % TILE == 0) look_ahead_tile(s, min(s + TILE, steps));
                for (int64_t n = 0; n < N; n++) y += C[n * T + s] * dC_terms[s % TILE * N + n];
            }
            g[s] *= z[s] * gate;
            z[s] = grad_out * y * gate * (1.f + z[s] * (1.f - gate));
        }
        block.store(call.dz, t, steps, z);
    }

    vf adjoint[capacity<STATES>], dA[capacity<STATES>];
    for (int64_t n = 0; n < N; n++) adjoint[n] = scratch.adjoint[index * N + n], dA[n] = zero();
    for (int64_t tile = (steps - 1) / TILE * TILE; tile >= 0; tile -= TILE) {
        int64_t tile_end = min(tile + TILE, steps);
        if constexpr (LOCAL) {
            vf mu[capacity<STATES>];
            look_ahead_tile(tile, tile_end);
            for (int64_t s = tile; s < tile_end; s++) {
                if (s % window == 0)
                    for (int64_t n = 0; n < N; n++) mu[n] = zero();
                local_decay[s - tile] = zero();
#pragma GCC unroll 16
                for (int64_t n = 0; n < N; n++) {
                    int64_t i = (s - tile) * N + n;
                    vf rho = C[n * T + s] * g[s] + mu[n], carried = rho * dC_terms[i];
                    dB_terms[i] = mu[n];
                    local_decay[s - tile] += carried * A[n];
                    dA[n] += carried * dt[s];
                    mu[n] = decay[s * N + n] * rho;
                }
            }
        }
        for (int64_t s = tile_end - 1; s >= tile; s--) {
            vf dtu = dt[s] * u[s], by_input = zero(), by_decay = LOCAL ? local_decay[s - tile] : zero();
#pragma GCC unroll 16
            for (int64_t n = 0; n < N; n++) {
                int64_t i = s * N + n, in_tile = i - tile * N;
                vf lambda = C[n * T + s] * g[s] + adjoint[n];
                vf of_input = LOCAL ? lambda + dB_terms[in_tile] : lambda;
                dC_terms[in_tile] = g[s] * (LOCAL ? h[i + N] + dC_terms[in_tile] : h[i + N]);
                dB_terms[in_tile] = dtu * of_input;
                by_input += of_input * B[n * T + s];
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
        sum_channels(dB_terms, N, length, t + tile, tile_end - tile, index > 0, dB);
        sum_channels(dC_terms, N, length, t + tile, tile_end - tile, index > 0, dC);
    }
    block.store(call.du, t, steps, u);
    block.store(call.ddelta, t, steps, dt);
    // Adding up a chunk at a time keeps the rounding error of long sequences small.
    for (int64_t n = 0; n < N; n++) scratch.adjoint[index * N + n] = adjoint[n], scratch.dA[index * N + n] += dA[n];
}

template <int STATES, bool LOCAL>
void backward_slice(const ScanBackward& call, const Partial& partial, const Scratch& scratch, int64_t job) {
    const ScanSizes& size = call.size;
    const int64_t N = STATES ? STATES : size.states;
    int64_t group = job / slices(size) % size.groups, item = job / slices(size) / size.groups;
    int64_t first = job % slices(size) * slice_channels(size);
    int64_t last = min(first + slice_channels(size), group_channels(size)), blocks = divide_up(last - first, W);
    auto block = [&](int64_t index) {
        int64_t channel = first + index * W;
        return Block<ScanBackward>{call, item, group, group * group_channels(size) + channel, min(W, last - channel)};
    };
    vf dD[MAX_BLOCKS], ddelta_bias[MAX_BLOCKS];
    for (int64_t i = 0; i < blocks; i++) {
        dD[i] = ddelta_bias[i] = zero();
        block(i).load_states(call.A + block(i).channel * N, N, scratch.A + i * N, LOG2_E);
        for (int64_t n = 0; n < N; n++) scratch.adjoint[i * N + n] = scratch.dA[i * N + n] = zero();
        if (call.grad_last_state)
            block(i).load_states(call.grad_last_state + block(i).states_at(), N, scratch.adjoint + i * N);
    }

    for (int64_t chunk = chunks(size) - 1; chunk >= 0; chunk--) {
        int64_t t = chunk * size.chunk, steps = min(size.chunk, size.length - t);
        block(0).load_rows(call.B, t, steps, size.chunk, scratch.B);
        block(0).load_rows(call.C, t, steps, size.chunk, scratch.C);
        for (int64_t i = 0; i < blocks; i++)
            backward_block<STATES, LOCAL>(block(i), scratch, i, t, steps, partial.dB + job * N * size.length,
                                          partial.dC + job * N * size.length, dD[i], ddelta_bias[i]);
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

// out[index + i] = sum over k < count of terms[k * stride + i], in the order of k, for i < length.
void add_terms(const float* terms, int64_t count, int64_t stride, int64_t length, int64_t dtype, void* out,
               int64_t index) {
    for (int64_t i = 0; i < length; i += W) {
        vf sum = zero();
        for (int64_t k = 0; k < count; k++) sum += load_clipped(VSSM_FLOAT32, terms + k * stride, i, length);
        store_first(dtype, out, index + i, sum, length - i);
    }
}

// One state without LOCAL has a kernel of its own.
template <bool LOCAL>
void forward_any(const Block<ScanForward>& block) {
    int64_t N = block.call.size.states;
    if (N == 16) return forward_block<16, LOCAL>(block);
    N == 1 ? forward_block<LOCAL, LOCAL>(block) : forward_block<0, LOCAL>(block);
}

template <int64_t DTYPE>
void single_state_forward(const ScanForward& call) {
    const ScanSizes& size = call.size;
    int64_t jobs = parts_of_forward(size, QUAD);
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)size.num_threads)
    for (int64_t job = 0; job < jobs; job++) {
        Rows part = part_of_forward(size, QUAD, job);
        SingleState<DTYPE>(call, part.item, part.group, part.channel, part.rows).run();
    }
}

template <bool LOCAL>
void backward_any(const ScanBackward& call, const Partial& partial, const Scratch& scratch, int64_t job) {
    int64_t N = call.size.states;
    N == 1    ? backward_slice<1, LOCAL>(call, partial, scratch, job)
    : N == 16 ? backward_slice<16, LOCAL>(call, partial, scratch, job)
              : backward_slice<0, LOCAL>(call, partial, scratch, job);
}

}  // namespace

void scan_forward(const ScanForward& call) {
    const ScanSizes& size = call.size;
    if (size.states == 1 && size.window == 1) {
        if (call.dtype == VSSM_FLOAT32) return single_state_forward<VSSM_FLOAT32>(call);
        if (call.dtype == VSSM_BFLOAT16) return single_state_forward<VSSM_BFLOAT16>(call);
        return single_state_forward<VSSM_FLOAT16>(call);
    }
    int64_t jobs = parts_of_forward(size, W);
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)size.num_threads)
    for (int64_t job = 0; job < jobs; job++) {
        Rows part = part_of_forward(size, W, job);
        Block<ScanForward> block{call, part.item, part.group, part.channel, part.rows};
        size.window > 1 ? forward_any<true>(block) : forward_any<false>(block);
    }
}

static int64_t backward_jobs(const ScanSizes& size) { return size.batch * size.groups * slices(size); }
static int64_t backward_threads(const ScanSizes& size) {
    int64_t threads = min(size.num_threads, backward_jobs(size));
    return threads > 1 ? threads : 1;
}
static int64_t scratch_floats(const ScanSizes& size) {
    Arena counting{nullptr};
    Scratch(counting, size);
    return counting.used;
}

int64_t scan_backward_workspace(const ScanSizes& size) {
    Arena counting{nullptr};
    Partial(counting, size);
    return counting.used + backward_threads(size) * scratch_floats(size);
}

void scan_backward(const ScanBackward& call) {
    const ScanSizes& size = call.size;
    Arena arena{call.workspace};
    Partial partial(arena, size);
    int64_t N = size.states, L = size.length, parts = slices(size), jobs = backward_jobs(size);

#pragma omp parallel num_threads((int)backward_threads(size))
    {
        Arena own{arena.start + arena.used + omp_get_thread_num() * scratch_floats(size)};
        Scratch scratch(own, size);
#pragma omp for schedule(dynamic, 1)
        for (int64_t job = 0; job < jobs; job++)
            size.window > 1 ? backward_any<true>(call, partial, scratch, job)
                            : backward_any<false>(call, partial, scratch, job);
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
