// A device that is the CPU under another name: it shows on any machine what would fail on an accelerator.
//
// A tensor of it is memory of the CPU with the other device's label. Each operation is run by the CPU's kernel on tensors of the
// CPU that share that memory (so views, writes and out= are as on the CPU), after two questions that CUDA's kernels ask too: are all
// tensors on the device, and is the generator the device's own?

#include <ATen/CPUGeneratorImpl.h>
#include <ATen/EmptyTensor.h>
#include <ATen/core/Tensor.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/native/TensorFactories.h>
#include <c10/core/CachingDeviceAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <torch/library.h>

#include <mutex>
#include <unordered_set>

namespace {

using at::Tensor;
using torch::jit::Stack;

constexpr auto kType = c10::DeviceType::PrivateUse1;
const c10::Device kDevice(kType, 0);

// ---- memory ----

// What the device's memory holds on to: the storage of the CPU that it is.
struct Held {
  c10::Storage cpu;
  size_t bytes;
};

using Stats = c10::CachingDeviceAllocator::DeviceStats;
std::mutex counting;
Stats counted;
auto& in_use = counted.allocated_bytes[0];

void let_go(void* context) {
  std::unique_ptr<Held> held(static_cast<Held*>(context));
  std::lock_guard<std::mutex> lock(counting);
  in_use.decrease(held->bytes);
}

c10::DataPtr labelled(const c10::Storage& cpu) {
  std::lock_guard<std::mutex> lock(counting);
  in_use.increase(cpu.nbytes());
  return {cpu.mutable_data(), new Held{cpu, cpu.nbytes()}, &let_go, kDevice};
}

c10::Storage storage_of(size_t bytes, c10::DataPtr data, c10::Allocator* allocator) {
  return c10::Storage(c10::Storage::use_byte_size_t(), bytes, std::move(data), allocator, true);
}

c10::Storage new_on_cpu(size_t bytes) {
  auto* allocator = c10::GetAllocator(c10::DeviceType::CPU);
  return storage_of(bytes, allocator->allocate(bytes), allocator);
}

struct Memory final : c10::DeviceAllocator {
  c10::DataPtr allocate(size_t bytes) override { return labelled(new_on_cpu(bytes)); }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
  bool initialized() override { return true; }
  void emptyCache(c10::MempoolId_t) override {}
  void recordStream(const c10::DataPtr&, c10::Stream) override {}
  Stats getDeviceStats(c10::DeviceIndex) override {
    std::lock_guard<std::mutex> lock(counting);
    return counted;
  }
  void resetAccumulatedStats(c10::DeviceIndex) override {}
  void resetPeakStats(c10::DeviceIndex) override {
    std::lock_guard<std::mutex> lock(counting);
    in_use.reset_peak();
  }
  std::pair<size_t, size_t> getMemoryInfo(c10::DeviceIndex) override {
    const size_t all = size_t(1) << 34;
    return {all - in_use.current, all};
  }
};

Memory memory;

c10::Storage of_cpu(const c10::Storage& storage) {
  auto* held = static_cast<Held*>(storage.data_ptr().get_context());
  return held ? held->cpu : new_on_cpu(0);
}

Tensor like(Tensor made, const Tensor& other) {
  made.unsafeGetTensorImpl()->set_sizes_and_strides(other.sizes(), other.strides(), other.storage_offset());
  made._set_conj(other.is_conj());
  made._set_neg(other.is_neg());
  return made;
}

Tensor tensor_on(const c10::Storage& storage, c10::DispatchKey key, const Tensor& other) {
  return like(at::detail::make_tensor<c10::TensorImpl>(c10::Storage(storage), c10::DispatchKeySet(key), other.dtype()), other);
}

// ---- random numbers ----

struct Random final : c10::GeneratorImpl {
  explicit Random(at::Generator inner) : GeneratorImpl(kDevice, c10::DispatchKeySet(c10::DispatchKey::PrivateUse1)), cpu(inner) {}
  void set_current_seed(uint64_t seed) override { cpu.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { cpu.set_offset(offset); }
  uint64_t get_offset() const override { return cpu.get_offset(); }
  uint64_t current_seed() const override { return cpu.current_seed(); }
  uint64_t seed() override { return cpu.seed(); }
  void set_state(const c10::TensorImpl& state) override { cpu.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return cpu.unsafeGetGeneratorImpl()->get_state(); }
  Random* clone_impl() const override { return new Random(cpu.clone()); }
  at::Generator cpu;
};

at::Generator new_generator() { return at::make_generator<Random>(at::detail::createCPUGenerator()); }

const at::Generator& default_generator() {
  static const at::Generator one = new_generator();
  return one;
}

at::Generator of_cpu(const at::Generator& generator) {
  TORCH_CHECK(
      generator.device().type() == kType, "Expected a '", kDevice.type(), "' device type for generator but found '", generator.device().type(), "'");
  return static_cast<Random*>(generator.unsafeGetGeneratorImpl())->cpu;
}

// ---- operations ----

// Whether operations that wait for an accelerator, to read or to send numbers, are errors.
std::atomic<bool> waiting_refused = false;
const std::unordered_set<std::string> waiting = {"_local_scalar_dense", "nonzero", "masked_select", "equal", "_unique2", "unique_dim"};

void wait(const std::string& name) {
  TORCH_CHECK(!waiting_refused, "called an operation that waits for the device: ", name);
}

// The tensors of one call, and what the CPU's kernel sees in their place.
class Crossing {
 public:
  Tensor down(const Tensor& ours) {
    if (!ours.defined() || ours.device().type() != kType)
      return ours;
    for (const auto& [other, cpu] : pairs_)
      if (other.is_same(ours))
        return cpu;
    pairs_.emplace_back(ours, tensor_on(down(ours.storage()), c10::DispatchKey::CPU, ours));
    return pairs_.back().second;
  }

