// Selective scan along the routes of a map or volume, backward; see cross_scan.h.
//
// A job walks the chunks of each route backwards. It recomputes dt and all states and decays of a chunk, about sqrt(L)
// steps, which stay in cache while the adjoint walks back over them. Sums over channels are taken over the lanes and the
// vectors of a slice as the job goes on, and over slices and items at the very end, in an order that depends on sizes only.
#include "cross_scan.h"

namespace VSSM_LEVEL {
namespace {

// Steps whose sums over lanes are taken at once: with 2N sums a step, whole vectors of them for every W and N.
constexpr int64_t GROUP = 8;

// Sums that jobs leave for the final addition.
struct Partial {
    float* rows;                              // (B, slices, P, K, R + 2N): d(dt_b_c)
    float *dt_weight, *A, *D, *bias;          // (B, K, D, R), (B, K, D, N), (B, K, D), (B, K, D)
    int64_t rows_size, channels;

    Partial(Arena& arena, const CrossSizes& size) {
        rows_size = size.positions * size.routes * row_length(size), channels = size.routes * size.channels;
        rows = arena.floats(size.batch * slices(size) * rows_size);
        dt_weight = arena.floats(size.batch * channels * size.rank), A = arena.floats(size.batch * channels * size.states);
        D = arena.floats(size.batch * channels), bias = arena.floats(size.batch * channels);
    }
};

// Private memory of a thread.
struct BackwardScratch {
    Parameters parameters;
    int64_t rank_vectors;
    vf* by_channel;                  // (slice channels, R): dt_weight with ranks in the lanes
    vf *adjoint, *dA;                // (blocks, N); the adjoint multiplied by the decay of the step after
    vf *dweight, *dD, *dbias;        // (blocks, R), (blocks), (blocks)
    vf *dt, *slope;                  // (T)
    vf *h, *decay;                   // (T, N); h has the start in front
    float* ddelta;                   // (T, MAX_SLICE)
    vf *terms;                       // (GROUP, 2N)
    vf *drank;                       // (T)
    float *rows, *sums;              // (T, R + 2N) of dt_b_c, (T, 2N) of the gradients of B and C
    float *zeros, *rest, *x, *g, *dx;  // rows for padding; copies of x and the gradients of y and x

