// Functions over rows, activations, scores and quantised products of the level that CPU_CAPABILITY
// names, against their formulas in double.
#include <algorithm>
#include <array>
#include <functional>

#include "tests/native/level_kernels.h"

#if !defined(CPU_CAPABILITY_AMX)  // which has products of bf16 alone

namespace moe::test {
namespace {

constexpr std::array<int64_t, 12> kSizes{0, 1, 2, 3, 4, 5, 7, 15, 16, 17, 33, 131};

// ----------------------------------------------------------------------------------------- rows
template <typename T>
double bits_of(T value) {
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(value));
  return static_cast<double>(bits);
}

template <typename T>
void check_rows() {
  using A = acc_t<T>;
  RowKernels<T> rows;
  CPU_CAPABILITY::fill(rows);
  for (int64_t n : kSizes) {
    const int64_t count = 3;
    const Rows<T> in(count, n);
    const Rows<A> wide(count, n);
    const std::vector<A> weights = random_numbers<A>(count);
    std::vector<T> out(n);
    std::vector<A> sums(n);
    std::vector<double> precise(n, 0.25);
    for (const A* factors : {weights.data(), static_cast<const A*>(nullptr)}) {
      for (bool of_sums : {false, true}) {
        of_sums ? rows.weighted_sum_wide(out.data(), wide.pointers.data(), factors, count, n)
                : rows.weighted_sum(out.data(), in.pointers.data(), factors, count, n);
        for (int64_t i = 0; i < n; ++i) {
          double sum = 0, magnitudes = 0;
          for (int64_t r = 0; r < count; ++r) {
            const double term =
                (of_sums ? wide.at(r, i) : in.at(r, i)) * (factors ? factors[r] : A(1));
            sum += term;
            magnitudes += std::abs(term);
          }
          expect(widen(out[i]), sum, kOfSums<T> * magnitudes + rounding<T>(sum), "weighted_sum", n,
                 i, of_sums);
        }
      }
    }
    double product = 0, magnitudes = 0;
    for (int64_t i = 0; i < n; ++i) {
      product += in.at(0, i) * in.at(1, i);
      magnitudes += std::abs(in.at(0, i) * in.at(1, i));
    }
    expect(rows.dot(in.pointers[0], in.pointers[1], n), product, kOfSums<T> * magnitudes, "dot", n,
           0, 0);
    rows.scale(out.data(), in.pointers[0], weights[0], n);
    std::fill(sums.begin(), sums.end(), A(0.5));
    rows.add_scaled(sums.data(), in.pointers[0], weights[0], n);
    rows.add_precisely(precise.data(), in.pointers[0], weights[0], n);
    for (int64_t i = 0; i < n; ++i) {
      const double scaled = in.at(0, i) * weights[0], allowed = kOfSums<T> * (1 + std::abs(scaled));
      expect(widen(out[i]), scaled, rounding<T>(scaled) + 1e-12, "scale", n, i, 0);
      expect(sums[i], 0.5 + scaled, allowed, "add_scaled", n, i, 0);
      expect(precise[i], 0.25 + scaled, allowed, "add_precisely", n, i, 0);
    }
  }
}

// Whether instructions of the level take this number for zero: VCVTNEPS2BF16 does denormal ones.
template <typename T>
bool is_flushed([[maybe_unused]] double value) {
#if defined(CPU_CAPABILITY_AVX512_BF16)
  if (std::is_same_v<T, bf16>) return std::abs(value) < 0x1p-126;
#endif
  return false;
}

// Every number of 16 bits is what it widens to, and what lies between two goes to the nearer one.
template <typename T>
void check_conversions() {
  RowKernels<T> rows;
  CPU_CAPABILITY::fill(rows);
  std::vector<T> all(1 << 16), back(all.size());
  for (size_t i = 0; i < all.size(); ++i) all[i] = {static_cast<uint16_t>(i)};
  std::vector<float> wide(all.size());
  rows.widen(wide.data(), all.data(), all.size());
  rows.narrow(back.data(), wide.data(), all.size());
  for (size_t i = 0; i < all.size(); ++i) {
    expect(wide[i], widen(all[i]), 0, "widen", i, 0, 0);
    if (std::isnan(wide[i])) {
      expect(widen(back[i]), kNaN, 0, "narrow of NaN", i, 0, 0);
    } else {
      const T expected{static_cast<uint16_t>(is_flushed<T>(wide[i]) ? i & 0x8000 : i)};
      expect(bits_of(back[i]), bits_of(expected), 0, "narrow", i, 0, 0);
    }
  }
  // Halfway from each finite number to the next one away from zero, and a little to either side.
  for (size_t i = 0; i < all.size(); ++i) {
    const double low = widen(all[i]), step = low - widen(T{static_cast<uint16_t>(i ^ 1)});
    if (!std::isfinite(low) || !std::isfinite(step)) continue;
    const float half = static_cast<float>(low + std::copysign(std::abs(step) / 2, low));
    const bool odd = i & 1;
    const float inputs[] = {std::nextafter(half, 0.0f), half,
                            std::nextafter(half, std::copysign(INFINITY, half))};
    const bool up[] = {false, odd, true};
    for (int j = 0; j < 3; ++j) {
      if (is_flushed<T>(inputs[j])) continue;
      if (i % 0x8000 == 0 && half == 0) continue;  // no float is between
      T found;
      rows.narrow(&found, inputs + j, 1);
      expect(bits_of(found), static_cast<double>(i + up[j]), 0, "rounding", i, j, 0);
    }
  }
}

// ---------------------------------------------------------------------------------- activations
using Formula = std::function<double(double, double)>;  // of the gate, and of up

Formula formula_of(const ActivationOptions& options) {
  const double alpha = options.alpha, limit = options.limit;
  const auto sigmoid = [](double z) { return 1 / (1 + std::exp(-z)); };
  const auto clamped = [limit](double v) { return std::clamp(v, -limit, limit); };
  switch (options.kind) {
    case Activation::kSwiglu:
      return [=](double g, double u) {
        return std::min(g, limit) * sigmoid(std::min(g, limit)) * clamped(u);
      };
    case Activation::kGeglu:
      return [=](double g, double u) {
        return 0.5 * g * (1 + std::tanh(std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g))) * u;
      };
    case Activation::kReglu:
      return [=](double g, double u) { return std::max(g, 0.0) * u; };
    case Activation::kSwigluOai:
      return [=](double g, double u) {
        const double z = std::min(g, limit);
        return z * sigmoid(alpha * z) * (clamped(u) + 1);
      };
    case Activation::kRelu2:
      return [=](double g, double) { return g > 0 ? g * g : 0; };
    case Activation::kSilu:
      return [=](double g, double) { return g * sigmoid(g); };
    default:
      return [=](double g, double) { return 0.5 * g * std::erfc(-g / std::sqrt(2.0)); };
  }
}

