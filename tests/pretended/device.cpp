// Two CUDA devices that are not there, for PyTorch's CPU build: see __init__.py.
//
// Their memory is the host's and their kernels are the CPU's, by PyTorch's fallback. What differs between a GPU and a
// CPU for whoever calls PyTorch is kept: which tensors may be used together, whose generator draws, on which device and
// stream things happen, what the host has to wait for, and what PyTorch's allocator counts.

#include <ATen/ATen.h>
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <ATen/native/CPUFallback.h>
#include <ATen/native/ConvUtils.h>
#include <ATen/native/transformers/attention.h>
#include <ATen/native/transformers/sdp_utils_cpp.h>
#include <c10/core/Allocator.h>
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <cstdlib>
#include <cstring>
#include <map>
#include <mutex>
#include <set>

namespace {

using at::Generator;
using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DeviceType;
using c10::Stream;
using Sizes = at::IntArrayRef;
using Memory = std::optional<at::MemoryFormat>;
template <typename T>
using Maybe = std::optional<T>;

constexpr int kDevices = 2, kStreams = 64, kLanes = kDevices * (kStreams + 1);
constexpr size_t kRounding = 512;  // PyTorch's allocator's

thread_local int device_now = 0;
thread_local int64_t stream_now[kDevices] = {};
bool idle = false;  // nothing is computed, for sizes at which that would take hours: see `idle` in Python
thread_local bool inside = false;  // in a kernel, whose own copies are no copies of the device's

std::recursive_mutex lock;  // of all that follows
using Lock = std::lock_guard<std::recursive_mutex>;
int streams_made = 0;

struct Inside {
  bool before = inside;
  Inside() { inside = true; }
  ~Inside() { inside = before; }
};

// --- what the host waits for ----------------------------------------------------------------------------------------

int64_t waits = 0;

// --- the order of streams: vector clocks ----------------------------------------------------------------------------
//
// A lane is a stream of a device. Its clock has how much of each lane is known to be over before its next task; the
// host has one too, which every task that it launches starts from.

using Clock = std::array<int64_t, kLanes>;
Clock clocks[kLanes] = {}, host = {};

int lane_of(int device, int64_t stream) { return device * (kStreams + 1) + static_cast<int>(stream); }
int lane_of(const Stream& stream) { return lane_of(stream.device_index(), stream.id()); }
int lane_of(int device) { return lane_of(device, stream_now[device]); }

void join(Clock& into, const Clock& from) {
  for (int i = 0; i < kLanes; ++i) into[i] = std::max(into[i], from[i]);
}

int launch(int device) {
  int lane = lane_of(device);
  join(clocks[lane], host);
  ++clocks[lane][lane];
  return lane;
}

Clock recorded(int lane) {
  Clock now = clocks[lane];
  join(now, host);
  return now;
}

void host_waits(const Clock& until) {
  if (inside) return;
  ++waits;
  join(host, until);
}

// --- memory, and who uses it beside whom ----------------------------------------------------------------------------

struct Access {
  size_t begin, end;
  int lane;
  int64_t time;
  bool writes;
  std::string op;

