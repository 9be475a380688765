#include "dispatch/cuda_ipc/emulated_device.h"

#include <fcntl.h>
#include <unistd.h>

#include <atomic>
#include <cstring>
#include <map>
#include <mutex>
#include <string>
#include <utility>

#include "cuda/pull.h"
#include "cuda/stage.h"
#include "cuda/sum.h"
#include "dispatch/shared_memory/system.h"

namespace moe::ep::ipc {
namespace {

using device::Lane;
using device::Value;

constexpr int kBlocks = 3;

// A grid of blocks of one thread, one after another.
template <typename Shared, typename F>
void run_grid(const F& f) {
  for (int block = kBlocks - 1; block >= 0; --block) {
    Shared shared;
    f(Lane{.block = block, .blocks = kBlocks}, shared);
  }
}

class CpuDevice : public EmulatedDevice {
 public:
  int index() const override { return -1; }

  char* allocate(size_t bytes, Handle* handle) override {
    forbid("allocate");
    shm::Fd fd;
    shm::Mapping memory = shm::Mapping::create(bytes, &fd);
    const Name name{::getpid(), fd.get(), bytes};
    if (handle) std::memcpy(handle->bytes, &name, sizeof(name));
    char* const data = memory.data();
    const std::lock_guard lock(mutex_);
    memory_.emplace(data, std::pair(std::move(memory), std::move(fd)));
    return data;
  }

  void free(char* memory) override {
    forbid("free");
    const std::lock_guard lock(mutex_);
    const auto found = memory_.find(memory);
    // A process that still reads what is no more dies of it, as its context on a GPU would.
    if (::ftruncate(found->second.second.get(), 0) < 0) shm::fail_with_errno("ftruncate");
    memory_.erase(found);
  }

  char* open(const Handle& handle) override {
    forbid("open");
    Name name;
    std::memcpy(&name, handle.bytes, sizeof(name));
    const std::string path =
        "/proc/" + std::to_string(name.process) + "/fd/" + std::to_string(name.fd);
    shm::Fd fd(::open(path.c_str(), O_RDWR | O_CLOEXEC));
    if (!fd.valid()) shm::fail_with_errno("open " + path);
    shm::Mapping memory = shm::Mapping::of(fd, name.bytes);
    char* const data = memory.data();
    const std::lock_guard lock(mutex_);
    memory_.emplace(data, std::pair(std::move(memory), std::move(fd)));
    return data;
  }

  void close(char* memory) override {
    forbid("close");
    const std::lock_guard lock(mutex_);
    memory_.erase(memory);
  }

  char* allocate_host(size_t bytes, char** on_device) override {
    forbid("allocate_host");
    *on_device = new (std::align_val_t{128}) char[bytes]();
    return *on_device;
  }

  void upload(char* to, const void* from, size_t bytes) override {
    forbid("upload");
    std::memcpy(to, from, bytes);
  }
  void download(void* to, const char* from, size_t bytes) override {
    forbid("download");
    std::memcpy(to, from, bytes);
  }
  void synchronize() override { forbid("synchronize"); }
  bool is_capturing() override { return capturing_; }
  void follow() override {}
  void mark() override {}
  bool is_idle() override { return true; }

  void launch(const device::StageArgs& args) override {
    run_grid<device::StageShared>(
        [&](const Lane& lane, device::StageShared& shared) { device::stage(lane, shared, args); });
  }
  void launch(const device::PullArgs& args) override {
    wait(args.link);
    run_grid<device::PullShared>(
        [&](const Lane& lane, device::PullShared& shared) { device::pull(lane, shared, args); });
  }
  void launch(const device::SumArgs& args) override {
    wait(args.link);
    run_grid<device::SumShared>([&](const Lane& lane, device::SumShared& shared) {
      if (args.value == Value::kBf16) device::sum<device::Bf16>(lane, shared, args);
      if (args.value == Value::kFp16) device::sum<device::Fp16>(lane, shared, args);
      if (args.value == Value::kFp32) device::sum<device::Fp32>(lane, shared, args);
      if (args.value == Value::kFp64) device::sum<device::Fp64>(lane, shared, args);
    });
  }

  void capture(bool capturing) override { capturing_ = capturing; }
  int64_t forbidden() const override { return forbidden_; }

 private:
  struct Name {
    pid_t process;
    int fd;
    size_t bytes;
  };

  static void wait(const device::Link& link) {
    uint32_t yes = 0;
    device::meet(Lane{}, link, yes);
  }

  // As CUDA, which ends the capture too.
  void forbid(const char* what) {
    if (!capturing_) return;
    ++forbidden_;
    throw shm::Error(std::string(what) + ": operation not permitted when stream is capturing");
  }

  std::atomic<bool> capturing_{false};
  std::atomic<int64_t> forbidden_{0};
  std::mutex mutex_;
  std::map<char*, std::pair<shm::Mapping, shm::Fd>> memory_;
};

}  // namespace

std::unique_ptr<EmulatedDevice> make_emulated_device() { return std::make_unique<CpuDevice>(); }

#if !defined(MOE_KERNELS_WITH_CUDA)

namespace {
constexpr const char* kNoCuda =
    "moe_kernels is built without CUDA; build it where torch has CUDA and there is a toolkit, with "
    "MOE_KERNELS_CUDA=on";
}

std::unique_ptr<Device> make_cuda_device(int) { throw shm::Error(kNoCuda); }
std::string bus_id_of_cuda_device(int) { throw shm::Error(kNoCuda); }
std::string cuda_peer_obstacle(int, const std::vector<std::string>&) { return kNoCuda; }

#endif

}  // namespace moe::ep::ipc
