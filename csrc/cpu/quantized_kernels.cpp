// Rows times quantised matrices.
//
// A tile of 16 columns is read once, a group of 32 of k at a time, for up to kMaxRows rows. Codes
// are unpacked to unsigned bytes, four consecutive k of a column in a 32-bit lane, and multiplied
// with the same four integers of a row in all lanes. What makes the bytes unsigned, an offset, is
// subtracted where a sum starts: offset times the sum of the row's integers. Sums of a group are
// exact in 32 bits; then the scales make floats of them.
#include "cpu/kernels.h"
#include "cpu/panels.h"
#include "cpu/simd.h"
#include "cpu/tiles.h"

namespace moe::CPU_CAPABILITY {

namespace {

constexpr int L = kLanes<float>;
constexpr int kTileVectors = kTileColumns / L;
constexpr int kStepBytes = 4 * kTileColumns;  // one code of 4 consecutive k for each column

typedef uint8_t VecU8 __attribute__((vector_size(kVectorBytes)));

// ---------------------------------------------------------------------------------------- codes
// Bytes of codes, and how they become bytes of value + kOffset.
template <Format format>
struct Codes;

template <>
struct Codes<Format::kInt8> {
  static constexpr int kOffset = 128, kPerByte = 1;

  static MOE_INLINE void unpack(VecU8 codes, VecU8 (&values)[kPerByte]) { values[0] = codes; }
};

MOE_INLINE void split_nibbles(VecU8 codes, VecU8 (&values)[2]) {
  const VecU32 bits = bit_cast<VecU32>(codes);
  values[0] = bit_cast<VecU8>(bits & 0x0f0f0f0fu);
  values[1] = bit_cast<VecU8>((bits >> 4) & 0x0f0f0f0fu);
}

template <>
struct Codes<Format::kInt4> {
  static constexpr int kOffset = 8, kPerByte = 2;

  static MOE_INLINE void unpack(VecU8 codes, VecU8 (&values)[kPerByte]) {
    split_nibbles(codes, values);
  }
};

// e2m1, twice the value: 0, 1, 2, 3, 4, 6, 8, 12, then the same negative.
template <>
struct Codes<Format::kMxfp4> {
  static constexpr int kOffset = 12, kPerByte = 2;

