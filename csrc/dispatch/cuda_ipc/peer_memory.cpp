#include "dispatch/cuda_ipc/peer_memory.h"

#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdio>
#include <cstring>
#include <thread>

#include "cuda/regions.h"

namespace moe::ep::ipc {
namespace {

using device::Control;
using device::Fault;
using device::Orders;
using device::Report;
using shm::Message;
using shm::Stage;
using Call = shm::Communicator::Call;

constexpr int64_t kPage = int64_t{1} << 21;
// For a process that has closed its files to be seen to have exited.
constexpr auto kDying = std::chrono::milliseconds(500);
constexpr int kHandleWords = sizeof(Device::Handle) / sizeof(int64_t);

uint64_t read(const uint64_t& word) {
  return std::atomic_ref(const_cast<uint64_t&>(word)).load(std::memory_order_acquire);
}

Message message_of(const Device::Handle& handle, bool good) {
  Message message;
  std::memcpy(message.words, handle.bytes, sizeof(handle.bytes));
  message.words[kHandleWords] = good;
  return message;
}

Device::Handle handle_of(const Message& message) {
  Device::Handle handle;
  std::memcpy(handle.bytes, message.words, sizeof(handle.bytes));
  return handle;
}

std::string capacities_text(const int64_t* header) {
  return std::to_string(header[device::kMaxTokensWord]) + ", " +
         std::to_string(header[kRowsField]) + " and " + std::to_string(header[kSlotsField]);
}

std::string seconds_text(double seconds) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", seconds);
  return text;
}

}  // namespace

PeerMemory::PeerMemory(std::shared_ptr<shm::Communicator> communicator,
                       std::unique_ptr<Device> device, bool emulated, double timeout)
    : communicator_(std::move(communicator)),
      device_(std::move(device)),
      emulated_(emulated),
      timeout_(timeout) {
  if (communicator_->size() > device::kMaxRanks) {
    throw shm::Error("cuda_ipc: there can be at most " + std::to_string(device::kMaxRanks) +
                     " ranks; got " + std::to_string(communicator_->size()));
  }
  Call call(communicator_, "cuda_ipc", timeout);
  // What a machine does not allow is no fault: all ranks learn of it, and go other ways.
  const auto attempt = [&](const auto& f) {
    try {
      if (obstacle_.empty()) f();
    } catch (const shm::Error& error) {
      obstacle_ = error.what();
    }
  };
  const int size = communicator_->size();
  Device::Handle handle;
  attempt([&] {
    char* on_device = nullptr;
    report_ = reinterpret_cast<Report*>(device_->allocate_host(sizeof(Report), &on_device));
    report_on_device_ = reinterpret_cast<Report*>(on_device);
    orders_ = reinterpret_cast<Orders*>(device_->allocate_host(sizeof(Orders), &on_device));
    orders_on_device_ = reinterpret_cast<Orders*>(on_device);
    control_.own = device_->allocate(sizeof(Control), &handle);
  });
  const Message mine = message_of(handle, obstacle_.empty());
  for (int p = 0; p < size; ++p) call.send(p, Stage::kHeader, mine);
  for (int p = 0; p < size; ++p) {
    const Message& theirs = call.receive(p, Stage::kHeader);
    if (!theirs.words[kHandleWords]) continue;
    attempt([&] {
      const bool own = p == communicator_->rank();
      control_.peers.push_back(own ? control_.own : device_->open(handle_of(theirs)));
    });
  }
  call.release_published();
  Message done;
  done.words[0] = obstacle_.empty();
  // Nobody goes on, and away, before all have opened what it made.
  for (int p = 0; p < size; ++p) call.send(p, Stage::kDone, done);
  for (int p = 0; p < size; ++p) {
    if (call.receive(p, Stage::kDone).words[0] || !obstacle_.empty()) continue;
    obstacle_ = communicator_->name_of(p) + " cannot share its GPU's memory, and says why";
  }
  call.finish();
  if (!obstacle_.empty()) return;
  watch_ = std::make_unique<Watch>();
  watch_->thread = std::thread([this] { watch(); });
}

std::vector<char*> PeerMemory::open_all(Call& call, Stage stage, const Device::Handle& handle,
                                        char* own) {
  const Message message = message_of(handle, true);
  for (int p = 0; p < communicator_->size(); ++p) call.send(p, stage, message);
  // A rank that made no memory says why, before others look for what a third has freed since.
  std::vector<Device::Handle> handles;
  for (int p = 0; p < communicator_->size(); ++p) {
    handles.push_back(handle_of(call.receive(p, stage)));
  }
  std::vector<char*> peers;
  for (int p = 0; p < communicator_->size(); ++p) {
    peers.push_back(p == communicator_->rank() ? own : open(p, handles[p]));
  }
  return peers;
}

