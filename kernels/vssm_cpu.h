// C interface of libvssm_cpu: the native CPU kernels of vssm. vssm/ops/native.py declares the same signatures.
//
// Letters: B batch, D channels, L steps, N states, G groups of B and C, K taps, S chunks of T steps (S = ceil(L / T)).
// All arrays are contiguous, row-major and have the shape given. "any" arrays hold elements of `dtype`; all others are
// float32. A null pointer leaves an optional array out. No function allocates, throws or checks: callers pass valid
// shapes, and workspaces of at least the size that the function named with them returns. Results do not depend on num_threads, nor
// an item's results on the rest of its batch.
#pragma once
#include <cstdint>

#if defined(_WIN32)
#define VSSM_EXPORT extern "C" __declspec(dllexport)
#else
#define VSSM_EXPORT extern "C" __attribute__((visibility("default")))
#endif

enum VssmDtype : int64_t { VSSM_FLOAT32 = 0, VSSM_BFLOAT16 = 1, VSSM_FLOAT16 = 2 };

// Largest N that the scan takes.
constexpr int64_t VSSM_MAX_STATES = 256;

// Largest window of the locally bi-directional scan, whose windows are powers of two.
constexpr int64_t VSSM_MAX_WINDOW = 16;

// Number of this interface: to be raised with every change of a signature or a meaning in this file.
VSSM_EXPORT int64_t vssm_abi(void);

// Instruction set in use: "v4", "v3" or "v2" (x86-64 levels) or "baseline". The best that the processor has, or the
// lower one that the environment variable VSSM_SIMD names when the library is first used.
VSSM_EXPORT const char* vssm_simd_level(void);

// Selective scan; vssm/ops/selective_scan/__init__.py holds the equations.
VSSM_EXPORT void vssm_selective_scan_forward(
    int64_t dtype,
    const void* u,            // any (B, D, L)
    const void* delta,        // any (B, D, L)
    const float* A,           // (D, N)
    const void* B,            // any (B, G, N, L)
    const void* C,            // any (B, G, N, L)
    const float* D,           // (D), optional
    const void* z,            // any (B, D, L), optional
    const float* delta_bias,  // (D), optional
    int64_t delta_softplus,   // 0 or 1
    void* out,                // result: any (B, D, L)
    float* last_state,        // result: (B, D, N), the state after the last step
    float* chunk_states,      // result: (B, D, S, N), the state before the first step of each chunk
    int64_t batch, int64_t channels, int64_t length, int64_t states, int64_t groups,
    int64_t chunk,            // T, a multiple of 16
    int64_t num_threads);

// Floats of workspace that vssm_selective_scan_backward needs.
VSSM_EXPORT int64_t vssm_selective_scan_backward_workspace(int64_t batch, int64_t channels, int64_t length,
                                                           int64_t states, int64_t groups, int64_t chunk,
                                                           int64_t num_threads);

// Gradients of the selective scan. Results of absent optional inputs are not written and may be null.
VSSM_EXPORT void vssm_selective_scan_backward(
    int64_t dtype,
    const void* grad_out,          // any (B, D, L)
    const float* grad_last_state,  // (B, D, N), optional
    const void* u, const void* delta, const float* A, const void* B, const void* C, const float* D, const void* z,
    const float* delta_bias,    // u to delta_bias: as in the forward
    const float* chunk_states,  // (B, D, S, N) from the forward
    int64_t delta_softplus,
    void* du,            // result: any (B, D, L)
    void* ddelta,        // result: any (B, D, L)
    float* dA,           // result: (D, N)
    void* dB,            // result: any (B, G, N, L)
    void* dC,            // result: any (B, G, N, L)
    float* dD,           // result: (D)
    void* dz,            // result: any (B, D, L)
    float* ddelta_bias,  // result: (D)
    float* workspace,    // vssm_selective_scan_backward_workspace() floats
    int64_t batch, int64_t channels, int64_t length, int64_t states, int64_t groups, int64_t chunk,
    int64_t num_threads);

