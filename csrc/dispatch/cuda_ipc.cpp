// The transport `cuda_ipc`: GPU ranks of one machine, which read each other's memory.
//
// A call is three kernels on the current stream: one leaves what this rank has in its staging
// memory and tells the others, one waits for all, one fetches what is for this rank. The host waits
// for nothing, so it knows no counts: what arrives has the rows there is room for, and `plan` is on
// the device (PlanView). slot_rows[t, k] is rank * max_tokens + the place among the rows for that
// rank.
#include <ATen/ATen.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>
#include <memory>
#include <mutex>
#include <optional>
#include <utility>

#include "common/dtypes.h"
#include "cuda/regions.h"
#include "dispatch/cuda_ipc/call.h"
#include "dispatch/dispatcher.h"

namespace moe::ep {
namespace {

using at::Tensor;
using device::PullArgs;
using device::ResultRegion;
using device::Section;
using device::StageArgs;
using device::SumArgs;
using device::TokenRegion;
using ipc::begin;
using ipc::Call;
using ipc::guarded;
using ipc::PeerMemory;

constexpr int64_t kMaxLocalExperts = int64_t{1} << 24;

char* bytes_of(const Tensor& tensor) {
  return const_cast<char*>(static_cast<const char*>(tensor.const_data_ptr()));
}

int64_t row_bytes(const Tensor& rows) { return rows.size(1) * rows.element_size(); }

int64_t extra_bytes(const Tensor& extra) {
  int64_t bytes = extra.element_size();
  for (const int64_t size : extra.sizes().slice(1)) bytes *= size;
  return bytes;
}

// Rows of a tensor with unit stride along them, at their place in staged memory.
Section section_of(Section section, const Tensor& rows) {
  section.rows = bytes_of(rows);
  section.stride = rows.stride(0) * rows.element_size();
  return section;
}

void check_plan(Phase phase, const Dispatcher& dispatcher, const Tensor& plan,
                const Tensor& slot_rows, const Tensor& tensor) {
  const OnGpus& gpus = dispatcher.on_gpus;
  const bool right = plan.device() == tensor.device() && plan.scalar_type() == at::kLong &&
                     plan.dim() == 1 && plan.is_contiguous() &&
                     plan.size(0) == gpus.plan_words(dispatcher.ranks) &&
                     slot_rows.device() == tensor.device() && slot_rows.dim() == 2 &&
                     slot_rows.scalar_type() == at::kInt && slot_rows.is_contiguous() &&
                     slot_rows.size(0) <= gpus.max_tokens;
  TORCH_CHECK_VALUE(right, to_string(phase), ": the handle must be that of a dispatch by this ",
                    "dispatcher of group '", dispatcher.group, "', on the tensors' device");
}

// A warp's threads take turns along a row, and none may come to the end of int32.
void check_row_bytes(Phase phase, int64_t bytes) {
  TORCH_CHECK_VALUE(bytes <= std::numeric_limits<int32_t>::max() / 2, to_string(phase),
                    ": a row must have less than 2**30 bytes; got ", bytes);
}

Ending<Arrived> dispatch(const DispatcherRef& owner, const Tokens& tokens) {
  const auto& [x, ids, weights, extra] = tokens;
  const Dispatcher& dispatcher = *owner;
  const OnGpus& gpus = dispatcher.on_gpus;
  const auto check = [&](Terms& terms) {
    check_dispatch(tokens);
    TORCH_CHECK_VALUE(x.size(0) <= gpus.max_tokens,
                      "dispatch: T must be at most max_tokens = ", gpus.max_tokens, "; got ",
                      x.size(0), ". Make the dispatcher with more.");
    check_row_bytes(Phase::kDispatch,
                    std::max({row_bytes(x), row_bytes(weights), extra ? extra_bytes(*extra) : 0}));
    terms = terms_of(dispatcher, tokens);
  };
  return begin<Arrived>(Phase::kDispatch, owner, x, check, [&](const Call& call) {
    const Tensor rows = with_unit_stride(x), dense_ids = ids.contiguous();
    const Tensor dense_weights = weights.contiguous();
    const Tensor bytes =
        extra ? as_bytes(*extra) : at::empty({x.size(0), 0}, x.options().dtype(at::kByte));
    const int64_t top_k = ids.size(1);
    const TokenRegion region(static_cast<int>(dispatcher.ranks), gpus.max_tokens, row_bytes(x),
                             top_k, row_bytes(dense_weights), bytes.size(1));
    const Tensor slot_rows = at::empty({x.size(0), top_k}, ids.options().dtype(at::kInt));
    StageArgs stage = call.stage(region.region.bytes());
    stage.rows = x.size(0), stage.sections = extra ? 3 : 2;
    stage.section[0] = section_of(region.x, rows);
    stage.section[1] = section_of(region.weights, dense_weights);
    stage.section[2] = section_of(region.extra, bytes);
    // Without tokens there are lists all the same, and tensors without elements have no address.
    stage.ids = x.size(0) > 0 ? dense_ids.const_data_ptr() : stage.link.staging[stage.link.rank];
    stage.id_bytes = static_cast<int>(ids.element_size()), stage.top_k = static_cast<int>(top_k);
    stage.homes = gpus.homes, stage.slot_rows = slot_rows.mutable_data_ptr<int32_t>();
    stage.lists = region.lists, stage.staged_homes = region.homes.staged;
    stage.homes_stride = region.homes.staged_stride;
    call.memory().device().launch(stage);

    const auto finish = [call, region, slot_rows, top_k, x_options = x.options(),
                         hidden = x.size(1), weight_options = weights.options(),
                         extra_width = bytes.size(1), extra]() -> Arrived {
      const OnGpus& gpus = call.on_gpus();
      const int64_t rows = gpus.capacity, slots = gpus.slots(top_k);
      const Tensor out = at::empty({rows, hidden}, x_options);
      const Tensor out_ids = at::empty({rows, top_k}, x_options.dtype(at::kInt));
      const Tensor out_weights = at::empty({rows, top_k}, weight_options);
      const Tensor out_bytes = at::empty({rows, extra_width}, x_options.dtype(at::kByte));
      PullArgs pull{};
      pull.link = call.link(region.region.bytes());
      const Tensor plan = at::empty({gpus.plan_words(pull.link.ranks)}, x_options.dtype(at::kLong));
      pull.plan = plan.mutable_data_ptr<int64_t>();
      pull.tag = call.tag(), pull.capacity = rows, pull.slot_capacity = slots;
      pull.max_tokens = gpus.max_tokens, pull.sections = extra ? 2 : 1;
      pull.section[0] = section_of(region.x, out);
      pull.section[1] = section_of(region.extra, out_bytes);
      pull.lists = region.lists, pull.staged_homes = region.homes.staged;
      pull.homes_stride = region.homes.staged_stride, pull.top_k = static_cast<int>(top_k);
      pull.weight_bytes = static_cast<int>(out_weights.element_size());
      pull.staged_weights = region.weights.staged;
      pull.weights_stride = region.weights.staged_stride;
      pull.ids = out_ids.mutable_data_ptr<int32_t>(), pull.weights = bytes_of(out_weights);
      call.memory().device().launch(pull);
      const Tensor out_extra = extra ? from_bytes(out_bytes, *extra) : at::empty({0}, x_options);
      return {out,       out_ids, out_weights,
              slot_rows, plan,    at::empty({slots, 0}, x_options.dtype(at::kByte)),
              out_extra};
    };
    return finish;
  });
}

device::Value value_of(at::ScalarType dtype) {
  switch (dtype) {
    case at::kBFloat16:
      return device::Value::kBf16;
    case at::kHalf:
      return device::Value::kFp16;
    case at::kDouble:
      return device::Value::kFp64;
    default:
      return device::Value::kFp32;
  }
}

// What a rank received, or computed of it, goes back: rows to be added, and entries of slots.
struct Returned {
  std::optional<Tensor> rows, entries;
};

// The kernels of that. Sums [T, H] and entries [T, K], or empty tensors.
Ending<TokenGradients> send_back(const Call& call, const Returned& returned,
                                 const Tensor& slot_rows, const Tensor& plan) {
  const OnGpus& gpus = call.on_gpus();
  Tensor rows, entries;
  if (returned.rows) rows = with_unit_stride(*returned.rows);
  if (returned.entries) entries = with_unit_stride(*returned.entries);
  const ResultRegion region(gpus.capacity, rows.defined() ? row_bytes(rows) : 0,
                            entries.defined() ? row_bytes(entries) : 0);
  StageArgs stage = call.stage(region.region.bytes());
  stage.plan = plan.const_data_ptr<int64_t>(), stage.own_stays = true;
  Section addend{}, entry{};
  if (rows.defined()) stage.section[stage.sections++] = addend = section_of(region.rows, rows);
  if (entries.defined()) {
    stage.section[stage.sections++] = entry = section_of(region.entries, entries);
  }
  call.memory().device().launch(stage);
  return [call, rows, entries, addend, entry, slot_rows, plan,
          bytes = region.region.bytes()]() -> TokenGradients {
    const OnGpus& gpus = call.on_gpus();
    const int64_t tokens = slot_rows.size(0), top_k = slot_rows.size(1);
    const Tensor none = at::empty({0}, slot_rows.options());
    Tensor sums = none, picked = at::empty_like(none);
    SumArgs args{};
    args.link = call.link(bytes);
    args.plan = plan.const_data_ptr<int64_t>();
    args.tokens = tokens, args.capacity = gpus.capacity, args.max_tokens = gpus.max_tokens;
    args.top_k = static_cast<int>(top_k), args.slot_rows = slot_rows.const_data_ptr<int32_t>();
    args.addend = addend, args.entry = entry;
    if (rows.defined()) {
      sums = at::empty({tokens, rows.size(1)}, rows.options());
      args.value = value_of(rows.scalar_type()), args.width = static_cast<int>(rows.size(1));
      args.sums = bytes_of(sums), args.sums_stride = row_bytes(sums);
    }
    if (entries.defined()) {
      picked = at::empty({tokens, top_k}, entries.options());
      args.entry_bytes = static_cast<int>(picked.element_size());
      args.entries = bytes_of(picked);
    }
    call.memory().device().launch(args);
    return {sums, picked};
  };
}

Ending<Tensor> combine(const DispatcherRef& owner, const Tensor& y, const Tensor& slot_rows,
                       const Tensor& plan) {
  const auto check = [&](Terms& terms) {
    check_plan(Phase::kCombine, *owner, plan, slot_rows, y);
    check_rows(Phase::kCombine, "y", y, owner->on_gpus.capacity);
    check_floating(Phase::kCombine, "y", y);
    check_row_bytes(Phase::kCombine, row_bytes(y));
    terms.hidden = y.size(1), terms.x_dtype = dtype_number(y);
  };
  return begin<Tensor>(Phase::kCombine, owner, y, check, [&](const Call& call) {
    return [rest = send_back(call, {y, {}}, slot_rows, plan)] { return std::get<0>(rest()); };
  });
}

Ending<TokenGradients> dispatch_backward(const DispatcherRef& owner,
                                         const std::optional<Tensor>& grad_x,
                                         const std::optional<Tensor>& grad_weights,
                                         const Tensor& slot_rows, const Tensor& plan) {
  const auto check = [&](Terms& terms) {
    check_plan(Phase::kDispatchBackward, *owner, plan, slot_rows, slot_rows);
    for (const auto* grad : {&grad_x, &grad_weights}) {
      if (!*grad) continue;
      check_rows(Phase::kDispatchBackward, "grad", **grad, owner->on_gpus.capacity);
      check_floating(Phase::kDispatchBackward, "grad", **grad);
      check_row_bytes(Phase::kDispatchBackward, row_bytes(**grad));
    }
    if (grad_x) terms.hidden = grad_x->size(1), terms.x_dtype = dtype_number(*grad_x);
    if (grad_weights) {
      terms.top_k = grad_weights->size(1), terms.weight_dtype = dtype_number(*grad_weights);
    }
  };
  return begin<TokenGradients>(
      Phase::kDispatchBackward, owner, slot_rows, check,
      [&](const Call& call) { return send_back(call, {grad_x, grad_weights}, slot_rows, plan); });
}

Ending<Tensor> combine_backward(const DispatcherRef& owner, const Tensor& grad,
                                const Tensor& slot_rows, const Tensor& plan, int64_t num_received) {
  const OnGpus& gpus = owner->on_gpus;
  const auto check = [&](Terms& terms) {
    check_plan(Phase::kCombineBackward, *owner, plan, slot_rows, grad);
    check_rows(Phase::kCombineBackward, "grad", grad, slot_rows.size(0));
    TORCH_CHECK_VALUE(num_received == gpus.capacity, "combine_backward: received must be the ",
                      gpus.capacity, " rows of the dispatch; got ", num_received);
    check_row_bytes(Phase::kCombineBackward, row_bytes(grad));
    terms.hidden = grad.size(1), terms.x_dtype = dtype_number(grad);
  };
  return begin<Tensor>(Phase::kCombineBackward, owner, grad, check, [&](const Call& call) {
    const Tensor rows = with_unit_stride(grad);
    const TokenRegion region(static_cast<int>(owner->ranks), gpus.max_tokens, row_bytes(grad), 0, 0,
                             0);
    StageArgs stage = call.stage(region.region.bytes());
    stage.plan = plan.const_data_ptr<int64_t>(), stage.rows = grad.size(0);
    stage.sections = 1, stage.section[0] = section_of(region.x, rows);
    call.memory().device().launch(stage);
    return [call, region, plan, hidden = grad.size(1), options = grad.options()] {
      const Tensor out = at::empty({call.on_gpus().capacity, hidden}, options);
      PullArgs pull{};
      pull.link = call.link(region.region.bytes());
      pull.plan = plan.mutable_data_ptr<int64_t>(), pull.by_plan = true;
      pull.capacity = call.on_gpus().capacity, pull.max_tokens = call.on_gpus().max_tokens;
      pull.sections = 1, pull.section[0] = section_of(region.x, out);
      call.memory().device().launch(pull);
      return out;
    };
  });
}

}  // namespace

bool OnGpus::carries(const Tensor& tensor) const {
  return memory->emulated() ? tensor.is_cpu() : tensor.is_cuda();
}

OnGpus make_on_gpus(std::shared_ptr<PeerMemory> memory, const Placement& placement,
                    int64_t max_tokens, int64_t capacity, int64_t slot_capacity, bool alone) {
  OnGpus gpus;
  gpus.memory = std::move(memory), gpus.max_tokens = max_tokens, gpus.capacity = capacity;
  gpus.slot_capacity = slot_capacity, gpus.alone = alone;
  if (!gpus.memory) return gpus;
  const int64_t experts = placement.experts();
  TORCH_CHECK_VALUE(experts <= kMaxLocalExperts, "cuda_ipc: num_experts must be at most ",
                    kMaxLocalExperts, "; got ", experts);
  gpus.homes.experts = static_cast<int32_t>(experts);
  gpus.homes.per_rank = static_cast<int32_t>(placement.experts_per_rank());
  gpus.homes.most_copies = static_cast<int32_t>(placement.most_copies());
  if (gpus.homes.per_rank > 0) return gpus;
  std::vector<int32_t> begin{0}, rank, local, preferred;
  for (int64_t e = 0; e < experts; ++e) {
    for (const Placement::Home home : placement.homes(e)) {
      rank.push_back(home.rank), local.push_back(home.local);
    }
    begin.push_back(static_cast<int32_t>(rank.size()));
    preferred.push_back(placement.preferred(e));
  }
  std::vector<int32_t> all;
  for (const auto* part : {&begin, &rank, &local, &preferred}) {
    all.insert(all.end(), part->begin(), part->end());
  }
  gpus.table = gpus.memory->table(all);
  const auto* const table = reinterpret_cast<const int32_t*>(gpus.table->on_device);
  gpus.homes.begin = table;
  gpus.homes.rank = table + begin.size();
  gpus.homes.local = gpus.homes.rank + rank.size();
  gpus.homes.preferred = gpus.homes.local + local.size();
  return gpus;
}

void OnGpus::check() const {
  const std::lock_guard lock(memory->mutex());
  TORCH_CHECK(!memory->device().is_capturing(), "check: this waits for the GPU, which nobody can ",
              "while a graph is captured; call it after that");
  guarded(*memory, [&] {
    memory->settle();
    memory->device().synchronize();
    memory->check("check", /*peers=*/false);
  });
}

const Transport cuda_ipc_transport{dispatch, combine, combine_backward, dispatch_backward};

}  // namespace moe::ep
