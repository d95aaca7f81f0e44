#include "few_rows.h"

namespace hk {
namespace {

struct Numbers {  // of some size: a pointer and a distance, in elements
    const char* data;
    int64_t apart, bytes;
    Numbers from(int64_t n) const { return {data + n * apart * bytes, apart, bytes}; }
    operator Lines() const { return {data, apart}; }
};

// out[w * apart[0] + c * apart[1]] for all of `rows` rows and `columns` columns.
void multiply(const Kernels& kernels, int64_t depth, Numbers rows, int64_t row_count, Numbers columns,
              int64_t column_count, char* out, const int64_t apart[2]) {
    for (int64_t w = 0; w < row_count; w += dot_rows) {
        int64_t height = std::min(dot_rows, row_count - w);
        for (int64_t c = 0; c < column_count; c += dot_columns) {
            int64_t breadth = std::min(dot_columns, column_count - c);
            kernels.dots[height - 1][breadth - 1](depth, rows.from(w), columns.from(c),
                                                  out + (w * apart[0] + c * apart[1]) * kernels.sum_bytes, apart);
        }
    }
}

}  // namespace

FewRows::FewRows(const Shape& shape, int threads, const InstructionSet& set)
    : shape_(shape), threads_(threads), kernels_(shape.storage == Storage::f64 ? *set.f64 : *set.f32) {}

// In multiplications of a vector, which load more than those of a step's tiles: each product's, and what it takes to
// sum a vector's numbers and store one.
double FewRows::work(int64_t rows) const {
    constexpr double load = 1.1, per_sum = 4;
    auto& n = shape_.extent;
    double formed = double(rows) * intermediate(), consumed = double(rows) * n[I] * n[R];
    auto vectors = [&](int64_t depth) { return load * depth / kernels_.lanes + per_sum; };
    return formed * vectors(n[Q]) + consumed * vectors(n[J] * n[K]);
}

void FewRows::run(const char* x, const char* hidden, const char* head, const char* bias, char* y, int64_t rows,
                  char* workspace) const {
    auto& n = shape_.extent;
    int64_t bytes = kernels_.sum_bytes, depth = n[J] * n[K];
    auto form = [&](Range k) {
        int64_t apart[] = {1, n[K]};
        for (int64_t from = k.begin; from < k.end; from += dot_rows) {
            int64_t some = std::min(dot_rows, k.end - from);
            for (int64_t r = 0; r < n[R]; ++r) {
                Numbers lines{head + (from * n[R] + r) * n[Q] * bytes, n[R] * n[Q], bytes};
                for (int64_t b = 0; b < rows; ++b) {
                    Numbers chunks{x + b * shape_.in_features * bytes, n[Q], bytes};
                    char* out = workspace + ((b * n[R] + r) * depth + from) * bytes;
                    int64_t whole = shape_.in_features / n[Q], rest = shape_.in_features % n[Q];
                    multiply(kernels_, n[Q], lines, some, chunks, whole, out, apart);
                    out += whole * n[K] * bytes;
                    if (rest) multiply(kernels_, rest, lines, some, chunks.from(whole), 1, out, apart);
                }
            }
        }
    };
    auto consume = [&](Range i) {
        int64_t apart[] = {n[R], 1};
        int64_t whole = std::min(i.end, shape_.out_features / n[R]);
        auto rows_of_chunks = [&](int64_t from, int64_t some, int64_t features) {
            Numbers lines{hidden + from * depth * bytes, depth, bytes};
            for (int64_t b = 0; b < rows; ++b)
                multiply(kernels_, depth, lines, some, {workspace + b * n[R] * depth * bytes, depth, bytes}, features,
                         y + (b * shape_.out_features + from * n[R]) * bytes, apart);
        };
        for (int64_t from = i.begin; from < whole; from += dot_rows)
            rows_of_chunks(from, std::min(dot_rows, whole - from), n[R]);
        if (whole < i.end) rows_of_chunks(whole, 1, shape_.out_features % n[R]);
        int64_t first = i.begin * n[R], some = std::min(i.end * n[R], shape_.out_features) - first;
        for (int64_t b = 0; bias && b < rows; ++b)
            kernels_.add[0](bias + first * bytes, some, y + (b * shape_.out_features + first) * bytes);
    };
#pragma omp parallel num_threads(threads_)
    {
        each_thread(threads_, [&](int m) { form(share(n[K], m, threads_)); });
#pragma omp barrier
        each_thread(threads_, [&](int m) { consume(share(n[I], m, threads_)); });
    }
}

}  // namespace hk