// Causal depthwise convolution; vssm/ops/causal_conv1d/__init__.py holds the equation.
VSSM_EXPORT void vssm_causal_conv1d_forward(
    int64_t dtype,
    const void* x,        // any (B, D, L)
    const float* weight,  // (D, K)
    const float* bias,    // (D), optional
    int64_t silu,         // 0 or 1
    void* out,            // result: any (B, D, L)
    int64_t batch, int64_t channels, int64_t length, int64_t taps, int64_t num_threads);

// Floats of workspace that vssm_causal_conv1d_backward needs.
VSSM_EXPORT int64_t vssm_causal_conv1d_backward_workspace(int64_t length, int64_t num_threads);

// Gradients of the convolution.
VSSM_EXPORT void vssm_causal_conv1d_backward(
    int64_t dtype,
    const void* grad_out,  // any (B, D, L)
    const void* x, const float* weight, const float* bias, int64_t silu,
    void* dx,          // result: any (B, D, L)
    float* dweight,    // result: (D, K)
    float* dbias,      // result: (D), null without bias
    float* workspace,  // vssm_causal_conv1d_backward_workspace() floats
    int64_t batch, int64_t channels, int64_t length, int64_t taps, int64_t num_threads);

// Selective scan along K routes over P positions, with dt in low-rank form (rank R);
// vssm/ops/cross_selective_scan/__init__.py holds the equations. Here S chunks of T steps cover the L steps of a route.
VSSM_EXPORT void vssm_cross_scan_forward(
    int64_t dtype,
    const void* x,            // any (B, P, D); (B, P, K, D) if separate
    const void* dt_b_c,       // any (B, P, K, R + 2N)
    const float* dt_weight,   // (K, D, R)
    const float* A,           // (K, D, N)
    const int32_t* order,     // int32 (K, L): positions; any number that is none, such as -1, is a step of padding
    const float* D,           // (K, D), optional
    const float* delta_bias,  // (K, D), optional
    int64_t delta_softplus,   // 0 or 1
    void* y,                  // result: any, shape of x
    float* chunk_states,      // result: (B, K, D, S, N), the state before the first step of each chunk
    float* workspace,         // vssm_cross_scan_forward_workspace() floats
    int64_t batch, int64_t positions, int64_t channels, int64_t routes, int64_t length, int64_t states, int64_t rank,
    int64_t separate,         // 0 or 1
    int64_t chunk,            // T, a multiple of 16
    int64_t num_threads);

// Floats of workspace that vssm_cross_scan_forward needs.
VSSM_EXPORT int64_t vssm_cross_scan_forward_workspace(int64_t dtype, int64_t batch, int64_t positions, int64_t channels,
                                                      int64_t routes, int64_t length, int64_t states, int64_t rank,
                                                      int64_t separate, int64_t chunk, int64_t num_threads);

// Gradients of the scan along routes. Results of absent optional inputs are not written and may be null.
VSSM_EXPORT void vssm_cross_scan_backward(
    int64_t dtype,
    const void* grad_y,  // any, shape of x
    const void* x, const void* dt_b_c, const float* dt_weight, const float* A, const int32_t* order, const float* D,
    const float* delta_bias,    // x to delta_bias: as in the forward
    const float* chunk_states,  // (B, K, D, S, N) from the forward
    int64_t delta_softplus,
    void* dx,            // result: any, shape of x
    void* ddt_b_c,       // result: any (B, P, K, R + 2N)
    float* ddt_weight,   // result: (K, D, R)
    float* dA,           // result: (K, D, N)
    float* dD,           // result: (K, D)
    float* ddelta_bias,  // result: (K, D)
    float* workspace,    // vssm_cross_scan_backward_workspace() floats
    int64_t batch, int64_t positions, int64_t channels, int64_t routes, int64_t length, int64_t states, int64_t rank,
    int64_t separate, int64_t chunk, int64_t num_threads);

