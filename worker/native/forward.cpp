// Running a module: stateless calls, the steps of a sequence, and the responses of a decoupled request. Calls in three parts are
// in staged.cpp.

#include "values.h"

namespace crst {

namespace {

// Calls forward; the times go into `results`, what it returns to the caller.
IValue call_forward(Instance& instance, const Plan& plan, at::Device device, const crst_input* inputs, size_t count,
                    crst_results& results) {
  auto began = Clock::now();
  std::vector<IValue> stack = arguments(plan, device, inputs, count);
  auto assembled = Clock::now();
  IValue returned = instance.forward(std::move(stack));
  results.input_ns = nanoseconds(assembled - began);
  results.infer_ns = nanoseconds(Clock::now() - assembled);
  return returned;
}

std::unique_ptr<crst_results> run(Instance& instance, const Plan& plan, at::Device device, const crst_input* inputs,
                                  size_t count) {
  Turn turn(device);
  auto results = std::make_unique<crst_results>();
  IValue returned = call_forward(instance, plan, device, inputs, count, *results);
  gather(std::move(returned), *results);
  return results;
}

}  // namespace

std::vector<IValue> arguments(const Plan& plan, at::Device device, const crst_input* inputs, size_t count) {
  if (count != plan.inputs) {
    throw Refusal{CRST_FAILED, "a call needs as many inputs as were bound"};
  }
  std::vector<IValue> stack;
  stack.reserve(plan.arguments.size() + 1);
  for (const auto& argument : plan.arguments) {
    size_t at = argument.input;
    if (argument.kind == CRST_ARG_INPUT && inputs[at].type == CRST_TYPE_ABSENT) {
      // The argument's default, or None.
      stack.push_back(argument.value);
    } else if (argument.kind == CRST_ARG_INPUT && inputs[at].type == CRST_TYPE_BYTES) {
      stack.emplace_back(texts_of(inputs[at], plan.names[at]));
    } else if (argument.kind == CRST_ARG_INPUT) {
      stack.emplace_back(tensor_of(inputs[at], plan.names[at], device, Unsigned::kWiden));
    } else if (argument.kind == CRST_ARG_DICT) {
      c10::Dict<std::string, at::Tensor> dict;
      for (size_t i = 0; i < count; i++) {
        if (inputs[i].type == CRST_TYPE_ABSENT) {
          continue;
        }
        dict.insert(plan.names[i], tensor_of(inputs[i], plan.names[i], device, Unsigned::kWiden));
      }
      stack.emplace_back(std::move(dict));
    } else {
      stack.push_back(argument.value);
    }
  }
  return stack;
}

const Plan& plan_of(const crst_module& module) {
  if (!module.plan) {
    throw Refusal{CRST_FAILED, "the module's arguments have not been bound"};
  }
  return *module.plan;
}

Instance& instance_of(crst_module& module) {
  if (!module.instance->has_value()) {
    module.instance->emplace(copy_of(*module.pristine));
  }
  return **module.instance;
}

}  // namespace crst

using crst::guarded;

int32_t crst_module_forward(crst_module* module, const crst_input* inputs, size_t count,
                            crst_results** out, crst_error* error) {
  return guarded(error, [&] {
    const auto& plan = crst::plan_of(*module);
    auto results = crst::run(crst::instance_of(*module), plan, module->pristine->device, inputs, count);
    if (*module->shares) {
      crst::refuse_written_weights(*module->pristine);
    }
    *out = results.release();
  });
}

int32_t crst_sequence_open(crst_module* module, crst_sequence** out, crst_error* error) {
  return guarded(error, [&] {
    crst::plan_of(*module);
    *out = new crst_sequence{module->pristine, module->plan, crst::Instance(crst::copy_of(*module->pristine))};
  });
}

void crst_sequence_free(crst_sequence* sequence) { delete sequence; }

int32_t crst_sequence_step(crst_sequence* sequence, const crst_input* inputs, size_t count,
                           crst_results** out, crst_error* error) {
  return guarded(error, [&] {
    auto results = crst::run(sequence->instance, *sequence->plan, sequence->pristine->device, inputs, count);
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

int32_t crst_module_check_next(crst_module* module, crst_error* error) {
  return guarded(error, [&] {
    auto next = module->pristine->module.find_method("next");
    if (!next.has_value()) {
      throw crst::Refusal{CRST_FAILED,
                          "the model is decoupled, and its module has no method `next` that returns the next response, "
                          "or None after the last"};
    }
    const auto& schema = next->function().getSchema();
    for (size_t i = 1; i < schema.arguments().size(); i++) {
      if (!schema.arguments()[i].default_value().has_value()) {
        throw crst::Refusal{CRST_FAILED, "the method `next` of a decoupled model takes no arguments, this one needs '" +
                                             schema.arguments()[i].name() + "'"};
      }
    }
    auto returned = schema.returns().empty() ? c10::TypePtr(c10::NoneType::get()) : schema.returns()[0].type();
    if (!c10::NoneType::get()->isSubtypeOf(*returned)) {
      throw crst::Refusal{CRST_FAILED, "the method `next` of a decoupled model returns an Optional, None after the last response; "
                                       "this one returns " + returned->annotation_str()};
    }
  });
}

int32_t crst_generation_open(crst_module* module, const crst_input* inputs, size_t count, crst_generation** out,
                             uint64_t* input_ns, uint64_t* infer_ns, crst_error* error) {
  return guarded(error, [&] {
    const auto& plan = crst::plan_of(*module);
    const auto& pristine = module->pristine;
    crst::Instance instance(crst::copy_of(*pristine));
    crst_results ignored;
    {
      crst::Turn turn(pristine->device);
      crst::call_forward(instance, plan, pristine->device, inputs, count, ignored);
    }
    crst::refuse_written_weights(*pristine);
    auto next = instance.module.get_method("next");
    *out = new crst_generation{pristine, std::move(instance), std::move(next)};
    *input_ns = ignored.input_ns;
    *infer_ns = ignored.infer_ns;
  });
}

void crst_generation_free(crst_generation* generation) { delete generation; }

int32_t crst_generation_next(crst_generation* generation, crst_results** out, crst_error* error) {
  return guarded(error, [&] {
    crst::Turn turn(generation->pristine->device);
    auto results = std::make_unique<crst_results>();
    auto began = crst::Clock::now();
    crst::IValue returned = generation->next({});
    results->infer_ns = crst::nanoseconds(crst::Clock::now() - began);
    crst::refuse_written_weights(*generation->pristine);
    if (returned.isNone()) {
      *out = nullptr;
      return;
    }
    crst::gather(std::move(returned), *results);
    *out = results.release();
  });
}
