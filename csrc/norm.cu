// RMSNorm (Zhang & Sennrich 2019, eq. 4) and LayerNorm (Ba et al. 2016): one pass over memory each way.
//
// With xhat = (x - mean) rstd (RMSNorm: mean 0), y = xhat w + b, and g = dy w, D columns:
//
//     dx = rstd (g - xhat sum(g xhat) / D - sum(g) / D)        (RMSNorm: without the last term)
//
// Forward: a row lies in the registers of a part of a warp, a warp or a block, from the load to the store. Backward:
// blocks stay and walk through the rows with a fixed stride. The next row comes into shared memory (cp.async, every
// thread its own vectors, so that no barrier is needed) while this one is computed; the sums of dw and db lie in
// registers, and go out once, as the block's share. sum_shares adds the shares up. All orders are fixed.
// Rows that are too wide for that, or not aligned to 16 bytes, are gone through in pieces, again from the caches.

#include "launch.cuh"
#include "reduce.h"

namespace pyckpt {
namespace {

constexpr int kVectors = 4;        // of a row in one thread
constexpr int kForwardMost = 1024;  // threads of a row
constexpr int kBackwardMost = 512;
constexpr int kPart = 128;      // threads of a block whose rows take a warp or less
constexpr int kPieces = 512;    // threads of a row that is gone through in pieces
constexpr int kResident = 512;  // threads of the backward on a multiprocessor: 128 registers each
constexpr int kResidentPieces = 1024;  // and where rows go in pieces: 64

// What weights are: none, of x's dtype, float32 where x is not, or any of these, to be seen when they are loaded.
enum class Weight { none, same, floats, any };

template <class T, Weight W, int N>
__device__ __forceinline__ void load_weight(const void* p, bool floats, int64_t c, float (&out)[N]) {
  if constexpr (W == Weight::none) {
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = 1.0f;
  } else if constexpr (W == Weight::any) {
    load_mixed<T, N>(p, floats, c, out);
  } else {
    using S = std::conditional_t<W == Weight::same, T, float>;
    unpack(load<S, N>(static_cast<const S*>(p) + c), out);
  }
}

// --- forward ---

// A bias is of the weight's kind; without a weight, of any.
template <class T, Weight W, int N>
__device__ __forceinline__ void write_normal(const NormForward& a, T* y, int64_t c, Vector<T, N> raw, float mean,
                                             float rstd) {
  float x[N], w[N];
  unpack(raw, x);
#pragma unroll
  for (int j = 0; j < N; ++j) x[j] = (x[j] - mean) * rstd;
  if (W != Weight::none && a.weight) {
    load_weight<T, W>(a.weight, a.float_weights, c, w);
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] *= w[j];
  }
  if (a.bias) {
    load_weight<T, W == Weight::none ? Weight::any : W>(a.bias, a.float_weights, c, w);
#pragma unroll
    for (int j = 0; j < N; ++j) x[j] += w[j];
  }
  store(y + c, pack<T>(x));
}

// x + r as it is rounded when stored, which is what a backward will see.
template <class T, int N>
__device__ __forceinline__ Vector<T, N> sum_of(const Vector<T, N>& x, const Vector<T, N>& r) {
  float a[N], b[N];
  unpack(x, a);
  unpack(r, b);
#pragma unroll
  for (int j = 0; j < N; ++j) a[j] += b[j];
  return pack<T>(a);
}

// BLOCK: a row is a block's. Else `lanes` neighbours in a warp have one.
template <class T, Weight W, bool CENTERED, bool BLOCK>
__global__ void __launch_bounds__(BLOCK ? kForwardMost : kPart, BLOCK ? 1 : kForwardMost / kPart)
    norm_fwd_kernel(const NormForward a, const int lanes) {
  constexpr int N = kWide<T>;
  __shared__ float parts[2][BLOCK ? kForwardMost / 32 : 1];
  const int across = BLOCK ? blockDim.x : lanes;
  const int lane = BLOCK ? threadIdx.x : threadIdx.x & (lanes - 1);
  const int shift = __ffs(lanes) - 1;
  const int64_t row =
      BLOCK ? blockIdx.x : static_cast<int64_t>(blockIdx.x) * (kPart >> shift) + (threadIdx.x >> shift);
  const int width = BLOCK || row < a.rows ? static_cast<int>(a.width) : 0;  // without a row: part of the shuffles only
  const T* x = at<T>(a.x, row);
  const auto column = [&](int i) { return (lane + i * across) * N; };
  const auto over_row = [&](float v, float* shared) {
    return BLOCK ? over_block(v, Add(), shared) : over_lanes(v, Add(), lanes);
  };

  Vector<T, N> raw[kVectors];
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (column(i) < width) raw[i] = load<T, N>(x + column(i));
  }
  if (a.residual.p) {
    const T* residual = at<T>(a.residual, row);
    T* total = at<T>(a.total, row);
    Vector<T, N> other[kVectors];
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (column(i) < width) other[i] = load<T, N>(residual + column(i));
    }
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (column(i) < width) {
        raw[i] = sum_of(raw[i], other[i]);
        store(total + column(i), raw[i]);
      }
    }
  }

  float mean = 0.0f, sum = 0.0f;
  if constexpr (CENTERED) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (column(i) < width) {
        float v[N];
        unpack(raw[i], v);
#pragma unroll
        for (int j = 0; j < N; ++j) sum += v[j];
      }
    }
    mean = over_row(sum, parts[0]) / static_cast<float>(a.width);
    sum = 0.0f;
