// Where a worker's operands lie, and their panels.
#include <string.h>

#include "worker.h"

namespace hk {

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

}  // namespace hk
