// The C interface: chooses the instruction set once and passes every call on to its kernels.
#include "calls.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#define VSSM_DECLARE(LEVEL)                               \
    namespace LEVEL {                                     \
    void scan_forward(const ScanForward&);                \
    int64_t scan_backward_workspace(const ScanSizes&);    \
    void scan_backward(const ScanBackward&);              \
    void conv_forward(const ConvForward&);                \
    int64_t conv_backward_workspace(const ConvSizes&);    \
    void conv_backward(const ConvBackward&);              \
    int64_t cross_forward_workspace(int64_t, const CrossSizes&);  \
    void cross_forward(const CrossForward&);                      \
    int64_t cross_backward_workspace(int64_t, const CrossSizes&); \
    void cross_backward(const CrossBackward&);                    \
    void ssd_forward(const SsdForward&);                  \
    int64_t ssd_backward_workspace(const SsdSizes&);      \
    void ssd_backward(const SsdBackward&);                \
    }
#define VSSM_KERNELS(NAME, LEVEL)                                                               \
    Kernels {                                                                                   \
        NAME, LEVEL::scan_forward, LEVEL::scan_backward_workspace, LEVEL::scan_backward,        \
            LEVEL::conv_forward, LEVEL::conv_backward_workspace, LEVEL::conv_backward,          \
            LEVEL::cross_forward_workspace, LEVEL::cross_forward,                               \
            LEVEL::cross_backward_workspace, LEVEL::cross_backward,                             \
            LEVEL::ssd_forward, LEVEL::ssd_backward_workspace, LEVEL::ssd_backward              \
    }

#if defined(VSSM_X86_LEVELS)
VSSM_DECLARE(vssm_v2)
VSSM_DECLARE(vssm_v3)
VSSM_DECLARE(vssm_v4)
#else
VSSM_DECLARE(vssm_baseline)
#endif

namespace {

Kernels choose() {
#if defined(VSSM_X86_LEVELS)
    const char* wanted = getenv("VSSM_SIMD");
    auto allowed = [&](const char* level) { return !wanted || strcmp(level, wanted) <= 0; };
    __builtin_cpu_init();
    bool v3 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
    bool v4 = v3 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
              __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
              __builtin_cpu_supports("avx512vl");
    if (v4 && allowed("v4")) return VSSM_KERNELS("v4", vssm_v4);
    if (v3 && allowed("v3")) return VSSM_KERNELS("v3", vssm_v3);
    return VSSM_KERNELS("v2", vssm_v2);
#else
    return VSSM_KERNELS("baseline", vssm_baseline);
#endif
}

const Kernels& kernels() {
    static const Kernels chosen = choose();
    return chosen;
}

// Large fresh arrays are pages that the system hands out one by one when they are first written, which takes longer than
// a scan needs to compute them. Asks for huge pages, from the size on from which NumPy does so too.
void prefer_huge_pages(void* array, int64_t bytes) {
#if defined(__linux__)
    constexpr uintptr_t huge = 2 << 20;
    uintptr_t begin = ((uintptr_t)array + huge - 1) / huge * huge, end = ((uintptr_t)array + bytes) / huge * huge;
    // Only a hint: without huge pages everything works the same.
    if (array && bytes >= 4 << 20 && begin < end) (void)madvise((void*)begin, end - begin, MADV_HUGEPAGE);
#else
    (void)array, (void)bytes;
#endif
}

int64_t bytes_of(int64_t dtype, int64_t count) { return count * (dtype == VSSM_FLOAT32 ? 4 : 2); }

void run_scan_backward(const ScanBackward& call) {
    const ScanSizes& size = call.size;
    int64_t steps = size.batch * size.channels * size.length, rows = size.batch * size.groups * size.states;
    for (void* result : {call.du, call.ddelta, call.dz}) prefer_huge_pages(result, bytes_of(call.dtype, steps));
    for (void* result : {call.dB, call.dC}) prefer_huge_pages(result, bytes_of(call.dtype, rows * size.length));
    prefer_huge_pages(call.workspace, 4 * kernels().scan_backward_workspace(size));
    kernels().scan_backward(call);
}

}  // namespace

int64_t vssm_abi(void) { return 2; }

const char* vssm_simd_level(void) { return kernels().level; }

void vssm_selective_scan_forward(int64_t dtype, const void* u, const void* delta, const float* A, const void* B,
                                 const void* C, const float* D, const void* z, const float* delta_bias,
                                 int64_t delta_softplus, void* out, float* last_state, float* chunk_states,
                                 int64_t batch, int64_t channels, int64_t length, int64_t states, int64_t groups,
                                 int64_t chunk, int64_t num_threads) {
    prefer_huge_pages(out, bytes_of(dtype, batch * channels * length));
    kernels().scan_forward({dtype, u, delta, A, B, C, D, z, delta_bias, delta_softplus, out, last_state, chunk_states,
                            {batch, channels, length, states, groups, chunk, num_threads}});
}

