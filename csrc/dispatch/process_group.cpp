// The transport `process_group`: all-to-all through c10d, on any of its backends.
#include <ATen/ATen.h>
#include <c10/core/Event.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <c10/util/Exception.h>
#include <c10/util/StringUtil.h>
#include <torch/version.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cmath>
#include <exception>
#include <optional>
#include <sstream>
#include <thread>
#include <torch/csrc/distributed/c10d/Backend.hpp>
#include <torch/csrc/distributed/c10d/GroupRegistry.hpp>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/Work.hpp>
#include <utility>

#include "dispatch/causes.h"
#include "dispatch/dispatcher.h"
#include "dispatch/errors.h"
#include "dispatch/notices.h"
#include "dispatch/rows.h"

namespace moe::ep {
namespace {

using at::Tensor;

// Without the stack of c10's errors, which Python shows for the error that is raised.
std::string reason(const std::exception& error) {
  const auto* const known = dynamic_cast<const c10::Error*>(&error);
  return known ? known->what_without_backtrace() : error.what();
}

c10::Stream current_stream(const Tensor& tensor) {
  return c10::impl::VirtualGuardImpl(tensor.device().type()).getStream(tensor.device());
}

// For a tensor that may have been made on another stream than it is used on, and freed after that.
void use_on_current_stream(const Tensor& tensor) {
  if (!tensor.is_cpu()) tensor.record_stream(current_stream(tensor));
}

// Rows of any dtype as integers, for no backend knows all dtypes; as the widest that divide a row,
// for MPI counts them in 32 bits.
Tensor as_integers(const Tensor& rows) {
  const int64_t bytes = rows.size(1) * rows.element_size();
  const auto fits = [&](int64_t size) { return bytes > 0 && bytes % size == 0; };
  return rows.view(fits(8) ? at::kLong : fits(4) ? at::kInt : at::kByte);
}

c10::intrusive_ptr<c10d::ProcessGroup> group_of(Phase phase, const std::string& name) {
  try {
    return c10d::resolve_process_group(name);
  } catch (const c10::Error&) {
    TORCH_CHECK_WITH(DistBackendError, false, to_string(phase), ": group '", name,
                     "' has been destroyed. Make a group, and a dispatcher for it.");
  }
}

// One call of an op.
class Exchange {
 public:
  Exchange(Phase phase, DispatcherRef dispatcher)
      : phase_(phase),
        owner_(std::move(dispatcher)),
        dispatcher_(*owner_),
        group_(group_of(phase, dispatcher_.group)),
        notices_(notices_of(group_)),
        timeout_(static_cast<int64_t>(std::ceil(dispatcher_.timeout * 1000))) {
    check_process();
    for (const std::string& cause : {dispatcher_.failure.get(), notices_->failure()}) {
      TORCH_CHECK_WITH(
          DistBackendError, cause.empty(), to_string(phase), ": this dispatcher of group '",
          dispatcher_.group,
          "' is of no use after an error; start the ranks again. The first error was: ", cause);
    }
    notices_->settle(*group_, to_string(phase), timeout_);
  }

  // The threads and connections of the group are those of the rank. From a fork nothing is sent,
  // and nothing comes.
  void check_process() const {
    const bool forked =
        dispatcher_.process != ::getpid() || notices_->processes.own()[0] != ::getpid();
    TORCH_CHECK_WITH(DistBackendError, !forked, to_string(phase_),
                     ": this process is a fork of rank ", dispatcher_.rank, " of group '",
                     dispatcher_.group,
                     "', which alone can use its dispatchers. Make a process group here.");
  }

  // An exchange under way. It keeps its tensors; the group does too, should it be dropped.
  class Pending {
   public:
    // Blocks the CPU, or the current CUDA stream. DistBackendError where the exchange fails.
    void wait() const {
      exchange->check_process();
      const auto left = wait_for_notices();
      // Where work runs on a stream, waiting with a time limit would block the host: there the
      // watchdog of the backend applies the limit given to the call.
      const bool limited =
          (output.is_cpu() || exchange->goes_by_mpi(output)) && exchange->timeout_.count() > 0;
      try {
        TORCH_CHECK(limited ? work->wait(left) : work->wait(), "the work was aborted");
      } catch (const std::exception& error) {
        exchange->fail(what, reason(error));
      }
      use_on_current_stream(output);
      if (exchange->waits_on_host(output)) exchange->notices_->end(exchange->place_);
    }

   private:
    friend class Exchange;