template <typename T, typename In>
void check_activation(const ActivationOptions& options, bool interleaved, int64_t n) {
  using A = acc_t<T>;
  ActivationKernels<T> kernels;
  CPU_CAPABILITY::fill(kernels);
  const Formula f = formula_of(options);
  const bool gated = options.gated();
  const int64_t step = gated && interleaved ? 2 : 1;
  const std::vector<In> h = random_numbers<In>(gated ? 2 * n : n);
  const std::vector<T> h_narrow = random_numbers<T>(gated ? 2 * n : n);
  const int64_t up = !gated ? 0 : interleaved ? 1 : n;
  const A weight = A(1.5);
  std::vector<T> out(n), grad_h(gated ? 2 * n : n), scaled(n);
  const HalvesOf<const In> halves{h.data(), h.data() + up, interleaved};
  if constexpr (std::is_same_v<In, T>) {
    kernels.activation(options, out.data(), halves, weight, n);
  } else {
    kernels.activation_wide(options, out.data(), halves, weight, n);
  }
  const double tiny = std::is_same_v<T, double> ? 1e-12 : 2e-6;
  const auto near = [&](double value) { return rounding<T>(value) + tiny * (1 + std::abs(value)); };
  const int64_t kind = static_cast<int64_t>(options.kind);
  for (int64_t i = 0; i < n; ++i) {
    const double value = weight * f(widen(h[i * step]), widen(h[i * step + up]));
    expect(widen(out[i]), value, near(value), "activation", kind, n, i);
  }
  const std::vector<In> grad = random_numbers<In>(n);
  const HalvesOf<const T> saved{h_narrow.data(), h_narrow.data() + up, interleaved};
  const HalvesOf<T> to{grad_h.data(), grad_h.data() + up, interleaved};
  A product;
  if constexpr (std::is_same_v<In, T>) {
    product =
        kernels.activation_backward(options, grad.data(), saved, weight, to, scaled.data(), n);
  } else {
    product =
        kernels.activation_backward_wide(options, grad.data(), saved, weight, to, scaled.data(), n);
  }
  double sum = 0, magnitudes = 0;
  for (int64_t i = 0; i < n; ++i) {
    const double g = widen(h_narrow[i * step]), u = widen(h_narrow[i * step + up]);
    const double value = f(g, u), e = 1e-6, by = weight * widen(grad[i]);
    sum += widen(grad[i]) * value;
    magnitudes += std::abs(widen(grad[i]) * value);
    expect(widen(scaled[i]), weight * value, near(weight * value), "weighted", kind, n, i);
    const double slope = by * (f(g + e, u) - f(g - e, u)) / (2 * e);
    const double allowed = 1e-7 + 10 * tiny * std::abs(by);
    expect(widen(grad_h[i * step]), slope, near(slope) + allowed, "gradient", kind, n, i);
    if (!gated) continue;
    const double slope_up = by * (f(g, u + e) - f(g, u - e)) / (2 * e);
    expect(widen(grad_h[i * step + up]), slope_up, near(slope_up) + allowed, "gradient of up", kind,
           n, i);
  }
  expect(product, sum, 4 * tiny * (magnitudes + 1), "product", kind, n, 0);
}

