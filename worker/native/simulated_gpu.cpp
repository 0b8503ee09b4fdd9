// A GPU made of software, for tests: it takes the place of libtorch_cuda.so beside the CPU's libtorch, and no program can tell.
//
// What it is good for: everything that the worker does about a GPU (finding several, placing instances, staging inputs, streams
// and events, running out of memory, losing a device) runs as it is shipped, and what is wrong there gives wrong answers here.
// For that it is as strict as a GPU:
// - new memory holds rubbish (0xff: NaN, -1), and memory that is freed is overwritten in the order of the stream that it was
//   allocated on, as it would be by whoever gets it next;
// - a copy between pinned memory and the device that doesn't block is made later, by its stream, and takes its time; work on
//   another stream that doesn't wait for it reads rubbish;
// - a copy of pageable memory holds up whoever asked for it, and its stream.
// What it is not: fast, or a proof that the real CUDA half agrees. Operations are computed on the CPU, at once, after all that
// their stream has before them.
//
// Settings come from the environment, all optional:
// SIMULATED_GPU_COUNT   how many (1)
// SIMULATED_GPU_MIB     memory of each, in MiB (1024)
// SIMULATED_GPU_OP_US   what each operation takes beyond computing it, in us (0)
// SIMULATED_GPU_MB_S    what a copy from or to the host makes of a second, in MB (10000)
// SIMULATED_GPU_BREAKS  a path: from when there is a file, each operation of device 0 fails as one on a lost device does
// SIMULATED_GPU_REPORT  a path: what was counted, as JSON, when the process ends

#include <ATen/EmptyTensor.h>
#include <ATen/Functions.h>
#include <ATen/TensorOperators.h>
#include <ATen/core/CachingHostAllocator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/ops/_reshape_alias_native.h>
#include <ATen/ops/as_strided_native.h>
#include <ATen/ops/resize_native.h>
#include <ATen/ops/set_native.h>
#include <ATen/ops/view_native.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <unistd.h>

#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

