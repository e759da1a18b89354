// The point sets ("grids") of the IQ2 and IQ3 types, and for every point off a grid the grid points that ggml
// considers.
//
// A group of 8 weights (IQ2: levels 0..2) or 4 weights (IQ3: levels 0..7) is stored as the number of a grid point, and
// only a few hundred of the 3^8 or 8^4 combinations of levels are on the grid. Everywhere in these files a combination
// is a *code*: the level of weight i in bits BITS * i and up, 2 bits each for IQ2, 3 bits for IQ3. A level l stands
// for the magnitude 2 l + 1.
#pragma once

#include <cstdint>

namespace gemma {

// Candidates are stored and searched in eights.
constexpr int EIGHT = 8;

// The candidates of one code, in ggml's order: by distance, then by grid index. Their codes are `points[EIGHT * at]`
// and on, n_all eights filled up with repetitions of the last one. Where leaving out dominated candidates (see
// iq_tables.cpp) saves an eight or more, n_short < n_all, and the n_short eights of the short list come first, followed
// by the n_all of the full one. A code on the grid has no candidates. The kernels gather these as 32-bit words.
struct Candidates {
    uint16_t at;
    uint8_t n_short, n_all;
};
static_assert(sizeof(Candidates) == sizeof(int32_t), "gathered as words");

struct Grid {
    const int16_t * index;          // by code: number of the point in the file format, -1 off the grid
    const Candidates * candidates;  // by code
    const uint16_t * points;        // codes of grid points, what Candidates refers to
};

enum class GridName { iq2_xxs, iq2_xs, iq2_s, iq3_xxs, iq3_s };

// Builds the tables of one type: some milliseconds, against one CPU-second or more in ggml_quantize_init. Callers keep
// the result for the life of the process, in a function-local static.
const Grid * build_grid(GridName name);

}  // namespace gemma
