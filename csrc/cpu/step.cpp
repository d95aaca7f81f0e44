// What a step is made of: its products, how they are cut and oriented, and the workspace they need.
#include "step.h"

#include <cmath>

namespace hk {

Labels Step::labels(int slot) const {
    constexpr Labels of[] = {set(T) | set(I) | set(R), set(I) | set(J) | set(K), set(K) | set(R) | set(Q),
                             set(T) | set(J) | set(Q)};
    if (slot == FORMED) return formed_;
    return of[slot] | (slot == HEAD && shape_.per_chunk_heads ? set(I) | set(J) : 0);
}

Product Step::product(int left, int right, int out) const {
    Labels a = labels(left), b = labels(right), c = labels(out);
    Product product;
    product.slots = {left, right};
    product.out = out;
    product.batch = a & b & c;
    product.deep = a & b & ~c;
    product.own = {a & c & ~b, b & c & ~a};
    product.lanes = cost(product, 0) <= cost(product, 1) ? 0 : 1;
    product.turned = turned(product, product.lanes);
    int64_t rows = extent(product, product.own[1 - product.lanes]);
    product.tall = is_chunks(product.slots[product.lanes]) && has(product.deep, K) && kernels_ == plain_ &&
                   shape_.activation <= Activation::relu && rows <= kernels_->rows * kernels_->vectors;
    return product;
}

// Whether with this side in vectors they are of the index of chunks of y or dx, which is not innermost there.
bool Step::turned(const Product& product, int side) const {
    return (product.out == Y && product.own[side] == set(I)) || (product.out == X && product.own[side] == set(J));
}

bool Step::per_context(const Product& product) const {
    return product.slots[0] == HIDDEN || product.slots[1] == HIDDEN || product.out == HIDDEN;
}

// How many numbers of a block the labels span.
int64_t Step::elements(Labels labels) const {
    int64_t n = 1;
    for (int l = 0; l < label_count; ++l)
        if (has(labels, l)) n *= l == T || has(formed_, l) ? shape_.block[l] : shape_.extent[l];
    return n;
}

// The same, of the rows that one context has where the product is one context's.
int64_t Step::extent(const Product& product, Labels labels) const {
    int64_t rows = has(labels, T) ? shape_.block[T] : 1;
    int64_t own = per_context(product) ? std::max<int64_t>(1, std::min(rows, shape_.rows_per_context)) : rows;
    return elements(labels) / rows * own;
}

// What a block's product takes with this side in vectors, in multiplications of a vector: tiles that are full and load
// little are cheap, and so are results that are stored side by side.
double Step::cost(const Product& product, int side) const {
    const Kernels& k = *kernels_;
    int64_t n = extent(product, product.own[side]), other = extent(product, product.own[1 - side]);
    double vectors = ceil_div(n, k.lanes), depth = extent(product, product.deep);
    double height = double(other) / ceil_div(other, k.rows), breadth = vectors / ceil_div(int64_t(vectors), k.vectors);
    double load = std::max({1.0, (height + breadth) / (height * breadth), 8 / (height * breadth)});
    int innermost = T;
    for (int l = 0; l < label_count; ++l)
        if (has(labels(product.out), l) && elements(set(Label(l))) > 1) innermost = l;
    bool side_by_side = turned(product, side) ||
        (has(product.own[side], innermost) && extent(product, set(Label(innermost))) % k.lanes == 0);
    // An additive hidden layer is formed anew for each context, in whole vectors where it is the lanes' side.
    bool formed = product.slots[1 - side] == HIDDEN && shape_.activation != Activation::none;
    return other * (vectors * std::ceil(depth / k.depth) * load + (side_by_side ? 2 * vectors : 2.0 * n) +
                    (formed ? depth : 0));
}

// Whether the product's tiles may read this side where it lies, and not in panels: what was formed, and the rows of a
// factor that is stored as it is multiplied. `Worker::place` finds whether it lies evenly.
bool Step::may_place(const Product& product, int side) const {
    int slot = product.slots[side];
    if (kernels_->depth != 1 || (slot == HIDDEN && shape_.activation != Activation::none)) return false;
    return slot == FORMED || (product.lanes != side && bytes_of(shape_.storage) == kernels_->packed_bytes);
}

// Whether `some` of a contiguous tensor's labels, each as long as a block has it, span numbers that lie evenly.
bool Step::evenly(int slot, Labels some) const {
    Labels all = labels(slot);
    int64_t stride = 1, next = 0;
    for (int l = label_count; l-- > 0;) {
        if (!has(all, l)) continue;
        if (l == T && slot == X) stride = shape_.in_features;
        if (l == T && slot == Y) stride = shape_.out_features;
        int64_t size = l == T || has(formed_, l) ? shape_.block[l] : shape_.extent[l];
        if (has(some, l)) {
            if (next && stride != next) return false;
            next = stride * size;
        }
        stride *= slot == FORMED ? size : shape_.extent[l];
    }
    return true;
}

// As a rule, then, whether a side is read where it lies.
bool Step::in_place(const Product& product, int side) const {
    int slot = product.slots[side];
    if (!may_place(product, side) || !evenly(slot, product.deep)) return false;
    if (product.lanes != side) return evenly(slot, product.own[side]);
    int innermost = T;
    for (int l = 0; l < label_count; ++l)
        if (has(formed_, l)) innermost = l;
    return has(product.own[side], innermost) && elements(set(Label(innermost))) % kernels_->lanes == 0;
}

// All of a step, in multiplications of a vector by one thread. The constants are what a packed number, an activation
// and a call of a product cost beside one.
double Step::work(int64_t rows) const {
    constexpr double per_packed = 0.4, per_formed = 0.3, per_curve = 1.5, per_call = 200, per_offset = 1.5;
    int64_t row_blocks = ceil_div(rows, shape_.block[T]), contexts = std::min(shape_.contexts, rows);
    double work = 0;
    for (const Product& p : products_) {
        double row_calls = per_context(p) || !has(formed_, T) ? std::max(row_blocks, contexts) : row_blocks;
        double calls = row_calls * block_count_ * elements(p.batch);
        work += calls * (cost(p, p.lanes) + per_call + per_offset * (extent(p, p.own[0]) + extent(p, p.own[1])));
        for (int side : {0, 1}) {
            bool hidden = p.slots[side] == HIDDEN, additive = hidden && shape_.activation != Activation::none;
            double panels = row_calls * elements(p.batch);
            for (int l : nest_)
                if (p.slots[side] == FORMED || has(labels(p.slots[side]), l)) panels *= blocks_[l];
            double numbers = double(extent(p, p.own[side])) * extent(p, p.deep);
            bool curved = shape_.activation > Activation::relu;
            if (!in_place(p, side)) work += (p.prepared[side] ? p.prepared[side] : panels) * numbers * per_packed;
            if (additive && shape_.contexts > 1 && !p.tall)
                work += panels * numbers * (curved ? per_curve : per_formed);
        }
    }
    return work;
}

Ranges Step::ranges_of_block(int64_t block) const {
    Ranges ranges;
    for (int l = 0; l < label_count; ++l) ranges[l] = {0, shape_.extent[l]};
    for (auto l = nest_.rbegin(); l != nest_.rend(); ++l) {
        int64_t begin = block % blocks_[*l] * shape_.block[*l];
        ranges[*l] = {begin, std::min(begin + shape_.block[*l], shape_.extent[*l])};
        block /= blocks_[*l];
    }
    return ranges;
}

// Over each label of an operand without rows, how many panels it has.
std::array<int64_t, label_count> Step::counts(const Product& product, int side) const {
    std::array<int64_t, label_count> counts;
    Labels own = labels(product.slots[side]);
    for (int l = 0; l < label_count; ++l)
        counts[l] = !has(own, l) ? 1 : has(product.batch, l) ? shape_.extent[l] : has(formed_, l) ? blocks_[l] : 1;
    return counts;
}

size_t Step::prepared_bytes(const Product& product, int side) const {
    return is_chunks(product.slots[side]) ? chunk_bytes_ : product.bytes[side];
}

Ranges Step::ranges_of_prepared(const Product& product, int side, int64_t n) const {
    Ranges ranges = ranges_of_block(0);
    auto counts = this->counts(product, side);
    for (int l = label_count; l-- > 0;) {
        int64_t size = has(product.batch, l) ? 1 : has(formed_, l) ? shape_.block[l] : shape_.extent[l];
        int64_t begin = n % counts[l] * size;
        ranges[l] = {begin, std::min(begin + size, shape_.extent[l])};
        n /= counts[l];
    }
    return ranges;
}

int64_t Step::prepared_index(const Product& product, int side, const Ranges& ranges) const {
    auto counts = this->counts(product, side);
    int64_t n = 0;
    for (int l = 0; l < label_count; ++l) {
        int64_t size = has(product.batch, l) ? 1 : has(formed_, l) ? shape_.block[l] : shape_.extent[l];
        n = n * counts[l] + (counts[l] > 1 ? ranges[l].begin / size : 0);
    }
    return n;
}

Step::Step(const Shape& shape, std::array<int, 2> forms, const std::vector<int>& outputs, int split, bool aligned,
           int threads, size_t prepare_bytes, const InstructionSet& set_)
    : shape_(shape), split_(threads > 1 ? split : T), threads_(threads), aligned_(aligned) {
    plain_ = shape.storage == Storage::f64 ? set_.f64 : set_.f32;
    kernels_ = shape.storage == Storage::bf16 && set_.pairs ? set_.pairs : plain_;

    Labels pair = labels(forms[0]) | labels(forms[1]), rest = 0;
    for (int slot = 0; slot < FORMED; ++slot)
        if (slot != forms[0] && slot != forms[1]) rest |= labels(slot);
    formed_ = pair & rest;

    Labels rows_output = 0;
    products_.push_back(product(forms[0], forms[1], FORMED));
    for (int out : outputs) {
        int partner = Y + HIDDEN + HEAD + X - forms[0] - forms[1] - out;
        products_.push_back(product(FORMED, partner, out));
        if (has(labels(out), T)) rows_output = labels(out);
    }
    // The label that threads divide, then those of the output with rows, so that its sums are complete one by one.
    auto nest = [&](auto wanted) {
        for (int l = T + 1; l < label_count; ++l)
            if (has(formed_, l) && std::find(nest_.begin(), nest_.end(), l) == nest_.end() && wanted(l))
                nest_.push_back(l);
    };
    nest([&](int l) { return l == split_; });
    nest([&](int l) { return has(rows_output, l); });
    nest([](int) { return true; });
    for (int l : nest_) block_count_ *= blocks_[l] = ceil_div(shape.extent[l], shape.block[l]);

    int64_t widest = 1;
    for (Product& p : products_) {
        bool additive = shape.activation != Activation::none;
        int64_t deep = elements(p.deep);
        for (int side : {0, 1}) {
            int64_t own = elements(p.own[side]);
            widest = std::max({widest, own, deep});
            bool lanes = p.lanes == side, hidden = p.slots[side] == HIDDEN;
            p.bytes[side] = aligned_up(packed_bytes(*kernels_, own, deep, lanes));
            if (hidden && additive) chunk_bytes_ = aligned_up(packed_bytes(*plain_, own, deep, lanes));
            if (p.slots[side] != HEAD && !(hidden && (additive || shape.contexts == 1))) continue;
            int64_t count = 1;
            for (int64_t n : counts(p, side)) count *= n;
            size_t bytes = count * prepared_bytes(p, side);
            if (prepared_bytes_ + bytes > prepare_bytes) continue;
            p.prepared[side] = count;
            p.prepared_at[side] = prepared_bytes_;
            prepared_bytes_ += bytes;
        }
        size_t out_bytes = aligned_up(elements(labels(p.out)) * kernels_->sum_bytes);
        if (p.turned) turned_bytes_ = aligned_up(elements(labels(p.out)) / shape_.block[T] * kernels_->sum_bytes);
        if (p.out == FORMED) formed_bytes_ = out_bytes;
        else if (has(labels(p.out), T)) sums_bytes_ = out_bytes;
        else if (p.out == HIDDEN && additive) tile_bytes_ = out_bytes;
    }
    // The context's part along a side of a product, padded to whole vectors.
    line_bytes_ = aligned_up((widest + kernels_->lanes) * kernels_->sum_bytes);
    thread_bytes_ = formed_bytes_ + sums_bytes_ + turned_bytes_ + tile_bytes_ + chunk_bytes_ + line_bytes_ +
                    aligned_up(max_rows * max_vectors * kernels_->lanes * kernels_->sum_bytes);
    for (const Product& p : products_) thread_bytes_ += p.bytes[0] + p.bytes[1];
}

std::vector<Output> Step::outputs(const Rows& rows, size_t* end) const {
    std::vector<Output> outputs;
    size_t at = block_bytes();
    bool additive = shape_.activation != Activation::none;
    auto add = [&](int slot, bool chunks) {
        Output output{slot, chunks, false, 1, 0, chunks ? 8 : kernels_->sum_bytes, at};
        bool by_context = slot == HIDDEN && !chunks, with_rows = has(labels(slot), T);
        Labels own = by_context && additive ? set(K) : labels(slot);
        output.is_private = split_ == T ? !with_rows && !(by_context && aligned_) : !has(own, split_);
        for (int l = T + 1; l < label_count; ++l)
            if (has(own, l) && !with_rows) output.count *= shape_.extent[l];
        if (with_rows) output.count = rows.count * (slot == Y ? shape_.out_features : shape_.in_features);
        if (by_context) output.count *= shape_.contexts;
        output.is_private = output.is_private && threads_ > 1;
        bool wide = bytes_of(shape_.storage) != output.sum_bytes;
        output.planes = output.is_private ? threads_ : wide && !with_rows ? 1 : 0;
        at += aligned_up(output.planes * output.count * output.sum_bytes);
        outputs.push_back(output);
    };
    for (size_t n = 1; n < products_.size(); ++n) {
        add(products_[n].out, false);
        if (products_[n].out == HIDDEN && additive) add(HIDDEN, true);
    }
    *end = at;
    return outputs;
}

size_t Step::block_bytes() const { return aligned_up(prepared_bytes_) + threads_ * thread_bytes_; }

size_t Step::workspace_bytes(const Rows& rows) const {
    size_t end;
    outputs(rows, &end);
    if (shape_.head_bias) end += bias_bytes(rows.count);
    return end + cache_line;  // to align its beginning
}

}  // namespace hk
