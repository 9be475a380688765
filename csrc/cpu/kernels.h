// What is compiled once per instruction set, as tables of functions. cpu/kernel_table.h chooses
// one.
#pragma once

#include <cstdint>

#include "cpu/types.h"

namespace moe {

// Rows of the gate and the up half, or of the one half there is: element i is at gate[i * step] and
// up[i * step], with step 2 and up = gate + 1 where the halves are interleaved.
template <typename T>
struct HalvesOf {
  T* gate;
  T* up;  // unused without a gate
  bool interleaved;
};

// Functions over rows of T with sums in acc_t<T>.
template <typename T>
struct RowKernels {
  using A = acc_t<T>;

  // out[i] = sum over r, in order, of weights[r] * rows[r][i]; ones without weights.
  void (*weighted_sum)(T* out, const T* const* rows, const A* weights, int64_t count, int64_t n);
  // The same over rows of sums.
  void (*weighted_sum_wide)(T* out, const A* const* rows, const A* weights, int64_t count,
                            int64_t n);
  A (*dot)(const T* a, const T* b, int64_t n);
  void (*scale)(T* out, const T* in, A factor, int64_t n);
  // sums[i] += factor * row[i]
  void (*add_scaled)(A* sums, const T* row, A factor, int64_t n);
  void (*add_precisely)(double* sums, const T* row, A factor, int64_t n);
  void (*widen)(A* out, const T* in, int64_t n);
  void (*narrow)(T* out, const A* in, int64_t n);
};

// Activations of rows, and their derivatives.
template <typename T>
struct ActivationKernels {
  using A = acc_t<T>;

  // out = activation(h) * weight, over n elements of I.
  void (*activation)(const ActivationOptions& options, T* out, HalvesOf<const T> h, A weight,
                     int64_t n);
  void (*activation_wide)(const ActivationOptions& options, T* out, HalvesOf<const A> h, A weight,
                          int64_t n);
  // Writes grad_h = weight * grad * activation'(h), and weight * activation(h) to scaled unless it
  // is null. Returns <grad, activation(h)>.
  A (*activation_backward)(const ActivationOptions& options, const T* grad, HalvesOf<const T> h,
                           A weight, HalvesOf<T> grad_h, T* scaled, int64_t n);
  A (*activation_backward_wide)(const ActivationOptions& options, const A* grad,
                                HalvesOf<const T> h, A weight, HalvesOf<T> grad_h, T* scaled,
                                int64_t n);
};

enum class ScoreFunc { kSoftmax, kSigmoid, kSqrtSoftplus };

// Functions over the scores of one token, in A = float or double.
template <typename A>
struct ScoreKernels {
  // out = softmax, sigmoid or sqrt(softplus) of in; they may be the same.
  void (*scores)(ScoreFunc func, A* out, const A* in, int64_t n);
  // ids = those of the k largest of n values, the largest first, of equal ones the lower id. NaN
  // counts as the largest, as in torch.sort. `keys` has room for kMostLanes more than n.
  void (*largest)(int32_t* ids, int64_t k, const A* values, int64_t n, A* keys);
  // grad_logits += the gradient through it.
  void (*scores_backward)(ScoreFunc func, A* grad_logits, const A* grad, const A* scores,
                          const A* logits, int64_t n);
};

constexpr int64_t kMostLanes = 16;  // of any instruction set

// The matrix that rows are multiplied with: element (k, n) is at data[k * stride_k + n * stride_n].
// One of the strides is 1, and rows are packed for matrices of either kind.
template <typename T>
struct MatrixOf {
  const T* data;
  int64_t stride_k;
  int64_t stride_n;
  bool k_contiguous;
};

struct Range {
  int64_t begin;
  int64_t end;

  int64_t size() const { return end - begin; }
};

// Where products go: in T, or in what they are summed in.
template <typename T>
struct OutputOf {
  T* narrow;  // if not null
  acc_t<T>* wide;
  int64_t stride;
  bool accumulate;  // add to wide
  bool stream;      // more than caches hold: written past them
};

constexpr int64_t kOutputColumns = 16;
constexpr int64_t kPackedTogether = 32;

// Matrix products. Each result is summed over k in an order that depends on the sizes alone.
template <typename T>
struct GemmKernels {
  using A = acc_t<T>;

