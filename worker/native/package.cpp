// AOTInductor packages: a model that was compiled to native code. It has no state inside.

#include <ATen/Parallel.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/InferenceMode.h>
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include "values.h"

using torch::inductor::AOTIModelPackageLoader;

namespace crst {

struct Package {
  std::unique_ptr<AOTIModelPackageLoader> loader;
  at::Device device = at::kCPU;
  std::vector<std::string> names;  // of the inputs, in the package's order
  uint64_t bytes = 0;
};

namespace {

constexpr const char* kModelName = "model";  // the loader's default, and what torch writes

// The compiled code trusts its inputs unless this is set when it first runs: a wrong shape would be read
// beyond its end. Set before main, when no other thread can be reading the environment.
__attribute__((constructor)) void let_packages_check_their_inputs() { setenv("AOTI_RUNTIME_CHECK_INPUTS", "1", 1); }

// A package is linked with libtorch.so, which holds nothing but the names of libtorch's parts. It lies
// beside the part that this process has, where the system's loader need not look.
void open_umbrella() {
  Dl_info here{};
  if (dladdr(reinterpret_cast<void*>(&at::set_num_threads), &here) == 0 || here.dli_fname == nullptr) {
    return;
  }
  std::string path = here.dli_fname;
  path = path.substr(0, path.rfind('/') + 1) + "libtorch.so";
  // Where it can't be opened the package can't be either, and that error names what is missing.
  dlopen(path.c_str(), RTLD_NOW | RTLD_GLOBAL);
}

bool has_instructions(const std::string& isa) {
#if defined(__x86_64__)
  if (isa == "AVX2") {
    return __builtin_cpu_supports("avx2");
  }
  if (isa.rfind("AVX512", 0) == 0 || isa == "AMX") {
    return __builtin_cpu_supports("avx512f");
  }
#endif
  return true;
}

// What a package was compiled for has to be what it will run on: native code for another processor ends the
// process at its first strange instruction.
void check_target(const std::unordered_map<std::string, std::string>& metadata, at::Device device) {
  auto said = [&](const char* key) {
    auto found = metadata.find(key);
    return found == metadata.end() ? std::string() : found->second;
  };
  std::string here = device.is_cpu() ? "cpu" : "cuda";
  std::string target = said("AOTI_DEVICE_KEY");
  if (!target.empty() && target != here) {
    throw Refusal{CRST_FAILED, "the package was compiled for " + target + ", the device is " + here};
  }
  if (!has_instructions(said("AOTI_CPU_ISA"))) {
    throw Refusal{CRST_FAILED, "the package was compiled for " + said("AOTI_CPU_ISA") + ", which this processor doesn't have"};
  }
}

std::vector<at::Tensor> run_compiled(AOTIModelPackageLoader& loader, std::vector<at::Tensor> inputs) {
  try {
    return loader.boxed_run(std::move(inputs));
  } catch (const std::runtime_error& e) {
    // The compiled code prints why it failed, and gives back no more than that it did.
    if (std::strstr(e.what(), "API call failed") != nullptr) {
      throw Refusal{CRST_FAILED,
                    "the package refused the shapes or types of its inputs, or its code failed; it wrote the reason to the "
                    "worker's standard error"};
    }
    throw;
  }
}

}  // namespace

}  // namespace crst

struct crst_package {
  std::shared_ptr<crst::Package> inside;
};

using crst::guarded;

int32_t crst_package_load(const char* path, int32_t cuda, crst_package** out, crst_error* error) {
  return guarded(error, [&] {
    c10::InferenceMode inference;
    auto inside = std::make_shared<crst::Package>();
    inside->device = crst::device_of(cuda);
    crst::check_target(AOTIModelPackageLoader::load_metadata_from_package(path, crst::kModelName), inside->device);
    crst::open_umbrella();
    auto index = static_cast<c10::DeviceIndex>(cuda);
    inside->loader = std::make_unique<AOTIModelPackageLoader>(path, crst::kModelName, false, 1, index);
    for (const auto& constant : inside->loader->get_runner()->extract_constants_map(false)) {
      inside->bytes += constant.second.nbytes();
    }
    *out = new crst_package{std::move(inside)};
  });
}

void crst_package_free(crst_package* package) { delete package; }

int32_t crst_package_call_spec(crst_package* package, char** text, size_t* length, crst_error* error) {
  return guarded(error, [&] {
    std::string lines;
    for (const auto& spec : package->inside->loader->get_call_spec()) {
      lines += spec + "\n";
    }
    *text = crst::copy_out(lines.data(), lines.size());
    *length = *text == nullptr ? 0 : lines.size();
  });
}

int32_t crst_package_bind(crst_package* package, const crst_slice* names, size_t count, crst_error* error) {
  return guarded(error, [&] {
    package->inside->names.clear();
    for (size_t i = 0; i < count; i++) {
      package->inside->names.push_back(crst::text_of(names[i]));
    }
  });
}

uint64_t crst_package_bytes(const crst_package* package) { return package->inside->bytes; }

int32_t crst_package_run(crst_package* package, const crst_input* inputs, size_t count, crst_results** out,
                         crst_error* error) {
  return guarded(error, [&] {
    auto& inside = *package->inside;
    // The compiled code takes as many tensors as it needs, however many there are.
    if (count != inside.names.size()) {
      throw crst::Refusal{CRST_FAILED, "a call needs as many inputs as were bound"};
    }
    crst::Turn turn(inside.device);
    auto results = std::make_unique<crst_results>();
    auto began = crst::Clock::now();
    std::vector<at::Tensor> tensors;
    tensors.reserve(count);
    for (size_t i = 0; i < count; i++) {
      tensors.push_back(crst::tensor_of(inputs[i], inside.names[i], inside.device, crst::Unsigned::kAsTheyAre));
    }
    auto assembled = crst::Clock::now();
    std::vector<at::Tensor> returned = crst::run_compiled(*inside.loader, std::move(tensors));
    results->input_ns = crst::nanoseconds(assembled - began);
    results->infer_ns = crst::nanoseconds(crst::Clock::now() - assembled);
    for (auto& tensor : returned) {
      crst::IValue value(std::move(tensor));
      crst::collect(std::move(value), *results);
    }
    crst::settle(*results);
    // A result may lie in the package's own memory, as a constant does.
    results->owner = package->inside;
    *out = results.release();
  });
}
