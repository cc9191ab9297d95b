// Elementwise kernels around the fp8 GEMM. Arithmetic is fp32; E4M3 rounds half to even and saturates to +-448.
//
// Every pointer must be 16-byte aligned and every row length a multiple of 16 elements (checked by the callers).
#pragma once
#include <cuda_fp16.h>
#include <cuda_fp8.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace qexport {

constexpr int kThreads = 256;
constexpr int kNormWarps = 4;     // rows per block of the norm kernel
constexpr int kNormMaxSteps = 16; // 16 steps of 256 elements: D <= 4096

__device__ inline uint16_t to_e4m3x2(float lo, float hi) {
  return __nv_cvt_float2_to_fp8x2(make_float2(lo, hi), __NV_SATFINITE, __NV_E4M3);
}

__device__ inline void unpack8(uint4 packed, float out[8]) {
  const __half2* h = reinterpret_cast<const __half2*>(&packed);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const float2 f = __half22float2(h[i]);
    out[2 * i] = f.x;
    out[2 * i + 1] = f.y;
  }
}

__device__ inline uint2 pack8_e4m3(const float v[8], float inverse_scale) {
  uint32_t words[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t lo = to_e4m3x2(v[4 * i] * inverse_scale, v[4 * i + 1] * inverse_scale);
    const uint32_t hi = to_e4m3x2(v[4 * i + 2] * inverse_scale, v[4 * i + 3] * inverse_scale);
    words[i] = lo | (hi << 16);
  }
  return make_uint2(words[0], words[1]);
}

__device__ inline uint4 pack8_half(const float v[8]) {
  uint4 packed;
  __half2* h = reinterpret_cast<__half2*>(&packed);
#pragma unroll
  for (int i = 0; i < 4; ++i) h[i] = __floats2half2_rn(v[2 * i], v[2 * i + 1]);
  return packed;
}

// GELU by tanh: 0.5 v (1 + tanh(sqrt(2/pi) (v + 0.044715 v^3))).
__device__ inline float gelu_tanh(float v) {
  return 0.5f * v * (1.0f + tanhf(0.7978845608028654f * (v + 0.044715f * v * v * v)));
}

// q = e4m3(x * inverse_scale) for count16 groups of 16 elements.
__global__ void quantise_kernel(const uint4* __restrict__ x, uint4* __restrict__ q, float inverse_scale,
                                int64_t count16) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count16) return;
  float v[8];
  unpack8(x[2 * i], v);
  const uint2 lo = pack8_e4m3(v, inverse_scale);
  unpack8(x[2 * i + 1], v);
  const uint2 hi = pack8_e4m3(v, inverse_scale);
  q[i] = make_uint4(lo.x, lo.y, hi.x, hi.y);
}

// What cublasLt did not fuse: y = convert(gelu?(t * channel_scale? + bias?)), 8 columns a thread.
// t is [M, N] in fp16 or fp32; y is fp16, or e4m3 of y * inverse_scale. t may be y itself (same type, same index).
template <bool kInFloat, bool kOutFp8>
__global__ void finish_kernel(const void* t, void* y, const float* __restrict__ channel_scale,
                              const __half* __restrict__ bias, bool gelu, float inverse_scale, int64_t columns8,
                              int64_t count8) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i >= count8) return;
  const int64_t column = (i % columns8) * 8;
  float v[8];
  if constexpr (kInFloat) {
    const float4 lo = static_cast<const float4*>(t)[2 * i];
    const float4 hi = static_cast<const float4*>(t)[2 * i + 1];
    v[0] = lo.x, v[1] = lo.y, v[2] = lo.z, v[3] = lo.w;
    v[4] = hi.x, v[5] = hi.y, v[6] = hi.z, v[7] = hi.w;
  } else {
    unpack8(static_cast<const uint4*>(t)[i], v);
  }
  if (channel_scale != nullptr) {
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] *= channel_scale[column + j];
  }
  if (bias != nullptr) {
    float b[8];
    unpack8(*reinterpret_cast<const uint4*>(bias + column), b);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] += b[j];
  }
  if (gelu) {
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = gelu_tanh(v[j]);
  }
  if constexpr (kOutFp8) {
    static_cast<uint2*>(y)[i] = pack8_e4m3(v, inverse_scale);
  } else {
    static_cast<uint4*>(y)[i] = pack8_half(v);
  }
}

__global__ void fill_kernel(float* out, float value, int64_t count) {
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kThreads + threadIdx.x;
  if (i < count) out[i] = value;
}

__device__ inline float warp_sum(float v) {
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) v += __shfl_xor_sync(0xffffffffu, v, offset);
  return v;
}

// q = e4m3(inverse_scale * (LayerNorm(x) * (1 + scale[b]) + shift[b])), one warp a row, the row kept in registers.
// x [rows, D] fp16; scale, shift [1 or B, D] fp16; b = row / rows_per_batch, or 0 when modulation_stride is 0.
template <int kSteps>
__global__ void modulated_norm_kernel(const __half* __restrict__ x, const __half* __restrict__ scale,
                                      const __half* __restrict__ shift, uint2* __restrict__ q, int64_t rows, int vectors,
                                      int64_t rows_per_batch, int64_t modulation_stride, float epsilon,
                                      float inverse_scale) {
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kNormWarps + threadIdx.x / 32;
  const int lane = threadIdx.x % 32;
  if (row >= rows) return;  // Whole warps leave together: the shuffles below stay complete.
  const uint4* row_x = reinterpret_cast<const uint4*>(x) + row * vectors;
  uint4 held[kSteps];
  float sum = 0.0f;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int vector = lane + 32 * s;
    if (vector < vectors) held[s] = row_x[vector];
  }
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if (lane + 32 * s >= vectors) continue;
    float v[8];
    unpack8(held[s], v);
#pragma unroll
    for (int j = 0; j < 8; ++j) sum += v[j];
  }
  const float count = 8.0f * static_cast<float>(vectors);
  const float mean = warp_sum(sum) / count;
  float squares = 0.0f;
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    if (lane + 32 * s >= vectors) continue;
    float v[8];
    unpack8(held[s], v);
#pragma unroll
    for (int j = 0; j < 8; ++j) squares += (v[j] - mean) * (v[j] - mean);
  }
  const float inverse_std = 1.0f / sqrtf(warp_sum(squares) / count + epsilon);
  const int64_t offset = row / rows_per_batch * modulation_stride;
  const uint4* row_scale = reinterpret_cast<const uint4*>(scale + offset);
  const uint4* row_shift = reinterpret_cast<const uint4*>(shift + offset);
#pragma unroll
  for (int s = 0; s < kSteps; ++s) {
    const int vector = lane + 32 * s;
    if (vector >= vectors) continue;
    float v[8], a[8], b[8];
    unpack8(held[s], v);
    unpack8(row_scale[vector], a);
    unpack8(row_shift[vector], b);
#pragma unroll
    for (int j = 0; j < 8; ++j) v[j] = (v[j] - mean) * inverse_std * (1.0f + a[j]) + b[j];
    q[row * vectors + vector] = pack8_e4m3(v, inverse_scale);
  }
}

}  // namespace qexport
