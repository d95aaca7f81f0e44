// How one thread runs its share of a step.
#include <omp.h>
#include <string.h>

#include "step.h"

namespace hk {
namespace {

// Side by side in memory, with the storage kept from call to call.
struct Offsets {
    std::vector<int64_t> offset, feature;
    Side side() const { return {static_cast<int64_t>(offset.size()), offset.data(), feature.data()}; }
};

Layout contiguous(Labels labels, const Ranges& ranges, char* base) {
    Layout layout;
    layout.base = base;
    int64_t stride = 1;
    for (int l = label_count; l-- > 0;) {
        if (!has(labels, l)) continue;
        layout.stride[l] = stride;
        layout.origin[l] = ranges[l].begin;
        stride *= ranges[l].size();
    }
    return layout;
}

Range share(int64_t n, int thread, int threads) { return {n * thread / threads, n * (thread + 1) / threads}; }

}  // namespace

class Worker {
  public:
    Worker(const Step& step, const Arguments& arguments, const std::vector<Output>& outputs, char* workspace, int thread);

    void prepare();
    void run(Range rows, Range blocks);
    void clear_outputs() const;
    void finish_outputs() const;

  private:
    const Kernels& kernels() const { return *step_.kernels_; }
    const Shape& shape() const { return step_.shape_; }
    bool additive() const { return shape().activation != Activation::none; }

    Layout layout(int slot, const Tensor& tensor, bool chunks) const;
    Layout output_layout(const Output& output) const;
    void enumerate(const Layout& layout, Labels labels, const Ranges& ranges, Offsets& offsets) const;
    void pack_panels(const Product& product, int side, const Ranges& ranges, int64_t context, bool plain, char* to);
    void form_panels(const Product& product, int side, const Ranges& ranges, int64_t context, const char* chunks,
                     char* to);
    void make_panels(const Product& product, int side, const Ranges& ranges, int64_t context, char* to);
    const char* panels(const Product& product, int side, const Ranges& ranges, int64_t context);
    void multiply(const Product& product, const Ranges& ranges, int64_t context);
    void multiply_by_context(const Product& product, Ranges ranges);
    void pull_back(const Ranges& ranges, int64_t context);
    void begin_sums(const Product& product, const Ranges& ranges);
    void end_sums();

    struct Kept {  // what a product's panels were made of
        Ranges ranges;
        int64_t context = -1;
    };

