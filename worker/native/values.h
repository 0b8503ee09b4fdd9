// Between the bytes of requests and responses and the values that a module takes and returns.
#pragma once

#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>

#include <chrono>

#include "common.h"

struct crst_tensor {
  std::shared_ptr<const void> owner;  // goes after the tensor
  at::Tensor tensor;
};

struct crst_results {
  struct Result {
    at::Tensor tensor;  // undefined for a value that can't be answered
    std::string name;
    std::optional<int64_t> texts;  // how many byte strings `tensor` holds, in the wire's framing
  };
  std::shared_ptr<const void> owner;  // of memory that the results may lie in; goes after them
  std::vector<Result> results;
  uint64_t input_ns = 0;
  uint64_t infer_ns = 0;
};

namespace crst {

using Clock = std::chrono::steady_clock;

inline uint64_t nanoseconds(Clock::duration duration) {
  return static_cast<uint64_t>(std::chrono::duration_cast<std::chrono::nanoseconds>(duration).count());
}

// Unsigned integers that libtorch can store but hardly compute with.
enum class Unsigned { kWiden, kAsTheyAre };

// The tensor that an input's parts make up, on the device: on a GPU once the current stream gets there. Refuses with
// CRST_BAD_INPUT.
at::Tensor tensor_of(const crst_input& input, const std::string& name, at::Device device, Unsigned rule);

// The byte strings of an input. Refuses with CRST_BAD_INPUT.
c10::List<std::string> texts_of(const crst_input& input, const std::string& name);

// The arguments of forward for one call.
std::vector<IValue> arguments(const Plan& plan, at::Device device, const crst_input* inputs, size_t count);

// Refuses a module whose arguments have not been bound.
const Plan& plan_of(const crst_module& module);

// The copy of a module that answers its stateless requests.
Instance& instance_of(crst_module& module);

// How a thread has to be set while it runs a model.
struct Turn {
  c10::InferenceMode inference;
  c10::OptionalDeviceGuard on_device;

  explicit Turn(at::Device device) {
    if (!device.is_cpu()) {
      on_device.reset_device(device);
    }
  }
};

// Takes apart what a model returned, and adds it to the results: tuples, lists and dicts become one result
// for each value in them.
void collect(IValue returned, crst_results& results);

// Makes row-major tensors of the results, where they are, that nobody else can write to.
void make_own(crst_results& results);

// The same on the CPU. What lies on a GPU is copied by the current stream, which is waited for.
void settle(crst_results& results);

// All of what a model returned in one go.
void gather(IValue returned, crst_results& results);

}  // namespace crst
