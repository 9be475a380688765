#include "dispatch/cuda_ipc/call.h"

#include <c10/core/impl/VirtualGuardImpl.h>

#include <algorithm>
#include <string>

namespace moe::ep::ipc {

using at::Tensor;

std::optional<c10::Stream> stream_of(const Tensor& tensor) {
  if (tensor.is_cpu()) return {};
  return c10::impl::VirtualGuardImpl(tensor.device().type()).getStream(tensor.device());
}

void record_stream(const Tensor& tensor, c10::Stream stream) {
  if (tensor.defined() && !tensor.is_cpu()) tensor.record_stream(stream);
}

void record_stream(const Arrived& arrived, c10::Stream stream) {
  for (const Tensor& tensor :
       {arrived.x, arrived.ids, arrived.weights, arrived.slot_rows, arrived.plan, arrived.extra}) {
    record_stream(tensor, stream);
  }
}

void record_stream(const std::tuple<Tensor, Tensor>& tensors, c10::Stream stream) {
  record_stream(std::get<0>(tensors), stream);
  record_stream(std::get<1>(tensors), stream);
}

device::Link Call::link(int64_t bytes) const {
  return memory().link(phase_, bytes, owner_->timeout, on_gpus().table.get());
}

device::StageArgs Call::stage(int64_t bytes, bool refused) const {
  device::StageArgs args{};
  try {
    args.link = link(bytes);
  } catch (const PeerMemory::Unmatched&) {
    // There is memory for a header, by which all ranks find in what they differ.
    say_nothing_else(stage(PeerMemory::kRefused));
    memory().device().synchronize();
    memory().check(to_string(phase_), /*peers=*/true);
    throw shm::Error(std::string(to_string(phase_)) + ": the ranks of group '" + owner_->group +
                     "' need different amounts of staging memory");
  }
  const Header header = make_header(phase_, terms_, refused);
  std::copy(header.begin(), header.end(), args.header);
  args.header[kRowsField] = on_gpus().capacity;
  args.header[kSlotsField] = terms_.top_k < 0 ? -1 : on_gpus().slots(terms_.top_k);
  args.header[device::kMaxTokensWord] = on_gpus().max_tokens;
  args.tag = tag();
  args.capacity = on_gpus().capacity, args.max_tokens = on_gpus().max_tokens;
  return args;
}

void Call::say_nothing_else(const device::StageArgs& header) const {
  memory().device().launch(header);
  device::PullArgs pull{};
  pull.link = link(PeerMemory::kRefused);
  pull.by_plan = true;
  memory().device().launch(pull);
  memory().device().mark();
}

void check_device(Phase phase, const OnGpus& gpus, const Tensor& tensor) {
  TORCH_CHECK_VALUE(gpus.carries(tensor), to_string(phase), ": transport 'cuda_ipc' carries ",
                    "tensors of CUDA devices; got one on ", tensor.device(),
                    ". Use 'auto', or move the tensors to the GPU of this rank.");
  PeerMemory& memory = *gpus.memory;
  TORCH_CHECK_VALUE(tensor.is_cpu() || tensor.device().index() == memory.device().index(),
                    to_string(phase), ": tensors must be on cuda:", memory.device().index(),
                    ", the device that was current when group '", memory.group(),
                    "' made its first dispatcher; got ", tensor.device());
}

}  // namespace moe::ep::ipc
