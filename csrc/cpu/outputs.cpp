// The sums that a worker keeps, and how they become outputs.
#include <string.h>

#include "worker.h"

namespace hk {

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

// Which of the step's outputs it is.
size_t Worker::output_of(int slot, bool chunks) const {
    size_t n = 0;
    while (outputs_[n].slot != slot || outputs_[n].chunks != chunks) ++n;
    return n;
}

// The activation's derivative, and with it the sums over contexts and over chunks.
void Worker::pull_back(const Ranges& ranges, int64_t context) {
    const Layout &dcontext = output_layouts_[output_of(HIDDEN)], &dchunks = output_layouts_[output_of(HIDDEN, true)];
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
                dchunks.base + (i * dchunks.stride[I] + j * dchunks.stride[J] + k) * sizeof(double), line_);
        kernels().add[0](line_, depth, dcontext.base + (context * dcontext.lead[0] + k) * sum);
    }
}

// What the head's bias makes of a row, the same for every row of chunks: sum_{j,q} bias[r,q] x[j*cols+q].
void Worker::apply_bias() const {
    int64_t bytes = kernels().sum_bytes, cols = shape().extent[Q], all = shape().extent[R], rows = arguments_.rows.count;
    char* summed = of_bias_ + (rows * all + thread_ * cols) * bytes;
    Range mine = share(rows, thread_, step_.threads_);
    for (int64_t row = mine.begin; row < mine.end; ++row) {
        const char* x = arguments_.factors[X].data + row * shape().in_features * bytes;
        memset(summed, 0, cols * bytes);
        for (int64_t feature = 0; feature < shape().in_features; feature += cols)
            kernels().add[0](x + feature * bytes, std::min(cols, shape().in_features - feature), summed);
        const int64_t apart[] = {1, 0};
        for (int64_t r = 0; r < all; r += dot_rows) {
            auto dots = kernels().dots[std::min(dot_rows, all - r) - 1][0];
            Lines biases{arguments_.head_bias + r * cols * bytes, cols};
            dots(cols, biases, {summed, 0}, of_bias_ + (row * all + r) * bytes, apart);
        }
    }
}

template <class Sum>
void Worker::begin_at_bias() const {
    const Range &t = summed_[T], &i = summed_[I], &r = summed_[R];
    bool turned = sums_.stride[I] == 1;
    for (int64_t row = t.begin; row < t.end; ++row) {
        const Sum* begin = reinterpret_cast<const Sum*>(of_bias_) + row * shape().extent[R] + r.begin;
        Sum* sums = reinterpret_cast<Sum*>(sums_base_) + (row - t.begin) * i.size() * r.size();
        if (turned)
            for (int64_t n = 0; n < r.size(); ++n, sums += i.size()) std::fill_n(sums, i.size(), begin[n]);
        else
            for (int64_t n = 0; n < i.size(); ++n, sums += r.size()) std::copy_n(begin, r.size(), sums);
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
    sums_ = contiguous(labels, own, sums_base_, product.turned ? product.out == Y ? I : J : label_count);
    bool first = true;  // of the blocks that add to them
    for (int l = 0; l < label_count; ++l) first = first && (l == T || has(labels, l) || !ranges[l].begin);
    if (!shape().head_bias || !first) memset(sums_base_, 0, bytes);
    else if (bytes_of(shape().storage) == 8) begin_at_bias<double>();
    else begin_at_bias<float>();
}

void Worker::end_sums() {
    if (!summing_) return;
    size_t n = output_of(summing_->out);
    const Rows& rows = arguments_.rows;
    int outer = summing_->out == Y ? I : J, inner = summing_->out == Y ? R : Q;
    int64_t size = shape().extent[inner], features = summing_->out == Y ? shape().out_features : shape().in_features;
    int64_t sum = kernels().sum_bytes, item = bytes_of(shape().storage);
    int64_t repeats = summed_[outer].size(), run = summed_[inner].size(), numbers = repeats * run;
    bool turned = summing_->turned;
    if (turned) {
        enumerate(sums_, set(Label(inner)), summed_, own_);
        enumerate(sums_, set(Label(outer)), summed_, deep_);
    }
    auto turn = step_.plain_->pack[static_cast<int>(sum == 8 ? Storage::f64 : Storage::f32)];
    if (run == size) run *= std::exchange(repeats, 1);  // whole chunks lie side by side
    const char* sums = sums_base_;
    for (int64_t row = summed_[T].begin; row < summed_[T].end; ++row, sums += numbers * sum) {
        if (turned) turn(sums, own_.side(), deep_.side(), 0, own_.side().n, turned_base_);
        const char* from = turned ? turned_base_ : sums;
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

}  // namespace hk