// What a rank has made goes with it: why it went comes first, and not that it cannot be found.
char* PeerMemory::open(int peer, const Device::Handle& handle) {
  try {
    return device_->open(handle);
  } catch (const shm::Error&) {
    const auto deadline = shm::Clock::now() + kDying;
    std::string trouble;
    while ((trouble = communicator_->trouble_with(peer)).empty()) {
      if (shm::Clock::now() >= deadline) throw;
      std::this_thread::sleep_for(std::chrono::milliseconds(5));
    }
    throw shm::Error("cuda_ipc: " + trouble + " before rank " + std::to_string(rank()) +
                     " could open its memory");
  }
}

void PeerMemory::close_all(const std::vector<char*>& peers) {
  for (int p = 0; p < static_cast<int>(peers.size()); ++p) {
    if (p != communicator_->rank()) device_->close(peers[p]);
  }
}

device::Link PeerMemory::link(Phase phase, int64_t parity_bytes, double timeout, Table* table) {
  if (parity_bytes > parity_bytes_ || parity_bytes_ == 0) grow(phase, parity_bytes, timeout);
  if (device_->is_capturing()) {
    captured_ = true;
    if (table) table->captured = true;
  }
  timeout_ = timeout;
  device::Link link{};
  link.rank = communicator_->rank(), link.ranks = communicator_->size();
  link.phase = static_cast<int>(phase);
  link.timeout = static_cast<uint64_t>(std::clamp(timeout, 0.0, 1e9) * 1e9);
  for (int p = 0; p < link.ranks; ++p) {
    link.controls[p] = reinterpret_cast<Control*>(control_.peers[p]);
    link.staging[p] = staging_.peers[p];
  }
  link.parity_bytes = parity_bytes_;
  link.report = report_on_device_, link.orders = orders_on_device_;
  return link;
}

// A rank that has posted the call that this one is about to begin does not come to make memory.
void PeerMemory::check_unmatched() {
  Control control;
  device_->download(&control, control_.own, sizeof(control));
  for (int p = 0; p < communicator_->size(); ++p) {
    if (p != rank() && control.posts[p].epoch > control.state.epoch) throw Unmatched();
  }
}

// All ranks come here in the same call, for they need the same. What the old memory was for is over
// on all of them once they have met.
void PeerMemory::grow(Phase phase, int64_t parity_bytes, double timeout) {
  const std::string op = to_string(phase);
  agreed_ = device_->is_capturing();  // as far as every rank captures
  TORCH_CHECK(!agreed_, op, ": this call needs more staging memory than there is, which cannot be ",
              "made while a graph is captured. Make a call of these sizes once before.");
  Call call(communicator_, to_string(phase), timeout);
  try {
    device_->synchronize();
    const int64_t bytes =
        parity_bytes == kRefused ? kRefused : device::aligned(parity_bytes, kPage);
    Message mine;
    mine.words[0] = bytes, mine.words[1] = captured_;
    for (int p = 0; p < communicator_->size(); ++p) call.send(p, Stage::kHeader, mine);
    bool keep = false, refused = false;
    std::string refusal;
    for (int p = 0; p < communicator_->size(); ++p) {
      const Message& theirs = call.receive(p, Stage::kHeader, [this] { check_unmatched(); });
      keep = keep || theirs.words[1] != 0;
      if (theirs.words[0] == bytes || !refusal.empty()) continue;
      refused = theirs.words[0] == kRefused;
      refusal =
          op + ": " + communicator_->name_of(p) +
          (refused ? " found an error in its own arguments, so no rank has exchanged anything; its "
                     "message says which"
                   : " needs " + std::to_string(theirs.words[0]) +
                         " bytes of staging memory and rank " +
                         std::to_string(communicator_->rank()) + " " + std::to_string(bytes) +
                         ": the ranks must agree on H, K, the dtypes, max_tokens and capacity");
    }
    call.release_published();
    if (bytes == kRefused || !refusal.empty()) {
      call.finish();
      agreed_ = true;
      TORCH_CHECK_VALUE(bytes == kRefused || refused, refusal);
      TORCH_CHECK(false, refusal);  // the caller that refused has an error of its own to raise
    }
    Device::Handle handle;
    char* const own = device_->allocate(static_cast<size_t>(2 * bytes), &handle);
    Staging before = std::exchange(staging_, {own, open_all(call, Stage::kGrant, handle, own)});
    parity_bytes_ = bytes;
    if (!keep) close_all(before.peers);
    for (int p = 0; p < communicator_->size(); ++p) call.send(p, Stage::kDone, {});
    for (int p = 0; p < communicator_->size(); ++p) call.receive(p, Stage::kDone);
    if (keep && before.own) {
      retired_.push_back(std::move(before));
    } else if (before.own) {
      device_->free(before.own);
    }
    captured_ = false;
  } catch (const c10::Error& error) {
    call.abandon(error.what_without_backtrace());  // unless the ranks have agreed on it
    throw;
  } catch (const Unmatched&) {
    call.finish();
    throw;
  } catch (const std::exception& error) {
    call.abandon(error.what());
    throw;
  }
  call.finish();
}