  std::string told() const { return (writes ? "write by " : "read by ") + op + " on lane " + std::to_string(lane); }
};

struct Block {
  size_t size;
  int device = -1, lane = -1;  // where it was taken; -1: page-locked memory of the host
  std::set<int> also;          // lanes that record_stream named
  std::vector<Access> accesses;
};

std::map<const char*, Block> blocks;
int64_t bytes_now[kDevices] = {}, bytes_peak[kDevices] = {};
std::vector<std::string> races;

Block* block_at(const char* address, const char** begin) {
  auto next = blocks.upper_bound(address);
  if (next == blocks.begin()) return nullptr;
  auto found = std::prev(next);
  *begin = found->first;
  return address < found->first + found->second.size ? &found->second : nullptr;
}

void note(Block& block, Access now) {
  std::vector<Access> kept;
  for (auto& a : block.accesses) {
    bool apart = a.end <= now.begin || now.end <= a.begin, over = clocks[now.lane][a.lane] >= a.time;
    if (!apart && a.lane != now.lane && !over && (a.writes || now.writes))
      races.push_back(now.told() + " beside " + a.told());
    bool covered = now.begin <= a.begin && a.end <= now.end;
    if (!(covered && (now.writes || (a.lane == now.lane && !a.writes)))) kept.push_back(std::move(a));
  }
  kept.push_back(std::move(now));
  block.accesses = std::move(kept);
}

void uses(const Tensor& t, int lane, bool writes, const std::string& op) {
  if (inside || !t.defined() || t.numel() == 0 || !t.has_storage() || t.storage().data() == nullptr) return;
  size_t first = t.storage_offset(), last = first;
  for (int64_t d = 0; d < t.dim(); ++d) last += (t.size(d) - 1) * t.stride(d);
  auto base = static_cast<const char*>(t.storage().data());
  const char *begin = nullptr, *at = base + first * t.element_size();
  Lock guard(lock);
  if (Block* block = block_at(at, &begin)) {
    size_t size = (last - first + 1) * t.element_size(), offset = at - begin;
    note(*block, {offset, offset + size, lane, clocks[lane][lane], writes, op});
  }
}

// The allocator hands memory to whoever asks next on the stream that it was taken on.
void check_freed(const Block& block) {
  Clock now = recorded(block.lane);
  for (auto& a : block.accesses)
    if (a.lane != block.lane && !block.also.count(a.lane) && now[a.lane] < a.time)
      races.push_back("freed on lane " + std::to_string(block.lane) + " beside " + a.told());
}

void release(void* at) {
  if (at == nullptr) return;
  Lock guard(lock);
  auto found = blocks.find(static_cast<const char*>(at));
  if (found->second.device >= 0) {
    check_freed(found->second);
    bytes_now[found->second.device] -= static_cast<int64_t>(found->second.size);
  }
  blocks.erase(found);
  std::free(at);
}

void* take(size_t size, int device) {
  if (size == 0) return nullptr;
  size = (size + kRounding - 1) / kRounding * kRounding;
  void* at = nullptr;
  TORCH_CHECK(posix_memalign(&at, kRounding, size) == 0, "out of memory");
  if (!idle) std::memset(at, 0xff, size);  // NaN: nobody wrote to it. Pages that nobody touches take no memory.
  Lock guard(lock);
  blocks[static_cast<const char*>(at)] = {size, device, device < 0 ? -1 : lane_of(device), {}, {}};
  if (device >= 0) {
    bytes_now[device] += static_cast<int64_t>(size);
    bytes_peak[device] = std::max(bytes_peak[device], bytes_now[device]);
  }
  return at;
}

template <bool OnDevice>
struct Allocator final : c10::Allocator {
  c10::DataPtr allocate(size_t size) override {
    void* at = take(size, OnDevice ? device_now : -1);
    return {at, at, &release, OnDevice ? Device(DeviceType::CUDA, device_now) : Device(DeviceType::CPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t n) const override { std::memcpy(to, from, n); }
};
Allocator<true> on_device;
Allocator<false> page_locked;

// torch.cuda.cudart().cudaHostRegister: memory of whoever asks, which stays theirs.
void lock_pages(const char* at, size_t size) {
  Lock guard(lock);
  blocks[at] = {size, -1, -1, {}, {}};
}
void unlock_pages(const char* at) {
  Lock guard(lock);
  blocks.erase(at);
}

bool is_page_locked(const void* p) {
  const char* begin = nullptr;
  Lock guard(lock);
  Block* block = block_at(static_cast<const char*>(p), &begin);
  return block != nullptr && block->device < 0;
}

void also_used_by(const void* p, const Stream& stream) {
  Lock guard(lock);
  auto found = blocks.find(static_cast<const char*>(p));
  if (found != blocks.end()) found->second.also.insert(lane_of(stream));
}

// --- devices, streams and events ------------------------------------------------------------------------------------

int64_t new_stream() {
  Lock guard(lock);
  return 1 + streams_made++ % kStreams;
}

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static int index(Device d) { return d.index() >= 0 ? d.index() : device_now; }

  DeviceType type() const override { return DeviceType::CUDA; }
  DeviceIndex deviceCount() const noexcept override { return kDevices; }
  Device getDevice() const override { return Device(DeviceType::CUDA, device_now); }
  void uncheckedSetDevice(Device d) const noexcept override { device_now = index(d); }
  void setDevice(Device d) const override {
    TORCH_CHECK(d.index() < kDevices, "CUDA error: invalid device ordinal");
    device_now = index(d);
  }
  Device exchangeDevice(Device d) const override {
    Device before = getDevice();
    setDevice(d);
    return before;
  }

  Stream stream(Device d, int64_t id) const { return Stream(Stream::UNSAFE, Device(DeviceType::CUDA, index(d)), id); }
  Stream getStream(Device d) const override { return stream(d, stream_now[index(d)]); }
  Stream getDefaultStream(Device d) const override { return stream(d, 0); }
  Stream getNewStream(Device d, int) const override { return stream(d, new_stream()); }
  Stream getStreamFromGlobalPool(Device d, bool) const override { return stream(d, new_stream()); }
  void* getStreamNativeHandle(const Stream s) const override { return reinterpret_cast<void*>(s.id()); }
  Stream exchangeStream(Stream s) const override {
    Stream before = getStream(s.device());
    stream_now[s.device_index()] = s.id();
    return before;
  }
  bool queryStream(const Stream&) const override { return true; }
  void synchronizeStream(const Stream& s) const override {
    Lock guard(lock);
    host_waits(clocks[lane_of(s)]);
  }
  void synchronizeDevice(const DeviceIndex) const override {
    Lock guard(lock);
    Clock all = host;
    for (auto& clock : clocks) join(all, clock);
    host_waits(all);
  }

  void record(void** event, const Stream& s, const DeviceIndex, const c10::EventFlag) const override {
    Lock guard(lock);
    if (*event == nullptr) *event = new Clock{};
    *static_cast<Clock*>(*event) = recorded(lane_of(s));
  }
  void block(void* event, const Stream& s) const override {
    Lock guard(lock);
    if (event != nullptr) join(clocks[lane_of(s)], *static_cast<Clock*>(event));
  }
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void* event) const override {
    Lock guard(lock);
    if (event != nullptr) host_waits(*static_cast<Clock*>(event));
  }
  void destroyEvent(void* event, const DeviceIndex) const noexcept override { delete static_cast<Clock*>(event); }
  double elapsedTime(void*, void*, const DeviceIndex) const override { return 1.0; }
  void recordDataPtrOnStream(const c10::DataPtr& p, const Stream& s) const override { also_used_by(p.get(), s); }
};
C10_REGISTER_GUARD_IMPL(CUDA, Guard);

// --- random numbers -------------------------------------------------------------------------------------------------

// The CPU's generator under another name.
struct DeviceGenerator final : c10::GeneratorImpl {
  Generator inner = at::detail::createCPUGenerator();
  uint64_t offset = 0;