int64_t vssm_selective_scan_backward_workspace(int64_t batch, int64_t channels, int64_t length, int64_t states,
                                               int64_t groups, int64_t chunk, int64_t num_threads) {
    return kernels().scan_backward_workspace({batch, channels, length, states, groups, chunk, num_threads});
}

void vssm_selective_scan_backward(int64_t dtype, const void* grad_out, const float* grad_last_state, const void* u,
                                  const void* delta, const float* A, const void* B, const void* C, const float* D,
                                  const void* z, const float* delta_bias, const float* chunk_states,
                                  int64_t delta_softplus, void* du, void* ddelta, float* dA, void* dB, void* dC,
                                  float* dD, void* dz, float* ddelta_bias, float* workspace, int64_t batch,
                                  int64_t channels, int64_t length, int64_t states, int64_t groups, int64_t chunk,
                                  int64_t num_threads) {
    run_scan_backward({dtype, grad_out, grad_last_state, u, delta, A, B, C, D, z, delta_bias, chunk_states,
                       delta_softplus, du, ddelta, dA, dB, dC, dD, dz, ddelta_bias, workspace,
                       {batch, channels, length, states, groups, chunk, num_threads}});
}

void vssm_causal_conv1d_forward(int64_t dtype, const void* x, const float* weight, const float* bias, int64_t silu,
                                void* out, int64_t batch, int64_t channels, int64_t length, int64_t taps,
                                int64_t num_threads) {
    prefer_huge_pages(out, bytes_of(dtype, batch * channels * length));
    kernels().conv_forward({dtype, x, weight, bias, silu, out, {batch, channels, length, taps, num_threads}});
}

int64_t vssm_causal_conv1d_backward_workspace(int64_t length, int64_t num_threads) {
    return kernels().conv_backward_workspace({1, 1, length, 1, num_threads});
}

void vssm_causal_conv1d_backward(int64_t dtype, const void* grad_out, const void* x, const float* weight,
                                 const float* bias, int64_t silu, void* dx, float* dweight, float* dbias,
                                 float* workspace, int64_t batch, int64_t channels, int64_t length, int64_t taps,
                                 int64_t num_threads) {
    prefer_huge_pages(dx, bytes_of(dtype, batch * channels * length));
    kernels().conv_backward({dtype, grad_out, x, weight, bias, silu, dx, dweight, dbias, workspace,
                             {batch, channels, length, taps, num_threads}});
}

int64_t vssm_cross_scan_forward_workspace(int64_t dtype, int64_t batch, int64_t positions, int64_t channels,
                                          int64_t routes, int64_t length, int64_t states, int64_t rank,
                                          int64_t separate, int64_t chunk, int64_t num_threads) {
    return kernels().cross_forward_workspace(
        dtype, {batch, positions, channels, routes, length, states, rank, separate, chunk, num_threads});
}

void vssm_cross_scan_forward(int64_t dtype, const void* x, const void* dt_b_c, const float* dt_weight, const float* A,
                             const int32_t* order, const float* D, const float* delta_bias, int64_t delta_softplus,
                             void* y, float* chunk_states, float* workspace, int64_t batch, int64_t positions,
                             int64_t channels, int64_t routes, int64_t length, int64_t states, int64_t rank,
                             int64_t separate, int64_t chunk, int64_t num_threads) {
    CrossSizes size{batch, positions, channels, routes, length, states, rank, separate, chunk, num_threads};
    prefer_huge_pages(y, bytes_of(dtype, batch * positions * channels * (separate ? routes : 1)));
    kernels().cross_forward({dtype, x, dt_b_c, dt_weight, A, order, D, delta_bias, delta_softplus, y, chunk_states,
                             workspace, size});
}

int64_t vssm_cross_scan_backward_workspace(int64_t dtype, int64_t batch, int64_t positions, int64_t channels,
                                           int64_t routes, int64_t length, int64_t states, int64_t rank,
                                           int64_t separate, int64_t chunk, int64_t num_threads) {
    return kernels().cross_backward_workspace(
        dtype, {batch, positions, channels, routes, length, states, rank, separate, chunk, num_threads});
}