  static MOE_INLINE void unpack(VecU8 codes, VecU8 (&values)[kPerByte]) {
    split_nibbles(codes, values);
    alignas(16) static constexpr uint8_t kTable[16] = {12, 13, 14, 15, 16, 18, 20, 24,
                                                       12, 11, 10, 9,  8,  6,  4,  0};
    for (VecU8& value : values) {
#if defined(MOE_AVX512)
      const __m512i table = _mm512_broadcast_i32x4(load_raw<__m128i>(kTable));
      value = bit_cast<VecU8>(_mm512_shuffle_epi8(table, bit_cast<__m512i>(value)));
#elif defined(MOE_AVX2)
      const __m256i table = _mm256_broadcastsi128_si256(load_raw<__m128i>(kTable));
      value = bit_cast<VecU8>(_mm256_shuffle_epi8(table, bit_cast<__m256i>(value)));
#else
      uint8_t bytes[kVectorBytes];
      std::memcpy(bytes, &value, sizeof(bytes));
      for (uint8_t& byte : bytes) byte = kTable[byte];
      value = load_raw<VecU8>(bytes);
#endif
    }
  }
};

// -------------------------------------------------------------------------------- integer rows
// The integers of a row's group in planes, whose weighted sum they are: bytes where there is an
// instruction that multiplies four of them, else 16 bits. `wide` is of 24 bits instead of 16.
#if defined(CPU_CAPABILITY_AVX512_BF16)
using PlaneElement = int8_t;
template <bool wide>
constexpr int kPlanes = wide ? 3 : 2;
#else
using PlaneElement = int16_t;
template <bool wide>
constexpr int kPlanes = wide ? 2 : 1;
#endif

template <bool wide>
constexpr int kPlaneBits = sizeof(PlaneElement) == 1 ? 8 : (wide ? 12 : 16);

template <bool wide>
constexpr float kLargest = wide ? 127 * 65536 : 127 * 256;  // fits the planes, rounding included

template <bool wide>
struct RowGroup {
  float scale;
  int32_t starts[kPlanes<wide>];                   // -kOffset times the sum of a plane
  PlaneElement planes[kPlanes<wide>][kGroupSize];  // k in the order that multiply_add() wants
};

// sum + the products of the four bytes in each lane with four integers of a row.
MOE_INLINE VecI32 multiply_add(VecI32 sum, VecU8 bytes, const PlaneElement* four) {
#if defined(CPU_CAPABILITY_AVX512_BF16)
  int32_t bits;
  std::memcpy(&bits, four, sizeof(bits));
  return bit_cast<VecI32>(_mm512_dpbusd_epi32(bit_cast<__m512i>(sum), bit_cast<__m512i>(bytes),
                                              _mm512_set1_epi32(bits)));
#else
  // Elements 0 and 2 are side by side, then 1 and 3: pairs of 16 bits need no shuffle.
  const VecU32 lanes = bit_cast<VecU32>(bytes);
#if defined(__SSE2__)
  const VecU32 halves[2] = {lanes & 0x00ff00ffu, (lanes >> 8) & 0x00ff00ffu};
  for (int i = 0; i < 2; ++i) {
    int32_t bits;
    std::memcpy(&bits, four + 2 * i, sizeof(bits));
#if defined(MOE_AVX512)
    sum +=
        bit_cast<VecI32>(_mm512_madd_epi16(bit_cast<__m512i>(halves[i]), _mm512_set1_epi32(bits)));
#elif defined(MOE_AVX2)
    sum +=
        bit_cast<VecI32>(_mm256_madd_epi16(bit_cast<__m256i>(halves[i]), _mm256_set1_epi32(bits)));
#else
    sum += bit_cast<VecI32>(_mm_madd_epi16(bit_cast<__m128i>(halves[i]), _mm_set1_epi32(bits)));
#endif
  }
#else
  for (int i = 0; i < 4; ++i) {
    const int32_t value = four[i % 2 * 2 + i / 2];
    sum += bit_cast<VecI32>((lanes >> (8 * i)) & 0xffu) * value;
  }
#endif
  return sum;
#endif
}

// The weighted sum of the planes' sums.
template <bool wide>
MOE_INLINE Vec<float> join(const VecI32 (&sums)[kPlanes<wide>]) {
  constexpr int planes = kPlanes<wide>;
  const auto number = [](VecI32 v) { return __builtin_convertvector(v, Vec<float>); };
  if constexpr (planes == 1) {
    return number(sums[0]);
  } else if constexpr (!wide) {
    return number((sums[1] << kPlaneBits<wide>)+sums[0]);
  } else if constexpr (planes == 2) {
    return fma(number(sums[1]), broadcast(float(1 << kPlaneBits<wide>)), number(sums[0]));
  } else {
    return fma(number((sums[2] << kPlaneBits<wide>)+sums[1]),
               broadcast(float(1 << kPlaneBits<wide>)), number(sums[0]));
  }
}

// To the nearest integers, ties to even.
MOE_INLINE VecI32 rounded(Vec<float> v) {
#if defined(MOE_AVX512)
  return bit_cast<VecI32>(_mm512_cvtps_epi32(bit_cast<__m512>(v)));
#elif defined(MOE_AVX2)
  return bit_cast<VecI32>(_mm256_cvtps_epi32(bit_cast<__m256>(v)));
#elif defined(__SSE2__)
  return bit_cast<VecI32>(_mm_cvtps_epi32(bit_cast<__m128>(v)));
#else
  VecI32 integers;
  for (int i = 0; i < L; ++i) integers[i] = static_cast<int32_t>(std::lrint(v[i]));
  return integers;
#endif
}

template <bool wide>
void pack_group(RowGroup<wide>& group, const float* row, int64_t n, int32_t offset) {
  float values[kGroupSize] = {};
  std::memcpy(values, row, n * sizeof(float));
  Vec<float> maxima{}, zeros{};
  for (int64_t k = 0; k < kGroupSize; k += L) {
    const Vec<float> v = load(values + k);
    maxima = max<float>(maxima, v < 0.0f ? -v : v);
    zeros += v * 0.0f;  // NaN for infinities too
  }
  float largest = 0;
  for (int i = 0; i < L; ++i) largest = maxima[i] > largest ? maxima[i] : largest;
  const float finite = sum_lanes<float>(zeros);
  const bool some = largest > 1e-30f && finite == 0;  // smaller ones have no inverse
  const float inverse = some ? kLargest<wide> / largest : 0;
  group.scale = some ? largest / kLargest<wide> : finite;
  int32_t rest[kGroupSize] = {};
  for (int64_t k = 0; some && k < kGroupSize; k += L) {
    const VecI32 integers = rounded(load(values + k) * inverse);
    std::memcpy(rest + k, &integers, sizeof(integers));
  }
  for (int p = 0; p < kPlanes<wide>; ++p) {
    constexpr int kUnused = 32 - kPlaneBits<wide>;
    const bool last = p + 1 == kPlanes<wide>;
    PlaneElement plane[kGroupSize];
    int32_t sum = 0;
    for (int64_t k = 0; k < kGroupSize; ++k) {
      // The lowest bits as a signed number; what is left is a multiple of the next plane's unit.
      const int32_t low =
          last ? rest[k]
               : static_cast<int32_t>(static_cast<uint32_t>(rest[k]) << kUnused) >> kUnused;
      rest[k] = (rest[k] - low) >> kPlaneBits<wide>;
      plane[k] = static_cast<PlaneElement>(low);
      sum += low;
    }
    group.starts[p] = -offset * sum;
    if constexpr (sizeof(PlaneElement) == 1) {
      std::memcpy(group.planes[p], plane, sizeof(plane));
    } else {
      for (int64_t k = 0; k < kGroupSize; ++k) {
        group.planes[p][(k & ~3) | (k & 1) << 1 | (k & 2) >> 1] = plane[k];
      }
    }
  }
}

// ---------------------------------------------------------------------------------------- tiles
constexpr int kMaxRows = kRegisters == 32 ? 8 : 4;

// Tiles that few rows meet together, from parts of the matrix that lie far apart: memory gives a
// few long streams faster than one.
constexpr int kMaxStreamRows = 2;
constexpr int streams_for(int64_t rows) {
  return kTileVectors == 1 && rows <= kMaxStreamRows ? 4 : 1;
}

// One vector of the columns of a tile, or of several at equal distances.
struct Tile {
  const void* const* rows;
  const uint8_t* codes;
  const uint8_t* ahead;  // as many bytes as codes has, read next; of one tile alone
  const void* scales;
  int64_t groups;
  float* out;
  int64_t out_stride;
  int64_t codes_apart, scales_apart, out_apart;  // from a tile to the next, in their elements
};

template <int rows>
MOE_INLINE void store_sums(const Tile& tile, int stream, const Vec<float> (&sums)[rows],
                           float factor, bool column_scales) {
  Vec<float> scale = broadcast(factor);
  if (column_scales) {
    scale *= load(static_cast<const float*>(tile.scales) + stream * tile.scales_apart);
  }
  float* const out = tile.out + stream * tile.out_apart;
  MOE_UNROLL
  for (int r = 0; r < rows; ++r) store(out + r * tile.out_stride, sums[r] * scale);
}

template <Format format, bool wide, int rows, int streams>
void integer_tile(const Tile& tile) {
  using Code = Codes<format>;
  constexpr int planes = kPlanes<wide>, steps = kGroupSize / 4 / Code::kPerByte;
  constexpr bool grouped = has_group_scales(format);
  const RowGroup<wide>* row[rows];
  MOE_UNROLL
  for (int r = 0; r < rows; ++r) row[r] = static_cast<const RowGroup<wide>*>(tile.rows[r]);
  const uint8_t *codes = tile.codes, *ahead = tile.ahead;
  const bf16* scales = static_cast<const bf16*>(tile.scales);
  Vec<float> sums[streams][rows] = {};
  for (int64_t g = 0; g < tile.groups; ++g) {
    MOE_UNROLL
    for (int t = 0; t < streams; ++t) {
      VecI32 products[rows][planes];
      MOE_UNROLL
      for (int r = 0; r < rows; ++r) {
        MOE_UNROLL
        for (int p = 0; p < planes; ++p) products[r][p] = VecI32{} + row[r][g].starts[p];
      }
      MOE_UNROLL
      for (int s = 0; s < steps; ++s) {
        if (streams == 1) prefetch_line(ahead + s * kStepBytes);
        VecU8 values[Code::kPerByte];
        Code::unpack(load_raw<VecU8>(codes + t * tile.codes_apart + s * kStepBytes), values);
        MOE_UNROLL
        for (int i = 0; i < Code::kPerByte; ++i) {
          MOE_UNROLL
          for (int r = 0; r < rows; ++r) {
            MOE_UNROLL
            for (int p = 0; p < planes; ++p) {
              const PlaneElement* four = row[r][g].planes[p] + 4 * (s * Code::kPerByte + i);
              products[r][p] = multiply_add(products[r][p], values[i], four);
            }
          }
        }
      }
      Vec<float> scale = broadcast(1.0f);
      if (grouped) {
        const bf16* some = scales + t * tile.scales_apart + g * kTileColumns;
        if (streams == 1) prefetch_line(some + tile.groups * kTileColumns);  // of the next tile
        scale = load(some);
      }
      MOE_UNROLL
      for (int r = 0; r < rows; ++r) {
        const Vec<float> factor = grouped ? scale * row[r][g].scale : broadcast(row[r][g].scale);
        sums[t][r] = fma(join<wide>(products[r]), factor, sums[t][r]);
      }
    }
    codes += steps * kStepBytes;
    ahead += steps * kStepBytes;
  }
  MOE_UNROLL
  for (int t = 0; t < streams; ++t) {
    store_sums<rows>(tile, t, sums[t], format == Format::kMxfp4 ? 0.5f : 1.0f, !grouped);
  }
}

// -------------------------------------------------------------------------------------- e4m3
// Its bits, moved to those of a wider number with the sign, are the value times 2^-120. Rows are
// multiplied by 2^48 so that no product is subnormal, which some instructions make zero.
constexpr float kLift = 0x1p48f, kLower = 0x1p72f;

// Whether rows are pairs of bf16 as the processor multiplies them, else floats.
#if defined(CPU_CAPABILITY_AVX512_BF16)
template <typename T>
constexpr bool kPairs = std::is_same_v<T, bf16>;
#else
template <typename T>
constexpr bool kPairs = false;
#endif

// Values k = 0 to 3 of each lane.
MOE_INLINE Vec<float> fp8_value(VecU32 lanes, int k) {
  const VecU32 top = lanes << (24 - 8 * k);
  return bit_cast<Vec<float>>((top & 0x80000000u) | ((top & 0x7f000000u) >> 4));
}

template <bool pairs, int rows, int streams>
void fp8_tile(const Tile& tile) {
  constexpr int kRowBytes = 4 * (pairs ? sizeof(bf16) : sizeof(float)), steps = kGroupSize / 4;
  const char* row[rows];
  MOE_UNROLL
  for (int r = 0; r < rows; ++r) row[r] = static_cast<const char*>(tile.rows[r]);
  const uint8_t *codes = tile.codes, *ahead = tile.ahead;
  Vec<float> sums[streams][rows] = {};
  for (int64_t g = 0; g < tile.groups; ++g) {
    MOE_UNROLL
    for (int t = 0; t < streams; ++t) {
      Vec<float> products[rows] = {};
      MOE_UNROLL
      for (int s = 0; s < steps; ++s) {
        if (streams == 1) prefetch_line(ahead + s * kStepBytes);
        const VecU32 lanes = load_raw<VecU32>(codes + t * tile.codes_apart + s * kStepBytes);
#if defined(CPU_CAPABILITY_AVX512_BF16)
        if constexpr (pairs) {
          const __m512i bits = bit_cast<__m512i>(lanes), mask = _mm512_set1_epi32(0x87f087f0);
          const __m512i even =
              _mm512_and_si512(_mm512_srai_epi16(_mm512_slli_epi16(bits, 8), 4), mask);
          const __m512i odd = _mm512_and_si512(_mm512_srai_epi16(bits, 4), mask);
          MOE_UNROLL
          for (int r = 0; r < rows; ++r) {
            const bf16* four = reinterpret_cast<const bf16*>(row[r] + s * kRowBytes);
            products[r] = Groups<bf16>::multiply_add(bit_cast<Vec<float>>(even),
                                                     Groups<bf16>::spread(four), products[r]);
            products[r] = Groups<bf16>::multiply_add(bit_cast<Vec<float>>(odd),
                                                     Groups<bf16>::spread(four + 2), products[r]);
          }
          continue;
        }
#endif
        MOE_UNROLL
        for (int k = 0; k < 4; ++k) {
          const Vec<float> value = fp8_value(lanes, k);
          MOE_UNROLL
          for (int r = 0; r < rows; ++r) {
            float x;
            std::memcpy(&x, row[r] + s * kRowBytes + k * sizeof(float), sizeof(x));
            products[r] = fma(value, broadcast(x), products[r]);
          }
        }
      }
      MOE_UNROLL
      for (int r = 0; r < rows; ++r) sums[t][r] += products[r];
    }
    codes += steps * kStepBytes;
    ahead += steps * kStepBytes;
    MOE_UNROLL
    for (int r = 0; r < rows; ++r) row[r] += steps * kRowBytes;
  }
  MOE_UNROLL
  for (int t = 0; t < streams; ++t) store_sums<rows>(tile, t, sums[t], kLower, true);
}

// ------------------------------------------------------------------------------------- functions
template <typename T>
constexpr bool kWide = sizeof(T) > 2;

template <typename T>
int64_t packed_size(Format format, int64_t groups) {
  if (format == Format::kFp8) {
    return groups * kGroupSize * (kPairs<T> ? sizeof(bf16) : sizeof(float));
  }
  return groups * sizeof(RowGroup<kWide<T>>);
}

template <typename T>
void pack(Format format, void* packed, const float* row, int64_t first_group, int64_t n) {
  for (int64_t k = 0; k < n; k += kGroupSize) {
    const int64_t group = first_group + k / kGroupSize, count = min(n - k, kGroupSize);
    if (format != Format::kFp8) {
      const int32_t offset = format == Format::kInt8   ? Codes<Format::kInt8>::kOffset
                             : format == Format::kInt4 ? Codes<Format::kInt4>::kOffset
                                                       : Codes<Format::kMxfp4>::kOffset;
      pack_group<kWide<T>>(static_cast<RowGroup<kWide<T>>*>(packed)[group], row + k, count, offset);
      continue;
    }
    float values[kGroupSize] = {};
    for (int64_t i = 0; i < count; ++i) values[i] = row[k + i] * kLift;
    if constexpr (kPairs<T>) {
      bf16* out = static_cast<bf16*>(packed) + group * kGroupSize;
      for (int64_t i = 0; i < kGroupSize; ++i) {
        out[(i & ~3) | (i & 1) << 1 | (i & 2) >> 1] = from_float<bf16>(values[i]);
      }
    } else {
      std::memcpy(static_cast<float*>(packed) + group * kGroupSize, values, sizeof(values));
    }
  }
}

using TileFunction = void (*)(const Tile&);

template <typename T, int streams, size_t... i>
MOE_INLINE TileFunction tile_function(Format format, int64_t rows, std::index_sequence<i...>) {
  constexpr bool wide = kWide<T>;
  static constexpr TileFunction table[4][sizeof...(i)] = {
      {integer_tile<Format::kInt8, wide, i + 1, streams>...},
      {fp8_tile<kPairs<T>, i + 1, streams>...},
      {integer_tile<Format::kInt4, wide, i + 1, streams>...},
      {integer_tile<Format::kMxfp4, wide, i + 1, streams>...}};
  return table[static_cast<int>(format)][rows - 1];
}

// Vector v of a tile's columns, and of the tiles `apart` further on.
Tile tile_of(const QuantizedMatrix& b, int64_t number, int v, int64_t apart) {
  const bool grouped = has_group_scales(b.format);
  const int64_t element = grouped ? sizeof(bf16) : sizeof(float);
  const int64_t scales = kTileColumns * (grouped ? b.groups : 1);
  Tile tile;
  tile.codes = tile.ahead = b.tile(number) + v * kVectorBytes;
  tile.scales = static_cast<const char*>(b.scales) + (number * scales + v * L) * element;
  tile.groups = b.groups;
  tile.codes_apart = b.tile(apart) - b.codes;
  tile.scales_apart = apart * scales;
  tile.out_apart = apart * kTileColumns;
  return tile;
}

// Results do not depend on which tiles are read together: each sum has the same terms in order.
template <typename T>
void multiply(const QuantizedMatrix& b, const void* const* rows, int64_t m, Range tiles,
              const uint8_t* next, float* out, int64_t out_stride) {
  constexpr int kStreams = streams_for(1);
  const int64_t length = streams_for(m) > 1 ? tiles.size() / kStreams : 0;
  const auto begin = [&](int64_t t, int v, int64_t apart) {
    Tile tile = tile_of(b, t, v, apart);
    tile.rows = rows;
    tile.out = out + (t - tiles.begin) * kTileColumns + v * L;
    tile.out_stride = out_stride;
    return tile;
  };
  for (int64_t t = tiles.begin; t < tiles.begin + length; ++t) {
    tile_function<T, kStreams>(b.format, m,
                               std::make_index_sequence<kMaxStreamRows>())(begin(t, 0, length));
  }
  for (int64_t t = tiles.begin + kStreams * length; t < tiles.end; ++t) {
    for (int v = 0; v < kTileVectors; ++v) {
      Tile tile = begin(t, v, 0);
      tile.ahead = t + 1 < tiles.end ? b.tile(t + 1) : next;
      for (int64_t r = 0; r < m;) {
        const int64_t left = ceil_div(m - r, kMaxRows), count = ceil_div(m - r, left);
        tile_function<T, 1>(b.format, count, std::make_index_sequence<kMaxRows>())(tile);
        tile.ahead = tile.codes;
        tile.rows += count;
        tile.out += count * out_stride;
        r += count;
      }
    }
  }
}

template <typename T>
void fill_quantized(QuantizedKernels<T>& kernels) {
  kernels.packed_size = packed_size<T>;
  kernels.pack = pack<T>;
  kernels.multiply = multiply<T>;
}

}  // namespace

// clang-format off
template <> void fill(QuantizedKernels<bf16>& kernels) { fill_quantized(kernels); }
template <> void fill(QuantizedKernels<fp16>& kernels) { fill_quantized(kernels); }
template <> void fill(QuantizedKernels<float>& kernels) { fill_quantized(kernels); }
// clang-format on

}  // namespace moe::CPU_CAPABILITY
