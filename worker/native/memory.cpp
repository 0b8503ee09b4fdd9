// Memory of tensors: large blocks are kept when they are freed, so that the next batch finds its pages there. malloc would
// give them back to the system, and each batch would have them zeroed anew.

#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/Allocator.h>
#include <c10/core/CPUAllocator.h>
#include <c10/util/Exception.h>
#include <malloc.h>
#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <chrono>
#include <cstdint>
#include <cstdlib>
#include <list>
#include <mutex>
#include <unordered_map>
#include <vector>

#include "common.h"

namespace crst {

namespace {

using Clock = std::chrono::steady_clock;

// Smaller ones are malloc's to keep, which does it well. They too have the size before them: libtorch wants one deleter for
// all.
constexpr size_t kBlockMin = 128 * 1024;
// What is kept altogether, in bytes, and for how long nobody may ask for it.
constexpr size_t kKeptMax = 512 * 1024 * 1024;
constexpr std::chrono::seconds kIdleMax{10};
// What is given back to the system in one call.
constexpr size_t kPieceBytes = 1024 * 1024;
// libtorch aligns tensors to it; a block's size lies before its first byte.
constexpr size_t kAlignment = 64;

// Blocks of near sizes are the same to us, or a batch with one row more would find nothing: at most an eighth is unused.
size_t class_of(size_t bytes) {
  size_t step = kBlockMin / 8;
  while (bytes > step * 16) {
    step *= 2;
  }
  return (bytes + step - 1) / step * step;
}

struct Kept {
  char* block;
  size_t bytes;
  Clock::time_point since;
};

class Shelf {
 public:
  // A block of this class, or null.
  char* take(size_t bytes) {
    std::lock_guard<std::mutex> lock(mutex_);
    auto found = by_class_.find(bytes);
    if (found == by_class_.end() || found->second.empty()) {
      return nullptr;
    }
    // The last one: its pages are the likeliest to be in a cache.
    auto place = found->second.back();
    found->second.pop_back();
    char* block = place->block;
    bytes_ -= bytes;
    kept_.erase(place);
    return block;
  }

  void put(char* block, size_t bytes) noexcept {
    std::list<Kept> rest;
    try {
      std::lock_guard<std::mutex> lock(mutex_);
      auto now = Clock::now();
      auto& same = by_class_[bytes];
      same.reserve(same.size() + 1);
      kept_.push_back({block, bytes, now});
      same.push_back(std::prev(kept_.end()));
      bytes_ += bytes;
      while (!kept_.empty() && (bytes_ > kKeptMax || now - kept_.front().since > kIdleMax)) {
        take_oldest(rest);
      }
    } catch (const std::bad_alloc&) {
      // No memory to remember it by; only what comes before it is kept can throw.
      std::free(block);
    }
    release(rest);
  }

  void clear() noexcept {
    std::list<Kept> rest;
    {
      std::lock_guard<std::mutex> lock(mutex_);
      rest.splice(rest.end(), kept_);
      by_class_.clear();
      bytes_ = 0;
    }
    release(rest);
  }

 private:
  void take_oldest(std::list<Kept>& rest) {
    Kept oldest = kept_.front();
    auto& same = by_class_[oldest.bytes];
    // Within a class they are in the order in which they came, too.
    same.erase(same.begin());
    bytes_ -= oldest.bytes;
    rest.splice(rest.end(), kept_, kept_.begin());
  }

  // Without the lock: it takes the system a while.
  static void release(const std::list<Kept>& blocks) {
    for (const Kept& kept : blocks) {
      give_up_pages(kept);
      std::free(kept.block);
    }
  }

  // Whole pages within a large block, a piece at a time. Unmapping 100 MB in one call takes 10 to 20 ms, in which no other
  // thread of the process may map anything and, where the kernel isn't preempted, none may have the core.
  static void give_up_pages(const Kept& kept) {
    static const auto page = static_cast<uintptr_t>(sysconf(_SC_PAGESIZE));
    auto begin = reinterpret_cast<uintptr_t>(kept.block);
    uintptr_t end = (begin + kept.bytes) / page * page;
    for (uintptr_t at = (begin + page - 1) / page * page; at < end; at += kPieceBytes) {
      // Where it fails, free does it.
      (void)madvise(reinterpret_cast<void*>(at), std::min<size_t>(kPieceBytes, end - at), MADV_DONTNEED);
    }
  }

  std::mutex mutex_;
  std::list<Kept> kept_;
  std::unordered_map<size_t, std::vector<std::list<Kept>::iterator>> by_class_;
  size_t bytes_ = 0;
};

// Never destroyed: tensors may be freed while the process ends.
Shelf& shelf() {
  static auto* const the_shelf = new Shelf;
  return *the_shelf;
}

void give_back(void* data) {
  if (data == nullptr) {
    return;
  }
  char* block = static_cast<char*>(data) - kAlignment;
  size_t bytes = *reinterpret_cast<size_t*>(block);
  if (bytes < kBlockMin) {
    std::free(block);
  } else {
    shelf().put(block, bytes);
  }
}

char* fresh(size_t bytes) {
  void* block = nullptr;
  if (posix_memalign(&block, kAlignment, bytes) != 0) {
    // What is kept for later may be what is missing now.
    shelf().clear();
    TORCH_CHECK_WITH(
        OutOfMemoryError, posix_memalign(&block, kAlignment, bytes) == 0, "can't allocate memory: ", bytes, " bytes were needed");
  }
  return static_cast<char*>(block);
}

class KeepingAllocator final : public c10::Allocator {
 public:
  c10::DataPtr allocate(size_t n) override {
    void* data = nullptr;
    if (n > 0) {
      // What overflows is more than there is; the system says so.
      size_t bytes = n > SIZE_MAX / 2 ? n : n + kAlignment;
      bytes = bytes < kBlockMin || bytes > SIZE_MAX / 2 ? bytes : class_of(bytes);
      char* block = bytes < kBlockMin ? nullptr : shelf().take(bytes);
      if (block == nullptr) {
        block = fresh(bytes);
        *reinterpret_cast<size_t*>(block) = bytes;
      }
      data = block + kAlignment;
    }
    return {data, data, &give_back, c10::Device(c10::DeviceType::CPU)};
  }

  c10::DeleterFnPtr raw_deleter() const override {
    return &give_back;
  }

  void copy_data(void* dest, const void* src, std::size_t count) const override {
    default_copy_data(dest, src, count);
  }
};

}  // namespace

}  // namespace crst

int32_t crst_keep_memory(crst_error* error) {
  return crst::guarded(error, [] {
    static auto* const allocator = new crst::KeepingAllocator;
    c10::SetCPUAllocator(allocator);
  });
}

void crst_give_memory_back(void) {
  crst::shelf().clear();
  if (crst::has_gpus()) {
    try {
      at::getHostAllocator(at::kCUDA)->empty_cache();
    } catch (...) {
      // A device that is lost says so elsewhere.
    }
  }
#ifdef __GLIBC__
  malloc_trim(0);
#endif
}
