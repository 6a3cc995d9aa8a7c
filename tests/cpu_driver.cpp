// Attention of one dense problem from standard input to standard output: for the tests of instruction sets that the
// machine lacks, in an emulator of another processor. In: 12 int64 (batch, queries, keys, heads, K/V heads, d_k, d_v,
// left, right, element, drop_below, seed), 3 doubles (scale, softcap, keep_factor), then q, k, v, do. Out: o, lse, dq,
// dk, dv.

#include <cstdio>
#include <cstdlib>
#include <vector>

#include "cpu/attention.h"

extern "C" {
const char* pyckpt_instruction_set(int64_t i);
int64_t pyckpt_argument_size();
int32_t pyckpt_attention_forward(const pyckpt::Attention*, int64_t, void*);
int32_t pyckpt_attention_backward(const pyckpt::Attention*, int64_t, void*);
}

namespace {

using Bytes = std::vector<char>;

Bytes read(size_t size) {
  Bytes bytes(size);
  if (std::fread(bytes.data(), 1, size, stdin) != size) std::exit(3);
  return bytes;
}

void write(const Bytes& bytes) { std::fwrite(bytes.data(), 1, bytes.size(), stdout); }

pyckpt::View rows(Bytes& bytes, int64_t seq, int64_t heads, int64_t d) {
  return {bytes.data(), seq * heads * d, heads * d, d};
}

}  // namespace

int main() {
  if (pyckpt_instruction_set(0) == nullptr || pyckpt_argument_size() != sizeof(pyckpt::Attention)) return 4;
  std::fprintf(stderr, "%s\n", pyckpt_instruction_set(0));
  int64_t n[12];
  double x[3];
  if (std::fread(n, sizeof n, 1, stdin) != 1 || std::fread(x, sizeof x, 1, stdin) != 1) return 3;
  const int64_t batch = n[0], sq = n[1], sk = n[2], heads = n[3], kv_heads = n[4], d_k = n[5], d_v = n[6];
  const size_t size = n[9] == pyckpt::kFloat32 ? 4 : 2;
  Bytes q = read(batch * sq * heads * d_k * size), k = read(batch * sk * kv_heads * d_k * size);
  Bytes v = read(batch * sk * kv_heads * d_v * size), grad_o = read(batch * sq * heads * d_v * size);
  Bytes o(grad_o.size(), -1), lse(batch * heads * sq * 4, -1);  // NaN
  Bytes dq(batch * sq * heads * d_k * 4), dk(batch * sk * kv_heads * d_k * 4), dv(batch * sk * kv_heads * d_v * 4);
  std::vector<pyckpt::Segment> segments;
  for (int64_t b = 0; b < batch; ++b) segments.push_back({b, 0, sq, 0, sk, sk - sq});
  pyckpt::Attention a = {};
  a.q = rows(q, sq, heads, d_k);
  a.k = rows(k, sk, kv_heads, d_k);
  a.v = rows(v, sk, kv_heads, d_v);
  a.o = rows(o, sq, heads, d_v);
  a.lse = {lse.data(), heads * sq, 1, sq};
  a.grad_o = rows(grad_o, sq, heads, d_v);
  a.dq = rows(dq, sq, heads, d_k);
  a.dk = rows(dk, sk, kv_heads, d_k);
  a.dv = rows(dv, sk, kv_heads, d_v);
  a.segments = segments.data();
  a.n_segments = batch;
  a.heads = heads;
  a.kv_heads = kv_heads;
  a.d_k = d_k;
  a.d_v = d_v;
  a.element = a.o_element = n[9];
  a.left = n[7];
  a.right = n[8];
  a.scale = x[0];
  a.softcap = x[1];
  a.drop_below = n[10];
  a.seed = n[11];
  a.keep_factor = x[2];
  a.threads = 1;
  if (pyckpt_attention_forward(&a, 0, nullptr) != 0 || pyckpt_attention_backward(&a, 0, nullptr) != 0) return 5;
  for (const Bytes* bytes : {&o, &lse, &dq, &dk, &dv}) write(*bytes);
  return 0;
}