namespace {

using Clock = std::chrono::steady_clock;
using c10::Device;
using c10::DeviceIndex;
using c10::Stream;

constexpr int kDevicesMax = 8;
// As many as CUDA's pool has; number 0 is the default stream.
constexpr int kStreams = 33;
constexpr int kRubbish = 0xff;

uint64_t setting(const char* name, uint64_t otherwise) {
  const char* text = std::getenv(name);
  return text == nullptr ? otherwise : std::strtoull(text, nullptr, 10);
}

struct Settings {
  int devices = static_cast<int>(std::min<uint64_t>(setting("SIMULATED_GPU_COUNT", 1), kDevicesMax));
  size_t memory_bytes = setting("SIMULATED_GPU_MIB", 1024) << 20;
  uint64_t op_us = setting("SIMULATED_GPU_OP_US", 0);
  uint64_t copy_mb_s = std::max<uint64_t>(1, setting("SIMULATED_GPU_MB_S", 10'000));
};

const Settings& settings() {
  static const Settings all;
  return all;
}

// What is counted of a device.
struct Counts {
  uint64_t operations = 0;
  uint64_t pinned_in = 0;
  uint64_t pinned_out = 0;
  uint64_t pageable_in = 0;
  uint64_t pageable_out = 0;
  uint64_t copying_in_ns = 0;
  // While a copy to the device was made, an operation ran.
  uint64_t overlap_ns = 0;
};

class Meter {
 public:
  enum What { kCopyIn, kOperation };

  void count(uint64_t Counts::* what) {
    std::lock_guard lock(mutex_);
    counts_.*what += 1;
  }

  void begin(What what) {
    std::lock_guard lock(mutex_);
    pass();
    running_[what]++;
  }

  void end(What what) {
    std::lock_guard lock(mutex_);
    pass();
    running_[what]--;
  }

  Counts read() {
    std::lock_guard lock(mutex_);
    return counts_;
  }

 private:
  void pass() {
    auto now = Clock::now();
    auto took = static_cast<uint64_t>(std::chrono::nanoseconds(now - since_).count());
    if (running_[kCopyIn] > 0) {
      counts_.copying_in_ns += took;
      if (running_[kOperation] > 0) {
        counts_.overlap_ns += took;
      }
    }
    since_ = now;
  }

  std::mutex mutex_;
  Counts counts_;
  std::array<int, 2> running_{};
  Clock::time_point since_ = Clock::now();
};

// Does one thing after the other, on a thread of its own.
class Queue {
 public:
  void push(std::function<void()> task) {
    std::lock_guard lock(mutex_);
    if (!runs_) {
      runs_ = true;
      // A process ends with its streams, whatever they do.
      std::thread([this] { serve(); }).detach();
    }
    tasks_.push_back(std::move(task));
    pushed_++;
    changed_.notify_all();
  }

  // Waits for everything that is in it by now.
  void wait() {
    std::unique_lock lock(mutex_);
    uint64_t last = pushed_;
    changed_.wait(lock, [&] { return done_ >= last; });
  }

  bool is_done() {
    std::lock_guard lock(mutex_);
    return done_ == pushed_;
  }

 private:
  void serve() {
    std::unique_lock lock(mutex_);
    for (;;) {
      changed_.wait(lock, [&] { return !tasks_.empty(); });
      {
        auto task = std::move(tasks_.front());
        tasks_.pop_front();
        lock.unlock();
        task();
      }
      lock.lock();
      done_++;
      changed_.notify_all();
    }
  }

  std::mutex mutex_;
  std::condition_variable changed_;
  std::deque<std::function<void()>> tasks_;
  uint64_t pushed_ = 0;
  uint64_t done_ = 0;
  bool runs_ = false;
};

// A point in a stream. What is recorded anew counts for those that wait from then on.
struct Event {
  std::mutex mutex;
  std::condition_variable changed;
  uint64_t recorded = 0;
  uint64_t passed = 0;

  void pass(uint64_t version) {
    std::lock_guard lock(mutex);
    passed = std::max(passed, version);
    changed.notify_all();
  }

  void wait(uint64_t version) {
    std::unique_lock lock(mutex);
    changed.wait(lock, [&] { return passed >= version; });
  }

  uint64_t latest() {
    std::lock_guard lock(mutex);
    return recorded;
  }
};

using SharedEvent = std::shared_ptr<Event>;

struct Simulated {
  std::array<Queue, kStreams> streams;
  Meter meter;
  std::mutex link;  // to the host: one copy at a time, in each direction
  std::mutex link_back;
  std::mutex memory;
  size_t used_bytes = 0;
  int next_stream = 0;
};

// Never freed: streams outlive main.
std::array<Simulated, kDevicesMax>& all() {
  static auto* devices = new std::array<Simulated, kDevicesMax>();
  return *devices;
}

thread_local DeviceIndex current_device = 0;
thread_local std::array<c10::StreamId, kDevicesMax> current_stream{};
// An operation's own way to the CPU and back is none of the worker's copies.
thread_local bool is_inside = false;

Simulated& at_device(DeviceIndex index) { return all().at(static_cast<size_t>(index)); }

Queue& queue_of(DeviceIndex index, c10::StreamId stream) {
  return at_device(index).streams.at(static_cast<size_t>(stream));
}

Queue& current_queue(DeviceIndex index) { return queue_of(index, current_stream.at(static_cast<size_t>(index))); }

bool is_broken(DeviceIndex index) {
  static const char* breaks = std::getenv("SIMULATED_GPU_BREAKS");
  return index == 0 && breaks != nullptr && access(breaks, F_OK) == 0;
}

// ---- memory ----

struct Block {
  DeviceIndex device;
  c10::StreamId stream;
  size_t bytes;
  std::vector<c10::StreamId> also_used_by;
};

std::mutex blocks_mutex;
std::map<const void*, Block>& blocks() {
  static auto* all = new std::map<const void*, Block>();
  return *all;
}

void free_on_device(void* data) {
  Block block;
  {
    std::lock_guard lock(blocks_mutex);
    auto found = blocks().find(data);
    block = found->second;
    blocks().erase(found);
  }
  auto free_now = [data, block] {
    std::memset(data, kRubbish, block.bytes);
    std::free(data);
    auto& device = at_device(block.device);
    std::lock_guard lock(device.memory);
    device.used_bytes -= block.bytes;
  };
  if (block.also_used_by.empty()) {
    return queue_of(block.device, block.stream).push(free_now);
  }
  // libtorch records an event for each, in a destructor, where an error ends the process.
  if (is_broken(block.device)) {
    std::abort();
  }
  // When the last of its streams gets there. Other streams go on; what waits is the memory.
  auto left = std::make_shared<std::atomic<size_t>>(block.also_used_by.size());
  for (auto stream : block.also_used_by) {
    queue_of(block.device, stream).push([left, free_now] {
      if (--*left == 0) {
        free_now();
      }
    });
  }
}

void record_stream(const void* data, const Stream& stream) {
  std::lock_guard lock(blocks_mutex);
  auto block = blocks().find(data);
  if (block != blocks().end() && block->second.stream != stream.id()) {
    block->second.also_used_by.push_back(stream.id());
  }
}

struct DeviceAllocator final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    Device device(c10::kCUDA, current_device);
    if (bytes == 0) {
      return {nullptr, nullptr, &free_on_device, device};
    }
    auto& inside = at_device(current_device);
    auto reserve = [&] {
      std::lock_guard lock(inside.memory);
      bool fits = bytes <= settings().memory_bytes - inside.used_bytes;
      inside.used_bytes += fits ? bytes : 0;
      return fits;
    };
    if (!reserve()) {
      for (auto& stream : inside.streams) {
        stream.wait();
      }
      TORCH_CHECK_WITH(OutOfMemoryError, reserve(), "CUDA out of memory. Tried to allocate ", bytes, " bytes. GPU ",
                       static_cast<int>(current_device), " has a total capacity of ", settings().memory_bytes, " bytes.");
    }
    void* data = std::malloc(bytes);
    std::memset(data, kRubbish, bytes);
    {
      std::lock_guard lock(blocks_mutex);
      blocks()[data] = {current_device, current_stream.at(static_cast<size_t>(current_device)), bytes, {}};
    }
    return {data, data, &free_on_device, device};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &free_on_device; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr& memory, Stream stream) override { record_stream(memory.get(), stream); }
  c10::CachingDeviceAllocator::DeviceStats getDeviceStats(DeviceIndex) override { return {}; }
  void resetAccumulatedStats(DeviceIndex) override {}
  void resetPeakStats(DeviceIndex) override {}
  std::pair<size_t, size_t> getMemoryInfo(DeviceIndex index) override {
    auto& device = at_device(index);
    std::lock_guard lock(device.memory);
    return {settings().memory_bytes - device.used_bytes, settings().memory_bytes};
  }
};

std::mutex pinned_mutex;
std::map<const void*, size_t>& pinned() {
  static auto* all = new std::map<const void*, size_t>();
  return *all;
}

void free_pinned(void* data) {
  {
    std::lock_guard lock(pinned_mutex);
    pinned().erase(data);
  }
  std::free(data);
}

bool is_pinned(const void* data) {
  std::lock_guard lock(pinned_mutex);
  auto after = pinned().upper_bound(data);
  if (after == pinned().begin()) {
    return false;
  }
  auto block = std::prev(after);
  return data < static_cast<const char*>(block->first) + block->second;
}

struct PinnedAllocator final : at::HostAllocator {
  c10::DataPtr allocate(size_t bytes) override {
    void* data = std::malloc(std::max<size_t>(bytes, 1));
    std::memset(data, kRubbish, bytes);
    std::lock_guard lock(pinned_mutex);
    pinned()[data] = std::max<size_t>(bytes, 1);
    return {data, data, &free_pinned, c10::kCPU};
  }

