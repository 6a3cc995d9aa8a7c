// The extension's only view of PyTorch, through its stable ABI: checks, outputs, and the ops of the namespace
// pyckpt_cuda, with the schemas of those that they implement (pyckpt/ops/cuda_backend.py).

#include <Python.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <sstream>
#include <stdexcept>
#include <string>
#include <tuple>
#include <vector>

#include "launch.h"

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

template <class... Parts>
[[noreturn]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (message << ... << parts);
  throw std::runtime_error(message.str());
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

// The tensor's device is current while this lives, and PyTorch's stream on it is `stream`.
class Launch {
 public:
  explicit Launch(const Tensor& t) {
    const int device = t.get_device_index();
    check(cudaGetDevice(&previous_), device);
    if (previous_ != device) check(cudaSetDevice(device), device);
    device_ = device;
#ifndef PYCKPT_EMULATED
    if (!aoti_torch_get_current_cuda_stream) fail("this PyTorch is built without CUDA");
    void* current = nullptr;
    STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &current));
    stream = static_cast<cudaStream_t>(current);
#endif
  }

  Launch(const Launch&) = delete;
  Launch& operator=(const Launch&) = delete;

  ~Launch() {
    if (previous_ != device_) cudaSetDevice(previous_);
  }

  // Whether what was launched has started well.
  void check() const { check(cudaGetLastError(), device_); }

  cudaStream_t stream = nullptr;

 private:
  static void check(cudaError_t error, int device) {
    if (error == cudaSuccess) return;
    if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorUnsupportedPtxVersion) {
      int major = 0, minor = 0;
      cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
      cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
      fail("pyckpt's CUDA kernels were built for ", PYCKPT_ARCHITECTURES, ", and cuda:", device, " is sm_", major, minor,
           ": build them again with TORCH_CUDA_ARCH_LIST=\"", major, ".", minor,
           "\", or take others with PYCKPT_BACKEND=triton");
    }
    fail("a CUDA kernel of pyckpt could not be launched: ", cudaGetErrorString(error));
  }

  int previous_ = 0, device_ = 0;
};

// --- activations ---

constexpr const char* kKinds[] = {"swiglu", "geglu", "geglu_tanh", "gelu", "gelu_tanh", "relu2"};
constexpr int kFunctions[] = {0, 1, 2, 1, 2, 3};

int function_of(const std::string& kind) {
  for (size_t i = 0; i < std::size(kKinds); ++i) {
    if (kind == kKinds[i]) return kFunctions[i];
  }
  fail("kind is '", kind, "'; expected swiglu, geglu, geglu_tanh, gelu, gelu_tanh or relu2");
}

// One long row where nothing lies between the rows.
template <class Arguments>
void join_rows(Arguments& a, std::initializer_list<int64_t> strides) {
  for (const int64_t stride : strides) {
    if (stride != a.width) return;
  }
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
  join_rows(a, {a.gate.stride, up ? a.up.stride : a.width, a.act.stride});
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
  join_rows(a, {a.dact.stride, a.gate.stride, a.act.stride, a.dgate.stride, up ? a.up.stride : a.width,
                up ? a.dup.stride : a.width});
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
  sum_shares(a.dw_shares, blocks, width, static_cast<float*>(dw.mutable_data_ptr()), launch.stream);
  if (need_db) sum_shares(a.db_shares, blocks, width, static_cast<float*>(db.mutable_data_ptr()), launch.stream);
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

}  // namespace

STABLE_TORCH_LIBRARY(pyckpt_cuda, m) {
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

// A Python module, so that `import pyckpt._cuda` finds and loads it.
PyMODINIT_FUNC PyInit__cuda() {
  static PyModuleDef definition{};
  definition.m_base = PyModuleDef_HEAD_INIT;
  definition.m_name = "_cuda";
  definition.m_size = -1;
  PyObject* module = PyModule_Create(&definition);
  if (module) {
    PyModule_AddStringConstant(module, "ARCHITECTURES", PYCKPT_ARCHITECTURES);
    PyModule_AddStringConstant(module, "DEVICE_TYPE", PYCKPT_DEVICE_TYPE);
  }
  return module;
}
