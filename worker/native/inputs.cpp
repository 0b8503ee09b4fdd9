// Request bytes to tensors and byte strings: the one copy on the way in.

#include <ATen/Functions.h>

#include <limits>

#include "values.h"

namespace crst {

namespace {

static_assert(static_cast<int>(at::kByte) == 0 && static_cast<int>(at::kChar) == 1);
static_assert(static_cast<int>(at::kShort) == 2 && static_cast<int>(at::kInt) == 3);
static_assert(static_cast<int>(at::kLong) == 4 && static_cast<int>(at::kHalf) == 5);
static_assert(static_cast<int>(at::kFloat) == 6 && static_cast<int>(at::kDouble) == 7);
static_assert(static_cast<int>(at::kBool) == 11 && static_cast<int>(at::kBFloat16) == 15);
static_assert(static_cast<int>(at::kUInt16) == 27 && static_cast<int>(at::kUInt32) == 28);
static_assert(static_cast<int>(at::kUInt64) == 29);

[[noreturn]] void bad_input(const std::string& name, const std::string& why) {
  throw Refusal{CRST_BAD_INPUT, "input '" + name + "' " + why};
}

at::ScalarType inside_type(at::ScalarType type, Unsigned rule) {
  if (rule == Unsigned::kAsTheyAre) {
    return type;
  }
  switch (type) {
    case at::kUInt16:
      return at::kInt;
    case at::kUInt32:
    case at::kUInt64:
      return at::kLong;
    default:
      return type;
  }
}

template <typename From, typename To>
void widen(const crst_slice& part, const std::string& name, uint8_t* out) {
  for (size_t at = 0; at < part.length; at += sizeof(From)) {
    From from;
    std::memcpy(&from, part.data + at, sizeof(From));
    if constexpr (sizeof(From) == sizeof(To)) {
      if (from > static_cast<From>(std::numeric_limits<To>::max())) {
        bad_input(name, "holds " + std::to_string(from) + ", the largest UINT64 that a model can compute with is " +
                            std::to_string(std::numeric_limits<To>::max()));
      }
    }
    To to = static_cast<To>(from);
    std::memcpy(out, &to, sizeof(To));
    out += sizeof(To);
  }
}

void lay(const crst_slice& part, at::ScalarType wire, at::ScalarType inside, const std::string& name, uint8_t* out) {
  if (part.length == 0) {
    return;
  }
  if (wire == at::kBool) {
    // A byte that is neither 0 nor 1 is not a valid bool to C++.
    for (size_t i = 0; i < part.length; i++) {
      out[i] = part.data[i] != 0 ? 1 : 0;
    }
  } else if (wire == inside) {
    std::memcpy(out, part.data, part.length);
  } else if (wire == at::kUInt16) {
    widen<uint16_t, int32_t>(part, name, out);
  } else if (wire == at::kUInt32) {
    widen<uint32_t, int64_t>(part, name, out);
  } else {
    widen<uint64_t, int64_t>(part, name, out);
  }
}

}  // namespace

at::Tensor tensor_of(const crst_input& input, const std::string& name, at::Device device, Unsigned rule) {
  if (input.type == CRST_TYPE_ABSENT) {
    bad_input(name, "is left out, and this model can't do without it");
  }
  auto wire = static_cast<at::ScalarType>(input.type);
  auto inside = inside_type(wire, rule);
  size_t wire_size = c10::elementSize(wire);
  // Only from pinned memory can a GPU copy while the processor goes on.
  auto options = at::TensorOptions().dtype(inside).pinned_memory(!device.is_cpu());
  at::Tensor tensor = at::empty(at::IntArrayRef(input.shape, input.rank), options);
  auto* to = static_cast<uint8_t*>(tensor.mutable_data_ptr());
  size_t left = static_cast<size_t>(tensor.numel());
  for (size_t i = 0; i < input.part_count; i++) {
    const auto& part = input.parts[i];
    size_t elements = part.length / wire_size;
    if (elements > left || part.length % wire_size != 0) {
      bad_input(name, "has parts that don't fit its shape");
    }
    lay(part, wire, inside, name, to);
    to += elements * c10::elementSize(inside);
    left -= elements;
  }
  if (left != 0) {
    bad_input(name, "has parts that are shorter than its shape");
  }
  return device.is_cpu() ? tensor : tensor.to(device, inside, /*non_blocking=*/true);
}

c10::List<std::string> texts_of(const crst_input& input, const std::string& name) {
  c10::List<std::string> texts;
  for (size_t i = 0; i < input.part_count; i++) {
    const auto& part = input.parts[i];
    size_t at = 0;
    while (at < part.length) {
      uint32_t length = 0;
      if (part.length - at < sizeof(length)) {
        bad_input(name, "ends inside the length of an element");
      }
      std::memcpy(&length, part.data + at, sizeof(length));
      at += sizeof(length);
      if (part.length - at < length) {
        bad_input(name, "has an element that is longer than the rest of its bytes");
      }
      texts.push_back(std::string(reinterpret_cast<const char*>(part.data + at), length));
      at += length;
    }
  }
  size_t want = 1;
  for (size_t i = 0; i < input.rank; i++) {
    // The caller has checked that the product fits.
    want *= static_cast<size_t>(input.shape[i]);
  }
  if (texts.size() != want) {
    bad_input(name, "has " + std::to_string(texts.size()) + " elements, its shape needs " + std::to_string(want));
  }
  return texts;
}

}  // namespace crst
