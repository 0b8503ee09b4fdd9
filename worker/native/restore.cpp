// Putting a saved state into a copy of the pristine module. The bytes are not trusted: whatever
// they say, a value gets in only if it is of the type that the module declares, and a tensor only
// within its memory.

#include <ATen/Functions.h>

#include <set>

#include "attributes.h"
#include "state.h"

namespace crst {

namespace {

[[noreturn]] void bad(const std::string& why) { throw Refusal{CRST_BAD_CHECKPOINT, why}; }

class Reader {
 public:
  Reader(const uint8_t* data, size_t length, at::Device device) : at_(data), left_(length), device_(device) {}

  void storages() {
    uint32_t count = number<uint32_t>();
    for (uint32_t i = 0; i < count; i++) {
      bool on_device = number<uint8_t>() != 0;
      auto length = number<uint64_t>();
      const uint8_t* bytes = take(length);
      at::Tensor storage = at::empty({static_cast<int64_t>(length)}, at::TensorOptions().dtype(at::kByte));
      if (length != 0) {
        std::memcpy(storage.mutable_data_ptr(), bytes, length);
      }
      storages_.push_back(on_device && !device_.is_cpu() ? storage.to(device_) : storage);
    }
  }

  std::string text() {
    uint32_t length = number<uint32_t>();
    return std::string(reinterpret_cast<const char*>(take(length)), length);
  }

  template <typename T>
  T number() {
    T value;
    std::memcpy(&value, take(sizeof value), sizeof value);
    return value;
  }

  bool done() const { return left_ == 0; }

  IValue value(const c10::TypePtr& type, int depth) {
    if (depth > kDepthMax) {
      bad("a value is nested too deep");
    }
    if (type->kind() == c10::TypeKind::OptionalType) {
      if (left_ != 0 && *at_ == kNone) {
        number<uint8_t>();
        return IValue();
      }
      return value(type->expectRef<c10::OptionalType>().getElementType(), depth + 1);
    }
    auto tag = number<uint8_t>();
    auto expect = [&](Tag wanted) {
      if (tag != wanted) {
        bad("a value is not the `" + type->annotation_str() + "` that the module declares");
      }
    };
    switch (type->kind()) {
      case c10::TypeKind::NoneType:
        expect(kNone);
        return IValue();
      case c10::TypeKind::TensorType:
        if (tag == kUndefined) {
          return at::Tensor();
        }
        expect(kTensor);
        return tensor();
      case c10::TypeKind::IntType:
        expect(kInt);
        return number<int64_t>();
      case c10::TypeKind::FloatType:
        expect(kFloat);
        return number<double>();
      case c10::TypeKind::BoolType:
        expect(kBool);
        return number<uint8_t>() != 0;
      case c10::TypeKind::StringType:
        expect(kText);
        return text();
      case c10::TypeKind::TupleType:
        expect(kTuple);
        return tuple(type->expect<c10::TupleType>(), depth);
      case c10::TypeKind::ListType:
        expect(kList);
        return list(type->expectRef<c10::ListType>().getElementType(), depth);
      case c10::TypeKind::DictType:
        expect(kDict);
        return dict(type->expectRef<c10::DictType>(), depth);
      default:
        bad("the module declares a `" + type->annotation_str() + "`, which is never saved");
    }
  }

 private:
  const uint8_t* take(uint64_t length) {
    if (length > left_) {
      bad("it ends too early");
    }
    const uint8_t* here = at_;
    at_ += length;
    left_ -= length;
    return here;
  }

  IValue tuple(const std::shared_ptr<c10::TupleType>& type, int depth) {
    if (number<uint32_t>() != type->elements().size()) {
      bad("a tuple has another length than the module declares");
    }
    std::vector<IValue> elements;
    for (const auto& element : type->elements()) {
      elements.push_back(value(element, depth + 1));
    }
    return type->schema() ? c10::ivalue::Tuple::createNamed(std::move(elements), type)
                          : c10::ivalue::Tuple::create(std::move(elements));
  }

  IValue list(const c10::TypePtr& type, int depth) {
    uint32_t count = number<uint32_t>();
    c10::impl::GenericList list(type);
    for (uint32_t i = 0; i < count; i++) {
      list.push_back(value(type, depth + 1));
    }
    return list;
  }

  IValue dict(const c10::DictType& type, int depth) {
    uint32_t count = number<uint32_t>();
    c10::impl::GenericDict dict(type.getKeyType(), type.getValueType());
    for (uint32_t i = 0; i < count; i++) {
      IValue key = value(type.getKeyType(), depth + 1);
      dict.insert_or_assign(std::move(key), value(type.getValueType(), depth + 1));
    }
    return dict;
  }

  IValue tensor() {
    static const std::set<int> known = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 15, 27, 28, 29};
    int type = number<uint8_t>();
    uint32_t which = number<uint32_t>();
    auto offset = number<int64_t>();
    size_t rank = number<uint8_t>();
    if (known.count(type) == 0 || which >= storages_.size() || offset < 0 || rank > kRankMax) {
      bad("a tensor is described wrongly");
    }
    std::vector<int64_t> sizes(rank);
    std::vector<int64_t> strides(rank);
    for (auto* numbers : {&sizes, &strides}) {
      for (auto& n : *numbers) {
        n = number<int64_t>();
      }
    }
    auto scalar_type = static_cast<at::ScalarType>(type);
    const at::Tensor& storage = storages_[which];
    int64_t end = offset;
    int64_t elements = 1;
    bool wrong = false;
    for (size_t i = 0; i < rank; i++) {
      wrong |= sizes[i] < 0 || strides[i] < 0 || __builtin_mul_overflow(elements, sizes[i], &elements);
    }
    for (size_t i = 0; i < rank && !wrong && elements > 0; i++) {
      int64_t reach = 0;
      wrong |= __builtin_mul_overflow(sizes[i] - 1, strides[i], &reach) || __builtin_add_overflow(end, reach, &end);
    }
    int64_t room = storage.numel() / static_cast<int64_t>(c10::elementSize(scalar_type));
    if (wrong || (elements > 0 ? end >= room : offset > room)) {
      bad("a tensor reaches beyond its memory");
    }
    return view_of_storage(storage, scalar_type, offset, sizes, strides);
  }

  const uint8_t* at_;
  size_t left_;
  at::Device device_;
  std::vector<at::Tensor> storages_;
};

}  // namespace

Module restore_state(const Pristine& pristine, const uint8_t* data, size_t length) {
  Module module = copy_of(pristine);
  auto slots = walk(module);
  std::unordered_map<std::string, size_t> places;
  for (size_t i = 0; i < slots.size(); i++) {
    places.emplace(slots[i].path, i);
  }
  Reader reader(data, length, pristine.device);
  reader.storages();
  uint32_t count = reader.number<uint32_t>();
  for (uint32_t i = 0; i < count; i++) {
    auto place = places.find(reader.text());
    if (place == places.end()) {
      bad("it has an attribute that the module doesn't have");
    }
    const Slot& slot = slots[place->second];
    slot.object->setSlot(slot.index, reader.value(slot.type(), 0));
  }
  if (!reader.done()) {
    bad("it is longer than what it says it holds");
  }
  return module;
}

}  // namespace crst