  explicit DeviceGenerator(int device)
      : GeneratorImpl(Device(DeviceType::CUDA, static_cast<DeviceIndex>(device)),
                      c10::DispatchKeySet(c10::DispatchKey::CUDA)) {}
  void set_current_seed(uint64_t seed) override { inner.set_current_seed(seed); }
  void set_offset(uint64_t o) override { offset = o; }
  uint64_t get_offset() const override { return offset; }
  uint64_t current_seed() const override { return inner.current_seed(); }
  uint64_t seed() override { return inner.seed(); }
  void set_state(const c10::TensorImpl& state) override { inner.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return inner.unsafeGetGeneratorImpl()->get_state(); }
  DeviceGenerator* clone_impl() const override {
    auto copy = new DeviceGenerator(device_.index());
    copy->inner = inner.clone();
    return copy;
  }
};

std::vector<Generator>& default_generators() {
  static auto* all =
      new std::vector<Generator>{at::make_generator<DeviceGenerator>(0), at::make_generator<DeviceGenerator>(1)};
  return *all;
}
size_t default_generators_shown = 0;  // to Python, which makes its own for torch.cuda.default_generators first

Generator& inner(const Generator& g) { return static_cast<DeviceGenerator*>(g.unsafeGetGeneratorImpl())->inner; }

struct Hooks : at::CUDAHooksInterface {
  explicit Hooks(at::CUDAHooksArgs = {}) {}
  void init() const override {}
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  int getNumGPUs() const override { return kDevices; }
  DeviceIndex deviceCount() const override { return kDevices; }
  DeviceIndex current_device() const override { return static_cast<DeviceIndex>(device_now); }
  DeviceIndex getCurrentDevice() const override { return static_cast<DeviceIndex>(device_now); }
  void setCurrentDevice(DeviceIndex d) const override { device_now = d; }
  DeviceIndex exchangeDevice(DeviceIndex d) const override {
    return static_cast<DeviceIndex>(std::exchange(device_now, d));
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex d) const override { return exchangeDevice(d); }
  c10::Allocator* getPinnedMemoryAllocator() const override { return &page_locked; }
  c10::Allocator* getCUDADeviceAllocator() const override { return &on_device; }
  bool isPinnedPtr(const void* p) const override { return is_page_locked(p); }
  Device getDeviceFromPtr(void*) const override {
    return Device(DeviceType::CUDA, static_cast<DeviceIndex>(device_now));
  }
  void deviceSynchronize(DeviceIndex d) const override { Guard().synchronizeDevice(d); }
  const Generator& getDefaultGenerator(DeviceIndex d) const override {
    return default_generators()[d < 0 ? device_now : d];
  }
  Generator getNewGenerator(DeviceIndex d) const override {
    if (default_generators_shown < kDevices) return default_generators()[default_generators_shown++];
    return at::make_generator<DeviceGenerator>(d < 0 ? device_now : d);
  }
  std::string showConfig() const override { return "pretended"; }
  long versionCUDART() const override { return 13000; }
};

// --- what PyTorch's own fallback does not do ------------------------------------------------------------------------

// The same memory, as a tensor of the CPU.
Tensor on_host(const Tensor& t) {
  if (!t.is_cuda()) return t;
  auto storage = t.storage();
  auto options = t.options().device(at::kCPU).requires_grad(false);
  auto length = static_cast<int64_t>(storage.nbytes() / t.element_size());
  auto all = at::from_blob(storage.mutable_data(), {length}, [storage](void*) {}, options);
  auto same = all.as_strided(t.sizes(), t.strides(), t.storage_offset());
  return t.is_conj() ? same.conj() : same;
}

at::ScalarType given_dtype(Maybe<at::ScalarType> dtype) {
  return dtype.value_or(at::get_default_dtype_as_scalartype());
}

Tensor empty(Sizes size, Maybe<at::ScalarType> dtype, Maybe<at::Layout>, Maybe<Device> device, Maybe<bool>,
             Memory format) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_generic(size, &on_device, c10::DispatchKeySet(c10::DispatchKey::CUDA), given_dtype(dtype),
                                   format);
}

