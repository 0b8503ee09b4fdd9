// Saving a sequence's state: which attributes differ from the pristine module, and their bytes.

#include <ATen/Functions.h>

#include "attributes.h"
#include "state.h"

namespace crst {

namespace {

[[noreturn]] void not_checkpointable(const std::string& path, const std::string& why) {
  throw Refusal{CRST_NOT_CHECKPOINTABLE, "attribute `" + path + "` " + why};
}

void put(std::string& out, const void* data, size_t length) { out.append(static_cast<const char*>(data), length); }

template <typename T>
void put_number(std::string& out, T value) {
  put(out, &value, sizeof value);
}

void put_count(std::string& out, size_t count) {
  if (count > UINT32_MAX) {
    throw Refusal{CRST_NOT_CHECKPOINTABLE, "the state has a value of more than 2^32 elements"};
  }
  put_number(out, static_cast<uint32_t>(count));
}

bool same_tensor(const at::Tensor& a, const at::Tensor& b) {
  if (a.is_same(b)) {
    return true;
  }
  if (!a.defined() || !b.defined() || a.scalar_type() != b.scalar_type() || a.sizes() != b.sizes() ||
      a.device() != b.device() || a.layout() != b.layout() || a.is_quantized() != b.is_quantized()) {
    return false;
  }
  if (!is_plain(a) || !is_plain(b)) {
    return at::equal(a, b);
  }
  if (a.strides() != b.strides() && !(a.is_contiguous() && b.is_contiguous())) {
    return false;
  }
  // Bytes, not numbers: a NaN has to equal itself, and -0.0 is not 0.0.
  at::Tensor left = a.contiguous().to(at::kCPU);
  at::Tensor right = b.contiguous().to(at::kCPU);
  return left.nbytes() == 0 || std::memcmp(left.const_data_ptr(), right.const_data_ptr(), left.nbytes()) == 0;
}

bool same(const IValue& a, const IValue& b, int depth = 0) {
  if (depth > kDepthMax) {
    return false;
  }
  auto same_all = [&](c10::ArrayRef<IValue> x, c10::ArrayRef<IValue> y) {
    if (x.size() != y.size()) {
      return false;
    }
    for (size_t i = 0; i < x.size(); i++) {
      if (!same(x[i], y[i], depth + 1)) {
        return false;
      }
    }
    return true;
  };
  if (a.isTensor() && b.isTensor()) {
    return same_tensor(a.toTensor(), b.toTensor());
  }
  if (a.isDouble() && b.isDouble()) {
    double x = a.toDouble();
    double y = b.toDouble();
    return std::memcmp(&x, &y, sizeof x) == 0;
  }
  if (a.isTuple() && b.isTuple()) {
    return same_all(a.toTupleRef().elements(), b.toTupleRef().elements());
  }
  if (a.isList() && b.isList()) {
    return same_all(a.toListRef(), b.toListRef());
  }
  if (a.isGenericDict() && b.isGenericDict()) {
    std::vector<IValue> x;
    std::vector<IValue> y;
    for (const auto& entry : a.toGenericDict()) {
      x.push_back(entry.key());
      x.push_back(entry.value());
    }
    for (const auto& entry : b.toGenericDict()) {
      y.push_back(entry.key());
      y.push_back(entry.value());
    }
    return same_all(x, y);
  }
  if (a.isObject() || b.isObject()) {
    return a.is(b);
  }
  return a.tagKind() == b.tagKind() && (a.is(b) || a == b);
}

// The tensors of one instance, and which of them share memory.
struct Memory {
  std::vector<std::vector<at::Tensor>> tensors;        // per slot
  std::vector<std::vector<std::pair<size_t, size_t>>> first;  // per tensor: slot and place where its storage is met first
  std::unordered_map<void*, int> containers;           // how often a list or dict is met

  explicit Memory(const std::vector<Slot>& slots) : tensors(slots.size()), first(slots.size()) {
    std::unordered_map<void*, std::pair<size_t, size_t>> met;
    for (size_t i = 0; i < slots.size(); i++) {
      each_tensor(slots[i].value(), [&](const at::Tensor& tensor) {
        void* storage = tensor.has_storage() ? static_cast<void*>(tensor.storage().unsafeGetStorageImpl())
                                             : static_cast<void*>(tensor.unsafeGetTensorImpl());
        auto at = met.emplace(storage, std::make_pair(i, tensors[i].size())).first->second;
        first[i].push_back(at);
        tensors[i].push_back(tensor);
      });
      count_containers(slots[i].value(), 0);
    }
  }

