// A dense layer by the engine's own tiles: what a generated layer is measured against, so that the gain of the algebra is
// seen apart from that of the product.
#pragma once

#include <vector>

#include "step.h"

namespace hk {

// y[t, n] = sum_k x[t, k] weight[n, k], in fp32 and contiguous; the weight is packed once, when it is handed over.
class Dense {
  public:
    Dense(const float* weight, int64_t outputs, int64_t inputs, const InstructionSet& set);
    void run(const float* x, int64_t rows, float* y, int threads) const;

  private:
    template <class Bytes>
    static auto aligned(Bytes& bytes) {
        return bytes.data() + (-reinterpret_cast<uintptr_t>(bytes.data()) & (cache_line - 1));
    }

    const Kernels& kernels_;
    int64_t outputs_, inputs_;
    std::vector<std::vector<char>> blocks_;
};

}  // namespace hk
