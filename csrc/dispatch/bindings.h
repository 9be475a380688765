#pragma once

#include <pybind11/pybind11.h>

namespace moe::ep {

// The classes of dispatchers, for moe_parallel.dispatch.
void bind(pybind11::module_& m);

}  // namespace moe::ep
