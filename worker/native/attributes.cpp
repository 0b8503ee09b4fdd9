// Walking over a module's attributes, and making copies of a module that share its weights.

#include "attributes.h"

#include <ATen/Functions.h>
#include <ATen/core/grad_mode.h>

namespace crst {

namespace {

void walk_into(c10::ivalue::Object* object, const std::string& prefix, std::unordered_set<void*>& seen,
               std::vector<Slot>& out, int depth) {
  if (depth > kDepthMax) {
    throw Refusal{CRST_FAILED, "the module's submodules are nested too deep"};
  }
  auto type = object->type();
  for (size_t i = 0; i < type->numAttributes(); i++) {
    const IValue& value = object->slots()[i];
    std::string path = prefix.empty() ? type->getAttributeName(i) : prefix + "." + type->getAttributeName(i);
    if (value.isObject() && !is_opaque(value)) {
      auto* inner = &value.toObjectRef();
      if (seen.insert(inner).second) {
        walk_into(inner, path, seen, out, depth + 1);
      }
    } else {
      out.push_back(Slot{object, i, std::move(path)});
    }
  }
}

uint64_t hash_text(uint64_t hash, const std::string& text) {
  for (unsigned char byte : text) {
    hash = (hash ^ byte) * 0x100000001b3ULL;  // FNV-1a
  }
  return (hash ^ 0xff) * 0x100000001b3ULL;
}

uint64_t version_sum(const std::vector<at::Tensor>& weights) {
  uint64_t sum = 0;
  for (const auto& weight : weights) {
    sum += static_cast<uint64_t>(weight._version());
  }
  return sum;
}

void take_stock(Pristine& pristine) {
  std::unordered_set<void*> tensors;
  std::unordered_set<void*> storages;
  auto count_bytes = [&](const at::Tensor& tensor) {
    if (tensor.has_storage() && storages.insert(tensor.storage().unsafeGetStorageImpl()).second) {
      pristine.bytes += tensor.storage().nbytes();
    }
  };
  auto slots = walk(pristine.module);
  for (const auto& slot : slots) {
    if (slot.is_weight() && tensors.insert(slot.value().unsafeToTensorImpl()).second) {
      pristine.shared.push_back(slot.value());
      pristine.weights.push_back(slot.value().toTensor());
      count_bytes(slot.value().toTensor());
    } else if (is_opaque(slot.value())) {
      pristine.shared.push_back(slot.value());
    }
  }
  pristine.fingerprint = 0xcbf29ce484222325ULL;
  for (const auto& slot : slots) {
    each_tensor(slot.value(), [&](const at::Tensor& tensor) {
      if (tensors.insert(tensor.unsafeGetTensorImpl()).second) {
        count_bytes(tensor);
        if (is_plain(tensor)) {
          pristine.copied.push_back(tensor);
        }
      }
    });
    pristine.fingerprint = hash_text(hash_text(pristine.fingerprint, slot.path), slot.type()->annotation_str());
  }
  pristine.weight_versions = version_sum(pristine.weights);
}

}  // namespace

std::vector<Slot> walk(const Module& module) {
  std::vector<Slot> out;
  std::unordered_set<void*> seen;
  auto* top = module._ivalue().get();
  seen.insert(top);
  walk_into(top, "", seen, out, 0);
  return out;
}

bool is_opaque(const IValue& value) {
  if (!value.isObject()) {
    return false;
  }
  for (const auto& slot : value.toObjectRef().slots()) {
    if (slot.isCapsule()) {
      return true;
    }
  }
  return false;
}

void each_tensor(const IValue& value, const std::function<void(const at::Tensor&)>& visit, int depth) {
  if (depth > kDepthMax) {
    throw Refusal{CRST_FAILED, "an attribute's value is nested too deep"};
  }
  if (value.isTensor()) {
    if (value.toTensor().defined()) {
      visit(value.toTensor());
    }
  } else if (value.isTuple()) {
    for (const auto& element : value.toTupleRef().elements()) {
      each_tensor(element, visit, depth + 1);
    }
  } else if (value.isTensorList()) {
    for (const at::Tensor& tensor : value.toTensorVector()) {
      each_tensor(tensor, visit, depth + 1);
    }
  } else if (value.isList() && !value.isIntList() && !value.isDoubleList() && !value.isBoolList()) {
    for (const auto& element : value.toListRef()) {
      each_tensor(element, visit, depth + 1);
    }
  } else if (value.isGenericDict()) {
    for (const auto& entry : value.toGenericDict()) {
      each_tensor(entry.value(), visit, depth + 1);
    }
  } else if (value.isObject() && !is_opaque(value)) {
    for (const auto& slot : value.toObjectRef().slots()) {
      each_tensor(slot, visit, depth + 1);
    }
  }
}

bool is_plain(const at::Tensor& tensor) {
  return tensor.layout() == at::kStrided && !tensor.is_quantized() && tensor.has_storage() && !tensor.is_conj() &&
         !tensor.is_neg();
}

at::Tensor bytes_of_storage(const at::Tensor& tensor) {
  auto storage = tensor.storage();
  auto length = static_cast<int64_t>(storage.nbytes());
  return at::empty({0}, at::TensorOptions().dtype(at::kByte).device(tensor.device())).set_(storage, 0, {length}, {1});
}

at::Tensor view_of_storage(const at::Tensor& storage, at::ScalarType type, int64_t offset, at::IntArrayRef sizes,
                           at::IntArrayRef strides) {
  auto options = at::TensorOptions().dtype(type).device(storage.device());
  return at::empty({0}, options).set_(storage.storage(), offset, sizes, strides);
}

std::shared_ptr<const Pristine> make_pristine(const Module& loaded, at::Device device) {
  Pristine first;
  first.module = loaded;
  take_stock(first);
  // What every copy is compared with has to be a copy itself: a tensor that shared memory with a
  // weight in the file has memory of its own in a copy.
  auto pristine = std::make_shared<Pristine>();
  pristine->module = copy_of(first);
  pristine->device = device;
  take_stock(*pristine);
  return pristine;
}

Module copy_of(const Pristine& pristine) {
  at::NoGradGuard no_grad;
  IValue::HashIdentityIValueMap memo;
  for (const auto& value : pristine.shared) {
    memo[value] = value;
  }
  std::unordered_map<void*, at::Tensor> storages;
  for (const auto& tensor : pristine.copied) {
    auto& storage = storages[tensor.storage().unsafeGetStorageImpl()];
    if (!storage.defined()) {
      storage = bytes_of_storage(tensor).clone();
    }
    memo[IValue(tensor)] =
        view_of_storage(storage, tensor.scalar_type(), tensor.storage_offset(), tensor.sizes(), tensor.strides());
  }
  return Module(IValue(pristine.module._ivalue()).deepcopy(memo).toObject());
}

void refuse_written_weights(const Pristine& pristine) {
  if (version_sum(pristine.weights) != pristine.weight_versions) {
    throw Refusal{CRST_FAILED,
                  "the module writes to its own parameters in forward, which sequences and instances share; keep state in "
                  "buffers or attributes"};
  }
}

}  // namespace crst