#pragma unroll
    for (int i = 0; i < kVectors; ++i) forget(raw[i]);
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (column(i) < width) {
      float v[N];
      unpack(raw[i], v);
#pragma unroll
      for (int j = 0; j < N; ++j) sum += (v[j] - mean) * (v[j] - mean);
    }
  }
#pragma unroll
  for (int i = 0; i < kVectors; ++i) forget(raw[i]);
  const float rstd = reciprocal_root(over_row(sum, parts[1]) / static_cast<float>(a.width) + a.eps);

  T* y = at<T>(a.y, row);
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
    if (column(i) < width) write_normal<T, W>(a, y, column(i), raw[i], mean, rstd);
  }
  if (lane == 0 && width) {
    a.rstd[row] = rstd;
    if constexpr (CENTERED) a.mean[row] = mean;
  }
}

template <class T, int N, bool CENTERED>
__global__ void __launch_bounds__(kPieces, kResidentPieces / kPieces) norm_fwd_kernel_pieces(const NormForward a) {
  __shared__ float parts[2][kPieces / 32];
  const int64_t row = blockIdx.x, first = static_cast<int64_t>(threadIdx.x) * N, step = kPieces * N;
  const T* x = at<T>(a.x, row);
  float mean = 0.0f, sum = 0.0f;
  if (CENTERED || a.residual.p) {
    const T* residual = at<T>(a.residual, row);
    T* total = at<T>(a.total, row);
    for (int64_t c = first; c < a.width; c += step) {
      Vector<T, N> v = load<T, N>(x + c);
      if (a.residual.p) {
        v = sum_of(v, load<T, N>(residual + c));
        store(total + c, v);
      }
      float z[N];
      unpack(v, z);
#pragma unroll
      for (int j = 0; j < N; ++j) sum += z[j];
    }
    if (a.residual.p) x = total;  // each thread reads again what it wrote itself
    if constexpr (CENTERED) mean = over_block(sum, Add(), parts[0]) / static_cast<float>(a.width);
    sum = 0.0f;
  }
  for (int64_t c = first; c < a.width; c += step) {
    float z[N];
    unpack(load<T, N>(x + c), z);
#pragma unroll
    for (int j = 0; j < N; ++j) sum += (z[j] - mean) * (z[j] - mean);
  }
  const float rstd = reciprocal_root(over_block(sum, Add(), parts[1]) / static_cast<float>(a.width) + a.eps);
  T* y = at<T>(a.y, row);
  for (int64_t c = first; c < a.width; c += step) write_normal<T, Weight::any>(a, y, c, load<T, N>(x + c), mean, rstd);
  if (threadIdx.x == 0) {
    a.rstd[row] = rstd;
    if constexpr (CENTERED) a.mean[row] = mean;
  }
}

