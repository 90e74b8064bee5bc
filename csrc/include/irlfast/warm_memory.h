// Large blocks of memory that keep their pages. The C library hands every large block back to the kernel, and the next
// one is faulted in again page by page; a gradient of the size of the logits takes longer to fault in than to compute.
#pragma once

#include <cstdint>

namespace irlfast {

// One block, from what was released before where that fits, else new and in huge pages. Its contents are undefined.
class WarmBlock {
 public:
  explicit WarmBlock(int64_t bytes);
  ~WarmBlock();
  WarmBlock(const WarmBlock&) = delete;
  WarmBlock& operator=(const WarmBlock&) = delete;

  void* data() const { return data_; }
  int64_t bytes() const { return bytes_; }

 private:
  void* data_;
  int64_t bytes_, capacity_;
};

// How many bytes of released blocks are kept, 512 MiB unless set. What is beyond goes back to the system at once.
void set_warm_memory_limit(int64_t bytes);

// Bytes of released blocks that are kept now.
int64_t warm_memory_held();

}  // namespace irlfast
