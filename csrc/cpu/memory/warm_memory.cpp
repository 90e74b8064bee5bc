#include "irlfast/warm_memory.h"

#include <deque>
#include <mutex>
#include <new>

#include "irlfast/huge_pages.h"

#if defined(__unix__) || defined(__APPLE__)
#include <sys/mman.h>
#endif

namespace irlfast {
namespace {

constexpr int64_t kPage = int64_t(2) << 20;

void* map(int64_t bytes) {
#if defined(__unix__) || defined(__APPLE__)
  // One page more, so that whole huge pages lie inside wherever the mapping begins; what is over is given back.
  const size_t reserved = size_t(bytes + kPage);
  void* memory = mmap(nullptr, reserved, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (memory == MAP_FAILED) throw std::bad_alloc();
  char* begin = static_cast<char*>(memory);
  char* aligned = begin + (uintptr_t(kPage) - reinterpret_cast<uintptr_t>(begin) % kPage) % kPage;
  if (aligned > begin) munmap(begin, size_t(aligned - begin));
  char* const end = begin + reserved;
  if (end > aligned + bytes) munmap(aligned + bytes, size_t(end - (aligned + bytes)));
  advise_huge_pages(aligned, bytes);
  return aligned;
#else
  return ::operator new(size_t(bytes), std::align_val_t(4096));
#endif
}

void unmap(void* data, int64_t bytes) {
#if defined(__unix__) || defined(__APPLE__)
  munmap(data, size_t(bytes));
#else
  (void)bytes;
  ::operator delete(data, std::align_val_t(4096));
#endif
}

struct Released {
  void* data;
  int64_t capacity;
};

class Pool {
 public:
  // A released block that is at most a quarter too large, or null.
  void* take(int64_t bytes, int64_t& capacity) {
    const std::lock_guard<std::mutex> lock(mutex_);
    auto best = released_.end();
    for (auto it = released_.begin(); it != released_.end(); ++it) {
      if (it->capacity < bytes || it->capacity > bytes + bytes / 4) continue;
      if (best == released_.end() || it->capacity < best->capacity) best = it;
    }
    if (best == released_.end()) return nullptr;
    const Released found = *best;
    released_.erase(best);
    held_ -= found.capacity;
    capacity = found.capacity;
    return found.data;
  }

  void give(void* data, int64_t capacity) {
    const std::lock_guard<std::mutex> lock(mutex_);
    released_.push_back({data, capacity});
    held_ += capacity;
    shrink();
  }

  void limit(int64_t bytes) {
    const std::lock_guard<std::mutex> lock(mutex_);
    limit_ = bytes;
    shrink();
  }

  int64_t held() {
    const std::lock_guard<std::mutex> lock(mutex_);
    return held_;
  }

 private:
  // The oldest first: what was released last is the most likely to be asked for again.
  void shrink() {
    while (held_ > limit_ && !released_.empty()) {
      const Released oldest = released_.front();
      released_.pop_front();
      held_ -= oldest.capacity;
      unmap(oldest.data, oldest.capacity);
    }
  }

  std::mutex mutex_;
  std::deque<Released> released_;
  int64_t held_ = 0, limit_ = int64_t(512) << 20;
};

// Never destroyed: blocks may be released after everything else at the end of the process.
Pool& pool() {
  static Pool* const instance = new Pool;
  return *instance;
}

}  // namespace

WarmBlock::WarmBlock(int64_t bytes) : bytes_(bytes), capacity_((bytes + kPage - 1) / kPage * kPage) {
  data_ = pool().take(capacity_, capacity_);
  if (data_ == nullptr) data_ = map(capacity_);
}

WarmBlock::~WarmBlock() {
  pool().give(data_, capacity_);
}

void set_warm_memory_limit(int64_t bytes) {
  pool().limit(bytes);
}

int64_t warm_memory_held() {
  return pool().held();
}

}  // namespace irlfast
