// A step of a plan: form an intermediate from one pair of the form's factors, block by block, and let each output
// consume it with its partner. Every contraction of the engine, in every order, is such a step.
#pragma once

#include <omp.h>

#include <array>
#include <cstddef>
#include <cstdint>
#include <utility>
#include <vector>

#include "kernels.h"
#include "product.h"

namespace hk {

// The form's labels: a row (token) of x and y, the chunk (i, j), the width k, the row and column in a chunk (r, q).
enum Label { T, I, J, K, R, Q, label_count };
using Labels = unsigned;  // a set of them
constexpr Labels set(Label label) { return 1u << label; }
inline bool has(Labels labels, int label) { return labels >> label & 1; }

constexpr size_t cache_line = 64;
inline size_t aligned_up(size_t bytes) { return (bytes + cache_line - 1) / cache_line * cache_line; }

enum Slot { Y, HIDDEN, HEAD, X, FORMED };

struct Range {
    int64_t begin, end;
    int64_t size() const { return end - begin; }
    bool operator==(const Range& other) const { return begin == other.begin && end == other.end; }
};
using Ranges = std::array<Range, label_count>;
// Within a team, the work of each of so many threads: a team may be smaller than it was asked to be, and its members then
// do the work of several.
template <class Work>
inline void each_thread(int threads, Work work) {
    for (int n = omp_get_thread_num(); n < threads; n += omp_get_num_threads()) work(n);
}
inline Range share(int64_t n, int thread, int threads) { return {n * thread / threads, n * (thread + 1) / threads}; }

// Where a tensor's elements lie, in elements: `base + sum of (index - origin) * stride`; for x and y the rows go by
// `lead`, and `feature` counts along a row that ends at `limit` (0: whole chunks, nothing to crop).
struct Layout {
    char* base = nullptr;
    bool by_lead = false;
    std::array<int64_t, label_count> stride{}, origin{}, feature{};
    std::array<int64_t, 2> lead{};
    int64_t limit = 0;
};

// What the caller hands over: pointers and strides, in elements, in the order of the tensor's dimensions.
struct Tensor {
    char* data = nullptr;
    std::array<int64_t, 5> stride{};
};

// Which context each row of x and y uses. Rows come context by context: those of context g are `starts[g]` to
// `starts[g + 1]`, or `tokens` each where `starts` is null, and row n is token `n % tokens` of entry
// `entries[n / tokens]`, or of entry `n / tokens`.
struct Rows {
    int64_t count = 0, contexts = 1, tokens = 1;
    const int64_t *entries = nullptr, *starts = nullptr;

    int64_t start(int64_t g) const { return starts ? starts[g] : std::min(g * (count / contexts), count); }
    int64_t context_of(int64_t row) const {
        return starts ? std::upper_bound(starts, starts + contexts + 1, row) - starts - 1 : row / (count / contexts);
    }
    int64_t entry(int64_t row) const { return entries ? entries[row / tokens] : row / tokens; }
};

struct Shape {
    std::array<int64_t, label_count> extent{}, block{};  // of T: a block's rows
    int64_t out_features = 0, in_features = 0, contexts = 1, rows_per_context = 1;
    bool per_chunk_heads = false;
    Activation activation = Activation::none;
    Storage storage = Storage::f32;
    bool head_bias = false;  // of y: whether each chunk's weight has a bias on it, the same for all
};

struct Arguments {
    Tensor factors[4];  // by Slot; hidden is the context's part where chunks are given
    Tensor chunks;
    const char* head_bias = nullptr;  // [R, Q], contiguous, as x then is
    std::vector<Tensor> outputs;  // contiguous, by the step's outputs; chunks follow an additive hidden
    Rows rows;
    char* workspace = nullptr;
};

// out[m, n] += sum over `deep` of left * right, for each of `batch`.
struct Product {
    std::array<int, 2> slots{};
    int out = FORMED;
    Labels batch = 0, deep = 0;
    std::array<Labels, 2> own{};
    int lanes = 0;                      // which side's numbers lie in vectors
    bool turned = false;                // whether its sums lie with the chunks' index innermost, in whole vectors
    bool tall = false;                  // whether its tiles form each context's additive hidden layer, the lanes' side
    std::array<size_t, 2> bytes{};      // of the panels of a block
    std::array<int64_t, 2> prepared{};  // panels that are made once, before the blocks: how many, or 0
    std::array<size_t, 2> prepared_at{};
};

// A tensor that an output comes in: by slot, `chunks` the second of an additive hidden layer's. Threads sum into `planes`
// of their own (or one, where a sum is wider than an element), or with none into the output itself. What is summed over
// every context, one by one, is summed in fp64.
struct Output {
    int slot;
    bool chunks;
    bool is_private;
    int64_t count;  // elements
    int64_t planes;
    int64_t sum_bytes;
    size_t at;  // in the workspace
};

class Step {
  public:
    // `forms` and `outputs` are slots, at most one output has rows. `split` is the label that threads divide: T, or one
    // of the intermediate's. With `aligned`, no context's rows are divided. Packed operands that every block of rows
    // reads again are kept where they fit `prepare_bytes`.
    Step(const Shape& shape, std::array<int, 2> forms, const std::vector<int>& outputs, int split, bool aligned,
         int threads, size_t prepare_bytes, const InstructionSet& set);

    // What the blocks take, and with the sums that threads hold apart.
    size_t block_bytes() const;
    size_t workspace_bytes(const Rows& rows) const;
    double work(int64_t rows) const;
    int threads() const { return threads_; }
    void run(const Arguments& arguments) const;

  private:
    friend class Worker;

    Labels labels(int slot) const;
    Product product(int left, int right, int out) const;
    int64_t elements(Labels labels) const;
    int64_t extent(const Product& product, Labels labels) const;
    double cost(const Product& product, int side) const;
    bool per_context(const Product& product) const;
    bool turned(const Product& product, int side) const;
    bool may_place(const Product& product, int side) const;
    bool evenly(int slot, Labels some) const;
    bool in_place(const Product& product, int side) const;
    Ranges ranges_of_block(int64_t block) const;
    std::array<int64_t, label_count> counts(const Product& product, int side) const;
    size_t prepared_bytes(const Product& product, int side) const;
    Ranges ranges_of_prepared(const Product& product, int side, int64_t n) const;
    int64_t prepared_index(const Product& product, int side, const Ranges& ranges) const;
    // Whether the panels that are kept are of the chunks' part of hidden, which each context completes.
    bool is_chunks(int slot) const {
        return slot == HIDDEN && shape_.activation != Activation::none && shape_.contexts > 1;
    }
    std::vector<Output> outputs(const Rows& rows, size_t* end) const;
    // What the head's bias makes of the rows, and for each thread the sum of a row's chunks.
    size_t bias_bytes(int64_t rows) const {
        return (rows * shape_.extent[R] + threads_ * shape_.extent[Q]) * kernels_->sum_bytes;
    }

    Shape shape_;
    Labels formed_ = 0;
    std::vector<Product> products_;  // the first forms
    int split_, threads_;
    bool aligned_;
    std::vector<int> nest_;  // the intermediate's labels but T, outermost first
    std::array<int64_t, label_count> blocks_{};
    int64_t block_count_ = 1;
    const Kernels *kernels_, *plain_;
    size_t formed_bytes_ = 0, sums_bytes_ = 0, turned_bytes_ = 0, tile_bytes_ = 0, chunk_bytes_ = 0, line_bytes_ = 0;
    size_t thread_bytes_ = 0, prepared_bytes_ = 0;
};

}  // namespace hk