  void count_containers(const IValue& value, int depth) {
    if (depth > kDepthMax) {
      return;
    }
    if (value.isList() || value.isGenericDict()) {
      containers[const_cast<void*>(value.internalToPointer())] += 1;
    }
    if (value.isTuple()) {
      for (const auto& element : value.toTupleRef().elements()) {
        count_containers(element, depth + 1);
      }
    } else if (value.isList() && !value.isTensorList() && !value.isIntList() && !value.isDoubleList() &&
               !value.isBoolList()) {
      for (const auto& element : value.toListRef()) {
        count_containers(element, depth + 1);
      }
    } else if (value.isGenericDict()) {
      for (const auto& entry : value.toGenericDict()) {
        count_containers(entry.value(), depth + 1);
      }
    }
  }
};

class Writer {
 public:
  Writer(const Memory& memory, const std::vector<bool>& chosen) : memory_(memory) {
    for (size_t i = 0; i < chosen.size(); i++) {
      for (const auto& tensor : memory.tensors[i]) {
        if (chosen[i] && is_plain(tensor)) {
          references_[tensor.storage().unsafeGetStorageImpl()] += 1;
        }
      }
    }
  }

  void attribute(const Slot& slot) {
    path_ = slot.path;
    put_count(attributes_, slot.path.size());
    put(attributes_, slot.path.data(), slot.path.size());
    value(slot.value(), slot.type(), 0);
    count_ += 1;
  }

  std::string finish() const {
    std::string out;
    out.reserve(storages_.size() + attributes_.size() + 8);
    put_count(out, storage_count_);
    out += storages_;
    put_count(out, count_);
    return out + attributes_;
  }

 private:
  void value(const IValue& value, const c10::TypePtr& type, int depth) {
    if (depth > kDepthMax) {
      not_checkpointable(path_, "holds a value that is nested too deep");
    }
    switch (type->kind()) {
      case c10::TypeKind::OptionalType:
        if (value.isNone()) {
          put_number<uint8_t>(attributes_, kNone);
          return;
        }
        return this->value(value, type->expectRef<c10::OptionalType>().getElementType(), depth + 1);
      case c10::TypeKind::NoneType:
        return put_number<uint8_t>(attributes_, kNone);
      case c10::TypeKind::TensorType:
        return tensor(value);
      case c10::TypeKind::IntType:
        put_number<uint8_t>(attributes_, kInt);
        return put_number<int64_t>(attributes_, value.toInt());
      case c10::TypeKind::FloatType:
        put_number<uint8_t>(attributes_, kFloat);
        return put_number<double>(attributes_, value.toDouble());
      case c10::TypeKind::BoolType:
        put_number<uint8_t>(attributes_, kBool);
        return put_number<uint8_t>(attributes_, value.toBool() ? 1 : 0);
      case c10::TypeKind::StringType: {
        const std::string& text = value.toStringRef();
        put_number<uint8_t>(attributes_, kText);
        put_count(attributes_, text.size());
        return put(attributes_, text.data(), text.size());
      }
      case c10::TypeKind::TupleType:
        return tuple(value, type->expectRef<c10::TupleType>(), depth);
      case c10::TypeKind::ListType:
        return list(value, type->expectRef<c10::ListType>(), depth);
      case c10::TypeKind::DictType:
        return dict(value, type->expectRef<c10::DictType>(), depth);
      default:
        not_checkpointable(path_, "changed and is a `" + type->annotation_str() + "`, which can't be saved");
    }
  }

  void owned(const IValue& value) {
    auto met = memory_.containers.find(const_cast<void*>(value.internalToPointer()));
    if (met == memory_.containers.end() || met->second != 1) {
      not_checkpointable(path_, "shares a list or dict with another attribute, which can't be saved");
    }
  }

  void tuple(const IValue& value, const c10::TupleType& type, int depth) {
    const auto& elements = value.toTupleRef().elements();
    put_number<uint8_t>(attributes_, kTuple);
    put_count(attributes_, elements.size());
    for (size_t i = 0; i < elements.size(); i++) {
      this->value(elements[i], type.elements().at(i), depth + 1);
    }
  }

  void list(const IValue& value, const c10::ListType& type, int depth) {
    owned(value);
    auto elements = value.toListRef();
    put_number<uint8_t>(attributes_, kList);
    put_count(attributes_, elements.size());
    for (const auto& element : elements) {
      this->value(element, type.getElementType(), depth + 1);
    }
  }

  void dict(const IValue& value, const c10::DictType& type, int depth) {
    owned(value);
    auto entries = value.toGenericDict();
    put_number<uint8_t>(attributes_, kDict);
    put_count(attributes_, entries.size());
    for (const auto& entry : entries) {
      this->value(entry.key(), type.getKeyType(), depth + 1);
      this->value(entry.value(), type.getValueType(), depth + 1);
    }
  }

