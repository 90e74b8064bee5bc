#include <map>
#include <mutex>
#include <stdexcept>
#include <string>

#include "common/launch.h"

namespace irlfast::cuda {
namespace {

#if defined(__CUDACC__)
__global__ void nothing() {}

int query_multiprocessors(int device) {
  int count = 0;
  check(cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device), "cudaDeviceGetAttribute");
  return count;
}
#else
// Few, so that a block has several rows.
int query_multiprocessors(int) {
  return 1;
}
#endif

int multiprocessors(int device) {
  static std::mutex mutex;
  static std::map<int, int> known;
  const std::lock_guard<std::mutex> lock(mutex);
  const auto found = known.find(device);
  return found != known.end() ? found->second : known[device] = query_multiprocessors(device);
}

}  // namespace

#if defined(__CUDACC__)

void check(cudaError_t status, const char* what) {
  if (status == cudaSuccess) return;
  throw std::runtime_error(std::string("CUDA: ") + what + " failed: " + cudaGetErrorString(status) + " (" +
                           cudaGetErrorName(status) + ")");
}

bool emulated() {
  return false;
}

int device_count() {
  int count = 0;
  if (cudaGetDeviceCount(&count) == cudaSuccess) return count;
  cudaGetLastError();  // it is answered by 0, and must not show up at the next launch
  return 0;
}

std::string unavailable(int device) {
  int count = 0;
  cudaError_t status = cudaGetDeviceCount(&count);
  if (status == cudaSuccess && device >= count) status = cudaErrorInvalidDevice;
  if (status == cudaSuccess) {
    // A device that nothing was compiled for answers with "no kernel image".
    const OnDevice guard(device);
    cudaFuncAttributes attributes;
    status = cudaFuncGetAttributes(&attributes, nothing);
  }
  if (status == cudaSuccess) return "";
  cudaGetLastError();
  return std::string(cudaGetErrorString(status)) + " (" + cudaGetErrorName(status) + ")";
}

#else

bool emulated() {
  return true;
}

int device_count() {
  return 0;
}

std::string unavailable(int) {
  return "the kernels are emulated on the CPU";
}

#endif

int64_t resident_blocks(int device, unsigned threads) {
  constexpr int64_t kThreads = 2048, kBlocks = 32;  // of a multiprocessor, on what has most of them
  return multiprocessors(device) * std::min(kBlocks, kThreads / threads);
}

}  // namespace irlfast::cuda