    // Until the work is over or the time is up; raises if another rank has said that it will never
    // be. Returns what is left of the time limit.
    std::chrono::milliseconds wait_for_notices() const {
      using std::chrono::milliseconds;
      using Clock = std::chrono::steady_clock;
      Notices& notices = *exchange->notices_;
      const milliseconds limit = exchange->timeout_;
      if (!exchange->waits_on_host(output)) return limit;
      for (const auto begin = Clock::now();;) {
        const auto since = std::chrono::duration_cast<milliseconds>(Clock::now() - begin);
        const milliseconds left = std::max(limit - since, milliseconds(1));
        if (work->isCompleted() || (limit.count() > 0 && since >= limit)) return left;
        const auto slice = limit.count() > 0 ? std::min(Notices::kMoment, left) : Notices::kMoment;
        const auto before = Clock::now();
        try {
          work->wait(slice);
          return left;
        } catch (const std::exception&) {
          // With an error of its own, or a backend that knows no limit.
          if (work->isCompleted() || Clock::now() - before < slice / 2) return left;
        }
        notices.look(*exchange->group_, to_string(exchange->phase_));
      }
    }

    const Exchange* exchange;
    const char* what;
    c10::intrusive_ptr<c10d::Work> work;
    Tensor input, output;
  };

  // Fills `output` with the rows that the ranks send, `received` of them, and sends `input`'s.
  // Both are contiguous and may hold any dtype; `output` is new.
  Pending start(const char* what, const Tensor& output, const Tensor& input,
                std::vector<int64_t> received, std::vector<int64_t> sent) const {
    check_carried(input.device());
    Pending pending;
    pending.exchange = this;
    pending.what = what;
    const bool aligned = input.storage_offset() * input.element_size() % 8 == 0;
    pending.output = as_integers(output);
    pending.input = as_integers(aligned ? input : input.clone());
    c10d::AllToAllOptions options;
    if (timeout_.count() > 0) options.timeout = timeout_;
    try {
      // MPI reads and writes at once, whatever the stream has still to do.
      if (!input.is_cpu() && goes_by_mpi(input)) current_stream(input).synchronize();
#if TORCH_VERSION_MAJOR > 2 || TORCH_VERSION_MINOR >= 13
      pending.work =
          group_->all_to_all_single(pending.output, pending.input, received, sent, options);
#else
      pending.work = group_->alltoall_base(pending.output, pending.input, received, sent, options);
#endif
    } catch (const std::exception& error) {
      fail(what, reason(error));
    }
    return pending;
  }

  struct Headers {
    Tensor mine, theirs;
    Pending pending;
  };
  // counts [P, 2] int64: rows and slots for each rank. refused: int64 scalar, 1 for an error in
  // this rank's arguments. A line for each rank: the header, and the process that this one is.
  Headers send_headers(const Terms& terms, const Tensor& counts, const Tensor& refused) const {
    const Header header = make_header(phase_, terms, false);
    Headers headers;
    const Process& process = notices_->processes.own();
    std::vector<int64_t> line(header.begin(), header.end());
    line.insert(line.end(), process.begin(), process.end());
    static_assert(kFields + std::tuple_size_v<Process> <= kLineWords);
    line.resize(kLineWords, 0);
    headers.mine = beside(counts, at::tensor(line, at::kLong)).repeat({dispatcher_.ranks, 1});
    headers.mine.select(1, kRefusedField).copy_(refused);
    headers.mine.narrow(1, kRowsField, 2).copy_(counts);
    headers.theirs = at::empty_like(headers.mine);
    const std::vector<int64_t> one(dispatcher_.ranks, 1);
    headers.pending = start("token counts", headers.theirs, headers.mine, one, one);
    return headers;
  }

  // Waits for the headers, copies them to the host at once, and raises unless all ranks agree.
  Tally read_headers(Headers headers) const {
    headers.pending.wait();
    const Tensor on_device = at::stack({headers.mine, headers.theirs});
    wait_for_device(on_device);
    const Tensor both = on_device.cpu().contiguous();
    const int64_t ranks = dispatcher_.ranks;
    std::vector<Header> mine(ranks), theirs(ranks);
    std::vector<Process> processes(ranks);
    const auto* line = both.const_data_ptr<int64_t>();
    for (int64_t i = 0; i < 2 * ranks; ++i, line += both.size(2)) {
      std::copy_n(line, kFields, i < ranks ? mine[i].begin() : theirs[i - ranks].begin());
      if (i < ranks) continue;
      std::copy_n(line + kFields, std::tuple_size_v<Process>, processes[i - ranks].begin());
    }
    const Tally tally = agree(phase_, dispatcher_.group, dispatcher_.rank, mine, theirs);
    notices_->processes.learn(std::move(processes));
    if (phase_ == Phase::kDispatch && !tally.refused) notices_->dispatched(tally.dispatch);
    return tally;
  }

