// Walking over a module's attributes, its submodules' included.
#pragma once

#include <functional>
#include <unordered_set>

#include "common.h"

namespace crst {

// Values nested deeper than this are refused: state is data, not a linked structure.
constexpr int kDepthMax = 64;

// One attribute that holds a value (not a submodule).
struct Slot {
  c10::ivalue::Object* object;
  size_t index;
  std::string path;

  const IValue& value() const { return object->slots()[index]; }
  c10::TypePtr type() const { return object->type()->getAttribute(index); }
  bool is_weight() const { return object->type()->is_parameter(index) && value().isTensor() && value().toTensor().defined(); }
};

// All attributes, in the order of the module's definition: the same for every copy of it.
std::vector<Slot> walk(const Module& module);

// Objects of C++ classes that TorchScript only passes around (packed weights of quantised layers).
bool is_opaque(const IValue& value);

void each_tensor(const IValue& value, const std::function<void(const at::Tensor&)>& visit, int depth = 0);

// Whether a tensor is bytes in a storage and nothing more.
bool is_plain(const at::Tensor& tensor);

// A flat tensor over all bytes of a tensor's storage.
at::Tensor bytes_of_storage(const at::Tensor& tensor);

at::Tensor view_of_storage(const at::Tensor& storage, at::ScalarType type, int64_t offset, at::IntArrayRef sizes,
                           at::IntArrayRef strides);

}  // namespace crst
