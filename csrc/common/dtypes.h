// From a tensor's dtype to the element type of a kernel.
#pragma once

#include <ATen/core/Tensor.h>

#include "cpu/types.h"

namespace moe {

// f.template operator()<T>() with T the element type of a float dtype.
template <typename F>
decltype(auto) dispatch_float(at::ScalarType dtype, const char* op, F&& f) {
  switch (dtype) {
    case at::kBFloat16:
      return f.template operator()<bf16>();
    case at::kHalf:
      return f.template operator()<fp16>();
    case at::kFloat:
      return f.template operator()<float>();
    case at::kDouble:
      return f.template operator()<double>();
    default:
      TORCH_CHECK_TYPE(false, op, ": expected bfloat16, float16, float32 or float64; got ", dtype);
  }
}

template <typename F>
decltype(auto) dispatch_index(at::ScalarType dtype, const char* op, F&& f) {
  switch (dtype) {
    case at::kInt:
      return f.template operator()<int32_t>();
    case at::kLong:
      return f.template operator()<int64_t>();
    default:
      TORCH_CHECK_TYPE(false, op, ": expected int32 or int64; got ", dtype);
  }
}

template <typename T>
constexpr at::ScalarType scalar_type() {
  if constexpr (std::is_same_v<T, bf16>) return at::kBFloat16;
  if constexpr (std::is_same_v<T, fp16>) return at::kHalf;
  if constexpr (std::is_same_v<T, float>) return at::kFloat;
  if constexpr (std::is_same_v<T, double>) return at::kDouble;
  if constexpr (std::is_same_v<T, int32_t>) return at::kInt;
  if constexpr (std::is_same_v<T, int64_t>) return at::kLong;
}

inline at::ScalarType accumulate_dtype(at::ScalarType dtype) {
  return dtype == at::kDouble ? at::kDouble : at::kFloat;
}

template <typename T>
const T* data(const at::Tensor& tensor) {
  return static_cast<const T*>(tensor.const_data_ptr());
}

template <typename T>
T* mutable_data(const at::Tensor& tensor) {
  return static_cast<T*>(tensor.mutable_data_ptr());
}

// The tensor itself, or a copy whose last dimension has unit stride.
inline at::Tensor with_unit_stride(const at::Tensor& tensor) {
  return tensor.stride(-1) == 1 || tensor.size(-1) <= 1 ? tensor : tensor.contiguous();
}

}  // namespace moe
