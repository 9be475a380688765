// The functions of the instruction set in use.
#pragma once

#include <tuple>

#include "cpu/kernels.h"

namespace moe {

template <typename T>
using KernelsOf =
    std::tuple<RowKernels<T>, ActivationKernels<T>, GemmKernels<T>, WeightGradKernels<T>>;

using KernelTable = decltype(std::tuple_cat(
    std::tuple<QuantizingKernels<bf16>, QuantizingKernels<fp16>, QuantizingKernels<float>,
               QuantizingKernels<double>>{},
    KernelsOf<bf16>{}, KernelsOf<fp16>{}, KernelsOf<float>{}, KernelsOf<double>{},
    std::tuple<ScoreKernels<float>, ScoreKernels<double>>{},
    std::tuple<QuantizedKernels<bf16>, QuantizedKernels<fp16>, QuantizedKernels<float>>{}));

const KernelTable& kernel_table();

// kernels<RowKernels<float>>().dot(...)
template <typename Kernels>
const Kernels& kernels() {
  return std::get<Kernels>(kernel_table());
}

}  // namespace moe