  c10::DeleterFnPtr raw_deleter() const override { return &free_pinned; }
  void copy_data(void* to, const void* from, size_t bytes) const override { std::memcpy(to, from, bytes); }
  // Each copy under way keeps its memory alive itself.
  bool record_event(void*, void*, Stream) override { return true; }
  void empty_cache() override {}
  at::HostStats get_stats() override { return {}; }
  void reset_accumulated_stats() override {}
  void reset_peak_stats() override {}
};

DeviceAllocator device_allocator;
PinnedAllocator pinned_allocator;

// ---- devices, streams and events ----

struct Guard final : c10::impl::DeviceGuardImplInterface {
  c10::DeviceType type() const override { return c10::kCUDA; }
  Device exchangeDevice(Device device) const override {
    Device before = getDevice();
    setDevice(device);
    return before;
  }
  Device getDevice() const override { return {c10::kCUDA, current_device}; }
  void setDevice(Device device) const override {
    TORCH_CHECK(device.index() < settings().devices, "CUDA error: invalid device ordinal");
    uncheckedSetDevice(device);
  }
  void uncheckedSetDevice(Device device) const noexcept override {
    if (device.index() >= 0) {
      current_device = device.index();
    }
  }
  Stream getStream(Device device) const override {
    return Stream(Stream::UNSAFE, device, current_stream.at(static_cast<size_t>(device.index())));
  }
  Stream getDefaultStream(Device device) const override { return Stream(Stream::UNSAFE, device, 0); }
  Stream getStreamFromGlobalPool(Device device, bool) const override {
    DeviceIndex index = device.index() < 0 ? current_device : device.index();
    auto& inside = at_device(index);
    std::lock_guard lock(inside.memory);
    inside.next_stream = inside.next_stream % (kStreams - 1) + 1;
    return Stream(Stream::UNSAFE, Device(c10::kCUDA, index), inside.next_stream);
  }
  Stream exchangeStream(Stream stream) const override {
    Stream before = getStream(stream.device());
    current_stream.at(static_cast<size_t>(stream.device_index())) = stream.id();
    return before;
  }
  void destroyEvent(void* event, DeviceIndex) const noexcept override { delete static_cast<SharedEvent*>(event); }
  void record(void** event, const Stream& stream, DeviceIndex, c10::EventFlag) const override {
    if (*event == nullptr) {
      *event = new SharedEvent(std::make_shared<Event>());
    }
    auto shared = *static_cast<SharedEvent*>(*event);
    uint64_t version;
    {
      std::lock_guard lock(shared->mutex);
      version = ++shared->recorded;
    }
    queue_of(stream.device_index(), stream.id()).push([shared, version] { shared->pass(version); });
  }
  void block(void* event, const Stream& stream) const override {
    if (event == nullptr) {
      return;
    }
    auto shared = *static_cast<SharedEvent*>(event);
    uint64_t version = shared->latest();
    queue_of(stream.device_index(), stream.id()).push([shared, version] { shared->wait(version); });
  }
  void recordDataPtrOnStream(const c10::DataPtr& memory, const Stream& stream) const override {
    record_stream(memory.get(), stream);
  }
  bool queryEvent(void* event) const override {
    if (event == nullptr) {
      return true;
    }
    auto shared = *static_cast<SharedEvent*>(event);
    std::lock_guard lock(shared->mutex);
    return shared->passed >= shared->recorded;
  }
  DeviceIndex deviceCount() const noexcept override { return static_cast<DeviceIndex>(settings().devices); }
  bool queryStream(const Stream& stream) const override { return queue_of(stream.device_index(), stream.id()).is_done(); }
  void synchronizeStream(const Stream& stream) const override { queue_of(stream.device_index(), stream.id()).wait(); }
  void synchronizeEvent(void* event) const override {
    if (event != nullptr) {
      auto shared = *static_cast<SharedEvent*>(event);
      shared->wait(shared->latest());
    }
  }
  void synchronizeDevice(DeviceIndex index) const override {
    for (auto& stream : at_device(index).streams) {
      stream.wait();
    }
  }
};

C10_REGISTER_GUARD_IMPL(CUDA, Guard)

// libtorch looks for this very name.
struct CUDAHooks final : at::CUDAHooksInterface {
  explicit CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return settings().devices > 0; }
  bool hasCUDA() const override { return settings().devices > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return static_cast<DeviceIndex>(settings().devices); }
  int getNumGPUs() const override { return settings().devices; }
  DeviceIndex current_device() const override { return ::current_device; }
  DeviceIndex getCurrentDevice() const override { return ::current_device; }
  void setCurrentDevice(DeviceIndex index) const override { ::current_device = index; }
  Device getDeviceFromPtr(void* data) const override {
    std::lock_guard lock(blocks_mutex);
    return {c10::kCUDA, blocks().at(data).device};
  }
  bool isPinnedPtr(const void* data) const override { return is_pinned(data); }
  at::Allocator* getPinnedMemoryAllocator() const override { return &pinned_allocator; }
  at::Allocator* getCUDADeviceAllocator() const override { return &device_allocator; }
  void deviceSynchronize(DeviceIndex index) const override { Guard().synchronizeDevice(index); }
};