template <typename T>
void check_activations() {
  for (int kind = 0; kind <= static_cast<int>(Activation::kGelu); ++kind) {
    const ActivationOptions options{static_cast<Activation>(kind), 1.702, 1.2345678};
    for (int64_t n : kSizes) {
      for (bool interleaved : {false, true}) {
        if (interleaved && !options.gated()) continue;
        check_activation<T, T>(options, interleaved, n);
        check_activation<T, acc_t<T>>(options, interleaved, n);
      }
    }
  }
}

// --------------------------------------------------------------------------------------- scores
template <typename A>
void check_scores() {
  ScoreKernels<A> kernels;
  CPU_CAPABILITY::fill(kernels);
  const double tiny = std::is_same_v<A, double> ? 1e-13 : 1e-6;
  for (ScoreFunc func : {ScoreFunc::kSoftmax, ScoreFunc::kSigmoid, ScoreFunc::kSqrtSoftplus}) {
    const int64_t kind = static_cast<int64_t>(func);
    for (int64_t n : kSizes) {
      const std::vector<A> logits = random_numbers<A>(n), grad = random_numbers<A>(n);
      std::vector<A> scores(n), found(n, A(0.5));
      kernels.scores(func, scores.data(), logits.data(), n);
      kernels.scores_backward(func, found.data(), grad.data(), scores.data(), logits.data(), n);
      double total = 0, product = 0;
      for (A logit : logits) total += std::exp(static_cast<double>(logit));
      for (int64_t i = 0; i < n; ++i) product += grad[i] * std::exp(double{logits[i]}) / total;
      for (int64_t i = 0; i < n; ++i) {
        const double x = logits[i], s = 1 / (1 + std::exp(-x)),
                     root = std::sqrt(std::log1p(std::exp(x)));
        const double score = func == ScoreFunc::kSoftmax   ? std::exp(x) / total
                             : func == ScoreFunc::kSigmoid ? s
                                                           : root;
        const double slope = func == ScoreFunc::kSoftmax   ? score * (grad[i] - product)
                             : func == ScoreFunc::kSigmoid ? grad[i] * s * (1 - s)
                                                           : grad[i] * s / (2 * root);
        expect(scores[i], score, tiny * (1 + score), "score", kind, n, i);
        expect(found[i], 0.5 + slope, 4 * tiny * (1 + std::abs(slope)), "its gradient", kind, n, i);
      }
    }
  }
}

