// Running a module: request bytes to tensors (the one copy in), the call, results to bytes.

#include <ATen/Functions.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>

#include <chrono>

#include "common.h"

struct crst_tensor {
  at::Tensor tensor;
};

struct crst_results {
  struct Result {
    at::Tensor tensor;  // undefined for a value that is not a tensor
    std::string name;
  };
  std::vector<Result> results;
  uint64_t input_ns = 0;
  uint64_t infer_ns = 0;
};

namespace crst {

namespace {

static_assert(static_cast<int>(at::kByte) == 0 && static_cast<int>(at::kChar) == 1);
static_assert(static_cast<int>(at::kShort) == 2 && static_cast<int>(at::kInt) == 3);
static_assert(static_cast<int>(at::kLong) == 4 && static_cast<int>(at::kHalf) == 5);
static_assert(static_cast<int>(at::kFloat) == 6 && static_cast<int>(at::kDouble) == 7);
static_assert(static_cast<int>(at::kBool) == 11 && static_cast<int>(at::kBFloat16) == 15);
static_assert(static_cast<int>(at::kUInt16) == 27 && static_cast<int>(at::kUInt32) == 28);
static_assert(static_cast<int>(at::kUInt64) == 29);

using Clock = std::chrono::steady_clock;

uint64_t nanoseconds(Clock::duration duration) {
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(duration).count());
}

at::Tensor assemble(const crst_input& input, at::Device device) {
  auto type = static_cast<at::ScalarType>(input.scalar_type);
  at::Tensor tensor = at::empty(at::IntArrayRef(input.shape, input.rank), at::TensorOptions().dtype(type));
  auto* to = static_cast<uint8_t*>(tensor.mutable_data_ptr());
  size_t left = tensor.nbytes();
  for (size_t i = 0; i < input.part_count; i++) {
    const auto& part = input.parts[i];
    if (part.length > left) {
      throw Refusal{CRST_FAILED, "the parts of an input are longer than its shape"};
    }
    if (type == at::kBool) {
      // A byte that is neither 0 nor 1 is not a valid bool to C++.
      for (size_t k = 0; k < part.length; k++) {
        to[k] = part.data[k] != 0 ? 1 : 0;
      }
    } else if (part.length != 0) {
      std::memcpy(to, part.data, part.length);
    }
    to += part.length;
    left -= part.length;
  }
  if (left != 0) {
    throw Refusal{CRST_FAILED, "the parts of an input are shorter than its shape"};
  }
  return device.is_cpu() ? tensor : tensor.to(device);
}

// A tensor whose bytes are row-major, on the CPU, and nobody else's: the module may keep writing to
// a tensor that it returned.
at::Tensor settle(at::Tensor tensor) {
  if (tensor.is_quantized()) {
    tensor = tensor.dequantize();
  }
  if (tensor.layout() != at::kStrided) {
    tensor = tensor.to_dense();
  }
  if (!tensor.device().is_cpu()) {
    tensor = tensor.to(at::kCPU);
  }
  tensor = tensor.resolve_conj().resolve_neg();
  bool own = tensor.use_count() == 1 && tensor.storage().use_count() == 1;
  bool wasteful = tensor.storage().nbytes() > 2 * tensor.nbytes() + 4096;
  if (!tensor.is_contiguous()) {
    return tensor.contiguous();
  }
  return own && !wasteful ? tensor : tensor.clone(at::MemoryFormat::Contiguous);
}

void flatten(IValue value, std::string name, std::vector<crst_results::Result>& out, int depth) {
  if (depth > 16) {
    throw Refusal{CRST_FAILED, "forward returned values nested more than 16 deep"};
  }
  if (value.isTensor()) {
    out.push_back({std::move(value).toTensor(), std::move(name)});
  } else if (value.isInt()) {
    out.push_back({at::full({1}, value.toInt(), at::kLong), std::move(name)});
  } else if (value.isDouble()) {
    out.push_back({at::full({1}, value.toDouble(), at::kDouble), std::move(name)});
  } else if (value.isBool()) {
    out.push_back({at::full({1}, value.toBool(), at::kBool), std::move(name)});
  } else if (value.isTuple()) {
    // Elements are moved out when nobody else holds the tuple, so that their memory has one owner.
    std::vector<IValue> elements = value.toTupleRef().elements().vec();
    value = IValue();
    for (auto& element : elements) {
      IValue taken = std::move(element);
      flatten(std::move(taken), "", out, depth + 1);
    }
  } else if (value.isList()) {
    std::vector<IValue> elements = value.toListRef().vec();
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
    out.push_back({at::Tensor(), value.isNone() ? "None" : value.tagKind()});
  }
}

}  // namespace

