// Running a module: stateless calls, and the steps of a sequence.

#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>

#include "values.h"

namespace crst {

namespace {

// The arguments of forward for one call.
std::vector<IValue> arguments(const Plan& plan, at::Device device, const crst_input* inputs, size_t count) {
  if (count != plan.inputs) {
    throw Refusal{CRST_FAILED, "a call needs as many inputs as were bound"};
  }
  std::vector<IValue> stack;
  stack.reserve(plan.arguments.size() + 1);
  for (const auto& argument : plan.arguments) {
    size_t at = argument.input;
    if (argument.kind == CRST_ARG_INPUT && inputs[at].type == CRST_TYPE_BYTES) {
      stack.emplace_back(texts_of(inputs[at], plan.names[at]));
    } else if (argument.kind == CRST_ARG_INPUT) {
      stack.emplace_back(tensor_of(inputs[at], plan.names[at], device, Unsigned::kWiden));
    } else if (argument.kind == CRST_ARG_DICT) {
      c10::Dict<std::string, at::Tensor> dict;
      for (size_t i = 0; i < count; i++) {
        dict.insert(plan.names[i], tensor_of(inputs[i], plan.names[i], device, Unsigned::kWiden));
      }
      stack.emplace_back(std::move(dict));
    } else {
      stack.push_back(argument.value);
    }
  }
  return stack;
}

}  // namespace

crst_results* run(Instance& instance, const Plan& plan, at::Device device, const crst_input* inputs, size_t count) {
  c10::InferenceMode inference;
  c10::OptionalDeviceGuard on_device;
  if (!device.is_cpu()) {
    on_device.reset_device(device);
  }
  auto results = std::make_unique<crst_results>();
  auto began = Clock::now();
  std::vector<IValue> stack = arguments(plan, device, inputs, count);
  auto assembled = Clock::now();
  IValue returned = instance.forward(std::move(stack));
  results->input_ns = nanoseconds(assembled - began);
  results->infer_ns = nanoseconds(Clock::now() - assembled);
  gather(std::move(returned), *results);
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
    crst::refuse_written_weights(*sequence->pristine);
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