// ------------------------------------------------------------------------------------ quantised
constexpr std::array kFormats{Format::kInt8, Format::kFp8, Format::kInt4, Format::kMxfp4};

// A quantised matrix [k, n].
struct Codes {
  Format format;
  int64_t k, n, groups, tiles;
  std::vector<uint8_t> codes, scales;

  Codes(Format format, int64_t k, int64_t n)
      : format(format),
        k(k),
        n(n),
        groups((k + kGroupSize - 1) / kGroupSize),
        tiles((n + kTileColumns - 1) / kTileColumns),
        codes(tiles * groups * matrix().group_bytes()),
        scales(tiles * kTileColumns * (has_group_scales(format) ? 2 * groups : 4)) {}

  QuantizedMatrix matrix() const { return {codes.data(), scales.data(), format, groups}; }

  double scale(int64_t row, int64_t column) const {
    const int64_t tile = column / kTileColumns, at = column % kTileColumns;
    if (!has_group_scales(format)) {
      float value;
      std::memcpy(&value, scales.data() + 4 * column, sizeof(value));
      return value;
    }
    bf16 value;
    std::memcpy(&value,
                scales.data() + 2 * ((tile * groups + row / kGroupSize) * kTileColumns + at),
                sizeof(value));
    return widen(value);
  }

  double code(int64_t row, int64_t column) const {
    constexpr double kE2m1[] = {0, 0.5, 1, 1.5, 2, 3, 4, 6};
    const bool halves = has_group_scales(format);
    const int64_t i = row % kGroupSize, word = halves ? i / 8 : i / 4;
    const uint8_t byte =
        (matrix().tile(column / kTileColumns) +
         row / kGroupSize *
             matrix().group_bytes())[(word * kTileColumns + column % kTileColumns) * 4 + i % 4];
    const int nibble = i % 8 >= 4 ? byte >> 4 : byte & 15;
    switch (format) {
      case Format::kInt8:
        return byte - 128;
      case Format::kFp8:
        return (byte & 0x80 ? -1 : 1) *
               (byte & 0x7f ? std::ldexp(8 + (byte & 7), (byte >> 3 & 15) - 10) : 0.0);
      case Format::kInt4:
        return nibble - 8;
      default:
        return nibble & 8 ? -kE2m1[nibble & 7] : kE2m1[nibble];
    }
  }

  double at(int64_t row, int64_t column) const { return code(row, column) * scale(row, column); }
};

// A number that says what the codes and scales of all matrices are: the same on every machine.
uint64_t digest = 14695981039346656037u;

