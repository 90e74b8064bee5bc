// A loop over tasks that the threads of OpenMP's pool take as they come. For files compiled with OpenMP.
#pragma once

#include <cstdint>

#if defined(__SANITIZE_THREAD__)
extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);
#endif

namespace irlfast {
namespace {

// What the threads of a team do between two handovers comes after the one and before the other. The runtime sees to
// that; ThreadSanitizer cannot look into it and is told.
inline void hand_over() {
#if defined(__SANITIZE_THREAD__)
  static char team;
  __tsan_release(&team);
  __tsan_acquire(&team);
#endif
}

// Calls task(i) for i in [0, count), in any order; a thread takes `grain` at a time, and more than that is shared out.
template <typename Task>
void parallel_for(int64_t count, int64_t grain, int threads, const Task& task) {
  if (threads <= 1 || count <= grain) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  hand_over();
#pragma omp parallel num_threads(threads)
  {
    hand_over();
#pragma omp for schedule(dynamic, grain) nowait
    for (int64_t i = 0; i < count; ++i) task(i);
    hand_over();
  }
  hand_over();
}

}  // namespace
}  // namespace irlfast