Tensor empty_strided(Sizes size, Sizes stride, Maybe<at::ScalarType> dtype, Maybe<at::Layout>, Maybe<Device> device,
                     Maybe<bool>) {
  c10::OptionalDeviceGuard guard(device);
  return at::detail::empty_strided_generic(size, stride, &on_device, c10::DispatchKeySet(c10::DispatchKey::CUDA),
                                           given_dtype(dtype));
}

// Between devices it is the source's stream that copies, and both wait for each other; between host and device the host
// waits, unless asked not to, and unless memory that is not page-locked is written to.
void order_copy(const Tensor& to, const Tensor& from, bool non_blocking) {
  if (inside) return;
  Lock guard(lock);
  bool down = to.is_cpu(), up = from.is_cpu();
  int lane = launch(down || !up ? from.get_device() : to.get_device());
  if (!down && !up) join(clocks[lane], clocks[lane_of(to.get_device())]);
  uses(from, lane, false, "copy_");
  uses(to, lane, true, "copy_");
  if (!down && !up) join(clocks[lane_of(to.get_device())], clocks[lane]);
  if ((down || up) && !(non_blocking && (up || is_page_locked(to.data_ptr())))) host_waits(clocks[lane]);
}

Tensor& copy_(Tensor& self, const Tensor& from, bool non_blocking) {
  if (self.is_same(from) || from.is_meta()) return self;
  order_copy(self, from, non_blocking);
  if (!idle) on_host(self).copy_(on_host(from));
  return self;
}

