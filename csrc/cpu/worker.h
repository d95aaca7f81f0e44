// How one thread runs its share of a step: operands.cpp finds or packs what it reads, worker.cpp multiplies, outputs.cpp
// keeps and stores the sums.
#pragma once

#include "step.h"

namespace hk {

// The offsets of one side of a product; their memory is kept from product to product.
struct Offsets {
    std::vector<int64_t> offset, feature;
    Side side() const { return {static_cast<int64_t>(offset.size()), offset.data(), feature.data()}; }
};

// A tensor of the labels' ranges, contiguous, in the labels' order; but `last` is innermost.
Layout contiguous(Labels labels, const Ranges& ranges, char* base, int last = label_count);

// How many combinations of the labels' indices there are, and the distance from one's element to the next's.
int64_t count(Labels labels, const Ranges& ranges);
int64_t pitch(const Layout& layout, Labels labels, const Ranges& ranges);

class Worker {
  public:
    // `of_bias`: room for what the head's bias makes of the rows, if it has one.
    Worker(const Step& step, const Arguments& arguments, const std::vector<Output>& outputs, char* workspace, char* of_bias,
           int thread);

    void prepare();
    void apply_bias() const;
    void run(Range rows, Range blocks);
    void clear_outputs() const;
    void finish_outputs() const;

  private:
    const Kernels& kernels() const { return *step_.kernels_; }
    const Shape& shape() const { return step_.shape_; }
    bool additive() const { return shape().activation != Activation::none; }

    Layout layout(int slot, const Tensor& tensor, bool chunks) const;
    Layout output_layout(const Output& output) const;
    size_t output_of(int slot, bool chunks = false) const;
    void enumerate(const Layout& layout, Labels labels, const Ranges& ranges, Offsets& offsets) const;
    void pack_panels(const Product& product, int side, const Ranges& ranges, int64_t context, bool plain, char* to);
    void form_panels(const Product& product, int side, const Ranges& ranges, int64_t context, const char* chunks,
                     char* to);
    void make_panels(const Product& product, int side, const Ranges& ranges, int64_t context, char* to);
    const char* panels(const Product& product, int side, const Ranges& ranges, int64_t context);
    bool place(const Product& product, int side, const Ranges& ranges, int64_t context, Operand& operand);
    Operand operand(const Product& product, int side, const Ranges& ranges, int64_t context);
    const char* context_line(Labels along, const Ranges& ranges, int64_t context, int64_t padded);
    void multiply(const Product& product, const Ranges& ranges, int64_t context);
    void multiply_by_context(const Product& product, Ranges ranges);
    void pull_back(const Ranges& ranges, int64_t context);
    template <class Sum>
    void begin_at_bias() const;
    void begin_sums(const Product& product, const Ranges& ranges);
    void end_sums();

    struct Kept {  // what a product's panels were made of
        Ranges ranges;
        int64_t context = -1;
    };

    const Step& step_;
    const Arguments& arguments_;
    const std::vector<Output>& outputs_;
    char *workspace_, *of_bias_;
    int thread_;
    Layout factors_[4], chunks_, formed_, sums_, tile_;
    std::vector<Layout> output_layouts_;
    std::vector<std::array<Kept, 2>> kept_;
    std::vector<std::array<char*, 2>> buffers_;
    char *formed_base_, *sums_base_, *turned_base_, *tile_base_, *chunk_base_, *line_, *spill_;
    const Product* summing_ = nullptr;
    Ranges summed_{};
    Offsets own_, deep_, left_, right_;
    std::array<Offsets, 2> placed_;
};

}  // namespace hk
