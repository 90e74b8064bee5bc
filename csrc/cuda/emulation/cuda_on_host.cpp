#include "emulation/cuda_on_host.h"

#include <ucontext.h>

#include <memory>
#include <mutex>
#include <stdexcept>
#include <vector>

namespace irlfast::cuda {
namespace {

constexpr unsigned kWarp = 32;
constexpr size_t kStackBytes = size_t(256) << 10;

enum class State { kRuns, kAtWarp, kAtBlock, kDone };

struct Fiber {
  ucontext_t context{};
  State state = State::kRuns;
  std::unique_ptr<char[]> stack{new char[kStackBytes]};
  uint64_t mail = 0;
  int predicate = 0;
};

class Block {
 public:
  // `backwards`: from the last thread to the first until they meet for the first time.
  void run(unsigned threads, const std::function<void()>& kernel, bool backwards) {
    while (fibers_.size() < threads) fibers_.push_back(std::make_unique<Fiber>());
    threads_ = threads;
    kernel_ = &kernel;
    backwards_ = backwards;
    for (unsigned i = 0; i < threads; ++i) start(*fibers_[i]);
    while (!everyone_is(State::kDone)) {
      for (unsigned first = 0; first < threads; first += kWarp) run_warp(first);
      backwards_ = !backwards_;
      if (everyone_is(State::kDone)) break;
      if (!everyone_is(State::kAtBlock)) throw std::logic_error("part of a block has ended or never meets the others");
      for (unsigned i = 0; i < threads; ++i) fibers_[i]->state = State::kRuns;
    }
  }

  void wait(State state) {
    Fiber& own = *fibers_[threadIdx.x];
    const unsigned self = threadIdx.x;
    own.state = state;
    swapcontext(&own.context, &scheduler_);
    threadIdx.x = self;
  }

  Fiber& of_warp(unsigned lane) { return *fibers_[threadIdx.x / kWarp * kWarp + lane]; }
  Fiber& thread(unsigned i) { return *fibers_[i]; }
  unsigned threads() const { return threads_; }
  void call() const { (*kernel_)(); }

 private:
  void start(Fiber& fiber);

  void run_warp(unsigned first) {
    while (true) {
      unsigned at_warp = 0;
      for (unsigned k = 0; k < kWarp; ++k) {
        const unsigned i = first + (backwards_ ? kWarp - 1 - k : k);
        if (fibers_[i]->state == State::kRuns) {
          threadIdx.x = i;
          swapcontext(&scheduler_, &fibers_[i]->context);
        }
        at_warp += fibers_[i]->state == State::kAtWarp;
      }
      if (at_warp == 0) return;
      if (at_warp != kWarp) throw std::logic_error("part of a warp does not take part in a shuffle");
      for (unsigned k = 0; k < kWarp; ++k) fibers_[first + k]->state = State::kRuns;
    }
  }

  bool everyone_is(State state) const {
    for (unsigned i = 0; i < threads_; ++i) {
      if (fibers_[i]->state != state) return false;
    }
    return true;
  }

  std::vector<std::unique_ptr<Fiber>> fibers_;
  ucontext_t scheduler_{};
  const std::function<void()>* kernel_ = nullptr;
  unsigned threads_ = 0;
  bool backwards_ = false;
};

Block& block() {
  static Block block;
  return block;
}

void run_thread() {
  block().call();
  block().wait(State::kDone);
}

void Block::start(Fiber& fiber) {
  fiber.state = State::kRuns;
  getcontext(&fiber.context);
  fiber.context.uc_stack.ss_sp = fiber.stack.get();
  fiber.context.uc_stack.ss_size = kStackBytes;
  fiber.context.uc_link = nullptr;
  makecontext(&fiber.context, run_thread, 0);
}

}  // namespace

void meet(Meeting meeting) {
  block().wait(meeting == Meeting::kWarp ? State::kAtWarp : State::kAtBlock);
}

uint64_t& mailbox(unsigned lane) {
  return block().of_warp(lane).mail;
}

int __syncthreads_or(int predicate) {
  block().thread(threadIdx.x).predicate = predicate;
  __syncthreads();
  int any = 0;
  for (unsigned i = 0; i < block().threads(); ++i) any |= block().thread(i).predicate;
  __syncthreads();
  return any;
}

void run_grid(unsigned blocks, unsigned threads, const std::function<void()>& kernel) {
  static std::mutex one_at_a_time;
  const std::lock_guard<std::mutex> lock(one_at_a_time);
  if (threads == 0 || threads % kWarp != 0 || threads > 1024) throw std::logic_error("a block of broken warps");
  gridDim.x = blocks;
  blockDim.x = threads;
  for (unsigned i = 0; i < blocks; ++i) {
    blockIdx.x = i;
    block().run(threads, kernel, i % 2 == 1);
  }
}

}  // namespace irlfast::cuda