at::Scalar local_scalar_dense(const Tensor& self) {
  Lock guard(lock);
  int lane = launch(self.get_device());
  uses(self, lane, false, "item");
  host_waits(clocks[lane]);
  return at::_local_scalar_dense(on_host(self));
}

const Tensor& resize_(const Tensor& self, Sizes size, Memory) {
  auto storage = self.storage();
  size_t needed = (c10::multiply_integers(size) + self.storage_offset()) * self.element_size();
  if (needed > storage.nbytes()) {
    c10::DeviceGuard guard(self.device());
    auto grown = on_device.allocate(needed);
    if (storage.nbytes() > 0) std::memcpy(grown.get(), storage.data(), storage.nbytes());
    storage.set_data_ptr_noswap(std::move(grown));
    storage.set_nbytes(needed);
  }
  self.unsafeGetTensorImpl()->set_sizes_contiguous(size);
  return self;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  if (to.sizes() != from.sizes()) resize_(to, from.sizes(), std::nullopt);
  on_host(to).copy_(on_host(from));
  return to;
}

Tensor& set_storage(Tensor& self, at::Storage source, int64_t offset, Sizes size, Sizes stride) {
  auto impl = self.unsafeGetTensorImpl();
  impl->set_storage_keep_dtype(std::move(source));
  impl->set_storage_offset(offset);
  if (stride.empty())
    impl->set_sizes_contiguous(size);
  else
    impl->set_sizes_and_strides(size, stride);
  return self;
}
Tensor& set_whole(Tensor& self, at::Storage source) {
  auto length = static_cast<int64_t>(source.nbytes() / self.element_size());
  return set_storage(self, std::move(source), 0, {length}, {});
}
Tensor& set_tensor(Tensor& self, const Tensor& t) {
  return set_storage(self, t.storage(), t.storage_offset(), t.sizes(), t.strides());
}
Tensor& set_nothing(Tensor& self) { return set_storage(self, at::empty({0}, self.options()).storage(), 0, {0}, {}); }

void record_stream(Tensor& t, Stream stream) { also_used_by(t.storage().data(), stream); }

// A convolution of each channel by itself has a kernel of its own on CUDA alone.
Tensor depthwise(const Tensor& x, const Tensor& w, Sizes, const Maybe<Tensor>& bias, Sizes stride, Sizes padding,
                 Sizes dilation) {
  Maybe<Tensor> b;
  if (bias && bias->defined()) b = on_host(*bias);
  return at::convolution(on_host(x), on_host(w), b, stride, padding, dilation, false, {0, 0}, x.size(1)).to(x.device());
}
std::tuple<Tensor, Tensor> depthwise_backward(const Tensor& g, const Tensor& x, const Tensor& w, Sizes, Sizes stride,
                                              Sizes padding, Sizes dilation, std::array<bool, 2> mask) {
  auto [dx, dw, none] = at::convolution_backward(on_host(g), on_host(x), on_host(w), std::nullopt, stride, padding,
                                                 dilation, false, {0, 0}, x.size(1), {mask[0], mask[1], false});
  return {dx.defined() ? dx.to(x.device()) : dx, dw.defined() ? dw.to(x.device()) : dw};
}

