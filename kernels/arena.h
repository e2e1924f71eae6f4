// Hands out parts of the caller's workspace.
#pragma once
#include "simd.h"

namespace VSSM_LEVEL {

// Without a start it only counts, so that the same code says how much workspace it needs.
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

}  // namespace VSSM_LEVEL
