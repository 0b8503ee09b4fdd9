// Loading a module, its signature, and errors across the C boundary.

#include <ATen/Parallel.h>
#include <ATen/core/grad_mode.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/util/Exception.h>
#include <dlfcn.h>
#include <torch/csrc/api/include/torch/cuda.h>
#include <torch/csrc/jit/passes/tensorexpr_fuser.h>
#include <torch/csrc/jit/runtime/graph_executor.h>
#include <torch/csrc/jit/runtime/jit_exception.h>
#include <torch/csrc/jit/serialization/import.h>

#include <atomic>
#include <mutex>

#include "common.h"
#include "file.h"

namespace crst {

namespace {

// libtorch's texts can carry a whole weight tensor; what is useful stands at their start or end.
constexpr size_t kTextHead = 16 * 1024;
constexpr size_t kTextTail = 16 * 1024;

int32_t store(crst_error* error, int32_t code, std::string text) noexcept {
  try {
    if (text.size() > kTextHead + kTextTail) {
      text = text.substr(0, kTextHead) + "\n" + text.substr(text.size() - kTextTail);
    }
    if (error != nullptr) {
      error->text = copy_out(text.data(), text.size());
      error->length = error->text == nullptr ? 0 : text.size();
    }
  } catch (...) {
    // Not even a message could be made: the code alone has to do.
  }
  return code;
}

// The executor that specialises a graph after profiling its first runs makes those runs many times
// slower, again for every new shape; a server wants each request to take what the last one took.
void settle_executor() {
  static std::once_flag once;
  std::call_once(once, [] {
    torch::jit::getProfilingMode() = false;
    torch::jit::setTensorExprFuserEnabled(false);
  });
}

const char* kind_of(const c10::TypePtr& type) {
  c10::TypePtr inner = type;
  if (auto optional = type->cast<c10::OptionalType>()) {
    inner = optional->getElementType();
  }
  switch (inner->kind()) {
    case c10::TypeKind::TensorType:
      return "tensor";
    case c10::TypeKind::IntType:
      return "int";
    case c10::TypeKind::FloatType:
      return "float";
    case c10::TypeKind::BoolType:
      return "bool";
    case c10::TypeKind::StringType:
      return "str";
    case c10::TypeKind::ListType: {
      auto element = inner->expect<c10::ListType>()->getElementType();
      return element->kind() == c10::TypeKind::StringType ? "texts" : "other";
    }
    case c10::TypeKind::DictType: {
      auto dict = inner->expect<c10::DictType>();
      bool tensors = dict->getKeyType()->kind() == c10::TypeKind::StringType &&
                     dict->getValueType()->kind() == c10::TypeKind::TensorType;
      return tensors ? "dict" : "other";
    }
    default:
      return "other";
  }
}

}  // namespace

std::atomic<bool> gpus_found{false};

bool has_gpus() { return gpus_found; }

char* copy_out(const char* data, size_t length) {
  char* copy = static_cast<char*>(std::malloc(length == 0 ? 1 : length));
  if (copy != nullptr && length != 0) {
    std::memcpy(copy, data, length);
  }
  return copy;
}

int32_t store_current(crst_error* error) noexcept {
  try {
    throw;
  } catch (const Refusal& e) {
    return store(error, e.code, e.text);
  } catch (const c10::OutOfMemoryError& e) {
    return store(error, CRST_OUT_OF_MEMORY, e.what_without_backtrace());
  } catch (const torch::jit::JITException& e) {
    auto raised = e.getOriginalMsg();
    if (!raised.has_value()) {
      return store(error, CRST_FAILED, e.what());
    }
    // An `assert` has its class in the message already.
    auto name = e.getPythonClassName();
    return store(error, CRST_RAISED, name.has_value() ? *name + ": " + *raised : *raised);
  } catch (const c10::Error& e) {
    return store(error, CRST_FAILED, e.what_without_backtrace());
  } catch (const std::bad_alloc& e) {
    return store(error, CRST_OUT_OF_MEMORY, "the system has no memory left");
  } catch (const std::exception& e) {
    return store(error, CRST_FAILED, e.what());
  } catch (...) {
    return store(error, CRST_FAILED, "an exception of an unknown type");
  }
}

}  // namespace crst

using crst::guarded;

void crst_free(char* text) { std::free(text); }

int32_t crst_set_threads(int32_t intra, int32_t inter, crst_error* error) {
  return guarded(error, [&] {
    at::set_num_threads(intra);
    static std::once_flag once;
    std::call_once(once, [&] { at::set_num_interop_threads(inter); });
  });
}

int32_t crst_set_intra_op_threads(int32_t intra, crst_error* error) {
  return guarded(error, [&] {
    // What OpenMP and MKL keep of this belongs to the calling thread. But a thread's first question makes it take over what
    // any thread was last told, so it is asked before and not in its first operation.
    at::get_num_threads();
    at::set_num_threads(intra);
  });
}