std::shared_ptr<Table> PeerMemory::table(const std::vector<int32_t>& numbers) {
  const std::lock_guard lock(mutex_);
  for (const auto& known : tables_) {
    if (known->numbers == numbers) return known;
  }
  TORCH_CHECK(!device_->is_capturing(),
              "cuda_ipc: a dispatcher with a placement of its own cannot "
              "be made while a graph is captured. Make it before.");
  std::erase_if(tables_, [&](const auto& known) {
    if (known.use_count() > 1 || known->captured) return false;
    device_->free(known->on_device);
    return true;
  });
  const size_t bytes = numbers.size() * sizeof(int32_t);
  const auto made = std::make_shared<Table>(numbers, device_->allocate(bytes, nullptr));
  tables_.push_back(made);
  device_->upload(made->on_device, numbers.data(), bytes);
  return made;
}

void PeerMemory::settle() {
  if (const auto open = std::exchange(settle_, nullptr)) open();
}

void PeerMemory::check(const char* phase, bool peers) {
  check_open(phase);
  const auto fault = static_cast<Fault>(read(report_->fault));
  const bool first = communicator_->failure().empty();
  if (!first || fault == Fault::kNone) communicator_->check_usable(phase);
  if (fault != Fault::kNone) raise_fault(fault);
  for (int p = 0; peers && p < communicator_->size(); ++p) {
    const std::string trouble = communicator_->trouble_with(p);
    if (trouble.empty()) continue;
    const std::string text = std::string(phase) + ": " + trouble;
    communicator_->fail(text, communicator_->failure_of(p));
    throw shm::Error(text);
  }
  const uint64_t overflows = read(report_->overflows);
  agreed_ = true;
  const uint64_t fresh = overflows - std::exchange(overflows_raised_, overflows);
  TORCH_CHECK(fresh == 0, phase, ": ", fresh, " earlier dispatches in group '", group(),
              "' brought more to a rank than it has room for, up to ",
              read(reinterpret_cast<uint64_t&>(report_->needed_rows)), " rows and ",
              read(reinterpret_cast<uint64_t&>(report_->needed_slots)),
              " slots; what is beyond the capacity of ", report_->capacity, " rows and ",
              report_->slot_capacity, " slots was left out, as if it had no expert. Make the ",
              "dispatchers with capacity and slot_capacity at least so large, on every rank.");
  agreed_ = false;
}

// `call` of the report is over and its host has gone on: what it says is of an earlier call.
void PeerMemory::raise_fault(Fault fault) {
  const Report& report = *report_;
  const auto phase = static_cast<Phase>(report.phase);
  const std::string op = to_string(phase), me = "rank " + std::to_string(rank());
  const std::string peer = communicator_->name_of(static_cast<int>(report.peer));
  const auto culprit = static_cast<int>(report.culprit);
  const std::string where = " while " + me + " waited for its rows in " + op;
  const std::string trouble = communicator_->trouble_with(culprit);
  std::string text = op + ": ";
  switch (fault) {
    case Fault::kLate:
      text += me + " has waited the timeout of " + seconds_text(timeout_) + " s for the rows of " +
              peer + ", which " + communicator_->describe(culprit) + " and has not made call " +
              std::to_string(report.epoch) +
              " of the group. Every rank must make the same calls in the same order.";
      break;
    case Fault::kPeerFailed:
      text += peer + " has given up" + where;
      if (culprit != report.peer) text += ", because of " + communicator_->name_of(culprit);
      if (!trouble.empty()) text += "; " + trouble;
      break;
    case Fault::kGone:
      text += (trouble.empty() ? communicator_->failure() : trouble) + where;
      break;
    case Fault::kRefused:
      text += peer +
              " found an error in its own arguments, so no rank has exchanged anything; its "
              "message says which";
      break;
    case Fault::kInvalidSlot:
      text += "topk_ids must be in [-1, E]; an earlier call got another at slot " +
              std::to_string(report.slot) + " (token * K + k)";
      break;
    case Fault::kHandle:
      text += "the handle must be that of a dispatch by the same dispatcher";
      break;
    default:
      break;
  }
  if (fault == Fault::kMismatch) {
    Header mine, theirs;
    std::copy_n(report.mine, kFields, mine.begin());
    std::copy_n(report.theirs, kFields, theirs.begin());
    std::vector<Header> all(communicator_->size(), mine), others = all;
    others[report.peer] = theirs;
    try {
      agree(phase, group(), rank(), all, others);
      text += "the ranks of group '" + group() +
              "' must agree on max_tokens, capacity and slot_capacity; " + me + " has " +
              capacities_text(report.mine) + " and " + peer + " " + capacities_text(report.theirs);
    } catch (const c10::Error& error) {
      text = error.what_without_backtrace();
    }
  }
  communicator_->fail(text, fault == Fault::kPeerFailed ? communicator_->failure_of(culprit) : "");
  TORCH_CHECK_VALUE(fault != Fault::kMismatch && fault != Fault::kHandle, text);
  TORCH_CHECK_INDEX(fault != Fault::kInvalidSlot, text);
  TORCH_CHECK(fault != Fault::kRefused, text);
  throw shm::Error(text);
}

}  // namespace moe::ep::ipc