  // So many rows are best packed and multiplied together, up to kMostRows.
  int64_t rows_together;
  // So many columns that are contiguous are best multiplied with many rows before the sums are
  // used.
  int64_t columns_together;
  // Bytes of m packed rows of k elements.
  int64_t (*packed_size)(bool k_contiguous, int64_t m, int64_t k);
  // Packs elements `part` of rows of k, from a multiple of kPackedTogether on; rows[i] is where
  // that part of row i lies.
  void (*pack)(bool k_contiguous, void* packed, const T* const* rows, int64_t m, int64_t k,
               Range part);
  // out[i, j] = sum over k of row i times column columns.begin + j of b. Columns of out up to a
  // multiple of kOutputColumns are overwritten. stream: out is a part of more than caches hold, and
  // may be written past them. next: what is read after these columns, if not null.
  void (*multiply)(const void* packed, int64_t m, int64_t k, const MatrixOf<T>& b, Range columns,
                   A* out, int64_t out_stride, bool stream, const T* next);
};

template <typename T>
struct WeightGradKernels {
  // out[i, j] = sum over m of a[m][i_range.begin + i] * b[m][j_range.begin + j].
  void (*weight_grad)(const T* const* a, const T* const* b, int64_t m, Range i_range, Range j_range,
                      const OutputOf<T>& out);
  // So many bytes, past the caches.
  void (*stream_zeros)(void* out, int64_t bytes);
};

// How the elements of a quantised matrix are written. Each code is an integer times a scale, but
// kFp8, which is e4m3 without subnormal numbers. Codes of 4 bits have a scale for each column of
// each group of k, the others one for each column.
enum class Format { kInt8, kFp8, kInt4, kMxfp4 };

constexpr bool has_group_scales(Format format) {
  return format == Format::kInt4 || format == Format::kMxfp4;
}

// A quantised matrix [k, n] lies in tiles of 16 columns, each in groups of 32 of k, and both are
// filled up with zeros. In a group of 8 bits a code, byte (k / 4, column, k % 4) is one code; of 4
// bits, byte (k / 8, column, k % 4) holds codes k and k + 4, low bits first.
constexpr int64_t kTileColumns = 16;
constexpr int64_t kGroupSize = 32;

struct QuantizedMatrix {
  const uint8_t* codes;
  const void* scales;  // bf16 [tile, group, column], or float [tile, column]
  Format format;
  int64_t groups;  // along k

  int64_t group_bytes() const {
    return kTileColumns * kGroupSize / (has_group_scales(format) ? 2 : 1);
  }

  const uint8_t* tile(int64_t number) const { return codes + number * groups * group_bytes(); }
};

// Products with quantised matrices. Rows of T are rounded to integers of 16 bits, of 24 where T has
// more, with a scale for each group of 32: integer sums then are exact, and the rounding of a
// group is at most 1e-4 of its norm, or 4e-7. For kFp8 they stay floating numbers.
template <typename T>
struct QuantizedKernels {
  // Bytes of a packed row of so many groups.
  int64_t (*packed_size)(Format format, int64_t groups);
  // Packs n elements, the last group of which may be short, as groups first_group and following.
  void (*pack)(Format format, void* packed, const float* row, int64_t first_group, int64_t n);
  // out[i, j] = row i times column tiles.begin * 16 + j. next: the tile that is wanted after these.
  void (*multiply)(const QuantizedMatrix& b, const void* const* rows, int64_t m, Range tiles,
                   const uint8_t* next, float* out, int64_t out_stride);
};

// A matrix [k, n] with any strides.
template <typename T>
struct StridedMatrix {
  const T* data;
  int64_t stride_k, stride_n;
  int64_t k, n;
};

template <typename T>
struct QuantizingKernels {
  // Codes and scales of tiles [tiles.begin, tiles.end) of 16 columns, at most kTilesPerUnit; false
  // if a value there is not finite as a float.
  bool (*quantize)(Format format, const StridedMatrix<T>& matrix, Range tiles, uint8_t* codes,
                   void* scales);
};

constexpr int64_t kTilesPerUnit = 4;

// Memory of the calling thread, 64-byte aligned, one piece for each use: good until the next call
// for the same use.
enum class Scratch { kKernel, kRows, kTile, kNarrowTile, kPart, kPanel, kCount };
void* thread_scratch(Scratch use, int64_t bytes);

// Fills a table with the functions of one instruction set.
#define MOE_DECLARE_FILL(CAPABILITY) \
  namespace CAPABILITY {             \
  template <typename Kernels>        \
  void fill(Kernels& kernels);       \
  }

MOE_DECLARE_FILL(DEFAULT)
#if defined(__x86_64__)
MOE_DECLARE_FILL(AVX2)
MOE_DECLARE_FILL(AVX512)
MOE_DECLARE_FILL(AVX512_BF16)
MOE_DECLARE_FILL(AMX)  // products of bf16 alone
#endif

}  // namespace moe
