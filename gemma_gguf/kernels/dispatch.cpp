// The C functions: chooses the instruction set by CPU and hands rows to the family function of their type.
//
// Compiled without instruction-set flags, so that it runs (and says "none") on any CPU. GEMMA_HAVE_AVX2 and
// GEMMA_HAVE_AVX512 say what the compiler could make.
#include "kernels.h"

#include <atomic>
#include <cstring>

namespace gemma {
namespace {

using Quantize = bool (*)(const float *, void *, int64_t, int64_t, const float *);

struct Kernel {
    int ggml_type;
    int64_t elements;
    size_t bytes;
    Quantize quantize;
};

struct Isa {
    const char * name;
    const Kernel * kernels;
    int count;
    bool (*all_finite)(const float *, int64_t);
};

#ifdef GEMMA_HAVE_AVX2
#define GEMMA_ENTRY(name, type, elements, bytes) {type, elements, bytes, avx2::quantize_##name},
const Kernel AVX2_KERNELS[] = {GEMMA_TYPES(GEMMA_ENTRY){-1, 1, 0, nullptr}};
#undef GEMMA_ENTRY
const Isa AVX2 = {"avx2", AVX2_KERNELS, sizeof AVX2_KERNELS / sizeof *AVX2_KERNELS - 1, avx2::all_finite};
#endif
#ifdef GEMMA_HAVE_AVX512
#define GEMMA_ENTRY(name, type, elements, bytes) {type, elements, bytes, avx512::quantize_##name},
const Kernel AVX512_KERNELS[] = {GEMMA_TYPES(GEMMA_ENTRY){-1, 1, 0, nullptr}};
#undef GEMMA_ENTRY
const Isa AVX512 = {"avx512", AVX512_KERNELS, sizeof AVX512_KERNELS / sizeof *AVX512_KERNELS - 1, avx512::all_finite};
#endif
const Isa NONE = {"none", nullptr, 0, nullptr};

const Isa * available(const char * name) {
    const bool any = strcmp(name, "auto") == 0;
#ifdef GEMMA_HAVE_AVX2
    __builtin_cpu_init();
    const bool has_avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("bmi2") &&
                          __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
#ifdef GEMMA_HAVE_AVX512
    const bool has_avx512 = has_avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                            __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl") &&
                            __builtin_cpu_supports("avx512vbmi");
    if (has_avx512 && (any || strcmp(name, AVX512.name) == 0)) return &AVX512;
#endif
    if (has_avx2 && (any || strcmp(name, AVX2.name) == 0)) return &AVX2;
#endif
    return any || strcmp(name, NONE.name) == 0 ? &NONE : nullptr;
}

std::atomic<const Isa *> forced{nullptr};

const Isa & in_use() {
    static const Isa * const best = available("auto");
    const Isa * chosen = forced.load(std::memory_order_relaxed);
    return chosen ? *chosen : *best;
}

// Rows that one call of a family gets: a multiple of every lane count, so that only the last call has idle lanes, and
// few enough that the scan for NaN leaves them in the cache for the kernel.
constexpr int64_t ROWS_AT_ONCE = 16;

}  // namespace
}  // namespace gemma

using namespace gemma;

size_t gemma_quantize(int ggml_type, const float * src, void * dst, int64_t n_rows, int64_t n_per_row,
                      const float * weights) {
    const Isa & isa = in_use();
    for (int k = 0; k < isa.count; k++) {
        const Kernel & kernel = isa.kernels[k];
        if (kernel.ggml_type != ggml_type) continue;
        if (n_rows < 1 || n_per_row < 1 || n_per_row % kernel.elements != 0) return 0;
        if (weights != nullptr && !isa.all_finite(weights, n_per_row)) return 0;
        const size_t row_bytes = static_cast<size_t>(n_per_row / kernel.elements) * kernel.bytes;
        for (int64_t row = 0; row < n_rows; row += ROWS_AT_ONCE) {
            const int64_t rows = n_rows - row < ROWS_AT_ONCE ? n_rows - row : ROWS_AT_ONCE;
            const float * x = src + row * n_per_row;
            char * y = static_cast<char *>(dst) + static_cast<size_t>(row) * row_bytes;
            if (!isa.all_finite(x, rows * n_per_row) || !kernel.quantize(x, y, rows, n_per_row, weights)) return 0;
        }
        return static_cast<size_t>(n_rows) * row_bytes;
    }
    return 0;
}

const char * gemma_kernels_isa(void) { return in_use().name; }

int gemma_kernels_force_isa(const char * name) {
    const Isa * isa = available(name);
    if (isa == nullptr) return 0;
    forced.store(isa, std::memory_order_relaxed);
    return 1;
}

int gemma_kernels_version(void) { return GEMMA_KERNELS_VERSION; }
