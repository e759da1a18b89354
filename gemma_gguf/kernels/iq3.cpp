// IQ3_XXS and IQ3_S: groups of 4 weights on a grid of 256 or 512 points, 32 weights to a scale.
//
// Mirrors quantize_row_iq3_xxs_impl and quantize_row_iq3_s_impl of ggml-quants.c, with an imatrix and without; the work
// is in iq_lattice.h.
#include "iq_lattice.h"
#include "kernels.h"

namespace gemma::GEMMA_ISA {
namespace {

struct Iq3 {
    static constexpr int DIM = 4, BLOCK = 32;
    static constexpr float SIGMA = 2, STEP = 0.2f;
    static constexpr bool REFINES_ALL_BLOCKS = false;
    static f32 weight_without_imatrix(f32, f32 x2) { return x2; }
    static void prepare(const float *, const float *, f32 &, f32 &, mask &) {}
};

// block_iq3_xxs: d (half), 64 bytes of grid indices, 8 words of four times 7 signs and the scale.
struct Iq3Xxs : Iq3 {
    static constexpr int BYTES = 98, STEPS = 15;
    static constexpr bool EVEN_SIGNS = true, STARTS_OFF_GRID = false, REFINES_ALL_GROUPS = false;
    static mask is_live(f32 largest) { return not_less(largest, splat(1e-8f)); }  // GROUP_MAX_EPS_IQ3_XXS

    static void write(const Grid & grid, const Result<Iq3Xxs> & result, int l, uint8_t * y) {
        memset(y, 0, BYTES);
        const float largest = result.largest_scale(l);
        if (!largest) return;
        const float d = largest / 31, inverse = 1 / d;
        write_half(y, d * 1.0125f);
        for (int ib = 0; ib < 8; ib++) {
            uint32_t word = result.scale_bits(ib, l, inverse) << 28;
            if (result.is_live(ib, l)) {
                for (int k = 0; k < 8; k++) y[2 + 8 * ib + k] = static_cast<uint8_t>(result.grid_index(grid, ib, k, l));
                for (int k = 0; k < 4; k++) word |= result.sign_bits(ib, k, l) << 7 * k;
            }
            memcpy(y + 66 + 4 * ib, &word, sizeof word);
        }
    }
};

// block_iq3_s: d (half), 64 low bytes of grid indices, 8 bytes of their ninth bits, 32 bytes of signs, 4 bytes of
// scales.
struct Iq3S : Iq3 {
    static constexpr int BYTES = 110, STEPS = 9;
    // ggml starts with is_on_grid = false, and refines the groups that are on the grid as well (`continue` is commented
    // out there).
    static constexpr bool EVEN_SIGNS = false, STARTS_OFF_GRID = true, REFINES_ALL_GROUPS = true;
    static mask is_live(f32 largest) { return largest != splat(0.0f); }

    static void write(const Grid & grid, const Result<Iq3S> & result, int l, uint8_t * y) {
        uint8_t *indices = y + 2, *high = y + 66, *signs = y + 74, *scales = y + 106;
        memset(y, 0, BYTES);
        for (int ib = 0; ib < 8; ib++) {
            // ggml's `continue` for a block of zeros skips the lines that advance `qs` and `signs`: the blocks after it
            // are written one place early (qh is addressed by ib and stays). A flaw, but these are the bytes.
            if (!result.is_live(ib, l)) continue;
            for (int k = 0; k < 8; k++) {
                const uint32_t index = result.grid_index(grid, ib, k, l);
                indices[k] = static_cast<uint8_t>(index);
                high[ib] |= static_cast<uint8_t>(index >> 8 << k);
            }
            for (int k = 0; k < 4; k++) signs[k] = static_cast<uint8_t>(result.sign_bits(ib, k, l));
            indices += 8, signs += 4;
        }
        const float largest = result.largest_scale(l);
        if (!largest) return;
        const float d = largest / 31, inverse = 1 / d;
        write_half(y, d * 1.033f);
        for (int ib = 0; ib < 8; ib += 2)
            scales[ib / 2] = static_cast<uint8_t>(result.scale_bits(ib, l, inverse) |
                                                  result.scale_bits(ib + 1, l, inverse) << 4);
    }
};

}  // namespace

bool quantize_iq3_xxs(const float * x, void * y, int64_t n_rows, int64_t n_per_row, const float * weights) {
    static const Grid * const grid = build_grid(GridName::iq3_xxs);
    return Quantizer<Iq3Xxs>::quantize(*grid, x, static_cast<uint8_t *>(y), n_rows, n_per_row, weights);
}

bool quantize_iq3_s(const float * x, void * y, int64_t n_rows, int64_t n_per_row, const float * weights) {
    static const Grid * const grid = build_grid(GridName::iq3_s);
    return Quantizer<Iq3S>::quantize(*grid, x, static_cast<uint8_t *>(y), n_rows, n_per_row, weights);
}

}  // namespace gemma::GEMMA_ISA
