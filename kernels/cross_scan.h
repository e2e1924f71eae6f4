// Selective scan along the routes of a map or volume: what the forward and the backward pass share. Everything is channels last, so one vector
// holds W neighbouring channels of a position and a step of a route is one vector load: nothing is transposed or
// copied per route, and dt is computed from its low-rank form where it is used.
//
// A job is a slice of the channels of one item: it walks all routes, one after the other, and adds up their results.
//
// Letters: B batch, P positions, D channels, K routes, L steps, N states, R rank of dt, S chunks of T steps.
#pragma once
#include "arena.h"

namespace VSSM_LEVEL {
namespace {

// Steps that the forward pass takes at a time, and channels of a slice at most.
constexpr int64_t TILE = 16, MAX_SLICE = 64;

int64_t chunks(const CrossSizes& size) { return divide_up(size.length, size.chunk); }
int64_t round_up(int64_t a, int64_t b) { return divide_up(a, b) * b; }
int64_t slices(const CrossSizes& size) { return divide_up(size.channels, MAX_SLICE); }
int64_t slice_width(const CrossSizes& size) { return round_up(divide_up(size.channels, slices(size)), W); }
int64_t jobs(const CrossSizes& size) { return size.batch * slices(size); }
int64_t threads(const CrossSizes& size) {
    int64_t threads = min(size.num_threads, jobs(size));
    return threads > 1 ? threads : 1;
}
// Numbers per position and route in dt_b_c, and floats from one row of a tile of them to the next.
int64_t row_length(const CrossSizes& size) { return size.rank + 2 * size.states; }
int64_t row_stride(const CrossSizes& size) { return round_up(row_length(size), W); }
// Whether rows of float32 arrays serve as they are: whole vectors.
bool direct(int64_t dtype, const CrossSizes& size) { return dtype == VSSM_FLOAT32 && size.channels % W == 0; }

// `channels` channels from `first` on, in `blocks` vectors.
struct Slice {
    int64_t item, first, channels, blocks;

    Slice(const CrossSizes& size, int64_t job) {
        item = job / slices(size), first = job % slices(size) * slice_width(size);
        channels = min(slice_width(size), size.channels - first), blocks = divide_up(channels, W);
    }
    int64_t rows(int64_t block) const { return min(W, channels - block * W); }
};

// The channels of a slice at every position; `spare` stands for the position of a step of padding.
struct Rows {
    float* start;
    int64_t stride, positions;
    float* spare;

    // Anything that is no position is padding.
    float* at(int64_t position) const {
        return (uint64_t)position < (uint64_t)positions ? start + position * stride : spare;
    }
};

// Access to an array (B, P, D), or to route k of one (B, P, K, D).
struct Map {
    int64_t dtype, index, stride;
    bool direct;