  void tensor(const IValue& value) {
    const at::Tensor& tensor = value.toTensor();
    if (!tensor.defined()) {
      return put_number<uint8_t>(attributes_, kUndefined);
    }
    if (!is_plain(tensor)) {
      not_checkpointable(path_, "changed and is a sparse or quantised tensor, which can't be saved");
    }
    bool shared = references_[tensor.storage().unsafeGetStorageImpl()] > 1;
    if (shared) {
      return describe(tensor, storage(tensor, bytes_of_storage(tensor), true), tensor.storage_offset(), tensor.strides());
    }
    // Alone in its storage: only its own bytes are kept (a slice of a long buffer stays small).
    at::Tensor alone = tensor.is_non_overlapping_and_dense() ? tensor : tensor.contiguous();
    std::vector<int64_t> strides = alone.strides().vec();
    if (alone.is_contiguous()) {
      int64_t stride = 1;
      for (size_t i = strides.size(); i-- > 0;) {
        strides[i] = stride;
        stride *= std::max<int64_t>(alone.size(static_cast<int64_t>(i)), 1);
      }
    }
    at::Tensor bytes = bytes_of_storage(alone);
    auto start = alone.storage_offset() * static_cast<int64_t>(alone.itemsize());
    describe(tensor, storage(tensor, bytes.narrow(0, alone.numel() == 0 ? 0 : start, static_cast<int64_t>(alone.nbytes())), false), 0, strides);
  }

  void describe(const at::Tensor& tensor, uint32_t storage, int64_t offset, at::IntArrayRef strides) {
    if (tensor.sizes().size() > kRankMax) {
      not_checkpointable(path_, "has more than 64 dimensions");
    }
    put_number<uint8_t>(attributes_, kTensor);
    put_number<uint8_t>(attributes_, static_cast<uint8_t>(tensor.scalar_type()));
    put_number<uint32_t>(attributes_, storage);
    put_number<int64_t>(attributes_, offset);
    put_number<uint8_t>(attributes_, static_cast<uint8_t>(tensor.sizes().size()));
    put(attributes_, tensor.sizes().data(), tensor.sizes().size() * sizeof(int64_t));
    put(attributes_, strides.data(), strides.size() * sizeof(int64_t));
  }

  uint32_t storage(const at::Tensor& tensor, const at::Tensor& bytes, bool shared) {
    void* key = tensor.storage().unsafeGetStorageImpl();
    auto known = written_.find(key);
    if (shared && known != written_.end()) {
      return known->second;
    }
    at::Tensor here = bytes.to(at::kCPU);
    put_number<uint8_t>(storages_, tensor.device().is_cpu() ? 0 : 1);
    put_number<uint64_t>(storages_, here.nbytes());
    put(storages_, here.const_data_ptr(), here.nbytes());
    auto number = static_cast<uint32_t>(storage_count_++);
    written_[key] = number;
    return number;
  }

  const Memory& memory_;
  std::unordered_map<void*, int> references_;
  std::unordered_map<void*, uint32_t> written_;
  std::string path_;
  std::string storages_;
  std::string attributes_;
  size_t storage_count_ = 0;
  size_t count_ = 0;
};

// Slots that have to be saved: those that differ, and those that share memory with them.
std::vector<bool> choose(const std::vector<Slot>& now, const std::vector<Slot>& then, const Memory& memory,
                         const Memory& before, const Pristine& pristine) {
  std::unordered_set<void*> weights;
  for (const auto& weight : pristine.weights) {
    weights.insert(weight.storage().unsafeGetStorageImpl());
  }
  std::vector<bool> chosen(now.size(), false);
  std::unordered_set<void*> touched;
  bool grew = true;
  for (size_t i = 0; i < now.size(); i++) {
    chosen[i] = memory.first[i] != before.first[i] || !same(now[i].value(), then[i].value());
  }
  while (grew) {
    grew = false;
    for (size_t i = 0; i < now.size(); i++) {
      for (const auto& tensor : memory.tensors[i]) {
        void* storage = tensor.has_storage() ? tensor.storage().unsafeGetStorageImpl() : nullptr;
        if (storage == nullptr || weights.count(storage) != 0) {
          continue;
        }
        if (chosen[i]) {
          grew |= touched.insert(storage).second;
        } else if (touched.count(storage) != 0) {
          chosen[i] = true;
          grew = true;
        }
      }
    }
  }
  return chosen;
}

}  // namespace

std::string save_state(const Module& module, const Pristine& pristine) {
  auto now = walk(module);
  auto then = walk(pristine.module);
  bool alike = now.size() == then.size();
  for (size_t i = 0; alike && i < now.size(); i++) {
    alike = now[i].path == then[i].path;
  }
  if (!alike) {
    throw Refusal{CRST_NOT_CHECKPOINTABLE, "the module put another object in the place of one of its attributes"};
  }
  Memory memory(now);
  Memory before(then);
  auto chosen = choose(now, then, memory, before, pristine);
  Writer writer(memory, chosen);
  for (size_t i = 0; i < now.size(); i++) {
    if (chosen[i]) {
      writer.attribute(now[i]);
    }
  }
  return writer.finish();
}

}  // namespace crst
