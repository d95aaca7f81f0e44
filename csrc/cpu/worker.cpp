#include "worker.h"

#include <atomic>

#include "pages.h"

namespace hk {

Worker::Worker(const Step& step, const Arguments& arguments, const std::vector<Output>& outputs, char* workspace,
               char* of_bias, int thread)
    : step_(step), arguments_(arguments), outputs_(outputs), workspace_(workspace), of_bias_(of_bias), thread_(thread),
      kept_(step.products_.size()), buffers_(step.products_.size()) {
    char* at = workspace + aligned_up(step.prepared_bytes_) + thread * step.thread_bytes_;
    auto take = [&](size_t bytes) { return std::exchange(at, at + bytes); };
    formed_base_ = take(step.formed_bytes_);
    sums_base_ = take(step.sums_bytes_);
    turned_base_ = take(step.turned_bytes_);
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

void Worker::multiply(const Product& product, const Ranges& block, int64_t context) {
    bool tile = product.out == HIDDEN && additive();
    Layout out;
    if (product.out == FORMED) out = formed_;
    else if (has(step_.labels(product.out), T)) out = sums_;
    else if (tile) out = tile_ = contiguous(step_.labels(HIDDEN), block, tile_base_);
    else {
        out = output_layouts_[output_of(product.out)];
        if (product.out == HIDDEN) out.base += context * out.lead[0] * kernels().sum_bytes;
    }
    Ranges ranges = block;
    int64_t combinations = count(product.batch, block);
    for (int64_t n = 0; n < combinations; ++n) {
        int64_t rest = n;
        for (int l = label_count; l-- > 0;) {
            if (!has(product.batch, l)) continue;
            int64_t index = block[l].begin + rest % block[l].size();
            ranges[l] = {index, index + 1};
            rest /= block[l].size();
        }
        const Operand operands[] = {operand(product, 0, ranges, context), operand(product, 1, ranges, context)};
        enumerate(out, product.batch, ranges, left_);
        char* base = out.base + left_.offset[0] * kernels().sum_bytes;
        enumerate(out, product.own[0], ranges, left_);
        enumerate(out, product.own[1], ranges, right_);
        const int64_t* offsets[] = {left_.offset.data(), right_.offset.data()};
        int lanes = product.lanes, rows = 1 - lanes;
        hk::multiply(kernels(), operands[rows], operands[lanes], count(product.deep, ranges), base, offsets[rows],
                     offsets[lanes], product.out != FORMED && !tile, spill_);
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

void Step::run(const Arguments& arguments) const {
    size_t end;
    std::vector<Output> outputs = this->outputs(arguments.rows, &end);
    char* workspace = arguments.workspace + (-reinterpret_cast<uintptr_t>(arguments.workspace) & (cache_line - 1));
    const Rows& rows = arguments.rows;
    for (size_t n = 0; n < outputs.size(); ++n)
        ask_for_large_pages(arguments.outputs[n].data, outputs[n].count * bytes_of(shape_.storage));
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
    // Where rows are all that comes out, and many, threads take block after block as they come free: of their own share,
    // whose rows lie near them as torch divides tensors, then of the others'.
    bool many = rows.count >= 8 * threads_ * shape_.block[T];
    bool taken = split_ == T && has(formed_, T) && products_.size() == 2 && has(labels(products_[1].out), T) && many;
    int64_t row_blocks = ceil_div(rows.count, shape_.block[T]);
    std::vector<std::atomic<int64_t>> next(threads_);
    for (int n = 0; n < threads_; ++n) next[n] = share(row_blocks, n, threads_).begin;
    auto run_share = [&](Worker& worker, int thread) {
        if (!taken) return worker.run(share_of(thread)[0], share_of(thread)[1]);
        for (int n = 0; n < threads_; ++n) {
            int whose = (thread + n) % threads_;
            for (int64_t block; (block = next[whose].fetch_add(1)) < share(row_blocks, whose, threads_).end;) {
                int64_t row = block * shape_.block[T];
                worker.run({row, std::min(row + shape_.block[T], rows.count)}, {0, block_count_});
            }
        }
    };
    std::vector<Worker> workers;
    for (int thread = 0; thread < threads_; ++thread)
        workers.emplace_back(*this, arguments, outputs, workspace, workspace + end, thread);
#pragma omp parallel num_threads(threads_)
    {
        each_thread(threads_, [&](int n) {
            workers[n].clear_outputs();
            if (rows.count) workers[n].prepare();
            if (shape_.head_bias) workers[n].apply_bias();
        });
#pragma omp barrier
        each_thread(threads_, [&](int n) { run_share(workers[n], n); });
#pragma omp barrier
        each_thread(threads_, [&](int n) { workers[n].finish_outputs(); });
    }
}

}  // namespace hk