    const Step& step_;
    const Arguments& arguments_;
    const std::vector<Output>& outputs_;
    char* workspace_;
    int thread_;
    Layout factors_[4], chunks_, formed_, sums_, tile_;
    std::vector<Layout> output_layouts_;
    std::vector<std::array<Kept, 2>> kept_;
    std::vector<std::array<char*, 2>> buffers_;
    char *formed_base_, *sums_base_, *tile_base_, *chunk_base_, *line_, *spill_;
    const Product* summing_ = nullptr;
    Ranges summed_{};
    Offsets own_, deep_, left_, right_;
};

Worker::Worker(const Step& step, const Arguments& arguments, const std::vector<Output>& outputs, char* workspace,
               int thread)
    : step_(step), arguments_(arguments), outputs_(outputs), workspace_(workspace), thread_(thread),
      kept_(step.products_.size()), buffers_(step.products_.size()) {
    char* at = workspace + aligned_up(step.prepared_bytes_) + thread * step.thread_bytes_;
    auto take = [&](size_t bytes) { return std::exchange(at, at + bytes); };
    formed_base_ = take(step.formed_bytes_);
    sums_base_ = take(step.sums_bytes_);
    tile_base_ = take(step.tile_bytes_);
    chunk_base_ = take(step.chunk_bytes_);
    line_ = take(step.line_bytes_);
    for (size_t n = 0; n < buffers_.size(); ++n)
        for (int side : {0, 1}) buffers_[n][side] = take(step.products_[n].bytes[side]);
    spill_ = at;
    for (int slot = 0; slot < FORMED; ++slot) factors_[slot] = layout(slot, arguments.factors[slot], false);
    chunks_ = layout(HIDDEN, arguments.chunks, true);
    for (const Output& output : outputs) output_layouts_.push_back(output_layout(output));
}

Layout Worker::layout(int slot, const Tensor& tensor, bool chunks) const {
    const Shape& s = shape();
    Layout layout;
    layout.base = tensor.data;
    auto& stride = tensor.stride;
    if (slot == Y || slot == X) {
        int outer = slot == Y ? I : J, inner = slot == Y ? R : Q;
        layout.by_lead = true;
        layout.lead = {stride[0], stride[1]};
        layout.stride[inner] = stride[2];
        layout.stride[outer] = stride[2] * s.extent[inner];
        layout.feature[inner] = 1;
        layout.feature[outer] = s.extent[inner];
        int64_t features = slot == Y ? s.out_features : s.in_features;
        layout.limit = features < s.extent[outer] * s.extent[inner] ? features : 0;
    } else if (slot == HEAD) {
        int first = s.per_chunk_heads;
        if (first) {
            layout.stride[J] = stride[0];
            layout.stride[I] = stride[0] * s.extent[J];
        }
        for (int n = 0; n < 3; ++n) layout.stride[K + n] = stride[first + n];
    } else if (chunks) {
        for (int n = 0; n < 3; ++n) layout.stride[I + n] = stride[n];
    } else {
        layout.lead[0] = stride[0];  // of contexts
        if (additive()) layout.stride[K] = stride[1];
        else
            for (int n = 0; n < 3; ++n) layout.stride[I + n] = stride[1 + n];
    }
    return layout;
}

// Of the sums that make the output: all of it, contiguous.
Layout Worker::output_layout(const Output& output) const {
    Labels labels = step_.labels(output.slot);
    bool context = output.slot == HIDDEN && !output.chunks;
    if (context && additive()) labels = set(K);
    Ranges all;
    for (int l = 0; l < label_count; ++l) all[l] = {0, shape().extent[l]};
    if (has(labels, T)) labels = 0;
    Layout layout = contiguous(labels, all, workspace_ + output.at);
    if (!output.planes) layout.base = arguments_.outputs[&output - outputs_.data()].data;
    else if (output.is_private) layout.base += thread_ * output.count * output.sum_bytes;
    if (context) layout.lead[0] = output.count / shape().contexts;
    return layout;
}

// The offsets of every combination of the labels' indices, the last label's fastest.
void Worker::enumerate(const Layout& layout, Labels labels, const Ranges& ranges, Offsets& offsets) const {
    auto& offset = offsets.offset;
    auto& feature = offsets.feature;
    size_t count = 1;
    for (int l = 0; l < label_count; ++l)
        if (has(labels, l)) count *= ranges[l].size();
    offset.resize(count);
    feature.resize(count);
    offset[0] = feature[0] = 0;
    size_t filled = 1;
    for (int l = 0; l < label_count; ++l) {
        if (!has(labels, l)) continue;
        size_t n = ranges[l].size();
        int64_t stride = layout.stride[l], step = layout.feature[l];
        for (size_t old = filled; old-- > 0;) {  // from the back: each entry becomes n, in place
            int64_t* to = offset.data() + old * n;
            int64_t start = offset[old] + (ranges[l].begin - layout.origin[l]) * stride;
            if (l == T && layout.by_lead) {
                const Rows& rows = arguments_.rows;
                for (size_t m = n; m-- > 0;) {
                    int64_t row = ranges[l].begin + m;
                    to[m] = start + rows.entry(row) * layout.lead[0] + row % rows.tokens * layout.lead[1];
                }
            } else {
                for (size_t m = 0; m < n; ++m, start += stride) to[m] = start;
            }
            int64_t number = feature[old] + ranges[l].begin * step;
            for (size_t m = 0; layout.limit && m < n; ++m, number += step) feature[old * n + m] = number;
        }
        filled *= n;
    }
}

void Worker::pack_panels(const Product& product, int side, const Ranges& ranges, int64_t context, bool plain,
                         char* to) {
    int slot = product.slots[side];
    const Layout& layout = slot == FORMED ? formed_ : slot == HIDDEN && additive() ? chunks_ : factors_[slot];
    const Kernels& k = plain ? *step_.plain_ : kernels();
    Storage storage = slot != FORMED ? shape().storage : k.sum_bytes == 8 ? Storage::f64 : Storage::f32;
    int64_t itemsize = bytes_of(storage);
    // Batch labels stand at one index: they only move the base.
    enumerate(layout, product.batch & step_.labels(slot), ranges, own_);
    int64_t start = own_.offset[0] + (slot == HIDDEN && !additive() ? context * layout.lead[0] : 0);
    int64_t limit = layout.limit ? layout.limit - own_.feature[0] : 0;
    enumerate(layout, product.own[side], ranges, own_);
    enumerate(layout, product.deep, ranges, deep_);
    if (limit && own_.feature.back() + deep_.feature.back() < limit) limit = 0;  // the block has no crop
    pack(k, layout.base + start * itemsize, storage, own_.side(), deep_.side(), limit, product.lanes == side, to);
}

void Worker::form_panels(const Product& product, int side, const Ranges& ranges, int64_t context, const char* chunks,
                         char* to) {
    const Kernels& plain = *step_.plain_;
    const Layout& layout = factors_[HIDDEN];
    int64_t itemsize = bytes_of(shape().storage);
    auto run = plain.pack[static_cast<int>(shape().storage)];
    // The context's part varies along the label k, which lies on one side of the product.
    bool by_own = has(product.own[side], K), lanes = product.lanes == side;
    enumerate(layout, product.own[side], ranges, own_);
    enumerate(layout, product.deep, ranges, deep_);
    Side one = (by_own ? own_ : deep_).side();
    int64_t padded = by_own ? Cut(plain, one.n, lanes).padded() : one.n, zero = 0;
    run(layout.base + context * layout.lead[0] * itemsize, one, {1, &zero, &zero}, 0, padded, line_);
    form(kernels(), plain, shape().activation, chunks, by_own ? nullptr : line_, by_own ? line_ : nullptr,
         own_.side().n, deep_.side().n, lanes, to);
}

void Worker::make_panels(const Product& product, int side, const Ranges& ranges, int64_t context, char* to) {
    if (product.slots[side] != HIDDEN || !additive()) return pack_panels(product, side, ranges, context, false, to);
    pack_panels(product, side, ranges, 0, true, chunk_base_);
    form_panels(product, side, ranges, context, chunk_base_, to);
}

void Worker::prepare() {
    for (const Product& p : step_.products_) {
        for (int side : {0, 1}) {
            Range mine = share(p.prepared[side], thread_, step_.threads_);
            size_t bytes = step_.prepared_bytes(p, side);
            for (int64_t n = mine.begin; n < mine.end; ++n) {
                Ranges ranges = step_.ranges_of_prepared(p, side, n);
                char* to = workspace_ + p.prepared_at[side] + n * bytes;
                if (step_.is_chunks(p.slots[side])) pack_panels(p, side, ranges, 0, true, to);
                else make_panels(p, side, ranges, 0, to);
            }
        }
    }
}

const char* Worker::panels(const Product& product, int side, const Ranges& ranges, int64_t context) {
    size_t index = &product - step_.products_.data();
    int slot = product.slots[side];
    const char* ready = nullptr;
    if (product.prepared[side])
        ready = workspace_ + product.prepared_at[side] +
                step_.prepared_index(product, side, ranges) * step_.prepared_bytes(product, side);
    if (ready && !step_.is_chunks(slot)) return ready;
    Kept want{ranges, slot == HIDDEN ? context : 0};
    for (int l = 0; l < label_count; ++l)
        if (!has(step_.labels(slot), l)) want.ranges[l] = {0, 0};
    Kept& kept = kept_[index][side];
    char* to = buffers_[index][side];
    if (slot != FORMED && kept.context == want.context && kept.ranges == want.ranges) return to;
    kept = want;
    if (ready) form_panels(product, side, ranges, context, ready, to);
    else make_panels(product, side, ranges, context, to);
    return to;
}

void Worker::multiply(const Product& product, const Ranges& block, int64_t context) {
    bool tile = product.out == HIDDEN && additive();
    Layout out;
    if (product.out == FORMED) out = formed_;
    else if (has(step_.labels(product.out), T)) out = sums_;
    else if (tile) out = tile_ = contiguous(step_.labels(HIDDEN), block, tile_base_);
    else {
        for (size_t n = 0; n < outputs_.size(); ++n)
            if (outputs_[n].slot == product.out) out = output_layouts_[n];
        if (product.out == HIDDEN) out.base += context * out.lead[0] * kernels().sum_bytes;
    }
    Ranges ranges = block;
    int64_t combinations = 1;
    for (int l = 0; l < label_count; ++l)
        if (has(product.batch, l)) combinations *= block[l].size();
    for (int64_t n = 0; n < combinations; ++n) {
        int64_t rest = n;
        for (int l = label_count; l-- > 0;) {
            if (!has(product.batch, l)) continue;
            int64_t index = block[l].begin + rest % block[l].size();
            ranges[l] = {index, index + 1};
            rest /= block[l].size();
        }
        const char* operands[] = {panels(product, 0, ranges, context), panels(product, 1, ranges, context)};
        enumerate(out, product.batch, ranges, left_);
        char* base = out.base + left_.offset[0] * kernels().sum_bytes;
        enumerate(out, product.own[0], ranges, left_);
        enumerate(out, product.own[1], ranges, right_);
        const Offsets* sides[] = {&left_, &right_};
        int64_t depth = 1;
        for (int l = 0; l < label_count; ++l)
            if (has(product.deep, l)) depth *= ranges[l].size();
        int lanes = product.lanes, rows = 1 - lanes;
        hk::multiply(kernels(), operands[rows], sides[rows]->side().n, operands[lanes], sides[lanes]->side().n, depth,
                     base, sides[rows]->offset.data(), sides[lanes]->offset.data(), product.out != FORMED && !tile,
                     spill_);
    }
    if (tile) pull_back(block, context);
}

void Worker::multiply_by_context(const Product& product, Ranges ranges) {
    const Rows& rows = arguments_.rows;
    Range all = ranges[T];
    if (!step_.per_context(product) || shape().contexts == 1) return multiply(product, ranges, 0);
    for (int64_t row = all.begin, g = rows.context_of(row); row < all.end; ++g) {
        int64_t stop = std::min(all.end, rows.start(g + 1));
        if (stop == row) continue;  // a context of no rows
        ranges[T] = {row, stop};
        multiply(product, ranges, g);
        row = stop;
    }
}

// The activation's derivative, and with it the sums over contexts and over chunks.
void Worker::pull_back(const Ranges& ranges, int64_t context) {
    const Layout *dcontext = nullptr, *dchunks = nullptr;
    for (size_t n = 0; n < outputs_.size(); ++n)
        if (outputs_[n].slot == HIDDEN) (outputs_[n].chunks ? dchunks : dcontext) = &output_layouts_[n];
    int64_t itemsize = bytes_of(shape().storage);
    int64_t sum = kernels().sum_bytes, k = ranges[K].begin, depth = ranges[K].size();
    auto run = kernels().pull_back[static_cast<int>(shape().storage)];
    const char* tile = tile_.base;
    for (int64_t i = ranges[I].begin; i < ranges[I].end; ++i) {
        memset(line_, 0, depth * sum);  // summed by rows of chunks first: a long sum in fp32 loses digits
        for (int64_t j = ranges[J].begin; j < ranges[J].end; ++j, tile += depth * sum)
            run(shape().activation, tile,
                chunks_.base + (i * chunks_.stride[I] + j * chunks_.stride[J] + k) * itemsize,
                factors_[HIDDEN].base + (context * factors_[HIDDEN].lead[0] + k) * itemsize, depth,
                dchunks->base + (i * dchunks->stride[I] + j * dchunks->stride[J] + k) * sizeof(double), line_);
        kernels().add[0](line_, depth, dcontext->base + (context * dcontext->lead[0] + k) * sum);
    }
}

// The rows of y or dx that a block adds to are summed in the workspace, and stored when the blocks move on.
void Worker::begin_sums(const Product& product, const Ranges& ranges) {
    Ranges own = ranges;
    Labels labels = step_.labels(product.out);
    size_t bytes = kernels().sum_bytes;
    for (int l = 0; l < label_count; ++l) {
        if (has(labels, l)) bytes *= own[l].size();
        else own[l] = {0, 0};
    }
    if (summing_ && own == summed_) return;
    end_sums();
    summing_ = &product;
    summed_ = own;
    sums_ = contiguous(labels, own, sums_base_);
    memset(sums_base_, 0, bytes);
}

void Worker::end_sums() {
    if (!summing_) return;
    size_t n = 0;
    while (outputs_[n].slot != summing_->out) ++n;
    const Rows& rows = arguments_.rows;
    int outer = summing_->out == Y ? I : J, inner = summing_->out == Y ? R : Q;
    int64_t size = shape().extent[inner], features = summing_->out == Y ? shape().out_features : shape().in_features;
    int64_t sum = kernels().sum_bytes, item = bytes_of(shape().storage);
    int64_t repeats = summed_[outer].size(), run = summed_[inner].size();
    if (run == size) run *= std::exchange(repeats, 1);  // whole chunks lie side by side
    const char* from = sums_base_;
    for (int64_t row = summed_[T].begin; row < summed_[T].end; ++row) {
        int64_t start = (rows.entry(row) * rows.tokens + row % rows.tokens) * features;
        for (int64_t o = 0; o < repeats; ++o, from += run * sum) {
            int64_t feature = (summed_[outer].begin + o) * size + summed_[inner].begin;
            int64_t length = std::min(run, features - feature);
            if (length <= 0) continue;
            char* to = output_layouts_[n].base;
            if (outputs_[n].is_private) kernels().add[0](from, length, to + (start + feature) * sum);
            else kernels().store[0][static_cast<int>(shape().storage)](from, length, to + (start + feature) * item);
        }
    }
    summing_ = nullptr;
}

void Worker::run(Range rows, Range blocks) {
    bool by_rows = has(step_.formed_, T);
    for (int64_t row = rows.begin, stop; row < rows.end; row = stop) {
        stop = std::min(row + shape().block[T], rows.end);
        if (!by_rows) stop = std::min(stop, arguments_.rows.start(arguments_.rows.context_of(row) + 1));
        for (int64_t block = blocks.begin; block < blocks.end; ++block) {
            Ranges ranges = step_.ranges_of_block(block);
            ranges[T] = {row, stop};
            formed_ = contiguous(step_.formed_, ranges, formed_base_);
            for (const Product& product : step_.products_) {
                if (product.out != FORMED && has(step_.labels(product.out), T)) begin_sums(product, ranges);
                multiply_by_context(product, ranges);
            }
        }
        end_sums();
    }
}

void Worker::clear_outputs() const {
    for (size_t n = 0; n < outputs_.size(); ++n) {
        const Output& output = outputs_[n];
        if (!output.planes && has(step_.labels(output.slot), T)) continue;  // every row is stored
        Range mine = share(output.count, thread_, step_.threads_);
        if (output.is_private) mine = {0, output.count};
        memset(output_layouts_[n].base + mine.begin * output.sum_bytes, 0, mine.size() * output.sum_bytes);
    }
}

// The threads' sums are added in the threads' order, so that the same bits come back from run to run.
void Worker::finish_outputs() const {
    for (size_t n = 0; n < outputs_.size(); ++n) {
        const Output& output = outputs_[n];
        if (!output.planes) continue;
        Range mine = share(output.count, thread_, step_.threads_);
        bool wide = output.sum_bytes != kernels().sum_bytes;
        char* total = workspace_ + output.at + mine.begin * output.sum_bytes;
        for (int64_t plane = 1; plane < output.planes; ++plane)
            kernels().add[wide](total + plane * output.count * output.sum_bytes, mine.size(), total);
        kernels().store[wide][static_cast<int>(shape().storage)](
            total, mine.size(), arguments_.outputs[n].data + mine.begin * bytes_of(shape().storage));
    }
}

void Step::run(const Arguments& arguments) const {
    size_t end;
    std::vector<Output> outputs = this->outputs(arguments.rows, &end);
    char* workspace = arguments.workspace + (-reinterpret_cast<uintptr_t>(arguments.workspace) & 63);
    const Rows& rows = arguments.rows;
    auto share_of = [&](int thread) {
        std::array<Range, 2> mine{Range{0, rows.count}, Range{0, block_count_}};  // of rows, and of blocks
        if (split_ == T) {
            mine[0] = share(rows.count, thread, threads_);
            auto align = [&](int64_t row) { return row < rows.count ? rows.start(rows.context_of(row)) : row; };
            if (aligned_) mine[0] = {align(mine[0].begin), align(mine[0].end)};
        } else {
            Range of_label = share(blocks_[split_], thread, threads_);
            int64_t inner = block_count_ / blocks_[split_];
            mine[1] = {of_label.begin * inner, of_label.end * inner};
        }
        return mine;
    };
    std::vector<Worker> workers;
    for (int thread = 0; thread < threads_; ++thread) workers.emplace_back(*this, arguments, outputs, workspace, thread);
#pragma omp parallel num_threads(threads_)
    {
        // A team may be smaller than it was asked to be: each member then does the work of several.
        auto each = [&](auto work) {
            for (int n = omp_get_thread_num(); n < threads_; n += omp_get_num_threads()) work(n);
        };
        each([&](int n) {
            workers[n].clear_outputs();
            if (rows.count) workers[n].prepare();
        });
#pragma omp barrier
        each([&](int n) { workers[n].run(share_of(n)[0], share_of(n)[1]); });
#pragma omp barrier
        each([&](int n) { workers[n].finish_outputs(); });
    }
}

}  // namespace hk
