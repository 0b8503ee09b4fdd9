// For tests only: TorchScript modules made from source, so that tests need no Python.

#include <ATen/core/grad_mode.h>
#include <torch/csrc/api/include/torch/jit.h>
#include <torch/csrc/jit/api/compilation_unit.h>

#include "common.h"

int32_t crst_testing_save(const char* source, const crst_slice* attributes, const uint8_t* parameters,
                          size_t attribute_count, const char* path, crst_error* error) {
  return crst::guarded(error, [&] {
    at::NoGradGuard no_grad;
    crst::Module module("cresset_test");
    for (size_t i = 0; i < attribute_count; i++) {
      std::string name = crst::text_of(attributes[3 * i]);
      std::string type = crst::text_of(attributes[3 * i + 1]);
      std::string expression = crst::text_of(attributes[3 * i + 2]);
      auto unit = torch::jit::compile("def value() -> " + type + ":\n  return " + expression + "\n");
      auto& function = unit->get_function("value");
      c10::IValue value = function({});
      if (parameters[i] != 0) {
        module.register_parameter(name, value.toTensor(), false);
      } else {
        module.register_attribute(name, function.getSchema().returns()[0].type(), value);
      }
    }
    module.define(source);
    module.save(std::string(path));
  });
}