// --- backward ---

// dy, xhat and g of a vector.
template <class T, int N>
struct Normal {
  float dy[N], hat[N], g[N];

  __device__ __forceinline__ Normal(const NormBackward& a, const Vector<T, N>& raw_dy, const Vector<T, N>& raw_x,
                                    int64_t c, float mean, float rstd) {
    unpack(raw_dy, dy);
    unpack(raw_x, hat);
#pragma unroll
    for (int j = 0; j < N; ++j) hat[j] = (hat[j] - mean) * rstd;
    if (a.weight) {
      load_mixed<T, N>(a.weight, a.float_weights, c, g);
#pragma unroll
      for (int j = 0; j < N; ++j) g[j] *= dy[j];
    } else {
#pragma unroll
      for (int j = 0; j < N; ++j) g[j] = dy[j];
    }
  }

  __device__ __forceinline__ void add_to(Sums& sums) const {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      sums.a += g[j] * hat[j];
      sums.b += g[j];
    }
  }

  __device__ __forceinline__ void write(const NormBackward& a, T* dx, int64_t c, float dot, float shift, float rstd) const {
    float out[N];
#pragma unroll
    for (int j = 0; j < N; ++j) out[j] = (g[j] - hat[j] * dot - shift) * rstd;
    if (a.add) {
      float before[N];
      unpack(load<T, N>(dx + c), before);
#pragma unroll
      for (int j = 0; j < N; ++j) out[j] += before[j];
    }
    store(dx + c, pack<T>(out));
  }
};

#ifdef PYCKPT_EMULATED
inline void copy_16_bytes(uint4* to, const void* from, bool there) { emulator::copy_later(to, from, there); }
inline void end_of_copies() { emulator::commit_copies(); }
inline void wait_for_copies_before() { emulator::wait_for_copies(1); }
inline void wait_for_all_copies() { emulator::wait_for_copies(0); }
#else
// 16 bytes, or zeros; `from` is not read then.
__device__ __forceinline__ void copy_16_bytes(uint4* to, const void* from, bool there) {
#if __CUDA_ARCH__ >= 800
  const unsigned address = static_cast<unsigned>(__cvta_generic_to_shared(to));
  const int bytes = there ? 16 : 0;
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(address), "l"(from), "r"(bytes) : "memory");
#else
  *to = there ? *static_cast<const uint4*>(from) : uint4{};
#endif
}

__device__ __forceinline__ void end_of_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until all copies of this thread but those after the last end_of_copies() have arrived.
__device__ __forceinline__ void wait_for_copies_before() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_group 1;" ::: "memory");
#endif
}

__device__ __forceinline__ void wait_for_all_copies() {
#if __CUDA_ARCH__ >= 800
  asm volatile("cp.async.wait_all;" ::: "memory");
#endif
}
#endif

// Sum over the rows of a warp's groups, then over the warps, and write the block's share of a row of weights.
template <int N>
__device__ __forceinline__ void write_share(float (&sums)[kVectors][N], float* share, float* shared, int lanes,
                                            int64_t width) {
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kVectors; ++i) {
#pragma unroll
    for (int j = 0; j < N; ++j) {
      for (int distance = lanes; distance < 32; distance *= 2) sums[i][j] += exchanged(sums[i][j], distance);
    }
    const int64_t c = (lane + static_cast<int64_t>(i) * lanes) * N;
    if (lane < lanes && c < width) {
#pragma unroll
      for (int j = 0; j < N; ++j) shared[warp * width + c + j] = sums[i][j];
    }
  }
  __syncthreads();
  for (int64_t c = threadIdx.x; c < width; c += kPart) {
    float sum = shared[c];
    for (int i = 1; i < kPart / 32; ++i) sum += shared[i * width + c];
    share[c] = sum;
  }
  __syncthreads();
}

