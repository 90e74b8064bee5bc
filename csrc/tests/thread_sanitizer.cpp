// Read by ThreadSanitizer at start. What it is told in csrc/cpu/parallel.h covers the tasks, but not the caller's
// arguments to a team, which the compiler passes through the runtime before any statement of ours.
extern "C" const char* __tsan_default_suppressions();

extern "C" __attribute__((visibility("default"))) const char* __tsan_default_suppressions() {
  return "race_top:csrc/cpu/parallel.h\n";
}
