// The scan for NaN and Inf that spares every kernel its own: such rows go to ggml, which refuses them in its own words.
#include "kernels.h"
#include "simd.h"

namespace gemma::GEMMA_ISA {

bool all_finite(const float * x, int64_t n) {
    // Largest magnitude by integer comparison: of non-negative floats, NaN and Inf are the largest bit patterns.
    const i32 magnitude = splat(0x7fffffff);
    i32 largest[4] = {splat(0), splat(0), splat(0), splat(0)};
    int64_t i = 0;
    for (; i + 4 * LANES <= n; i += 4 * LANES)
        for (int k = 0; k < 4; k++) largest[k] = maximum(largest[k], bits_of(load(x + i + k * LANES)) & magnitude);
    for (int k = 1; k < 4; k++) largest[0] = maximum(largest[0], largest[k]);
    bool finite = !any(largest[0] > splat(0x7f7fffff));
    for (; i < n; i++) {
        int32_t bits;
        memcpy(&bits, x + i, sizeof bits);
        finite &= (bits & 0x7fffffff) < 0x7f800000;
    }
    return finite;
}

}  // namespace gemma::GEMMA_ISA