    Map(int64_t dtype, const CrossSizes& size, const Slice& slice, int64_t k)
        : dtype(dtype), direct(VSSM_LEVEL::direct(dtype, size)) {
        int64_t routes = size.separate ? size.routes : 1;
        stride = routes * size.channels;
        index = slice.item * size.positions * stride + (size.separate ? k * size.channels : 0) + slice.first;
    }
    // The array itself or, in `scratch`, a copy in float32.
    Rows read(const void* array, const CrossSizes& size, const Slice& slice, float* scratch, float* spare) const {
        if (direct) return {(float*)array + index, stride, size.positions, spare};
        int64_t width = slice.blocks * W;
        for (int64_t p = 0; p < size.positions; p++) {
            int64_t row = index + p * stride;
            for (int64_t c = 0; c < width; c += W)
                store(VSSM_FLOAT32, scratch, p * width + c, load_clipped(dtype, array, row + c, row + slice.channels));
        }
        return {scratch, width, size.positions, spare};
    }
    // Where results may be added up; zeros unless `fresh`.
    Rows open(void* array, const CrossSizes& size, const Slice& slice, bool fresh, float* scratch, float* spare) const {
        Rows rows{scratch, slice.blocks * W, size.positions, spare};
        if (direct) rows.start = (float*)array + index, rows.stride = stride;
        for (int64_t p = 0; p < size.positions && !fresh; p++)
            for (int64_t c = 0; c < slice.blocks * W; c += W) store(VSSM_FLOAT32, rows.at(p), c, zero());
        return rows;
    }
    void close(void* array, const Slice& slice, const Rows& rows) const {
        for (int64_t p = 0; p < rows.positions && !direct; p++)
            for (int64_t c = 0; c < slice.channels; c += W)
                store_first(dtype, array, index + p * stride + c, load(VSSM_FLOAT32, rows.at(p), c), slice.channels - c);
    }
};

// Whether a route, which goes nowhere twice, goes everywhere.
bool covers(const int32_t* order, const CrossSizes& size) {
    int64_t visited = 0;
    for (int64_t t = 0; t < size.length; t++) visited += (uint32_t)order[t] < (uint64_t)size.positions;
    return visited == size.positions;
}

// Rows of dt_b_c for route k at the `steps` steps in `order`, in float32; more numbers may follow those of a row.
void gather(int64_t dtype, const void* dt_b_c, const CrossSizes& size, int64_t item, int64_t k, const int32_t* order,
            int64_t steps, float* rows) {
    const int64_t length = row_length(size), stride = row_stride(size);
    const int64_t end = size.batch * size.positions * size.routes * length;
    for (int64_t s = 0; s < steps; s++) {
        bool inside = (uint32_t)order[s] < (uint64_t)size.positions;
        int64_t row = ((item * size.positions + order[s]) * size.routes + k) * length;
        for (int64_t j = 0; j < stride; j += W)
            store(VSSM_FLOAT32, rows, s * stride + j, inside ? load_clipped(dtype, dt_b_c, row + j, end) : zero());
    }
}

// sum[o] += sum over j < count of a[o * outer + j * inner] * x[j * stride], for o < OUTPUTS.
template <int OUTPUTS>
inline void multiply(const float* a, int64_t outer, int64_t inner, const vf* x, int64_t stride, int64_t count, vf* sum) {
    vf total[OUTPUTS];
#pragma GCC unroll 8
    for (int64_t o = 0; o < OUTPUTS; o++) total[o] = sum[o];
    for (int64_t j = 0; j < count; j++) {
        vf factor = x[j * stride];
#pragma GCC unroll 8
        for (int64_t o = 0; o < OUTPUTS; o++) total[o] += a[o * outer + j * inner] * factor;
    }
#pragma GCC unroll 8
    for (int64_t o = 0; o < OUTPUTS; o++) sum[o] = total[o];
}

// The same for `outputs` rounded up to a multiple of 4.
inline void multiply(const float* a, int64_t outer, int64_t inner, const vf* x, int64_t stride, int64_t count,
                     int64_t outputs, vf* sum) {
    int64_t o = 0;
    for (; o + 4 < outputs; o += 8) multiply<8>(a + o * outer, outer, inner, x, stride, count, sum + o);
    if (o < outputs) multiply<4>(a + o * outer, outer, inner, x, stride, count, sum + o);
}

// Lane r of x[n] is array[r * stride + n]; x has room for `count` rounded up to a multiple of W.
void load_lanes(const float* array, int64_t stride, int64_t rows, int64_t count, vf* x) {
    if (count > 1) return load_tile(VSSM_FLOAT32, array, 0, stride, rows, count, 0, x);
    float lanes[W] = {};
    for (int64_t r = 0; r < rows; r++) lanes[r] = array[r * stride];
    x[0] = load(VSSM_FLOAT32, lanes, 0);
}

// The inverse of load_lanes; overwrites x.
void store_lanes(float* array, int64_t stride, int64_t rows, int64_t count, vf* x) {
    if (count > 1) return store_tile(VSSM_FLOAT32, array, 0, stride, rows, count, x);
    float lanes[W];
    store(VSSM_FLOAT32, lanes, 0, x[0]);
    for (int64_t r = 0; r < rows; r++) array[r * stride] = lanes[r];
}

// The parameters of a route, of all vectors of a slice.
struct Parameters {
    int64_t ranks, states;  // room for R and N
    vf *weight, *A;         // (blocks, R), (blocks, N); A times log2(e)
    vf *D, *bias;           // (blocks)

    Parameters(Arena& arena, const CrossSizes& size) : ranks(round_up(size.rank, W)), states(round_up(size.states, W)) {
        int64_t blocks = slice_width(size) / W;
        weight = arena.vectors(blocks * ranks), A = arena.vectors(blocks * states);
        D = arena.vectors(blocks), bias = arena.vectors(blocks);
    }
    template <class Call>
    void load(const Call& call, const Slice& slice, int64_t k) const {
        const CrossSizes& size = call.size;
        for (int64_t i = 0; i < slice.blocks; i++) {
            int64_t channel = k * size.channels + slice.first + i * W, rows = slice.rows(i);
            load_lanes(call.dt_weight + channel * size.rank, size.rank, rows, size.rank, weight + i * ranks);
            load_lanes(call.A + channel * size.states, size.states, rows, size.states, A + i * states);
            for (int64_t n = 0; n < size.states; n++) A[i * states + n] *= LOG2_E;
            D[i] = call.D ? load_clipped(VSSM_FLOAT32, call.D, channel, channel + rows) : zero();
            bias[i] = call.delta_bias ? load_clipped(VSSM_FLOAT32, call.delta_bias, channel, channel + rows) : zero();
        }
    }
};

// First float of the states of a slice's vector i before a chunk, in (B, K, D, S, N).
int64_t states_at(const CrossSizes& size, const Slice& slice, int64_t k, int64_t i, int64_t chunk) {
    int64_t channel = (slice.item * size.routes + k) * size.channels + slice.first + i * W;
    return (channel * chunks(size) + chunk) * size.states;
}

// STATES is N where it is known when compiling, 0 elsewhere.
template <int STATES>
constexpr int64_t capacity = STATES ? STATES : VSSM_MAX_STATES;

}  // namespace
}  // namespace VSSM_LEVEL