    BackwardScratch(Arena& arena, int64_t dtype, const CrossSizes& size) : parameters(arena, size) {
        int64_t width = slice_width(size), blocks = width / W, N = parameters.states, R = parameters.ranks;
        int64_t T = size.chunk, copy = direct(dtype, size) ? 0 : size.positions * width;
        rank_vectors = R / W;
        by_channel = arena.vectors(width * rank_vectors);
        adjoint = arena.vectors(blocks * N), dA = arena.vectors(blocks * N);
        dweight = arena.vectors(blocks * R), dD = arena.vectors(blocks), dbias = arena.vectors(blocks);
        dt = arena.vectors(T), slope = arena.vectors(T);
        h = arena.vectors(T * size.states + N), decay = arena.vectors(T * size.states);
        ddelta = arena.floats(T * MAX_SLICE), terms = arena.vectors(GROUP * 2 * size.states);
        drank = arena.vectors(T * rank_vectors);
        rows = arena.floats(T * row_stride(size)), sums = arena.floats(T * 2 * size.states + W);
        zeros = arena.floats(width), rest = arena.floats(width);
        x = arena.floats(copy), g = arena.floats(copy), dx = arena.floats(copy);
    }
};

// What the vectors of a slice share over a chunk: its steps and where x, dL/dy and dL/dx of each lie.
struct Chunk {
    int64_t route, number, steps;
    const int32_t* order;
    Rows x, g, dx;
};

// The walk of vector i over a chunk and back.
template <int STATES>
void backward_block(const CrossBackward& call, const BackwardScratch& m, const Slice& slice, const Chunk& chunk,
                    int64_t i) {
    const CrossSizes& size = call.size;
    const Parameters& parameters = m.parameters;
    const int64_t N = STATES ? STATES : size.states, stride = row_stride(size), steps = chunk.steps;
    const vf *A = parameters.A + i * parameters.states, D = parameters.D[i];
    const float *B = m.rows + size.rank, *C = B + N;
    vf *h = m.h, *decay = m.decay, *dt = m.dt, *slope = m.slope;

    for (int64_t s = 0; s < round_up(steps, GROUP); s++) dt[s] = parameters.bias[i];
    multiply(m.rows, stride, 1, parameters.weight + i * parameters.ranks, 1, size.rank, steps, dt);
    for (int64_t s = 0; s < steps; s++) {
        slope[s] = all(1);
        if (call.delta_softplus) dt[s] = softplus(dt[s], slope[s]);
    }

    load_lanes(call.chunk_states + states_at(size, slice, chunk.route, i, chunk.number), chunks(size) * N,
               slice.rows(i), N, h);
    vf state[capacity<STATES>];
    for (int64_t n = 0; n < N; n++) state[n] = h[n];
    for (int64_t s = 0; s < steps; s++) {
        vf drive = dt[s] * load(VSSM_FLOAT32, chunk.x.at(chunk.order[s]), i * W);
#pragma GCC unroll 16
        for (int64_t n = 0; n < N; n++) {
            vf a = exp2(dt[s] * A[n]);
            decay[s * N + n] = a;
            state[n] = a * state[n] + drive * B[s * stride + n];
            h[(s + 1) * N + n] = state[n];
        }
    }

    vf adjoint[capacity<STATES>], dA[capacity<STATES>], dD = zero(), dbias = zero();
    for (int64_t n = 0; n < N; n++) adjoint[n] = m.adjoint[i * parameters.states + n], dA[n] = zero();
    for (int64_t begin = (steps - 1) / GROUP * GROUP; begin >= 0; begin -= GROUP) {
        int64_t end = min(begin + GROUP, steps);
        for (int64_t s = end - 1; s >= begin; s--) {
            float* dx = chunk.dx.at(chunk.order[s]);
            vf u = load(VSSM_FLOAT32, chunk.x.at(chunk.order[s]), i * W);
            vf g = load(VSSM_FLOAT32, chunk.g.at(chunk.order[s]), i * W);
            vf drive = dt[s] * u, by_input = zero(), by_decay = zero();
            vf* terms = m.terms + (s - begin) * 2 * N;
#pragma GCC unroll 16
            for (int64_t n = 0; n < N; n++) {
                vf lambda = C[s * stride + n] * g + adjoint[n];
                terms[n] = drive * lambda;
                terms[N + n] = g * h[(s + 1) * N + n];
                by_input += lambda * B[s * stride + n];
                adjoint[n] = decay[s * N + n] * lambda;
                // lambda * decay * h[t-1]: the same as lambda * (h[t] - dt * B * u), without the cancellation.
                vf carried = adjoint[n] * h[s * N + n];
                by_decay += carried * A[n];
                dA[n] += carried * dt[s];
            }
            dD += g * u;
            // A carries a factor log2(e).
            vf ddelta = (u * by_input + LN_2 * by_decay) * slope[s];
            dbias += ddelta;
            store(VSSM_FLOAT32, m.ddelta, s * MAX_SLICE + i * W, ddelta);
            store(VSSM_FLOAT32, dx, i * W, load(VSSM_FLOAT32, dx, i * W) + D * g + dt[s] * by_input);
        }
        for (int64_t j = 0; j < (end - begin) * 2 * N; j += W) {
            float* sums = m.sums + begin * 2 * N + j;
            vf sum = sum_lanes(m.terms + j);
            store(VSSM_FLOAT32, sums, 0, i ? sum + load(VSSM_FLOAT32, sums, 0) : sum);
        }
    }
    // Adding up a chunk at a time keeps the rounding error of long sequences small.
    for (int64_t n = 0; n < N; n++) {
        m.adjoint[i * parameters.states + n] = adjoint[n];
        m.dA[i * parameters.states + n] += dA[n];
    }
    m.dD[i] += dD, m.dbias[i] += dbias;
}

// The gradients of dt_weight, of the low-rank dt and, from `sums`, of B and C; `rows` is (P, K, R + 2N).
void backward_projection(const CrossSizes& size, const BackwardScratch& m, const Slice& slice, const Chunk& chunk,
                         float* rows) {
    const int64_t R = size.rank, N = size.states, steps = chunk.steps, stride = row_stride(size);
    for (int64_t i = 0; i < slice.blocks; i++)
        multiply(m.rows, 1, stride, (const vf*)m.ddelta + i, MAX_SLICE / W, steps, R, m.dweight + i * m.parameters.ranks);
    for (int64_t v = 0; v < m.rank_vectors; v++) {
        vf* drank = m.drank + v * size.chunk;
        for (int64_t s = 0; s < size.chunk; s++) drank[s] = zero();
        multiply(m.ddelta, MAX_SLICE, 1, m.by_channel + v, m.rank_vectors, slice.channels, steps, drank);
    }
    for (int64_t s = 0; s < steps; s++) {
        uint32_t position = chunk.order[s];
        if (position >= (uint64_t)size.positions) continue;
        int64_t row = (position * size.routes + chunk.route) * row_length(size);
        for (int64_t v = 0; v < m.rank_vectors; v++)
            store_first(VSSM_FLOAT32, rows, row + v * W, m.drank[v * size.chunk + s], R - v * W);
        for (int64_t n = 0; n < 2 * N; n += W)
            store_first(VSSM_FLOAT32, rows, row + R + n, load(VSSM_FLOAT32, m.sums, s * 2 * N + n), 2 * N - n);
    }
}

template <int STATES>
void backward_route(const CrossBackward& call, const Partial& partial, const BackwardScratch& m, const Slice& slice,
                    Chunk chunk, float* rows) {
    const CrossSizes& size = call.size;
    const int64_t k = chunk.route, N = m.parameters.states, R = m.parameters.ranks;
    m.parameters.load(call, slice, k);
    for (int64_t c = 0; c < slice.channels; c++) {
        int64_t row = (k * size.channels + slice.first + c) * size.rank;
        for (int64_t v = 0; v < m.rank_vectors; v++)
            m.by_channel[c * m.rank_vectors + v] = load_clipped(VSSM_FLOAT32, call.dt_weight, row + v * W, row + size.rank);
    }
    for (int64_t j = 0; j < slice.blocks * N; j++) m.adjoint[j] = m.dA[j] = zero();
    for (int64_t j = 0; j < slice.blocks * R; j++) m.dweight[j] = zero();
    for (int64_t i = 0; i < slice.blocks; i++) m.dD[i] = m.dbias[i] = zero();

    for (chunk.number = chunks(size) - 1; chunk.number >= 0; chunk.number--) {
        int64_t t = chunk.number * size.chunk;
        chunk.order = call.order + k * size.length + t, chunk.steps = min(size.chunk, size.length - t);
        gather(call.dtype, call.dt_b_c, size, slice.item, k, chunk.order, chunk.steps, m.rows);
        for (int64_t i = 0; i < slice.blocks; i++) backward_block<STATES>(call, m, slice, chunk, i);
        backward_projection(size, m, slice, chunk, rows);
    }

    for (int64_t i = 0; i < slice.blocks; i++) {
        int64_t channel = (slice.item * size.routes + k) * size.channels + slice.first + i * W, count = slice.rows(i);
        store_lanes(partial.dt_weight + channel * size.rank, size.rank, count, size.rank, m.dweight + i * R);
        store_lanes(partial.A + channel * size.states, size.states, count, size.states, m.dA + i * N);
        store_first(VSSM_FLOAT32, partial.D, channel, m.dD[i], count);
        store_first(VSSM_FLOAT32, partial.bias, channel, m.dbias[i], count);
    }
}

template <int STATES>
void backward_job(const CrossBackward& call, const Partial& partial, const BackwardScratch& m, int64_t job) {
    const CrossSizes& size = call.size;
    Slice slice(size, job);
    Chunk chunk;
    float* rows = partial.rows + job * partial.rows_size;
    bool all_visited = true;
    for (int64_t k = 0; k < size.routes; k++) all_visited &= covers(call.order + k * size.length, size);
    for (int64_t j = 0; j < partial.rows_size && !all_visited; j++) rows[j] = 0;
    for (int64_t k = 0; k < size.routes; k++) {
        bool first = size.separate || k == 0, last = size.separate || k == size.routes - 1;
        Map map(call.dtype, size, slice, k);
        if (first) {
            chunk.x = map.read(call.x, size, slice, m.x, m.zeros);
            chunk.g = map.read(call.grad_y, size, slice, m.g, m.zeros);
            chunk.dx = map.open(call.dx, size, slice, false, m.dx, m.rest);
        }
        chunk.route = k;
        backward_route<STATES>(call, partial, m, slice, chunk, rows);
        if (last) map.close(call.dx, slice, chunk.dx);
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

// The sums over items of route k of (B, K, D, count).
void add_items(const float* terms, const CrossSizes& size, int64_t k, int64_t count, float* out) {
    int64_t length = size.channels * count;
    if (out) add_terms(terms + k * length, size.batch, size.routes * length, length, VSSM_FLOAT32, out, k * length);
}

int64_t backward_scratch(int64_t dtype, const CrossSizes& size) {
    Arena counting{nullptr};
    BackwardScratch(counting, dtype, size);
    return counting.used;
}

}  // namespace

int64_t cross_backward_workspace(int64_t dtype, const CrossSizes& size) {
    Arena counting{nullptr};
    Partial(counting, size);
    return counting.used + threads(size) * backward_scratch(dtype, size);
}

void cross_backward(const CrossBackward& call) {
    const CrossSizes& size = call.size;
    Arena arena{call.workspace};
    Partial partial(arena, size);
#pragma omp parallel num_threads((int)threads(size))
    {
        Arena own{arena.start + arena.used + omp_get_thread_num() * backward_scratch(call.dtype, size)};
        BackwardScratch scratch(own, call.dtype, size);
        for (int64_t c = 0; c < slice_width(size); c++) scratch.zeros[c] = 0;
#pragma omp for schedule(dynamic, 1)
        for (int64_t job = 0; job < jobs(size); job++)
            size.states == 1    ? backward_job<1>(call, partial, scratch, job)
            : size.states == 16 ? backward_job<16>(call, partial, scratch, job)
                                : backward_job<0>(call, partial, scratch, job);
#pragma omp for
        for (int64_t item = 0; item < size.batch; item++)
            add_terms(partial.rows + item * slices(size) * partial.rows_size, slices(size), partial.rows_size,
                      partial.rows_size, call.dtype, call.ddt_b_c, item * partial.rows_size);
#pragma omp for
        for (int64_t k = 0; k < size.routes; k++) {
            add_items(partial.dt_weight, size, k, size.rank, call.ddt_weight);
            add_items(partial.A, size, k, size.states, call.dA);
            add_items(partial.D, size, k, 1, call.dD);
            add_items(partial.bias, size, k, 1, call.ddelta_bias);
        }
    }
}

}  // namespace VSSM_LEVEL
