// What IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS and IQ3_S have in common; iq2.cpp and iq3.cpp say in what they differ.
//
// Mirrors quantize_row_iq2_xxs_impl, _iq2_xs_impl, _iq2_s_impl, _iq3_xxs_impl and _iq3_s_impl of ggml-quants.c. All
// five do this to a block of 16 or 32 weights: take the signs off, try a dozen or more scales; for each, round every
// group of 8 (IQ2) or 4 (IQ3) weights to levels, replace levels that are not on the grid by the best of some grid
// points, and keep the scale with the best weighted fit; then repeat that once for the scale that the fit itself
// suggests.
//
// Two ways to use the lanes alternate here. One lane per super-block (256 weights) serves everything but the
// replacement of levels, where all the time goes (iq2_find_best_neighbour, iq3_find_best_neighbour). There, a lane is
// one grid point of a search, and a vector holds LANES / 8 searches side by side.
//
// ggml aborts when sums overflow so far that a search finds nothing or a scale is NaN; quantize() returns false then.
#pragma once

#include "iq_tables.h"
#include "simd.h"

namespace gemma::GEMMA_ISA {
namespace {

constexpr int SUPER_BLOCK = 256;
constexpr int SIDE = LANES / EIGHT;  // searches in one vector

// Flags above the (at most 16) bits of a code.
constexpr int32_t OFF_GRID = 1 << 16;   // the levels were not on the grid and have been replaced
constexpr int32_t UNCERTAIN = 1 << 17;  // see Quantizer::round_to_levels
constexpr int32_t CODE = 0xffff;

alignas(64) constexpr int32_t ALL_LANE_NUMBERS[16] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// ---- One search: the eight lanes of a side.

template <class T> using PerSide = const T * const (&)[SIDE];

#if defined(__AVX512F__)

GEMMA_INLINE f32 load_eights(PerSide<float> p) {
    return {_mm512_insertf32x8(_mm512_castps256_ps512(_mm256_loadu_ps(p[0])), _mm256_loadu_ps(p[1]), 1)};
}
GEMMA_INLINE f32 spread(PerSide<float> p) { return {_mm512_mask_blend_ps(0xff00, splat(*p[0]).v, splat(*p[1]).v)}; }
GEMMA_INLINE i32 load_eights(PerSide<uint16_t> p) {
    const __m128i low = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p[0]));
    const __m128i high = _mm_loadu_si128(reinterpret_cast<const __m128i *>(p[1]));
    return {_mm512_cvtepu16_epi32(_mm256_set_m128i(high, low))};
}
// Lane k of every side gets entry `index & 3` of its quarter, or entry `index & 7` of its side.
GEMMA_INLINE f32 pick_of_4(f32 table, i32 index) { return {_mm512_permutevar_ps(table.v, index.v)}; }
GEMMA_INLINE f32 pick_of_8(f32 table, i32 index) {
    const __m512i side = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 8, 8, 8, 8, 8, 8, 8, 8);
    const __m512i in_table = _mm512_ternarylogic_epi32(index.v, _mm512_set1_epi32(7), side, 0xea);  // (a & b) | c
    return {_mm512_permutexvar_ps(in_table, table.v)};
}
// The first or the second four lanes of every side, twice.
GEMMA_INLINE f32 first_half(f32 a) { return {_mm512_shuffle_f32x4(a.v, a.v, 0xa0)}; }
GEMMA_INLINE f32 second_half(f32 a) { return {_mm512_shuffle_f32x4(a.v, a.v, 0xf5)}; }
GEMMA_INLINE f32 swap_halves(f32 a) { return {_mm512_shuffle_f32x4(a.v, a.v, 0xb1)}; }
template <int ORDER> GEMMA_INLINE f32 shuffle(f32 a, f32 b) { return {_mm512_shuffle_ps(a.v, b.v, ORDER)}; }
GEMMA_INLINE f32 interleave_low(f32 a, f32 b) { return {_mm512_unpacklo_ps(a.v, b.v)}; }
GEMMA_INLINE f32 interleave_high(f32 a, f32 b) { return {_mm512_unpackhi_ps(a.v, b.v)}; }
GEMMA_INLINE i32 lane_numbers() { return {_mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3, 4, 5, 6, 7)}; }
GEMMA_INLINE f32 eight_magnitudes() {
    return {_mm512_setr_ps(1, 3, 5, 7, 9, 11, 13, 15, 1, 3, 5, 7, 9, 11, 13, 15)};
}
GEMMA_INLINE i32 gather(const void * words, i32 index) { return {_mm512_i32gather_epi32(index.v, words, 4)}; }
// The lanes of m, moved to the front; what follows them is undefined.
GEMMA_INLINE i32 compress(mask m, i32 a) { return {_mm512_maskz_compress_epi32(m.v, a.v)}; }