void vssm_cross_scan_backward(int64_t dtype, const void* grad_y, const void* x, const void* dt_b_c,
                              const float* dt_weight, const float* A, const int32_t* order, const float* D,
                              const float* delta_bias, const float* chunk_states, int64_t delta_softplus, void* dx,
                              void* ddt_b_c, float* ddt_weight, float* dA, float* dD, float* ddelta_bias,
                              float* workspace, int64_t batch, int64_t positions, int64_t channels, int64_t routes,
                              int64_t length, int64_t states, int64_t rank, int64_t separate, int64_t chunk,
                              int64_t num_threads) {
    CrossSizes size{batch, positions, channels, routes, length, states, rank, separate, chunk, num_threads};
    prefer_huge_pages(dx, bytes_of(dtype, batch * positions * channels * (separate ? routes : 1)));
    prefer_huge_pages(ddt_b_c, bytes_of(dtype, batch * positions * routes * (rank + 2 * states)));
    prefer_huge_pages(workspace, 4 * kernels().cross_backward_workspace(dtype, size));
    kernels().cross_backward({dtype, grad_y, x, dt_b_c, dt_weight, A, order, D, delta_bias, chunk_states,
                              delta_softplus, dx, ddt_b_c, ddt_weight, dA, dD, ddelta_bias, workspace, size});
}

void vssm_local_bidirectional_scan_forward(int64_t dtype, const void* u, const void* delta, const float* A,
                                           const void* B, const void* C, const float* D, const void* z,
                                           const float* delta_bias, int64_t delta_softplus, void* out,
                                           float* chunk_states, int64_t batch, int64_t channels, int64_t length,
                                           int64_t states, int64_t groups, int64_t chunk, int64_t window,
                                           int64_t num_threads) {
    prefer_huge_pages(out, bytes_of(dtype, batch * channels * length));
    kernels().scan_forward({dtype, u, delta, A, B, C, D, z, delta_bias, delta_softplus, out, nullptr, chunk_states,
                            {batch, channels, length, states, groups, chunk, num_threads, window}});
}

void vssm_local_bidirectional_scan_backward(int64_t dtype, const void* grad_out, const void* u, const void* delta,
                                            const float* A, const void* B, const void* C, const float* D,
                                            const void* z, const float* delta_bias, const float* chunk_states,
                                            int64_t delta_softplus, void* du, void* ddelta, float* dA, void* dB,
                                            void* dC, float* dD, void* dz, float* ddelta_bias, float* workspace,
                                            int64_t batch, int64_t channels, int64_t length, int64_t states,
                                            int64_t groups, int64_t chunk, int64_t window, int64_t num_threads) {
    run_scan_backward({dtype, grad_out, nullptr, u, delta, A, B, C, D, z, delta_bias, chunk_states, delta_softplus, du,
                       ddelta, dA, dB, dC, dD, dz, ddelta_bias, workspace,
                       {batch, channels, length, states, groups, chunk, num_threads, window}});
}

void vssm_ssd_forward(int64_t dtype, const void* x, const float* dt, const float* decay, const void* B, const void* C,
                      const float* D, const void* z, const float* initial_states, void* out, float* final_states,
                      int64_t batch, int64_t length, int64_t heads, int64_t width, int64_t groups, int64_t states,
                      int64_t num_threads) {
    prefer_huge_pages(out, bytes_of(dtype, batch * length * heads * width));
    kernels().ssd_forward({dtype, x, dt, decay, B, C, D, z, initial_states, out, final_states,
                           {batch, length, heads, width, groups, states, num_threads}});
}

int64_t vssm_ssd_backward_workspace(int64_t batch, int64_t length, int64_t heads, int64_t width, int64_t groups,
                                    int64_t states, int64_t num_threads) {
    return kernels().ssd_backward_workspace({batch, length, heads, width, groups, states, num_threads});
}

void vssm_ssd_backward(int64_t dtype, const void* grad_out, const float* grad_final_states, const void* x,
                       const float* dt, const float* decay, const void* B, const void* C, const float* D,
                       const void* z, const float* initial_states, void* dx, float* ddt, float* dlog_decay, void* dB,
                       void* dC, float* dD, void* dz, float* dinitial_states, float* workspace, int64_t batch,
                       int64_t length, int64_t heads, int64_t width, int64_t groups, int64_t states,
                       int64_t num_threads) {
    SsdSizes size{batch, length, heads, width, groups, states, num_threads};
    for (void* result : {dx, dz}) prefer_huge_pages(result, bytes_of(dtype, batch * length * heads * width));
    prefer_huge_pages(workspace, 4 * kernels().ssd_backward_workspace(size));
    kernels().ssd_backward({dtype, grad_out, grad_final_states, x, dt, decay, B, C, D, z, initial_states, dx, ddt,
                            dlog_decay, dB, dC, dD, dz, dinitial_states, workspace, size});
}