int32_t crst_cuda_load(const char* path, int32_t* devices, crst_error* error) {
  return guarded(error, [&] {
    if (dlopen(path, RTLD_NOW | RTLD_GLOBAL) == nullptr) {
      const char* reason = dlerror();
      throw crst::Refusal{CRST_FAILED, reason == nullptr ? "dlopen failed" : reason};
    }
    *devices = torch::cuda::device_count();
    crst::gpus_found = *devices > 0;
  });
}

int32_t crst_cuda_memory(int32_t ordinal, uint64_t* free_bytes, uint64_t* total_bytes, crst_error* error) {
  return guarded(error, [&] {
    auto [free_now, total] = c10::getDeviceAllocator(at::kCUDA)->getMemoryInfo(static_cast<c10::DeviceIndex>(ordinal));
    *free_bytes = free_now;
    *total_bytes = total;
  });
}

int32_t crst_module_load(const char* path, int32_t cuda, crst_module** out, crst_error* error) {
  return guarded(error, [&] {
    crst::settle_executor();
    at::Device device = crst::device_of(cuda);
    // Not in inference mode: only tensors from outside it count the writes to them, which is how a
    // module that changes its shared weights is noticed.
    at::NoGradGuard no_grad;
    crst::Module module = torch::jit::load(std::make_shared<crst::PiecewiseFile>(path), device);
    module.eval();
    if (!module.find_method("forward").has_value()) {
      throw crst::Refusal{CRST_FAILED, "the module has no method `forward`"};
    }
    auto pristine = crst::make_pristine(module, device);
    if (!device.is_cpu()) {
      // It was put there by this thread's stream; others will use it.
      torch::cuda::synchronize(device.index());
    }
    *out = new crst_module{std::move(pristine), nullptr};
  });
}

int32_t crst_module_twin(crst_module* module, crst_module** out, crst_error* error) {
  return guarded(error, [&] {
    crst::refuse_written_weights(*module->pristine);
    *out = new crst_module{module->pristine, module->plan};
    *(*out)->shares = true;
    *module->shares = true;
  });
}

void crst_module_free(crst_module* module) { delete module; }

int32_t crst_module_signature(crst_module* module, char** text, size_t* length, crst_error* error) {
  return guarded(error, [&] {
    auto forward = module->pristine->module.get_method("forward");
    const auto& schema = forward.function().getSchema();
    std::string lines;
    // The first argument is the module itself.
    for (size_t i = 1; i < schema.arguments().size(); i++) {
      const auto& argument = schema.arguments()[i];
      lines += "arg\t" + argument.name() + "\t" + crst::kind_of(argument.type()) + "\t" +
               argument.type()->annotation_str() + "\t" + (argument.default_value().has_value() ? "1" : "0") + "\n";
    }
    std::string returned = schema.returns().empty() ? "None" : schema.returns()[0].type()->annotation_str();
    lines += "ret\t\t\t" + returned + "\t0\n";
    *text = crst::copy_out(lines.data(), lines.size());
    *length = *text == nullptr ? 0 : lines.size();
  });
}

int32_t crst_module_bind(crst_module* module, const crst_argument* arguments, size_t count,
                         const crst_slice* names, size_t name_count, crst_error* error) {
  return guarded(error, [&] {
    auto forward = module->pristine->module.get_method("forward");
    const auto& schema = forward.function().getSchema();
    if (schema.arguments().size() != count + 1) {
      throw crst::Refusal{CRST_FAILED, "a binding is needed for each argument of forward"};
    }
    auto plan = std::make_shared<crst::Plan>();
    for (size_t i = 0; i < count; i++) {
      const auto& from = arguments[i];
      crst::Plan::Argument argument{from.kind, 0, c10::IValue()};
      switch (from.kind) {
        case CRST_ARG_INPUT:
          argument.input = static_cast<size_t>(from.integer);
          // For a call that leaves the input out.
          if (schema.arguments()[i + 1].default_value().has_value()) {
            argument.value = schema.arguments()[i + 1].default_value().value();
          }
          break;
        case CRST_ARG_DEFAULT:
          argument.value = schema.arguments()[i + 1].default_value().value();
          break;
        case CRST_ARG_INT:
          argument.value = from.integer;
          break;
        case CRST_ARG_FLOAT:
          argument.value = from.real;
          break;
        case CRST_ARG_BOOL:
          argument.value = from.integer != 0;
          break;
        case CRST_ARG_TEXT:
          argument.value = crst::text_of(from.text);
          break;
        case CRST_ARG_DICT:
          break;
        default:
          throw crst::Refusal{CRST_FAILED, "unknown kind of argument"};
      }
      plan->arguments.push_back(std::move(argument));
    }
    for (size_t i = 0; i < name_count; i++) {
      plan->names.push_back(crst::text_of(names[i]));
    }
    plan->inputs = name_count;
    for (const auto& argument : plan->arguments) {
      if (argument.kind == CRST_ARG_INPUT && argument.input >= plan->inputs) {
        throw crst::Refusal{CRST_FAILED, "an argument is bound to an input that is not there"};
      }
    }
    module->plan = std::move(plan);
  });
}

uint64_t crst_module_bytes(const crst_module* module) { return module->pristine->bytes; }

uint64_t crst_module_fingerprint(const crst_module* module) { return module->pristine->fingerprint; }