#else

GEMMA_INLINE f32 load_eights(PerSide<float> p) { return load(p[0]); }
GEMMA_INLINE f32 spread(PerSide<float> p) { return splat(*p[0]); }
GEMMA_INLINE i32 load_eights(PerSide<uint16_t> p) {
    return {_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i *>(p[0])))};
}
GEMMA_INLINE f32 pick_of_4(f32 table, i32 index) { return {_mm256_permutevar_ps(table.v, index.v)}; }
GEMMA_INLINE f32 pick_of_8(f32 table, i32 index) { return {_mm256_permutevar8x32_ps(table.v, index.v)}; }
GEMMA_INLINE f32 first_half(f32 a) { return {_mm256_permute2f128_ps(a.v, a.v, 0x00)}; }
GEMMA_INLINE f32 second_half(f32 a) { return {_mm256_permute2f128_ps(a.v, a.v, 0x11)}; }
GEMMA_INLINE f32 swap_halves(f32 a) { return {_mm256_permute2f128_ps(a.v, a.v, 0x01)}; }
template <int ORDER> GEMMA_INLINE f32 shuffle(f32 a, f32 b) { return {_mm256_shuffle_ps(a.v, b.v, ORDER)}; }
GEMMA_INLINE f32 interleave_low(f32 a, f32 b) { return {_mm256_unpacklo_ps(a.v, b.v)}; }
GEMMA_INLINE f32 interleave_high(f32 a, f32 b) { return {_mm256_unpackhi_ps(a.v, b.v)}; }
GEMMA_INLINE i32 lane_numbers() { return {_mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7)}; }
GEMMA_INLINE f32 eight_magnitudes() { return {_mm256_setr_ps(1, 3, 5, 7, 9, 11, 13, 15)}; }
GEMMA_INLINE i32 gather(const void * words, i32 index) {
    return {_mm256_i32gather_epi32(static_cast<const int *>(words), index.v, 4)};
}
GEMMA_INLINE i32 compress(mask m, i32 a) {
    const uint64_t bytes = _pdep_u64(lanes_of(m), 0x0101010101010101u) * 0xff;  // 0xff for every lane of m
    const uint64_t lanes = _pext_u64(0x0706050403020100u, bytes);
    return {_mm256_permutevar8x32_epi32(a.v, _mm256_cvtepu8_epi32(_mm_cvtsi64_si128(static_cast<int64_t>(lanes))))};
}

#endif

// What a search needs of its group, one pointer per side: magnitudes, roots of weights (ggml's waux), and the scale.
struct Group {
    const float * magnitude[SIDE];
    const float * root[SIDE];
    const float * scale[SIDE];
};

GEMMA_INLINE f32 term(f32 diff, f32 root) { return root * diff * diff; }

// The terms of ggml's distance, `weight[i] * diff * diff` with `diff = scale * q - xval[i]`. A weight has only as many
// different terms as there are levels: compute each once, then a grid point's terms are look-ups. distance() adds them
// in ggml's order.
template <int DIM> class Terms;

