// The quantisers of this library: what C sees, what the families provide, and how they fit together.
//
// Every function writes the bytes that ggml's own quantiser of that type writes, several times faster. One SIMD lane
// works on one block (or super-block) and performs ggml's scalar operations in ggml's order; nothing is reordered,
// fused or approximated. That is the whole idea, and the reason for every rule below.
//
// Layout
//   kernels.h      this file: C functions, list of types, signature of a family function
//   simd.h         the SIMD vocabulary: f32, i32 and mask of LANES lanes, for AVX2 (8) and AVX-512 (16)
//   dispatch.cpp   the C functions; chooses the instruction set by CPU; refuses what the families need not handle
//   finite.cpp     the scan for NaN and Inf
//   iq4.cpp        IQ4_NL, IQ4_XS
//   iq3.cpp        IQ3_XXS, IQ3_S
//   iq2.cpp        IQ2_XXS, IQ2_XS, IQ2_S
//   iq_lattice.h   what IQ2 and IQ3 share; iq_tables.cpp builds their grids and neighbour lists
//   k_quants.cpp   Q2_K ... Q6_K
//   legacy.cpp     Q4_0, Q4_1, Q5_0, Q5_1 with an imatrix
//   scale_search.h what K-quants and legacy types share
//
// Rules for a family file
//   - It is compiled once per instruction set, with GEMMA_ISA defined as `avx2` or `avx512`. Everything in it lives in
//     `namespace gemma::GEMMA_ISA`, helpers in an unnamed namespace inside it.
//   - No std:: templates that could leave an out-of-line copy (std::vector, std::sort, std::function, ...): the linker
//     keeps one copy for the library, and it may keep the AVX-512 one for the AVX2 code. Inlined helpers of our own are
//     fine; a test looks for such symbols. Tables that need containers are built in a file compiled without flags
//     (iq_tables.cpp) and handed over as plain pointers.
//   - `bool quantize_<name>(x, y, n_rows, n_per_row, weights)` as declared below. x: n_rows x n_per_row floats, row by
//     row, not aligned. y: n_rows x (n_per_row / block elements) blocks of ggml's layout, every byte of which must be
//     written. weights: one imatrix row of n_per_row floats that serves all rows, or nullptr. It returns false, at any
//     point, when it does not cover the case (weights == nullptr, say); what it wrote until then does not matter, and
//     ggml does the work.
//   - The caller promises: n_rows >= 1, n_per_row a positive multiple of the type's block, x and weights free of NaN
//     and Inf. It does not promise that sums and products stay finite: huge values must take ggml's path in every lane.
//   - It may be called from several threads at once: scratch memory on the stack (at most about 256 KiB) or
//     thread_local, tables built once by a function-local static.
//   - Where identity depends on a trick, the comment stands at the trick and names the ggml function it mirrors.
#pragma once

#include <cstddef>
#include <cstdint>

#define GEMMA_KERNELS_VERSION 1

extern "C" {
#pragma GCC visibility push(default)
// Quantise rows to `ggml_type`. Returns the number of bytes written, or 0: not taken, ggml must do it (unknown type,
// columns that do not divide into blocks, NaN or Inf, no kernel for this CPU or for a missing imatrix).
size_t gemma_quantize(int ggml_type, const float * src, void * dst, int64_t n_rows, int64_t n_per_row,
                      const float * weights);

// The instruction set in use: "avx2", "avx512", or "none" when every call returns 0.
const char * gemma_kernels_isa(void);

// Use this instruction set from now on, in this process ("auto": the CPU's best). Returns 0 and changes nothing when
// the CPU or the library does not have it. For tests and benchmarks.
int gemma_kernels_force_isa(const char * name);

int gemma_kernels_version(void);
#pragma GCC visibility pop
}

// X(name, ggml_type, elements of a block, bytes of a block). Values and sizes are ggml's (ggml.h, ggml-common.h); a
// unit test compares them with the build's. A type that is not in the list is never taken.
#define GEMMA_TYPES_LEGACY(X) X(q4_0, 2, 32, 18) X(q4_1, 3, 32, 20) X(q5_0, 6, 32, 22) X(q5_1, 7, 32, 24)
#define GEMMA_TYPES_K_QUANTS(X) \
    X(q2_K, 10, 256, 84) X(q3_K, 11, 256, 110) X(q4_K, 12, 256, 144) X(q5_K, 13, 256, 176) X(q6_K, 14, 256, 210)
#define GEMMA_TYPES_IQ2(X) X(iq2_xxs, 16, 256, 66) X(iq2_xs, 17, 256, 74) X(iq2_s, 22, 256, 82)
#define GEMMA_TYPES_IQ3(X) X(iq3_xxs, 18, 256, 98) X(iq3_s, 21, 256, 110)
#define GEMMA_TYPES_IQ4(X) X(iq4_nl, 20, 32, 18) X(iq4_xs, 23, 256, 136)

#define GEMMA_TYPES(X) \
    GEMMA_TYPES_LEGACY(X) GEMMA_TYPES_K_QUANTS(X) GEMMA_TYPES_IQ2(X) GEMMA_TYPES_IQ3(X) GEMMA_TYPES_IQ4(X)

#define GEMMA_DECLARE(name, ggml_type, elements, bytes) \
    bool quantize_##name(const float * x, void * y, int64_t n_rows, int64_t n_per_row, const float * weights);

namespace gemma::avx2 {
GEMMA_TYPES(GEMMA_DECLARE)
bool all_finite(const float * x, int64_t n);
}

namespace gemma::avx512 {
GEMMA_TYPES(GEMMA_DECLARE)
bool all_finite(const float * x, int64_t n);
}