// ---- operations ----

void check_alive(DeviceIndex index) {
  TORCH_CHECK(!is_broken(index), "CUDA error: an illegal memory access was encountered");
}

DeviceIndex device_among(const torch::jit::Stack& stack) {
  for (const auto& value : stack) {
    if (value.isTensor() && value.toTensor().defined() && value.toTensor().is_cuda()) {
      return value.toTensor().get_device();
    }
    if (value.isDevice() && value.toDevice().is_cuda() && value.toDevice().has_index()) {
      return value.toDevice().index();
    }
  }
  return current_device;
}

struct Inside {
  bool before = is_inside;
  Inside() { is_inside = true; }
  ~Inside() { is_inside = before; }
};

void compute(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  if (is_inside) {
    return at::native::cpu_fallback(op, stack);
  }
  DeviceIndex index = device_among(*stack);
  check_alive(index);
  current_queue(index).wait();
  auto& meter = at_device(index).meter;
  meter.begin(Meter::kOperation);
  struct End {
    Meter& meter;
    ~End() { meter.end(Meter::kOperation); }
  } end{meter};
  meter.count(&Counts::operations);
  std::this_thread::sleep_for(std::chrono::microseconds(settings().op_us));
  Inside inside;
  at::native::cpu_fallback(op, stack);
}

