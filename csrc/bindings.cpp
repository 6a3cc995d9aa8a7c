// The extension's only view of PyTorch, through its stable ABI: checks, outputs, and the ops of the namespace
// pyckpt_cuda, with the schemas of those that they implement (pyckpt/ops/cuda_backend.py).

#include <Python.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cmath>
#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "launch.h"

// PyTorch 2.13 has it beside the older macro, which forgets the message.
#ifndef STABLE_TORCH_ERROR_CODE_CHECK
#define STABLE_TORCH_ERROR_CODE_CHECK(call) TORCH_ERROR_CODE_CHECK(call)
#endif

#ifdef PYCKPT_EMULATED  // tests: the kernels run on CPU tensors (emulator.h)
#define PYCKPT_KEY CPU
#define PYCKPT_DEVICE_TYPE "cpu"
#else
#define PYCKPT_KEY CUDA
#define PYCKPT_DEVICE_TYPE "cuda"
#endif

// Only a PyTorch that was built with CUDA has it; without this the extension could not be loaded elsewhere.
#pragma weak aoti_torch_get_current_cuda_stream

namespace pyckpt {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using MaybeTensor = std::optional<Tensor>;

// The kernels that were built run on no such device, or not with its driver.
struct Unfit : std::runtime_error {
  using std::runtime_error::runtime_error;
};

template <class Error = std::runtime_error, class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw Error(message.str());
}

std::string shape_of(const Tensor& t) {
  std::ostringstream out;
  out << "(";
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << ")";
  return out.str();
}

// A new contiguous tensor.
Tensor make(const std::vector<int64_t>& shape, ScalarType dtype, const Tensor& like) {
  std::vector<int64_t> strides(shape.size());
  int64_t stride = 1;
  for (size_t i = shape.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= shape[i] > 1 ? shape[i] : 1;
  }
  const auto code = torch::stable::detail::to<int32_t>(torch::stable::detail::from(dtype));
  AtenTensorHandle handle = nullptr;
  int32_t device = 0;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(like.get(), &device));
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(static_cast<int64_t>(shape.size()), shape.data(),
                                                         strides.data(), code, device, like.get_device_index(), &handle));
  return Tensor(handle);
}

// --- checks, each of which names the argument ---

Dtype dtype_of(const char* name, const Tensor& t) {
  switch (t.scalar_type()) {
    case ScalarType::Half:
      return Dtype::float16;
    case ScalarType::BFloat16:
      return Dtype::bfloat16;
    case ScalarType::Float:
      return Dtype::float32;
    default:
      fail(name, " has a dtype that the CUDA kernels do not take; expected float16, bfloat16 or float32");
  }
}

bool is_ours(const Tensor& t) {
#ifdef PYCKPT_EMULATED
  return t.is_cpu();
#else
  return t.is_cuda();
#endif
}

void check_cuda(const char* name, const Tensor& t) {
  if (!is_ours(t)) fail(name, " is not on a " PYCKPT_DEVICE_TYPE " device");
}

// The device and dtype of the first argument, which the others must share.
struct Like {
  Like(const char* name, const Tensor& t) : name(name), tensor(t) {
    check_cuda(name, t);
    dtype = dtype_of(name, t);
  }

  void check_device(const char* other, const Tensor& t) const {
    check_cuda(other, t);
    if (t.get_device_index() != tensor.get_device_index()) {
      fail(other, " is on cuda:", t.get_device_index(), ", ", name, " on cuda:", tensor.get_device_index());
    }
  }

  void check_shape(const char* other, const Tensor& t) const {
    bool same = t.dim() == tensor.dim();
    for (int64_t i = 0; same && i < t.dim(); ++i) same = t.size(i) == tensor.size(i);
    if (!same) fail(other, " has shape ", shape_of(t), "; expected that of ", name, ", ", shape_of(tensor));
  }

  void check_dtype(const char* other, const Tensor& t) const {
    if (t.scalar_type() != tensor.scalar_type()) fail(other, " has another dtype than ", name);
  }

  void check(const char* other, const Tensor& t) const {
    check_device(other, t);
    check_dtype(other, t);
    check_shape(other, t);
  }

  // A new tensor like it.
  Tensor made() const {
    const auto sizes = tensor.sizes();
    return make(std::vector<int64_t>(sizes.begin(), sizes.end()), tensor.scalar_type(), tensor);
  }

  const char* name;
  const Tensor& tensor;
  Dtype dtype;
};

// --- tensors as rows ---

// The distance of rows of t (..., D), or nothing where they are not equally far apart or their values not adjacent.
std::optional<int64_t> row_stride(const Tensor& t) {
  const int64_t n = t.dim();
  const auto sizes = t.sizes(), strides = t.strides();
  if (sizes[n - 1] != 1 && strides[n - 1] != 1) return std::nullopt;
  std::optional<int64_t> stride;
  int64_t next = 0;  // the distance that the next dim outwards must have
  for (int64_t i = n - 2; i >= 0; --i) {
    if (sizes[i] == 1) continue;
    if (!stride) {
      stride = strides[i];
    } else if (strides[i] != next) {
      return std::nullopt;
    }
    next = strides[i] * sizes[i];
  }
  return stride.value_or(sizes[n - 1]);
}

