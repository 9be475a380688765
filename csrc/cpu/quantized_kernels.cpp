// Rows times quantised matrices.
//
// A tile of 16 columns is read once, a group of 32 of k at a time, for up to kMaxRows rows, which
// may meet it in two parts, by vectors, from the cache. Codes are unpacked to unsigned bytes, four
// consecutive k of a column in a 32-bit lane, and multiplied with the same four integers of a row
// in all lanes. What makes the bytes unsigned, an offset, is subtracted where a sum starts: offset
// times the sum of the row's integers. Sums of a group are exact, in 32 bits at the end; then the
// scales make floats of them.
#include "cpu/kernels.h"
#include "cpu/panels.h"
#include "cpu/quantized_groups.h"
#include "cpu/simd.h"
#include "cpu/tiles.h"

namespace moe::CPU_CAPABILITY {

namespace {

constexpr int L = kLanes<float>;
constexpr int kTileVectors = kTileColumns / L;
constexpr int kStepBytes = 4 * kTileColumns;  // one code of 4 consecutive k for each column

// ---------------------------------------------------------------------------------------- tiles
constexpr int kMaxRows = kRegisters == 32 ? 8 : 4;

// Vectors of a tile that are read together, so that whole lines of memory are.
constexpr int kVectors = kTileVectors == 2 ? 2 : 1;

// Tiles that few rows meet together, from parts of the matrix that lie far apart: memory gives a
// few long streams faster than one.
constexpr int kMaxStreamRows = 2;
constexpr int streams_for(int64_t rows) {
  return rows > kMaxStreamRows || kTileVectors > 2 ? 1 : 4;
}

// kVectors of the columns of a tile, or of several at equal distances.
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

// Nothing loaded before is kept for what follows: compilers keep a row's integers for all tiles,
// for which registers do not suffice.
MOE_INLINE void load_again() {
#if defined(MOE_AVX2) || defined(MOE_AVX512)
  asm volatile("" ::: "memory");
#endif
}

template <int rows>
MOE_INLINE void store_sums(const Tile& tile, int stream, const Vec<float> (&sums)[kVectors][rows],
                           float factor, bool column_scales) {
  MOE_UNROLL
  for (int v = 0; v < kVectors; ++v) {
    Vec<float> scale = broadcast(factor);
    if (column_scales) {
      scale *= load(static_cast<const float*>(tile.scales) + stream * tile.scales_apart + v * L);
    }
    float* const out = tile.out + stream * tile.out_apart + v * L;
    MOE_UNROLL
    for (int r = 0; r < rows; ++r) store(out + r * tile.out_stride, sums[v][r] * scale);
  }
}

// products = those of a group's codes with `count` rows of it.
template <Format format, bool wide, int count>
MOE_INLINE void multiply_group(
    const uint8_t* codes, const RowGroupOf<format, wide>* const* rows,
    VecI32 (&products)[kVectors][count][RowGroupOf<format, wide>::kPlanes]) {
  using Code = Codes<format>;
  using Sum = GroupSum<format>;
  using V = typename Sum::V;
  constexpr int planes = RowGroupOf<format, wide>::kPlanes;
  const auto for_each = [](auto f) __attribute__((always_inline)) {
    MOE_UNROLL
    for (int r = 0; r < count; ++r) {
      MOE_UNROLL
      for (int p = 0; p < planes; ++p) {
        MOE_UNROLL
        for (int v = 0; v < kVectors; ++v) f(v, r, p);
      }
    }
  };
  const auto add = [&](V(&sums)[kVectors][count][planes], int begin,
                       int end) __attribute__((always_inline)) {
    MOE_UNROLL
    for (int four = begin; four < end; four += Code::kPerByte) {
      VecU8 values[kVectors][Code::kPerByte];
      MOE_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        const uint8_t* from = codes + four / Code::kPerByte * kStepBytes + v * kVectorBytes;
        Code::unpack(load_raw<VecU8>(from), values[v]);
      }
      MOE_UNROLL
      for (int i = 0; i < Code::kPerByte; ++i) {
        for_each([&](int v, int r, int p) __attribute__((always_inline)) {
          Sum::add(sums[v][r][p], values[v][i], rows[r]->planes[p] + 4 * (four + i));
          if (kProducts<format> != Products::kFourBytes) keep_in_register(sums[v][r][p]);
        });
      }
    }
  };
  for_each([&](int v, int r, int p) __attribute__((always_inline)) {
    products[v][r][p] = VecI32{} + rows[r]->starts[p];
  });
  constexpr int fours = kGroupSize / 4;
  if constexpr (std::is_same_v<V, VecI32>) {
    add(products, 0, fours);
  } else {
    constexpr int parts = Sum::kFits >= fours ? 1 : 2;
    static_assert(Sum::kFits >= fours / parts);

    MOE_UNROLL
    for (int part = 0; part < parts; ++part) {
      V sums[kVectors][count][planes] = {};
      add(sums, part * fours / parts, (part + 1) * fours / parts);
      for_each([&](int v, int r, int p) __attribute__((always_inline)) {
        products[v][r][p] += Sum::total(sums[v][r][p]);
      });
    }
  }
}

template <Format format, bool wide, int rows, int streams>
void integer_tile(const Tile& tile) {
  using Group = RowGroupOf<format, wide>;
  constexpr int planes = Group::kPlanes;
  constexpr int64_t group_bytes = kTileColumns * kGroupSize / Codes<format>::kPerByte;
  constexpr bool grouped = has_group_scales(format);
  // Of so many rows the sums nearly fit the registers.
  constexpr int at_once = kRegisters < 32 && planes * rows > 4 ? 2 : rows;
  const uint8_t *codes = tile.codes, *ahead = tile.ahead;
  const bf16* scales = static_cast<const bf16*>(tile.scales);
  Vec<float> sums[streams][kVectors][rows] = {};
  for (int64_t g = 0; g < tile.groups; ++g) {
    const Group* row[rows];
    MOE_UNROLL
    for (int r = 0; r < rows; ++r) row[r] = static_cast<const Group*>(tile.rows[r]) + g;
    MOE_UNROLL
    for (int t = 0; t < streams; ++t) {
      if (kRegisters < 32 || rows > 1) load_again();
      const bf16* some = scales + t * tile.scales_apart + g * kTileColumns;
      if (streams == 1) {
        MOE_UNROLL
        for (int64_t i = 0; i < group_bytes; i += 64) prefetch_line(ahead + i);
        if (grouped) prefetch_line(some + tile.groups * kTileColumns);  // of the next tile, if any
      }
      const auto add = [&]<int first, int count>() __attribute__((always_inline)) {
        VecI32 products[kVectors][count][planes];
        multiply_group<format, wide, count>(codes + t * tile.codes_apart, row + first, products);
        MOE_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          const Vec<float> scale = grouped ? load(some + v * L) : broadcast(1.0f);
          MOE_UNROLL
          for (int r = 0; r < count; ++r) {
            const float of_row = row[first + r]->scale;
            const Vec<float> factor = grouped ? scale * of_row : broadcast(of_row);
            Vec<float>& sum = sums[t][v][first + r];
            sum = fma(join<Group, wide>(products[v][r]), factor, sum);
          }
        }
      };
      add.template operator()<0, at_once>();
      if constexpr (rows > at_once) {
        load_again();
        add.template operator()<at_once, rows - at_once>();
      }
    }
    codes += group_bytes;
    ahead += group_bytes;
  }
  MOE_UNROLL
  for (int t = 0; t < streams; ++t) {
    store_sums<rows>(tile, t, sums[t], format == Format::kMxfp4 ? 0.5f : 1.0f, !grouped);
  }
}