// Sum of g xhat and, with a mean, of g over the threads of a row.
template <bool CENTERED, bool BLOCK>
__device__ __forceinline__ Sums over_row(Sums sums, Sums* shared, int lanes) {
  if constexpr (CENTERED) return BLOCK ? over_block(sums, AddBoth(), shared) : over_lanes(sums, AddBoth(), lanes);
  float* parts = reinterpret_cast<float*>(shared);
  return {BLOCK ? over_block(sums.a, Add(), parts) : over_lanes(sums.a, Add(), lanes), 0.0f};
}

// What counts here is how many instructions a value takes: at 42 of them, with a branch around every vector and 64-bit
// products for every address, an H200 was busy issuing them. So what lies beyond a row's end comes in as zeros and is
// computed like the rest, a row's address is the last one's and a step, and no vector has a branch of its own.
template <class T, Weight W, bool CENTERED, bool BLOCK>
__global__ void __launch_bounds__(BLOCK ? kBackwardMost : kPart, BLOCK ? 1 : kResident / kPart)
    norm_bwd_kernel(const NormBackward a, const int lanes, const int vectors) {
  constexpr int N = kWide<T>;
  constexpr bool EARLY = !CENTERED;  // dx's old values come before the reduction; with db there are no registers for it
  PYCKPT_DYNAMIC_SHARED(uint4, buffer);  // [stage][dy or x][kVectors][threads]
  __shared__ Sums parts[2][BLOCK ? kBackwardMost / 32 : 1];
  const int threads = BLOCK ? blockDim.x : kPart, plane = kVectors * threads;
  const int across = BLOCK ? threads : lanes;
  const int lane = BLOCK ? threadIdx.x : threadIdx.x & (lanes - 1);
  const int groups = BLOCK ? 1 : kPart / lanes;
  const int width = static_cast<int>(a.width);
  const int64_t step = static_cast<int64_t>(gridDim.x) * groups;
  const int64_t first = static_cast<int64_t>(blockIdx.x) * groups + (BLOCK ? 0 : threadIdx.x / lanes);
  // The same for all lanes of a warp, for the sake of the shuffles: some have no row in the last one.
  const int trips = static_cast<int>((a.rows - static_cast<int64_t>(blockIdx.x) * groups + step - 1) / step);
  const auto column = [&](int i) { return (lane + i * across) * N; };
  uint4* const mine = buffer + threadIdx.x;

  float rstd_ahead, mean_ahead = 0.0f;
  const auto fetch = [&](int64_t row, int stage) {
    uint4* to = mine + stage * 2 * plane;
    const bool there = row < a.rows;
    const T *dy = at<T>(a.dy, row), *x = at<T>(a.x, row);
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      const bool inside = there && column(i) < width;
      copy_16_bytes(to + i * threads, dy + column(i), inside);
      copy_16_bytes(to + plane + i * threads, x + column(i), inside);
    }
    end_of_copies();
    rstd_ahead = there ? a.rstd[row] : 0.0f;
    if constexpr (CENTERED) mean_ahead = there ? a.mean[row] : 0.0f;
  };

  float dw[kVectors][N] = {}, db[CENTERED ? kVectors : 1][N] = {};
  fetch(first, 0);
  int64_t row = first;
  for (int trip = 0; trip < trips; ++trip, row += step) {
    const int stage = trip & 1;
    const float rstd = rstd_ahead, mean = mean_ahead;
    fetch(row + step, stage ^ 1);
    const int end = BLOCK || row < a.rows ? width : 0;
    T* dx = at<T>(a.dx, row);
    Vector<T, N> before[EARLY ? kVectors : 1];
    if (EARLY && a.add) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (column(i) < end) before[i] = load<T, N>(dx + column(i));
      }
    }
    wait_for_copies_before();

    const T* own = reinterpret_cast<const T*>(mine + stage * 2 * plane);
    const auto fetched = [&](int which, int i) { return load<T, N>(own + (which * plane + i * threads) * N); };
    const auto weight = [&](int i, float(&w)[N]) { load_weight<T, W>(a.weight, a.float_weights, column(i) < width ? column(i) : 0, w); };
    Sums sums{0.0f, 0.0f};
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (i >= vectors) continue;
      float dy[N], hat[N], w[N];
      unpack(fetched(0, i), dy);
      unpack(fetched(1, i), hat);
      weight(i, w);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        hat[j] = (CENTERED ? hat[j] - mean : hat[j]) * rstd;
        dw[i][j] += dy[j] * hat[j];
        if constexpr (CENTERED) db[i][j] += dy[j];
        const float g = dy[j] * w[j];
        sums.a += g * hat[j];
        if constexpr (CENTERED) sums.b += g;
      }
    }
    sums = over_row<CENTERED, BLOCK>(sums, parts[stage], lanes);
    const float slope = sums.a / static_cast<float>(width) * rstd;
    const float shift = CENTERED ? sums.b / static_cast<float>(width) : 0.0f;

    const auto gradient = [&](int i, float(&out)[N]) {
      float dy[N], w[N];
      unpack(fetched(0, i), dy);
      unpack(fetched(1, i), out);
      weight(i, w);
#pragma unroll
      for (int j = 0; j < N; ++j) {
        const float g = CENTERED ? dy[j] * w[j] - shift : dy[j] * w[j];
        out[j] = (g - (CENTERED ? out[j] - mean : out[j]) * slope) * rstd;
      }
    };
    if (a.add) {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (i >= vectors) continue;
        float out[N], old[N];
        gradient(i, out);
        if (column(i) < end) {
          unpack(EARLY ? before[i] : load<T, N>(dx + column(i)), old);
#pragma unroll
          for (int j = 0; j < N; ++j) out[j] += old[j];
          store(dx + column(i), pack<T>(out));
        }
      }
    } else {
#pragma unroll
      for (int i = 0; i < kVectors; ++i) {
        if (i >= vectors) continue;
        float out[N];
        gradient(i, out);
        if (column(i) < end) store(dx + column(i), pack<T>(out));
      }
    }
  }

  if (!a.dw_shares) return;
  float* dw_share = a.dw_shares + blockIdx.x * a.width;
  float* db_share = CENTERED ? a.db_shares + blockIdx.x * a.width : nullptr;
  if constexpr (BLOCK) {
#pragma unroll
    for (int i = 0; i < kVectors; ++i) {
      if (column(i) < a.width) {
#pragma unroll
        for (int j = 0; j < N; ++j) {
          dw_share[column(i) + j] = dw[i][j];
          if constexpr (CENTERED) db_share[column(i) + j] = db[i][j];
        }
      }
    }
  } else {
    wait_for_all_copies();  // the zeros beyond the last row may still be on their way into the buffer
    __syncthreads();        // no thread is to write where another still reads its row
    write_share(dw, dw_share, reinterpret_cast<float*>(buffer), lanes, a.width);
    if constexpr (CENTERED) write_share(db, db_share, reinterpret_cast<float*>(buffer), lanes, a.width);
  }
}

