#include "product.h"

namespace hk {

void pack(const Kernels& kernels, const void* base, Storage storage, Side own, Side deep, int64_t limit, bool lanes,
          char* panels) {
    Cut cut(kernels, own.n, lanes);
    auto run = kernels.pack[static_cast<int>(storage)];
    for (int64_t d = 0; d < deep.n; d += block_depth(kernels)) {
        int64_t depth = std::min(block_depth(kernels), deep.n - d);
        for (int64_t p = 0; p < cut.count; ++p) {
            int64_t start = cut.start(p), width = cut.start(p + 1) - start;
            Side part{std::min(width, own.n - start), own.offset + start, own.feature + start};
            run(base, part, {depth, deep.offset + d, deep.feature + d}, limit, width, panels);
            panels += panel_bytes(kernels, width, depth);
        }
    }
}

void form(const Kernels& kernels, const Kernels& plain, Activation activation, const char* chunks, const char* deep,
          const char* own, int64_t n, int64_t depth, bool lanes, char* panels) {
    Cut cut(kernels, n, lanes);
    // A block of pairs spans several of plain numbers, panel by panel: the chunks' panels are walked by their own blocks.
    for (int64_t d = 0; d < depth; d += block_depth(plain)) {
        int64_t some = std::min(block_depth(plain), depth - d);
        int64_t block = d / block_depth(kernels) * block_depth(kernels);  // of the panels, where these fall
        int64_t block_rest = std::min(block_depth(kernels), depth - block);
        char* to = panels + panel_bytes(kernels, cut.padded(), block);
        for (int64_t p = 0; p < cut.count; ++p) {
            int64_t start = cut.start(p), width = cut.start(p + 1) - start;
            kernels.form(activation, chunks, deep ? deep + d * plain.sum_bytes : nullptr,
                         own ? own + start * plain.sum_bytes : nullptr, some, width,
                         to + panel_bytes(kernels, width, d - block));
            chunks += panel_bytes(plain, width, some);
            to += panel_bytes(kernels, width, block_rest);
        }
    }
}

namespace {

template <class Sum>
void scatter(const char* tile_, int64_t rows, int64_t lanes, int64_t stride, char* out_, const int64_t* row_offset,
             const int64_t* lane_offset, bool accumulate) {
    auto tile = reinterpret_cast<const Sum*>(tile_);
    auto out = reinterpret_cast<Sum*>(out_);
    for (int64_t w = 0; w < rows; ++w) {
        Sum* to = out + row_offset[w];
        const Sum* from = tile + w * stride;
        if (accumulate)
            for (int64_t l = 0; l < lanes; ++l) to[lane_offset[l]] += from[l];
        else
            for (int64_t l = 0; l < lanes; ++l) to[lane_offset[l]] = from[l];
    }
}

}  // namespace

void multiply(const Kernels& kernels, const char* rows, int64_t M, const char* lanes, int64_t N, int64_t depth,
              char* out, const int64_t* row_offset, const int64_t* lane_offset, bool accumulate, char* spill) {
    Cut row_cut(kernels, M, false), lane_cut(kernels, N, true);
    auto put = kernels.sum_bytes == 4 ? scatter<float> : scatter<double>;
    for (int64_t d = 0; d < depth; d += block_depth(kernels)) {
        int64_t some = std::min(block_depth(kernels), depth - d), steps = ceil_div(some, kernels.depth);
        for (int64_t p = 0; p < lane_cut.count; ++p) {
            int64_t start = lane_cut.start(p), width = lane_cut.start(p + 1) - start;
            int64_t vectors = width / kernels.lanes, there = std::min(width, N - start), vector_offset[max_vectors];
            bool direct = there == width;
            for (int64_t v = 0; direct && v < vectors; ++v) {
                const int64_t* lane = lane_offset + start + v * kernels.lanes;
                vector_offset[v] = lane[0];
                for (int64_t l = 1; direct && l < kernels.lanes; ++l) direct = lane[l] == lane[0] + l;
            }
            int64_t spill_row[max_rows], spill_vector[max_vectors];
            for (int64_t w = 0; w < max_rows; ++w) spill_row[w] = w * width;
            for (int64_t v = 0; v < max_vectors; ++v) spill_vector[v] = v * kernels.lanes;
            const char* row_panel = rows;
            for (int64_t q = 0, row = 0; q < row_cut.count; ++q) {
                int64_t height = row_cut.start(q + 1) - row;
                auto tile = kernels.tile[height - 1][vectors - 1];
                if (direct) {
                    tile(steps, row_panel, lanes, out, row_offset + row, vector_offset, accumulate);
                } else {
                    tile(steps, row_panel, lanes, spill, spill_row, spill_vector, false);
                    put(spill, height, there, width, out, row_offset + row, lane_offset + start, accumulate);
                }
                row_panel += panel_bytes(kernels, height, some);
                row += height;
            }
            lanes += panel_bytes(kernels, width, some);
        }
        rows += panel_bytes(kernels, M, some);
        accumulate = true;
    }
}

}  // namespace hk