// What PyTorch's attention runs on: products and a softmax; or its flash kernel, of which idle devices need no more
// than sizes.
int64_t chosen_attention(const Tensor&, const Tensor&, const Tensor&, const Maybe<Tensor>&, double, bool, Maybe<double>,
                         bool) {
  return static_cast<int64_t>(idle ? sdp::SDPBackend::flash_attention : sdp::SDPBackend::math);
}

// --- every other op: the CPU's --------------------------------------------------------------------------------------

// Sizes of what they give depend on values, or what they give is no tensor.
const std::set<std::string> kWaiting = {"aten::nonzero",       "aten::equal",
                                        "aten::masked_select", "aten::_unique2",
                                        "aten::unique_dim",    "aten::unique_consecutive",
                                        "aten::is_nonzero",    "aten::repeat_interleave"};
// Their indices may be on the host.
const std::set<std::string> kIndexing = {"aten::index", "aten::index_put", "aten::index_put_",
                                         "aten::_index_put_impl_"};
// They draw, and are not told by which generator.
const std::set<std::string> kDrawing = {"aten::native_dropout", "aten::rrelu_with_noise"};

template <typename F>
void each_tensor(const c10::IValue& value, F&& f) {
  if (value.isTensor()) {
    if (value.toTensor().defined()) f(value.toTensor());
  } else if (value.isTensorList()) {
    for (const Tensor& t : value.toTensorVector())
      if (t.defined()) f(t);
  } else if (value.isOptionalTensorList()) {
    for (const auto& t : value.toOptionalTensorVector())
      if (t && t->defined()) f(*t);
  }
}

// The device of the tensors. A number (0-dim tensor) of the host may stand beside those of any.
int common_device(const std::string& op, const c10::FunctionSchema& schema, c10::ArrayRef<c10::IValue> args) {
  Maybe<Device> found;
  bool host_too = false;
  for (const auto& arg : args) {
    if (arg.isOptionalTensorList() && kIndexing.count(schema.name())) continue;
    each_tensor(arg, [&](const Tensor& t) {
      if (t.is_cpu()) {
        host_too = host_too || t.dim() > 0;
      } else {
        TORCH_CHECK(!found || *found == t.device(),
                    "Expected all tensors to be on the same device, but found at least two devices, ", *found, " and ",
                    t.device(), "! (", op, ")");
        found = t.device();
      }
    });
  }
  TORCH_CHECK(!(found && host_too), "Expected all tensors to be on the same device, but found at least two devices, ",
              *found, " and cpu! (", op, ")");
  return found ? found->index() : device_now;
}

// The device's generator in the place of the one that was given, or of none. Whether there is such an argument.
bool choose_generator(const c10::FunctionSchema& schema, torch::jit::Stack* stack, int device) {
  auto n = schema.arguments().size();
  for (size_t i = 0; i < n; ++i) {
    if (schema.arguments()[i].type()->str().find("Generator") == std::string::npos) continue;
    auto& arg = stack->at(stack->size() - n + i);
    if (!arg.isNone()) {
      auto kind = arg.toGenerator().device().type();
      TORCH_CHECK(kind == DeviceType::CUDA, "Expected a 'cuda' device type for generator but found '", kind, "'");
    }
    arg = inner(arg.isNone() ? default_generators()[device] : arg.toGenerator());
    return true;
  }
  return false;
}

void as_on_the_cpu(const c10::OperatorHandle& op, torch::jit::Stack* stack, int device) {
  bool chosen = choose_generator(op.schema(), stack, device);
  Inside now;
  if (chosen || !kDrawing.count(op.schema().name())) return at::native::cpu_fallback(op, stack);
  auto cpu = at::detail::getDefaultCPUGenerator();
  auto& drawing = inner(default_generators()[device]);
  auto before = cpu.get_state();
  cpu.set_state(drawing.get_state());
  at::native::cpu_fallback(op, stack);
  drawing.set_state(cpu.get_state());
  cpu.set_state(before);
}