template <class T, int N, bool CENTERED>
__global__ void __launch_bounds__(kPieces, kResidentPieces / kPieces) norm_bwd_kernel_pieces(const NormBackward a) {
  __shared__ Sums parts[2][kPieces / 32];
  const int64_t first = static_cast<int64_t>(threadIdx.x) * N, step = kPieces * N;
  float* dw_share = a.dw_shares + blockIdx.x * a.width;
  float* db_share = a.db_shares + blockIdx.x * a.width;
  int turn = 0;
  for (int64_t row = blockIdx.x; row < a.rows; row += gridDim.x, turn ^= 1) {
    const T* dy = at<T>(a.dy, row);
    const T* x = at<T>(a.x, row);
    T* dx = at<T>(a.dx, row);
    const float rstd = a.rstd[row], mean = CENTERED ? a.mean[row] : 0.0f;
    Sums sums{0.0f, 0.0f};
    for (int64_t c = first; c < a.width; c += step) {
      Normal<T, N>(a, load<T, N>(dy + c), load<T, N>(x + c), c, mean, rstd).add_to(sums);
    }
    sums = over_block(sums, AddBoth(), parts[turn]);
    const float dot = sums.a / static_cast<float>(a.width);
    const float shift = CENTERED ? sums.b / static_cast<float>(a.width) : 0.0f;
    for (int64_t c = first; c < a.width; c += step) {
      const Normal<T, N> n(a, load<T, N>(dy + c), load<T, N>(x + c), c, mean, rstd);
      n.write(a, dx, c, dot, shift, rstd);
      if (a.dw_shares) {
        // This block's own share, and in it this thread's own columns.
        const bool begin = row == blockIdx.x;
#pragma unroll
        for (int j = 0; j < N; ++j) {
          dw_share[c + j] = (begin ? 0.0f : dw_share[c + j]) + n.dy[j] * n.hat[j];
          if constexpr (CENTERED) db_share[c + j] = (begin ? 0.0f : db_share[c + j]) + n.dy[j];
        }
      }
    }
  }
}