crst_results* run(Instance& instance, const Plan& plan, at::Device device, const crst_input* inputs, size_t count) {
  if (count != plan.inputs) {
    throw Refusal{CRST_FAILED, "a call needs as many inputs as were bound"};
  }
  c10::InferenceMode inference;
  c10::OptionalDeviceGuard on_device;
  if (!device.is_cpu()) {
    on_device.reset_device(device);
  }
  auto results = std::make_unique<crst_results>();
  auto began = Clock::now();
  {
    std::vector<IValue> stack;
    stack.reserve(plan.arguments.size() + 1);
    for (const auto& argument : plan.arguments) {
      if (argument.kind == CRST_ARG_INPUT) {
        stack.emplace_back(assemble(inputs[argument.input], device));
      } else if (argument.kind == CRST_ARG_DICT) {
        c10::Dict<std::string, at::Tensor> dict;
        for (size_t i = 0; i < count; i++) {
          dict.insert(plan.names[i], assemble(inputs[i], device));
        }
        stack.emplace_back(std::move(dict));
      } else {
        stack.push_back(argument.value);
      }
    }
    auto assembled = Clock::now();
    IValue returned = instance.forward(std::move(stack));
    results->input_ns = nanoseconds(assembled - began);
    results->infer_ns = nanoseconds(Clock::now() - assembled);
    flatten(std::move(returned), "", results->results, 0);
  }
  for (auto& result : results->results) {
    if (result.tensor.defined()) {
      result.tensor = settle(std::move(result.tensor));
    }
  }
  return results.release();
}

}  // namespace crst

using crst::guarded;

int32_t crst_module_forward(crst_module* module, const crst_input* inputs, size_t count,
                            crst_results** out, crst_error* error) {
  return guarded(error, [&] {
    if (!module->plan) {
      throw crst::Refusal{CRST_FAILED, "the module's arguments have not been bound"};
    }
    if (!module->instance.has_value()) {
      module->instance.emplace(crst::copy_of(*module->pristine));
    }
    *out = crst::run(*module->instance, *module->plan, module->pristine->device, inputs, count);
  });
}

int32_t crst_sequence_open(crst_module* module, crst_sequence** out, crst_error* error) {
  return guarded(error, [&] {
    if (!module->plan) {
      throw crst::Refusal{CRST_FAILED, "the module's arguments have not been bound"};
    }
    *out = new crst_sequence{module->pristine, module->plan, crst::Instance(crst::copy_of(*module->pristine))};
  });
}

void crst_sequence_free(crst_sequence* sequence) { delete sequence; }

int32_t crst_sequence_step(crst_sequence* sequence, const crst_input* inputs, size_t count,
                           crst_results** out, crst_error* error) {
  return guarded(error, [&] {
    std::unique_ptr<crst_results> results(
        crst::run(sequence->instance, *sequence->plan, sequence->pristine->device, inputs, count));
    if (crst::weights_were_written(*sequence->pristine)) {
      throw crst::Refusal{CRST_FAILED,
                          "the module writes to its own parameters in forward, which sequences share; keep state in "
                          "buffers or attributes"};
    }
    *out = results.release();
  });
}

int32_t crst_sequence_checkpoint(crst_sequence* sequence, char** data, size_t* length, crst_error* error) {
  return guarded(error, [&] {
    c10::InferenceMode inference;
    std::string state = crst::save_state(sequence->instance.module, *sequence->pristine);
    *data = crst::copy_out(state.data(), state.size());
    if (*data == nullptr) {
      throw std::bad_alloc();
    }
    *length = state.size();
  });
}

int32_t crst_sequence_restore(crst_sequence* sequence, const uint8_t* data, size_t length, crst_error* error) {
  return guarded(error, [&] {
    c10::InferenceMode inference;
    sequence->instance = crst::Instance(crst::restore_state(*sequence->pristine, data, length));
  });
}

size_t crst_results_count(const crst_results* results) { return results->results.size(); }

void crst_results_times(const crst_results* results, uint64_t* input_ns, uint64_t* infer_ns) {
  *input_ns = results->input_ns;
  *infer_ns = results->infer_ns;
}

void crst_results_view(const crst_results* results, size_t index, crst_view* view) {
  const auto& result = results->results[index];
  *view = crst_view{-1, nullptr, 0, nullptr, 0, {}};
  view->name = {reinterpret_cast<const uint8_t*>(result.name.data()), result.name.size()};
  if (result.tensor.defined()) {
    view->scalar_type = static_cast<int32_t>(result.tensor.scalar_type());
    view->shape = result.tensor.sizes().data();
    view->rank = result.tensor.sizes().size();
    view->data = static_cast<const uint8_t*>(result.tensor.const_data_ptr());
    view->length = result.tensor.nbytes();
  }
}

crst_tensor* crst_results_take(crst_results* results, size_t index) {
  // Moving the handle leaves the data where it is.
  return new (std::nothrow) crst_tensor{std::move(results->results[index].tensor)};
}

void crst_results_free(crst_results* results) { delete results; }

void crst_tensor_free(crst_tensor* tensor) { delete tensor; }
