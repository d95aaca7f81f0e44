#include "product.h"

namespace hk {

void pack(const Kernels& kernels, const void* base, Storage storage, const Cut& cut, Side own, Side deep, int64_t limit,
          char* panels) {
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
          const char* own, const Cut& cut, int64_t depth, char* panels) {
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

Strip Operand::strip(const Kernels& kernels, const char* panel, int64_t start, int64_t width, int64_t depth) const {
    const char* from = context ? context + depth * kernels.sum_bytes : nullptr;
    if (!offset) return {panel, width, cut.unit, from};
    int64_t apart = width > cut.unit ? offset[start + cut.unit] - offset[start] : 0;
    return {data + (offset[start] + depth * pitch) * kernels.packed_bytes, pitch, apart, from};
}

bool readable_in_place(const Cut& cut, const int64_t* offset) {
    if (cut.padded() != cut.n) return false;
    bool rows = cut.unit == 1;
    for (int64_t p = 0; p < cut.count; ++p) {
        int64_t start = cut.start(p), apart = rows && start + 1 < cut.n ? offset[start + 1] - offset[start] : 1;
        for (int64_t n = start + 1; n < cut.start(p + 1); ++n)
            if (offset[n] != offset[n - 1] + apart && (rows || n % cut.unit)) return false;
    }
    return true;
}

void multiply(const Kernels& kernels, const Operand& rows, const Operand& lanes, int64_t depth, char* out,
              const int64_t* row_offset, const int64_t* lane_offset, bool accumulate, char* spill) {
    const Cut &row_cut = rows.cut, &lane_cut = lanes.cut;
    auto put = kernels.sum_bytes == 4 ? scatter<float> : scatter<double>;
    const char *row_panels = rows.data, *lane_panel = lanes.data;
    for (int64_t d = 0; d < depth; d += block_depth(kernels)) {
        int64_t some = std::min(block_depth(kernels), depth - d), steps = ceil_div(some, kernels.depth);
        int64_t step_bytes = steps * kernels.packed_bytes;  // of a panel, per row or lane
        for (int64_t p = 0; p < lane_cut.count; ++p) {
            int64_t start = lane_cut.start(p), width = lane_cut.start(p + 1) - start;
            int64_t vectors = width / kernels.lanes, there = std::min(width, lane_cut.n - start);
            int64_t vector_offset[max_vectors];
            bool direct = there == width;
            for (int64_t v = 0; direct && v < vectors; ++v) {
                const int64_t* lane = lane_offset + start + v * kernels.lanes;
                vector_offset[v] = lane[0];
                for (int64_t l = 1; direct && l < kernels.lanes; ++l) direct = lane[l] == lane[0] + l;
            }
            int64_t spill_row[max_rows * max_vectors], spill_vector[max_vectors];
            for (int64_t w = 0; !direct && w < max_rows * max_vectors; ++w) spill_row[w] = w * width;
            for (int64_t v = 0; !direct && v < max_vectors; ++v) spill_vector[v] = v * kernels.lanes;
            Strip lane_strip = lanes.strip(kernels, lane_panel, start, width, d);
            const char* row_panel = row_panels;
            for (int64_t q = 0, row = 0; q < row_cut.count; ++q) {
                int64_t height = row_cut.start(q + 1) - row;
                auto tile = lanes.context ? kernels.tall[static_cast<int>(lanes.activation)][height - 1]
                                          : kernels.tile[height - 1][vectors - 1];
                Strip row_strip = rows.strip(kernels, row_panel, row, height, d);
                if (direct) {
                    tile(steps, row_strip, lane_strip, out, row_offset + row, vector_offset, accumulate);
                } else {
                    tile(steps, row_strip, lane_strip, spill, spill_row, spill_vector, false);
                    put(spill, height, there, width, out, row_offset + row, lane_offset + start, accumulate);
                }
                row_panel += height * step_bytes;
                row += height;
            }
            lane_panel += width * step_bytes;
        }
        row_panels += row_cut.n * step_bytes;
        accumulate = true;
    }
}

}  // namespace hk
