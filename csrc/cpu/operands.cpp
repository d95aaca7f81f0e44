// Where a worker's operands lie, and their panels.
#include <string.h>

#include "worker.h"

namespace hk {

Layout contiguous(Labels labels, const Ranges& ranges, char* base, int last) {
    Layout layout;
    layout.base = base;
    int64_t stride = 1;
    auto add = [&](int l) {
        layout.stride[l] = stride;
        layout.origin[l] = ranges[l].begin;
        stride *= ranges[l].size();
    };
    if (last < label_count) add(last);
    for (int l = label_count; l-- > 0;)
        if (has(labels, l) && l != last) add(l);
    return layout;
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

int64_t count(Labels labels, const Ranges& ranges) {
    int64_t n = 1;
    for (int l = 0; l < label_count; ++l)
        if (has(labels, l)) n *= ranges[l].size();
    return n;
}

// The constant distance between neighbours among the labels' combinations, or 0 where there is none.
int64_t pitch(const Layout& layout, Labels labels, const Ranges& ranges) {
    int64_t pitch = 0, next = 0;
    bool first = true;
    for (int l = label_count; l-- > 0;) {
        if (!has(labels, l)) continue;
        if (!first && layout.stride[l] != next) return 0;
        if (std::exchange(first, false)) pitch = layout.stride[l];
        next = layout.stride[l] * ranges[l].size();
    }
    return pitch;
}

// The offsets of every combination of the labels' indices, the last label's fastest.
void Worker::enumerate(const Layout& layout, Labels labels, const Ranges& ranges, Offsets& offsets) const {
    auto& offset = offsets.offset;
    auto& feature = offsets.feature;
    offset.resize(count(labels, ranges));
    feature.resize(offset.size());
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
    Cut cut(k, own_.side().n, product.lanes == side, product.tall);
    if (limit && own_.feature.back() + deep_.feature.back() < limit) limit = 0;  // the block has no crop
    pack(k, layout.base + start * itemsize, storage, cut, own_.side(), deep_.side(), limit, to);
}

// The context's part of the additive hidden layer, as sums: over again for each of the other labels, which are outside k.
const char* Worker::context_line(Labels along, const Ranges& ranges, int64_t context, int64_t padded) {
    const Layout& layout = factors_[HIDDEN];
    int64_t zero = 0, length = ranges[K].size(), filled = count(along, ranges), sum = kernels().sum_bytes;
    enumerate(layout, set(K), ranges, own_);
    step_.plain_->pack[static_cast<int>(shape().storage)](
        layout.base + context * layout.lead[0] * bytes_of(shape().storage), own_.side(), {1, &zero, &zero}, 0, length,
        line_);
    for (int64_t n = length; n < filled; n += length) memcpy(line_ + n * sum, line_, length * sum);
    memset(line_ + filled * sum, 0, (padded - filled) * sum);
    return line_;
}

void Worker::form_panels(const Product& product, int side, const Ranges& ranges, int64_t context, const char* chunks,
                         char* to) {
    Cut cut(*step_.plain_, count(product.own[side], ranges), product.lanes == side);
    bool by_own = has(product.own[side], K);  // on which side of the product k is
    int64_t depth = count(product.deep, ranges), padded = by_own ? cut.padded() : depth;
    const char* line = context_line(by_own ? product.own[side] : product.deep, ranges, context, padded);
    form(kernels(), *step_.plain_, shape().activation, chunks, by_own ? nullptr : line, by_own ? line : nullptr, cut,
         depth, to);
}

void Worker::make_panels(const Product& product, int side, const Ranges& ranges, int64_t context, char* to) {
    if (product.slots[side] != HIDDEN || !additive()) return pack_panels(product, side, ranges, context, false, to);
    pack_panels(product, side, ranges, 0, true, chunk_base_);
    form_panels(product, side, ranges, context, chunk_base_, to);
}

void Worker::prepare() {
    int64_t turn = thread_;  // by turns, whatever they are of: one operand may have a single panel
    for (const Product& p : step_.products_) {
        for (int side : {0, 1}) {
            size_t bytes = step_.prepared_bytes(p, side);
            for (int64_t n = 0; n < p.prepared[side]; ++n) {
                if (turn++ % step_.threads_) continue;
                Ranges ranges = step_.ranges_of_prepared(p, side, n);
                Operand operand{nullptr, {kernels(), count(p.own[side], ranges), p.lanes == side, p.tall}};
                if (place(p, side, ranges, 0, operand)) continue;
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
    bool chunks = step_.is_chunks(slot), completed = !product.tall;  // here by each context; else tiles do that
    if (ready && !(chunks && completed)) return ready;
    Kept want{ranges, slot == HIDDEN && completed ? context : 0};
    for (int l = 0; l < label_count; ++l)
        if (!has(step_.labels(slot), l)) want.ranges[l] = {0, 0};
    Kept& kept = kept_[index][side];
    char* to = buffers_[index][side];
    if (slot != FORMED && kept.context == want.context && kept.ranges == want.ranges) return to;
    kept = want;
    if (ready) form_panels(product, side, ranges, context, ready, to);
    else if (chunks && !completed) pack_panels(product, side, ranges, 0, true, to);
    else make_panels(product, side, ranges, context, to);
    return to;
}

// Whether the tiles can read an operand where it lies, and where that is: what was formed, and evenly spaced rows of what
// the caller handed over, with nothing cropped. (Its lanes are packed: a panel of them is read by all rows.) Rows that
// would share a few lines of the nearest cache are packed too, which more than one panel of lanes repays.
bool Worker::place(const Product& product, int side, const Ranges& ranges, int64_t context, Operand& operand) {
    int slot = product.slots[side];
    if (!step_.may_place(product, side)) return false;
    const Layout& layout = slot == FORMED ? formed_ : factors_[slot];
    Offsets& placed = placed_[side];
    operand.pitch = pitch(layout, product.deep, ranges);
    if (!operand.pitch) return false;
    enumerate(layout, product.batch & step_.labels(slot), ranges, placed);
    int64_t start = placed.offset[0] + (slot == HIDDEN ? context * layout.lead[0] : 0), feature = placed.feature[0];
    for (int l = 0; l < label_count; ++l) {
        if (!has(product.deep, l)) continue;
        start += (ranges[l].begin - layout.origin[l]) * layout.stride[l];
        feature += (ranges[l].end - 1) * layout.feature[l];
    }
    enumerate(layout, product.own[side], ranges, placed);
    operand.data = layout.base + start * kernels().packed_bytes;
    operand.offset = placed.offset.data();
    if (layout.limit && placed.feature.back() + feature >= layout.limit) return false;
    constexpr int64_t ways = 8, apart_in_cache = 4096;
    int64_t apart = operand.cut.n > ways ? operand.offset[1] - operand.offset[0] : 0;
    if (slot != FORMED && apart && apart * kernels().packed_bytes % apart_in_cache == 0) return false;
    return readable_in_place(operand.cut, operand.offset);
}

Operand Worker::operand(const Product& product, int side, const Ranges& ranges, int64_t context) {
    Operand operand{nullptr, {kernels(), count(product.own[side], ranges), product.lanes == side, product.tall}};
    if (place(product, side, ranges, context, operand)) return operand;
    operand.offset = nullptr;
    operand.data = panels(product, side, ranges, context);
    if (product.tall && product.lanes == side) {
        operand.activation = shape().activation;
        operand.context = context_line(product.deep, ranges, context, count(product.deep, ranges));
    }
    return operand;
}

}  // namespace hk