int64_t width_of(const char* name, const Tensor& t) {
  if (t.dim() == 0) fail(name, " has no dimension; expected (..., D)");
  return t.size(t.dim() - 1);
}

int64_t rows_in(const Tensor& t) {
  const int64_t width = t.size(t.dim() - 1);
  if (width) return t.numel() / width;
  int64_t rows = 1;
  for (int64_t i = 0; i < t.dim() - 1; ++i) rows *= t.size(i);
  return rows;
}

// Rows to read; of a contiguous copy, kept in `copies`, where t has none.
Input read_rows(const Tensor& t, std::vector<Tensor>& copies) {
  if (t.numel() == 0) return {};
  if (const auto stride = row_stride(t)) return {t.const_data_ptr(), *stride};
  copies.push_back(torch::stable::contiguous(t));
  return {copies.back().const_data_ptr(), t.size(t.dim() - 1)};
}

Output write_rows(const char* name, const Tensor& t) {
  if (t.numel() == 0) return {};
  const auto stride = row_stride(t);
  if (!stride) fail(name, " is written in place; expected rows that are equally far apart, with a unit last stride");
  return {t.mutable_data_ptr(), *stride};
}

// --- launches ---

// A device is current while this lives, and PyTorch's stream on it is `stream`.
class Launch {
 public:
  explicit Launch(const Tensor& t) : Launch(t.get_device_index()) {}

  explicit Launch(int device) : device_(device) {
#ifndef PYCKPT_EMULATED
    if (!aoti_torch_get_current_cuda_stream) fail("this PyTorch is built without CUDA");
    // PyTorch's own guard: going back by cudaSetDevice would make a context on a device that nobody uses.
    guard_.emplace(device_);
    int seen = device_;  // by the runtime that is linked in here, beside PyTorch's
    check(cudaGetDevice(&seen));
    if (seen != device_) check(cudaSetDevice(device_));
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device_, &current));
    stream = static_cast<cudaStream_t>(current);
#endif
  }

  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  // Whether what was launched has started well.
  void check() const { check(cudaGetLastError()); }

  void check(cudaError_t error) const {
    if (error == cudaSuccess) return;
    cudaGetLastError();  // or the next launch would be told of it
    switch (error) {
      case cudaErrorNoKernelImageForDevice:
      case cudaErrorInvalidDeviceFunction:
      case cudaErrorUnsupportedPtxVersion:
      case cudaErrorJitCompilerNotFound:
        fail_for_device();
      case cudaErrorInsufficientDriver:
      case cudaErrorSystemDriverMismatch:
      case cudaErrorCompatNotSupportedOnDevice:
      case cudaErrorNoDevice:
        fail<Unfit>("pyckpt's CUDA kernels were built with CUDA ", CUDART_VERSION / 1000, ".", CUDART_VERSION % 1000 / 10,
                    ", which cuda:", device_, " cannot be used with (", cudaGetErrorString(error),
                    "): build them again with the CUDA that PyTorch was built with");
      default:
        fail("a CUDA kernel of pyckpt could not be launched: ", cudaGetErrorString(error),
             "; an earlier kernel's error, pyckpt's or not, may show here (CUDA_LAUNCH_BLOCKING=1 says whose it is)");
    }
  }

  cudaStream_t stream = nullptr;

 private:
  [[noreturn]] void fail_for_device() const {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device_);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device_);
    fail<Unfit>("pyckpt's CUDA kernels were built for " PYCKPT_ARCHITECTURES ", and cuda:", device_, " is sm_", major, minor,
                ": build them again with TORCH_CUDA_ARCH_LIST=\"", major, ".", minor, "\"");
  }

  int device_;
#ifndef PYCKPT_EMULATED
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
#endif
};

// Why none of the kernels runs on a device; empty where they do, and for what only a launch can tell.
std::string problem_on(int device) try {
  const Launch launch(device);
  launch.check(code_for_device());
  return "";
} catch (const Unfit& error) {
  return error.what();
} catch (const std::exception&) {
  return "";
}

// --- activations ---

constexpr const char* kKinds[] = {"swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu2"};
constexpr int kFunctions[] = {0, 1, 2, 1, 2, 3};

int function_of(const std::string& kind) {
  for (size_t i = 0; i < std::size(kKinds); ++i) {
    if (kind == kKinds[i]) return kFunctions[i];
  }
  fail("kind is '", kind, "'; expected swiglu, geglu, geglu_tanh, gelu, gelu_tanh or relu2");
}

// One long row where nothing lies between the rows. Its stride is one that no alignment is asked of.
template <class Arguments>
void join_rows(Arguments& a, std::initializer_list<int64_t*> strides) {
  for (const int64_t* stride : strides) {
    if (*stride != a.width) return;
  }
  for (int64_t* stride : strides) *stride = 0;
  a.width *= a.rows;
  a.rows = 1;
}

