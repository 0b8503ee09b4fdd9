// Calls of a module on a GPU in three parts. The copies of one call, in and out, are made while another computes.
//
// Why nothing is read too early, or overwritten too late:
// - forward runs on the instance's stream for computing, which waits for the event that ends the copies of its inputs;
// - the memory of inputs belongs to the stream for copies, and libtorch is told that the one for computing uses it too: nobody is
//   given it before forward is done with it;
// - results that somebody else may still write to, as a module to what it keeps, are cloned in forward's turn;
// - results are copied after forward has been waited for, and held until the copies have been waited for.

#include <c10/core/Event.h>
#include <c10/core/StreamGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "values.h"

namespace crst {

std::optional<Streams> Streams::of(at::Device device) {
  if (device.is_cpu()) {
    return std::nullopt;
  }
  c10::impl::VirtualGuardImpl gpu(device.type());
  return Streams{gpu.getStreamFromGlobalPool(device), gpu.getStreamFromGlobalPool(device)};
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

// Has the memory of an argument wait for the work of a stream, too, before it is used for something else.
void used_by(const IValue& argument, const c10::impl::VirtualGuardImpl& gpu, const c10::Stream& stream) {
  auto tell = [&](const at::Tensor& tensor) {
    if (!tensor.device().is_cpu()) {
      gpu.recordDataPtrOnStream(tensor.storage().data_ptr(), stream);
    }
  };
  if (argument.isTensor()) {
    tell(argument.toTensor());
  } else if (argument.isGenericDict()) {
    for (const auto& entry : argument.toGenericDict()) {
      tell(entry.value().toTensor());
    }
  }
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
    c10::impl::VirtualGuardImpl gpu(staged->device().type());
    staged->arguments = crst::arguments(crst::plan_of(*module), staged->device(), inputs, count);
    for (const auto& argument : staged->arguments) {
      crst::used_by(argument, gpu, staged->streams.compute);
    }
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
    crst::IValue returned = crst::instance_of(*module).forward(std::move(staged->arguments));
    crst::collect(std::move(returned), *staged->results);
    crst::make_own(*staged->results);
    gpu.synchronizeStream(staged->streams.compute);
    staged->results->infer_ns = crst::nanoseconds(crst::Clock::now() - began);
    if (module->shares) {
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
