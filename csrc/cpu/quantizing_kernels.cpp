// Weights to codes of 8 or 4 bits, bit for bit as moe_kernels.reference.quantized_experts defines
// it.
//
// A block is a group of 32 along k by a tile of 16 columns, as floats: [32, 16]. Lanes are columns,
// so that sums over k are taken in the order that they are written in. Compiled without contraction
// of products and sums (CMakeLists.txt): each operation is rounded for itself, as there.
#include "cpu/kernels.h"
#include "cpu/simd.h"
#include "cpu/tiles.h"

namespace moe::CPU_CAPABILITY {

namespace {

constexpr int L = kLanes<float>;
constexpr int kVectors = kTileColumns / L;
constexpr int64_t kBlock = kGroupSize * kTileColumns;

using VecF = Vec<float>;

MOE_INLINE VecF constant(float value) { return VecF{} + value; }

MOE_INLINE VecF magnitude(VecF v) { return bit_cast<VecF>(bit_cast<VecU32>(v) & 0x7fffffffu); }

// To the nearest integer, the even one if there are two: for |v| < 2^22. Bits of the sum end in
// those of the integer.
constexpr float kShifter = 0x1.8p23f;
MOE_INLINE VecF round_to_integer(VecF v) { return (v + kShifter) - kShifter; }
MOE_INLINE VecU32 integer_bits(VecF integer) { return bit_cast<VecU32>(integer + kShifter); }

MOE_INLINE VecF clamp(VecF v, float low, float high) {
  return min<float>(max<float>(v, constant(low)), constant(high));
}

// 1 / scale, and 0 where that is not a finite number.
MOE_INLINE VecF inverse_of(VecF scale) {
  const VecF inverse = 1.0f / scale;
  return magnitude(inverse) < INFINITY ? inverse : VecF{};
}

MOE_INLINE VecU32 bf16_bits(VecF v) {
  const VecU32 bits = bit_cast<VecU32>(v);
  return (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;
}

MOE_INLINE void store_bf16_bits(uint16_t* out, VecU32 bits) {
  const HalfVecU16 narrow = __builtin_convertvector(bits, HalfVecU16);
  std::memcpy(out, &narrow, sizeof(narrow));
}

// ------------------------------------------------------------------------------- blocks of floats
template <typename T>
MOE_INLINE float narrow(T value) {
  return static_cast<float>(to_float(value));
}

// k elements of n columns from `from` on; zeros fill the block up.
template <typename T>
void load_block(float* block, const T* from, int64_t stride_k, int64_t stride_n, int64_t k,
                int64_t n) {
  const bool whole = k == kGroupSize && n == kTileColumns;
  if constexpr (!std::is_same_v<T, double>) {
    if (whole && stride_n == 1) {
      for (int64_t i = 0; i < kGroupSize; ++i) {
        for (int64_t c = 0; c < kTileColumns; c += L) {
          store(block + i * kTileColumns + c, load(from + i * stride_k + c));
        }
      }
      return;
    }
    if (whole && stride_k == 1) {
      for (int64_t c = 0; c < kTileColumns; c += L) {
        for (int64_t first = 0; first < kGroupSize; first += L) {
          VecF rows[L];
          for (int i = 0; i < L; ++i) rows[i] = load(from + (c + i) * stride_n + first);
          transpose<float>(rows);
          for (int i = 0; i < L; ++i) store(block + (first + i) * kTileColumns + c, rows[i]);
        }
      }
      return;
    }
  }
  if (!whole) std::memset(block, 0, kBlock * sizeof(float));
  for (int64_t i = 0; i < k; ++i) {
    for (int64_t c = 0; c < n; ++c) {
      block[i * kTileColumns + c] = narrow(from[i * stride_k + c * stride_n]);
    }
  }
}

// One vector of a block's columns.
MOE_INLINE VecF element(const float* block, int64_t k) { return load(block + k * kTileColumns); }

// ---------------------------------------------------------------------------------------- codes
// Where a group's code k goes: of 8 bits into byte k % 4 of word k / 4, of 4 bits into the low or
// the high half of byte k % 4 of word k / 8. One word for each column.
template <typename Code>
MOE_INLINE void store_bytes(uint8_t* codes, Code code) {
  for (int64_t i = 0; i < kGroupSize / 4; ++i) {
    VecU32 word{};
    for (int j = 0; j < 4; ++j) word |= code(4 * i + j) << (8 * j);
    std::memcpy(codes + 4 * i * kTileColumns, &word, sizeof(word));
  }
}

template <typename Code>
MOE_INLINE void store_halves(uint8_t* codes, Code code) {
  for (int64_t i = 0; i < kGroupSize / 8; ++i) {
    VecU32 word{};
    for (int j = 0; j < 4; ++j) {
      word |= code(8 * i + j) << (8 * j) | code(8 * i + 4 + j) << (8 * j + 4);
    }
    std::memcpy(codes + 4 * i * kTileColumns, &word, sizeof(word));
  }
}

// The sum over k of squares of code * scale - value, by halves.
MOE_INLINE VecF squared_error(const float* block, VecF scale) {
  const VecF inverse = inverse_of(scale);
  VecF squares[kGroupSize];
  for (int64_t k = 0; k < kGroupSize; ++k) {
    const VecF value = element(block, k);
    const VecF code = clamp(round_to_integer(value * inverse), -8, 7);
    const VecF error = code * scale - value;
    squares[k] = error * error;
  }
  for (int64_t half = kGroupSize / 2; half > 0; half /= 2) {
    for (int64_t k = 0; k < half; ++k) squares[k] += squares[k + half];
  }
  return squares[0];
}

void int4_group(uint8_t* codes, uint16_t* scales, const float* block) {
  VecF extreme = element(block, 0);
  for (int64_t k = 1; k < kGroupSize; ++k) {
    const VecF value = element(block, k);
    extreme = magnitude(value) > magnitude(extreme) ? value : extreme;
  }
  VecF best_error{}, best_scale{};
  bool first = true;
  for (const double share : {1.0, 0.93, 0.86}) {
    const VecU32 bits = bf16_bits(extreme * static_cast<float>(share / -8)) << 16;
    const VecF scale = bit_cast<VecF>(bits), error = squared_error(block, scale);
    best_scale = first ? scale : (error < best_error ? scale : best_scale);
    best_error = first ? error : (error < best_error ? error : best_error);
    first = false;
  }
  const VecF inverse = inverse_of(best_scale);
  store_halves(codes, [&](int64_t k) {
    const VecF code = clamp(round_to_integer(element(block, k) * inverse), -8, 7);
    return (integer_bits(code) + 8) & 15;
  });
  store_bf16_bits(scales, bit_cast<VecU32>(best_scale) >> 16);
}

void mxfp4_group(uint8_t* codes, uint16_t* scales, const float* block) {
  VecF largest{};
  for (int64_t k = 0; k < kGroupSize; ++k)
    largest = max<float>(largest, magnitude(element(block, k)));
  // The exponent's bits of the scale: two less than those of the largest magnitude, and at least
  // those of 2^-126. Of zeros it is 2^-3.
  const VecI32 of_largest = bit_cast<VecI32>(largest) >> 23;
  VecI32 exponent = of_largest > 3 ? of_largest - 2 : VecI32{} + 1;
  exponent = largest == 0.0f ? VecI32{} + 124 : exponent;
  const VecF scale = bit_cast<VecF>(exponent << 23), inverse = inverse_of(scale);
  store_halves(codes, [&](int64_t k) {
    const VecF value = element(block, k) * inverse, size = magnitude(value);
    VecI32 up{}, down{};  // comparisons give -1
    for (const float between : {0.25f, 0.75f, 1.25f, 1.75f, 2.5f, 3.5f, 5.0f}) {
      up -= size >= between;
      down -= size > between;
    }
    const VecI32 code = (up & 1) == 0 ? up : down;
    return bit_cast<VecU32>(code | ((value < 0.0f) & 8));
  });
  store_bf16_bits(scales, bit_cast<VecU32>(scale) >> 16);
}

void int8_group(uint8_t* codes, VecF inverse, const float* block) {
  store_bytes(codes, [&](int64_t k) {
    const VecF code = clamp(round_to_integer(element(block, k) * inverse), -127, 127);
    return (integer_bits(code) + 128) & 255;
  });
}

// e4m3 without subnormal numbers: 2^-6 or 0 instead, whichever is nearer.
void fp8_group(uint8_t* codes, VecF inverse, const float* block) {
  constexpr float kSmallest = 0x1p-6f;
  store_bytes(codes, [&](int64_t k) {
    const VecF value = clamp(element(block, k) * inverse, -448, 448);
    VecF size = magnitude(value);
    size = size < kSmallest ? (size < kSmallest / 2 ? VecF{} : constant(kSmallest)) : size;
    const VecU32 bits = bit_cast<VecU32>(size);
    const VecU32 rounded = (bits + 0x7ffff + ((bits >> 20) & 1) - (120u << 23)) >> 20;
    const VecU32 code = size == 0.0f ? VecU32{} : rounded;
    return code | (bit_cast<VecU32>(value) >> 31) << 7;
  });
}

// ------------------------------------------------------------------------------------- functions
template <typename T>
class Blocks {
 public:
  explicit Blocks(const StridedMatrix<T>& matrix) : matrix_(matrix) {}

  const float* load(int64_t tile, int64_t group) {
    const int64_t n = tile * kTileColumns, k = group * kGroupSize;
    load_block(block_, matrix_.data + k * matrix_.stride_k + n * matrix_.stride_n, matrix_.stride_k,
               matrix_.stride_n, matrix_.k - k < kGroupSize ? matrix_.k - k : kGroupSize,
               matrix_.n - n < kTileColumns ? matrix_.n - n : kTileColumns);
    return block_;
  }

 private:
  const StridedMatrix<T>& matrix_;
  alignas(64) float block_[kBlock];
};

// largest[v] = the largest magnitudes of columns, `odd` NaN where one is no finite number.
MOE_INLINE void add_largest(VecF (&largest)[kVectors], VecF& odd, const float* block) {
  for (int v = 0; v < kVectors; ++v) {
    for (int64_t k = 0; k < kGroupSize; ++k) {
      const VecF value = element(block + v * L, k);
      largest[v] = max<float>(largest[v], magnitude(value));
      odd += value * 0.0f;
    }
  }
}

template <typename T>
bool quantize(Format format, const StridedMatrix<T>& matrix, Range tiles, uint8_t* codes,
              void* scales) {
  const int64_t groups = (matrix.k + kGroupSize - 1) / kGroupSize;
  const int64_t bytes = has_group_scales(format) ? kBlock / 2 : kBlock;
  Blocks<T> blocks(matrix);
  VecF odd{};
  const auto codes_of = [&](int64_t tile, int64_t group, int v) {
    return codes + ((tile - tiles.begin) * groups + group) * bytes + v * kVectorBytes;
  };
  if (has_group_scales(format)) {
    uint16_t* const group_scales = static_cast<uint16_t*>(scales);
    // Tiles inside: those of a row of the matrix share a line of the cache.
    for (int64_t g = 0; g < groups; ++g) {
      for (int64_t t = tiles.begin; t < tiles.end; ++t) {
        const float* block = blocks.load(t, g);
        VecF unused[kVectors] = {};
        add_largest(unused, odd, block);
        uint16_t* scale = group_scales + ((t - tiles.begin) * groups + g) * kTileColumns;
        for (int v = 0; v < kVectors; ++v) {
          const auto group = format == Format::kInt4 ? int4_group : mxfp4_group;
          group(codes_of(t, g, v), scale + v * L, block + v * L);
        }
      }
    }
    return sum_lanes<float>(odd) == 0;
  }
  VecF largest[kTilesPerUnit][kVectors] = {};
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
      add_largest(largest[t - tiles.begin], odd, blocks.load(t, g));
    }
  }
  for (auto& of_tile : largest) {
    for (VecF& vector : of_tile) vector /= constant(format == Format::kInt8 ? 127 : 448);
  }
  std::memcpy(scales, largest, tiles.size() * kTileColumns * sizeof(float));
  for (int64_t g = 0; g < groups; ++g) {
    for (int64_t t = tiles.begin; t < tiles.end; ++t) {
      const float* block = blocks.load(t, g);
      for (int v = 0; v < kVectors; ++v) {
        const auto group = format == Format::kInt8 ? int8_group : fp8_group;
        group(codes_of(t, g, v), inverse_of(largest[t - tiles.begin][v]), block + v * L);
      }
    }
  }
  return sum_lanes<float>(odd) == 0;
}

}  // namespace

// clang-format off
template <> void fill(QuantizingKernels<bf16>& kernels) { kernels.quantize = quantize<bf16>; }
template <> void fill(QuantizingKernels<fp16>& kernels) { kernels.quantize = quantize<fp16>; }
template <> void fill(QuantizingKernels<float>& kernels) { kernels.quantize = quantize<float>; }
template <> void fill(QuantizingKernels<double>& kernels) { kernels.quantize = quantize<double>; }
// clang-format on

}  // namespace moe::CPU_CAPABILITY