void act_into(const Tensor& gate, const MaybeTensor& up, const std::string& kind, const Tensor& act) {
  const Like like(up ? "gate" : "x", gate);
  if (up) like.check("up", *up);
  const int function = function_of(kind);
  std::vector<Tensor> copies;
  GluForward a{rows_in(gate), width_of(like.name, gate), read_rows(gate, copies), {}, write_rows(like.name, act)};
  if (gate.numel() == 0) return;
  if (up) a.up = read_rows(*up, copies);
  join_rows(a, {&a.gate.stride, up ? &a.up.stride : &a.gate.stride, &a.act.stride});
  const Launch launch(gate);
  glu_forward(a, like.dtype, function, launch.stream);
  launch.check();
}

void act_backward_into(const Tensor& dact, const Tensor& gate, const MaybeTensor& up, const std::string& kind,
                       const Tensor& act, const Tensor& dgate, const MaybeTensor& dup) {
  const Like like(up ? "gate" : "x", gate);
  like.check("dact", dact);
  if (up) like.check("up", *up);
  const int function = function_of(kind);
  if (gate.numel() == 0) return;
  std::vector<Tensor> copies;
  GluBackward a{};
  a.rows = rows_in(gate);
  a.width = width_of(like.name, gate);
  a.dact = read_rows(dact, copies);
  a.gate = read_rows(gate, copies);
  a.act = write_rows("dact", act);
  a.dgate = write_rows(like.name, dgate);
  if (up) {
    a.up = read_rows(*up, copies);
    a.dup = write_rows("up", *dup);
  }
  join_rows(a, {&a.dact.stride, &a.gate.stride, &a.act.stride, &a.dgate.stride,
                up ? &a.up.stride : &a.gate.stride, up ? &a.dup.stride : &a.gate.stride});
  const Launch launch(gate);
  glu_backward(a, like.dtype, function, launch.stream);
  launch.check();
}

Tensor glu_fwd(const Tensor& gate, const Tensor& up, const std::string& kind) {
  Tensor act = Like("gate", gate).made();
  act_into(gate, up, kind, act);
  return act;
}

void glu_fwd_(const Tensor& gate, const Tensor& up, const std::string& kind) { act_into(gate, up, kind, gate); }

std::tuple<Tensor, Tensor, Tensor> glu_bwd(const Tensor& dact, const Tensor& gate, const Tensor& up,
                                           const std::string& kind) {
  const Like like("gate", gate);
  auto made = std::make_tuple(like.made(), like.made(), like.made());
  act_backward_into(dact, gate, up, kind, std::get<0>(made), std::get<1>(made), std::get<2>(made));
  return made;
}

void glu_bwd_(const Tensor& dact, const Tensor& gate, const Tensor& up, const std::string& kind) {
  act_backward_into(dact, gate, up, kind, dact, gate, up);
}

Tensor act_fwd(const Tensor& x, const std::string& kind) {
  Tensor act = Like("x", x).made();
  act_into(x, std::nullopt, kind, act);
  return act;
}

void act_fwd_(const Tensor& x, const std::string& kind) { act_into(x, std::nullopt, kind, x); }

std::tuple<Tensor, Tensor> act_bwd(const Tensor& dact, const Tensor& x, const std::string& kind) {
  const Like like("x", x);
  auto made = std::make_tuple(like.made(), like.made());
  act_backward_into(dact, x, std::nullopt, kind, std::get<0>(made), std::get<1>(made), std::nullopt);
  return made;
}

void act_bwd_(const Tensor& dact, const Tensor& x, const std::string& kind) {
  act_backward_into(dact, x, std::nullopt, kind, dact, x, std::nullopt);
}

// --- norms ---

// What a weight and a bias (D,) are for the kernels: in float32 or in x's dtype, both alike.
struct Weights {
  Weights(const Like& x, const MaybeTensor& weight, const MaybeTensor& bias) {
    const int64_t width = width_of("x", x.tensor);
    bool as_x = true, as_float = true;
    for (const auto& [name, t] : {std::make_pair("weight", &weight), std::make_pair("bias", &bias)}) {
      if (!*t) continue;
      x.check_device(name, **t);
      if ((*t)->dim() != 1 || (*t)->size(0) != width) {
        fail(name, " has shape ", shape_of(**t), "; expected (", width, ") for x of shape ", shape_of(x.tensor));
      }
      as_x &= (*t)->scalar_type() == x.tensor.scalar_type();
      as_float &= (*t)->scalar_type() == ScalarType::Float;
    }
    is_float = !as_x;
    const bool convert = !as_x && !as_float;
    if (weight) p_weight = ready(*weight, convert);
    if (bias) p_bias = ready(*bias, convert);
  }

  const void *p_weight = nullptr, *p_bias = nullptr;
  bool is_float = false;

 private:
  const void* ready(const Tensor& t, bool convert) {
    copies_.push_back(torch::stable::contiguous(convert ? torch::stable::to(t, ScalarType::Float) : t));
    return copies_.back().const_data_ptr();
  }

  std::vector<Tensor> copies_;
};

std::vector<int64_t> shape_of_rows(const Tensor& x) {
  const auto sizes = x.sizes();
  return std::vector<int64_t>(sizes.begin(), sizes.end() - 1);
}

struct Normed {
  Tensor y;
  MaybeTensor total, mean;
  Tensor rstd;
};

