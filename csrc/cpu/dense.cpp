#include "dense.h"

namespace hk {
namespace {

constexpr int64_t block_outputs = 512, block_rows = 128;

}  // namespace

Dense::Dense(const float* weight, int64_t outputs, int64_t inputs, const InstructionSet& set)
    : kernels_(*set.f32), outputs_(outputs), inputs_(inputs) {
    auto own = steps(block_outputs, inputs), deep = steps(inputs, 1);
    for (int64_t n = 0; n < outputs; n += block_outputs) {
        int64_t some = std::min(block_outputs, outputs - n);
        blocks_.emplace_back(packed_bytes(kernels_, some, inputs, true) + cache_line);
        pack(kernels_, weight + n * inputs, Storage::f32, {kernels_, some, true}, {some, own.data(), own.data()},
             {inputs, deep.data(), deep.data()}, 0, aligned(blocks_.back()));
    }
}

void Dense::run(const float* x, int64_t rows, float* y, int threads) const {
    auto own = steps(block_rows, inputs_), deep = steps(inputs_, 1), out = steps(block_rows, outputs_);
    auto lanes = steps(block_outputs, 1);
    int64_t outputs = blocks_.size(), items = ceil_div(rows, block_rows) * outputs;
#pragma omp parallel num_threads(threads)
    {
        std::vector<char> panels(packed_bytes(kernels_, std::min(rows, block_rows), inputs_, false) + cache_line);
        std::vector<char> spill(max_rows * max_vectors * kernels_.lanes * kernels_.sum_bytes + cache_line);
        int64_t packed = -1;
#pragma omp for schedule(static)
        for (int64_t item = 0; item < items; ++item) {
            int64_t row = item / outputs * block_rows, n = item % outputs * block_outputs;
            int64_t some = std::min(block_rows, rows - row);
            Cut row_cut(kernels_, some, false), lane_cut(kernels_, std::min(block_outputs, outputs_ - n), true);
            if (packed != row)
                pack(kernels_, x + row * inputs_, Storage::f32, row_cut, {some, own.data(), own.data()},
                     {inputs_, deep.data(), deep.data()}, 0, aligned(panels));
            packed = row;
            multiply(kernels_, {aligned(panels), row_cut}, {aligned(blocks_[item % outputs]), lane_cut}, inputs_,
                     reinterpret_cast<char*>(y + row * outputs_ + n), out.data(), lanes.data(), false, aligned(spill));
        }
    }
}

}  // namespace hk
