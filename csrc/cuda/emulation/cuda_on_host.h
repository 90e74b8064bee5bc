// What csrc/cuda takes of CUDA C++, for a host compiler. Blocks run one after the other, and so do a block's threads,
// as fibers: from one barrier or shuffle to the next, in an order that turns round each time and from block to block.
// So sanitizers see every address, a barrier that part of a block never reaches is an error, and a result that hangs on
// the order in which threads run differs from what another order gives. How long an operation takes is no concern here.
#pragma once

#include <cstdint>
#include <cstring>
#include <functional>

#define __global__
#define __device__
#define __shared__ static
#define __launch_bounds__(...)

namespace irlfast::cuda {

struct Position {
  unsigned x = 0;
};

inline Position threadIdx, blockIdx, blockDim, gridDim;

enum class Meeting { kWarp, kBlock };

// Runs the other threads until the warp, or the block, has come to here.
void meet(Meeting meeting);

// 8 bytes of this thread that others of its warp can read.
uint64_t& mailbox(unsigned lane);

void run_grid(unsigned blocks, unsigned threads, const std::function<void()>& kernel);

inline void __syncthreads() {
  meet(Meeting::kBlock);
}

int __syncthreads_or(int predicate);

inline void __threadfence() {}

inline int atomicAdd(int* address, int value) {
  const int before = *address;
  *address += value;
  return before;
}

template <typename T>
T exchange(T value, unsigned from) {
  static_assert(sizeof(T) <= sizeof(uint64_t), "a mailbox has 8 bytes");
  std::memcpy(&mailbox(threadIdx.x % 32), &value, sizeof value);
  meet(Meeting::kWarp);
  std::memcpy(&value, &mailbox(from), sizeof value);
  meet(Meeting::kWarp);  // before it is written again
  return value;
}

template <typename T>
T __shfl_down_sync(unsigned, T value, unsigned by) {
  const unsigned lane = threadIdx.x % 32;
  return exchange(value, lane + by < 32 ? lane + by : lane);
}

template <typename T>
T __shfl_sync(unsigned, T value, unsigned from) {
  return exchange(value, from);
}

}  // namespace irlfast::cuda
