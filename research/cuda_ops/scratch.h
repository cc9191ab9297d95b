// Device memory that outlives a call: one set of buffers per (device, stream).
//
// Work on one stream runs in order, so nodes of a session can share these buffers; two sessions have two streams.
// A buffer that grows leaves its predecessor allocated, since a captured CUDA graph may still hold its address.
// Nothing is freed before the process ends. Growing while the stream is captured is an error, not an allocation.
#pragma once
#include <cuda_runtime.h>

#include <array>
#include <map>
#include <utility>

#include "kernels.cuh"
#include "lt_api.h"

namespace qexport {

constexpr size_t kWorkspaceBytes = size_t{32} << 20;  // what NVIDIA recommends for Hopper

inline bool capturing(cudaStream_t stream) {
  cudaStreamCaptureStatus status = cudaStreamCaptureStatusNone;
  check_cuda(cudaStreamIsCapturing(stream, &status), "cudaStreamIsCapturing");
  return status != cudaStreamCaptureStatusNone;
}

inline void* device_alloc(size_t size_bytes, cudaStream_t stream) {
  if (capturing(stream)) throw std::runtime_error("first run of a shape inside a CUDA graph capture: run it once before");
  void* out = nullptr;
  check_cuda(cudaMalloc(&out, size_bytes), "cudaMalloc");
  return out;
}

inline void fill(float* out, float value, int64_t count, cudaStream_t stream) {
  fill_kernel<<<static_cast<unsigned>((count + kThreads - 1) / kThreads), kThreads, 0, stream>>>(out, value, count);
  check_cuda(cudaGetLastError(), "fill_kernel");
}

enum class Slot { kWorkspace, kActivations, kResult, kOnes };

class Scratch {
 public:
  explicit Scratch(cudaStream_t stream) : stream_(stream) {}

  // At least size_bytes of 256-byte aligned memory, the same address until a larger size is asked for.
  void* get(Slot slot, size_t size_bytes) {
    Buffer& buffer = buffers_[static_cast<size_t>(slot)];
    if (buffer.size_bytes >= size_bytes) return buffer.data;
    size_t rounded = size_t{1} << 16;
    while (rounded < size_bytes) rounded *= 2;
    buffer.data = device_alloc(rounded, stream_);
    buffer.size_bytes = rounded;
    if (slot == Slot::kOnes) fill(static_cast<float*>(buffer.data), 1.0f, static_cast<int64_t>(rounded / 4), stream_);
    return buffer.data;
  }

 private:
  struct Buffer {
    void* data = nullptr;
    size_t size_bytes = 0;
  };
  cudaStream_t stream_;
  std::array<Buffer, 4> buffers_;
};

// The scratch of a stream of the current device. The caller holds the library's lock.
inline Scratch& scratch_of(cudaStream_t stream) {
  static std::map<std::pair<int, cudaStream_t>, Scratch> all;
  int device = 0;
  check_cuda(cudaGetDevice(&device), "cudaGetDevice");
  return all.try_emplace({device, stream}, stream).first->second;
}

}  // namespace qexport