at::Tensor on_host(const at::Tensor& tensor) {
  return at::from_blob(tensor.data_ptr(), tensor.sizes(), tensor.strides(), tensor.options().device(c10::kCPU).pinned_memory(false));
}

void take_time(size_t bytes) {
  std::this_thread::sleep_for(std::chrono::nanoseconds(bytes * 1000 / settings().copy_mb_s));
}

at::Tensor& copy(at::Tensor& to, const at::Tensor& from, bool non_blocking) {
  if (to.numel() == 0 || to.is_same(from)) {
    return to;
  }
  bool is_in = to.is_cuda() && !from.is_cuda();
  bool is_out = from.is_cuda() && !to.is_cuda();
  DeviceIndex index = to.is_cuda() ? to.get_device() : from.get_device();
  check_alive(index);
  auto& device = at_device(index);
  size_t bytes = to.nbytes();
  const at::Tensor& host = is_in ? from : to;
  bool is_flat = to.is_contiguous() && from.is_contiguous() && to.scalar_type() == from.scalar_type() && to.sizes() == from.sizes();
  bool is_async = (is_in || is_out) && non_blocking && is_flat && is_pinned(host.data_ptr());
  if (is_async) {
    device.meter.count(is_in ? &Counts::pinned_in : &Counts::pinned_out);
    // The memory of the host's side lives until then; the device's is the business of whoever copies.
    current_queue(index).push([&device, is_in, bytes, keeps = host.storage(), target = to.data_ptr(), source = from.data_ptr()] {
      std::lock_guard link(is_in ? device.link : device.link_back);
      if (is_in) {
        device.meter.begin(Meter::kCopyIn);
      }
      take_time(bytes);
      std::memcpy(target, source, bytes);
      if (is_in) {
        device.meter.end(Meter::kCopyIn);
      }
    });
    return to;
  }
  if (from.is_cuda()) {
    current_queue(from.get_device()).wait();
  }
  if (to.is_cuda()) {
    current_queue(to.get_device()).wait();
  }
  if ((is_in || is_out) && !is_inside) {
    bool pinned = is_pinned(host.data_ptr());
    device.meter.count(is_in ? (pinned ? &Counts::pinned_in : &Counts::pageable_in)
                             : (pinned ? &Counts::pinned_out : &Counts::pageable_out));
    take_time(bytes);
  }
  at::Tensor target = to.is_cuda() ? on_host(to) : to;
  target.copy_(from.is_cuda() ? on_host(from) : from);
  return to;
}