template <> class Terms<8> {  // three levels; at[i] holds the terms of weight i in its first entries, in every quarter
    f32 at[8];

  public:
    __attribute__((always_inline)) explicit Terms(const Group & group) {
        const f32 x = load_eights(group.magnitude), root = load_eights(group.root), scale = spread(group.scale);
        const f32 t0 = term(scale - x, root), t1 = term(scale * splat(3.0f) - x, root);
        const f32 t2 = term(scale * splat(5.0f) - x, root);
        // Transpose: from weights in lanes to the levels of one weight in lanes; the fourth entry is never used.
        const f32 a = interleave_low(t0, t1), b = interleave_high(t0, t1);
        const f32 c = interleave_low(t2, t2), d = interleave_high(t2, t2);
        const f32 rows[4] = {shuffle<0x44>(a, c), shuffle<0xee>(a, c), shuffle<0x44>(b, d), shuffle<0xee>(b, d)};
        for (int i = 0; i < 4; i++) at[i] = first_half(rows[i]), at[i + 4] = second_half(rows[i]);
    }

    __attribute__((always_inline)) f32 distance(i32 code) const {
        f32 sum = pick_of_4(at[0], code) + pick_of_4(at[1], shift_right<2>(code));
        sum = sum + pick_of_4(at[2], shift_right<4>(code));
        sum = sum + pick_of_4(at[3], shift_right<6>(code));
        sum = sum + pick_of_4(at[4], shift_right<8>(code));
        sum = sum + pick_of_4(at[5], shift_right<10>(code));
        sum = sum + pick_of_4(at[6], shift_right<12>(code));
        return sum + pick_of_4(at[7], shift_right<14>(code));
    }
};

template <> class Terms<4> {  // eight levels; at[i] holds the terms of weight i
    f32 at[4];

  public:
    __attribute__((always_inline)) explicit Terms(const Group & group) {
        const f32 grid = spread(group.scale) * eight_magnitudes();
        for (int i = 0; i < 4; i++) {
            const float *x[SIDE], *root[SIDE];
            for (int side = 0; side < SIDE; side++) {
                x[side] = group.magnitude[side] + i;
                root[side] = group.root[side] + i;
            }
            at[i] = term(grid - spread(x), spread(root));
        }
    }

    __attribute__((always_inline)) f32 distance(i32 code) const {
        f32 sum = pick_of_8(at[0], code) + pick_of_8(at[1], shift_right<3>(code));
        sum = sum + pick_of_8(at[2], shift_right<6>(code));
        return sum + pick_of_8(at[3], shift_right<9>(code));
    }
};

// iq2_find_best_neighbour and iq3_find_best_neighbour: found[side] becomes the code of the nearest of the points in
// each side's list, the first of equals. N > 0 promises that both lists have N eights. The distance itself goes to
// `farthest`: where that is not below FLT_MAX, ggml has found nothing.
template <int N, int DIM>
GEMMA_INLINE void find_nearest(const Group & group, PerSide<uint16_t> list, const int (&n_eights)[SIDE],
                               int32_t * const (&found)[SIDE], f32 & farthest) {
    const Terms<DIM> terms(group);
    f32 best = splat(FLT_MAX);
    i32 where = lane_numbers(), here = where;
    if (N == 1) {
        best = minimum(terms.distance(load_eights(list)), best);  // FLT_MAX for NaN
    } else {
        int n = N;
        for (int side = 0; N == 0 && side < SIDE; side++) n = max_of(n, n_eights[side]);
        for (int k = 0; k < n; k++) {
            const uint16_t * eight[SIDE];  // a shorter list repeats its last eight, which cannot win again
            for (int side = 0; side < SIDE; side++)
                eight[side] = list[side] + EIGHT * (N > 0 ? k : min_of(k, n_eights[side] - 1));
            const f32 distance = terms.distance(load_eights(eight));
            const mask nearer = distance < best;
            best = select(nearer, distance, best);
            where = select(nearer, here, where);
            here = here + splat(EIGHT);
        }
    }
    f32 least = minimum(best, swap_halves(best));
    least = minimum(least, shuffle<0x4e>(least, least));
    least = minimum(least, shuffle<0xb1>(least, least));
    farthest = maximum(farthest, least);

    alignas(64) int32_t places[LANES];
    if (N != 1) store(places, where);
    const unsigned equal = lanes_of(best == least);
    for (int side = 0; side < SIDE; side++) {
        unsigned lanes = equal >> EIGHT * side & 0xff;
        int place = __builtin_ctz(lanes);
        if (N != 1) {  // every lane has met the first of its own minima; the first of all has the least place
            place = places[EIGHT * side + place];
            while ((lanes &= lanes - 1) != 0) place = min_of(place, places[EIGHT * side + __builtin_ctz(lanes)]);
        }
        *found[side] = list[side][place] | OFF_GRID;
    }
}

