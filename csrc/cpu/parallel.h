// A loop over tasks that the threads of OpenMP's pool take as they come. For files compiled with OpenMP.
#pragma once

#include <cstdint>

#if defined(__SANITIZE_THREAD__)
extern "C" void __tsan_acquire(void* address);
extern "C" void __tsan_release(void* address);
// The compiler hands the loop's own variables to the team in a block that it fills after the last line of ours before
// the team, and reads before the first line in it. So the loop is not watched; the tasks are.
#define IRLFAST_LOOP_OF_TASKS __attribute__((no_sanitize("thread")))
#else
#define IRLFAST_LOOP_OF_TASKS
#endif

namespace irlfast {
namespace {

// A team begins after all that its caller did before, and ends before all that the caller does next. The runtime sees
// to that; ThreadSanitizer cannot look into it and is told.
struct Handover {
#if defined(__SANITIZE_THREAD__)
  void give() { __tsan_release(this); }
  void take() { __tsan_acquire(this); }
#else
  void give() {}
  void take() {}
#endif
};

// Calls task(i) for i in [0, count), in any order; a thread takes `grain` at a time, at least one, and more than that
// is shared out.
template <typename Task>
IRLFAST_LOOP_OF_TASKS void parallel_for(int64_t count, int64_t grain, int threads, const Task& task) {
  if (threads <= 1 || count <= grain) {
    for (int64_t i = 0; i < count; ++i) task(i);
    return;
  }
  if (grain < 1) grain = 1;  // the runtime would hand out nothing, for ever
  // Not in the caller's frame, which the team may not look at before it has taken over.
  static Handover begin, end;
  begin.give();
#pragma omp parallel num_threads(threads)
  {
    begin.take();
#pragma omp for schedule(dynamic, grain) nowait
    for (int64_t i = 0; i < count; ++i) task(i);
    end.give();
  }
  end.take();
}

}  // namespace
}  // namespace irlfast