Tensor as_meta(const Tensor& t) {
  return t.defined() ? at::empty_strided(t.sizes(), t.strides(), t.options().device(at::kMeta).requires_grad(false))
                     : t;
}

c10::IValue as_meta(const c10::IValue& value) {
  if (value.isTensor()) return as_meta(value.toTensor());
  if (value.isDevice()) return Device(DeviceType::Meta);
  if (value.isGenerator()) return {};
  if (value.isTensorList()) {
    c10::List<Tensor> all;
    for (const Tensor& t : value.toTensorVector()) all.push_back(as_meta(t));
    return all;
  }
  if (value.isOptionalTensorList()) {
    c10::List<Maybe<Tensor>> all;
    for (const auto& t : value.toOptionalTensorVector()) all.push_back(t ? Maybe<Tensor>(as_meta(*t)) : t);
    return all;
  }
  return value;
}

Tensor of_size(const Tensor& meta) {
  return meta.defined() ? at::empty_strided(meta.sizes(), meta.strides(), meta.options().device(at::kCUDA)) : meta;
}

// Memory for what an op gives, of the sizes that it says, and nothing in it.
void sizes_alone(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  auto n = schema.arguments().size(), results = schema.returns().size();
  std::vector<c10::IValue> given(stack->end() - static_cast<int64_t>(n), stack->end());
  for (size_t i = stack->size() - n; i < stack->size(); ++i) stack->at(i) = as_meta(stack->at(i));
  op.callBoxed(stack);
  for (size_t i = 0; i < results; ++i) {
    auto& result = stack->at(stack->size() - results + i);
    auto alias = schema.returns()[i].alias_info();
    if (alias == nullptr) {
      if (result.isTensor()) {
        result = of_size(result.toTensor());
      } else if (result.isTensorList()) {
        c10::List<Tensor> all;
        for (const Tensor& t : result.toTensorVector()) all.push_back(of_size(t));
        result = all;
      }
      continue;
    }
    for (size_t k = 0; k < n; ++k) {
      auto same = schema.arguments()[k].alias_info();
      if (same == nullptr || same->beforeSets() != alias->beforeSets()) continue;
      if (given[k].isTensor() && given[k].toTensor().sizes() != result.toTensor().sizes())
        resize_(given[k].toTensor(), result.toTensor().sizes(), std::nullopt);
      result = given[k];
      break;
    }
  }
}

void fallback(const c10::OperatorHandle& op, torch::jit::Stack* stack) {
  const auto& schema = op.schema();
  auto args = torch::jit::last(*stack, schema.arguments().size());
  int device = common_device(schema.name(), schema, args), lane = 0;
  c10::DeviceGuard guard(Device(DeviceType::CUDA, static_cast<DeviceIndex>(device)));
  {
    Lock guard(lock);
    lane = launch(device);
    for (size_t i = 0; i < args.size(); ++i) {
      auto alias = schema.arguments()[i].alias_info();
      each_tensor(args[i], [&](const Tensor& t) {
        if (t.is_cuda()) uses(t, lane, alias && alias->isWrite(), schema.name());
      });
    }
  }
  if (idle)
    sizes_alone(op, stack);
  else
    as_on_the_cpu(op, stack, device);
  Lock after(lock);
  for (const auto& result : torch::jit::last(*stack, schema.returns().size()))
    each_tensor(result, [&](const Tensor& t) {
      if (t.is_cuda()) uses(t, lane, true, schema.name());
    });
  if (kWaiting.count(schema.name())) host_waits(clocks[lane]);
}

TORCH_LIBRARY_IMPL(_, CUDA, m) { m.fallback(torch::CppFunction::makeFromBoxedFunction<&fallback>()); }

