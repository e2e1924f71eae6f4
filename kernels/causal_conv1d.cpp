// Causal depthwise convolution, forward and backward, vectorised over time: one vector holds W neighbouring steps.
//
// Letters: B batch, D channels, L steps, K taps.
#include "simd.h"

namespace VSSM_LEVEL {
namespace {

// bias + sum over k of weight[k] * x[t - (K - 1) + k] for the W steps from t on; TAPS is K or 0.
template <int TAPS>
inline vf convolve(int64_t dtype, const void* x, const float* weight, float bias, int64_t taps, int64_t t, int64_t length) {
    const int64_t K = TAPS ? TAPS : taps;
    vf sum = all(bias);
#pragma GCC unroll 4
    for (int64_t k = 0; k < K; k++) sum += weight[k] * load_clipped(dtype, x, t - (K - 1) + k, length);
    return sum;
}

const void* row_of(int64_t dtype, const void* array, int64_t row, int64_t length) {
    return (const char*)array + row * length * bytes_of(dtype);
}

template <int TAPS>
void forward_row(const ConvForward& call, int64_t row) {
    const ConvSizes& size = call.size;
    int64_t channel = row % size.channels;
    const void* x = row_of(call.dtype, call.x, row, size.length);
    for (int64_t t = 0; t < size.length; t += W) {
        vf y = convolve<TAPS>(call.dtype, x, call.weight + channel * size.taps, call.bias ? call.bias[channel] : 0,
                              size.taps, t, size.length);
        if (call.silu) y *= sigmoid(y);
        store_first(call.dtype, call.out, row * size.length + t, y, size.length - t);
    }
}

// One channel of all items. `grad` (L floats and W more) takes the gradient before the activation.
template <int TAPS>
void backward_channel(const ConvBackward& call, int64_t channel, float* grad) {
    const ConvSizes& size = call.size;
    const int64_t L = size.length, K = TAPS ? TAPS : size.taps;
    const float* weight = call.weight + channel * K;
    float* dweight = call.dweight + channel * K;
    float dbias = 0;
    for (int64_t k = 0; k < K; k++) dweight[k] = 0;
    for (int64_t item = 0; item < size.batch; item++) {
        int64_t row = item * size.channels + channel;
        const void* x = row_of(call.dtype, call.x, row, L);
        for (int64_t t = 0; t < L; t += W) {
            vf g = load_clipped(call.dtype, call.grad_out, row * L + t, row * L + L);
            if (call.silu) {
                vf y = convolve<TAPS>(call.dtype, x, weight, call.bias ? call.bias[channel] : 0, K, t, L);
                vf gate = sigmoid(y);
                g *= gate * (1.f + y * (1.f - gate));
            }
            store(VSSM_FLOAT32, grad, t, g);
        }
        for (int64_t t = 0; t < L; t += W) {
            vf dx = zero();
#pragma GCC unroll 4
            for (int64_t k = 0; k < K; k++) dx += weight[k] * load_clipped(VSSM_FLOAT32, grad, t + (K - 1) - k, L);
            store_first(call.dtype, call.dx, row * L + t, dx, L - t);
        }
        // In pieces, so that the rounding error of long sequences stays small.
        constexpr int64_t piece = 1024;
        for (int64_t begin = 0; begin < L; begin += piece) {
            int64_t end = min(begin + piece, L);
            vf sum = zero();
            for (int64_t t = begin; t < end; t += W) sum += load_clipped(VSSM_FLOAT32, grad, t, L);
            dbias += sum_lanes(sum);
            for (int64_t k = 0; k < K; k++) {
                vf product = zero();
                for (int64_t t = begin; t < end; t += W)
                    product += load_clipped(VSSM_FLOAT32, grad, t, L) * load_clipped(call.dtype, x, t - (K - 1) + k, L);
                dweight[k] += sum_lanes(product);
            }
        }
    }
    if (call.dbias) call.dbias[channel] = dbias;
}

}  // namespace

void conv_forward(const ConvForward& call) {
    const ConvSizes& size = call.size;
#pragma omp parallel for num_threads((int)size.num_threads)
    for (int64_t row = 0; row < size.batch * size.channels; row++)
        size.taps == 4 ? forward_row<4>(call, row) : forward_row<0>(call, row);
}

static int64_t grad_floats(const ConvSizes& size) { return divide_up(size.length, 16) * 16; }

int64_t conv_backward_workspace(const ConvSizes& size) { return grad_floats(size) * size.num_threads; }

void conv_backward(const ConvBackward& call) {
    const ConvSizes& size = call.size;
#pragma omp parallel for num_threads((int)size.num_threads)
    for (int64_t channel = 0; channel < size.channels; channel++) {
        float* grad = call.workspace + omp_get_thread_num() * grad_floats(size);
        size.taps == 4 ? backward_channel<4>(call, channel, grad) : backward_channel<0>(call, channel, grad);
    }
}

}  // namespace VSSM_LEVEL
