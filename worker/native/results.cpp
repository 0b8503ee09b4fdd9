// What a module returned to bytes: taken apart, settled on the CPU, and handed out without a copy.

#include <ATen/Functions.h>

#include <limits>

#include "values.h"

namespace crst {

namespace {

constexpr int kReturnDepthMax = 16;

// Whether nobody else holds a tensor, or memory of it.
bool is_own(const at::Tensor& tensor) { return tensor.use_count() == 1 && tensor.storage().use_count() == 1; }

// A tensor whose elements lie one after the other, row-major.
at::Tensor row_major(at::Tensor tensor) {
  if (tensor.is_quantized()) {
    tensor = tensor.dequantize();
  }
  if (tensor.layout() != at::kStrided) {
    tensor = tensor.to_dense();
  }
  return tensor.resolve_conj().resolve_neg().contiguous();
}

// A copy in pinned memory, which libtorch keeps and uses again. It waits for the current stream and no other. (A copy that doesn't
// wait would leave an event behind, to be recorded when the bytes are freed: on a device that was lost by then, that ends the
// process.)
at::Tensor on_host(const at::Tensor& tensor) {
  at::Tensor copy = at::empty(tensor.sizes(), tensor.options().device(at::kCPU).pinned_memory(true));
  copy.copy_(tensor);
  return copy;
}

// A tensor whose bytes are row-major, on the CPU, and nobody else's: the module may keep writing to
// a tensor that it returned.
at::Tensor settled(at::Tensor tensor) {
  tensor = row_major(std::move(tensor));
  if (!tensor.device().is_cpu()) {
    return on_host(tensor);
  }
  bool wasteful = tensor.storage().nbytes() > 2 * tensor.nbytes() + 4096;
  return is_own(tensor) && !wasteful ? tensor : tensor.clone(at::MemoryFormat::Contiguous);
}

// Byte strings in the wire's framing. They are kept in a tensor of bytes, so that they are handed
// out as every other result is.
crst_results::Result framed(const std::vector<IValue>& texts, std::string name) {
  size_t bytes = 0;
  for (const auto& text : texts) {
    size_t length = text.toStringRef().size();
    if (length > std::numeric_limits<uint32_t>::max()) {
      throw Refusal{CRST_FAILED, "forward returned a string of more than 4 GiB"};
    }
    bytes += sizeof(uint32_t) + length;
  }
  at::Tensor tensor = at::empty({static_cast<int64_t>(bytes)}, at::kByte);
  auto* to = static_cast<uint8_t*>(tensor.mutable_data_ptr());
  for (const auto& text : texts) {
    const std::string& string = text.toStringRef();
    auto length = static_cast<uint32_t>(string.size());
    std::memcpy(to, &length, sizeof(length));
    std::memcpy(to + sizeof(length), string.data(), length);
    to += sizeof(length) + length;
  }
  return {std::move(tensor), std::move(name), static_cast<int64_t>(texts.size())};
}

bool is_texts(const IValue& value) {
  return value.isList() && value.toList().elementType()->kind() == c10::TypeKind::StringType;
}

void flatten(IValue value, std::string name, std::vector<crst_results::Result>& out, int depth) {
  if (depth > kReturnDepthMax) {
    throw Refusal{CRST_FAILED, "forward returned values nested more than 16 deep"};
  }
  auto answer = [&](at::Tensor tensor) { out.push_back({std::move(tensor), std::move(name), std::nullopt}); };
  if (value.isTensor()) {
    answer(std::move(value).toTensor());
  } else if (value.isInt()) {
    answer(at::full({1}, value.toInt(), at::kLong));
  } else if (value.isDouble()) {
    answer(at::full({1}, value.toDouble(), at::kDouble));
  } else if (value.isBool()) {
    answer(at::full({1}, value.toBool(), at::kBool));
  } else if (value.isString()) {
    out.push_back(framed({value}, std::move(name)));
  } else if (is_texts(value)) {
    out.push_back(framed(value.toListRef().vec(), std::move(name)));
  } else if (value.isTuple() || value.isList()) {
    // Elements are moved out when nobody else holds them, so that their memory has one owner.
    std::vector<IValue> elements = value.isTuple() ? value.toTupleRef().elements().vec() : value.toListRef().vec();
    value = IValue();
    for (auto& element : elements) {
      IValue taken = std::move(element);
      flatten(std::move(taken), "", out, depth + 1);
    }
  } else if (value.isGenericDict()) {
    std::vector<std::pair<std::string, IValue>> entries;
    for (const auto& entry : value.toGenericDict()) {
      entries.emplace_back(entry.key().isString() ? entry.key().toStringRef() : std::string(), entry.value());
    }
    value = IValue();
    for (auto& entry : entries) {
      IValue taken = std::move(entry.second);
      flatten(std::move(taken), std::move(entry.first), out, depth + 1);
    }
  } else {
    out.push_back({at::Tensor(), value.isNone() ? "None" : value.tagKind(), std::nullopt});
  }
}

}  // namespace

void collect(IValue returned, crst_results& results) { flatten(std::move(returned), "", results.results, 0); }

void make_own(crst_results& results) {
  for (auto& result : results.results) {
    auto& tensor = result.tensor;
    if (tensor.defined() && !result.texts.has_value()) {
      tensor = row_major(std::move(tensor));
      if (!is_own(tensor)) {
        tensor = tensor.clone();
      }
    }
  }
}

void settle(crst_results& results) {
  for (auto& result : results.results) {
    if (result.tensor.defined() && !result.texts.has_value()) {
      result.tensor = settled(std::move(result.tensor));
    }
  }
}

void gather(IValue returned, crst_results& results) {
  collect(std::move(returned), results);
  settle(results);
}

}  // namespace crst

size_t crst_results_count(const crst_results* results) { return results->results.size(); }

void crst_results_times(const crst_results* results, uint64_t* input_ns, uint64_t* infer_ns) {
  *input_ns = results->input_ns;
  *infer_ns = results->infer_ns;
}

void crst_results_view(const crst_results* results, size_t index, crst_view* view) {
  const auto& result = results->results[index];
  *view = crst_view{CRST_TYPE_NONE, nullptr, 0, nullptr, 0, {}};
  view->name = {reinterpret_cast<const uint8_t*>(result.name.data()), result.name.size()};
  if (result.tensor.defined()) {
    bool texts = result.texts.has_value();
    view->type = texts ? static_cast<int32_t>(CRST_TYPE_BYTES) : static_cast<int32_t>(result.tensor.scalar_type());
    view->shape = texts ? &*result.texts : result.tensor.sizes().data();
    view->rank = texts ? 1 : result.tensor.sizes().size();
    view->data = static_cast<const uint8_t*>(result.tensor.const_data_ptr());
    view->length = result.tensor.nbytes();
  }
}

crst_tensor* crst_results_take(crst_results* results, size_t index) {
  // Moving the handle leaves the data where it is.
  return new (std::nothrow) crst_tensor{results->owner, std::move(results->results[index].tensor)};
}

void crst_results_free(crst_results* results) { delete results; }

void crst_tensor_free(crst_tensor* tensor) { delete tensor; }
