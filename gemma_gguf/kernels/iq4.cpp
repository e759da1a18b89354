// IQ4_NL and IQ4_XS: 16 fixed, unevenly spaced levels; one scale per 32 weights. One lane per 32 (NL) or 256 (XS).
//
// Mirrors quantize_row_iq4_nl_impl of ggml-quants.c with ntry = 7, with an imatrix and without.
//
// ggml spends its time in best_index_int8, a branching binary search that runs 17 times per weight. Here it is a table
// look-up without branches (Nearest below); everything else is the scalar code, lane by lane.
#include "kernels.h"
#include "simd.h"

#include <cmath>

namespace gemma::GEMMA_ISA {
namespace {

constexpr int BLOCK = 32;         // weights that share a scale
constexpr int SUPER_BLOCK = 256;  // weights of an IQ4_XS block
constexpr int SCALES = SUPER_BLOCK / BLOCK;
constexpr int TRIES = 7;           // scales tried on either side of the first guess
constexpr float TOO_SMALL = 1e-15f;  // GROUP_MAX_EPS

// kvalues_iq4nl of ggml-common.h: part of the file format.
constexpr int LEVELS[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
constexpr float midpoint(int k) { return k < 15 ? 0.5f * (LEVELS[k] + LEVELS[k + 1]) : INFINITY; }

// best_index_int8 ends with `x - LEVELS[k] < LEVELS[k + 1] - x ? k : k + 1`, in floats. That is `x < midpoint` exactly:
// both differences are monotone in x and equal at the midpoint, so they can tie elsewhere only if x has more bits below
// the point than half the gap has, that is if it lies in a lower binade. No x next to a midpoint does:
constexpr float binade(float a) { return a < 0 ? binade(-a) : a >= 2 ? 2 * binade(a / 2) : 1; }
constexpr bool midpoints_are_exact(int k) {
    return binade(0.999f * midpoint(k)) >= binade(0.5f * static_cast<float>(LEVELS[k + 1] - LEVELS[k])) &&
           (k == 14 || midpoints_are_exact(k + 1));
}
static_assert(midpoints_are_exact(0), "best_index_int8 is not a comparison with midpoints");

#if defined(__AVX512F__)

// The buckets that the 16 + 16 entries of a two-register permute can tell apart: x rounded to multiples of WIDTH. They
// cover all that the search can reach, |x / max| * (127 + TRIES), and each holds at most one midpoint, none of them so
// near an edge that the rounding of the bucket number matters.
constexpr float WIDTH = 8.75f;
constexpr int bucket_of(float x) { return x < 0 ? -bucket_of(-x) : static_cast<int>(x / WIDTH + 0.5f); }
constexpr bool buckets_are_exact(int k) {
    return bucket_of(midpoint(k) - 0.1f) == bucket_of(midpoint(k) + 0.1f) &&
           (k == 14 || (bucket_of(midpoint(k)) < bucket_of(midpoint(k + 1)) && buckets_are_exact(k + 1)));
}
static_assert(buckets_are_exact(0) && 15.4f * WIDTH > 127 + TRIES, "a bucket would need two comparisons");

class Nearest {
    f32 midpoint_low, midpoint_high, levels;
    i32 below_low, below_high;  // number of midpoints below the bucket

  public:
    Nearest() {
        float middle[32], level[16];
        int32_t below[32];
        for (int b = -16; b < 16; b++) {
            int k = 0;
            while (midpoint(k) < (static_cast<float>(b) - 0.5f) * WIDTH) k++;
            below[b & 31] = k;
            middle[b & 31] = midpoint(k);  // when it lies beyond the bucket, no x of the bucket reaches it
        }
        for (int k = 0; k < 16; k++) level[k] = static_cast<float>(LEVELS[k]);
        midpoint_low = load(middle), midpoint_high = load(middle + 16);
        below_low = load(below), below_high = load(below + 16);
        levels = load(level);
    }

    // Index of the level nearest to x, for |x| < 15.5 * WIDTH. The permutes use the low 5 bits of the bucket number.
    i32 index(f32 x) const {
        const i32 bucket = bits_of(f32{_mm512_fmadd_ps(x.v, splat(1 / WIDTH).v, splat(ROUNDING).v)});
        const f32 middle = {_mm512_permutex2var_ps(midpoint_low.v, bucket.v, midpoint_high.v)};
        const i32 below = {_mm512_permutex2var_epi32(below_low.v, bucket.v, below_high.v)};
        return {_mm512_mask_add_epi32(below.v, not_less(x, middle).v, below.v, splat(1).v)};
    }

    f32 level(f32 x) const { return {_mm512_permutexvar_ps(index(x).v, levels.v)}; }
};

#else

// Four comparisons down a balanced tree of the 15 midpoints; the last two levels of the tree are permutes.
class Nearest {
    f32 tree_2, tree_1, even_levels, odd_levels;

    struct Found {
        i32 pair;    // index / 2
        mask upper;  // index % 2
    };

    Found find(f32 x) const {
        const mask half = not_less(x, splat(midpoint(7)));
        const mask quarter = not_less(x, select(half, splat(midpoint(11)), splat(midpoint(3))));
        const i32 k = (bits_of(f32{half.v}) & splat(2)) | shift_right<31>(bits_of(f32{quarter.v}));
        const mask eighth = not_less(x, f32{_mm256_permutevar_ps(tree_2.v, k.v)});
        const i32 pair = k + k - bits_of(f32{eighth.v});  // a mask is -1 where true
        return {pair, not_less(x, f32{_mm256_permutevar8x32_ps(tree_1.v, pair.v)})};
    }

  public:
    Nearest() {
        float nodes_2[8], nodes_1[8], even[8], odd[8];
        for (int k = 0; k < 8; k++) {
            nodes_2[k] = midpoint(4 * (k % 4) + 1);  // twice: the permute works within 128 bits
            nodes_1[k] = midpoint(2 * k);
            even[k] = static_cast<float>(LEVELS[2 * k]);
            odd[k] = static_cast<float>(LEVELS[2 * k + 1]);
        }
        tree_2 = load(nodes_2), tree_1 = load(nodes_1);
        even_levels = load(even), odd_levels = load(odd);
    }

    i32 index(f32 x) const {
        const Found found = find(x);
        return found.pair + found.pair - bits_of(f32{found.upper.v});
    }

    f32 level(f32 x) const {
        const Found found = find(x);
        return select(found.upper, f32{_mm256_permutevar8x32_ps(odd_levels.v, found.pair.v)},
                      f32{_mm256_permutevar8x32_ps(even_levels.v, found.pair.v)});
    }
};

#endif

// The scale of one block of 32 per lane.
f32 find_scale(const Nearest & nearest, const float * x, const float * weight) {
    const f32 zero = splat(0.0f);
    f32 largest = zero, signed_largest = zero;
    for (int i = 0; i < BLOCK; i++) {
        const f32 xi = load(x + i * LANES), magnitude = absolute(xi);
        const mask larger = magnitude > largest;
        largest = select(larger, magnitude, largest);
        signed_largest = select(larger, xi, signed_largest);
    }

    f32 scale = zero, best = zero;
    for (int attempt = -TRIES - 1; attempt <= TRIES; attempt++) {
        const bool first = attempt < -TRIES;  // ggml's code before its loop
        const f32 inverse = first ? splat(1.0f) / (-signed_largest / splat(static_cast<float>(LEVELS[0])))
                                  : splat(static_cast<float>(attempt + LEVELS[0])) / signed_largest;
        f32 sum_qx = zero, sum_q2 = zero;
        for (int i = 0; i < BLOCK; i++) {
            const f32 xi = load(x + i * LANES);
            const f32 q = nearest.level(inverse * xi);
            const f32 wq = load(weight + i * LANES) * q;
            sum_qx = sum_qx + wq * xi;
            sum_q2 = sum_q2 + wq * q;
        }
        const f32 candidate = sum_qx / sum_q2;
        mask better = sum_q2 > zero;
        if (!first) better = better & (sum_qx * sum_qx > best * sum_q2);
        scale = select(better, candidate, scale);
        // Without a positive sum_q2 ggml starts from `best = 0 * sum_qx`, which is NaN if that sum overflowed.
        best = first ? scale * sum_qx : select(better, candidate * sum_qx, best);
    }
    return select(largest < splat(TOO_SMALL), zero, scale);
}

// weight[i] of the 32 weights from `first` on, per lane.
void find_weights(const BlockGroup & group, bool with_imatrix, int first, const float * x, f32 sigma2, float * weight) {
    if (with_imatrix) to_lanes(group.w, first, BLOCK, weight);
    for (int i = 0; i < BLOCK; i++) {
        const f32 xi = load(x + i * LANES), x2 = xi * xi;
        store(weight + i * LANES, with_imatrix ? load(weight + i * LANES) * square_root(sigma2 + x2) : x2);
    }
}

f32 find_sigma2(const float * x, int n) {
    f32 sum = splat(0.0f);
    for (int i = 0; i < n; i++) {
        const f32 xi = load(x + i * LANES);
        sum = sum + xi * xi;
    }
    return sum * splat(2.0f / static_cast<float>(n));
}

// The 32 indices for a known scale, packed: low nibbles hold the first 16. Lanes are neighbouring weights here.
void pack_levels(const Nearest & nearest, const float * x, float inverse, uint8_t * packed) {
    int32_t index[BLOCK];
    for (int i = 0; i < BLOCK; i += LANES) {
        // Unlike in the search, scaled weights have no bound here. Beyond the outer midpoints nothing changes, and NaN
        // (0 * inf) is nearest to the last level for ggml: minimum() returns its second operand for NaN.
        const f32 scaled = splat(inverse) * load(x + i);
        store(index + i, nearest.index(maximum(minimum(scaled, splat(120.0f)), splat(-120.0f))));
    }
    for (int i = 0; i < BLOCK / 2; i++) packed[i] = static_cast<uint8_t>(index[i] | index[i + BLOCK / 2] << 4);
}

void write_half(uint8_t * y, float value) {
    const uint16_t half = half_of(value);
    memcpy(y, &half, sizeof half);
}

// block_iq4_xs: d (half), scales_h (16 bits: 2 per block), scales_l (4 bits per block), 8 x 16 bytes of indices.
void write_iq4_xs(const Nearest & nearest, const float * x, const float * scales, uint8_t * y) {
    float largest = 0, signed_largest = 0;
    for (int ib = 0; ib < SCALES; ib++) {
        const float magnitude = fabsf(scales[ib * LANES]);
        if (magnitude > largest) largest = magnitude, signed_largest = scales[ib * LANES];
    }
    const float d = -signed_largest / 32;
    write_half(y, d);
    const float inverse = d ? 1 / d : 0.0f;
    unsigned high = 0;
    uint8_t low[SCALES / 2] = {0};
    for (int ib = 0; ib < SCALES; ib++) {
        const int l = max_of(-32, min_of(31, nearest_int(inverse * scales[ib * LANES])));
        const float dl = d * static_cast<float>(l);
        pack_levels(nearest, x + ib * BLOCK, dl ? 1 / dl : 0.0f, y + 8 + ib * BLOCK / 2);
        const unsigned stored = static_cast<unsigned>(l + 32);
        low[ib / 2] |= static_cast<uint8_t>((stored & 15) << 4 * (ib % 2));
        high |= stored >> 4 << 2 * ib;
    }
    const uint16_t scales_h = static_cast<uint16_t>(high);
    memcpy(y + 2, &scales_h, sizeof scales_h);
    memcpy(y + 4, low, sizeof low);
}

}  // namespace

bool quantize_iq4_nl(const float * x, void * y, int64_t n_rows, int64_t n_per_row, const float * weights) {
    constexpr int64_t BYTES = 18;  // block_iq4_nl: d (half), 16 bytes of indices
    const Nearest nearest;
    const int64_t per_row = n_per_row / BLOCK, n_blocks = n_rows * per_row;
    alignas(64) float xs[BLOCK * LANES], weight[BLOCK * LANES], scale[LANES];
    for (int64_t first = 0; first < n_blocks; first += LANES) {
        const BlockGroup group(x, weights, first, n_blocks, per_row, BLOCK);
        to_lanes(group.x, 0, BLOCK, xs);
        find_weights(group, weights != nullptr, 0, xs, find_sigma2(xs, BLOCK), weight);
        store(scale, find_scale(nearest, xs, weight));
        for (int l = 0; l < group.count; l++) {
            uint8_t * block = static_cast<uint8_t *>(y) + (first + l) * BYTES;
            write_half(block, scale[l]);
            pack_levels(nearest, group.x[l], scale[l] ? 1 / scale[l] : 0.0f, block + 2);
        }
    }
    return true;
}

bool quantize_iq4_xs(const float * x, void * y, int64_t n_rows, int64_t n_per_row, const float * weights) {
    constexpr int64_t BYTES = 136;
    const Nearest nearest;
    const int64_t per_row = n_per_row / SUPER_BLOCK, n_blocks = n_rows * per_row;
    alignas(64) float xs[SUPER_BLOCK * LANES], weight[BLOCK * LANES], scales[SCALES * LANES];
    for (int64_t first = 0; first < n_blocks; first += LANES) {
        const BlockGroup group(x, weights, first, n_blocks, per_row, SUPER_BLOCK);
        to_lanes(group.x, 0, SUPER_BLOCK, xs);
        const f32 sigma2 = find_sigma2(xs, SUPER_BLOCK);
        for (int ib = 0; ib < SCALES; ib++) {
            const float * block = xs + ib * BLOCK * LANES;
            find_weights(group, weights != nullptr, ib * BLOCK, block, sigma2, weight);
            store(scales + ib * LANES, find_scale(nearest, block, weight));
        }
        for (int l = 0; l < group.count; l++)
            write_iq4_xs(nearest, group.x[l], scales + l, static_cast<uint8_t *>(y) + (first + l) * BYTES);
    }
    return true;
}

}  // namespace gemma::GEMMA_ISA
