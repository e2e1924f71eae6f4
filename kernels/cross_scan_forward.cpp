// Selective scan along the routes of a map or volume, forward; see cross_scan.h.
#include "cross_scan.h"

namespace VSSM_LEVEL {
namespace {

struct ForwardScratch {
    Parameters parameters;
    vf* h;                       // (blocks, N)
    float* rows;                 // (TILE, R + 2N)
    float *zeros, *rest, *x, *y;  // rows for padding; copies of x and y

    ForwardScratch(Arena& arena, int64_t dtype, const CrossSizes& size) : parameters(arena, size) {
        int64_t width = slice_width(size), copy = direct(dtype, size) ? 0 : size.positions * width;
        h = arena.vectors(width / W * parameters.states);
        rows = arena.floats(TILE * row_stride(size));
        zeros = arena.floats(width), rest = arena.floats(width), x = arena.floats(copy), y = arena.floats(copy);
    }
};

// A tile of one vector of channels; results are added to y, or replace it.
template <int STATES>
inline void forward_tile(const CrossForward& call, const ForwardScratch& m, int64_t i, int64_t steps, float* const* x,
                         float* const* y, bool add) {
    const CrossSizes& size = call.size;
    const int64_t N = STATES ? STATES : size.states, stride = row_stride(size);
    const vf *A = m.parameters.A + i * m.parameters.states, D = m.parameters.D[i];
    const float *B = m.rows + size.rank, *C = B + N;
    vf dt[TILE], h[capacity<STATES>], slope;
    for (int64_t s = 0; s < TILE; s++) dt[s] = m.parameters.bias[i];
    multiply(m.rows, stride, 1, m.parameters.weight + i * m.parameters.ranks, 1, size.rank, steps, dt);
    for (int64_t n = 0; n < N; n++) h[n] = m.h[i * m.parameters.states + n];
    // A loop of its own where the states below already fill the registers.
    if (STATES != 1 && call.delta_softplus)
        for (int64_t s = 0; s < steps; s++) dt[s] = softplus(dt[s], slope);
    for (int64_t s = 0; s < steps; s++) {
        vf u = load(VSSM_FLOAT32, x[s], i * W), delta = dt[s];
        if (STATES == 1 && call.delta_softplus) delta = softplus(delta, slope);
        vf sum = D * u, drive = delta * u;
        if (add) sum += load(VSSM_FLOAT32, y[s], i * W);
#pragma GCC unroll 16
        for (int64_t n = 0; n < N; n++) {
            h[n] = exp2(delta * A[n]) * h[n] + drive * B[s * stride + n];
            sum += C[s * stride + n] * h[n];
        }
        store(VSSM_FLOAT32, y[s], i * W, sum);
    }
    for (int64_t n = 0; n < N; n++) m.h[i * m.parameters.states + n] = h[n];
}

template <int STATES>
void forward_route(const CrossForward& call, const ForwardScratch& m, const Slice& slice, int64_t k, const Rows& x,
                   const Rows& y, bool add) {
    const CrossSizes& size = call.size;
    const int32_t* order = call.order + k * size.length;
    const int64_t room = m.parameters.states;
    m.parameters.load(call, slice, k);
    for (int64_t n = 0; n < slice.blocks * room; n++) m.h[n] = zero();
    for (int64_t t = 0; t < size.length; t += TILE) {
        int64_t steps = min(TILE, size.length - t);
        if (t % size.chunk == 0)
            for (int64_t i = 0; i < slice.blocks; i++) {
                vf saved[capacity<STATES>];
                for (int64_t n = 0; n < size.states; n++) saved[n] = m.h[i * room + n];
                store_lanes(call.chunk_states + states_at(size, slice, k, i, t / size.chunk),
                            chunks(size) * size.states, slice.rows(i), size.states, saved);
            }
        gather(call.dtype, call.dt_b_c, size, slice.item, k, order + t, steps, m.rows);
        float *x_rows[TILE], *y_rows[TILE];
        for (int64_t s = 0; s < steps; s++) x_rows[s] = x.at(order[t + s]), y_rows[s] = y.at(order[t + s]);
        for (int64_t i = 0; i < slice.blocks; i++) forward_tile<STATES>(call, m, i, steps, x_rows, y_rows, add);
    }
}

template <int STATES>
void forward_job(const CrossForward& call, const ForwardScratch& m, int64_t job) {
    const CrossSizes& size = call.size;
    Slice slice(size, job);
    Rows x, y;
    for (int64_t k = 0; k < size.routes; k++) {
        bool first = size.separate || k == 0, last = size.separate || k == size.routes - 1;
        bool fresh = first && covers(call.order + k * size.length, size);
        Map map(call.dtype, size, slice, k);
        if (first) {
            x = map.read(call.x, size, slice, m.x, m.zeros);
            y = map.open(call.y, size, slice, fresh, m.y, m.rest);
        }
        forward_route<STATES>(call, m, slice, k, x, y, !fresh);
        if (last) map.close(call.y, slice, y);
    }
}

}  // namespace

static int64_t forward_scratch(int64_t dtype, const CrossSizes& size) {
    Arena counting{nullptr};
    ForwardScratch(counting, dtype, size);
    return counting.used;
}

int64_t cross_forward_workspace(int64_t dtype, const CrossSizes& size) {
    return threads(size) * forward_scratch(dtype, size);
}

void cross_forward(const CrossForward& call) {
    const CrossSizes& size = call.size;
#pragma omp parallel num_threads((int)threads(size))
    {
        Arena arena{call.workspace + omp_get_thread_num() * forward_scratch(call.dtype, size)};
        ForwardScratch scratch(arena, call.dtype, size);
        for (int64_t c = 0; c < slice_width(size); c++) scratch.zeros[c] = 0;
#pragma omp for schedule(dynamic, 1)
        for (int64_t job = 0; job < jobs(size); job++)
            size.states == 1    ? forward_job<1>(call, scratch, job)
            : size.states == 16 ? forward_job<16>(call, scratch, job)
                                : forward_job<0>(call, scratch, job);
    }
}

}  // namespace VSSM_LEVEL