// Floats of workspace that vssm_cross_scan_backward needs.
VSSM_EXPORT int64_t vssm_cross_scan_backward_workspace(int64_t dtype, int64_t batch, int64_t positions,
                                                       int64_t channels, int64_t routes, int64_t length, int64_t states,
                                                       int64_t rank, int64_t separate, int64_t chunk,
                                                       int64_t num_threads);

// Locally bi-directional scan; vssm/ops/local_bidirectional_scan/__init__.py holds the equations. Arguments as for the
// selective scan; its workspace serves this backward as well.
VSSM_EXPORT void vssm_local_bidirectional_scan_forward(
    int64_t dtype, const void* u, const void* delta, const float* A, const void* B, const void* C, const float* D,
    const void* z, const float* delta_bias, int64_t delta_softplus,
    void* out,            // result: any (B, D, L)
    float* chunk_states,  // result: (B, D, S, N), the state of the forward recurrence before each chunk
    int64_t batch, int64_t channels, int64_t length, int64_t states, int64_t groups, int64_t chunk,
    int64_t window,  // steps, a power of two up to VSSM_MAX_WINDOW
    int64_t num_threads);

// Gradients of the locally bi-directional scan.
VSSM_EXPORT void vssm_local_bidirectional_scan_backward(
    int64_t dtype, const void* grad_out, const void* u, const void* delta, const float* A, const void* B, const void* C,
    const float* D, const void* z, const float* delta_bias, const float* chunk_states, int64_t delta_softplus, void* du,
    void* ddelta, float* dA, void* dB, void* dC, float* dD, void* dz, float* ddelta_bias,
    float* workspace,  // vssm_selective_scan_backward_workspace() floats
    int64_t batch, int64_t channels, int64_t length, int64_t states, int64_t groups, int64_t chunk, int64_t window,
    int64_t num_threads);

// Mamba-2's scan; vssm/ops/ssd/__init__.py holds the equations. Here H are heads, P channels of a head, and the step
// sizes come as they enter the recurrence: after bias, softplus and limits.
VSSM_EXPORT void vssm_ssd_forward(
    int64_t dtype,
    const void* x,                // any (B, L, H, P)
    const float* dt,              // (B, H, L), step sizes
    const float* decay,           // (B, H, L), exp(dt * A)
    const void* B,                // any (B, L, G, N)
    const void* C,                // any (B, L, G, N)
    const float* D,               // (H, P), optional
    const void* z,                // any (B, L, H, P), optional
    const float* initial_states,  // (B, H, P, N), optional
    void* out,                    // result: any (B, L, H, P)
    float* final_states,          // result: (B, H, P, N)
    int64_t batch, int64_t length, int64_t heads, int64_t width, int64_t groups, int64_t states, int64_t num_threads);

// Floats of workspace that vssm_ssd_backward needs.
VSSM_EXPORT int64_t vssm_ssd_backward_workspace(int64_t batch, int64_t length, int64_t heads, int64_t width,
                                                int64_t groups, int64_t states, int64_t num_threads);

// Gradients of Mamba-2's scan. Results of absent optional inputs are not written and may be null.
VSSM_EXPORT void vssm_ssd_backward(
    int64_t dtype,
    const void* grad_out,            // any (B, L, H, P)
    const float* grad_final_states,  // (B, H, P, N), optional
    const void* x, const float* dt, const float* decay, const void* B, const void* C, const float* D, const void* z,
    const float* initial_states,  // x to initial_states: as in the forward
    void* dx,                     // result: any (B, L, H, P)
    float* ddt,                   // result: (B, H, L), without the part that goes through decay
    float* dlog_decay,            // result: (B, H, L), by dt * A
    void* dB,                     // result: any (B, L, G, N)
    void* dC,                     // result: any (B, L, G, N)
    float* dD,                    // result: (B, H, P), still to be added over the batch
    void* dz,                     // result: any (B, L, H, P)
    float* dinitial_states,       // result: (B, H, P, N)
    float* workspace,             // vssm_ssd_backward_workspace() floats
    int64_t batch, int64_t length, int64_t heads, int64_t width, int64_t groups, int64_t states, int64_t num_threads);
