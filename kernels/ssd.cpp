// Mamba-2's scan, forward and backward, as its recurrence: one vector holds W neighbouring channels of a head, which lie
// next to one another in memory, and the loop over time is serial. No exponential is left here: decays come from the
// caller, one number per head and step.
//
// Letters: B batch, L steps, H heads, P channels of a head, G groups of B and C, N states, T steps per chunk of the
// backward pass.
#include "arena.h"
#include "ssd_head.h"

namespace VSSM_LEVEL {
namespace {

constexpr int64_t TILE = 16;

// W channels from `first` on.
void forward_block(const Head<SsdForward>& head, int64_t first) {
    const SsdForward& call = head.call;
    const SsdSizes& size = call.size;
    float B[TILE * VSSM_MAX_STATES], C[TILE * VSSM_MAX_STATES], dt[TILE], decay[TILE];
    vf h[VSSM_MAX_STATES], x[TILE], drive[TILE], y[TILE];
    vf D = head.load_channels(call.D, first);
    head.load_states(call.initial_states, first, h);
    for (int64_t t = 0; t < size.length; t += TILE) {
        int64_t steps = min(TILE, size.length - t);
        head.load_steps(t, steps, dt, decay);
        head.load_rows(call.B, t, steps, B);
        head.load_rows(call.C, t, steps, C);
        head.load_block(call.x, t, steps, first, TILE, x);
        for (int64_t s = 0; s < divide_up(steps, 4) * 4; s++) drive[s] = dt[s] * x[s], y[s] = D * x[s];
        walk<true>(size.states, steps, decay, drive, B, C, h, y, [](int64_t, int64_t, vf) {});
        for (int64_t s = 0; s < steps; s++) {
            if (call.z) {
                vf z = head.load(call.z, t + s, first);
                y[s] *= z * sigmoid(z);
            }
            head.store(call.out, t + s, first, y[s]);
        }
    }
    head.store_states(call.final_states, first, h);
}

// ---- backward ----
//
// A job is one head of one item. It walks forward once to get the states at the start of each chunk, then back over the
// chunks, recomputing the states of a chunk for one block of channels after the other. dB and dC are sums over the
// channels of a head, taken over blocks as the job goes on and over lanes once per chunk, and sums over the heads of a
// group, taken at the very end in the order of the heads.

int64_t chunk_steps(const SsdSizes& size) {
    int64_t steps = TILE;
    while (8 * steps * steps < size.length) steps *= 2;
    return steps;
}
int64_t chunks(const SsdSizes& size) { return divide_up(size.length, chunk_steps(size)); }

// Sums that jobs leave for the final addition: (B, H, L, N).
struct HeadSums {
    float *dB, *dC;

    HeadSums(Arena& arena, const SsdSizes& size) {
        int64_t count = size.batch * size.heads * size.length * size.states;
        dB = arena.floats(count), dC = arena.floats(count);
    }
};

// Where a (T / 4, N, 4) array holds step s, state n.
inline int64_t in_fours(int64_t states, int64_t s, int64_t n) { return (s / 4 * states + n) * 4 + s % 4; }

// Private memory of a thread.
struct Scratch {
    vf* starts;                         // (chunks, blocks, N)
    vf* adjoint;                        // (blocks, N), multiplied by the decay of the step after
    vf* before;                         // (N)
    vf *after, *dB_terms, *dC_terms;    // (T / 4, N, 4): four steps side by side, rows apart by 4 KB fight for the cache
    vf *by_dt, *by_decay;               // (T)
    vf *x, *drive, *g, *y;              // (T)
    float *B, *C;                       // (T, N)
    float *dt, *decay;                  // (T)

