// Activations of expert layers over rows, and their derivatives. The formulas are those of
// moe_kernels.expert_activation.
#include "cpu/kernels.h"
#include "cpu/simd.h"

namespace moe::CPU_CAPABILITY {

namespace {

template <typename A>
struct Value {
  Vec<A> value;
  Vec<A> slope;
};

// f(z) and f'(z) of the function that the gate, or the whole input, goes through.
template <Activation kind, typename A>
MOE_INLINE Value<A> evaluate(Vec<A> z, A alpha) {
  if constexpr (kind == Activation::kSwiglu || kind == Activation::kSilu ||
                kind == Activation::kSwigluOai) {
    const Vec<A> scaled = kind == Activation::kSwigluOai ? alpha * z : z;
    const Vec<A> s = sigmoid<A>(scaled);
    return {z * s, s * (A(1) + scaled * (A(1) - s))};
  } else if constexpr (kind == Activation::kGeglu) {
    // (1 + tanh(u)) / 2 is sigmoid(2 u).
    const A c = A(2 * 0.79788456080286535588), k = A(0.044715);
    const Vec<A> s = sigmoid<A>(c * (z + k * z * z * z));
    return {z * s, s + z * s * (A(1) - s) * c * (A(1) + 3 * k * z * z)};
  } else if constexpr (kind == Activation::kReglu || kind == Activation::kRelu2) {
    const Vec<A> zero{};
    // Written so that NaN stays NaN.
    const Vec<A> positive = z < zero ? zero : z;
    if constexpr (kind == Activation::kRelu2) return {positive * positive, A(2) * positive};
    return {positive, z > zero ? broadcast(A(1)) : zero};
  } else {
    const Vec<A> cdf = normal_cdf(z);
    return {z * cdf, cdf + z * A(0.39894228040143267794) * exp(A(-0.5) * z * z)};
  }
}

template <Activation kind>
constexpr bool kClamps = kind == Activation::kSwiglu || kind == Activation::kSwigluOai;

// The two halves of vector i of a row.
template <typename In>
MOE_INLINE void load_halves(const HalvesOf<const In>& h, bool gated, int64_t i, int64_t n,
                            Vec<acc_t<In>>& gate, Vec<acc_t<In>>& up) {
  constexpr int L = kLanes<acc_t<In>>;
  if (gated && h.interleaved) {
    if (n >= L) return load_pairs(h.gate + 2 * i, gate, up);
    In pairs[2 * L] = {};
    std::memcpy(pairs, h.gate + 2 * i, 2 * n * sizeof(In));
    return load_pairs(pairs, gate, up);
  }
  gate = n >= L ? load(h.gate + i) : load_some(h.gate + i, n);
  if (gated) up = n >= L ? load(h.up + i) : load_some(h.up + i, n);
}

template <typename T>
MOE_INLINE void store_halves(const HalvesOf<T>& h, bool gated, int64_t i, int64_t n,
                             Vec<acc_t<T>> gate, Vec<acc_t<T>> up) {
  constexpr int L = kLanes<acc_t<T>>;
  if (gated && h.interleaved) {
    if (n >= L) return store_pairs(h.gate + 2 * i, gate, up);
    T pairs[2 * L];
    store_pairs(pairs, gate, up);
    std::memcpy(h.gate + 2 * i, pairs, 2 * n * sizeof(T));
    return;
  }
  n >= L ? store(h.gate + i, gate) : store_some(h.gate + i, gate, n);
  if (gated) n >= L ? store(h.up + i, up) : store_some(h.up + i, up, n);
}

template <Activation kind, typename A>
MOE_INLINE void clamp(Vec<A>& gate, Vec<A>& up, A limit) {
  if constexpr (kClamps<kind>) {
    gate = gate > limit ? broadcast(limit) : gate;
    up = up > limit ? broadcast(limit) : (up < -limit ? broadcast(-limit) : up);
  }
}

template <Activation kind, typename T, typename In>
void forward(const ActivationOptions& options, T* out, HalvesOf<const In> h, acc_t<T> weight,
             int64_t n) {
  using A = acc_t<T>;
  constexpr bool gated = is_gated(kind);
  const A alpha = static_cast<A>(options.alpha), limit = static_cast<A>(options.limit);
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    Vec<A> gate, up;
    load_halves(h, gated, i, n - i, gate, up);
    clamp<kind, A>(gate, up, limit);
    Vec<A> value = evaluate<kind, A>(gate, alpha).value * weight;
    if constexpr (gated) value *= kind == Activation::kSwigluOai ? up + A(1) : up;
    n - i >= kLanes<A> ? store(out + i, value) : store_some(out + i, value, n - i);
  }
}

template <Activation kind, typename T, typename Grad>
acc_t<T> backward(const ActivationOptions& options, const Grad* grad, HalvesOf<const T> h,
                  acc_t<T> weight, HalvesOf<T> grad_h, T* scaled, int64_t n) {
  using A = acc_t<T>;
  constexpr bool gated = is_gated(kind);
  const A alpha = static_cast<A>(options.alpha), limit = static_cast<A>(options.limit);
  const Vec<A> zero{};
  Vec<A> product{};
  for (int64_t i = 0; i < n; i += kLanes<A>) {
    const bool full = n - i >= kLanes<A>;
    Vec<A> raw_gate, raw_up;
    load_halves(h, gated, i, n - i, raw_gate, raw_up);
    Vec<A> gate = raw_gate, up = raw_up;
    clamp<kind, A>(gate, up, limit);
    const Vec<A> g = full ? load(grad + i) : load_some(grad + i, n - i);
    const Value<A> f = evaluate<kind, A>(gate, alpha);
    const Vec<A> weighted = g * weight;
    Vec<A> out = f.value, grad_gate = weighted * f.slope, grad_up = zero;
    if constexpr (gated) {
      const Vec<A> shifted = kind == Activation::kSwigluOai ? up + A(1) : up;
      out *= shifted;
      grad_gate *= shifted;
      grad_up = weighted * f.value;
    }
    if constexpr (kClamps<kind>) {
      grad_gate = raw_gate > limit ? zero : grad_gate;
      grad_up = raw_up > limit ? zero : (raw_up < -limit ? zero : grad_up);
    }
    store_halves(grad_h, gated, i, n - i, grad_gate, grad_up);
    // Lanes past n hold g = 0: a finite activation of 0 adds nothing.
    product = fma(g, out, product);
    if (scaled) {
      const Vec<A> value = out * weight;
      full ? store(scaled + i, value) : store_some(scaled + i, value, n - i);
    }
  }
  return sum_lanes<A>(product);
}

template <typename F>
MOE_INLINE auto dispatch(Activation kind, F f) {
  switch (kind) {
    case Activation::kSwiglu:
      return f.template operator()<Activation::kSwiglu>();
    case Activation::kGeglu:
      return f.template operator()<Activation::kGeglu>();
    case Activation::kReglu:
      return f.template operator()<Activation::kReglu>();
    case Activation::kSwigluOai:
      return f.template operator()<Activation::kSwigluOai>();
    case Activation::kRelu2:
      return f.template operator()<Activation::kRelu2>();
    case Activation::kSilu:
      return f.template operator()<Activation::kSilu>();
    default:
      return f.template operator()<Activation::kGelu>();
  }
}

template <typename T, typename In>
void activation(const ActivationOptions& options, T* out, HalvesOf<const In> h, acc_t<T> weight,
                int64_t n) {
  dispatch(options.kind,
           [&]<Activation kind>() { forward<kind, T, In>(options, out, h, weight, n); });
}

template <typename T, typename Grad>
acc_t<T> activation_backward(const ActivationOptions& options, const Grad* grad,
                             HalvesOf<const T> h, acc_t<T> weight, HalvesOf<T> grad_h, T* scaled,
                             int64_t n) {
  return dispatch(options.kind, [&]<Activation kind>() {
    return backward<kind, T, Grad>(options, grad, h, weight, grad_h, scaled, n);
  });
}

template <typename T>
void fill_activations(ActivationKernels<T>& kernels) {
  kernels.activation = activation<T, T>;
  kernels.activation_wide = activation<T, acc_t<T>>;
  kernels.activation_backward = activation_backward<T, T>;
  kernels.activation_backward_wide = activation_backward<T, acc_t<T>>;
}

}  // namespace

// clang-format off
template <> void fill(ActivationKernels<bf16>& kernels) { fill_activations(kernels); }
template <> void fill(ActivationKernels<fp16>& kernels) { fill_activations(kernels); }
template <> void fill(ActivationKernels<float>& kernels) { fill_activations(kernels); }
template <> void fill(ActivationKernels<double>& kernels) { fill_activations(kernels); }
// clang-format on

}  // namespace moe::CPU_CAPABILITY