  // Begins with f() all that the ranks have agreed on. Where this one cannot, as when its memory is
  // full, the others are told: what it began after that would meet what they have begun.
  template <typename F>
  auto start_all(const F& f) const {
    try {
      return f();
    } catch (const std::exception& error) {
      if (!dispatcher_.failure.get().empty() || !notices_->failure().empty()) throw;
      std::ostringstream text;
      text << "rank " << dispatcher_.rank << " of group '" << dispatcher_.group
           << "' could not begin what the ranks had agreed on: " << reason(error);
      notices_->break_off(*group_, text.str());
      throw;
    }
  }

  // Headers of the phases whose sizes the dispatch has settled: ranks that name the same dispatch
  // of their group have its plan. `check` reads the plan and raises for wrong arguments. Where
  // `like` is on CUDA there are no headers: reading them would make the host wait for the device.
  // There the others find a notice of what check() has raised. By MPI the host waits in any case,
  // and there is no store for notices.
  template <typename Check>
  void agree_on(Terms terms, const Tensor& like, const Plan& plan, const Check& check) {
    if (!is_native(like) && !goes_by_mpi(like)) {
      try {
        check();
      } catch (...) {
        notices_->refuse(*group_);
        throw;
      }
      place_ = notices_->begin();
      return;
    }
    const auto refusal = caught(check);
    terms.dispatch = plan.dispatch;
    const Tensor refused = at::tensor(static_cast<int64_t>(refusal != nullptr), at::kLong);
    const auto on_device = at::device(like.device()).dtype(at::kLong);
    auto headers = send_headers(terms, at::zeros({dispatcher_.ranks, 2}, on_device), refused);
    if (refusal) {
      headers.pending.wait();
      std::rethrow_exception(refusal);
    }
    read_headers(std::move(headers));
  }

 private:
  bool carries(at::Device device) const {
    const auto carried = group_->getDeviceTypes();
    const auto fits = [&](at::Device other) { return other.type() == device.type(); };
    return carried.empty() || std::any_of(carried.begin(), carried.end(), fits);
  }

  void check_carried(at::Device device) const {
    const auto carried = group_->getDeviceTypes();
    TORCH_CHECK_VALUE(carries(device), to_string(phase_), ": group '", dispatcher_.group,
                      "' must have a backend for tensors on ", device.type(), "; it has them for [",
                      c10::Join(", ", carried),
                      "]. Make it with another, as 'cpu:gloo,cuda:nccl', or move the tensors.");
  }

  bool goes_by(const char* backend, const Tensor& tensor) const {
    const at::Device device = tensor.device();
    return carries(device) && group_->getBackend(device.type())->getBackendName() == backend;
  }
  bool goes_by_mpi(const Tensor& tensor) const { return goes_by("mpi", tensor); }

  // Whether the host waits for the work that fills a tensor, and not a stream.
  bool waits_on_host(const Tensor& tensor) const {
    return tensor.is_cpu() || goes_by("gloo", tensor) || goes_by_mpi(tensor);
  }

  // Until the stream has come so far, or another rank has said that it will not.
  void wait_for_device(const Tensor& tensor) const {
    if (tensor.is_cpu() || !notices_->may_concern()) return;
    c10::Event event(tensor.device().type());
    event.record(current_stream(tensor));
    const auto begin = std::chrono::steady_clock::now();
    auto looked = begin;
    while (!event.query()) {
      const auto now = std::chrono::steady_clock::now();
      if (now - looked >= Notices::kMoment) {
        notices_->look(*group_, to_string(phase_));
        looked = now;
      }
      // At first as a wait for the device would.
      if (now - begin > std::chrono::milliseconds(10)) {
        std::this_thread::sleep_for(std::chrono::microseconds(50));
      }
    }
  }

  [[noreturn]] void fail(const char* what, const std::string& reason) const {
    std::ostringstream text;
    text << to_string(phase_) << ": the exchange of " << what << " failed on rank "
         << dispatcher_.rank << " of " << dispatcher_.ranks << " in group '" << dispatcher_.group
         << "': " << find_cause(*notices_, *group_, to_string(phase_), dispatcher_.number)
         << ". The backend says: " << reason;
    dispatcher_.failure.set(text.str());
    TORCH_CHECK_WITH(DistBackendError, false, text.str());
  }