template <typename T>
Codes check_quantizing(Format format, int64_t k, int64_t n, bool transposed) {
  Codes found(format, k, n);
  const std::vector<T> values = random_numbers<T>(k * n);
  const StridedMatrix<T> matrix{values.data(), transposed ? 1 : n, transposed ? k : 1, k, n};
  QuantizingKernels<T> kernels;
  CPU_CAPABILITY::fill(kernels);
  for (int64_t t = 0; t < found.tiles; t += kTilesPerUnit) {
    const int64_t scale_bytes = found.scales.size() / found.tiles;
    const bool finite =
        kernels.quantize(format, matrix, {t, std::min(t + kTilesPerUnit, found.tiles)},
                         found.codes.data() + t * found.groups * found.matrix().group_bytes(),
                         found.scales.data() + t * scale_bytes);
    expect(finite, true, 0, "whether all are finite", k, n, t);
  }
  for (const auto& bytes : {found.codes, found.scales}) {
    for (uint8_t byte : bytes) digest = (digest ^ byte) * 1099511628211u;
  }
  for (int64_t row = 0; row < k; ++row) {
    for (int64_t column = 0; column < n; ++column) {
      const double value = widen(values[row * matrix.stride_k + column * matrix.stride_n]);
      const double scale = found.scale(row, column);
      // Half of what lies between codes, of which the largest may be a little too small.
      const double most = format == Format::kInt8   ? 0.51
                          : format == Format::kFp8  ? 16.1
                          : format == Format::kInt4 ? 1.7
                                                    : 2.01;
      expect(found.at(row, column), value, most * std::abs(scale), "quantised", k, n, column);
    }
  }
  return found;
}

template <typename T>
void check_quantized_products(const Codes& b, int64_t m) {
  QuantizedKernels<T> kernels;
  CPU_CAPABILITY::fill(kernels);
  const int64_t bytes = kernels.packed_size(b.format, b.groups), columns = b.tiles * kTileColumns;
  std::vector<std::unique_ptr<void, Free>> packed;
  std::vector<const void*> rows;
  const Rows<T> x(m, b.k);
  for (int64_t i = 0; i < m; ++i) {
    packed.push_back(aligned(std::max<int64_t>(bytes, 1)));
    poison(packed.back().get(), bytes);
    std::vector<float> wide(b.k);
    for (int64_t k = 0; k < b.k; ++k) wide[k] = static_cast<float>(x.at(i, k));
    const int64_t groups = b.groups / 2, middle = groups * kGroupSize;
    kernels.pack(b.format, packed.back().get(), wide.data() + middle, groups, b.k - middle);
    if (middle) kernels.pack(b.format, packed.back().get(), wide.data(), 0, middle);
    rows.push_back(packed.back().get());
  }
  std::vector<float> out(m * columns, kNaN);
  kernels.multiply(b.matrix(), rows.data(), m, {0, b.tiles}, b.codes.data(), out.data(), columns);
  // Rows, which are below 2, are rounded to 24 or 16 bits of the largest value of a group.
  const double of_rows = sizeof(T) > 2 ? 2e-6 : 4e-5, of_weights = sizeof(T) > 2 ? 0.1 : 4;
  for (int64_t i = 0; i < m; ++i) {
    for (int64_t column = 0; column < b.n; ++column) {
      double sum = 0, magnitudes = 0;
      for (int64_t k = 0; k < b.k; ++k) {
        const double product = x.at(i, k) * b.at(k, column);
        sum += product;
        magnitudes += std::abs(product) + of_weights * std::abs(b.at(k, column));
      }
      expect(out[i * columns + column], sum, of_rows * magnitudes, "quantised product", m, b.k,
             column);
    }
  }
}

template <typename T>
void check_quantized() {
  for (Format format : kFormats) {
    for (int64_t k : {1, 31, 32, 33, 96, 131}) {
      for (int64_t n : {1, 15, 16, 17, 67, 131}) {
        for (bool transposed : {false, true}) {
          const Codes b = check_quantizing<T>(format, k, n, transposed);
          if constexpr (!std::is_same_v<T, double>) {
            for (int64_t m : {1, 2, 3, 4, 5, 8, 9, 17}) check_quantized_products<T>(b, m);
          }
        }
      }
    }
  }
}

template <typename T>
void check_all() {
  check_rows<T>();
  check_activations<T>();
  check_quantized<T>();
}

}  // namespace

void check_functions() {
  check_all<bf16>();
  check_all<fp16>();
  check_all<float>();
  check_all<double>();
  check_conversions<bf16>();
  check_conversions<fp16>();
  check_scores<float>();
  check_scores<double>();
  std::printf("codes %016lx, ", static_cast<unsigned long>(digest));
}

}  // namespace moe::test

#endif
