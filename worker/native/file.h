// A model's file, read in pieces.
#pragma once

#include <caffe2/serialize/read_adapter_interface.h>

#include <string>

namespace crst {

// What libtorch reads a module from. Returns less than was asked for only at the end of the file.
class PiecewiseFile final : public caffe2::serialize::ReadAdapterInterface {
 public:
  // Throws where the file can't be opened.
  explicit PiecewiseFile(const std::string& path);
  PiecewiseFile(const PiecewiseFile&) = delete;
  PiecewiseFile& operator=(const PiecewiseFile&) = delete;
  ~PiecewiseFile() override;

  size_t size() const override;
  size_t read(uint64_t pos, void* buf, size_t n, const char* what) const override;

 private:
  int file_;
  size_t size_ = 0;
};

}  // namespace crst