  Phase phase_;
  DispatcherRef owner_;
  const Dispatcher& dispatcher_;
  c10::intrusive_ptr<c10d::ProcessGroup> group_;
  std::shared_ptr<Notices> notices_;
  std::chrono::milliseconds timeout_;
  Notices::Place place_;  // of an exchange without headers
};

Ending<Arrived> dispatch(const DispatcherRef& owner, const Tokens& brought) {
  const auto& [x, topk_ids, topk_weights, extra] = brought;
  const Dispatcher& dispatcher = *owner;
  const auto shared = std::make_shared<const Exchange>(Phase::kDispatch, owner);
  const Exchange& exchange = *shared;
  const int64_t ranks = dispatcher.ranks;

  std::exception_ptr refusal;
  Layout layout;
  try {
    check_dispatch(brought);
    layout = make_layout(topk_ids, dispatcher.placement, ranks);
  } catch (...) {
    refusal = std::current_exception();
    layout.counts = at::zeros({ranks, 2}, x.options().dtype(at::kLong));
    layout.bad = at::ones({}, layout.counts.options());
  }
  const Terms terms = refusal ? terms_of(dispatcher) : terms_of(dispatcher, brought);
  auto headers = exchange.send_headers(terms, layout.counts, layout.bad);
  if (refusal) {
    headers.pending.wait();
    std::rethrow_exception(refusal);
  }
  Tensor rows, routing, extra_rows;
  const auto pack = [&](const std::vector<int64_t>& rows_by_rank) {
    const auto first = first_rows(rows_by_rank);
    rows = pack_rows(brought.x, layout.slot_rows, first);
    if (brought.extra) extra_rows = pack_rows(as_bytes(*brought.extra), layout.slot_rows, first);
    routing =
        pack_routing(brought.ids, brought.weights, layout.slot_rows, first, dispatcher.placement);
  };
  // On the CPU while the headers travel. On CUDA the sizes come with them: reading them is the one
  // time that the host waits for the device.
  std::exception_ptr full;
  if (is_native(x)) {
    const Tensor counts = layout.counts.select(1, 0).contiguous();
    const auto* const data = counts.const_data_ptr<int64_t>();
    full = caught([&] { pack({data, data + ranks}); });
  }
  const auto tally = exchange.read_headers(std::move(headers));
  TORCH_CHECK_INDEX(!tally.refused,
                    "dispatch: topk_ids must be in [-1, E] with E = ", dispatcher.experts());

  const Plan plan{tally.sent, tally.received, tally.dispatch};
  const int64_t num_received = sum(tally.received);
  Tensor out, out_routing, out_extra;
  Exchange::Pending tokens, routed;
  std::optional<Exchange::Pending> extras;
  exchange.start_all([&] {
    if (full) std::rethrow_exception(full);
    if (!is_native(x)) pack(tally.sent);
    out = at::empty({num_received, x.size(1)}, x.options());
    out_routing = empty_routing(topk_weights, num_received);
    tokens = exchange.start("tokens", out, rows, tally.received, tally.sent);
    routed = exchange.start("routing weights", out_routing, routing, tally.received, tally.sent);
    out_extra = at::empty({0}, x.options());
    if (!extra) return;
    const Tensor bytes = at::empty({num_received, extra_rows.size(1)}, extra_rows.options());
    extras = exchange.start("extra rows", bytes, extra_rows, tally.received, tally.sent);
    out_extra = from_bytes(bytes, *extra);
  });
  const Tensor slots = at::empty({tally.slots_received, 0}, x.options().dtype(at::kByte));
  return [=, slot_rows = layout.slot_rows, plan_numbers = plan.write(dispatcher),
          top_k = topk_ids.size(1), dtype = topk_weights.scalar_type()]() -> Arrived {
    const auto keep = shared;
    routed.wait();
    const auto [ids, weights] = unpack_routing(out_routing, top_k, dtype);
    const Tensor out_ids = ids.contiguous(), out_weights = weights.contiguous();
    if (extras) extras->wait();
    tokens.wait();
    use_on_current_stream(slot_rows);
    return {out, out_ids, out_weights, slot_rows, plan_numbers, slots, out_extra};
  };
}

// A row for each received one goes back to where it came from.
struct Returning {
  Tensor rows;  // [S, ...]
  Exchange::Pending pending;

  Returning(const Exchange& exchange, const Plan& plan, const char* what, const Tensor& values)
      : rows(at::empty({sum(plan.sent), values.size(1)}, values.options())),
        pending(exchange.start(what, rows, dense(values), plan.sent, plan.received)) {}