Normed norm(const Tensor& x, const MaybeTensor& residual, const MaybeTensor& weight, const MaybeTensor& bias,
            double eps, bool centered) {
  const Like like("x", x);
  const int64_t width = width_of("x", x);
  if (residual) like.check("residual", *residual);
  const Weights weights(like, weight, bias);
  const auto statistic = [&] { return make(shape_of_rows(x), ScalarType::Float, x); };
  Normed made{like.made(), std::nullopt, std::nullopt, statistic()};
  if (residual) made.total = like.made();
  if (centered) made.mean = statistic();
  NormForward a{};
  a.rows = rows_in(x);
  a.width = width;
  if (a.rows == 0 || width == 0) return made;
  std::vector<Tensor> copies;
  a.x = read_rows(x, copies);
  a.y = write_rows("y", made.y);
  if (residual) {
    a.residual = read_rows(*residual, copies);
    a.total = write_rows("total", *made.total);
  }
  a.weight = weights.p_weight;
  a.bias = weights.p_bias;
  a.float_weights = weights.is_float;
  a.rstd = static_cast<float*>(made.rstd.mutable_data_ptr());
  if (centered) a.mean = static_cast<float*>(made.mean->mutable_data_ptr());
  a.eps = static_cast<float>(eps);
  const Launch launch(x);
  norm_forward(a, like.dtype, launch.stream);
  launch.check();
  return made;
}

// One number a row, as float32 in a row.
const float* statistic_of(const char* name, const Tensor& t, const Like& x, std::vector<Tensor>& copies) {
  x.check_device(name, t);
  if (t.scalar_type() != ScalarType::Float || t.numel() != rows_in(x.tensor)) {
    fail(name, " has shape ", shape_of(t), "; expected one float32 for each row of x of shape ", shape_of(x.tensor));
  }
  copies.push_back(torch::stable::contiguous(t));
  return static_cast<const float*>(copies.back().const_data_ptr());
}

// dw and db, empty if not needed; dx is written, or added to.
std::tuple<Tensor, Tensor> norm_backward_into(const Tensor& dy, const Tensor& x, const MaybeTensor& weight,
                                              const MaybeTensor& mean, const Tensor& rstd, const Tensor& dx, bool add,
                                              bool need_dw) {
  const Like like("x", x);
  const int64_t width = width_of("x", x);
  like.check("dy", dy);
  like.check("dx", dx);
  const Weights weights(like, weight, std::nullopt);
  const bool need_db = need_dw && mean;
  Tensor dw = make({need_dw ? width : 0}, ScalarType::Float, x);
  Tensor db = make({need_db ? width : 0}, ScalarType::Float, x);
  NormBackward a{};
  a.rows = rows_in(x);
  a.width = width;
  if (a.rows == 0 || width == 0) {
    torch::stable::zero_(dw);
    torch::stable::zero_(db);
    return {dw, db};
  }
  std::vector<Tensor> copies;
  a.dy = read_rows(dy, copies);
  a.x = read_rows(x, copies);
  a.dx = write_rows("dx", dx);
  a.weight = weights.p_weight;
  a.float_weights = weights.is_float;
  a.rstd = statistic_of("rstd", rstd, like, copies);
  if (mean) a.mean = statistic_of("mean", *mean, like, copies);
  a.add = add;
  const int device = x.get_device_index();
  const Launch launch(x);
  if (!need_dw) {
    norm_backward(a, like.dtype, device, launch.stream);
    launch.check();
    return {dw, db};
  }
  const int64_t blocks = norm_backward_blocks(a, like.dtype, device);
  const Tensor shares = make({need_db ? 2 : 1, blocks, width}, ScalarType::Float, x);
  a.dw_shares = static_cast<float*>(shares.mutable_data_ptr());
  if (need_db) a.db_shares = a.dw_shares + blocks * width;
  norm_backward(a, like.dtype, device, launch.stream);
  launch.check();
  NormShares sums{blocks, width, a.dw_shares, a.db_shares, static_cast<float*>(dw.mutable_data_ptr()), nullptr};
  if (need_db) sums.db = static_cast<float*>(db.mutable_data_ptr());
  sum_shares(sums, launch.stream);
  launch.check();
  return {dw, db};
}