    Scratch(Arena& arena, const SsdSizes& size) {
        int64_t N = size.states, T = chunk_steps(size);
        starts = arena.vectors(chunks(size) * blocks_of(size) * N), adjoint = arena.vectors(blocks_of(size) * N);
        before = arena.vectors(N), after = arena.vectors(T * N);
        dB_terms = arena.vectors(T * N), dC_terms = arena.vectors(T * N);
        by_dt = arena.vectors(T), by_decay = arena.vectors(T);
        x = arena.vectors(T), drive = arena.vectors(T), g = arena.vectors(T), y = arena.vectors(T);
        B = arena.floats(T * N), C = arena.floats(T * N), dt = arena.floats(T), decay = arena.floats(T);
    }
};

void find_starts(const Head<SsdBackward>& head, const Scratch& scratch) {
    const SsdBackward& call = head.call;
    const SsdSizes& size = call.size;
    const int64_t N = size.states, T = chunk_steps(size), blocks = blocks_of(size);
    for (int64_t i = 0; i < blocks; i++) head.load_states(call.initial_states, i * W, scratch.starts + i * N);
    for (int64_t chunk = 0; chunk + 1 < chunks(size); chunk++) {
        head.load_steps(chunk * T, T, scratch.dt, scratch.decay);
        head.load_rows(call.B, chunk * T, T, scratch.B);
        for (int64_t i = 0; i < blocks; i++) {
            vf *start = scratch.starts + (chunk * blocks + i) * N, *next = start + blocks * N;
            head.load_block(call.x, chunk * T, T, i * W, T, scratch.x);
            for (int64_t s = 0; s < T; s++) scratch.drive[s] = scratch.dt[s] * scratch.x[s];
            for (int64_t n = 0; n < N; n++) next[n] = start[n];
            walk<false>(N, T, scratch.decay, scratch.drive, scratch.B, nullptr, next, nullptr,
                        [](int64_t, int64_t, vf) {});
        }
    }
}

// Block `index` of channels over the chunk of `steps` steps from `begin` on; FIRST is index == 0.
template <bool FIRST>
void backward_block(const Head<SsdBackward>& head, const Scratch& scratch, int64_t index, int64_t begin, int64_t steps,
                    vf& dD_sum) {
    const SsdBackward& call = head.call;
    const SsdSizes& size = call.size;
    const int64_t N = size.states, first = index * W;
    const float *B = scratch.B, *C = scratch.C, *decay = scratch.decay;
    vf *x = scratch.x, *drive = scratch.drive, *g = scratch.g, *y = scratch.y, *after = scratch.after;
    vf *dB_terms = scratch.dB_terms, *dC_terms = scratch.dC_terms, *adjoint = scratch.adjoint + index * N;
    const vf* start = scratch.starts + (begin / chunk_steps(size) * blocks_of(size) + index) * N;
    vf D = head.load_channels(call.D, first), dD = zero();

    head.load_block(call.x, begin, steps, first, -chunk_steps(size), x);
    head.load_block(call.grad_out, begin, steps, first, -chunk_steps(size), g);
    for (int64_t s = 0; s < divide_up(steps, 4) * 4; s++) drive[s] = scratch.dt[s] * x[s], y[s] = D * x[s];
    for (int64_t n = 0; n < N; n++) scratch.before[n] = start[n];
    walk<true>(N, steps, decay, drive, B, C, scratch.before, y,
               [&](int64_t s, int64_t n, vf state) { after[in_fours(N, s, n)] = state; });
    for (int64_t s = 0; s < steps; s++) {
        if (call.z) {
            vf z = head.load(call.z, begin + s, first), gate = sigmoid(z);
            head.store(call.dz, begin + s, first, g[s] * y[s] * gate * (1.f + z * (1.f - gate)));
            g[s] *= z * gate;
        }
        dD += g[s] * x[s];
    }

    for (int64_t s = (steps - 1) / 4 * 4; s >= 0; s -= 4) {
        vf by_input[4] = {}, by_decay[4] = {};
        for (int64_t n = 0; n < N; n++) {
            vf carried = adjoint[n], before = s ? after[in_fours(N, s - 1, n)] : start[n];
#pragma GCC unroll 4
            for (int64_t i = 3; i >= 0; i--) {
                int64_t row = (s + i) * N + n, at = in_fours(N, s, n) + i;
                vf lambda = C[row] * g[s + i] + carried, dC = g[s + i] * after[at], dB = drive[s + i] * lambda;
                dC_terms[at] = FIRST ? dC : dC_terms[at] + dC;
                dB_terms[at] = FIRST ? dB : dB_terms[at] + dB;
                by_input[i] += B[row] * lambda;
                carried = decay[s + i] * lambda;
                by_decay[i] += carried * (i ? after[at - 1] : before);
            }
            adjoint[n] = carried;
        }
        for (int64_t i = 0; i < 4 && s + i < steps; i++) {
            vf by_dt = by_input[i] * x[s + i];
            scratch.by_dt[s + i] = FIRST ? by_dt : scratch.by_dt[s + i] + by_dt;
            scratch.by_decay[s + i] = FIRST ? by_decay[i] : scratch.by_decay[s + i] + by_decay[i];
            head.store(call.dx, begin + s + i, first, D * g[s + i] + scratch.dt[s + i] * by_input[i]);
        }
    }
    // Adding up a chunk at a time keeps the rounding error of long sequences small.
    dD_sum += dD;
}

// out[i] = sum over the lanes of x[i]
void sum_lanes_of(const vf* x, int64_t count, float* out) {
    for (int64_t i = 0; i < count; i += W) {
        vf lanes[W];
        for (int64_t k = 0; k < W; k++) lanes[k] = i + k < count ? x[i + k] : zero();
        store_first(VSSM_FLOAT32, out, i, sum_lanes(lanes), count - i);
    }
}

// Row s of a (T / 4, N, 4) array, summed over the lanes: out[n].
void sum_row(const vf* x, int64_t states, int64_t s, float* out) {
    for (int64_t n = 0; n < states; n += W) {
        vf lanes[W];
        for (int64_t k = 0; k < W; k++) lanes[k] = n + k < states ? x[in_fours(states, s, n + k)] : zero();
        store_first(VSSM_FLOAT32, out, n, sum_lanes(lanes), states - n);
    }
}

void backward_head(const Head<SsdBackward>& head, const HeadSums& sums, const Scratch& scratch) {
    const SsdBackward& call = head.call;
    const SsdSizes& size = call.size;
    const int64_t N = size.states, T = chunk_steps(size), row = head.row() * size.length, width = size.width;
    find_starts(head, scratch);
    for (int64_t i = 0; i < blocks_of(size); i++)
        head.load_states(call.grad_final_states, i * W, scratch.adjoint + i * N);
    for (int64_t c = 0; call.dD && c < width; c++) call.dD[head.row() * width + c] = 0;

    for (int64_t chunk = chunks(size) - 1; chunk >= 0; chunk--) {
        int64_t begin = chunk * T, steps = min(T, size.length - begin);
        head.load_steps(begin, steps, scratch.dt, scratch.decay);
        head.load_rows(call.B, begin, steps, scratch.B);
        head.load_rows(call.C, begin, steps, scratch.C);
        for (int64_t i = 0; i < blocks_of(size); i++) {
            vf dD = zero();
            i ? backward_block<false>(head, scratch, i, begin, steps, dD)
              : backward_block<true>(head, scratch, i, begin, steps, dD);
            for (int64_t r = 0; call.dD && r < head.count(i * W); r++) call.dD[head.row() * width + i * W + r] += dD[r];
        }
        sum_lanes_of(scratch.by_dt, steps, call.ddt + row + begin);
        sum_lanes_of(scratch.by_decay, steps, call.dlog_decay + row + begin);
        for (int64_t s = 0; s < steps; s++) {
            sum_row(scratch.dB_terms, N, s, sums.dB + (row + begin + s) * N);
            sum_row(scratch.dC_terms, N, s, sums.dC + (row + begin + s) * N);
        }
    }
    for (int64_t i = 0; call.dinitial_states && i < blocks_of(size); i++)
        head.store_states(call.dinitial_states, i * W, scratch.adjoint + i * N);
}

// One step of one item: sums (B, H, L, N) over the heads of each group into (B, L, G, N).
void add_heads(const SsdSizes& size, int64_t item, int64_t t, const float* sums, int64_t dtype, void* out) {
    const int64_t N = size.states, heads = size.heads / size.groups;
    for (int64_t group = 0; group < size.groups; group++)
        for (int64_t n = 0; n < N; n += W) {
            vf sum = zero();
            for (int64_t k = 0; k < heads; k++) {
                int64_t row = ((item * size.heads + group * heads + k) * size.length + t) * N;
                sum += load_clipped(VSSM_FLOAT32, sums, row + n, row + N);
            }
            store_first(dtype, out, ((item * size.length + t) * size.groups + group) * N + n, sum, N - n);
        }
}

int64_t backward_threads(const SsdSizes& size) {
    int64_t threads = min(size.num_threads, size.batch * size.heads);
    return threads > 1 ? threads : 1;
}
int64_t scratch_floats(const SsdSizes& size) {
    Arena counting{nullptr};
    Scratch(counting, size);
    return counting.used;
}

}  // namespace

void ssd_forward(const SsdForward& call) {
    const SsdSizes& size = call.size;
#pragma omp parallel for schedule(dynamic, 1) num_threads((int)size.num_threads)
    for (int64_t job = 0; job < size.batch * size.heads * blocks_of(size); job++) {
        int64_t row = job / blocks_of(size);
        forward_block({call, row / size.heads, row % size.heads}, job % blocks_of(size) * W);
    }
}

int64_t ssd_backward_workspace(const SsdSizes& size) {
    Arena counting{nullptr};
    HeadSums(counting, size);
    return counting.used + backward_threads(size) * scratch_floats(size);
}

void ssd_backward(const SsdBackward& call) {
    const SsdSizes& size = call.size;
    Arena arena{call.workspace};
    HeadSums sums(arena, size);
#pragma omp parallel num_threads((int)backward_threads(size))
    {
        Arena own{arena.start + arena.used + omp_get_thread_num() * scratch_floats(size)};
        Scratch scratch(own, size);
#pragma omp for schedule(dynamic, 1)
        for (int64_t job = 0; job < size.batch * size.heads; job++)
            backward_head({call, job / size.heads, job % size.heads}, sums, scratch);
#pragma omp for
        for (int64_t row = 0; row < size.batch * size.length; row++) {
            add_heads(size, row / size.length, row % size.length, sums.dB, call.dtype, call.dB);
            add_heads(size, row / size.length, row % size.length, sums.dC, call.dtype, call.dC);
        }
    }
}

}  // namespace VSSM_LEVEL