  // Contiguous, with the strides of its sizes: one column may have any, a view of bytes may not.
  static Tensor dense(const Tensor& values) {
    const int64_t width = values.size(1);
    return values.contiguous().as_strided(values.sizes(), {width, 1});
  }
};

Ending<Tensor> combine(const DispatcherRef& owner, const Tensor& y, const Tensor& slot_rows,
                       const Tensor& plan_numbers) {
  const Dispatcher& dispatcher = *owner;
  const auto shared = std::make_shared<Exchange>(Phase::kCombine, owner);
  Exchange& exchange = *shared;
  Plan plan;
  Terms terms = terms_of(dispatcher);
  if (y.dim() == 2) terms.hidden = y.size(1), terms.x_dtype = dtype_number(y);
  exchange.agree_on(terms, slot_rows, plan, [&] {
    plan = Plan::read(Phase::kCombine, dispatcher, plan_numbers);
    if (is_native(slot_rows)) check_slot_rows(Phase::kCombine, slot_rows, plan);
    TORCH_CHECK_VALUE(y.device() == slot_rows.device(), "combine: y must be on the device ",
                      slot_rows.device(), " of its dispatch; got ", y.device());
    check_rows(Phase::kCombine, "y", y, sum(plan.received));
    check_floating(Phase::kCombine, "y", y);
  });
  const auto returning =
      exchange.start_all([&] { return Returning(exchange, plan, "results", y); });
  return [shared, returning, slot_rows, first = first_rows(plan.sent)] {
    returning.pending.wait();
    use_on_current_stream(slot_rows);
    return sum_rows(returning.rows, slot_rows, first);
  };
}

Ending<Tensor> combine_backward(const DispatcherRef& owner, const Tensor& grad,
                                const Tensor& slot_rows, const Tensor& plan_numbers,
                                int64_t num_received) {
  const Dispatcher& dispatcher = *owner;
  const auto shared = std::make_shared<Exchange>(Phase::kCombineBackward, owner);
  Exchange& exchange = *shared;
  Plan plan;
  Terms terms = terms_of(dispatcher);
  terms.hidden = grad.size(1), terms.x_dtype = dtype_number(grad);
  exchange.agree_on(terms, grad, plan,
                    [&] { plan = Plan::read(Phase::kCombineBackward, dispatcher, plan_numbers); });
  Tensor out;
  const auto pending = exchange.start_all([&] {
    const Tensor rows = pack_rows(grad, slot_rows, first_rows(plan.sent));
    out = at::empty({num_received, grad.size(1)}, grad.options());
    return exchange.start("result gradients", out, rows, plan.received, plan.sent);
  });
  return [shared, pending, out] {
    pending.wait();
    return out;
  };
}

Ending<TokenGradients> dispatch_backward(const DispatcherRef& owner,
                                         const std::optional<Tensor>& grad_x,
                                         const std::optional<Tensor>& grad_weights,
                                         const Tensor& slot_rows, const Tensor& plan_numbers) {
  const Dispatcher& dispatcher = *owner;
  const auto shared = std::make_shared<Exchange>(Phase::kDispatchBackward, owner);
  Exchange& exchange = *shared;
  Plan plan;
  Terms terms = terms_of(dispatcher);
  if (grad_x) terms.hidden = grad_x->size(1), terms.x_dtype = dtype_number(*grad_x);
  if (grad_weights)
    terms.top_k = grad_weights->size(1), terms.weight_dtype = dtype_number(*grad_weights);
  exchange.agree_on(terms, slot_rows, plan,
                    [&] { plan = Plan::read(Phase::kDispatchBackward, dispatcher, plan_numbers); });
  std::optional<Returning> rows, slots;
  exchange.start_all([&] {
    if (grad_x) rows.emplace(exchange, plan, "token gradients", *grad_x);
    if (grad_weights) slots.emplace(exchange, plan, "routing weight gradients", *grad_weights);
  });
  return [shared, rows, slots, slot_rows, first = first_rows(plan.sent)]() -> TokenGradients {
    Tensor out_weights = at::empty({0}, slot_rows.options()), out_x = at::empty_like(out_weights);
    use_on_current_stream(slot_rows);
    if (slots) {
      slots->pending.wait();
      out_weights = gather_slots(slots->rows, slot_rows, first);
    }
    if (rows) {
      rows->pending.wait();
      out_x = sum_rows(rows->rows, slot_rows, first);
    }
    return {out_x, out_weights};
  };
}

}  // namespace

const Transport process_group_transport{dispatch, combine, combine_backward, dispatch_backward};

}  // namespace moe::ep