// ---- One type. `Type` is a struct that says in what it differs:
//
//   DIM, BLOCK, BYTES          weights of a group and of a block that shares a scale; bytes of a super-block
//   SIGMA                      sigma2 is SIGMA times the mean square of the super-block
//   STEP, STEPS                scales tried: (LARGEST + step * STEP) / largest for |step| <= STEPS
//   EVEN_SIGNS                 7 signs of 8 are stored, the number of negative ones has to be even
//   STARTS_OFF_GRID            ggml's is_on_grid before the first step is false
//   REFINES_ALL_BLOCKS         the last step is made even if every group of the block is on the grid
//   REFINES_ALL_GROUPS         ... and for groups that are on the grid too
//   is_live(largest)           lanes whose block ggml does not skip as zero
//   weight_without_imatrix(sigma2, x2), prepare(magnitude, weight, scale, largest, live), which may change the last three
//   write(grid, result, l, y)  lane l's super-block in ggml's layout

// The finished super-blocks of a group of lanes, as Type::write gets them. Element [n * LANES + l] belongs to lane l.
template <class Type> struct Result {
    static constexpr int BLOCKS = SUPER_BLOCK / Type::BLOCK;
    static constexpr int GROUPS = Type::BLOCK / Type::DIM;  // of a block
    static constexpr int BYTES_OF_SIGNS = Type::BLOCK / 8;  // of a block

    unsigned live[BLOCKS];                                       // lanes whose block is not skipped as zero
    alignas(64) float scale[BLOCKS * LANES];                     // 0 if not live
    alignas(64) int32_t code[BLOCKS * GROUPS * LANES];           // group by group; flags above CODE
    alignas(64) int32_t signs[BLOCKS * BYTES_OF_SIGNS * LANES];  // bit i: weight i is negative

    bool is_live(int ib, int l) const { return live[ib] >> l & 1; }
    uint32_t sign_bits(int ib, int k, int l) const {
        return static_cast<uint32_t>(signs[(ib * BYTES_OF_SIGNS + k) * LANES + l]);
    }
    uint32_t grid_index(const Grid & grid, int ib, int k, int l) const {
        return static_cast<uint32_t>(grid.index[code[(ib * GROUPS + k) * LANES + l] & CODE]);
    }
    float largest_scale(int l) const {
        float largest = 0;
        for (int ib = 0; ib < BLOCKS; ib++) largest = max_of(largest, scale[ib * LANES + l]);
        return largest;
    }
    // The 4 bits of a block's scale; inverse is 1 / d.
    uint32_t scale_bits(int ib, int l, float inverse) const {
        const int bits = nearest_int(0.5f * (inverse * scale[ib * LANES + l] - 1));
        return static_cast<uint32_t>(max_of(0, min_of(15, bits)));
    }
};

GEMMA_INLINE void write_half(uint8_t * y, float value) {
    const uint16_t half = half_of(value);
    memcpy(y, &half, sizeof half);
}