// How an operation that was computed on the CPU puts its result back.
at::Tensor copy_and_resize(const at::Tensor& from, const at::Tensor& to) {
  at::Tensor target = to;
  if (target.sizes() != from.sizes()) {
    target.resize_(from.sizes());
  }
  return copy(target, from, false);
}

at::Tensor empty_strided(at::IntArrayRef size, at::IntArrayRef stride, std::optional<at::ScalarType> type,
                         std::optional<at::Layout>, std::optional<Device> device, std::optional<bool>) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, &device_allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           c10::dtype_or_default(type));
}

at::Tensor empty(at::IntArrayRef size, std::optional<at::ScalarType> type, std::optional<at::Layout>,
                 std::optional<Device> device, std::optional<bool>, std::optional<at::MemoryFormat> format) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, &device_allocator, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                   c10::dtype_or_default(type), format);
}

// An operation that only GPUs have: an LSTM's cell behind its two matrix products.
std::tuple<at::Tensor, at::Tensor, at::Tensor> lstm_cell(const at::Tensor& of_input, const at::Tensor& of_hidden, const at::Tensor& cell,
                                                         const std::optional<at::Tensor>& input_bias,
                                                         const std::optional<at::Tensor>& hidden_bias) {
  at::Tensor gates = of_input + of_hidden;
  for (const auto& bias : {input_bias, hidden_bias}) {
    if (bias.has_value() && bias->defined()) {
      gates = gates + *bias;
    }
  }
  auto chunks = gates.unsafe_chunk(4, 1);
  at::Tensor next = chunks[1].sigmoid() * cell + chunks[0].sigmoid() * chunks[2].tanh();
  return {chunks[3].sigmoid() * next.tanh(), next, gates};
}

TORCH_LIBRARY_IMPL(_, CUDA, library) {
  library.fallback(torch::CppFunction::makeFromBoxedFunction<&compute>());
}

TORCH_LIBRARY_IMPL(aten, CUDA, library) {
  library.impl("empty.memory_format", TORCH_FN(empty));
  library.impl("empty_strided", TORCH_FN(empty_strided));
  library.impl("copy_", TORCH_FN(copy));
  library.impl("_copy_from_and_resize", TORCH_FN(copy_and_resize));
  library.impl("_thnn_fused_lstm_cell", TORCH_FN(lstm_cell));
  library.impl("as_strided", TORCH_FN(at::native::as_strided_tensorimpl));
  library.impl("view", TORCH_FN(at::native::view));
  library.impl("_reshape_alias", TORCH_FN(at::native::_reshape_alias));
  library.impl("set_.source_Storage_storage_offset", TORCH_FN(at::native::set_storage_cpu_));
  library.impl("resize_", TORCH_FN(at::native::resize_));
}

void report() {
  const char* path = std::getenv("SIMULATED_GPU_REPORT");
  std::FILE* file = path == nullptr ? nullptr : std::fopen(path, "w");
  if (file == nullptr) {
    return;
  }
  std::fprintf(file, "[");
  for (int index = 0; index < settings().devices; index++) {
    Counts counts = at_device(static_cast<DeviceIndex>(index)).meter.read();
    std::fprintf(file,
                 "%s{\"operations\": %lu, \"pinned_in\": %lu, \"pinned_out\": %lu, \"pageable_in\": %lu, \"pageable_out\": %lu, "
                 "\"copying_in_ns\": %lu, \"overlap_ns\": %lu}",
                 index == 0 ? "" : ", ", counts.operations, counts.pinned_in, counts.pinned_out, counts.pageable_in,
                 counts.pageable_out, counts.copying_in_ns, counts.overlap_ns);
  }
  std::fprintf(file, "]\n");
  std::fclose(file);
}

struct Begin {
  Begin() {
    c10::SetAllocator(c10::kCUDA, &device_allocator);
    at::setHostAllocator(c10::kCUDA, &pinned_allocator);
    std::atexit(report);
  }
} begin;

}  // namespace

namespace at {
REGISTER_CUDA_HOOKS(CUDAHooks)
}
