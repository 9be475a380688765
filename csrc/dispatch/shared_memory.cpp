// The transport `shared_memory`: CPU ranks of one machine, which write to each other's memory.
//
// dispatch: the ranks tell how many rows they bring, each grants the others their part of the x' it
// has allocated, and they write the rows there: one copy. combine_backward is the same with sizes
// that are known, so the grant comes with the header. combine and dispatch_backward go the other
// way: a rank leaves the rows of others where those can read them, and they add them up in place.
// A rank's own rows do not travel.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <exception>
#include <memory>
#include <optional>
#include <utility>

#include "common/dtypes.h"
#include "common/parallel.h"
#include "dispatch/copy.h"
#include "dispatch/dispatcher.h"
#include "dispatch/errors.h"
#include "dispatch/rows.h"
#include "dispatch/shared_memory/in_flight.h"

namespace moe::ep {
namespace {

using at::Tensor;
using shm::Message;
using shm::Place;
using shm::Stage;
using Block = std::shared_ptr<shm::Heap::Block>;
using Call = shm::Communicator::Call;
using shm::InFlight;

// f(), whose errors end the use of the communicator unless the ranks have agreed on them: the
// others wait for what will not come.
template <typename F>
auto guarded(Call& call, const F& f) {
  try {
    return f();
  } catch (const shm::Error& error) {
    call.abandon(error.what());
    TORCH_CHECK_WITH(DistBackendError, false, error.what());
  } catch (const std::exception& error) {
    const auto* const known = dynamic_cast<const c10::Error*>(&error);
    call.abandon(known ? known->what_without_backtrace() : error.what());
    throw;
  }
}

std::shared_ptr<Call> new_call(Phase phase, const Dispatcher& dispatcher) {
  try {
    return std::make_shared<Call>(dispatcher.shared_memory, to_string(phase), dispatcher.timeout);
  } catch (const shm::Error& error) {
    TORCH_CHECK_WITH(DistBackendError, false, error.what());
  }
}

// Begins a call of all ranks with f(call), which returns its other half.
template <typename Result, typename F>
Ending<Result> begin(Phase phase, const DispatcherRef& dispatcher, const F& f) {
  const auto call = new_call(phase, *dispatcher);
  Ending<Result> rest = guarded(*call, [&] { return Ending<Result>(f(*call)); });
  const auto in_flight = std::make_shared<InFlight<Result>>(call, [call, rest] {
    return guarded(*call, [&] {
      call->check_usable();  // a fork of the rank has the call too, and the group may be gone
      return rest();
    });
  });
  // Whether or not somebody still waits for it: the others do.
  dispatcher->shared_memory->set_settle([in_flight] { in_flight->complete(); });
  return [in_flight] { return in_flight->take(); };
}

// Where the memory is that a header or a grant names; each as two words.
class Places {
 public:
  void add(Place place) { places_.push_back(place); }
  Place at(int64_t index) const { return places_[index]; }

  void write(Message& message, int64_t begin) const {
    for (size_t i = 0; i < places_.size(); ++i) {
      message.words[begin + 2 * i] = places_[i].segment;
      message.words[begin + 2 * i + 1] = places_[i].offset;
    }
  }
  static Places read(const Message& message, int64_t begin) {
    Places places;
    for (int64_t i = begin; i + 1 < shm::kWords; i += 2) {
      places.add({message.words[i], message.words[i + 1]});
    }
    return places;
  }

