// The arguments of each kernel as one structure (fields in the order of vssm_cpu.h) and the table of kernels that every
// instruction set provides.
#pragma once
#include "vssm_cpu.h"

struct ScanSizes {
    int64_t batch, channels, length, states, groups, chunk, num_threads;
    int64_t window = 1;  // of the locally bi-directional scan; 1 is the selective scan
};

struct ScanForward {
    int64_t dtype;
    const void *u, *delta;
    const float* A;
    const void *B, *C;
    const float* D;
    const void* z;
    const float* delta_bias;
    int64_t delta_softplus;
    void* out;
    float *last_state, *chunk_states;
    ScanSizes size;
};

struct ScanBackward {
    int64_t dtype;
    const void* grad_out;
    const float* grad_last_state;
    const void *u, *delta;
    const float* A;
    const void *B, *C;
    const float* D;
    const void* z;
    const float *delta_bias, *chunk_states;
    int64_t delta_softplus;
    void *du, *ddelta;
    float* dA;
    void *dB, *dC;
    float* dD;
    void* dz;
    float *ddelta_bias, *workspace;
    ScanSizes size;
};

struct ConvSizes {
    int64_t batch, channels, length, taps, num_threads;
};

struct ConvForward {
    int64_t dtype;
    const void* x;
    const float *weight, *bias;
    int64_t silu;
    void* out;
    ConvSizes size;
};

struct ConvBackward {
    int64_t dtype;
    const void *grad_out, *x;
    const float *weight, *bias;
    int64_t silu;
    void* dx;
    float *dweight, *dbias, *workspace;
    ConvSizes size;
};

struct CrossSizes {
    int64_t batch, positions, channels, routes, length, states, rank, separate, chunk, num_threads;
};

struct CrossForward {
    int64_t dtype;
    const void *x, *dt_b_c;
    const float *dt_weight, *A;
    const int32_t* order;
    const float *D, *delta_bias;
    int64_t delta_softplus;
    void* y;
    float *chunk_states, *workspace;
    CrossSizes size;
};

struct CrossBackward {
    int64_t dtype;
    const void *grad_y, *x, *dt_b_c;
    const float *dt_weight, *A;
    const int32_t* order;
    const float *D, *delta_bias, *chunk_states;
    int64_t delta_softplus;
    void *dx, *ddt_b_c;
    float *ddt_weight, *dA, *dD, *ddelta_bias, *workspace;
    CrossSizes size;
};

struct SsdSizes {
    int64_t batch, length, heads, width, groups, states, num_threads;
};

struct SsdForward {
    int64_t dtype;
    const void* x;
    const float *dt, *decay;
    const void *B, *C;
    const float* D;
    const void* z;
    const float* initial_states;
    void* out;
    float* final_states;
    SsdSizes size;
};

struct SsdBackward {
    int64_t dtype;
    const void* grad_out;
    const float* grad_final_states;
    const void* x;
    const float *dt, *decay;
    const void *B, *C;
    const float* D;
    const void* z;
    const float* initial_states;
    void* dx;
    float *ddt, *dlog_decay;
    void *dB, *dC;
    float* dD;
    void* dz;
    float *dinitial_states, *workspace;
    SsdSizes size;
};

struct Kernels {
    const char* level;
    void (*scan_forward)(const ScanForward&);
    int64_t (*scan_backward_workspace)(const ScanSizes&);
    void (*scan_backward)(const ScanBackward&);
    void (*conv_forward)(const ConvForward&);
    int64_t (*conv_backward_workspace)(const ConvSizes&);
    void (*conv_backward)(const ConvBackward&);
    int64_t (*cross_forward_workspace)(int64_t dtype, const CrossSizes&);
    void (*cross_forward)(const CrossForward&);
    int64_t (*cross_backward_workspace)(int64_t dtype, const CrossSizes&);
    void (*cross_backward)(const CrossBackward&);
    void (*ssd_forward)(const SsdForward&);
    int64_t (*ssd_backward_workspace)(const SsdSizes&);
    void (*ssd_backward)(const SsdBackward&);
};
