// A few rows of x and one context: what takes the time is to read hidden and head, so each is read once, where it lies.
#pragma once

#include "step.h"

namespace hk {

// head_first, as two products of vectors that lie along memory: t[b, r, j, k] = sum_q head[k, r, q] x[b, j, q], then
// y[b, i, r] = bias[i, r] + sum_jk hidden[i, j, k] t[b, r, j, k]. Threads share head by k, then hidden by i. Of tensors
// that are contiguous, in fp32 or fp64; bias may be null.
class FewRows {
  public:
    FewRows(const Shape& shape, int threads, const InstructionSet& set);

    size_t workspace_bytes(int64_t rows) const { return rows * intermediate() * kernels_.sum_bytes; }
    double work(int64_t rows) const;
    int threads() const { return threads_; }
    void run(const char* x, const char* hidden, const char* head, const char* bias, char* y, int64_t rows,
             char* workspace) const;

  private:
    int64_t intermediate() const { return shape_.extent[R] * shape_.extent[J] * shape_.extent[K]; }  // numbers of a row

    Shape shape_;
    int threads_;
    const Kernels& kernels_;
};

}  // namespace hk
