// The Python module moe_kernels._C. Ops register themselves with PyTorch's dispatcher in their own
// files (TORCH_LIBRARY_IMPL); only classes and plain functions are bound here.
#include "dispatch/bindings.h"

#include <torch/csrc/utils/pybind.h>

#include "build_info.h"
#include "cpu/amx.h"
#include "cpu/capability.h"
#include "cpu/large_buffers.h"
#include "cpu/large_pages.h"
#include "direct/arguments.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  using namespace py::literals;
  py::dict info("version"_a = MOE_KERNELS_VERSION, "torch"_a = MOE_KERNELS_TORCH_VERSION,
                "compiler"_a = MOE_KERNELS_COMPILER, "cuda"_a = py::none(),
                "cuda_architectures"_a = py::list(), "amx_emulated"_a = moe::amx_emulated());
#ifdef MOE_KERNELS_WITH_CUDA
  info["cuda"] = MOE_KERNELS_CUDA_VERSION;
  info["cuda_architectures"] = py::str(MOE_KERNELS_CUDA_ARCHITECTURES).attr("split")(";");
#endif
  return info;
}

// pybind11 would take longer to read their arguments than they do.
PyMethodDef direct_calls[] = {
    {"fused_experts", _PyCFunction_CAST(moe::direct::fused_experts), METH_FASTCALL,
     "moe_kernels::fused_experts on usual arguments, else None; see csrc/direct/arguments.h."},
    {"fused_experts_quantized", _PyCFunction_CAST(moe::direct::fused_experts_quantized),
     METH_FASTCALL, "moe_kernels::fused_experts_quantized on usual arguments, else None."},
    {"topk_router", _PyCFunction_CAST(moe::direct::topk_router), METH_FASTCALL,
     "moe_kernels::topk_router on usual arguments, else None."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Native kernels of moe_kernels.";
  m.def(
      "build_info", &build_info,
      "What this library was built with: version, torch, compiler, cuda (the toolkit's version, or "
      "None), cuda_architectures, and amx_emulated (True in builds for tests alone).");
  m.def("cpu_capabilities", &moe::cpu_capabilities,
        "The instruction sets of the CPU kernels that this processor has, weakest first.");
  m.def("cpu_capability", &moe::cpu_capability,
        "The one in use: the strongest, or the one MOE_KERNELS_CPU_CAPABILITY names.");
  m.def("set_cpu_capability", &moe::set_cpu_capability, py::arg("name"),
        "Use another one from now on. For tests: kernels that run meanwhile may use either.");
  m.def("free_kept_buffers", &moe::free_kept_buffers,
        "Give kept buffers back to the system; returns how many bytes they had.");
  m.def("use_large_pages", &moe::use_large_pages, py::arg("tensor"),
        "Move a tensor's memory to large pages; returns how many bytes are on such pages now.");
  m.def("has_record_callbacks", &at::hasCallbacks,
        "Whether a profiler or another observer is told of each op.");
  if (PyModule_AddFunctions(m.ptr(), direct_calls) != 0) throw py::error_already_set();
  moe::ep::bind(m);
}
