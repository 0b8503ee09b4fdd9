// Reading a model's file without keeping others from a core.

#include "file.h"

#include <c10/util/Exception.h>
#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstring>

namespace crst {

namespace {

// One call of the system's copies so much. Kernels without preemption (servers' usual choice) let nobody else have the core
// until it returns: libtorch reads a tensor of 100 MB in one call, which takes 60 to 80 ms.
constexpr size_t kPieceBytes = 128 * 1024;

}  // namespace

PiecewiseFile::PiecewiseFile(const std::string& path) : file_(::open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
  struct stat about {};
  int failed = file_ < 0 ? errno : 0;
  if (failed == 0 && ::fstat(file_, &about) != 0) {
    failed = errno;
    ::close(file_);
  }
  TORCH_CHECK(failed == 0, "open file failed because of errno ", failed, " on fopen: ", std::strerror(failed));
  size_ = static_cast<size_t>(about.st_size);
}

PiecewiseFile::~PiecewiseFile() { ::close(file_); }

size_t PiecewiseFile::size() const { return size_; }

size_t PiecewiseFile::read(uint64_t pos, void* buf, size_t n, const char* what) const {
  size_t done = 0;
  while (done < n) {
    size_t piece = std::min(n - done, kPieceBytes);
    ssize_t got = ::pread(file_, static_cast<char*>(buf) + done, piece, static_cast<off_t>(pos + done));
    if (got < 0 && errno == EINTR) {
      continue;
    }
    TORCH_CHECK(got >= 0, "file read failed: ", std::strerror(errno), " (", what, ")");
    if (got == 0) {
      break;
    }
    done += static_cast<size_t>(got);
  }
  return done;
}

}  // namespace crst