// A block adds up 32 columns: each of its warps every 32nd share, then the first warp the warps' sums. The first half of
// the blocks has dw, the second, if there is one, db.
__global__ void __launch_bounds__(1024) sum_shares_kernel(const NormShares a) {
  __shared__ float sums[32][32];
  const int64_t parts = (a.width + 31) / 32;
  const bool second = blockIdx.x >= parts;
  const float* shares = second ? a.db_shares : a.dw_shares;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t c = (blockIdx.x - (second ? parts : 0)) * 32 + lane;
  float sum = 0.0f;
  if (c < a.width) {
#pragma unroll 8
    for (int64_t i = warp; i < a.blocks; i += 32) sum += shares[i * a.width + c];
  }
  sums[warp][lane] = sum;
  __syncthreads();
  if (warp == 0 && c < a.width) {
    for (int i = 1; i < 32; ++i) sum += sums[i][lane];
    (second ? a.db : a.dw)[c] = sum;
  }
}

// --- launches ---

// How a row is divided: `lanes` threads of a warp, or a block of `threads`; 0 threads: in pieces.
struct Division {
  int threads, lanes, vectors;
  bool block;
};

// Rows of so many vectors. Narrow ones: `each` vectors to a lane, or more where a warp has no more lanes.
Division divide(int64_t vectors, int most, int each) {
  if (vectors > static_cast<int64_t>(most) * kVectors) return {0, 0, 0, true};
  if (vectors > 32 * kVectors) return {static_cast<int>(ceil_div(vectors, 32 * kVectors) * 32), 32, kVectors, true};
  const int lanes = ceil_div(vectors, each) < 32 ? power_of_two(ceil_div(vectors, each)) : 32;
  return {kPart, lanes, static_cast<int>(ceil_div(vectors, lanes)), false};
}

size_t buffer_bytes(const Division& d) { return static_cast<size_t>(d.threads) * kVectors * 4 * sizeof(uint4); }

struct BackwardPlan {
  Division division;  // 0 threads: in pieces
  bool vectors;
  int64_t blocks;
};

BackwardPlan plan(const NormBackward& a, Dtype dtype, int device) {
  const int size = size_of(dtype);
  const Rows weight(Input{a.weight, 0}, size);
  BackwardPlan p{};
  p.vectors = wide(a.width * size, {{a.dy, size}, {a.x, size}, {a.dx, size}, weight});
  if (p.vectors) p.division = divide(a.width * size / 16, kBackwardMost, kVectors);
  if (buffer_bytes(p.division) > most_dynamic_shared(device)) p.division = {};
  const int threads = p.division.threads ? p.division.threads : kPieces;
  const int rows_a_block = p.division.threads && !p.division.block ? kPart / p.division.lanes : 1;
  const int64_t processors = attribute(cudaDevAttrMultiProcessorCount, device);
  const int64_t resident = processors * ((p.division.threads ? kResident : kResidentPieces) / threads);
  const int64_t blocks = ceil_div(a.rows, rows_a_block);
  p.blocks = blocks < resident ? blocks : resident;
  return p;
}

