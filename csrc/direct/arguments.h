// Ops called from Python without the Python of their op layer.
//
// That layer checks arguments, and PyTorch's own way from Python to an op turns every argument into
// a boxed value: of a call with one token they are most of the time. Here usual arguments are read
// and checked in C++, and the op is called by its dispatcher, as from any C++. Whatever is not
// usual (another device, a gradient wanted, a mode, an argument that does not fit) makes the call
// return None, and the Python layer does it, or says what is wrong.
#pragma once

#include <ATen/core/LegacyTypeDispatch.h>
#include <ATen/core/dispatch/Dispatcher.h>
#include <torch/csrc/Exceptions.h>
#include <torch/csrc/autograd/python_variable.h>

#include <new>
#include <optional>
#include <string_view>

namespace moe::direct {

// The arguments of one call, read in their order. One that is not what is asked for spoils all.
class Arguments {
 public:
  Arguments(PyObject* const* values, Py_ssize_t count);

  // A strided CPU tensor that no gradient is wanted of; undefined if it is not. A reference of its
  // own: without the interpreter's lock other threads may swap what the Python object holds.
  at::Tensor tensor();
  std::optional<at::Tensor> optional_tensor();
  std::string_view text();
  bool flag();
  int64_t integer();
  std::optional<int64_t> optional_integer();
  double number();

  // Whether all were read, as what was asked for, and an op called now does no more than run its
  // kernel: there is no mode, transform, autocast or trace.
  bool usual() const { return usual_ && next_ == end_; }

 private:
  PyObject* take();

  PyObject* const* next_;
  PyObject* const* end_;
  bool usual_;
};

inline bool is_float(const at::Tensor& tensor) {
  const at::ScalarType dtype = tensor.scalar_type();
  return dtype == at::kBFloat16 || dtype == at::kHalf || dtype == at::kFloat ||
         dtype == at::kDouble;
}

inline bool is_index(const at::Tensor& tensor) {
  return tensor.scalar_type() == at::kInt || tensor.scalar_type() == at::kLong;
}

// x [T, H], topk_ids and topk_weights [T, K], with T * K below 2^31.
bool is_routing(const at::Tensor& x, const at::Tensor& topk_ids, const at::Tensor& topk_weights);

// Whether bias, where there is one, is [E, columns] in x's dtype.
bool is_bias(const std::optional<at::Tensor>& bias, const at::Tensor& x, int64_t experts,
             int64_t columns);

template <typename Schema>
c10::TypedOperatorHandle<Schema> find_op(const char* name) {
  return c10::Dispatcher::singleton().findSchemaOrThrow(name, "").typed<Schema>();
}

// f() without the interpreter's lock, and with ops below autograd: nothing wants a gradient.
template <typename F>
auto run(const F& f) {
  const pybind11::gil_scoped_release released;
  const at::AutoDispatchBelowAutograd below;
  return f();
}

// f(), or its exception as the one that the op raises by way of Python.
template <typename F>
PyObject* guarded(const F& f) {
  HANDLE_TH_ERRORS
  try {
    return f();
  } catch (const std::bad_alloc& error) {  // a RuntimeError to torch, and not to pybind11
    PyErr_SetString(PyExc_MemoryError, error.what());
    return nullptr;
  }
  END_HANDLE_TH_ERRORS
}

// Methods of the module; the files of their names say what they take. They return None, or what the
// op does: of fused_experts the first output.
PyObject* fused_experts(PyObject* module, PyObject* const* values, Py_ssize_t count);
PyObject* fused_experts_quantized(PyObject* module, PyObject* const* values, Py_ssize_t count);
PyObject* topk_router(PyObject* module, PyObject* const* values, Py_ssize_t count);

}  // namespace moe::direct
