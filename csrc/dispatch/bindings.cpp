#include "dispatch/bindings.h"

#include <pybind11/stl.h>
#include <sys/syscall.h>
#include <torch/csrc/utils/pybind.h>
#include <unistd.h>

#include <memory>
#include <optional>
#include <utility>
#include <vector>

#include "dispatch/cuda_ipc/emulated_device.h"
#include "dispatch/dispatcher.h"
#include "dispatch/meeting.h"
#include "dispatch/rows.h"

namespace moe::ep {
namespace {

namespace py = pybind11;
using namespace py::literals;
using ipc::PeerMemory;
using shm::Communicator;

// So that Ctrl-C ends a wait of the main thread, which alone gets signals. Others must not ask for
// the interpreter's lock: had it begun to end, it would end them there and then.
void check_signals() {
  if (::syscall(SYS_gettid) != ::getpid()) return;
#if PY_VERSION_HEX >= 0x030d0000
  if (Py_IsFinalizing()) return;
#else
  if (_Py_IsFinalizing()) return;
#endif
  const py::gil_scoped_acquire gil;
  if (PyErr_CheckSignals() != 0) throw py::error_already_set();
}

std::shared_ptr<Communicator> make_communicator(int rank, int size, std::string group) {
  auto communicator = std::make_shared<Communicator>(rank, size, std::move(group));
  communicator->set_interrupt(check_signals);
  return communicator;
}

std::shared_ptr<Dispatcher> new_dispatcher(
    const std::string& group, int64_t number, int64_t rank, int64_t ranks, int64_t experts,
    double timeout, std::shared_ptr<Communicator> shared_memory,
    const std::optional<std::vector<std::vector<int32_t>>>& owners,
    std::shared_ptr<PeerMemory> peer_memory, int64_t max_tokens, int64_t capacity,
    int64_t slot_capacity, bool gpus_alone) {
  Placement placement = owners ? Placement(*owners, ranks, rank) : Placement(experts, ranks);
  OnGpus on_gpus = make_on_gpus(std::move(peer_memory), placement, max_tokens, capacity,
                                slot_capacity, gpus_alone);
  return make_dispatcher(group, number, rank, ranks, std::move(placement), timeout,
                         std::move(shared_memory), std::move(on_gpus));
}

std::shared_ptr<PeerMemory> make_peer_memory(std::shared_ptr<Communicator> communicator,
                                             std::optional<int> device, double timeout) {
  std::unique_ptr<ipc::Device> on;
  if (device) {
    on = ipc::make_cuda_device(*device);
  } else {
    on = ipc::make_emulated_device();
  }
  return std::make_shared<PeerMemory>(std::move(communicator), std::move(on), !device, timeout);
}

int64_t emulate_capture(PeerMemory& memory, bool capturing) {
  auto* const device = dynamic_cast<ipc::EmulatedDevice*>(&memory.device());
  TORCH_CHECK(device, "emulate_capture: this is a CUDA device, which captures by itself");
  device->capture(capturing);
  return device->forbidden();
}

// Whether GPUs that read each other's memory carry tensors of a kind of device.
bool has_fixed_sizes(const Dispatcher& dispatcher, const std::string& device_type) {
  const auto& memory = dispatcher.on_gpus.memory;
  return memory && device_type == (memory->emulated() ? "cpu" : "cuda");
}

std::tuple<int64_t, int64_t, int64_t> fixed_sizes(const Dispatcher& dispatcher, int64_t top_k) {
  const OnGpus& gpus = dispatcher.on_gpus;
  return {gpus.capacity, gpus.slots(top_k), gpus.plan_words(dispatcher.ranks)};
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
      .def(
          "close", [](Communicator& c) { c.close(); }, py::call_guard<py::gil_scoped_release>(),
          "Tell the others that this rank leaves.")
      .def_property_readonly("failure", &Communicator::failure,
                             "Why it is of no further use; empty while it is.")
      .def_property_readonly(
          "reserved_bytes", [](Communicator& c) { return c.heap().reserved(); },
          "The memory in which this rank receives.");

  py::class_<PeerMemory, std::shared_ptr<PeerMemory>>(
      m, "PeerMemory", "The memory by which GPUs of one machine exchange rows.")
      .def(py::init(&make_peer_memory), "shared_memory"_a, "device"_a, "timeout"_a,
           py::call_guard<py::gil_scoped_release>(),
           "By all ranks together. device: its number for CUDA; None for a stand-in on the CPU, by "
           "which tests run the device code.")
      .def_property_readonly("obstacle", &PeerMemory::obstacle,
                             "Why it cannot be used, on any rank; empty if it can.")
      .def_property_readonly("reserved_bytes", &PeerMemory::reserved,
                             "Staging memory of this rank.")
      .def_property_readonly("tables", &PeerMemory::tables,
                             "The placements that are in the device's memory.")
      .def("close", &PeerMemory::close, py::call_guard<py::gil_scoped_release>(),
           "End the use of it, when the group is gone.")
      .def("emulate_capture", &emulate_capture, "capturing"_a,
           "For tests, on the CPU: as if a graph were captured, or no longer. Returns how often so "
           "far something was asked for that CUDA does not allow then.");
  m.def("cuda_bus_id", &ipc::bus_id_of_cuda_device, "device"_a,
        "How other processes know a GPU. RuntimeError where this build has no CUDA.");
  m.def("cuda_peer_obstacle", &ipc::cuda_peer_obstacle, "device"_a, "bus_ids"_a,
        "Why a GPU cannot reach those of other processes; empty if it can.");

  py::class_<Dispatcher, std::shared_ptr<Dispatcher>>(
      m, "Dispatcher", "A dispatcher as the ops find it: by its name, while this object lives.")
      .def(py::init(&new_dispatcher), "group"_a, "number"_a, "rank"_a, "ranks"_a, "experts"_a,
           "timeout"_a, "shared_memory"_a, "owners"_a, "peer_memory"_a = nullptr,
           "max_tokens"_a = 0, "capacity"_a = 0, "slot_capacity"_a = 0, "gpus_alone"_a = false,
           py::call_guard<py::gil_scoped_release>())
      .def("has_fixed_sizes", &has_fixed_sizes, "device_type"_a,
           "Whether what a dispatch of such tensors brings has the same size each time.")
      .def("fixed_sizes", &fixed_sizes, "top_k"_a,
           "Then: rows and slots that arrive, and words of the plan.")
      .def(
          "check",
          [](const Dispatcher& dispatcher) {
            if (dispatcher.on_gpus.memory) dispatcher.on_gpus.check();
          },
          py::call_guard<py::gil_scoped_release>(),
          "Wait for this rank's GPU, and raise what it has reported.")
      .def(
          "trim",
          [](const Dispatcher& dispatcher) {
            return dispatcher.shared_memory ? dispatcher.shared_memory->trim() : int64_t{0};
          },
          py::call_guard<py::gil_scoped_release>(),
          "Give receiving memory without rows back to the system; returns the bytes.")
      .def_readonly("name", &Dispatcher::name)
      .def_readonly("ranks", &Dispatcher::ranks);
  m.def(
      "meet",
      [](const std::string& group, const std::string& key, const std::string& value, double seconds,
         double more) {
        Met met = meet(group, key, value, seconds, more, check_signals);
        return std::tuple(std::move(met.values), std::move(met.missing), std::move(met.problem));
      },
      "group"_a, "key"_a, "value"_a, "seconds"_a, "more"_a,
      py::call_guard<py::gil_scoped_release>(),
      "What each rank says under a key by the group's store; or the ranks that did not come within "
      "so many seconds, or why the store does not answer, for which it has some more.");
  m.def("find_dispatcher", &find_dispatcher, "name"_a);
  m.def("begin_dispatcher", &begin_dispatcher, "group"_a,
        "The number of the next dispatcher of a group, whether or not it can be made.");
  m.def("begun_dispatchers", &begun_dispatchers, "group"_a, "How many there are.");
  m.def("agree_on_dispatchers", &agree_on_dispatchers, "group"_a, "begun"_a,
        "The most of any rank; the dispatcher that is being made is the last of them.");

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
  m.def("remember_peer_memory", &remember_peer_memory, "group"_a, "peer_memory"_a, "reason"_a,
        "Keep how the GPUs of a group's ranks are joined, or None, and why so.");
  m.def(
      "recall_peer_memory",
      [](const std::string& group) -> py::object {
        auto joined = recall_joined(group);
        if (!joined || joined->peer_reason.empty()) return py::none();
        return py::make_tuple(joined->peer_memory, joined->peer_reason);
      },
      "group"_a, "What remember_peer_memory has kept, or None.");
  m.def("forget_joined", &forget_joined, "group"_a, py::call_guard<py::gil_scoped_release>(),
        "Drop it, once the group is gone.");
  m.def("leave_groups", &leave_groups, "at_most"_a, "last"_a,
        py::call_guard<py::gil_scoped_release>(),
        "At the end of the process: wait until no other rank reads memory of this one's GPU, for "
        "the timeout or so many seconds. What then still goes on is ended if it is the last call.");
  m.def("leave_groups_at_exit", &leave_groups_at_exit,
        "Have exit() make that last call, by its status. False if the system cannot.");
}

}  // namespace moe::ep