 private:
  std::vector<Place> places_;
};

struct Agreement {
  Tally tally;
  std::vector<Places> places;  // by rank, as its header names them
};

// Sends a header [P] to each rank, with what goes with it.
void send_headers(Call& call, const Dispatcher& dispatcher, const std::vector<Header>& mine,
                  const std::vector<Places>& places) {
  const int64_t ranks = dispatcher.ranks, rank = dispatcher.rank;
  for (int64_t i = 1; i < ranks; ++i) {
    const int64_t peer = (rank + i) % ranks;
    Message message;
    std::copy(mine[peer].begin(), mine[peer].end(), message.words);
    places[peer].write(message, kFields);
    call.send(static_cast<int>(peer), Stage::kHeader, message);
  }
}

// Reads theirs. Errors in arguments, `refusal` or another rank's, are raised alike on all ranks,
// after which the communicator is as good as before.
Agreement read_headers(Call& call, Phase phase, const Dispatcher& dispatcher,
                       const std::vector<Header>& mine, const std::exception_ptr& refusal) {
  const int64_t ranks = dispatcher.ranks, rank = dispatcher.rank;
  Agreement agreement;
  std::vector<Header> theirs = mine;
  agreement.places.resize(ranks);
  for (int64_t i = 1; i < ranks; ++i) {
    const int64_t peer = (rank + i) % ranks;
    const Message& message = call.receive(static_cast<int>(peer), Stage::kHeader);
    std::copy_n(message.words, kFields, theirs[peer].begin());
    agreement.places[peer] = Places::read(message, kFields);
  }
  call.release_published();
  try {
    if (refusal) std::rethrow_exception(refusal);
    agreement.tally = agree(phase, dispatcher.group, rank, mine, theirs);
  } catch (...) {
    call.finish();
    throw;
  }
  return agreement;
}

// The ranks have written what they had for each other.
void exchange_done(Call& call, const Dispatcher& dispatcher) {
  const int64_t ranks = dispatcher.ranks, rank = dispatcher.rank;
  for (int64_t i = 1; i < ranks; ++i) {
    call.send(static_cast<int>((rank + i) % ranks), Stage::kDone, {});
  }
  for (int64_t i = 1; i < ranks; ++i) {
    call.receive(static_cast<int>((rank + i) % ranks), Stage::kDone);
  }
}

Place shifted(Place place, int64_t bytes) { return {place.segment, place.offset + bytes}; }

// A tensor in a block, which it keeps.
Tensor tensor_in(const Block& block, int64_t offset, at::IntArrayRef sizes, at::ScalarType dtype) {
  return at::from_blob(block->data() + offset, sizes, [block](void*) {}, at::dtype(dtype));
}

// The pieces in which rows go to, or come from, the ranks: in the memory that `places` of each rank
// name, and of this rank at `own`.
template <typename Byte>
RowParts<Byte> parts_at(Call& call, const Dispatcher& dispatcher,
                        const std::vector<int64_t>& rows_by_rank, int64_t row_bytes,
                        const std::vector<Places>& places, int64_t index, Byte* own) {
  RowParts<Byte> parts{{}, first_rows(rows_by_rank)};
  for (int64_t peer = 0; peer < dispatcher.ranks; ++peer) {
    Byte* part = own;
    if (peer != dispatcher.rank) {
      const int64_t rows = rows_by_rank[peer];
      part = rows == 0 ? nullptr
                       : call.at(static_cast<int>(peer), places[peer].at(index), rows * row_bytes);
    }
    parts.parts.push_back(part);
  }
  return parts;
}

int64_t bytes_per_row(const Tensor& rows) { return rows.size(1) * rows.element_size(); }

// What a rank brings to a dispatch.
struct Outgoing {
  Tokens tokens;
  Layout layout;
  std::vector<Header> headers;
  std::exception_ptr refusal;
};

Outgoing announce(Call& call, const Dispatcher& dispatcher, const Tokens& tokens) {
  const int64_t ranks = dispatcher.ranks;
  Layout layout;
  const auto refusal = caught([&] {
    check_dispatch(tokens);
    layout = make_layout(tokens.ids, dispatcher.placement, ranks);
  });
  const Terms terms = refusal ? terms_of(dispatcher) : terms_of(dispatcher, tokens);
  std::vector<Header> headers(ranks, make_header(Phase::kDispatch, terms, refusal != nullptr));
  for (int64_t peer = 0; !refusal && peer < ranks; ++peer) {
    const int64_t* const counts = layout.counts.const_data_ptr<int64_t>() + 2 * peer;
    headers[peer][kRowsField] = counts[0];
    headers[peer][kSlotsField] = counts[1];
  }
  send_headers(call, dispatcher, headers, std::vector<Places>(ranks));
  return {tokens, layout, headers, refusal};
}

Arrived deliver(Call& call, const Dispatcher& dispatcher, const Outgoing& outgoing) {
  const int64_t ranks = dispatcher.ranks, rank = dispatcher.rank;
  const auto& [tokens, layout, headers, refusal] = outgoing;
  const auto& [x, topk_ids, topk_weights, extra] = tokens;
  const Tally tally = read_headers(call, Phase::kDispatch, dispatcher, headers, refusal).tally;

  // x' [U, H]; weights [U, K] and ids [U, K].
  const int64_t received = sum(tally.received), top_k = topk_ids.size(1);
  const int64_t row_bytes = bytes_per_row(x), weight_bytes = bytes_per_row(topk_weights);
  const int64_t id_bytes = top_k * static_cast<int64_t>(sizeof(int32_t));
  const int64_t ids_at = (received * weight_bytes + 63) / 64 * 64;
  shm::Heap& heap = dispatcher.shared_memory->heap();
  const Block rows = heap.allocate(received * row_bytes);
  const Block routing = heap.allocate(ids_at + received * id_bytes);
  const Tensor extra_rows = extra ? as_bytes(*extra) : at::empty({0, 0}, at::kByte);
  const int64_t extra_bytes = extra_rows.size(1);
  const Block extras = extra ? heap.allocate(received * extra_bytes) : nullptr;
  const auto first = first_rows(tally.received);
  for (int64_t i = 1; i < ranks; ++i) {
    const int64_t peer = (rank + i) % ranks;
    Places grant;
    grant.add(shifted(rows->place(), first[peer] * row_bytes));
    grant.add(shifted(routing->place(), first[peer] * weight_bytes));
    grant.add(shifted(routing->place(), ids_at + first[peer] * id_bytes));
    if (extra) grant.add(shifted(extras->place(), first[peer] * extra_bytes));
    Message message;
    grant.write(message, 0);
    call.send(static_cast<int>(peer), Stage::kGrant, message);
  }
  std::vector<Places> grants(ranks);
  for (int64_t i = 1; i < ranks; ++i) {
    const int64_t peer = (rank + i) % ranks;
    grants[peer] = Places::read(call.receive(static_cast<int>(peer), Stage::kGrant), 0);
  }
  // Of rows of so many bytes, in this rank's own part from `own` on.
  const auto parts = [&](int64_t index, int64_t bytes, char* own) {
    return parts_at<char>(call, dispatcher, tally.sent, bytes, grants, index,
                          own + first[rank] * bytes);
  };
  push_routing(topk_ids, topk_weights, layout.slot_rows, dispatcher.placement,
               parts(1, weight_bytes, routing->data()),
               parts(2, id_bytes, routing->data() + ids_at));
  if (extra) push_rows(extra_rows, layout.slot_rows, parts(3, extra_bytes, extras->data()));
  push_rows(x, layout.slot_rows, parts(0, row_bytes, rows->data()));
  exchange_done(call, dispatcher);

  Tensor out_extra = at::empty({0}, x.options());
  if (extra) {
    out_extra = from_bytes(tensor_in(extras, 0, {received, extra_bytes}, at::kByte), *extra);
  }
  const Plan plan{tally.sent, tally.received, tally.dispatch};
  return {tensor_in(rows, 0, {received, x.size(1)}, x.scalar_type()),
          tensor_in(routing, ids_at, {received, top_k}, at::kInt),
          tensor_in(routing, 0, {received, top_k}, topk_weights.scalar_type()),
          layout.slot_rows,
          plan.write(dispatcher),
          at::empty({tally.slots_received, 0}, x.options().dtype(at::kByte)),
          out_extra};
}

// Rows of this rank that others read.
struct Readable {
  Tensor dense;                  // [U, ...], for this rank's own
  Block block;                   // what others read
  std::vector<int64_t> offsets;  // by rank, in the block

