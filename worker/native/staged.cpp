// Calls of a module on a GPU in three parts. The copies of one call, in and out, are made while another computes.
//
// Why nothing is read too early, or overwritten too late:
// - forward runs on the instance's stream for computing, which waits for the event that ends the copies of its inputs;
// - inputs are held until forward has been waited for. Their memory belongs to the stream for copies, so before that no later call may
//   be given it. Of inputs that the module keeps, libtorch is told that the stream for computing uses them: they may be given up in
//   the middle of a later call. (Not of all: whoever frees such memory records events, and on a device that is lost that ends the
//   process.)
// - results are made row-major, and cloned if somebody else may still write to them, in forward's turn and by its stream;
// - they are copied after forward has been waited for, and held until the copies have been waited for.

#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>
#include <torch/csrc/jit/ir/ir.h>
#include <torch/csrc/jit/passes/inliner.h>

#include "values.h"

namespace crst {

namespace {

bool has_fork(torch::jit::Block* block) {
  for (auto* node : block->nodes()) {
    if (node->kind() == c10::prim::fork) {
      return true;
    }
    for (auto* inside : node->blocks()) {
      if (has_fork(inside)) {
        return true;
      }
    }
  }
  return false;
}

// Whether forward has parts that libtorch runs on threads of its own, which know nothing of this thread's streams.
bool forks(const Module& module) {
  auto graph = module.get_method("forward").graph()->copy();
  torch::jit::Inline(*graph);
  return has_fork(graph->block());
}

}  // namespace

std::optional<Streams> Streams::of(const Pristine& pristine) {
  const auto& device = pristine.device;
  if (device.is_cpu()) {
    return std::nullopt;
  }
  c10::impl::VirtualGuardImpl gpu(device.type());
  auto compute = forks(pristine.module) ? gpu.getDefaultStream(device) : gpu.getStreamFromGlobalPool(device);
  return Streams{compute, gpu.getStreamFromGlobalPool(device)};
}

Streams Streams::beside() const {
  c10::impl::VirtualGuardImpl gpu(compute.device_type());
  return {compute, gpu.getStreamFromGlobalPool(compute.device())};
}

}  // namespace crst

struct crst_staged {
  crst::Streams streams;
  std::vector<crst::IValue> arguments;
  c10::Event copied;
  std::unique_ptr<crst_results> results = std::make_unique<crst_results>();

  explicit crst_staged(const crst::Streams& streams) : streams(streams), copied(streams.copies.device_type()) {}

  at::Device device() const { return streams.compute.device(); }
};

namespace crst {

namespace {

// Lets go of a call's arguments once it has been computed.
void give_up(std::vector<IValue>& arguments, const c10::impl::VirtualGuardImpl& gpu, const c10::Stream& compute) {
  // `ours` is how often this function and its caller hold the tensor.
  auto see = [&](const at::Tensor& tensor, size_t ours) {
    bool is_kept = tensor.use_count() > ours || tensor.storage().use_count() > 1;
    if (is_kept && !tensor.device().is_cpu()) {
      gpu.recordDataPtrOnStream(tensor.storage().data_ptr(), compute);
    }
  };
  for (const auto& argument : arguments) {
    if (argument.isTensor()) {
      see(argument.toTensor(), 1);
    } else if (argument.isGenericDict()) {
      for (const auto& entry : argument.toGenericDict()) {
        IValue value = entry.value();
        see(value.toTensor(), 2);
      }
    }
  }
  arguments.clear();
}

}  // namespace

}  // namespace crst

using crst::guarded;

int32_t crst_module_second(crst_module* module, crst_module** out, crst_error* error) {
  return guarded(error, [&] {
    if (!module->streams.has_value()) {
      throw crst::Refusal{CRST_FAILED, "only an instance on a GPU has a second handle"};
    }
    *out = new crst_module{module->pristine, module->plan, module->streams->beside(), module->instance, module->shares};
  });
}

int32_t crst_module_stage(crst_module* module, const crst_input* inputs, size_t count, crst_staged** out, crst_error* error) {
  return guarded(error, [&] {
    auto began = crst::Clock::now();
    auto staged = std::make_unique<crst_staged>(module->streams.value());
    crst::Turn turn(staged->device());
    c10::StreamGuard on(staged->streams.copies);
    staged->arguments = crst::arguments(crst::plan_of(*module), staged->device(), inputs, count);
    staged->copied.record(staged->streams.copies);
    staged->results->input_ns = crst::nanoseconds(crst::Clock::now() - began);
    *out = staged.release();
  });
}

int32_t crst_module_compute(crst_module* module, crst_staged* staged, crst_error* error) {
  return guarded(error, [&] {
    auto began = crst::Clock::now();
    crst::Turn turn(staged->device());
    c10::StreamGuard on(staged->streams.compute);
    c10::impl::VirtualGuardImpl gpu(staged->device().type());
    staged->copied.block(staged->streams.compute);
    try {
      // A copy of the list: the inputs outlive forward.
      crst::collect(crst::instance_of(*module).forward(staged->arguments), *staged->results);
      crst::make_own(*staged->results);
      gpu.synchronizeStream(staged->streams.compute);
    } catch (...) {
      // What was begun before it raised may still read the inputs.
      try {
        gpu.synchronizeStream(staged->streams.compute);
      } catch (...) {
        // The device is lost: nothing reads any more. What forward raised says so, or the next call will.
      }
      throw;
    }
    staged->results->infer_ns = crst::nanoseconds(crst::Clock::now() - began);
    crst::give_up(staged->arguments, gpu, staged->streams.compute);
    if (*module->shares) {
      crst::refuse_written_weights(*module->pristine);
    }
  });
}

int32_t crst_staged_results(crst_staged* staged, crst_results** out, crst_error* error) {
  return guarded(error, [&] {
    crst::Turn turn(staged->device());
    c10::StreamGuard on(staged->streams.copies);
    crst::settle(*staged->results);
    *out = staged->results.release();
  });
}

void crst_staged_free(crst_staged* staged) { delete staged; }
