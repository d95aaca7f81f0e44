// Second moments of additive hidden layers over their chunks, context by context; the layers are formed in cache, a block
// of chunks at a time.
#pragma once

#include <vector>

#include "step.h"

namespace hk {

// h[g, c, :] = scale[c] * activation(context[g, :] + chunks[c, :]), all contiguous; scale may be null.
struct HiddenLayer {
    const char *context, *chunks, *scale;
};

// Where a layer's derivatives go: dcontext [threads, contexts, width], which is added to, and dchunks [chunks, width]; or
// nulls, where they are not wanted.
struct LayerSums {
    char *dcontext, *dchunks;
};

// Of u = h, or of two layers u = [h - h', h']: their differences, which lose no digits where the layers nearly agree.
class Moments {
  public:
    // Of a width of whole vectors, in fp32 or fp64.
    Moments(int64_t contexts, int64_t chunks, int64_t width, Activation activation, Storage storage, int threads,
            const InstructionSet& set);

    int64_t slices() const { return slices_; }
    int threads() const { return threads_; }
    // sums[g, s] = sum over the chunks c of slice s of u[g, c]^T u[g, c]; of two layers its upper three quarters.
    void run(const std::vector<HiddenLayer>& layers, char* sums) const;
    // Through du[g, c] = u[g, c] sides[g].
    void pull_back(const std::vector<HiddenLayer>& layers, const char* sides, const std::vector<LayerSums>& to) const;

  private:
    struct Room;
    template <class Work>
    void each(int64_t layers, int64_t items, Work work) const;
    int64_t row_bytes() const { return width_ * kernels_.sum_bytes; }
    double scale(const HiddenLayer& layer, int64_t chunk) const;
    void form(const std::vector<HiddenLayer>& layers, int64_t context, Range chunks, Room& room) const;
    void through(const char* sides, int64_t chunks, int64_t wanted, Room& room) const;
    void pull_back(const HiddenLayer& layer, int64_t n, int64_t context, Range chunks, Room& room, char* dcontext) const;

    int64_t contexts_, chunks_, width_, slices_;
    Activation activation_;
    Storage storage_;
    int threads_;
    const Kernels& kernels_;
};

}  // namespace hk