  c10::Storage down(const c10::Storage& ours) {
    for (const auto& [other, cpu] : storages_)
      if (other.unsafeGetStorageImpl() == ours.unsafeGetStorageImpl())
        return cpu;
    storages_.emplace_back(ours, of_cpu(ours));
    return storages_.back().second;
  }

  // A tensor that the kernel gave back: one of the call's own, a view of one, or a new one.
  Tensor up(const Tensor& cpu) {
    if (!cpu.defined() || cpu.device().type() != c10::DeviceType::CPU)
      return cpu;
    for (const auto& [ours, other] : pairs_)
      if (other.is_same(cpu))
        return ours;
    for (const auto& [ours, other] : pairs_)
      if (other.is_alias_of(cpu)) {  // (a view made in inference mode is of its base's kind)
        auto view = at::detail::make_tensor<c10::TensorImpl>(c10::TensorImpl::VIEW, c10::Storage(ours.storage()), ours.key_set(), cpu.dtype());
        return like(view, cpu);
      }
    return tensor_on(up(cpu.storage()), c10::DispatchKey::PrivateUse1, cpu);
  }

  // What the kernel did to the sizes and the memory of tensors that it was given (out=, resize_, set_).
  void settle() {
    for (const auto& [ours, cpu] : storages_)
      if (cpu.nbytes() != ours.nbytes() || cpu.data() != ours.data()) {
        ours.set_data_ptr_noswap(labelled(cpu));
        ours.set_nbytes(cpu.nbytes());
      }
    for (const auto& [ours, cpu] : pairs_) {
      auto* impl = ours.unsafeGetTensorImpl();
      if (down(ours.storage()).unsafeGetStorageImpl() != cpu.storage().unsafeGetStorageImpl())
        impl->set_storage_keep_dtype(up(cpu.storage()));
      if (cpu.sizes() != ours.sizes() || cpu.strides() != ours.strides() || cpu.storage_offset() != ours.storage_offset())
        impl->set_sizes_and_strides(cpu.sizes(), cpu.strides(), cpu.storage_offset());
    }
  }

 private:
  c10::Storage up(const c10::Storage& cpu) {
    for (const auto& [ours, other] : storages_)
      if (other.unsafeGetStorageImpl() == cpu.unsafeGetStorageImpl())
        return ours;
    storages_.emplace_back(storage_of(cpu.nbytes(), labelled(cpu), &memory), cpu);  // (two results may share their memory)
    return storages_.back().first;
  }

