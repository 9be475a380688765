// Functions over single rows: sums, products, conversions, router scores.
//
// Every sum runs in an order that depends on the row's length alone.
#include <limits>
#include <type_traits>

#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace moe::CPU_CAPABILITY {

namespace {

// Calls f(i, lanes) for each vector of n elements; lanes < kLanes in the last one only.
template <typename A, typename F>
MOE_INLINE void for_vectors(int64_t n, F f) {
  constexpr int L = kLanes<A>;
  int64_t i = 0;
  for (; i + L <= n; i += L) f(i, L);
  if (i < n) f(i, n - i);
}

template <typename T>
MOE_INLINE Vec<acc_t<T>> load_n(const T* p, int64_t n) {
  return n == kLanes<acc_t<T>> ? load(p) : load_some(p, n);
}

template <typename T>
MOE_INLINE void store_n(T* p, Vec<acc_t<T>> v, int64_t n) {
  n == kLanes<acc_t<T>> ? store(p, v) : store_some(p, v, n);
}

template <typename A>
using IntOf = std::conditional_t<sizeof(A) == 4, int32_t, int64_t>;

// 0, 1, 2, ...
template <typename I>
MOE_INLINE Vec<I> lane_numbers() {
  Vec<I> lane;
  for (int j = 0; j < kLanes<I>; ++j) lane[j] = j;
  return lane;
}

// The first lanes of a vector, and in the others `rest`.
template <typename A>
MOE_INLINE Vec<A> first_lanes(Vec<A> v, int64_t lanes, A rest) {
  using I = IntOf<A>;
  return lanes == kLanes<A> ? v : (lane_numbers<I>() < I(lanes) ? v : Vec<A>{} + rest);
}

template <typename T, typename Row>
void weighted_sum(T* out, const Row* const* rows, const acc_t<T>* weights, int64_t count,
                  int64_t n) {
  using A = acc_t<T>;
  for_vectors<A>(n, [&](int64_t i, int64_t lanes) {
    Vec<A> sum{};
    for (int64_t r = 0; r < count; ++r) {
      const Vec<A> row = load_n(rows[r] + i, lanes);
      sum = weights ? fma(row, broadcast(weights[r]), sum) : sum + row;
    }
    store_n(out + i, sum, lanes);
  });
}

template <typename T>
acc_t<T> dot(const T* a, const T* b, int64_t n) {
  using A = acc_t<T>;
  constexpr int L = kLanes<A>;
  Vec<A> sums[4] = {};
  int64_t i = 0;
  for (; i + 4 * L <= n; i += 4 * L) {
    for (int j = 0; j < 4; ++j) sums[j] = fma(load(a + i + j * L), load(b + i + j * L), sums[j]);
  }
  for_vectors<A>(n - i, [&](int64_t j, int64_t lanes) {
    sums[0] = fma(load_n(a + i + j, lanes), load_n(b + i + j, lanes), sums[0]);
  });
  return sum_lanes<A>((sums[0] + sums[1]) + (sums[2] + sums[3]));
}

template <typename T>
void scale(T* out, const T* in, acc_t<T> factor, int64_t n) {
  for_vectors<acc_t<T>>(n, [&](int64_t i, int64_t lanes) {
    store_n(out + i, load_n(in + i, lanes) * factor, lanes);
  });
}

template <typename T>
void add_scaled(acc_t<T>* sums, const T* row, acc_t<T> factor, int64_t n) {
  for_vectors<acc_t<T>>(n, [&](int64_t i, int64_t lanes) {
    store_n(sums + i, fma(load_n(row + i, lanes), broadcast(factor), load_n(sums + i, lanes)),
            lanes);
  });
}

template <typename T>
void add_precisely(double* sums, const T* row, acc_t<T> factor, int64_t n) {
  using A = acc_t<T>;
  for_vectors<A>(n, [&](int64_t i, int64_t lanes) {
    A products[kLanes<A>];
    store(products, load_n(row + i, lanes) * factor);
    for (int64_t j = 0; j < lanes; ++j) sums[i + j] += products[j];
  });
}

template <typename T>
void widen(acc_t<T>* out, const T* in, int64_t n) {
  for_vectors<acc_t<T>>(
      n, [&](int64_t i, int64_t lanes) { store_n(out + i, load_n(in + i, lanes), lanes); });
}

template <typename T>
void narrow(T* out, const acc_t<T>* in, int64_t n) {
  for_vectors<acc_t<T>>(
      n, [&](int64_t i, int64_t lanes) { store_n(out + i, load_n(in + i, lanes), lanes); });
}

// log(1 + e^x), without loss where x is very negative or overflow where it is large.
template <typename A>
A softplus(A x) {
  return x > 0 ? x + std::log1p(std::exp(-x)) : std::log1p(std::exp(x));
}

template <typename A>
void softmax(A* out, const A* in, int64_t n) {
  Vec<A> tops = broadcast(n ? in[0] : A(0));
  for_vectors<A>(n, [&](int64_t i, int64_t lanes) {
    const Vec<A> values = first_lanes<A>(load_n(in + i, lanes), lanes, in[0]);
    tops = values > tops ? values : tops;
  });
  const A largest = fold_lanes<A>(tops, [](auto a, auto b) { return a > b ? a : b; });
  Vec<A> sums{};
  for_vectors<A>(n, [&](int64_t i, int64_t lanes) {
    const Vec<A> e = first_lanes<A>(exp(load_n(in + i, lanes) - largest), lanes, A(0));
    sums += e;
    store_n(out + i, e, lanes);
  });
  const A total = sum_lanes<A>(sums);
  for_vectors<A>(n, [&](int64_t i, int64_t lanes) {
    store_n(out + i, load_n(out + i, lanes) / total, lanes);
  });
}

template <typename A>
void scores(ScoreFunc func, A* out, const A* in, int64_t n) {
  if (func == ScoreFunc::kSoftmax) {
    softmax(out, in, n);
  } else if (func == ScoreFunc::kSigmoid) {
    for_vectors<A>(n, [&](int64_t i, int64_t lanes) {
      store_n(out + i, sigmoid<A>(load_n(in + i, lanes)), lanes);
    });
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = std::sqrt(softplus(in[i]));
  }
}

// By integers that are in the order of the values, the largest of all NaNs. Each id is found in two
// passes over them, which no branch depends on: for the largest, and for the first that equals it,
// which then becomes less than all.
template <typename A>
void largest(int32_t* ids, int64_t k, const A* values, int64_t n, A* keys) {
  using I = IntOf<A>;
  using V = Vec<I>;
  constexpr int64_t L = kLanes<A>;
  static_assert(L <= kMostLanes);
  constexpr I kMost = std::numeric_limits<I>::max(), kTaken = std::numeric_limits<I>::min();
  const auto larger = [](auto a, auto b) { return a > b ? a : b; };
  const auto smaller = [](auto a, auto b) { return a < b ? a : b; };
  const auto key_at = [&](int64_t i) { return load_raw<V>(keys + i); };
  const V lane = lane_numbers<I>();
  for_vectors<A>(n, [&](int64_t i, int64_t lanes) {
    const Vec<A> value = load_n(values + i, lanes) + A(0);  // of -0 and 0, which are equal, 0
    V key = bit_cast<V>(value);
    key ^= (key >> (8 * sizeof(I) - 1)) & kMost;
    key = value == value ? key : V{} + kMost;
    key = first_lanes<I>(key, lanes, kTaken);
    std::memcpy(keys + i, &key, sizeof(key));
  });
  const int64_t last = (n - 1) / L * L;
  for (int64_t taken = 0; taken < k; ++taken) {
    V top = key_at(0);
    for (int64_t i = L; i <= last; i += L) top = larger(key_at(i), top);
    const V best = V{} + fold_lanes<I>(top, larger);
    V found = V{} + kMost;
    for (int64_t i = last; i >= 0; i -= L) found = key_at(i) == best ? lane + I(i) : found;
    const I id = fold_lanes<I>(found, smaller);
    ids[taken] = static_cast<int32_t>(id);
    const int64_t i = id / L * L;
    const V rest = lane + I(i) == id ? V{} + kTaken : key_at(i);
    std::memcpy(keys + i, &rest, sizeof(rest));
  }
}

template <typename A>
void scores_backward(ScoreFunc func, A* grad_logits, const A* grad, const A* scores,
                     const A* logits, int64_t n) {
  const A product = func == ScoreFunc::kSoftmax ? dot(grad, scores, n) : A(0);
  for_vectors<A>(n, [&](int64_t i, int64_t lanes) {
    const Vec<A> g = load_n(grad + i, lanes), s = load_n(scores + i, lanes);
    Vec<A> slope;
    if (func == ScoreFunc::kSoftmax) {
      slope = s * (g - product);
    } else if (func == ScoreFunc::kSigmoid) {
      slope = g * s * (A(1) - s);
    } else {
      slope = g * sigmoid<A>(load_n(logits + i, lanes)) / (A(2) * s);
      slope = s == A(0) ? Vec<A>{} : slope;  // both vanish far below zero
    }
    store_n(grad_logits + i, load_n(grad_logits + i, lanes) + slope, lanes);
  });
}

template <typename T>
void fill_rows(RowKernels<T>& kernels) {
  kernels.weighted_sum = weighted_sum<T, T>;
  kernels.weighted_sum_wide = weighted_sum<T, acc_t<T>>;
  kernels.dot = dot<T>;
  kernels.scale = scale<T>;
  kernels.add_scaled = add_scaled<T>;
  kernels.add_precisely = add_precisely<T>;
  kernels.widen = widen<T>;
  kernels.narrow = narrow<T>;
}

template <typename A>
void fill_scores(ScoreKernels<A>& kernels) {
  kernels.scores = scores<A>;
  kernels.largest = largest<A>;
  kernels.scores_backward = scores_backward<A>;
}

}  // namespace

// clang-format off
template <> void fill(RowKernels<bf16>& kernels) { fill_rows(kernels); }
template <> void fill(RowKernels<fp16>& kernels) { fill_rows(kernels); }
template <> void fill(RowKernels<float>& kernels) { fill_rows(kernels); }
template <> void fill(RowKernels<double>& kernels) { fill_rows(kernels); }
template <> void fill(ScoreKernels<float>& kernels) { fill_scores(kernels); }
template <> void fill(ScoreKernels<double>& kernels) { fill_scores(kernels); }
// clang-format on

}  // namespace moe::CPU_CAPABILITY
