// Q4_0, Q4_1, Q5_0, Q5_1 with an imatrix: blocks of 32 elements with one scale, and a minimum in Q4_1 and Q5_1.
//
// A lane holds a block. Mirrors quantize_row_q4_0_impl and its sisters of ggml-quants.c. Without an imatrix ggml only
// divides by the largest element, at a thousand million elements a second: that stays with ggml.
#include "kernels.h"
#include "scale_search.h"

namespace gemma::GEMMA_ISA {
namespace {

constexpr int QK = 32;
constexpr int SIDE_BY_SIDE = 4;  // groups of LANES blocks searched at a time
constexpr int BLOCKS = SIDE_BY_SIDE * LANES;
constexpr int ROWS = 16;  // taken at a time, for their mean squares; a multiple of LANES

// The fits of BLOCKS blocks, in the order of the matrix.
struct Fits {
    float scale[BLOCKS], min[BLOCKS], multiplier[BLOCKS], offset[BLOCKS];
};

// x: SIDE_BY_SIDE groups, one after another.
template <int NMAX> GEMMA_INLINE void fit_symmetric(const float * x, const float * w, Fits & fits) {
    for (int u = 0; u < SIDE_BY_SIDE; u++) {
        const SymmetricFit fit = make_qx_quants<QK, NMAX, true>(x + u * QK * LANES, w + u * QK * LANES);
        store(fits.scale + u * LANES, fit.scale);
        store(fits.min + u * LANES, splat(0.0f));
        store(fits.multiplier + u * LANES, fit.multiplier);
        store(fits.offset + u * LANES, splat(0.0f));
    }
}

template <int NMAX> GEMMA_INLINE void fit_affine(const float * x, const float * w, Fits & fits) {
    AffineFit fit[SIDE_BY_SIDE];
    make_qkx_quants<QK, NMAX, SIDE_BY_SIDE>(x, w, IMATRIX_SEARCH, fit);
    for (int u = 0; u < SIDE_BY_SIDE; u++) {
        store(fits.scale + u * LANES, fit[u].scale);
        store(fits.min + u * LANES, fit[u].min);
        store(fits.multiplier + u * LANES, fit[u].multiplier);
        store(fits.offset + u * LANES, fit[u].offset);
    }
}

GEMMA_INLINE void pack_four_bits(const int32_t * levels, uint8_t * __restrict qs) {
    for (int i = 0; i < QK / 2; i++) qs[i] = static_cast<uint8_t>((levels[i] & 15) | (levels[i + QK / 2] & 15) << 4);
}

// Bit i is the fifth bit of level i.
GEMMA_INLINE void pack_fifth_bits(const int32_t * levels, uint8_t * qh) {
    uint32_t high = 0;
    for (int i = 0; i < QK; i += LANES) high |= lanes_of(load(levels + i) > splat(15)) << i;
    memcpy(qh, &high, sizeof high);
}

struct Q4_0 {
    struct PACKED Block {
        uint16_t d;
        uint8_t qs[16];
    };
    static constexpr int LOWEST = -8, HIGHEST = 7;
    static void fit(const float * x, const float * w, Fits & fits) { fit_symmetric<8>(x, w, fits); }
    static void put(Block & block, float scale, float, const int32_t * levels) {
        block.d = half_of(scale);
        pack_four_bits(levels, block.qs);
    }
};

struct Q4_1 {
    struct PACKED Block {
        uint16_t d, m;
        uint8_t qs[16];
    };
    static constexpr int LOWEST = 0, HIGHEST = 15;
    static void fit(const float * x, const float * w, Fits & fits) { fit_affine<15>(x, w, fits); }
    static void put(Block & block, float scale, float min, const int32_t * levels) {
        block.d = half_of(scale);
        block.m = half_of(min);
        pack_four_bits(levels, block.qs);
    }
};

struct Q5_0 {
    struct PACKED Block {
        uint16_t d;
        uint8_t qh[4];
        uint8_t qs[16];
    };
    static constexpr int LOWEST = -16, HIGHEST = 15;
    static void fit(const float * x, const float * w, Fits & fits) { fit_symmetric<16>(x, w, fits); }
    static void put(Block & block, float scale, float, const int32_t * levels) {
        block.d = half_of(scale);
        pack_four_bits(levels, block.qs);
        pack_fifth_bits(levels, block.qh);
    }
};

struct Q5_1 {
    struct PACKED Block {
        uint16_t d, m;
        uint8_t qh[4];
        uint8_t qs[16];
    };
    static constexpr int LOWEST = 0, HIGHEST = 31;
    static void fit(const float * x, const float * w, Fits & fits) { fit_affine<31>(x, w, fits); }
    static void put(Block & block, float scale, float min, const int32_t * levels) {
        block.d = half_of(scale);
        block.m = half_of(min);
        pack_four_bits(levels, block.qs);
        pack_fifth_bits(levels, block.qh);
    }
};

static_assert(sizeof(Q4_0::Block) == 18 && sizeof(Q4_1::Block) == 20);
static_assert(sizeof(Q5_0::Block) == 22 && sizeof(Q5_1::Block) == 24);

// sigma2 of every row: the sum runs through the row in order, so here a lane holds a row.
GEMMA_INLINE void mean_squares(const float * x, int n_rows, int64_t n_per_row, float * sigma2) {
    alignas(64) float part[QK * LANES];
    for (int first = 0; first < n_rows; first += LANES) {
        const float * rows[LANES];
        for (int l = 0; l < LANES; l++) rows[l] = x + min_of(first + l, n_rows - 1) * n_per_row;
        f32 sum = splat(0.0f);
        for (int64_t at = 0; at < n_per_row; at += QK) {
            to_lanes(rows, 0, QK, part);
            for (int i = 0; i < QK; i++) sum = sum + element(part, i) * element(part, i);
            for (int l = 0; l < LANES; l++) rows[l] += QK;
        }
        store(sigma2 + first, sum / splat(static_cast<float>(n_per_row)));
    }
}

// At most ROWS rows.
template <class Type>
GEMMA_INLINE void quantize_rows(const float * x, typename Type::Block * y, int n_rows, int64_t n_per_row,
                                const float * weights) {
    const int64_t per_row = n_per_row / QK, n_blocks = n_rows * per_row;
    alignas(64) float sigma2[ROWS], xs[QK * BLOCKS], ws[QK * BLOCKS];
    alignas(64) Fits fits;
    mean_squares(x, n_rows, n_per_row, sigma2);
    for (int64_t first = 0; first < n_blocks; first += BLOCKS) {
        for (int u = 0; u < SIDE_BY_SIDE; u++) {
            const int64_t start = first + u * LANES;
            const BlockGroup group(x, weights, start, n_blocks, per_row, QK);
            float row_sigma2[LANES];
            for (int l = 0; l < LANES; l++) row_sigma2[l] = sigma2[min_of(start + l, n_blocks - 1) / per_row];
            to_lanes(group.x, 0, QK, xs + u * QK * LANES);
            to_lanes(group.w, 0, QK, ws + u * QK * LANES);
            imatrix_weights(xs + u * QK * LANES, QK, load(row_sigma2), ws + u * QK * LANES);
        }
        Type::fit(xs, ws, fits);
        const int count = static_cast<int>(min_of<int64_t>(BLOCKS, n_blocks - first));
        for (int k = 0; k < count; k++) {
            alignas(64) int32_t levels[QK];
            searched_levels(x + (first + k) * QK, QK, fits.multiplier[k], fits.offset[k], Type::LOWEST, Type::HIGHEST,
                            levels);
            Type::put(y[first + k], fits.scale[k], fits.min[k], levels);
        }
    }
}

template <class Type>
GEMMA_INLINE bool quantize(const float * x, void * y, int64_t n_rows, int64_t n_per_row, const float * weights) {
    if (weights == nullptr) return false;
    auto * blocks = static_cast<typename Type::Block *>(y);
    for (int64_t row = 0; row < n_rows; row += ROWS)
        quantize_rows<Type>(x + row * n_per_row, blocks + row * (n_per_row / QK),
                            static_cast<int>(min_of<int64_t>(ROWS, n_rows - row)), n_per_row, weights);
    return true;
}

}  // namespace

bool quantize_q4_0(const float * x, void * y, int64_t n_rows, int64_t n_per_row, const float * weights) {
    return quantize<Q4_0>(x, y, n_rows, n_per_row, weights);
}

bool quantize_q4_1(const float * x, void * y, int64_t n_rows, int64_t n_per_row, const float * weights) {
    return quantize<Q4_1>(x, y, n_rows, n_per_row, weights);
}

bool quantize_q5_0(const float * x, void * y, int64_t n_rows, int64_t n_per_row, const float * weights) {
    return quantize<Q5_0>(x, y, n_rows, n_per_row, weights);
}

bool quantize_q5_1(const float * x, void * y, int64_t n_rows, int64_t n_per_row, const float * weights) {
    return quantize<Q5_1>(x, y, n_rows, n_per_row, weights);
}

}  // namespace gemma::GEMMA_ISA
