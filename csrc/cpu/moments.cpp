#include "moments.h"

#include <string.h>

namespace hk {
namespace {

constexpr int64_t block_chunks = 64;

template <class Sum>
double number(const char* from, int64_t n) { return from ? reinterpret_cast<const Sum*>(from)[n] : 1; }

}  // namespace

// What a thread holds of a block of chunks: panels [chunks, width] of u, and of du; sums over contexts, in fp64, and over
// the block's chunks.
struct Moments::Room {
    Room(const Moments& of, int64_t layers)
        : along(steps(of.width_, 1)), down(steps(block_chunks, of.width_)), wide(steps(of.width_, layers * of.width_)),
          bytes(block_chunks * of.row_bytes()), panels(2 * layers * bytes + 2 * of.row_bytes() + cache_line),
          spill(max_rows * max_vectors * of.kernels_.lanes * of.kernels_.sum_bytes) {
        char* start = panels.data() + (-reinterpret_cast<uintptr_t>(panels.data()) & (cache_line - 1));
        for (int64_t n = 0; n < layers; ++n) {
            u.push_back(start + 2 * n * bytes);
            du.push_back(start + (2 * n + 1) * bytes);
        }
        dh = start + 2 * layers * bytes;
        dcontext = dh + of.row_bytes();
    }

    std::vector<int64_t> along, down, wide;  // offsets of a row's numbers, of rows, and of the moments' rows
    int64_t bytes;                           // of a panel
    std::vector<char> panels, spill;
    std::vector<char*> u, du;
    char *dh, *dcontext;  // rows
    std::vector<double> dchunks;
};

Moments::Moments(int64_t contexts, int64_t chunks, int64_t width, Activation activation, Storage storage, int threads,
                 const InstructionSet& set)
    : contexts_(contexts), chunks_(chunks), width_(width), slices_(ceil_div(threads, contexts)), activation_(activation),
      storage_(storage), threads_(threads), kernels_(storage == Storage::f64 ? *set.f64 : *set.f32) {}

template <class Work>
void Moments::each(int64_t layers, int64_t items, Work work) const {
#pragma omp parallel num_threads(threads_)
    {
        Room room(*this, layers);
        each_thread(threads_, [&](int m) {
            Range mine = share(items, m, threads_);
            if (mine.size()) work(room, mine, m);
        });
    }
}

double Moments::scale(const HiddenLayer& layer, int64_t chunk) const {
    return storage_ == Storage::f64 ? number<double>(layer.scale, chunk) : number<float>(layer.scale, chunk);
}

void Moments::form(const std::vector<HiddenLayer>& layers, int64_t context, Range chunks, Room& room) const {
    int64_t row = row_bytes();
    for (size_t n = 0; n < layers.size(); ++n)
        kernels_.form(activation_, layers[n].chunks + chunks.begin * row, nullptr, layers[n].context + context * row,
                      chunks.size(), width_, room.u[n]);
    bool two = layers.size() > 1;
    if (!two && !layers[0].scale) return;
    for (int64_t c = 0; c < chunks.size(); ++c) {
        char *own = room.u[0] + c * row, *other = room.u[two] + c * row;
        double other_scale = scale(layers[two], chunks.begin + c);
        kernels_.combine(scale(layers[0], chunks.begin + c), own, two ? -other_scale : 0, other, width_, own);
        if (two && layers[1].scale) kernels_.combine(other_scale, other, 0, other, width_, other);
    }
}

void Moments::run(const std::vector<HiddenLayer>& layers, char* sums) const {
    int64_t parts = layers.size(), whole = parts * width_, sum = kernels_.sum_bytes;
    Cut rows(kernels_, width_, false), lanes(kernels_, width_, true);
    each(parts, contexts_ * slices_, [&](Room& room, Range items, int) {
        for (int64_t item = items.begin; item < items.end; ++item) {
            Range slice = share(chunks_, item % slices_, slices_);
            char* out = sums + item * whole * whole * sum;
            memset(out, 0, whole * whole * sum);
            for (int64_t c = slice.begin; c < slice.end; c += block_chunks) {
                Range block{c, std::min(c + block_chunks, slice.end)};
                form(layers, item / slices_, block, room);
                for (int64_t a = 0; a < parts; ++a)
                    for (int64_t b = a; b < parts; ++b)
                        multiply(kernels_, {room.u[a], rows, width_, room.along.data()},
                                 {room.u[b], lanes, width_, room.along.data()}, block.size(),
                                 out + (a * whole + b) * width_ * sum, room.wide.data(), room.along.data(), true,
                                 room.spill.data());
            }
        }
    });
}

void Moments::pull_back(const std::vector<HiddenLayer>& layers, const char* sides,
                        const std::vector<LayerSums>& to) const {
    int64_t parts = layers.size(), wanted = to.back().dchunks ? parts : 1;  // h' is in both parts of u = [h - h', h']
    each(parts, chunks_, [&](Room& room, Range mine, int thread) {
        for (int64_t c = mine.begin; c < mine.end; c += block_chunks) {
            Range block{c, std::min(c + block_chunks, mine.end)};
            room.dchunks.assign(wanted * block_chunks * width_, 0);
            for (int64_t g = 0; g < contexts_; ++g) {
                form(layers, g, block, room);
                through(sides + g * parts * width_ * parts * width_ * kernels_.sum_bytes, block.size(), wanted, room);
                for (int64_t n = 0; n < wanted; ++n)
                    if (to[n].dchunks)
                        pull_back(layers[n], n, g, block, room, to[n].dcontext + (thread * contexts_ + g) * row_bytes());
            }
            for (int64_t n = 0; n < wanted; ++n)
                if (to[n].dchunks)
                    kernels_.store[1][static_cast<int>(storage_)](room.dchunks.data() + n * block_chunks * width_,
                                                                  block.size() * width_,
                                                                  to[n].dchunks + c * row_bytes());
        }
    });
}

// The first parts of du = u sides.
void Moments::through(const char* sides, int64_t chunks, int64_t wanted, Room& room) const {
    int64_t parts = room.u.size(), whole = parts * width_;
    Cut rows(kernels_, chunks, false), lanes(kernels_, width_, true);
    for (int64_t a = 0; a < wanted; ++a)
        for (int64_t b = 0; b < parts; ++b)
            multiply(kernels_, {room.u[b], rows, 1, room.down.data()},
                     {sides + (b * whole + a) * width_ * kernels_.sum_bytes, lanes, whole, room.along.data()}, width_,
                     room.du[a], room.down.data(), room.along.data(), b > 0, room.spill.data());
}

// From du of a block's chunks to the layer's own sums.
void Moments::pull_back(const HiddenLayer& layer, int64_t n, int64_t context, Range chunks, Room& room,
                        char* dcontext) const {
    int64_t row = row_bytes();
    memset(room.dcontext, 0, row);
    for (int64_t m = 0; m < chunks.size(); ++m) {
        double factor = scale(layer, chunks.begin + m);
        kernels_.combine(factor, room.du[n] + m * row, n ? -factor : 0, room.du[0] + m * row, width_, room.dh);
        kernels_.pull_back[static_cast<int>(storage_)](
            activation_, room.dh, layer.chunks + (chunks.begin + m) * row, layer.context + context * row, width_,
            room.dchunks.data() + (n * block_chunks + m) * width_, room.dcontext);
    }
    kernels_.add[0](room.dcontext, width_, dcontext);
}

}  // namespace hk
