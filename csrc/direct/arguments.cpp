#include "direct/arguments.h"

#include <ATen/PythonTorchFunctionTLS.h>
#include <ATen/autocast_mode.h>
#include <c10/core/impl/LocalDispatchKeySet.h>
#include <torch/csrc/jit/frontend/tracer.h>

namespace moe::direct {

namespace {

bool within(c10::DispatchKeySet keys, c10::DispatchKeySet allowed) {
  return (keys.raw_repr() & ~allowed.raw_repr()) == 0;
}

// No mode, transform, autocast or trace wants to see an op.
bool nothing_intercepts() {
  constexpr c10::DispatchKeySet kAlways{c10::DispatchKey::BackendSelect,
                                        c10::DispatchKey::ADInplaceOrView};
  return within(c10::impl::tls_local_dispatch_key_set().included_, kAlways) &&
         !at::impl::torch_function_mode_enabled() && !at::autocast::is_autocast_enabled(at::kCPU) &&
         !torch::jit::tracer::isTracing();
}

// Values in CPU memory, which nothing wraps, conjugates or negates, and no derivative is wanted of.
bool is_plain(const at::Tensor& tensor) {
  constexpr c10::DispatchKeySet kKeys{c10::DispatchKey::CPU, c10::DispatchKey::AutogradCPU,
                                      c10::DispatchKey::ADInplaceOrView,
                                      c10::DispatchKey::AutocastCPU};
  return tensor.defined() && within(tensor.key_set(), kKeys) &&
         !(tensor.requires_grad() && at::GradMode::is_enabled()) && !tensor._fw_grad(0).defined();
}

}  // namespace

Arguments::Arguments(PyObject* const* values, Py_ssize_t count)
    : next_(values), end_(values + count), usual_(nothing_intercepts()) {}

PyObject* Arguments::take() {
  if (next_ != end_) return *next_++;
  usual_ = false;
  return Py_None;
}

at::Tensor Arguments::tensor() {
  PyObject* const value = take();
  // subclasses may mean something else
  if (usual_ && THPVariable_CheckExact(value)) {
    const at::Tensor& tensor = THPVariable_Unpack(value);
    if (is_plain(tensor)) return tensor;
  }
  usual_ = false;
  return {};
}

std::optional<at::Tensor> Arguments::optional_tensor() {
  if (next_ != end_ && *next_ == Py_None) return take(), std::nullopt;
  return tensor();
}

std::string_view Arguments::text() {
  PyObject* const value = take();
  Py_ssize_t size = 0;
  const char* const text = PyUnicode_Check(value) ? PyUnicode_AsUTF8AndSize(value, &size) : nullptr;
  if (text) return {text, static_cast<size_t>(size)};
  PyErr_Clear();
  usual_ = false;
  return {};
}

bool Arguments::flag() {
  PyObject* const value = take();
  usual_ &= value == Py_True || value == Py_False;
  return value == Py_True;
}

int64_t Arguments::integer() {
  PyObject* const value = take();
  int overflow = 1;
  const int64_t integer =
      PyLong_CheckExact(value) ? PyLong_AsLongLongAndOverflow(value, &overflow) : 0;
  usual_ &= overflow == 0;
  return integer;
}

std::optional<int64_t> Arguments::optional_integer() {
  if (next_ != end_ && *next_ == Py_None) return take(), std::nullopt;
  return integer();
}

double Arguments::number() {
  PyObject* const value = take();
  if (PyFloat_CheckExact(value)) return PyFloat_AS_DOUBLE(value);
  const double number = PyLong_CheckExact(value) ? PyLong_AsDouble(value) : -1;
  if (number == -1) {
    PyErr_Clear();
    usual_ = false;
  }
  return number;
}

bool is_routing(const at::Tensor& x, const at::Tensor& topk_ids, const at::Tensor& topk_weights) {
  return x.dim() == 2 && is_float(x) && topk_ids.dim() == 2 && is_index(topk_ids) &&
         is_float(topk_weights) && topk_ids.size(0) == x.size(0) &&
         topk_weights.sizes() == topk_ids.sizes() && topk_ids.numel() < int64_t{1} << 31;
}

bool is_bias(const std::optional<at::Tensor>& bias, const at::Tensor& x, int64_t experts,
             int64_t columns) {
  return !bias || (bias->dim() == 2 && bias->scalar_type() == x.scalar_type() &&
                   bias->size(0) == experts && bias->size(1) == columns);
}

}  // namespace moe::direct
