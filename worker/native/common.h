// What the shim's files share: errors across the C boundary, and the handles' insides.
#pragma once

#include <c10/core/Stream.h>
#include <torch/csrc/jit/api/module.h>

#include <cstdlib>
#include <cstring>
#include <memory>
#include <new>
#include <optional>
#include <string>
#include <unordered_map>
#include <utility>
#include <vector>

#include "engine.h"

namespace crst {

using c10::IValue;
using torch::jit::Module;
using ObjectPtr = c10::intrusive_ptr<c10::ivalue::Object>;

// A refusal of the shim itself, with its code.
struct Refusal {
  int32_t code;
  std::string text;
};

// `cuda` is the ordinal of the GPU, or -1 for the CPU.
inline at::Device device_of(int32_t cuda) {
  return cuda < 0 ? at::Device(at::kCPU) : at::Device(at::kCUDA, static_cast<c10::DeviceIndex>(cuda));
}

inline std::string text_of(const crst_slice& slice) {
  return std::string(reinterpret_cast<const char*>(slice.data), slice.length);
}

// Whether libtorch's CUDA half is there and has found a GPU.
bool has_gpus();

char* copy_out(const char* data, size_t length);
// Stores the exception that is being handled; returns its code.
int32_t store_current(crst_error* error) noexcept;

template <typename F>
int32_t guarded(crst_error* error, F&& body) noexcept {
  try {
    body();
    return CRST_OK;
  } catch (...) {
    return store_current(error);
  }
}

// Where the arguments of forward come from.
struct Plan {
  struct Argument {
    int32_t kind;
    size_t input;
    IValue value;
  };
  std::vector<Argument> arguments;
  std::vector<std::string> names;
  size_t inputs = 0;
};

// The module as it was loaded, never run, and what a copy of it needs to know.
struct Pristine {
  Module module;
  at::Device device = at::kCPU;
  std::vector<IValue> shared;        // weights and opaque constants: every copy uses these very objects
  std::vector<at::Tensor> copied;    // all other tensors: every copy has its own
  std::vector<at::Tensor> weights;   // the tensors among `shared`
  uint64_t weight_versions = 0;      // sum of their versions at load: grows when one is written in place
  uint64_t bytes = 0;
  uint64_t fingerprint = 0;
};

// An instance that can be called.
struct Instance {
  Module module;
  torch::jit::Method forward;

  explicit Instance(Module copy) : module(std::move(copy)), forward(module.get_method("forward")) {}
};

// Where the calls of an instance on a GPU go: all of them compute on one stream, in turn; each handle copies on its own.
struct Streams {
  c10::Stream compute;
  c10::Stream copies;

  // Nothing for the CPU.
  static std::optional<Streams> of(const Pristine& pristine);
  // For another handle of the same instance.
  Streams beside() const;
};

std::shared_ptr<const Pristine> make_pristine(const Module& loaded, at::Device device);
Module copy_of(const Pristine& pristine);
// Throws if a copy has written to the weights that all copies share.
void refuse_written_weights(const Pristine& pristine);

std::string save_state(const Module& module, const Pristine& pristine);
// A new copy of the pristine module with the saved state in it.
Module restore_state(const Pristine& pristine, const uint8_t* data, size_t length);

}  // namespace crst

struct crst_module {
  std::shared_ptr<const crst::Pristine> pristine;
  std::shared_ptr<const crst::Plan> plan;
  std::optional<crst::Streams> streams = crst::Streams::of(*pristine);
  // Made at the first stateless call; all handles of an instance have the same one.
  std::shared_ptr<std::optional<crst::Instance>> instance = std::make_shared<std::optional<crst::Instance>>();
  // Whether another module has the same parameters; likewise.
  std::shared_ptr<bool> shares = std::make_shared<bool>(false);
};

struct crst_sequence {
  std::shared_ptr<const crst::Pristine> pristine;
  std::shared_ptr<const crst::Plan> plan;
  crst::Instance instance;
};

struct crst_generation {
  std::shared_ptr<const crst::Pristine> pristine;
  crst::Instance instance;
  torch::jit::Method next;
};