TORCH_LIBRARY_IMPL(aten, CUDA, m) {
  m.impl("empty.memory_format", &empty);
  m.impl("empty_strided", &empty_strided);
  m.impl("copy_", &copy_);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_local_scalar_dense", &local_scalar_dense);
  m.impl("resize_", &resize_);
  m.impl("set_", &set_nothing);
  m.impl("set_.source_Tensor", &set_tensor);
  m.impl("set_.source_Storage", &set_whole);
  m.impl("set_.source_Storage_storage_offset", &set_storage);
  m.impl("record_stream", &record_stream);
  m.impl("_conv_depthwise2d", &depthwise);
  m.impl("as_strided", [](const Tensor& t, Sizes size, Sizes stride, Maybe<int64_t> offset) {
    return at::native::as_strided_tensorimpl(t, size, stride, offset);
  });
  m.impl("view", [](const Tensor& t, Sizes size) { return at::native::view(t, size); });
  m.impl("_reshape_alias",
         [](const Tensor& t, Sizes size, Sizes stride) { return at::native::_reshape_alias(t, size, stride); });
  m.impl("unfold", [](const Tensor& t, int64_t dim, int64_t size, int64_t step) {
    return at::native::unfold(t, dim, size, step);
  });
  m.impl("view_as_real", [](const Tensor& t) { return at::native::view_as_real(t); });
  m.impl("view_as_complex", [](const Tensor& t) { return at::native::view_as_complex(t); });
}

}  // namespace

namespace c10 {
REGISTER_ALLOCATOR(DeviceType::CUDA, &on_device);
}
namespace at {
C10_REGISTER_CLASS(CUDAHooksRegistry, CUDAHooks, Hooks)
}
namespace at::native {
REGISTER_CUDA_DISPATCH(_fused_sdp_choice_stub, &::chosen_attention)
REGISTER_CUDA_DISPATCH(conv_depthwise2d_backward_stub, &::depthwise_backward)
}  // namespace at::native

// --- for Python -----------------------------------------------------------------------------------------------------

extern "C" {
int pretended_devices() { return kDevices; }
int pretended_device() { return device_now; }
int pretended_set_device(int device) { return std::exchange(device_now, device < 0 ? device_now : device); }
int64_t pretended_stream(int device) { return stream_now[device]; }
void pretended_set_stream(int device, int64_t stream) { stream_now[device] = stream; }
int64_t pretended_new_stream() { return new_stream(); }
int64_t pretended_bytes(int device) { return bytes_now[device]; }
int64_t pretended_peak(int device) { return bytes_peak[device]; }
void pretended_reset_peak(int device) { bytes_peak[device] = bytes_now[device]; }
void pretended_lock_pages(const char* at, size_t size) { lock_pages(at, size); }
void pretended_unlock_pages(const char* at) { unlock_pages(at); }
int64_t pretended_waits() { return waits; }
int64_t pretended_races() { return static_cast<int64_t>(races.size()); }
const char* pretended_race(int64_t i) { return races[i].c_str(); }
void pretended_forget_races() { races.clear(); }
void pretended_set_idle(int on) { idle = on != 0; }
void pretended_synchronize() { Guard().synchronizeDevice(0); }
void pretended_synchronize_stream(int device, int64_t stream) {
  Guard().synchronizeStream(Guard().stream(Device(DeviceType::CUDA, device), stream));
}
void* pretended_new_event() { return new Clock{}; }
void pretended_drop_event(void* event) { delete static_cast<Clock*>(event); }
void pretended_record(void* event, int device, int64_t stream) {
  Lock guard(lock);
  *static_cast<Clock*>(event) = recorded(lane_of(device, stream));
}
void pretended_wait(void* event, int device, int64_t stream) {
  Lock guard(lock);
  join(clocks[lane_of(device, stream)], *static_cast<Clock*>(event));
}
void pretended_synchronize_event(void* event) { Guard().synchronizeEvent(event); }
}
