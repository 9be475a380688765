#include "dispatch/bindings.h"

#include <pybind11/stl.h>
#include <torch/extension.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "dispatch/dispatcher.h"
#include "dispatch/rows.h"

namespace moe::ep {
namespace {

namespace py = pybind11;
using namespace py::literals;
using shm::Communicator;

std::shared_ptr<Communicator> make_communicator(int rank, int size, std::string group) {
  auto communicator = std::make_shared<Communicator>(rank, size, std::move(group));
  // So that Ctrl-C ends a wait.
  communicator->set_interrupt([] {
    const py::gil_scoped_acquire gil;
    if (PyErr_CheckSignals() != 0) throw py::error_already_set();
  });
  return communicator;
}

std::shared_ptr<Dispatcher> new_dispatcher(
    const std::string& group, int64_t rank, int64_t ranks, int64_t experts, double timeout,
    std::shared_ptr<Communicator> shared_memory,
    const std::optional<std::vector<std::vector<int32_t>>>& owners) {
  return make_dispatcher(group, rank, ranks,
                         owners ? Placement(*owners, ranks, rank) : Placement(experts, ranks),
                         timeout, std::move(shared_memory));
}

}  // namespace

void bind(py::module_& m) {
  m.def("set_dispatch_native", &set_native, "native"_a,
        "False: exchange CPU tensors by the steps meant for GPUs. For tests.");

  py::class_<Communicator, std::shared_ptr<Communicator>>(
      m, "SharedMemory", "The memory by which ranks of one machine exchange rows.")
      .def(py::init(&make_communicator), "rank"_a, "size"_a, "group"_a)
      .def_property_readonly("address", &Communicator::address, "Where the other ranks find this.")
      .def("connect", &Communicator::connect, "addresses"_a, "timeout"_a,
           py::call_guard<py::gil_scoped_release>(),
           "Join the ranks at these addresses, in their order, within so many seconds.")
      .def("close", &Communicator::close, "Tell the others that this rank leaves.")
      .def_property_readonly("failure", &Communicator::failure,
                             "Why it is of no further use; empty while it is.")
      .def_property_readonly(
          "reserved_bytes", [](Communicator& c) { return c.heap().reserved(); },
          "The memory in which this rank receives.");

  py::class_<Dispatcher, std::shared_ptr<Dispatcher>>(
      m, "Dispatcher", "A dispatcher as the ops find it: by its name, while this object lives.")
      .def(py::init(&new_dispatcher), "group"_a, "rank"_a, "ranks"_a, "experts"_a, "timeout"_a,
           "shared_memory"_a, "owners"_a)
      .def_readonly("name", &Dispatcher::name)
      .def_readonly("ranks", &Dispatcher::ranks);
  m.def("find_dispatcher", &find_dispatcher, "name"_a);

  m.def(
      "remember_joined",
      [](const std::string& group, std::shared_ptr<Communicator> shared_memory,
         std::string reason) {
        remember_joined(group, {std::move(shared_memory), std::move(reason)});
      },
      "group"_a, "shared_memory"_a, "reason"_a,
      "Keep how the ranks of a group are joined, and why so.");
  m.def(
      "recall_joined",
      [](const std::string& group) -> py::object {
        auto joined = recall_joined(group);
        if (!joined) return py::none();
        return py::make_tuple(joined->shared_memory, joined->reason);
      },
      "group"_a, "What remember_joined has kept, or None.");
  m.def("forget_joined", &forget_joined, "group"_a, py::call_guard<py::gil_scoped_release>(),
        "Drop it, once the group is gone.");
}

}  // namespace moe::ep