  Readable(Call& call, const Dispatcher& dispatcher, const Tensor& values, const Plan& plan)
      : dense(values.contiguous()) {
    const int64_t row_bytes = bytes_per_row(dense);
    int64_t total = 0;
    for (int64_t peer = 0; peer < dispatcher.ranks; ++peer) {
      offsets.push_back(total);
      if (peer != dispatcher.rank) total += plan.received[peer] * row_bytes;
    }
    block = dispatcher.shared_memory->heap().allocate(total);
    call.publish(block);
    const auto first = first_rows(plan.received);
    const bool stream = total >= kStreamBytes;
    const auto* const from = static_cast<const char*>(dense.const_data_ptr());
    for (int64_t peer = 0; peer < dispatcher.ranks; ++peer) {
      if (peer == dispatcher.rank) continue;
      const char* const source = from + first[peer] * row_bytes;
      char* const target = block->data() + offsets[peer];
      parallel_rows(plan.received[peer], row_bytes, [&](int64_t begin, int64_t end) {
        const int64_t at = begin * row_bytes, bytes = (end - begin) * row_bytes;
        (stream ? stream_row : copy_row)(target + at, source + at, bytes);
        if (stream) order_streams();
      });
    }
  }

  Place place(int64_t peer) const { return shifted(block->place(), offsets[peer]); }
  const char* own(const Dispatcher& dispatcher, const Plan& plan) const {
    return static_cast<const char*>(dense.const_data_ptr()) +
           first_rows(plan.received)[dispatcher.rank] * bytes_per_row(dense);
  }
};

std::vector<Header> equal_headers(Phase phase, const Dispatcher& dispatcher, Terms terms,
                                  const Plan& plan, const std::exception_ptr& refusal) {
  terms.dispatch = plan.dispatch;
  return std::vector<Header>(dispatcher.ranks, make_header(phase, terms, refusal != nullptr));
}

// What a rank leaves for the others in a combine.
struct Left {
  std::optional<Readable> rows;
  Plan plan;
  std::vector<Header> headers;
  std::exception_ptr refusal;
};

Left leave(Call& call, const Dispatcher& dispatcher, const Tensor& y, const Tensor& slot_rows,
           const Tensor& plan_numbers) {
  Plan plan;
  const auto refusal = caught([&] {
    plan = Plan::read(Phase::kCombine, dispatcher, plan_numbers);
    check_slot_rows(Phase::kCombine, slot_rows, plan);
    check_rows(Phase::kCombine, "y", y, sum(plan.received));
    check_floating(Phase::kCombine, "y", y);
  });
  Terms terms = terms_of(dispatcher);
  if (y.dim() == 2) terms.hidden = y.size(1), terms.x_dtype = dtype_number(y);
  std::optional<Readable> rows;
  std::vector<Places> places(dispatcher.ranks);
  if (!refusal) {
    rows.emplace(call, dispatcher, y, plan);
    for (int64_t peer = 0; peer < dispatcher.ranks; ++peer) places[peer].add(rows->place(peer));
  }
  const auto headers = equal_headers(Phase::kCombine, dispatcher, terms, plan, refusal);
  send_headers(call, dispatcher, headers, places);
  return {std::move(rows), plan, headers, refusal};
}

Tensor collect(Call& call, const Dispatcher& dispatcher, const Left& left,
               const Tensor& slot_rows) {
  const auto agreement =
      read_headers(call, Phase::kCombine, dispatcher, left.headers, left.refusal);
  const Tensor& y = left.rows->dense;
  const auto parts =
      parts_at<const char>(call, dispatcher, left.plan.sent, bytes_per_row(y), agreement.places, 0,
                           left.rows->own(dispatcher, left.plan));
  return sum_rows(parts, slot_rows, y.size(1), y.scalar_type());
}

// Where others write in combine_backward.
struct Granted {
  Tensor grad;
  int64_t received, row_bytes = 0;
  Block out;                   // [received, ...]
  std::vector<int64_t> first;  // row of each rank in it
  Plan plan;
  std::vector<Header> headers;
  std::exception_ptr refusal;
};

Granted grant(Call& call, const Dispatcher& dispatcher, const Tensor& grad, const Tensor& slot_rows,
              const Tensor& plan_numbers, int64_t num_received) {
  Plan plan;
  const auto refusal = caught([&] {
    plan = Plan::read(Phase::kCombineBackward, dispatcher, plan_numbers);
    check_slot_rows(Phase::kCombineBackward, slot_rows, plan);
    check_rows(Phase::kCombineBackward, "grad", grad, slot_rows.size(0));
    TORCH_CHECK_VALUE(num_received == sum(plan.received), "combine_backward: received must be the ",
                      sum(plan.received), " rows of the dispatch; got ", num_received);
  });
  Terms terms = terms_of(dispatcher);
  int64_t row_bytes = 0;
  Block out;
  std::vector<int64_t> first;
  std::vector<Places> places(dispatcher.ranks);
  if (!refusal) {
    terms.hidden = grad.size(1), terms.x_dtype = dtype_number(grad);
    row_bytes = bytes_per_row(grad);
    out = dispatcher.shared_memory->heap().allocate(num_received * row_bytes);
    first = first_rows(plan.received);
    for (int64_t peer = 0; peer < dispatcher.ranks; ++peer) {
      places[peer].add(shifted(out->place(), first[peer] * row_bytes));
    }
  }
  const auto headers = equal_headers(Phase::kCombineBackward, dispatcher, terms, plan, refusal);
  send_headers(call, dispatcher, headers, places);
  return {grad, num_received, row_bytes, out, first, plan, headers, refusal};
}

Tensor fill(Call& call, const Dispatcher& dispatcher, const Granted& granted,
            const Tensor& slot_rows) {
  const auto& [grad, received, row_bytes, out, first, plan, headers, refusal] = granted;
  const auto agreement = read_headers(call, Phase::kCombineBackward, dispatcher, headers, refusal);
  push_rows(grad, slot_rows,
            parts_at<char>(call, dispatcher, plan.sent, row_bytes, agreement.places, 0,
                           out->data() + first[dispatcher.rank] * row_bytes));
  exchange_done(call, dispatcher);
  return tensor_in(out, 0, {received, grad.size(1)}, grad.scalar_type());
}

// What a rank leaves for the others in dispatch_backward: of those that are needed.
struct LeftGradients {
  std::optional<Tensor> x, weights;
  std::vector<Readable> readable;
  Plan plan;
  std::vector<Header> headers;
  std::exception_ptr refusal;
};

LeftGradients leave_gradients(Call& call, const Dispatcher& dispatcher,
                              const std::optional<Tensor>& grad_x,
                              const std::optional<Tensor>& grad_weights, const Tensor& slot_rows,
                              const Tensor& plan_numbers) {
  Plan plan;
  const auto refusal = caught([&] {
    plan = Plan::read(Phase::kDispatchBackward, dispatcher, plan_numbers);
    check_slot_rows(Phase::kDispatchBackward, slot_rows, plan);
    for (const auto* grad : {&grad_x, &grad_weights}) {
      if (*grad) check_rows(Phase::kDispatchBackward, "grad", **grad, sum(plan.received));
    }
    TORCH_CHECK_VALUE(!grad_weights || grad_weights->size(1) == slot_rows.size(1),
                      "dispatch_backward: grad of the weights must have the ", slot_rows.size(1),
                      " columns of the handle's slot_rows; got ", grad_weights->sizes());
  });
  Terms terms = terms_of(dispatcher);
  if (!refusal && grad_x) terms.hidden = grad_x->size(1), terms.x_dtype = dtype_number(*grad_x);
  if (!refusal && grad_weights) {
    terms.top_k = grad_weights->size(1), terms.weight_dtype = dtype_number(*grad_weights);
  }
  std::vector<Places> places(dispatcher.ranks);
  std::vector<Readable> readable;
  for (const auto* grad : {&grad_x, &grad_weights}) {
    if (refusal || !*grad) continue;
    const Readable& rows = readable.emplace_back(call, dispatcher, **grad, plan);
    for (int64_t peer = 0; peer < dispatcher.ranks; ++peer) places[peer].add(rows.place(peer));
  }
  const auto headers = equal_headers(Phase::kDispatchBackward, dispatcher, terms, plan, refusal);
  send_headers(call, dispatcher, headers, places);
  return {grad_x, grad_weights, std::move(readable), plan, headers, refusal};
}

TokenGradients collect_gradients(Call& call, const Dispatcher& dispatcher,
                                 const LeftGradients& left, const Tensor& slot_rows) {
  const auto& [grad_x, grad_weights, readable, plan, headers, refusal] = left;
  const auto agreement = read_headers(call, Phase::kDispatchBackward, dispatcher, headers, refusal);
  const auto parts = [&](int64_t index) {
    const Readable& rows = readable[index];
    return parts_at<const char>(call, dispatcher, plan.sent, bytes_per_row(rows.dense),
                                agreement.places, index, rows.own(dispatcher, plan));
  };
  Tensor out_x = at::empty({0}, slot_rows.options()), out_weights = at::empty_like(out_x);
  if (grad_x) out_x = sum_rows(parts(0), slot_rows, grad_x->size(1), grad_x->scalar_type());
  if (grad_weights) {
    out_weights = gather_slots(parts(grad_x ? 1 : 0), slot_rows, grad_weights->scalar_type());
  }
  return {out_x, out_weights};
}

Ending<Arrived> dispatch(const DispatcherRef& dispatcher, const Tokens& tokens) {
  return begin<Arrived>(Phase::kDispatch, dispatcher, [&](Call& call) {
    return [&call, dispatcher, outgoing = announce(call, *dispatcher, tokens)] {
      return deliver(call, *dispatcher, outgoing);
    };
  });
}

Ending<Tensor> combine(const DispatcherRef& dispatcher, const Tensor& y, const Tensor& slot_rows,
                       const Tensor& plan) {
  return begin<Tensor>(Phase::kCombine, dispatcher, [&](Call& call) {
    // std::function copies what it holds, and the rows are not to be copied.
    const auto left = std::make_shared<Left>(leave(call, *dispatcher, y, slot_rows, plan));
    return [&call, dispatcher, left, slot_rows] {
      return collect(call, *dispatcher, *left, slot_rows);
    };
  });
}

Ending<Tensor> combine_backward(const DispatcherRef& dispatcher, const Tensor& grad,
                                const Tensor& slot_rows, const Tensor& plan, int64_t num_received) {
  return begin<Tensor>(Phase::kCombineBackward, dispatcher, [&](Call& call) {
    return [&call, dispatcher, slot_rows,
            granted = grant(call, *dispatcher, grad, slot_rows, plan, num_received)] {
      return fill(call, *dispatcher, granted, slot_rows);
    };
  });
}

Ending<TokenGradients> dispatch_backward(const DispatcherRef& dispatcher,
                                         const std::optional<Tensor>& grad_x,
                                         const std::optional<Tensor>& grad_weights,
                                         const Tensor& slot_rows, const Tensor& plan) {
  return begin<TokenGradients>(Phase::kDispatchBackward, dispatcher, [&](Call& call) {
    const auto left = std::make_shared<LeftGradients>(
        leave_gradients(call, *dispatcher, grad_x, grad_weights, slot_rows, plan));
    return [&call, dispatcher, left, slot_rows] {
      return collect_gradients(call, *dispatcher, *left, slot_rows);
    };
  });
}

}  // namespace

const Transport shared_memory_transport{dispatch, combine, combine_backward, dispatch_backward};

}  // namespace moe::ep