  std::vector<std::pair<Tensor, Tensor>> pairs_;
  std::vector<std::pair<c10::Storage, c10::Storage>> storages_;
};

// Where CUDA takes single numbers of the CPU beside its own tensors. (Structured operations ask the same in their meta functions.)
const std::unordered_set<std::string> arithmetic = {
    "add", "sub", "mul", "div", "rsub", "true_divide", "floor_divide", "remainder", "fmod", "pow", "eq", "ne", "lt", "le", "gt", "ge", "maximum",
    "minimum", "fmax", "fmin", "where", "masked_fill", "copysign", "atan2", "hypot", "lerp", "addcmul", "addcdiv", "bitwise_and", "bitwise_or",
    "bitwise_xor", "bitwise_left_shift", "bitwise_right_shift", "__lshift__", "__rshift__", "logical_and", "logical_or", "logical_xor",
    "nextafter", "xlogy", "special_xlog1py", "special_zeta", "heaviside", "ldexp", "logaddexp", "logaddexp2", "gcd", "lcm", "igamma", "igammac"};

// Where it takes index tensors of the CPU.
const std::unordered_set<std::string> indexing = {"index", "index_put", "_index_put_impl", "_unsafe_index", "_unsafe_index_put"};

std::string base_name(const c10::OperatorHandle& op) {
  auto name = op.schema().name();
  name.erase(0, name.find("::") + 2);
  if (name.back() == '_' && name.substr(0, 2) != "__")
    name.pop_back();
  return name;
}

void cross(const c10::OperatorHandle& op, const c10::OperatorHandle& kernel, Stack* stack) {
  const auto name = base_name(op);
  const bool numbers = arithmetic.count(name), indices = indexing.count(name);
  static const auto optional_generator = c10::getTypePtr<std::optional<at::Generator>>();
  bool first = true;
  auto check = [&](const Tensor& tensor, bool listed) {
    if (!tensor.defined())
      return;
    const bool may = indices ? !first && (listed || !tensor.dim()) : numbers && !tensor.dim();
    TORCH_CHECK(
        tensor.device().type() == kType || (may && tensor.is_cpu()),
        "Expected all tensors to be on the same device, but found at least two devices, ", kDevice, " and ", tensor.device(), "! (in ", op.schema().name(), ")");
    first = false;
  };
  Crossing crossing;
  const auto& arguments = op.schema().arguments();
  const auto begin = stack->size() - arguments.size();
  for (size_t i = 0; i < arguments.size(); i++) {
    auto& value = (*stack)[begin + i];
    if (value.isTensor()) {
      check(value.toTensor(), false);
      value = crossing.down(value.toTensor());
    } else if (value.isTensorList()) {
      auto tensors = value.toTensorVector();
      for (auto& tensor : tensors) {
        check(tensor, false);
        tensor = crossing.down(tensor);
      }
      value = c10::List<Tensor>(tensors);
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> tensors;
      for (const auto& tensor : value.toOptionalTensorVector()) {
        if (tensor)
          check(*tensor, true);
        tensors.push_back(tensor ? std::optional<Tensor>(crossing.down(*tensor)) : std::nullopt);
      }
      value = tensors;
    } else if (value.isStorage()) {
      value = crossing.down(value.toStorage());
    } else if (value.isGenerator()) {
      value = of_cpu(value.toGenerator());
    } else if (value.isNone() && *arguments[i].type() == *optional_generator) {
      value = of_cpu(default_generator());
    } else if (value.isDevice()) {
      value = c10::Device(c10::DeviceType::CPU);
    }
  }
  {
    at::AutoDispatchBelowADInplaceOrView below;
    kernel.callBoxed(stack);
  }
  crossing.settle();
  for (size_t i = stack->size() - op.schema().returns().size(); i < stack->size(); i++) {
    auto& value = (*stack)[i];
    if (value.isTensor()) {
      value = crossing.up(value.toTensor());
    } else if (value.isTensorList()) {
      auto tensors = value.toTensorVector();
      for (auto& tensor : tensors)
        tensor = crossing.up(tensor);
      value = c10::List<Tensor>(tensors);
    }
  }
}

c10::OperatorHandle named(const char* name, const char* overload = "") { return c10::Dispatcher::singleton().findSchemaOrThrow(name, overload); }

void any(const c10::OperatorHandle& op, Stack* stack) {
  if (waiting.count(base_name(op)))
    wait(op.schema().name());
  cross(op, op, stack);
}

// Torch asks a device that is not its own for these by other names.
void convolution(const c10::OperatorHandle& op, Stack* stack) {
  cross(op, named("aten::convolution"), stack);
}

void convolution_backward(const c10::OperatorHandle& op, Stack* stack) {
  const auto all = named("aten::convolution_backward");
  const auto place = stack->end() - op.schema().arguments().size();
  const c10::List<int64_t> bias({place->toTensor().size(1)});
  stack->insert(place + 3, bias);
  cross(all, all, stack);
}

Tensor copy_from(const Tensor& from, const Tensor& to, bool without_waiting) {
  if (from.device() != to.device() && !without_waiting)
    wait("aten::copy_");
  Crossing crossing;
  at::AutoDispatchBelowADInplaceOrView below;
  crossing.down(to).copy_(crossing.down(from));
  return to;
}

Tensor copy_from_and_resize(const Tensor& from, const Tensor& to) {
  Crossing crossing;
  at::AutoDispatchBelowADInplaceOrView below;
  crossing.down(to).resize_(from.sizes()).copy_(crossing.down(from));
  crossing.settle();
  return to;
}

// The tangent that forward mode takes for zero: sizes without memory.
Tensor zero_tensor(
    at::IntArrayRef sizes, std::optional<at::ScalarType> dtype, std::optional<at::Layout>, std::optional<at::Device>, std::optional<bool>) {
  static at::native::ZeroTensorAllocator nothing(kDevice);
  const auto keys = c10::DispatchKeySet(c10::DispatchKey::PrivateUse1) | c10::DispatchKeySet(c10::DispatchKey::ZeroTensor);
  return at::detail::empty_generic(sizes, &nothing, keys, at::dtype_or_default(dtype), std::nullopt);
}

// ---- what torch asks of any device ----

// One device, one stream, on which everything is done at once.
struct Guard final : c10::impl::NoOpDeviceGuardImpl<kType> {
  c10::Device getDevice() const override { return kDevice; }
  c10::Device exchangeDevice(c10::Device) const override { return kDevice; }
  void synchronizeDevice(c10::DeviceIndex) const override {}
  c10::Stream getStream(c10::Device) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
  c10::Stream exchangeStream(c10::Stream) const noexcept override { return c10::Stream(c10::Stream::DEFAULT, kDevice); }
};

struct Hooks final : at::PrivateUse1HooksInterface {
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(c10::DeviceIndex) const override { return true; }
  c10::DeviceIndex deviceCount() const override { return 1; }
  c10::DeviceIndex getCurrentDevice() const override { return 0; }
  void setCurrentDevice(c10::DeviceIndex) const override {}
  c10::DeviceIndex exchangeDevice(c10::DeviceIndex) const override { return 0; }
  c10::DeviceIndex maybeExchangeDevice(c10::DeviceIndex) const override { return 0; }
  const at::Generator& getDefaultGenerator(c10::DeviceIndex) const override { return default_generator(); }
  at::Generator getNewGenerator(c10::DeviceIndex) const override { return new_generator(); }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    auto cpu = of_cpu(storage);
    auto larger = memory.allocate(bytes);
    memory.copy_data(larger.get(), cpu.data(), std::min(bytes, cpu.nbytes()));
    storage.set_data_ptr_noswap(std::move(larger));
    storage.set_nbytes(bytes);
  }
};

Hooks hooks;

}  // namespace

