// Q2_K, Q3_K, Q4_K, Q5_K, Q6_K, with an imatrix and without: the super-blocks of 256 elements.
//
// A lane holds a super-block. For each group of LANES super-blocks: fit every sub-block and the scales of the
// sub-blocks, in lanes; then finish one super-block after the other (final levels, packing), where the elements of one
// super-block fill the SIMD registers. ggml's functions with an imatrix are quantize_row_q*_K_impl; without one it
// takes quantize_row_q*_K_ref, which weigh and search differently (but for Q6_K).
#include "kernels.h"
#include "scale_search.h"

namespace gemma::GEMMA_ISA {
namespace {

constexpr int QK_K = 256;

// ---------------------------------------------------------------------------------------------------------------------
// Scales of sub-blocks

// A level that ggml keeps in a uint8_t.
GEMMA_INLINE i32 as_byte(i32 level) { return level & splat(255); }

// make_qp_quants: x = scale * l, l in [0, NMAX], for N non-negative x (which may be negative all the same: a fit can
// have a negative scale; so levels wrap to bytes as ggml's do). Returns the scale.
template <int N, int NMAX> f32 make_qp_quants(const float * x, const float * weights, int32_t * levels) {
    f32 max = splat(0.0f);
    for (int i = 0; i < N; i++) max = maximum(max, element(x, i));
    const mask zero = max < splat(GROUP_MAX_EPS);

    f32 multiplier = splat(static_cast<float>(NMAX)) / max, scale = splat(1.0f) / multiplier, best = splat(0.0f);
    for (int i = 0; i < N; i++) {
        const f32 l = to_float(as_byte(nearest_int(multiplier * element(x, i))));
        const f32 diff = element(x, i) - scale * l;
        best = best + element(weights, i) * diff * diff;
    }
    for (int is = -4; is <= 4; is++) {
        if (is == 0) continue;
        const f32 tried = splat(0.1f * is + NMAX) / max, tried_scale = splat(1.0f) / tried;
        f32 mse = splat(0.0f);
        for (int i = 0; i < N; i++) {
            const f32 l = minimum(nearest(tried * element(x, i)), splat(static_cast<float>(NMAX)));
            const f32 diff = element(x, i) - tried_scale * l;
            mse = mse + element(weights, i) * diff * diff;
        }
        const mask better = mse < best;
        best = select(better, mse, best);
        multiplier = select(better, tried, multiplier);
    }

    f32 sumlx = splat(0.0f), suml2 = splat(0.0f);
    for (int i = 0; i < N; i++) {
        const i32 level = minimum(nearest_int(multiplier * element(x, i)), splat(NMAX));
        store(levels + i * LANES, as_byte(level));
        const f32 l = to_float(level), w = element(weights, i);
        sumlx = sumlx + w * element(x, i) * l;
        suml2 = suml2 + w * l * l;
    }
    // ggml stops after a round without a change. A lane that is through repeats such rounds: they change nothing.
    bool changed = true;
    for (int round = 0; round < 5 && changed; round++) {
        changed = false;
        for (int i = 0; i < N; i++) {
            const f32 v = element(x, i), w = element(weights, i);
            const i32 old_level = load(levels + i * LANES);
            const f32 l = to_float(old_level);
            f32 slx = sumlx - w * v * l, sl2 = suml2 - w * l * l;
            const i32 level = minimum(nearest_int(v * sl2 / slx), splat(NMAX));
            mask better = (slx > splat(0.0f)) & (sl2 > splat(0.0f)) & ~(level == old_level) & ~zero;
            if (!any(better)) continue;
            const f32 new_l = to_float(level);
            slx = slx + w * v * new_l;
            sl2 = sl2 + w * new_l * new_l;
            better = better & (slx * slx * suml2 > sumlx * sumlx * sl2);
            store(levels + i * LANES, select(better, as_byte(level), old_level));
            sumlx = select(better, slx, sumlx);
            suml2 = select(better, sl2, suml2);
            changed |= any(better);
        }
    }
    for (int i = 0; i < N; i++) store(levels + i * LANES, select(zero, splat(0), load(levels + i * LANES)));
    return select(zero | ~(suml2 > splat(0.0f)), splat(0.0f), sumlx / suml2);
}

// What the reference functions of Q2_K, Q4_K and Q5_K do instead: the largest value becomes level NMAX.
template <int N, int NMAX> GEMMA_INLINE f32 scale_by_largest(const float * x, int32_t * levels) {
    f32 max = splat(0.0f);
    for (int i = 0; i < N; i++) max = maximum(element(x, i), max);
    const f32 multiplier = select(max > splat(0.0f), splat(static_cast<float>(NMAX)) / max, splat(0.0f));
    for (int i = 0; i < N; i++) store(levels + i * LANES, as_byte(nearest_int(multiplier * element(x, i))));
    return max / splat(static_cast<float>(NMAX));
}

// Mean square of n elements times `factor`: sigma2 of the functions with an imatrix.
GEMMA_INLINE f32 mean_square(const float * x, int n, float factor) {
    f32 sum = splat(0.0f);
    for (int i = 0; i < n; i++) sum = sum + element(x, i) * element(x, i);
    return splat(factor) * sum / splat(static_cast<float>(n));
}

// ---------------------------------------------------------------------------------------------------------------------
// Finishing one super-block

// Levels of n elements that lie side by side in memory, moved so that the lowest is 0: the second pass of all
// quantize_row_q*_K, nearest_int((x + m) / d); or ggml's L of the search, kept where d is 0 (not where it is NaN).
GEMMA_INLINE void final_levels(const float * x, int n, float d, float m, float multiplier, float offset, int lowest,
                               int highest, int32_t * levels) {
    if (d == 0.0f) return searched_levels(x, n, multiplier, offset, lowest, highest, levels);
    for (int i = 0; i < n; i += LANES) {
        const i32 l = nearest_int((load(x + i) + splat(m)) / splat(d));
        store(levels + i, maximum(splat(lowest), minimum(splat(highest), l)) - splat(lowest));
    }
}

// The low two bits of the levels, as Q2_K and Q3_K store them.
GEMMA_INLINE void pack_two_bits(const int32_t * levels, uint8_t * __restrict qs) {
    for (int half = 0; half < 2; half++) {
        const int32_t * l = levels + 128 * half;
        for (int i = 0; i < 32; i++)
            qs[32 * half + i] = static_cast<uint8_t>((l[i] & 3) | (l[i + 32] & 3) << 2 | (l[i + 64] & 3) << 4 |
                                                     (l[i + 96] & 3) << 6);
    }
}

// The low four bits of the levels, as Q4_K and Q5_K store them.
GEMMA_INLINE void pack_four_bits(const int32_t * levels, uint8_t * __restrict qs) {
    for (int part = 0; part < 4; part++) {
        const int32_t * l = levels + 64 * part;
        for (int i = 0; i < 32; i++) qs[32 * part + i] = static_cast<uint8_t>((l[i] & 15) | (l[i + 32] & 15) << 4);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Q2_K, Q4_K, Q5_K: scale and minimum

// What the three types differ in. `put` writes the levels of the scales and minimums of the sub-blocks; scale(block, j)
// and min(block, j) read them back. CAP_* is the limit that ggml sets to them after rounding (255: none).
struct Q2_K {
    struct PACKED Block {
        uint8_t scales[16];
        uint8_t qs[64];
        uint16_t d, dmin;
    };
    static constexpr int PARTS = 16, NMAX = 3, SCALE_NMAX = 15, CAP_IMATRIX = 255, CAP_REFERENCE = 255;
    static constexpr float SIGMA_FACTOR = 1.0f;
    static constexpr AffineSearch REFERENCE{-0.5f, 0.1f, 15, true};

    static f32 reference_weight(f32 x, f32) { return absolute(x); }

    static void put(Block & block, const uint8_t * scale, const uint8_t * min) {
        for (int j = 0; j < PARTS; j++) block.scales[j] = static_cast<uint8_t>(scale[j] | min[j] << 4);
    }
    static int scale(const Block & block, int j) { return block.scales[j] & 15; }
    static int min(const Block & block, int j) { return block.scales[j] >> 4; }
    static void pack(const int32_t * levels, Block & block) { pack_two_bits(levels, block.qs); }
};

// Six bits of scale and six of minimum for eight sub-blocks in twelve bytes: get_scale_min_k4 and its inverse.
struct SixBitScales {
    static constexpr int PARTS = 8, SCALE_NMAX = 63, CAP_REFERENCE = 63;
    static constexpr float SIGMA_FACTOR = 2.0f;

    static f32 reference_weight(f32 x, f32 root_mean_square) { return root_mean_square + absolute(x); }

    template <class Block> static void put(Block & block, const uint8_t * scale, const uint8_t * min) {
        for (int j = 0; j < 4; j++) {
            block.scales[j] = static_cast<uint8_t>(scale[j] | (scale[j + 4] >> 4) << 6);
            block.scales[j + 4] = static_cast<uint8_t>(min[j] | (min[j + 4] >> 4) << 6);
            block.scales[j + 8] = static_cast<uint8_t>((scale[j + 4] & 15) | (min[j + 4] & 15) << 4);
        }
    }
    template <class Block> static int scale(const Block & block, int j) {
        return j < 4 ? block.scales[j] & 63 : (block.scales[j + 4] & 15) | (block.scales[j - 4] >> 6) << 4;
    }
    template <class Block> static int min(const Block & block, int j) {
        return j < 4 ? block.scales[j + 4] & 63 : block.scales[j + 4] >> 4 | (block.scales[j] >> 6) << 4;
    }
};

struct Q4_K : SixBitScales {
    struct PACKED Block {
        uint16_t d, dmin;
        uint8_t scales[12];
        uint8_t qs[128];
    };
    static constexpr int NMAX = 15, CAP_IMATRIX = 255;
    static constexpr AffineSearch REFERENCE{-1.0f, 0.1f, 20, false};

    static void pack(const int32_t * levels, Block & block) { pack_four_bits(levels, block.qs); }
};

struct Q5_K : SixBitScales {
    struct PACKED Block {
        uint16_t d, dmin;
        uint8_t scales[12];
        uint8_t qh[32];
        uint8_t qs[128];
    };
    static constexpr int NMAX = 31, CAP_IMATRIX = 63;
    static constexpr AffineSearch REFERENCE{-0.5f, 0.1f, 15, false};

    static void pack(const int32_t * levels, Block & block) {
        pack_four_bits(levels, block.qs);
        for (int i = 0; i < 32; i++) {
            int high = 0;
            for (int j = 0; j < 8; j++) high |= (levels[32 * j + i] >> 4) << j;
            block.qh[i] = static_cast<uint8_t>(high);
        }
    }
};

static_assert(sizeof(Q2_K::Block) == 84 && sizeof(Q4_K::Block) == 144 && sizeof(Q5_K::Block) == 176);

// The fits of a group of super-blocks: sub-block j of the super-block in lane l at [j * LANES + l].
template <int PARTS> struct AffineGroup {
    float scale[PARTS * LANES], min[PARTS * LANES], multiplier[PARTS * LANES], offset[PARTS * LANES];
    int32_t scale_level[PARTS * LANES], min_level[PARTS * LANES];
    float d[LANES], dmin[LANES];

    void put(int j, const AffineFit & fit) {
        store(scale + j * LANES, fit.scale);
        store(min + j * LANES, -fit.min);
        store(multiplier + j * LANES, fit.multiplier);
        store(offset + j * LANES, fit.offset);
    }
};

constexpr int SIDE_BY_SIDE = 4;  // sub-blocks searched at a time

// w: the imatrix in, the weights out.
template <class Type>
GEMMA_INLINE void fit_with_imatrix(const float * x, float * w, AffineGroup<Type::PARTS> & fits) {
    constexpr int N = QK_K / Type::PARTS;
    float sumw[Type::PARTS * LANES];
    const f32 sigma2 = mean_square(x, QK_K, Type::SIGMA_FACTOR);
    for (int j = 0; j < Type::PARTS; j += SIDE_BY_SIDE) {
        AffineFit fit[SIDE_BY_SIDE];
        for (int u = 0; u < SIDE_BY_SIDE; u++)
            store(sumw + (j + u) * LANES, imatrix_weights(x + (j + u) * N * LANES, N, sigma2, w + (j + u) * N * LANES));
        make_qkx_quants<N, Type::NMAX, SIDE_BY_SIDE>(x + j * N * LANES, w + j * N * LANES, IMATRIX_SEARCH, fit);
        for (int u = 0; u < SIDE_BY_SIDE; u++) fits.put(j + u, fit[u]);
    }
    store(fits.d, make_qp_quants<Type::PARTS, Type::SCALE_NMAX>(fits.scale, sumw, fits.scale_level));
    store(fits.dmin, make_qp_quants<Type::PARTS, Type::SCALE_NMAX>(fits.min, sumw, fits.min_level));
}

// w: only written, the reference function's weights.
template <class Type>
GEMMA_INLINE void fit_without_imatrix(const float * x, float * w, AffineGroup<Type::PARTS> & fits) {
    constexpr int N = QK_K / Type::PARTS;
    for (int j = 0; j < Type::PARTS; j += SIDE_BY_SIDE) {
        AffineFit fit[SIDE_BY_SIDE];
        for (int u = 0; u < SIDE_BY_SIDE; u++) {
            const float * xu = x + (j + u) * N * LANES;
            const f32 root_mean_square = square_root(mean_square(xu, N, 1.0f));
            for (int i = 0; i < N; i++)
                store(w + ((j + u) * N + i) * LANES, Type::reference_weight(element(xu, i), root_mean_square));
        }
        make_qkx_quants<N, Type::NMAX, SIDE_BY_SIDE>(x + j * N * LANES, w + j * N * LANES, Type::REFERENCE, fit);
        for (int u = 0; u < SIDE_BY_SIDE; u++) fits.put(j + u, fit[u]);
    }
    store(fits.d, scale_by_largest<Type::PARTS, Type::SCALE_NMAX>(fits.scale, fits.scale_level));
    store(fits.dmin, scale_by_largest<Type::PARTS, Type::SCALE_NMAX>(fits.min, fits.min_level));
}

template <class Type>
GEMMA_INLINE bool quantize_affine(const float * x, void * y, int64_t n_rows, int64_t n_per_row, const float * weights) {
    constexpr int PARTS = Type::PARTS, N = QK_K / PARTS;
    const int64_t per_row = n_per_row / QK_K, n_blocks = n_rows * per_row;
    const int cap = weights ? Type::CAP_IMATRIX : Type::CAP_REFERENCE;
    alignas(64) float xs[QK_K * LANES], ws[QK_K * LANES];
    alignas(64) AffineGroup<PARTS> fits;
    for (int64_t first = 0; first < n_blocks; first += LANES) {
        const BlockGroup group(x, weights, first, n_blocks, per_row, QK_K);
        to_lanes(group.x, 0, QK_K, xs);
        if (weights) {
            to_lanes(group.w, 0, QK_K, ws);
            fit_with_imatrix<Type>(xs, ws, fits);
        } else {
            fit_without_imatrix<Type>(xs, ws, fits);
        }
        for (int lane = 0; lane < group.count; lane++) {
            auto & block = static_cast<typename Type::Block *>(y)[first + lane];
            uint8_t scale[PARTS], min[PARTS];
            for (int j = 0; j < PARTS; j++) {
                scale[j] = static_cast<uint8_t>(min_of(cap, fits.scale_level[j * LANES + lane]));
                min[j] = static_cast<uint8_t>(min_of(cap, fits.min_level[j * LANES + lane]));
            }
            Type::put(block, scale, min);
            block.d = half_of(fits.d[lane]);
            block.dmin = half_of(fits.dmin[lane]);
            alignas(64) int32_t levels[QK_K];
            for (int j = 0; j < PARTS; j++)
                final_levels(group.x[lane] + j * N, N, float_of(block.d) * Type::scale(block, j),
                             float_of(block.dmin) * Type::min(block, j), fits.multiplier[j * LANES + lane],
                             fits.offset[j * LANES + lane], 0, Type::NMAX, levels + j * N);
            Type::pack(levels, block);
        }
    }
    return true;
}

// ---------------------------------------------------------------------------------------------------------------------
// Q3_K, Q6_K: scale only

// The fits of a group of super-blocks: sub-block j of the super-block in lane l at [j * LANES + l].
struct SymmetricGroup {
    static constexpr int PARTS = 16, N = QK_K / PARTS;
    float scale[PARTS * LANES], multiplier[PARTS * LANES];
    int32_t scale_level[PARTS * LANES];
    float d[LANES];

    void put(int j, const SymmetricFit & fit) {
        store(scale + j * LANES, fit.scale);
        store(multiplier + j * LANES, fit.multiplier);
    }

    // The scale of largest magnitude.
    f32 extreme_scale() const {
        f32 largest = splat(0.0f), at_largest = splat(0.0f);
        for (int j = 0; j < PARTS; j++) {
            const f32 v = element(scale, j);
            const mask larger = absolute(v) > largest;
            largest = select(larger, absolute(v), largest);
            at_largest = select(larger, v, at_largest);
        }
        return at_largest;
    }
};

struct PACKED block_q6_K {
    uint8_t ql[128];
    uint8_t qh[64];
    int8_t scales[16];
    uint16_t d;
};

// weights may be nullptr: quantize_row_q6_K_ref and quantize_row_q6_K_impl are the same but for that.
GEMMA_INLINE void fit_q6_K(const float * x, const float * weights, SymmetricGroup & fits) {
    constexpr int N = SymmetricGroup::N;
    for (int j = 0; j < SymmetricGroup::PARTS; j++) {
        const int at = j * N * LANES;
        fits.put(j, make_qx_quants<N, 32, true>(x + at, weights ? weights + at : nullptr));
    }
    const f32 iscale = splat(-128.0f) / fits.extreme_scale();
    for (int j = 0; j < SymmetricGroup::PARTS; j++)
        store(fits.scale_level + j * LANES, minimum(splat(127), nearest_int(iscale * element(fits.scale, j))));
    // A super-block whose scales are all below GROUP_MAX_EPS becomes zero; d = 0 says so to finish_q6_K. No other d is.
    const f32 d = splat(1.0f) / iscale;
    store(fits.d, select(absolute(fits.extreme_scale()) < splat(GROUP_MAX_EPS), splat(0.0f), d));
}

void finish_q6_K(const float * x, const SymmetricGroup & fits, int lane, block_q6_K & block) {
    constexpr int N = SymmetricGroup::N;
    if (fits.d[lane] == 0.0f) {
        memset(&block, 0, sizeof block);
        return;
    }
    block.d = half_of(fits.d[lane]);
    alignas(64) int32_t levels[QK_K];
    for (int j = 0; j < SymmetricGroup::PARTS; j++) {
        block.scales[j] = static_cast<int8_t>(fits.scale_level[j * LANES + lane]);
        final_levels(x + j * N, N, float_of(block.d) * block.scales[j], 0.0f, fits.multiplier[j * LANES + lane], 0.0f,
                     -32, 31, levels + j * N);
    }
    for (int half = 0; half < 2; half++) {
        const int32_t * l = levels + 128 * half;
        uint8_t * __restrict ql = block.ql + 64 * half;
        uint8_t * __restrict qh = block.qh + 32 * half;
        for (int i = 0; i < 32; i++) {
            ql[i] = static_cast<uint8_t>((l[i] & 15) | (l[i + 64] & 15) << 4);
            ql[i + 32] = static_cast<uint8_t>((l[i + 32] & 15) | (l[i + 96] & 15) << 4);
            qh[i] = static_cast<uint8_t>(l[i] >> 4 | (l[i + 32] >> 4) << 2 | (l[i + 64] >> 4) << 4 |
                                         (l[i + 96] >> 4) << 6);
        }
    }
}

struct PACKED block_q3_K {
    uint8_t hmask[32];
    uint8_t qs[64];
    uint8_t scales[12];
    uint16_t d;
};

static_assert(sizeof(block_q3_K) == 110 && sizeof(block_q6_K) == 210);

// w: the imatrix in, the weights out.
GEMMA_INLINE void fit_q3_K_with_imatrix(const float * x, float * w, SymmetricGroup & fits) {
    constexpr int N = SymmetricGroup::N, PARTS = SymmetricGroup::PARTS;
    alignas(64) float sumw[PARTS * LANES];
    const f32 sigma2 = mean_square(x, QK_K, 2.0f);
    for (int j = 0; j < PARTS; j++) {
        const int at = j * N * LANES;
        store(sumw + j * LANES, imatrix_weights(x + at, N, sigma2, w + at));
        fits.put(j, make_qx_quants<N, 4, true>(x + at, w + at));
    }
    const SymmetricFit outer = make_qx_quants<PARTS, 32, false>(fits.scale, sumw);
    store(fits.d, outer.scale);
    for (int j = 0; j < PARTS; j++) {
        const i32 l = nearest_int(outer.multiplier * element(fits.scale, j));
        const i32 level = maximum(splat(-32), minimum(splat(31), l)) + splat(32);
        store(fits.scale_level + j * LANES, select(outer.zero, splat(0), level));
    }
}

// make_q3_quants with do_rmse: x = scale * l, l in [-NMAX, NMAX - 1], weights x * x. Returns the scale; levels are
// ggml's L: l + NMAX, or 0 where the block is zero.
template <int N, int NMAX> GEMMA_INLINE f32 make_q3_quants(const float * x, float * levels) {
    f32 largest = splat(0.0f), at_largest = splat(0.0f);
    for (int i = 0; i < N; i++) {
        const f32 v = element(x, i);
        const mask larger = absolute(v) > largest;
        largest = select(larger, absolute(v), largest);
        at_largest = select(larger, v, at_largest);
    }
    const mask zero = largest < splat(GROUP_MAX_EPS);
    const f32 multiplier = splat(-static_cast<float>(NMAX)) / at_largest;
    f32 sumlx = splat(0.0f), suml2 = splat(0.0f);
    for (int i = 0; i < N; i++) {
        const f32 v = element(x, i), w = v * v;
        const f32 l = clamp(nearest_small(multiplier * v), -NMAX, NMAX - 1);  // |multiplier * v| <= NMAX
        store(levels + i * LANES, l);
        sumlx = sumlx + w * v * l;
        suml2 = suml2 + w * l * l;
    }
    bool changed = true;
    for (int round = 0; round < 5 && changed; round++) {  // as in make_qp_quants
        changed = false;
        for (int i = 0; i < N; i++) {
            const f32 v = element(x, i), w = v * v, l = element(levels, i);
            f32 slx = sumlx - w * v * l, sl2 = suml2 - w * l * l;
            const f32 new_l = clamp(nearest(v * sl2 / slx), -NMAX, NMAX - 1);
            mask better = (slx > splat(0.0f)) & (new_l != l) & ~zero;
            if (!any(better)) continue;  // mostly; the jump lets the next division start before this one has ended
            slx = slx + w * v * new_l;
            sl2 = sl2 + w * new_l * new_l;
            better = better & (sl2 > splat(0.0f)) & (slx * slx * suml2 > sumlx * sumlx * sl2);
            store(levels + i * LANES, select(better, new_l, l));
            sumlx = select(better, slx, sumlx);
            suml2 = select(better, sl2, suml2);
            changed |= any(better);
        }
    }
    for (int i = 0; i < N; i++)
        store(levels + i * LANES, select(zero, splat(0.0f), element(levels, i) + splat(static_cast<float>(NMAX))));
    return select((suml2 > splat(0.0f)) & ~zero, sumlx / suml2, splat(0.0f));
}

// levels: out, those of the search.
GEMMA_INLINE void fit_q3_K_without_imatrix(const float * x, float * levels, SymmetricGroup & fits) {
    constexpr int N = SymmetricGroup::N, PARTS = SymmetricGroup::PARTS;
    for (int j = 0; j < PARTS; j++)
        store(fits.scale + j * LANES, make_q3_quants<N, 4>(x + j * N * LANES, levels + j * N * LANES));
    const f32 extreme = fits.extreme_scale(), iscale = splat(-32.0f) / extreme;
    const mask zero = extreme == splat(0.0f);
    store(fits.d, select(zero, splat(0.0f), splat(1.0f) / iscale));
    for (int j = 0; j < PARTS; j++) {
        // ggml keeps nearest_int's result in an int8_t before it clamps.
        const i32 l = (as_byte(nearest_int(iscale * element(fits.scale, j))) ^ splat(128)) - splat(128);
        const i32 level = maximum(splat(-32), minimum(splat(31), l)) + splat(32);
        store(fits.scale_level + j * LANES, select(zero, splat(0), level));
    }
}

// search_levels: of make_q3_quants, or nullptr where multipliers stand for them.
void finish_q3_K(const float * x, const SymmetricGroup & fits, const float * search_levels, int lane,
                 block_q3_K & block) {
    constexpr int N = SymmetricGroup::N, PARTS = SymmetricGroup::PARTS;
    block.d = half_of(fits.d[lane]);
    alignas(64) int32_t levels[QK_K];
    int scale[PARTS];
    for (int j = 0; j < PARTS; j++) {
        scale[j] = fits.scale_level[j * LANES + lane];
        const float d = float_of(block.d) * (scale[j] - 32);
        if (d == 0.0f && search_levels)
            for (int i = j * N; i < (j + 1) * N; i++) levels[i] = static_cast<int>(search_levels[i * LANES + lane]);
        else
            final_levels(x + j * N, N, d, 0.0f, fits.multiplier[j * LANES + lane], 0.0f, -4, 3, levels + j * N);
    }
    for (int j = 0; j < 8; j++) block.scales[j] = static_cast<uint8_t>((scale[j] & 15) | (scale[j + 8] & 15) << 4);
    for (int j = 0; j < 4; j++)
        block.scales[8 + j] = static_cast<uint8_t>(scale[j] >> 4 | (scale[j + 4] >> 4) << 2 | (scale[j + 8] >> 4) << 4 |
                                                   (scale[j + 12] >> 4) << 6);
    for (int i = 0; i < 32; i++) {
        int high = 0;
        for (int j = 0; j < 8; j++) high |= (levels[32 * j + i] >> 2) << j;
        block.hmask[i] = static_cast<uint8_t>(high);
    }
    pack_two_bits(levels, block.qs);
}

}  // namespace

bool quantize_q2_K(const float * x, void * y, int64_t n_rows, int64_t n_per_row, const float * weights) {
    return quantize_affine<Q2_K>(x, y, n_rows, n_per_row, weights);
}

bool quantize_q4_K(const float * x, void * y, int64_t n_rows, int64_t n_per_row, const float * weights) {
    return quantize_affine<Q4_K>(x, y, n_rows, n_per_row, weights);
}

bool quantize_q5_K(const float * x, void * y, int64_t n_rows, int64_t n_per_row, const float * weights) {
    return quantize_affine<Q5_K>(x, y, n_rows, n_per_row, weights);
}

bool quantize_q3_K(const float * x, void * y, int64_t n_rows, int64_t n_per_row, const float * weights) {
    const int64_t per_row = n_per_row / QK_K, n_blocks = n_rows * per_row;
    alignas(64) float xs[QK_K * LANES], scratch[QK_K * LANES];
    alignas(64) SymmetricGroup fits;
    for (int64_t first = 0; first < n_blocks; first += LANES) {
        const BlockGroup group(x, weights, first, n_blocks, per_row, QK_K);
        to_lanes(group.x, 0, QK_K, xs);
        if (weights) {
            to_lanes(group.w, 0, QK_K, scratch);
            fit_q3_K_with_imatrix(xs, scratch, fits);
        } else {
            fit_q3_K_without_imatrix(xs, scratch, fits);
        }
        for (int lane = 0; lane < group.count; lane++)
            finish_q3_K(group.x[lane], fits, weights ? nullptr : scratch, lane,
                        static_cast<block_q3_K *>(y)[first + lane]);
    }
    return true;
}

bool quantize_q6_K(const float * x, void * y, int64_t n_rows, int64_t n_per_row, const float * weights) {
    const int64_t per_row = n_per_row / QK_K, n_blocks = n_rows * per_row;
    alignas(64) float xs[QK_K * LANES], ws[QK_K * LANES];
    alignas(64) SymmetricGroup fits;
    for (int64_t first = 0; first < n_blocks; first += LANES) {
        const BlockGroup group(x, weights, first, n_blocks, per_row, QK_K);
        to_lanes(group.x, 0, QK_K, xs);
        if (weights) {
            to_lanes(group.w, 0, QK_K, ws);
            fit_q6_K(xs, ws, fits);
        } else {
            fit_q6_K(xs, nullptr, fits);
        }
        for (int lane = 0; lane < group.count; lane++)
            finish_q6_K(group.x[lane], fits, lane, static_cast<block_q6_K *>(y)[first + lane]);
    }
    return true;
}

}  // namespace gemma::GEMMA_ISA
