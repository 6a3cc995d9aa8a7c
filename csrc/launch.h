// What the kernels are launched with: plain structures, so that the kernels know nothing of PyTorch and the bindings
// nothing of CUDA C++. Strides are in elements, pointers may be null where that is said, sums are float32.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace pyckpt {

enum class Dtype { float16, bfloat16, float32 };

inline int size_of(Dtype dtype) { return dtype == Dtype::float32 ? 4 : 2; }

// Rows of values, `stride` apart.
struct Input {
  const void* p = nullptr;
  int64_t stride = 0;
};
struct Output {
  void* p = nullptr;
  int64_t stride = 0;
};

// act = phi(gate) up, or phi(gate) without `up`. Of one dtype; act may be gate. `function` is an Activation.
struct GluForward {
  int64_t rows, width;
  Input gate, up;
  Output act;
};
void glu_forward(const GluForward& a, Dtype dtype, int function, cudaStream_t stream);

// act, dgate, dup from dact, gate, up, and over them if wanted; without `up`, act and dgate from dact and gate.
struct GluBackward {
  int64_t rows, width;
  Input dact, gate, up;
  Output act, dgate, dup;
};
void glu_backward(const GluBackward& a, Dtype dtype, int function, cudaStream_t stream);

// y, rstd and, for LayerNorm, mean (null for RMSNorm) of x, or of total = x + residual as it is rounded when stored.
// weight and bias may be null; they hold float32 or x's dtype. residual and total are both there or both null.
struct NormForward {
  int64_t rows, width;
  Input x, residual;
  Output y, total;
  const void *weight, *bias;
  bool float_weights;
  float *mean, *rstd;
  float eps;
};
void norm_forward(const NormForward& a, Dtype dtype, cudaStream_t stream);

// dx, or dx += it with `add`, and each block's share of dw and, with a mean, db: rows of `width` in dw_shares and
// db_shares, null if not wanted. dx may be dy or x.
struct NormBackward {
  int64_t rows, width;
  Input dy, x;
  Output dx;
  const void* weight;
  bool float_weights;
  const float *mean, *rstd;
  bool add;
  float *dw_shares, *db_shares;
};
// How many blocks, hence shares, norm_backward will have on this device.
int64_t norm_backward_blocks(const NormBackward& a, Dtype dtype, int device);
void norm_backward(const NormBackward& a, Dtype dtype, int device, cudaStream_t stream);

// dw and db (width), which may be null, are the sums of their shares (blocks, width), in one order.
struct NormShares {
  int64_t blocks, width;
  const float *dw_shares, *db_shares;
  float *dw, *db;
};
void sum_shares(const NormShares& a, cudaStream_t stream);

// Tokens of heads; in and out may be the same.
struct Heads {
  const void* in;
  void* out;
  int heads;
  int64_t in_token, in_head, out_token, out_head;  // strides
};

// The leading 2 half dims of every head turned by the angles of cos, sin (angles, half); token t has row t % angles.
// Pairs are (i, i + half), or (2i, 2i + 1) if interleaved. `second` may have no heads. Further dims are copied.
struct Rope {
  int64_t tokens, angles;
  int half, dim;
  const float *cos, *sin;
  Heads first, second;
  bool inverse, copy_rest;
};
void rope(const Rope& a, Dtype dtype, bool interleaved, cudaStream_t stream);

// out = residual + factor x where kept (pyckpt.ops.philox.kept_rows), else residual, which may be null. x is of
// `dtype`; out and residual are too, or float32. out may be x.
struct Dropout {
  int64_t rows, width;
  Input x, residual;
  Output out;
  uint64_t seed;
  int64_t first;
  uint32_t threshold;
  float factor;
};
void dropout(const Dropout& a, Dtype dtype, bool float_out, cudaStream_t stream);

// (batch, tokens, heads, dim) by strides; a unit stride within a head.
struct Layout {
  int64_t batch, token, head;
};

// delta (batch, heads, tokens) = the sum over a head of dout o, less dlse of the same layout, which may be null.
struct Delta {
  int64_t batch, tokens, heads;
  int dim;
  const void *dout, *o;
  Layout of_dout, of_o;
  const float* dlse;
  float* delta;
};
void attention_delta(const Delta& a, Dtype dtype, cudaStream_t stream);

// (o, lse) of all keys over (o, lse) of some, with (part_o, part_lse) of the others. lse (batch, heads, tokens).
// part_o is of `dtype`, o too or float32.
struct MergeParts {
  int64_t batch, tokens, heads;
  int dim;
  void* o;
  const void* part_o;
  Layout of_o, of_part;
  float* lse;
  const float* part_lse;
};
void attention_merge(const MergeParts& a, Dtype dtype, bool float_out, cudaStream_t stream);

// Loss and lse of rows of logits, unless loss is null: then lse is read; with `gradient` the gradient of the raw logits
// over them. bias and upstream may be null; bias holds float32 or the logits' dtype. See cross_entropy.cu.
struct CrossEntropy {
  int64_t rows, vocab;
  Output logits;
  const void* bias;
  bool float_bias;
  const int64_t* target;
  const float* upstream;
  float *loss, *lse;
  int64_t ignore_index;
  float softcap, z_loss, smoothing;
  bool gradient;
};
void cross_entropy(const CrossEntropy& a, Dtype dtype, cudaStream_t stream);

// Whether the build has code that the current device runs; all kernels are built for the same ones.
cudaError_t code_for_device();

}  // namespace pyckpt