// f(T{}, CENTERED) for a dtype and a norm.
template <class F>
void with_norm(Dtype dtype, bool centered, F f) {
  with_type(dtype, [&](auto t) {
    if (centered) {
      f(t, std::true_type{});
    } else {
      f(t, std::false_type{});
    }
  });
}

// f(W) for weights.
template <class T, class F>
void with_weight(const void* weight, bool floats, F f) {
  if (!weight) {
    f(std::integral_constant<Weight, Weight::none>{});
  } else if (sizeof(T) == 4 || !floats) {
    f(std::integral_constant<Weight, Weight::same>{});
  } else if constexpr (sizeof(T) != 4) {
    f(std::integral_constant<Weight, Weight::floats>{});
  }
}

}  // namespace

void norm_forward(const NormForward& a, Dtype dtype, cudaStream_t stream) {
  const int size = size_of(dtype);
  const bool vectors = wide(a.width * size, {{a.x, size}, {a.residual, size}, {a.y, size}, {a.total, size},
                                             {Input{a.weight, 0}, size}, {Input{a.bias, 0}, size}});
  with_norm(dtype, a.mean != nullptr, [&](auto t, auto centered) {
    using T = decltype(t);
    constexpr bool C = centered.value;
    const Division d = vectors ? divide(a.width / kWide<T>, kForwardMost, 1) : Division{};
    if (!vectors) {
      launch(norm_fwd_kernel_pieces<T, 1, C>, a.rows, kPieces, 0, stream, a);
    } else if (!d.threads) {
      launch(norm_fwd_kernel_pieces<T, kWide<T>, C>, a.rows, kPieces, 0, stream, a);
    } else {
      const int64_t blocks = d.block ? a.rows : ceil_div(a.rows * d.lanes, kPart);
      with_weight<T>(a.weight, a.float_weights, [&](auto w) {
        const auto kernel = d.block ? norm_fwd_kernel<T, w.value, C, true> : norm_fwd_kernel<T, w.value, C, false>;
        launch(kernel, blocks, d.threads, 0, stream, a, d.lanes);
      });
    }
  });
}

int64_t norm_backward_blocks(const NormBackward& a, Dtype dtype, int device) { return plan(a, dtype, device).blocks; }

void norm_backward(const NormBackward& a, Dtype dtype, int device, cudaStream_t stream) {
  const BackwardPlan p = plan(a, dtype, device);
  const Division& d = p.division;
  with_norm(dtype, a.mean != nullptr, [&](auto t, auto centered) {
    using T = decltype(t);
    constexpr bool C = centered.value;
    if (!p.vectors) {
      launch(norm_bwd_kernel_pieces<T, 1, C>, p.blocks, kPieces, 0, stream, a);
    } else if (!d.threads) {
      launch(norm_bwd_kernel_pieces<T, kWide<T>, C>, p.blocks, kPieces, 0, stream, a);
    } else {
      with_weight<T>(a.weight, a.float_weights, [&](auto w) {
        const auto kernel = d.block ? norm_bwd_kernel<T, w.value, C, true> : norm_bwd_kernel<T, w.value, C, false>;
        launch(kernel, p.blocks, d.threads, buffer_bytes(d), stream, a, d.lanes, d.vectors);
      });
    }
  });
}

void sum_shares(const NormShares& a, cudaStream_t stream) {
  launch(sum_shares_kernel, ceil_div(a.width, 32) * (a.db ? 2 : 1), 1024, 0, stream, a);
}

cudaError_t code_for_device() {
  cudaFuncAttributes found;
  return cudaFuncGetAttributes(&found, reinterpret_cast<const void*>(sum_shares_kernel));
}

}  // namespace pyckpt
