// One product of two operands, and the panels that they are packed in.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "kernels.h"

namespace hk {

constexpr int64_t depth_block = 256;  // of a panel that stays in the nearest cache, in packed elements

// The offsets of n numbers that lie evenly apart.
inline std::vector<int64_t> steps(int64_t n, int64_t apart) {
    std::vector<int64_t> offsets(n);
    for (int64_t m = 0; m < n; ++m) offsets[m] = m * apart;
    return offsets;
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// How one side of a product is cut: into panels of nearly equal width, of rows or of whole vectors, for tall tiles or
// not.
struct Cut {
    int64_t n, unit, count, units, wider;  // panels: how many, of `units` each, and how many of them of one more

    Cut(const Kernels& kernels, int64_t n, bool lanes, bool tall = false) : n(n), unit(lanes ? kernels.lanes : 1) {
        int64_t all = ceil_div(n, unit), rows = kernels.rows * (tall ? kernels.vectors : 1);
        count = std::max<int64_t>(1, ceil_div(all, !lanes ? rows : tall ? 1 : kernels.vectors));
        units = all / count;
        wider = all % count;
    }
    int64_t padded() const { return start(count); }
    int64_t start(int64_t panel) const { return (units * panel + std::min(panel, wider)) * unit; }
};

// The blocks of the depth, in numbers.
inline int64_t block_depth(const Kernels& kernels) { return depth_block * kernels.depth; }

inline int64_t panel_bytes(const Kernels& kernels, int64_t width, int64_t depth) {
    return width * ceil_div(depth, kernels.depth) * kernels.packed_bytes;
}

// Block after block of the depth, panel after panel.
inline int64_t packed_bytes(const Kernels& kernels, int64_t n, int64_t depth, bool lanes) {
    return panel_bytes(kernels, Cut(kernels, n, lanes).padded(), depth);
}

void pack(const Kernels& kernels, const void* base, Storage storage, const Cut& cut, Side own, Side deep, int64_t limit,
          char* panels);

// Panels of an additive hidden layer from panels of its chunks, packed by `plain`; `deep` or else `own` are sums, the
// context's part along that side, and the other is null.
void form(const Kernels& kernels, const Kernels& plain, Activation activation, const char* chunks, const char* deep,
          const char* own, const Cut& cut, int64_t depth, char* panels);

// One side of a product: in panels; or with `offset`, where it lies, index n's number of depth d `offset[n] + d * pitch`
// elements from `data`. With `context`, a sum per depth, it is the chunks' part of what tall tiles form.
struct Operand {
    const char* data;
    Cut cut;
    int64_t pitch = 0;
    const int64_t* offset = nullptr;
    const char* context = nullptr;
    Activation activation = Activation::none;

    // Of `width` from `start`, whose panel lies at `panel`.
    Strip strip(const Kernels& kernels, const char* panel, int64_t start, int64_t width, int64_t depth) const;
};

// Whether the tiles can read an operand where it lies, index n's numbers from offset[n]: a panel's rows are evenly apart,
// or its vectors whole.
bool readable_in_place(const Cut& cut, const int64_t* offset);

// out[row_offset[m] + lane_offset[n]] (+)= sum_d rows[m, d] lanes[n, d]. `spill` holds one tile.
void multiply(const Kernels& kernels, const Operand& rows, const Operand& lanes, int64_t depth, char* out,
              const int64_t* row_offset, const int64_t* lane_offset, bool accumulate, char* spill);

}  // namespace hk
