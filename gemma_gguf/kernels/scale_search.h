// ggml's searches for the scale (and the minimum) of a block, one block per lane: what K-quants and legacy types share.
//
// Blocks come transposed by to_lanes: element i of the block in lane l is x[i * LANES + l]. ggml's functions return
// the level of every element; these return the multiplier (and offset) that the levels follow from, because storing
// levels at every improvement would cost more than the search: most types compute new ones afterwards anyway, and the
// others compute the old ones again, from the same operands and so with the same result.
//
// Sums run over the elements in ggml's order. A product that ggml forms anew at every step may be formed once, when it
// is the left-most one: `w*x[i]*l` is (w*x[i])*l in C. Levels are floats here: whole numbers below 2^24 are exact, and
// ggml converts them before every product.
#pragma once

#include "simd.h"

namespace gemma::GEMMA_ISA {
namespace {

#define PACKED __attribute__((packed))  // of ggml's blocks: the output may lie at any address

constexpr float GROUP_MAX_EPS = 1e-15f;

// nearest_int of ggml-quants.c as a float, for every operand. Below 2^22 the low 23 bits of a + 1.5 * 2^23 are the
// integer plus 2^22, and taking the constant off again would do. Above, and for Inf and NaN, ggml's integer is those
// bits of whatever the sum is; here they become the fraction of a float in [2^23, 2^24), so both agree on that too.
GEMMA_INLINE f32 nearest(f32 a) {
    const i32 low = bits_of(a + splat(ROUNDING)) & splat(0x007fffff);
    return float_from_bits(low | splat(0x4b000000)) - splat(ROUNDING);
}

// The same where |a| < 2^22 is certain.
GEMMA_INLINE f32 nearest_small(f32 a) { return (a + splat(ROUNDING)) - splat(ROUNDING); }

GEMMA_INLINE f32 clamp(f32 a, float lowest, float highest) {
    return minimum(maximum(a, splat(lowest)), splat(highest));
}

// Element i of a transposed block.
GEMMA_INLINE f32 element(const float * x, int i) { return load(x + i * LANES); }

// ---------------------------------------------------------------------------------------------------------------------
// make_qx_quants, rmse_type 1: x = scale * l, l in [-NMAX, NMAX - 1]

// `zero`: lanes where every |x| < GROUP_MAX_EPS. ggml says L[i] = 0 there, and L[i] = l + NMAX everywhere else.
struct SymmetricFit {
    f32 scale;
    f32 multiplier;  // l = clamp(nearest(multiplier * x)); 0 in lanes of `zero`
    mask zero;
};

// The sums of make_qx_quants for TRIES multipliers side by side: one chain of additions alone would leave the CPU idle.
template <int N, int NMAX, bool BOUNDED, int TRIES>
GEMMA_INLINE void symmetric_sums(const float * x, const f32 * w, const f32 * wx, const f32 * multiplier, f32 * sumlx,
                                 f32 * suml2) {
    for (int t = 0; t < TRIES; t++) sumlx[t] = suml2[t] = splat(0.0f);
#pragma GCC unroll 1  // unrolled, GCC would keep the constants in memory and run out of load ports
    for (int i = 0; i < N; i++) {
        for (int t = 0; t < TRIES; t++) {
            const f32 scaled = multiplier[t] * element(x, i);
            const f32 l = clamp(BOUNDED ? nearest_small(scaled) : nearest(scaled), -NMAX, NMAX - 1);
            sumlx[t] = sumlx[t] + wx[i] * l;
            suml2[t] = suml2[t] + w[i] * l * l;
        }
    }
}

// weights: nullptr for ggml's own, x * x.
// BOUNDED says that x is finite: then |multiplier * x| <= NMAX + 0.9 plus rounding, because the multiplier divides by
// the largest |x|, and nearest_small is right. (In a `zero` lane it may overflow; what it makes there is dropped.) The
// scales of sub-blocks, fitted in their turn, may be Inf or NaN.
template <int N, int NMAX, bool BOUNDED>
GEMMA_INLINE SymmetricFit make_qx_quants(const float * x, const float * weights) {
    f32 largest = splat(0.0f), at_largest = splat(0.0f);
    f32 w[N], wx[N];
    for (int i = 0; i < N; i++) {
        const f32 v = element(x, i);
        const mask larger = absolute(v) > largest;
        largest = select(larger, absolute(v), largest);
        at_largest = select(larger, v, at_largest);
        w[i] = weights ? element(weights, i) : v * v;
        wx[i] = w[i] * v;
    }
    f32 multiplier[9], sumlx[9], suml2[9];
    multiplier[0] = splat(-static_cast<float>(NMAX)) / at_largest;
    symmetric_sums<N, NMAX, BOUNDED, 1>(x, w, wx, multiplier, sumlx, suml2);
    SymmetricFit fit{select(suml2[0] != splat(0.0f), sumlx[0] / suml2[0], splat(0.0f)), multiplier[0],
                     largest < splat(GROUP_MAX_EPS)};
    f32 best = fit.scale * sumlx[0];
    // ggml's is = -9 ... -1, then 1 ... 9, nine at a time. Unrolled, so that the numerators are constants.
#pragma GCC unroll 2
    for (int first = -9; first <= 1; first += 10) {
        for (int t = 0; t < 9; t++) multiplier[t] = splat(-(NMAX + 0.1f * (first + t))) / at_largest;
        symmetric_sums<N, NMAX, BOUNDED, 9>(x, w, wx, multiplier, sumlx, suml2);
        for (int t = 0; t < 9; t++) {
            const mask better = (suml2[t] > splat(0.0f)) & (sumlx[t] * sumlx[t] > best * suml2[t]);
            const f32 scale = sumlx[t] / suml2[t];
            fit.scale = select(better, scale, fit.scale);
            fit.multiplier = select(better, multiplier[t], fit.multiplier);
            best = select(better, scale * sumlx[t], best);
        }
    }
    fit.scale = select(fit.zero, splat(0.0f), fit.scale);
    fit.multiplier = select(fit.zero, splat(0.0f), fit.multiplier);
    return fit;
}

// ---------------------------------------------------------------------------------------------------------------------
// make_qkx2_quants and make_qkx3_quants: x = scale * l + min, l in [0, NMAX], min <= 0

struct AffineFit {
    f32 scale;
    f32 min;                 // ggml's *the_min is -min
    f32 multiplier, offset;  // l = clamp(nearest(multiplier * (x - offset)))
};

// Parameters of the search: multipliers (first + delta * is + NMAX) / (max - min) for is = 0 ... last.
struct AffineSearch {
    float first, delta;
    int last;
    bool use_mad;  // absolute errors instead of squared ones
};

constexpr AffineSearch IMATRIX_SEARCH{-0.9f, 0.05f, 36, false};  // of every type, when there is an imatrix

// Levels of make_qkx*_quants for one multiplier and min, and the sums over them, of U blocks. BOUNDED says that the
// products are below 2^22, where nearest_small is right and 8 % of the whole search is saved.
template <int N, int NMAX, int U, bool BOUNDED>
GEMMA_INLINE void affine_levels(const float * x, const float * w, const f32 * multiplier, const f32 * min,
                                float * levels, f32 * suml, f32 * suml2, f32 * sumxl) {
    for (int u = 0; u < U; u++) suml[u] = suml2[u] = sumxl[u] = splat(0.0f);
#pragma GCC unroll 1
    for (int i = 0; i < N; i++) {
        for (int u = 0; u < U; u++) {
            const f32 v = element(x, u * N + i);
            const f32 scaled = multiplier[u] * (v - min[u]);
            const f32 l = clamp(BOUNDED ? nearest_small(scaled) : nearest(scaled), 0, NMAX);
            store(levels + (u * N + i) * LANES, l);
            const f32 wl = element(w, u * N + i) * l;
            suml[u] = suml[u] + wl;
            suml2[u] = suml2[u] + wl * l;
            sumxl[u] = sumxl[u] + wl * v;
        }
    }
}

// Weighted error of these levels with a scale and min.
template <int N, int U>
GEMMA_INLINE void affine_errors(const float * x, const float * w, const float * levels, const f32 * scale,
                                const f32 * min, bool use_mad, f32 * error) {
    for (int u = 0; u < U; u++) error[u] = splat(0.0f);
#pragma GCC unroll 1
    for (int i = 0; i < N; i++) {
        for (int u = 0; u < U; u++) {
            const f32 diff = scale[u] * element(levels, u * N + i) + min[u] - element(x, u * N + i);
            error[u] = error[u] + element(w, u * N + i) * (use_mad ? absolute(diff) : diff * diff);
        }
    }
}

// Fits U blocks of each lane, which follow each other in x and w. Side by side, because every try needs the min of the
// one before it: with one block the CPU would mostly wait.
template <int N, int NMAX, int U>
GEMMA_INLINE void make_qkx_quants(const float * x, const float * w, const AffineSearch & search, AffineFit * fits) {
    alignas(64) float levels[U * N * LANES];
    f32 sumw[U], sumx[U], lowest[U], highest[U], multiplier[U], min[U], best[U];
    f32 suml[U], suml2[U], sumxl[U], scale[U], error[U];
    mask flat[U];
    for (int u = 0; u < U; u++) {
        const float * xu = x + u * N * LANES;
        const float * wu = w + u * N * LANES;
        lowest[u] = highest[u] = element(xu, 0);
        sumw[u] = element(wu, 0);
        sumx[u] = sumw[u] * element(xu, 0);
        for (int i = 1; i < N; i++) {
            lowest[u] = minimum(element(xu, i), lowest[u]);
            highest[u] = maximum(element(xu, i), highest[u]);
            sumw[u] = sumw[u] + element(wu, i);
            sumx[u] = sumx[u] + element(wu, i) * element(xu, i);
        }
        lowest[u] = select(lowest[u] > splat(0.0f), splat(0.0f), lowest[u]);
        flat[u] = highest[u] <= lowest[u];
        multiplier[u] = splat(static_cast<float>(NMAX)) / (highest[u] - lowest[u]);
        fits[u] = {splat(1.0f) / multiplier[u], lowest[u], multiplier[u], lowest[u]};
        scale[u] = fits[u].scale;
        min[u] = fits[u].min;
    }
    affine_levels<N, NMAX, U, false>(x, w, multiplier, min, levels, suml, suml2, sumxl);
    affine_errors<N, U>(x, w, levels, scale, min, search.use_mad, best);

    for (int is = 0; is <= search.last; is++) {
        // The best min so far may be close to the highest x, which makes the multiplier huge. x - min and the product
        // are monotonous in x, so the two ends bound every product; a comparison with NaN says no.
        const f32 limit = splat(4e6f);
        bool bounded = true;
        for (int u = 0; u < U; u++) {
            min[u] = fits[u].min;
            multiplier[u] = splat(search.first + search.delta * is + NMAX) / (highest[u] - min[u]);
            bounded &= all(flat[u] | ((absolute(multiplier[u] * (lowest[u] - min[u])) < limit) &
                                      (absolute(multiplier[u] * (highest[u] - min[u])) < limit)));
        }
        if (bounded)
            affine_levels<N, NMAX, U, true>(x, w, multiplier, min, levels, suml, suml2, sumxl);
        else
            affine_levels<N, NMAX, U, false>(x, w, multiplier, min, levels, suml, suml2, sumxl);

        f32 this_min[U];
        mask solvable[U];
        for (int u = 0; u < U; u++) {
            const f32 D = sumw[u] * suml2[u] - suml[u] * suml[u];
            solvable[u] = D > splat(0.0f);
            scale[u] = (sumw[u] * sumxl[u] - sumx[u] * suml[u]) / D;
            this_min[u] = (suml2[u] * sumx[u] - suml[u] * sumxl[u]) / D;
            const mask positive = this_min[u] > splat(0.0f);
            this_min[u] = select(positive, splat(0.0f), this_min[u]);
            scale[u] = select(positive, sumxl[u] / suml2[u], scale[u]);
        }
        affine_errors<N, U>(x, w, levels, scale, this_min, search.use_mad, error);
        for (int u = 0; u < U; u++) {
            const mask better = solvable[u] & (error[u] < best[u]);
            best[u] = select(better, error[u], best[u]);
            fits[u].scale = select(better, scale[u], fits[u].scale);
            fits[u].min = select(better, this_min[u], fits[u].min);
            fits[u].multiplier = select(better, multiplier[u], fits[u].multiplier);
            fits[u].offset = select(better, min[u], fits[u].offset);
        }
    }
    for (int u = 0; u < U; u++) {  // ggml leaves before the search: all L[i] = 0, scale 0, the first min
        fits[u].scale = select(flat[u], splat(0.0f), fits[u].scale);
        fits[u].min = select(flat[u], lowest[u], fits[u].min);
        fits[u].multiplier = select(flat[u], splat(0.0f), fits[u].multiplier);
        fits[u].offset = select(flat[u], splat(0.0f), fits[u].offset);
    }
}

// ---------------------------------------------------------------------------------------------------------------------
// Around the searches

// w[i] = imatrix[i] * sqrt(sigma2 + x[i] * x[i]), in place, for n elements; returns their sum.
GEMMA_INLINE f32 imatrix_weights(const float * x, int n, f32 sigma2, float * w) {
    f32 sum = splat(0.0f);
    for (int i = 0; i < n; i++) {
        const f32 v = element(x, i), weight = element(w, i) * square_root(sigma2 + v * v);
        store(w + i * LANES, weight);
        sum = sum + weight;
    }
    return sum;
}

// ggml's L of the search, for n elements of one block that lie side by side in memory. multiplier 0 marks a block that
// ggml left with all L[i] = 0. (The fits say so; a search finds 0 only where max - min is Inf: there all are 0, too.)
GEMMA_INLINE void searched_levels(const float * x, int n, float multiplier, float offset, int lowest, int highest,
                                  int32_t * levels) {
    for (int i = 0; i < n; i += LANES) {
        const i32 l = nearest_int(splat(multiplier) * (load(x + i) - splat(offset)));
        const i32 level = maximum(splat(lowest), minimum(splat(highest), l)) - splat(lowest);
        store(levels + i, multiplier == 0.0f ? splat(0) : level);
    }
}

}  // namespace
}  // namespace gemma::GEMMA_ISA
