// The store of a group, which is kept by another process: that may be stopped or out of reach, and
// then some stores answer never. Nor does one of a process answer two threads at once: a question
// waits for as long as another thread waits for a key.
#pragma once

#include <chrono>
#include <functional>
#include <future>
#include <memory>
#include <mutex>
#include <optional>
#include <torch/csrc/distributed/c10d/ProcessGroup.hpp>
#include <torch/csrc/distributed/c10d/Store.hpp>
#include <type_traits>
#include <utility>

namespace moe::ep {

// From any thread.
class GroupStore {
 public:
  // MPI does without.
  static bool has(c10d::ProcessGroup& group);

  // How long an answer is waited for; now and then `meanwhile` is called, and may throw.
  struct Patience {
    std::chrono::milliseconds limit{400};
    std::function<void()> meanwhile = {};
  };
  // What a function of the store returns, which owns all that it uses: it goes on, on a thread of
  // its own, where this waits for it no longer. Nothing if it raises, or there is no store, or it
  // does not answer in time; while an earlier question is open, none is asked.
  template <typename F>
  auto ask(c10d::ProcessGroup& group, F question, const Patience& patience = at_once()) {
    return put(group, std::move(question), /*in_any_case=*/false, patience);
  }
  // The same for what others are to read: it is said as soon as the store answers again.
  template <typename F>
  auto tell(c10d::ProcessGroup& group, F saying) {
    return put(group, std::move(saying), /*in_any_case=*/true, at_once());
  }

 private:
  static Patience at_once() { return {}; }

  // Whether it has returned.
  bool run(c10d::ProcessGroup& group, std::function<void(c10d::Store&)> question, bool in_any_case,
           const Patience& patience);

  template <typename F>
  auto put(c10d::ProcessGroup& group, F question, bool in_any_case, const Patience& patience) {
    using Answer = std::invoke_result_t<F, c10d::Store&>;
    const auto answer = std::make_shared<std::optional<Answer>>();
    const bool answered = run(
        group,
        [answer, question = std::move(question)](c10d::Store& store) {
          answer->emplace(question(store));
        },
        in_any_case, patience);
    return answered ? std::move(*answer) : std::optional<Answer>();
  }

  std::mutex mutex_;
  std::future<bool> open_;
};

}  // namespace moe::ep
