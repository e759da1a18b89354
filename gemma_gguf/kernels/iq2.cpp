// IQ2_XXS, IQ2_XS and IQ2_S: groups of 8 weights on a grid of 256, 512 or 1024 points.
//
// Mirrors quantize_row_iq2_xxs_impl, quantize_row_iq2_xs_impl and quantize_row_iq2_s_impl of ggml-quants.c; the work is
// in iq_lattice.h. ggml asserts an imatrix for IQ2_XXS and IQ2_XS; without one these return false.
#include "iq_lattice.h"
#include "kernels.h"

namespace gemma::GEMMA_ISA {
namespace {

constexpr float TOO_SMALL = 1e-15f;  // GROUP_MAX_EPS

// make_qp_quants of ggml-quants.c for n = 32 and nmax = 4, by lane: the scale for 32 magnitudes as unsigned levels.
//
// ggml keeps a level in a uint8_t and computes with the int that it came from only where it says so. One magnitude of
// eight may be negative (EVEN_SIGNS), so levels may be negative too, and which of the two is used matters.
f32 unsigned_scale(const float * x, const float * weight) {
    constexpr int N = 32, LARGEST = 4;
    const f32 zero = splat(0.0f);
    const i32 as_byte = splat(255), largest_level = splat(LARGEST);
    f32 largest = zero;
    for (int i = 0; i < N; i++) largest = maximum(largest, load(x + i * LANES));

    f32 inverse = splat(static_cast<float>(LARGEST)) / largest, least = zero;
    for (int step = -5; step <= 4; step++) {
        if (step == 0) continue;
        const bool first = step == -5;  // ggml's code before its loop: no clipping, and levels as bytes
        const f32 candidate = first ? inverse : splat(0.1f * static_cast<float>(step) + LARGEST) / largest;
        const f32 scale = splat(1.0f) / candidate;
        f32 error = zero;
        for (int i = 0; i < N; i++) {
            const f32 xi = load(x + i * LANES);
            const i32 level = nearest_int(candidate * xi);
            const f32 diff = xi - scale * to_float(first ? level & as_byte : minimum(largest_level, level));
            error = error + load(weight + i * LANES) * diff * diff;
        }
        const mask better = error < least;
        least = first ? error : select(better, error, least);
        if (!first) inverse = select(better, candidate, inverse);
    }

    i32 levels[N];  // as bytes
    f32 sum_lx = zero, sum_l2 = zero;
    for (int i = 0; i < N; i++) {
        const f32 xi = load(x + i * LANES), w = load(weight + i * LANES);
        const i32 level = minimum(largest_level, nearest_int(inverse * xi));
        const f32 l = to_float(level);
        levels[i] = level & as_byte;
        sum_lx = sum_lx + w * xi * l;
        sum_l2 = sum_l2 + w * l * l;
    }
    mask active = not_less(largest, splat(TOO_SMALL));  // lanes that ggml still improves
    for (int round = 0; round < 5 && any(active); round++) {
        mask changed = zero != zero;
        for (int i = 0; i < N; i++) {
            const f32 xi = load(x + i * LANES), w = load(weight + i * LANES), l = to_float(levels[i]);
            f32 lx = sum_lx - w * xi * l, l2 = sum_l2 - w * l * l;
            const i32 level = minimum(largest_level, nearest_int(xi * l2 / lx));
            mask better = active & (lx > zero) & (l2 > zero) & ~(level == levels[i]);
            if (!any(better)) continue;
            const f32 new_l = to_float(level);
            lx = lx + w * xi * new_l;
            l2 = l2 + w * new_l * new_l;
            better = better & (lx * lx * sum_l2 > sum_lx * sum_lx * l2);
            levels[i] = select(better, level & as_byte, levels[i]);
            sum_lx = select(better, lx, sum_lx);
            sum_l2 = select(better, l2, sum_l2);
            changed = changed | better;
        }
        active = active & changed;
    }
    const f32 scale = select(sum_l2 > zero, sum_lx / sum_l2, zero);
    return select(largest < splat(TOO_SMALL), zero, scale);
}

struct Iq2 {
    static constexpr int DIM = 8;
    static constexpr float STEP = 0.1f;
    static constexpr bool STARTS_OFF_GRID = false;
    static f32 weight_without_imatrix(f32, f32 x2) { return x2; }  // not reached by XXS and XS
    static mask is_live(f32 largest) { return not_less(largest, splat(TOO_SMALL)); }
    static void prepare(const float *, const float *, f32 &, f32 &, mask &) {}
};

// block_iq2_xxs: d (half), then for each 32 weights a word of 4 grid indices and a word of four times 7 signs and the
// scale.
struct Iq2Xxs : Iq2 {
    static constexpr int BYTES = 66, BLOCK = 32, STEPS = 6;
    static constexpr float SIGMA = 1;
    static constexpr bool EVEN_SIGNS = true, REFINES_ALL_BLOCKS = true, REFINES_ALL_GROUPS = true;

    // The only type that does not start from its largest weight.
    static void prepare(const float * magnitude, const float * weight, f32 & scale, f32 & largest, mask & live) {
        scale = unsigned_scale(magnitude, weight);
        largest = scale * splat(3.0f);  // ggml's eff_max
        live = live & ~(largest <= splat(0.0f));
    }

