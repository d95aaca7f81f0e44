// The innermost loops, as one table of functions per instruction set and kind of number.
//
// `kernels.cpp` is compiled once per instruction set; nothing else is. A product of `rows x depth` and
// `depth x lanes` is cut into tiles that stay in registers: a few rows, each a broadcast number, by a few vectors.
// Operands are packed first, so that a tile reads each as one stream, but for those that lie so already.
#pragma once

#include <cstdint>

namespace hk {

enum class Storage { f32, f64, bf16 };  // of a tensor's elements
static inline int64_t bytes_of(Storage storage) { return storage == Storage::f64 ? 8 : storage == Storage::f32 ? 4 : 2; }

enum class Activation { none = -1, identity, relu, gelu, gelu_tanh, silu, tanh, sin };

constexpr int64_t max_rows = 14, max_vectors = 2;
constexpr int64_t dot_rows = 4, dot_columns = 3;

// One side of an operand: index n lies `offset[n]` elements from the base, and is number `feature[n]` of a row that
// may end early.
struct Side {
    int64_t n;
    const int64_t *offset, *feature;
};

// A tile's part of an operand: depth d's rows lie from `data[d * pitch]`, each `apart` from the one before; so do its
// vectors. With `context`, one number per depth, what lies there is the chunks' part.
struct Strip {
    const void* data;
    int64_t pitch, apart;
    const void* context;
};

// Sums of rows and vectors that stay in registers, until out[row_offset[w] + vector_offset[v] ...] (+)=
// sum_d rows[d, w] * lanes[d, v ...].
using Tile = void (*)(int64_t depth, const Strip& rows, const Strip& lanes, void* out, const int64_t* row_offset,
                      const int64_t* vector_offset, bool accumulate);

// Numbers that lie one after the other along the depth; the next row's, or column's, `apart` further on.
struct Lines {
    const void* data;
    int64_t apart;
};

// out[w * apart[0] + c * apart[1]] = sum_d rows[w, d] * columns[c, d], its vectors along the depth: both are read where
// they lie, once.
using Dots = void (*)(int64_t depth, Lines rows, Lines columns, void* out, const int64_t apart[2]);

struct Kernels {
    int64_t rows, vectors, lanes;  // the largest tile, and the numbers in a vector
    int64_t depth;                 // numbers that a packed element holds along the depth: 1, or 2 for pairs of bf16
    int64_t packed_bytes;          // of a packed element
    int64_t sum_bytes;             // of a sum: an element of an intermediate or of a result

    Tile tile[max_rows][max_vectors];  // by rows - 1 and vectors - 1
    // One vector wide and as many sums high, so that all rows share what is formed: its vectors are those of an additive
    // hidden layer, formed on the way. By activation (identity, relu) and rows - 1.
    Tile tall[2][max_rows * max_vectors];
    Dots dots[dot_rows][dot_columns];  // by rows - 1 and columns - 1
    // A panel [deep.n, padded] of numbers base[own + deep], and zero, with a limit, past the row's end; beyond own.n
    // it is anything.
    void (*pack[3])(const void* base, Side own, Side deep, int64_t limit, int64_t padded, void* panel);
    // A panel of activation(chunks[d, l] + deep[d]) from a panel of sums, or with no deep of (chunks[d, l] + own[l]).
    void (*form)(Activation, const void* chunks, const void* deep, const void* own, int64_t depth, int64_t padded,
                 void* panel);
    // dvalue[n] *= activation'(chunks[n] + context[n]), added to dchunks[n], in fp64, and to dcontext[n].
    void (*pull_back[3])(Activation, const void* dvalue, const void* chunks, const void* context, int64_t n,
                         void* dchunks, void* dcontext);
    // Of sums, and of sums in fp64: rounded once to a storage, and added to others.
    void (*store[2][3])(const void* sums, int64_t n, void* out);
    void (*add[2])(const void* sums, int64_t n, void* totals);
    // out = a * x + b * y, of sums
    void (*combine)(double a, const void* x, double b, const void* y, int64_t n, void* out);
    // n multiplications of vectors that never leave the registers: the ceiling of everything above.
    double (*spin)(int64_t n);
};

// The tables of one instruction set; pairs is null where bf16 products have no instruction.
struct InstructionSet {
    const Kernels *f32, *f64, *pairs;
};

const InstructionSet& portable();
#if defined(__x86_64__)
const InstructionSet& avx2();
const InstructionSet& avx512();
const InstructionSet& avx512bf16();
#endif

// The best that this CPU runs, or the one that is named; null for a name that it cannot run.
const InstructionSet* instruction_set(const char* name);
// Those that it runs, best first, and how many.
constexpr int max_instruction_sets = 4;
int instruction_sets(const char* names[max_instruction_sets]);

}  // namespace hk