template <class Type> class Quantizer {
    static constexpr int DIM = Type::DIM, BITS = DIM == 8 ? 2 : 3, LEVELS = DIM == 8 ? 3 : 8;
    static constexpr int LARGEST = 2 * LEVELS - 1;  // magnitude of the last level
    static constexpr int BLOCK = Type::BLOCK, GROUPS = Result<Type>::GROUPS, CODES = GROUPS * LANES;

    const Grid & grid;
    Result<Type> result;

    // The super-blocks, then the block in hand: [i * LANES + l] is weight i of lane l.
    alignas(64) float x[SUPER_BLOCK * LANES];
    alignas(64) float weight[BLOCK * LANES], root[BLOCK * LANES], magnitude[BLOCK * LANES], weighted[BLOCK * LANES];
    // The same for the searches, block by block: [l * BLOCK + i].
    alignas(64) float root_rows[LANES * BLOCK], magnitude_rows[LANES * BLOCK];
    alignas(64) float search_scale[LANES];
    alignas(64) int32_t code[CODES];  // [k * LANES + l]: group k of lane l
    alignas(64) f32 reach;                   // largest |magnitude|, by lane
    alignas(64) f32 farthest = splat(0.0f);  // largest distance that a search has ended with
    mask failed = splat(0.0f) != splat(0.0f);  // ggml would have aborted

    static f32 load_at(const float * values, int i) { return load(values + i * LANES); }

    // ggml's `weight` and `waux`.
    void find_weights(const BlockGroup & group, bool with_imatrix, int first, const float * xb, f32 sigma2) {
        if (with_imatrix) to_lanes(group.w, first, BLOCK, weight);
        for (int i = 0; i < BLOCK; i++) {
            const f32 xi = load_at(xb, i), x2 = xi * xi;
            const f32 w = with_imatrix ? load_at(weight, i) * square_root(sigma2 + x2)
                                       : Type::weight_without_imatrix(sigma2, x2);
            store(weight + i * LANES, w);
            store(root + i * LANES, square_root(w));
        }
    }

    // Magnitudes and signs, 8 at a time. Types with EVEN_SIGNS store 7 of 8 signs, so that the number of negative ones
    // has to be even: if it is not, the weight that costs least, first of equals, changes its sign.
    void take_signs(const float * xb, int32_t * signs) {
        for (int k = 0; k < BLOCK; k += 8) {
            i32 negative = splat(0), odd = splat(0), cheapest = splat(0);
            f32 least = splat(0.0f);
            for (int i = 0; i < 8; i++) {
                const f32 xi = load_at(xb, k + i);
                const mask positive = xi >= splat(0.0f);  // -0 too
                store(magnitude + (k + i) * LANES, select(positive, xi, -xi));
                const i32 bit = select(positive, splat(0), splat(1));
                negative = negative | (bit * splat(1 << i));
                odd = odd ^ bit;
                if (Type::EVEN_SIGNS) {
                    const f32 cost = load_at(weight, k + i) * xi * xi;
                    const mask cheaper = cost < least;
                    least = i == 0 ? cost : select(cheaper, cost, least);
                    if (i > 0) cheapest = select(cheaper, splat(i), cheapest);
                }
            }
            if (Type::EVEN_SIGNS) {
                for (int i = 0; i < 8; i++) {
                    const mask flip = (odd == splat(1)) & (cheapest == splat(i));
                    const f32 m = load_at(magnitude, k + i);
                    store(magnitude + (k + i) * LANES, select(flip, -m, m));
                    negative = select(flip, negative ^ splat(1 << i), negative);
                }
                negative = negative & splat(127);
            }
            store(signs + k / 8 * LANES, negative);
        }
    }

    // The searches read the weights of one group at once: lanes back to rows.
    static void to_rows(const float * lanes, float * rows) {
        for (int i = 0; i < BLOCK; i += 8) {
            const float * eight[8];
            for (int k = 0; k < 8; k++) eight[k] = lanes + (i + k) * LANES;
            for (int l = 0; l < LANES; l += 8) transpose_8x8(eight, l, rows + l * BLOCK + i, BLOCK);
        }
    }

    // `l = nearest_int(0.5f*(id*xval - 1))`, clipped, for all groups; inverse * scale is 1.
    //
    // Also decides which searches may use the shortened lists of iq_tables.cpp. That needs the term of a level to grow
    // (or stay) with every step away from the level chosen here. It does: `diff` is monotone in the level, and `weight
    // * diff * diff` in |diff|, rounding included, so that only the levels next to the zero of `diff` can be in the
    // wrong order, if rounding made them so. Where x / scale is at least 2e-4 away from the point between two
    // magnitudes, their |diff| differ by 4e-4 scale, and all roundings together are below 1e-5 scale. (Those of scale
    // * q, of the difference, of inverse and of the sums here are 2^-24 of values below 20 scale each, for weights
    // below 20 scale; larger ones are on the far side of all levels, where only nearest_int must be right, which it is
    // up to 2^22.) A scale so small or large that these bounds fail, or that is NaN, makes all searches uncertain.
    void round_to_levels(f32 inverse, f32 scale) {
        const mask usual = (scale > splat(1e-30f)) & (scale < splat(1e30f)) & (reach < splat(1e6f) * scale);
        for (int k = 0; k < GROUPS; k++) {
            f32 farthest_off = splat(0.0f);
            i32 levels = splat(0);
            for (int i = DIM - 1; i >= 0; i--) {
                const f32 exact = splat(0.5f) * (inverse * load_at(magnitude, DIM * k + i) - splat(1.0f));
                const i32 level = maximum(splat(0), minimum(splat(LEVELS - 1), nearest_int(exact)));
                levels = shift_left<BITS>(levels) | level;
                const f32 rounded = (exact + splat(ROUNDING)) - splat(ROUNDING);
                farthest_off = maximum(farthest_off, absolute(exact - rounded));
            }
            const mask certain = usual & (farthest_off < splat(0.4999f));
            store(code + k * LANES, select(certain, levels, levels | splat(UNCERTAIN)));
        }
        store(search_scale, scale);
    }

    // Replaces levels off the grid in `code`: groups k of the lanes in wanted[k].
    //
    // A search is a word: place of its list (16 bits), length of its list in eights (8), place of its group in `code`
    // (8). They are sorted by length, so that the loop over a list is unrolled, or at least its end is predictable.
    void put_on_grid(const mask (&wanted)[GROUPS]) {
        constexpr int LENGTHS = 4;  // 1, 2, 3, more
        static_assert(CODES <= 256, "the place of a group has 8 bits");
        alignas(64) int32_t sorted[LENGTHS][CODES + LANES];
        int count[LENGTHS] = {0};
        i32 at = shift_left<24>(load(ALL_LANE_NUMBERS));
        for (int k = 0; k < GROUPS; k++) {
            const i32 levels = load(code + k * LANES);
            const i32 entry = gather(grid.candidates, levels & splat(CODE));
            const i32 n_short = shift_right<16>(entry) & splat(0xff), n_all = shift_right<24>(entry);
            const mask full = ((levels & splat(UNCERTAIN)) == splat(UNCERTAIN)) & (n_all > n_short);
            const i32 n_eights = select(full, n_all, n_short);
            const i32 list = (entry & splat(0xffff)) + select(full, n_short, splat(0));  // the full one comes second
            const i32 search = list | shift_left<16>(n_eights) | at;
            for (int length = 1; length <= LENGTHS; length++) {
                const mask same = length < LENGTHS ? n_eights == splat(length) : n_eights > splat(LENGTHS - 1);
                const mask chosen = wanted[k] & same;
                store(sorted[length - 1] + count[length - 1], compress(chosen, search));
                count[length - 1] += __builtin_popcount(lanes_of(chosen));
            }
            at = at + splat(LANES << 24);
        }
        search_all<1>(sorted[0], count[0]);
        search_all<2>(sorted[1], count[1]);
        search_all<3>(sorted[2], count[2]);
        search_all<0>(sorted[3], count[3]);
    }

    template <int N> void search_all(int32_t * searches, int count) {
        if (count == 0) return;
        for (int side = 1; side < SIDE; side++) searches[count] = searches[count - 1];  // an even number: one again
        f32 local_farthest = farthest;
        for (int j = 0; j < count; j += SIDE) {
            Group group;
            const uint16_t * list[SIDE];
            int n_eights[SIDE];
            int32_t * found[SIDE];
            for (int side = 0; side < SIDE; side++) {
                const uint32_t search = static_cast<uint32_t>(searches[j + side]), at = search >> 24;
                const uint32_t first_weight = at % LANES * BLOCK + at / LANES * DIM;
                list[side] = grid.points + EIGHT * (search & 0xffff);
                n_eights[side] = static_cast<int>(search >> 16 & 0xff);
                found[side] = code + at;
                group.magnitude[side] = magnitude_rows + first_weight;
                group.root[side] = root_rows + first_weight;
                group.scale[side] = search_scale + at % LANES;
            }
            find_nearest<N, DIM>(group, list, n_eights, found, local_farthest);
        }
        farthest = local_farthest;
    }

    // ggml's sumqx and sumq2 for the levels in `codes`.
    struct Fit {
        f32 qx, q2;
    };
    Fit fit(const int32_t * codes) const {
        const f32 magnitudes = DIM == 8 ? first_half(eight_magnitudes()) : eight_magnitudes();
        Fit sum = {splat(0.0f), splat(0.0f)};
        for (int k = 0; k < GROUPS; k++) {
            i32 levels = load(codes + k * LANES);
            for (int i = 0; i < DIM; i++) {
                const f32 q = DIM == 8 ? pick_of_4(magnitudes, levels) : pick_of_8(magnitudes, levels);
                sum.qx = sum.qx + load_at(weighted, DIM * k + i) * q;
                sum.q2 = sum.q2 + load_at(weight, DIM * k + i) * q * q;
                levels = shift_right<BITS>(levels);
            }
        }
        return sum;
    }

    // One block of every lane, from x to result.
    void quantize_block(const BlockGroup & group, bool with_imatrix, f32 sigma2, int ib) {
        const float * xb = x + ib * BLOCK * LANES;
        int32_t * signs = result.signs + ib * Result<Type>::BYTES_OF_SIGNS * LANES;
        find_weights(group, with_imatrix, ib * BLOCK, xb, sigma2);
        take_signs(xb, signs);
        to_rows(magnitude, magnitude_rows);
        to_rows(root, root_rows);

        f32 largest = load_at(magnitude, 0);
        reach = splat(0.0f);
        for (int i = 0; i < BLOCK; i++) {
            const f32 m = load_at(magnitude, i);
            largest = maximum(largest, m);
            reach = maximum(reach, absolute(m));
            store(weighted + i * LANES, load_at(weight, i) * m);
        }
        mask live = Type::is_live(largest);
        f32 scale = largest / splat(static_cast<float>(LARGEST)), best = splat(0.0f);
        Type::prepare(magnitude, weight, scale, largest, live);

        int32_t * best_code = result.code + ib * CODES;
        for (int k = 0; k < GROUPS; k++) store(best_code + k * LANES, splat(Type::STARTS_OFF_GRID ? OFF_GRID : 0));
        mask wanted[GROUPS];
        for (int k = 0; k < GROUPS; k++) wanted[k] = live;
        for (int step = -Type::STEPS; step <= Type::STEPS; step++) {
            const f32 inverse = splat(LARGEST + static_cast<float>(step) * Type::STEP) / largest;
            round_to_levels(inverse, splat(1.0f) / inverse);
            put_on_grid(wanted);
            const Fit sum = fit(code);
            const mask better = (sum.q2 > splat(0.0f)) & (sum.qx * sum.qx > best * sum.q2);
            const f32 fitted = sum.qx / sum.q2;
            scale = select(better, fitted, scale);
            best = select(better, fitted * sum.qx, best);
            for (int k = 0; k < GROUPS; k++)
                store(best_code + k * LANES, select(better, load(code + k * LANES), load(best_code + k * LANES)));
        }
        scale = refine(scale, live, best_code);

        const mask negative = scale < splat(0.0f);
        for (int k = 0; k < Result<Type>::BYTES_OF_SIGNS; k++) {
            const i32 bits = load(signs + k * LANES);
            store(signs + k * LANES, select(negative, bits ^ splat(Type::EVEN_SIGNS ? 127 : 255), bits));
        }
        scale = select(negative, -scale, scale);
        failed = failed | (live & ~(scale >= splat(0.0f)));
        result.live[ib] = lanes_of(live);
        store(result.scale + ib * LANES, select(live, scale, splat(0.0f)));
    }

    // Once more, with the scale that the fit gave: blocks that have groups off the grid, or all (REFINES_ALL_BLOCKS),
    // and in them those groups, or all (REFINES_ALL_GROUPS).
    f32 refine(f32 scale, mask live, int32_t * best_code) {
        i32 flags = splat(Type::REFINES_ALL_BLOCKS ? OFF_GRID : 0);
        for (int k = 0; k < GROUPS; k++) flags = flags | load(best_code + k * LANES);
        const mask needed = live & (scale > splat(0.0f)) & off_grid(flags);
        if (!any(needed)) return scale;

        round_to_levels(splat(1.0f) / scale, scale);
        mask redo[GROUPS];
        for (int k = 0; k < GROUPS; k++)
            redo[k] = Type::REFINES_ALL_GROUPS ? needed : needed & off_grid(load(best_code + k * LANES));
        put_on_grid(redo);
        for (int k = 0; k < GROUPS; k++)
            store(best_code + k * LANES, select(redo[k], load(code + k * LANES), load(best_code + k * LANES)));
        const Fit sum = fit(best_code);
        return select(needed & (sum.q2 > splat(0.0f)), sum.qx / sum.q2, scale);
    }

    static mask off_grid(i32 code) { return (code & splat(OFF_GRID)) == splat(OFF_GRID); }

    explicit Quantizer(const Grid & the_grid) : grid(the_grid) {}

  public:
    static bool quantize(const Grid & grid, const float * matrix, uint8_t * y, int64_t n_rows, int64_t n_per_row,
                         const float * weights) {
        Quantizer work(grid);
        const int64_t per_row = n_per_row / SUPER_BLOCK, n_blocks = n_rows * per_row;
        for (int64_t first = 0; first < n_blocks; first += LANES) {
            const BlockGroup group(matrix, weights, first, n_blocks, per_row, SUPER_BLOCK);
            to_lanes(group.x, 0, SUPER_BLOCK, work.x);
            f32 sum = splat(0.0f);
            for (int i = 0; i < SUPER_BLOCK; i++) sum = sum + load_at(work.x, i) * load_at(work.x, i);
            const f32 sigma2 = splat(Type::SIGMA) * sum / splat(static_cast<float>(SUPER_BLOCK));
            for (int ib = 0; ib < Result<Type>::BLOCKS; ib++)
                work.quantize_block(group, weights != nullptr, sigma2, ib);
            if (any(work.failed | (work.farthest >= splat(FLT_MAX)))) return false;
            for (int l = 0; l < group.count; l++) Type::write(grid, work.result, l, y + (first + l) * Type::BYTES);
        }
        return true;
    }
};

}  // namespace
}  // namespace gemma::GEMMA_ISA