    static void write(const Grid & grid, const Result<Iq2Xxs> & result, int l, uint8_t * y) {
        memset(y, 0, BYTES);
        const float largest = result.largest_scale(l);
        if (!largest) return;
        const float d = largest / 31, inverse = 1 / d;
        write_half(y, d);
        for (int ib = 0; ib < 8; ib++) {
            uint32_t words[2] = {0, result.scale_bits(ib, l, inverse) << 28};
            for (int k = 0; k < 4 && result.is_live(ib, l); k++) {
                words[0] |= result.grid_index(grid, ib, k, l) << 8 * k;
                words[1] |= result.sign_bits(ib, k, l) << 7 * k;
            }
            memcpy(y + 2 + 8 * ib, words, sizeof words);
        }
    }
};

// block_iq2_xs: d (half), 32 shorts of 9 bits of grid index and 7 signs, 8 bytes of two scales.
struct Iq2Xs : Iq2 {
    static constexpr int BYTES = 74, BLOCK = 16, STEPS = 9;
    static constexpr float SIGMA = 1;
    static constexpr bool EVEN_SIGNS = true, REFINES_ALL_BLOCKS = false, REFINES_ALL_GROUPS = false;

    static void write(const Grid & grid, const Result<Iq2Xs> & result, int l, uint8_t * y) {
        memset(y, 0, BYTES);
        const float largest = result.largest_scale(l);
        if (!largest) return;
        const float d = largest / 31, inverse = 1 / d;
        write_half(y, d);
        for (int ib = 0; ib < 16; ib++) {
            for (int k = 0; k < 2 && result.is_live(ib, l); k++) {
                const uint32_t bits = result.grid_index(grid, ib, k, l) | result.sign_bits(ib, k, l) << 9;
                const uint16_t packed = static_cast<uint16_t>(bits);
                memcpy(y + 2 + 4 * ib + 2 * k, &packed, sizeof packed);
            }
            y[66 + ib / 2] |= static_cast<uint8_t>(result.scale_bits(ib, l, inverse) << 4 * (ib % 2));
        }
    }
};

// block_iq2_s: d (half), 32 low bytes of grid indices, 32 bytes of signs, 8 bytes of the indices' bits 8 and 9, 8 bytes
// of two scales.
struct Iq2S : Iq2 {
    static constexpr int BYTES = 82, BLOCK = 16, STEPS = 9;
    static constexpr float SIGMA = 2;
    static constexpr bool EVEN_SIGNS = false, REFINES_ALL_BLOCKS = false, REFINES_ALL_GROUPS = false;
    static f32 weight_without_imatrix(f32 sigma2, f32 x2) { return splat(0.25f) * sigma2 + x2; }
    static mask is_live(f32 largest) { return not_less(largest, splat(1e-8f)); }  // GROUP_MAX_EPS_IQ2_S

    static void write(const Grid & grid, const Result<Iq2S> & result, int l, uint8_t * y) {
        uint8_t *indices = y + 2, *signs = y + 34, *high = y + 66, *scales = y + 74;
        memset(y, 0, BYTES);
        for (int n = 0; n < 32; n++) {  // unlike the others, written even if all scales are zero
            const int ib = n / 2, k = n % 2;
            if (!result.is_live(ib, l)) continue;
            const uint32_t index = result.grid_index(grid, ib, k, l);
            indices[n] = static_cast<uint8_t>(index);
            signs[n] = static_cast<uint8_t>(result.sign_bits(ib, k, l));
            high[n / 4] |= static_cast<uint8_t>(index >> 8 << 2 * (n % 4));
        }
        const float largest = result.largest_scale(l);
        if (!largest) return;
        const float d = largest / 31, inverse = 1 / d;
        write_half(y, d * 0.9875f);
        for (int ib = 0; ib < 16; ib++)
            scales[ib / 2] |= static_cast<uint8_t>(result.scale_bits(ib, l, inverse) << 4 * (ib % 2));
    }
};

}  // namespace

bool quantize_iq2_xxs(const float * x, void * y, int64_t n_rows, int64_t n_per_row, const float * weights) {
    if (weights == nullptr) return false;
    static const Grid * const grid = build_grid(GridName::iq2_xxs);
    return Quantizer<Iq2Xxs>::quantize(*grid, x, static_cast<uint8_t *>(y), n_rows, n_per_row, weights);
}

bool quantize_iq2_xs(const float * x, void * y, int64_t n_rows, int64_t n_per_row, const float * weights) {
    if (weights == nullptr) return false;
    static const Grid * const grid = build_grid(GridName::iq2_xs);
    return Quantizer<Iq2Xs>::quantize(*grid, x, static_cast<uint8_t *>(y), n_rows, n_per_row, weights);
}

bool quantize_iq2_s(const float * x, void * y, int64_t n_rows, int64_t n_per_row, const float * weights) {
    static const Grid * const grid = build_grid(GridName::iq2_s);
    return Quantizer<Iq2S>::quantize(*grid, x, static_cast<uint8_t *>(y), n_rows, n_per_row, weights);
}

}  // namespace gemma::GEMMA_ISA