namespace at {
C10_REGISTER_GUARD_IMPL(PrivateUse1, Guard)
}

TORCH_LIBRARY_IMPL(_, PrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFromBoxedFunction<&any>());
}

TORCH_LIBRARY_IMPL(_, AutocastPrivateUse1, m) {
  m.fallback(torch::CppFunction::makeFallthrough());
}

TORCH_LIBRARY_IMPL(aten, PrivateUse1, m) {
  m.impl("_copy_from", &copy_from);
  m.impl("_copy_from_and_resize", &copy_from_and_resize);
  m.impl("_efficientzerotensor", &zero_tensor);
  m.impl("mse_loss", torch::CppFunction::makeFromBoxedFunction<&any>());  // (torch's own way warns of its output)
  m.impl("convolution_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution>());
  m.impl("convolution_backward_overrideable", torch::CppFunction::makeFromBoxedFunction<&convolution_backward>());
}

// (Copies keep to what conjugate and negative views mean: torch's own way would copy them first, and so on.)
TORCH_LIBRARY_IMPL(aten, Conjugate, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }
TORCH_LIBRARY_IMPL(aten, Negative, m) { m.impl("_copy_from", torch::CppFunction::makeFallthrough()); }

// What the Python module of the device is made of. (Loading this file is all that registers the device.)
TORCH_LIBRARY(pretend, m) {
  c10::SetAllocator(kType, &memory);
  at::RegisterPrivateUse1HooksInterface(&hooks);
  m.def("refuse_waiting(bool refuse) -> ()", [](bool refuse) { waiting_refused = refuse; });
  m.def("seed(int seed) -> ()", [](int64_t seed) { const_cast<at::Generator&>(default_generator()).set_current_seed(seed); });
  m.def("get_state() -> Tensor", [] { return default_generator().get_state(); });
  m.def("set_state(Tensor state) -> ()", [](const Tensor& state) { const_cast<at::Generator&>(default_generator()).set_state(state); });
}