std::tuple<Tensor, Tensor> rms_norm_fwd(const Tensor& x, const MaybeTensor& weight, double eps) {
  const Normed n = norm(x, std::nullopt, weight, std::nullopt, eps, false);
  return {n.y, n.rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_fwd(const Tensor& x, const MaybeTensor& weight, const MaybeTensor& bias,
                                                  double eps) {
  const Normed n = norm(x, std::nullopt, weight, bias, eps, true);
  return {n.y, *n.mean, n.rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm_fwd(const Tensor& x, const Tensor& residual, const MaybeTensor& weight,
                                                    double eps) {
  const Normed n = norm(x, residual, weight, std::nullopt, eps, false);
  return {n.y, *n.total, n.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> add_layer_norm_fwd(const Tensor& x, const Tensor& residual,
                                                              const MaybeTensor& weight, const MaybeTensor& bias,
                                                              double eps) {
  const Normed n = norm(x, residual, weight, bias, eps, true);
  return {n.y, *n.total, *n.mean, n.rstd};
}

std::tuple<Tensor, Tensor> rms_norm_bwd(const Tensor& dy, const Tensor& x, const MaybeTensor& weight, const Tensor& rstd,
                                        bool need_dw) {
  const Tensor dx = Like("x", x).made();
  return {dx, std::get<0>(norm_backward_into(dy, x, weight, std::nullopt, rstd, dx, false, need_dw))};
}

Tensor rms_norm_bwd_add_(const Tensor& dy, const Tensor& x, const MaybeTensor& weight, const Tensor& rstd,
                         const Tensor& dx, bool need_dw) {
  return std::get<0>(norm_backward_into(dy, x, weight, std::nullopt, rstd, dx, true, need_dw));
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(const Tensor& dy, const Tensor& x, const MaybeTensor& weight,
                                                  const Tensor& mean, const Tensor& rstd, bool need_dw) {
  const Tensor dx = Like("x", x).made();
  const auto [dw, db] = norm_backward_into(dy, x, weight, mean, rstd, dx, false, need_dw);
  return {dx, dw, db};
}

std::tuple<Tensor, Tensor> layer_norm_bwd_add_(const Tensor& dy, const Tensor& x, const MaybeTensor& weight,
                                               const Tensor& mean, const Tensor& rstd, const Tensor& dx, bool need_dw) {
  return norm_backward_into(dy, x, weight, mean, rstd, dx, true, need_dw);
}

// --- RoPE ---

// Tensors (..., H, D) as tokens of heads.
struct HeadRows {
  int64_t tokens, heads, dim, token_stride, head_stride;
};

std::optional<HeadRows> head_rows(const char* name, const Tensor& t) {
  const int64_t n = t.dim();
  if (n < 2) fail(name, " has shape ", shape_of(t), "; expected (..., H, D)");
  const auto sizes = t.sizes(), strides = t.strides();
  HeadRows h{1, sizes[n - 2], sizes[n - 1], 0, strides[n - 2]};
  if (t.numel() == 0) {  // strides say nothing then
    for (int64_t i = 0; i < n - 2; ++i) h.tokens *= sizes[i];
    return h;
  }
  if (h.dim != 1 && strides[n - 1] != 1) return std::nullopt;
  bool any = false;
  for (int64_t i = n - 3; i >= 0; --i) {
    if (sizes[i] != 1) {
      if (any && strides[i] != h.token_stride * h.tokens) return std::nullopt;
      if (!any) h.token_stride = strides[i];
      any = true;
    }
    h.tokens *= sizes[i];
  }
  return h;
}

// cos or sin (..., r/2), as float32 rows.
const float* table(const char* name, const Tensor& t, const Like& x, int64_t half, std::vector<Tensor>& copies) {
  x.check_device(name, t);
  if (t.dim() == 0 || t.size(t.dim() - 1) != half) {
    fail(name, " has shape ", shape_of(t), "; expected (..., ", half, "), as cos");
  }
  const bool convert = t.scalar_type() != ScalarType::Float;
  copies.push_back(torch::stable::contiguous(convert ? torch::stable::to(t, ScalarType::Float) : t));
  return static_cast<const float*>(copies.back().const_data_ptr());
}

Heads heads_of(const HeadRows& in, const void* p_in, const HeadRows& out, void* p_out) {
  return {p_in, p_out, static_cast<int>(in.heads), in.token_stride, in.head_stride, out.token_stride, out.head_stride};
}

HeadRows heads_to_write(const char* name, const Tensor& t) {
  const auto h = head_rows(name, t);
  if (!h) fail(name, " is written in place; expected to be viewable as (tokens, H, D) with a unit last stride");
  return *h;
}

// Turn x into out, and, in the same launch, k into itself. x may be out.
void rope_into(const char* name, const Tensor& x, const MaybeTensor& k, const Tensor& cos, const Tensor& sin,
               bool inverse, bool interleaved, const Tensor& out) {
  const Like like(name, x);
  std::vector<Tensor> copies;
  const HeadRows written = heads_to_write(name, out);
  auto read = head_rows(name, x);
  const void* p_in = x.const_data_ptr();
  if (!read) {
    copies.push_back(torch::stable::contiguous(x));
    read = head_rows(name, copies.back());
    p_in = copies.back().const_data_ptr();
  }
  Rope a{};
  a.tokens = read->tokens;
  a.dim = static_cast<int>(read->dim);
  if (cos.dim() == 0 || 2 * cos.size(cos.dim() - 1) > read->dim) {
    fail("cos has shape ", shape_of(cos), "; expected (..., r/2) with r no more than the ", read->dim, " dims of ", name);
  }
  a.half = static_cast<int>(cos.size(cos.dim() - 1));
  a.first = heads_of(*read, p_in, written, out.mutable_data_ptr());
  if (k) {
    like.check_device("k", *k);
    like.check_dtype("k", *k);
    const HeadRows rows = heads_to_write("k", *k);
    if (rows.tokens != a.tokens || rows.dim != read->dim) {
      fail("k has shape ", shape_of(*k), "; expected the tokens and dims of ", name, ", ", shape_of(x));
    }
    a.second = heads_of(rows, k->const_data_ptr(), rows, k->mutable_data_ptr());
  }
  a.cos = table("cos", cos, like, a.half, copies);
  a.sin = table("sin", sin, like, a.half, copies);
  a.inverse = inverse;
  a.copy_rest = a.first.in != a.first.out && 2 * a.half < a.dim;
  if (a.tokens == 0 || a.dim == 0 || a.first.heads + a.second.heads == 0 || (a.half == 0 && !a.copy_rest)) return;
  a.angles = a.half ? cos.numel() / a.half : 1;
  if (a.half && (a.angles == 0 || a.tokens % a.angles || sin.numel() != cos.numel())) {
    fail("cos has shape ", shape_of(cos), " and sin ", shape_of(sin), "; expected rows for every token of ", name, ", ",
         shape_of(x), ", or for equal parts of them");
  }
  const Launch launch(x);
  rope(a, like.dtype, interleaved, launch.stream);
  launch.check();
}

Tensor apply_rope(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse, bool interleaved) {
  const Tensor out = Like("x", x).made();
  rope_into("x", x, std::nullopt, cos, sin, inverse, interleaved, out);
  return out;
}

void rope_(const Tensor& x, const Tensor& cos, const Tensor& sin, bool inverse, bool interleaved) {
  rope_into("x", x, std::nullopt, cos, sin, inverse, interleaved, x);
}

void rope_qk_(const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool inverse, bool interleaved) {
  rope_into("q", q, k, cos, sin, inverse, interleaved, q);
}

// --- dropout ---

// Whether t is float32 (or of x's dtype).
bool is_float_or_like(const char* name, const Tensor& t, const Like& x) {
  if (t.scalar_type() == x.tensor.scalar_type()) return false;
  if (t.scalar_type() != ScalarType::Float) fail(name, " has a dtype that is neither float32 nor that of ", x.name);
  return true;
}

void dropout_(const Tensor& x, const MaybeTensor& residual, const Tensor& out, double rate, int64_t seed, int64_t first) {
  const Like like("x", x);
  like.check_device("out", out);
  like.check_shape("out", out);
  const bool float_out = is_float_or_like("out", out, like);
  if (!(rate >= 0.0 && rate < 1.0)) fail("rate is ", rate, "; expected at least 0 and less than 1");
  if (residual) {
    like.check_device("residual", *residual);
    like.check_shape("residual", *residual);
    if (residual->scalar_type() != out.scalar_type()) fail("residual has another dtype than out");
  }
  if (x.numel() == 0) return;
  std::vector<Tensor> copies;
  Dropout a{};
  a.rows = rows_in(x);
  a.width = width_of("x", x);
  a.x = read_rows(x, copies);
  if (residual) a.residual = read_rows(*residual, copies);
  a.out = write_rows("out", out);
  a.seed = static_cast<uint64_t>(seed);
  a.first = first;
  // As pyckpt.ops.philox.threshold: to the nearest, ties to even.
  const double most = 2147483647.0, threshold = std::nearbyint(rate * 2147483648.0);
  a.threshold = static_cast<uint32_t>(threshold < most ? threshold : most);
  a.factor = static_cast<float>(1.0 / (1.0 - rate));
  const Launch launch(x);
  dropout(a, like.dtype, float_out, launch.stream);
  launch.check();
}

// --- beside attention ---

// (B, S, H, D), or packed (T, H, D), as the kernels see it.
struct AttentionShape {
  AttentionShape(const char* name, const Tensor& o) {
    const int64_t n = o.dim();
    if (n != 3 && n != 4) fail(name, " has shape ", shape_of(o), "; expected (B, S, H, D) or (T, H, D)");
    batch = n == 4 ? o.size(0) : 1;
    tokens = o.size(n - 3);
    heads = o.size(n - 2);
    dim = o.size(n - 1);
    lse = n == 4 ? std::vector<int64_t>{batch, heads, tokens} : std::vector<int64_t>{heads, tokens};
  }

  // Checks a statistic (B, H, S), or (H, T), in float32.
  void check_lse(const char* name, const Tensor& t, const Like& o) const {
    o.check_device(name, t);
    bool same = t.dim() == static_cast<int64_t>(lse.size()) && t.scalar_type() == ScalarType::Float;
    for (size_t i = 0; same && i < lse.size(); ++i) same = t.size(i) == lse[i];
    if (!same) fail(name, " has shape ", shape_of(t), "; expected float32 (B, H, S), or (H, T), for ", o.name, " of ",
                    shape_of(o.tensor));
  }

  template <class Arguments>
  void fill(Arguments& a) const {
    a.batch = batch;
    a.tokens = tokens;
    a.heads = heads;
    a.dim = static_cast<int>(dim);
  }

  int64_t batch, tokens, heads, dim;
  std::vector<int64_t> lse;
};

Layout layout_of(const Tensor& t) {
  const auto strides = t.strides();
  const int64_t n = t.dim();
  return {n == 4 ? strides[0] : 0, strides[n - 3], strides[n - 2]};
}

bool unit(const Tensor& t) { return t.size(t.dim() - 1) == 1 || t.stride(t.dim() - 1) == 1; }

Tensor with_unit_stride(const Tensor& t) { return unit(t) ? t : torch::stable::contiguous(t); }

Tensor delta_of(const Tensor& dout, const Tensor& o, const MaybeTensor& dlse) {
  const Like like("o", o);
  like.check("do", dout);
  const AttentionShape shape("o", o);
  if (dlse) shape.check_lse("dlse", *dlse, like);
  const Tensor delta = make(shape.lse, ScalarType::Float, o);
  if (delta.numel() == 0) return delta;
  const Tensor x = with_unit_stride(dout), y = with_unit_stride(o);
  const MaybeTensor of_lse = dlse ? MaybeTensor(torch::stable::contiguous(*dlse)) : std::nullopt;
  Delta a{};
  shape.fill(a);
  a.dout = x.const_data_ptr();
  a.o = y.const_data_ptr();
  a.of_dout = layout_of(x);
  a.of_o = layout_of(y);
  a.dlse = of_lse ? static_cast<const float*>(of_lse->const_data_ptr()) : nullptr;
  a.delta = static_cast<float*>(delta.mutable_data_ptr());
  const Launch launch(o);
  attention_delta(a, like.dtype, launch.stream);
  launch.check();
  return delta;
}

void attention_merge_(const Tensor& o, const Tensor& lse, const Tensor& part_o, const Tensor& part_lse) {
  const Like like("part_o", part_o);
  like.check_device("o", o);
  like.check_shape("o", o);
  const bool float_out = is_float_or_like("o", o, like);
  const AttentionShape shape("part_o", part_o);
  shape.check_lse("lse", lse, like);
  shape.check_lse("part_lse", part_lse, like);
  if (!unit(o)) fail("o is written in place; expected a unit last stride");
  if (!lse.is_contiguous()) fail("lse is written in place; expected it contiguous");
  if (lse.numel() == 0) return;
  const Tensor part = with_unit_stride(part_o), of_part = torch::stable::contiguous(part_lse);
  MergeParts a{};
  shape.fill(a);
  a.o = o.mutable_data_ptr();
  a.part_o = part.const_data_ptr();
  a.of_o = layout_of(o);
  a.of_part = layout_of(part);
  a.lse = static_cast<float*>(lse.mutable_data_ptr());
  a.part_lse = static_cast<const float*>(of_part.const_data_ptr());
  const Launch launch(o);
  attention_merge(a, like.dtype, float_out, launch.stream);
  launch.check();
}

// --- cross entropy ---

// One float32 a row, in a row.
float* of_rows(const char* name, const Tensor& t, const Like& logits) {
  logits.check_device(name, t);
  if (t.scalar_type() != ScalarType::Float || t.dim() != 1 || t.size(0) != logits.tensor.size(0) || !t.is_contiguous()) {
    fail(name, " has shape ", shape_of(t), "; expected contiguous float32 (", logits.tensor.size(0), ")");
  }
  return static_cast<float*>(t.mutable_data_ptr());
}

void cross_entropy_(const Tensor& logits, const MaybeTensor& bias, const Tensor& target, const MaybeTensor& upstream,
                    const MaybeTensor& loss, const Tensor& lse, int64_t ignore_index, double softcap, double z_loss,
                    double smoothing, bool gradient) {
  const Like like("logits", logits);
  if (logits.dim() != 2) fail("logits has shape ", shape_of(logits), "; expected (t, V)");
  const Weights weights(like, std::nullopt, bias);
  like.check_device("target", target);
  if (target.scalar_type() != ScalarType::Long || target.dim() != 1 || target.size(0) != logits.size(0)) {
    fail("target has shape ", shape_of(target), "; expected int64 (", logits.size(0), ")");
  }
  CrossEntropy a{};
  a.rows = logits.size(0);
  a.vocab = logits.size(1);
  a.loss = loss ? of_rows("loss", *loss, like) : nullptr;
  a.lse = of_rows("lse", lse, like);
  if (logits.numel() == 0) return;
  a.logits = write_rows("logits", logits);
  a.bias = weights.p_bias;
  a.float_bias = weights.is_float;
  const Tensor labels = torch::stable::contiguous(target);
  a.target = static_cast<const int64_t*>(labels.const_data_ptr());
  const MaybeTensor from = upstream ? MaybeTensor(torch::stable::contiguous(*upstream)) : std::nullopt;
  a.upstream = from ? of_rows("upstream", *from, like) : nullptr;
  a.ignore_index = ignore_index;
  a.softcap = static_cast<float>(softcap);
  a.z_loss = static_cast<float>(z_loss);
  a.smoothing = static_cast<float>(smoothing);
  a.gradient = gradient;
  const Launch launch(logits);
  cross_entropy(a, like.dtype, launch.stream);
  launch.check();
}

}  // namespace

STABLE_TORCH_LIBRARY(pyckpt_cuda, m) {
  m.def("rope(Tensor x, Tensor cos, Tensor sin, bool inverse, bool interleaved) -> Tensor");
  m.def("rope_(Tensor(a!) x, Tensor cos, Tensor sin, bool inverse, bool interleaved) -> ()");
  m.def("rope_qk_(Tensor(a!) q, Tensor(b!) k, Tensor cos, Tensor sin, bool inverse, bool interleaved) -> ()");
  m.def("dropout_(Tensor x, Tensor? residual, Tensor(a!) out, float rate, int seed, int first) -> ()");
  m.def("attention_delta(Tensor do, Tensor o, Tensor? dlse) -> Tensor");
  m.def("attention_merge_(Tensor(a!) o, Tensor(b!) lse, Tensor part_o, Tensor part_lse) -> ()");
  m.def(
      "cross_entropy_(Tensor(a!) logits, Tensor? bias, Tensor target, Tensor? upstream, Tensor(b!)? loss, "
      "Tensor(c!) lse, int ignore_index, float softcap, float z_loss, float smoothing, bool gradient) -> ()");
  m.def("rms_norm_fwd(Tensor x, Tensor? weight, float eps) -> (Tensor, Tensor)");
  m.def("layer_norm_fwd(Tensor x, Tensor? weight, Tensor? bias, float eps) -> (Tensor, Tensor, Tensor)");
  m.def("add_rms_norm_fwd(Tensor x, Tensor residual, Tensor? weight, float eps) -> (Tensor, Tensor, Tensor)");
  m.def(
      "add_layer_norm_fwd(Tensor x, Tensor residual, Tensor? weight, Tensor? bias, float eps) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
  m.def("rms_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, bool need_dw) -> (Tensor, Tensor)");
  m.def("rms_norm_bwd_add_(Tensor dy, Tensor x, Tensor? weight, Tensor rstd, Tensor(a!) dx, bool need_dw) -> Tensor");
  m.def(
      "layer_norm_bwd(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, bool need_dw) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "layer_norm_bwd_add_(Tensor dy, Tensor x, Tensor? weight, Tensor mean, Tensor rstd, Tensor(a!) dx, "
      "bool need_dw) -> (Tensor, Tensor)");
  m.def("glu_fwd(Tensor gate, Tensor up, str kind) -> Tensor");
  m.def("glu_fwd_(Tensor(a!) gate, Tensor up, str kind) -> ()");
  m.def("glu_bwd(Tensor dact, Tensor gate, Tensor up, str kind) -> (Tensor, Tensor, Tensor)");
  m.def("glu_bwd_(Tensor(a!) dact, Tensor(b!) gate, Tensor(c!) up, str kind) -> ()");
  m.def("act_fwd(Tensor x, str kind) -> Tensor");
  m.def("act_fwd_(Tensor(a!) x, str kind) -> ()");
  m.def("act_bwd(Tensor dact, Tensor x, str kind) -> (Tensor, Tensor)");
  m.def("act_bwd_(Tensor(a!) dact, Tensor(b!) x, str kind) -> ()");
}

STABLE_TORCH_LIBRARY_IMPL(pyckpt_cuda, PYCKPT_KEY, m) {
  m.impl("rope", TORCH_BOX(&apply_rope));
  m.impl("rope_", TORCH_BOX(&rope_));
  m.impl("rope_qk_", TORCH_BOX(&rope_qk_));
  m.impl("dropout_", TORCH_BOX(&dropout_));
  m.impl("attention_delta", TORCH_BOX(&delta_of));
  m.impl("attention_merge_", TORCH_BOX(&attention_merge_));
  m.impl("cross_entropy_", TORCH_BOX(&cross_entropy_));
  m.impl("rms_norm_fwd", TORCH_BOX(&rms_norm_fwd));
  m.impl("layer_norm_fwd", TORCH_BOX(&layer_norm_fwd));
  m.impl("add_rms_norm_fwd", TORCH_BOX(&add_rms_norm_fwd));
  m.impl("add_layer_norm_fwd", TORCH_BOX(&add_layer_norm_fwd));
  m.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd));
  m.impl("rms_norm_bwd_add_", TORCH_BOX(&rms_norm_bwd_add_));
  m.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd));
  m.impl("layer_norm_bwd_add_", TORCH_BOX(&layer_norm_bwd_add_));
  m.impl("glu_fwd", TORCH_BOX(&glu_fwd));
  m.impl("glu_fwd_", TORCH_BOX(&glu_fwd_));
  m.impl("glu_bwd", TORCH_BOX(&glu_bwd));
  m.impl("glu_bwd_", TORCH_BOX(&glu_bwd_));
  m.impl("act_fwd", TORCH_BOX(&act_fwd));
  m.impl("act_fwd_", TORCH_BOX(&act_fwd_));
  m.impl("act_bwd", TORCH_BOX(&act_bwd));
  m.impl("act_bwd_", TORCH_BOX(&act_bwd_));
}

}  // namespace pyckpt

namespace {

PyObject* problem_on(PyObject*, PyObject* index) {
  const long device = PyLong_AsLong(index);
  if (device == -1 && PyErr_Occurred()) return nullptr;
  return PyUnicode_FromString(pyckpt::problem_on(static_cast<int>(device)).c_str());
}

PyMethodDef functions[] = {
    {"problem_on", problem_on, METH_O, "Why the kernels do not run on the device of this index, or an empty string."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

// A Python module, so that `import pyckpt._cuda` finds and loads it.
PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef definition{};
  definition.m_base = PyModuleDef_HEAD_INIT;
  definition.m_name = "_cuda";
  definition.m_size = -1;
  definition.m_methods = functions;
  PyObject* module = PyModule_Create(&definition);
  if (module) {
    PyModule_AddStringConstant(module, "ARCHITECTURES", PYCKPT_ARCHITECTURES);
    PyModule_AddStringConstant(module, "DEVICE_TYPE", PYCKPT_DEVICE_TYPE);
  }
  return module;
}
