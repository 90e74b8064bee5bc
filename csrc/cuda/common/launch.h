// How a kernel is started, on a GPU or in the emulation.
#pragma once

#include <algorithm>
#include <cstdint>

#include "irlfast/cuda.h"

#if defined(__CUDACC__)
#include <cuda_runtime.h>
#define IRLFAST_DEVICE __device__ __forceinline__
#else
#include "emulation/cuda_on_host.h"
#define IRLFAST_DEVICE inline __attribute__((always_inline))
#endif

namespace irlfast::cuda {

// So many blocks of `threads` can run at once on a device, about: what a kernel that loops over its rows is started
// with.
int64_t resident_blocks(int device, unsigned threads);

#if defined(__CUDACC__)

// Throws std::runtime_error unless it is cudaSuccess.
void check(cudaError_t status, const char* what);

// The calling thread's current device, for as long as this lives.
class OnDevice {
 public:
  explicit OnDevice(int device) {
    check(cudaGetDevice(&before_), "cudaGetDevice");
    if (before_ != device) check(cudaSetDevice(device), "cudaSetDevice");
    changed_ = before_ != device;
  }
  ~OnDevice() {
    if (changed_) cudaSetDevice(before_);
  }
  OnDevice(const OnDevice&) = delete;
  OnDevice& operator=(const OnDevice&) = delete;

 private:
  int before_ = 0;
  bool changed_ = false;
};

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, unsigned threads, const Queue& queue,
            const Arguments&... arguments) {
  const OnDevice guard(queue.device);
  kernel<<<dim3(unsigned(blocks)), dim3(threads), 0, reinterpret_cast<cudaStream_t>(queue.stream)>>>(arguments...);
  check(cudaGetLastError(), "a launch");
}

#else

template <typename... Parameters, typename... Arguments>
void launch(void (*kernel)(Parameters...), int64_t blocks, unsigned threads, const Queue&,
            const Arguments&... arguments) {
  run_grid(unsigned(blocks), threads, [&] { kernel(arguments...); });
}

#endif

// One block a row, or where rows are short, as many blocks as run at once, each looping over its rows.
inline int64_t blocks_for(int64_t rows, unsigned threads, bool short_rows, int device) {
  constexpr int64_t kMostBlocks = 2147483647;
  return std::min(rows, short_rows ? resident_blocks(device, threads) : kMostBlocks);
}

// Which of the rows, or sequences, this block has: from its own number on in steps of the grid.
#define IRLFAST_FOR_BLOCKS(row, rows) for (int64_t row = blockIdx.x; row < (rows); row += gridDim.x)

}  // namespace irlfast::cuda