// -------------------------------------------------------------------------------------- e4m3
// Its bits, moved to those of a wider number with the sign, are the value times 2^-120. Rows are
// multiplied by 2^48, so that products of values from about 1e-15 to 1e24 are normal numbers: some
// instructions take others for zero, and larger values become infinite.
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
  const VecI32 top = bit_cast<VecI32>(lanes << (24 - 8 * k));
  return bit_cast<Vec<float>>(bit_cast<VecU32>(top >> 4) & 0x87f00000u);
}

template <bool pairs, int rows, int streams>
void fp8_tile(const Tile& tile) {
  constexpr int kRowBytes = 4 * (pairs ? sizeof(bf16) : sizeof(float)), steps = kGroupSize / 4;
  const char* row[rows];
  MOE_UNROLL
  for (int r = 0; r < rows; ++r) row[r] = static_cast<const char*>(tile.rows[r]);
  const uint8_t *codes = tile.codes, *ahead = tile.ahead;
  Vec<float> sums[streams][kVectors][rows] = {};
  for (int64_t g = 0; g < tile.groups; ++g) {
    MOE_UNROLL
    for (int t = 0; t < streams; ++t) {
      if (kRegisters < 32 || rows > 1) load_again();
      Vec<float> products[kVectors][rows] = {};
      MOE_UNROLL
      for (int s = 0; s < steps; ++s) {
        if (streams == 1) prefetch_line(ahead + s * kStepBytes);
        VecU32 lanes[kVectors];
        MOE_UNROLL
        for (int v = 0; v < kVectors; ++v) {
          const int64_t at = t * tile.codes_apart + s * kStepBytes + v * kVectorBytes;
          lanes[v] = load_raw<VecU32>(codes + at);
        }
#if defined(CPU_CAPABILITY_AVX512_BF16)
        if constexpr (pairs) {
          const __m512i bits = bit_cast<__m512i>(lanes[0]), mask = _mm512_set1_epi32(0x87f087f0);
          const __m512i even =
              _mm512_and_si512(_mm512_srai_epi16(_mm512_slli_epi16(bits, 8), 4), mask);
          const __m512i odd = _mm512_and_si512(_mm512_srai_epi16(bits, 4), mask);
          MOE_UNROLL
          for (int r = 0; r < rows; ++r) {
            const bf16* four = reinterpret_cast<const bf16*>(row[r] + s * kRowBytes);
            Vec<float>& sum = products[0][r];
            sum = Groups<bf16>::multiply_add(bit_cast<Vec<float>>(even), Groups<bf16>::spread(four),
                                             sum);
            sum = Groups<bf16>::multiply_add(bit_cast<Vec<float>>(odd),
                                             Groups<bf16>::spread(four + 2), sum);
          }
          continue;
        }
#endif
        MOE_UNROLL
        for (int k = 0; k < 4; ++k) {
          Vec<float> values[kVectors];
          MOE_UNROLL
          for (int v = 0; v < kVectors; ++v) values[v] = fp8_value(lanes[v], k);
          MOE_UNROLL
          for (int r = 0; r < rows; ++r) {
            float x;
            std::memcpy(&x, row[r] + s * kRowBytes + k * sizeof(float), sizeof(x));
            MOE_UNROLL
            for (int v = 0; v < kVectors; ++v) {
              products[v][r] = fma(values[v], broadcast(x), products[v][r]);
            }
          }
        }
      }
      MOE_UNROLL
      for (int v = 0; v < kVectors; ++v) {
        MOE_UNROLL
        for (int r = 0; r < rows; ++r) sums[t][v][r] += products[v][r];
      }
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

// f.template operator()<format>() of a format of integers.
template <typename F>
MOE_INLINE auto of_integers(Format format, F f) {
  switch (format) {
    case Format::kInt8:
      return f.template operator()<Format::kInt8>();
    case Format::kInt4:
      return f.template operator()<Format::kInt4>();
    default:
      return f.template operator()<Format::kMxfp4>();
  }
}

template <typename T>
int64_t packed_size(Format format, int64_t groups) {
  if (format == Format::kFp8) {
    return groups * kGroupSize * (kPairs<T> ? sizeof(bf16) : sizeof(float));
  }
  return of_integers(format, [&]<Format integers>() -> int64_t {
    return groups * sizeof(RowGroupOf<integers, kWide<T>>);
  });
}

template <typename T>
void pack(Format format, void* packed, const float* row, int64_t first_group, int64_t n) {
  for (int64_t k = 0; k < n; k += kGroupSize) {
    const int64_t group = first_group + k / kGroupSize, count = min(n - k, kGroupSize);
    if (format != Format::kFp8) {
      of_integers(format, [&]<Format integers>() {
        using Group = RowGroupOf<integers, kWide<T>>;
        pack_group(static_cast<Group*>(packed)[group], row + k, count, Codes<integers>::kOffset);
      });
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

// kVectors of a tile's columns, from v on, and of the tiles `apart` further on.
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
    for (int v = 0; v < kTileVectors; v += kVectors) {
      tile_function<T, kStreams>(b.format, m,
                                 std::make_index_sequence<kMaxStreamRows>())(begin(t, v, length));
    }
  }
  for (int64_t t = tiles.begin + kStreams * length; t < tiles.end; ++t) {
    for (int v = 0; v < kTileVectors; v += kVectors) {
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
