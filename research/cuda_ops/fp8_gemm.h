// y = act(scale_x * (x_MK . W_NK^T) * scale_w + bias): cublasLt with as much of it fused as the library offers.
//
// cublasLt is column-major: D^T [N, M] = op_T(W as [K, N]) . (x^T as [K, M]), the only fp8 layout Hopper has ("TN").
// Three plans are tried in this order, the first for which the library has an algorithm is kept for the shape:
//   0  everything in the epilogue, D in the output's type;
//   1  D in fp16 with the scales, then one kernel for bias, GELU and conversion;
//   2  D in fp32 without per-channel scales, then one kernel for all of it.
// Plans 1 and 2 are tried once more with M padded to 16 when M is not a multiple of it. scale_x is alpha; a per-tensor
// scale_w is the scalar scale of A; a per-channel one uses OUTER_VEC scaling (A: scale_w, B: ones), Hopper only.
#pragma once
#include <cstdint>
#include <cstdio>
#include <map>
#include <memory>
#include <tuple>

#include "scratch.h"

namespace qexport {

constexpr int kCandidates = 8;      // algorithms asked of the heuristic
constexpr int kTuneRepeats = 10;    // timed launches per candidate on the first run of a shape
constexpr int64_t kRowAlign = 16;   // elements; cublasLt's fp8 rule for K and N

struct GemmCall {
  const void* x;          // [M, K] e4m3
  const void* w;          // [N, K] e4m3
  const float* w_scale;   // [1] or [N], device
  const __half* bias;     // [N] or null
  void* y;                // [M, N] fp16 or e4m3
  const float* d_scale;   // [1] device, 1 / y_scale; null for fp16 output
  float alpha;            // scale_x
  float inverse_y_scale;  // the same as d_scale, for the finish kernel
  int64_t M, N, K;
  bool per_channel, gelu, out_fp8, fast_accum, tune;
};

inline bool verbose() {
  static const bool on = std::getenv("QEXPORT_FP8_VERBOSE") != nullptr;
  return on;
}

inline int64_t alignment_of(std::initializer_list<const void*> pointers) {
  uintptr_t bits = 0;
  for (const void* p : pointers) bits |= reinterpret_cast<uintptr_t>(p);
  if (bits % 16 != 0) throw std::runtime_error("a tensor is not 16-byte aligned");
  return bits % 256 == 0 ? 256 : 16;
}

struct Plan {
  int level = 0;
  int64_t rows = 0;  // M, or M padded to 16
  cublasLtMatmulDesc_t desc = nullptr;
  cublasLtMatrixLayout_t a = nullptr, b = nullptr, c = nullptr, d = nullptr;
  cublasLtMatmulAlgo_t algo{};
  size_t workspace_bytes = 0;

  Plan() = default;
  Plan(const Plan&) = delete;
  Plan& operator=(const Plan&) = delete;
  ~Plan() {
    if (desc != nullptr) lt().desc_destroy(desc);
    for (cublasLtMatrixLayout_t layout : {a, b, c, d})
      if (layout != nullptr) lt().layout_destroy(layout);
  }

  template <typename T>
  void set(cublasLtMatmulDescAttributes_t attribute, const T& value, const char* what) {
    check_lt(lt().desc_set(desc, attribute, &value, sizeof(value)), what);
  }
};

class Fp8Gemm {
 public:
  // Enqueues on `stream`. The first run of a shape asks cublasLt for algorithms, times them and allocates; later runs
  // only launch. The caller holds the library's lock.
  void run(const GemmCall& call, cudaStream_t stream) {
    const int64_t alignment = alignment_of({call.x, call.w, call.y, call.bias});
    int device = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    const Key key{device,        call.M,       call.N,    call.K,          alignment, call.per_channel,
                  call.bias != nullptr, call.gelu, call.out_fp8, call.fast_accum};
    auto found = plans_.find(key);
    if (found == plans_.end()) found = plans_.emplace(key, make_plan(call, alignment, stream)).first;
    Plan& plan = *found->second;
    bind(plan, call, scratch_of(stream));
    launch(plan, plan.algo, plan.workspace_bytes, call, stream);
    finish(plan, call, stream);
  }

 private:
  using Key = std::tuple<int, int64_t, int64_t, int64_t, int64_t, bool, bool, bool, bool, bool>;
  std::map<Key, std::unique_ptr<Plan>> plans_;
  std::map<int, cublasLtHandle_t> handles_;

  cublasLtHandle_t handle() {
    int device = 0;
    check_cuda(cudaGetDevice(&device), "cudaGetDevice");
    cublasLtHandle_t& out = handles_[device];
    if (out == nullptr) check_lt(lt().create(&out), "cublasLtCreate");
    return out;
  }

  static cudaDataType_t result_type(const Plan& plan, const GemmCall& call) {
    if (plan.level == 2) return CUDA_R_32F;
    return plan.level == 0 && call.out_fp8 ? CUDA_R_8F_E4M3 : CUDA_R_16F;
  }

  // Where the GEMM writes: y itself where the type and the row count allow it.
  static void* destination(const Plan& plan, const GemmCall& call, Scratch& scratch) {
    const bool direct = plan.level == 0 || (plan.level == 1 && !call.out_fp8 && plan.rows == call.M);
    if (direct) return call.y;
    return scratch.get(Slot::kResult, static_cast<size_t>(plan.rows * call.N) * (plan.level == 2 ? 4 : 2));
  }

  static void describe(Plan& plan, const GemmCall& call) {
    check_lt(lt().desc_create(&plan.desc, CUBLAS_COMPUTE_32F, CUDA_R_32F), "cublasLtMatmulDescCreate");
    plan.set(CUBLASLT_MATMUL_DESC_TRANSA, int32_t{CUBLAS_OP_T}, "TRANSA");
    plan.set(CUBLASLT_MATMUL_DESC_TRANSB, int32_t{CUBLAS_OP_N}, "TRANSB");
    plan.set(CUBLASLT_MATMUL_DESC_FAST_ACCUM, static_cast<int8_t>(call.fast_accum), "FAST_ACCUM");
    if (call.per_channel && plan.level < 2) {
      const int32_t mode = CUBLASLT_MATMUL_MATRIX_SCALE_OUTER_VEC_32F;
      plan.set(CUBLASLT_MATMUL_DESC_A_SCALE_MODE, mode, "A_SCALE_MODE");
      plan.set(CUBLASLT_MATMUL_DESC_B_SCALE_MODE, mode, "B_SCALE_MODE");
    }
    if (plan.level == 0) {
      const bool bias = call.bias != nullptr;
      const uint32_t epilogue = call.gelu ? (bias ? CUBLASLT_EPILOGUE_GELU_BIAS : CUBLASLT_EPILOGUE_GELU)
                                          : (bias ? CUBLASLT_EPILOGUE_BIAS : CUBLASLT_EPILOGUE_DEFAULT);
      plan.set(CUBLASLT_MATMUL_DESC_EPILOGUE, epilogue, "EPILOGUE");
      if (bias) plan.set(CUBLASLT_MATMUL_DESC_BIAS_DATA_TYPE, int32_t{CUDA_R_16F}, "BIAS_DATA_TYPE");
    }
    const auto N = static_cast<uint64_t>(call.N), K = static_cast<uint64_t>(call.K);
    const auto M = static_cast<uint64_t>(plan.rows);
    const cudaDataType_t type = result_type(plan, call);
    // With fp8 output C is not read (beta 0), but its type must be the bias's.
    const cudaDataType_t c_type = type == CUDA_R_8F_E4M3 ? CUDA_R_16F : type;
    check_lt(lt().layout_create(&plan.a, CUDA_R_8F_E4M3, K, N, call.K), "layout of W");
    check_lt(lt().layout_create(&plan.b, CUDA_R_8F_E4M3, K, M, call.K), "layout of x");
    check_lt(lt().layout_create(&plan.c, c_type, N, M, call.N), "layout of C");
    check_lt(lt().layout_create(&plan.d, type, N, M, call.N), "layout of y");
  }

  // Pointers that the descriptor holds; they differ from node to node that shares the plan.
  static void bind(Plan& plan, const GemmCall& call, Scratch& scratch) {
    if (plan.level < 2 || !call.per_channel)
      plan.set(CUBLASLT_MATMUL_DESC_A_SCALE_POINTER, call.w_scale, "A_SCALE_POINTER");
    if (call.per_channel && plan.level < 2) {
      const void* ones = scratch.get(Slot::kOnes, static_cast<size_t>(plan.rows) * 4);
      plan.set(CUBLASLT_MATMUL_DESC_B_SCALE_POINTER, ones, "B_SCALE_POINTER");
    }
    if (plan.level != 0) return;
    if (call.bias != nullptr) plan.set(CUBLASLT_MATMUL_DESC_BIAS_POINTER, call.bias, "BIAS_POINTER");
    if (call.out_fp8) plan.set(CUBLASLT_MATMUL_DESC_D_SCALE_POINTER, call.d_scale, "D_SCALE_POINTER");
  }

  void launch(const Plan& plan, const cublasLtMatmulAlgo_t& algo, size_t workspace_bytes, const GemmCall& call,
              cudaStream_t stream) {
    Scratch& scratch = scratch_of(stream);
    const void* x = call.x;
    if (plan.rows != call.M) {  // Padding rows hold old bytes; each affects its own discarded result row only.
      void* padded = scratch.get(Slot::kActivations, static_cast<size_t>(plan.rows * call.K));
      if (padded != x)
        check_cuda(cudaMemcpyAsync(padded, x, static_cast<size_t>(call.M * call.K), cudaMemcpyDeviceToDevice, stream),
                   "copy into the padded input");
      x = padded;
    }
    void* workspace = scratch.get(Slot::kWorkspace, kWorkspaceBytes);
    void* d = destination(plan, call, scratch);
    const void* c = plan.level == 0 && call.out_fp8 ? nullptr : d;
    const float zero = 0.0f;
    check_lt(lt().matmul(handle(), plan.desc, &call.alpha, call.w, plan.a, x, plan.b, &zero, c, plan.c, d, plan.d, &algo,
                         workspace, workspace_bytes, stream),
             "cublasLtMatmul");
  }

  static void finish(const Plan& plan, const GemmCall& call, cudaStream_t stream) {
    if (plan.level == 0) return;
    void* t = destination(plan, call, scratch_of(stream));
    const float* channel_scale = plan.level == 2 && call.per_channel ? call.w_scale : nullptr;
    if (t == call.y && call.bias == nullptr && !call.gelu) return;
    const int64_t count8 = call.M * call.N / 8;
    const auto blocks = static_cast<unsigned>((count8 + kThreads - 1) / kThreads);
    auto kernel = plan.level == 2 ? (call.out_fp8 ? finish_kernel<true, true> : finish_kernel<true, false>)
                                  : (call.out_fp8 ? finish_kernel<false, true> : finish_kernel<false, false>);
    kernel<<<blocks, kThreads, 0, stream>>>(t, call.y, channel_scale, call.bias, call.gelu, call.inverse_y_scale,
                                            call.N / 8, count8);
    check_cuda(cudaGetLastError(), "finish_kernel");
  }

  std::unique_ptr<Plan> make_plan(const GemmCall& call, int64_t alignment, cudaStream_t stream) {
    const int64_t padded = (call.M + kRowAlign - 1) / kRowAlign * kRowAlign;
    std::string why;
    for (const int64_t rows : {call.M, padded}) {
      if (rows == padded && padded == call.M && !why.empty()) break;
      for (int level = rows == call.M ? 0 : 1; level <= 2; ++level) {
        auto plan = std::make_unique<Plan>();
        plan->level = level;
        plan->rows = rows;
        try {
          describe(*plan, call);
          bind(*plan, call, scratch_of(stream));
          choose(*plan, call, alignment, stream);
          return plan;
        } catch (const std::runtime_error& error) {
          why += " [plan " + std::to_string(level) + ", " + std::to_string(rows) + " rows] " + error.what();
        }
      }
    }
    throw std::runtime_error("no fp8 GEMM for M=" + std::to_string(call.M) + " N=" + std::to_string(call.N) +
                             " K=" + std::to_string(call.K) + ":" + why);
  }

  // Picks the algorithm: the fastest of the heuristic's candidates, or its first when tuning is off or captured.
  void choose(Plan& plan, const GemmCall& call, int64_t alignment, cudaStream_t stream) {
    cublasLtMatmulPreference_t raw = nullptr;
    check_lt(lt().pref_create(&raw), "cublasLtMatmulPreferenceCreate");
    const std::unique_ptr<std::remove_pointer_t<cublasLtMatmulPreference_t>, decltype(lt().pref_destroy)> preference(
        raw, lt().pref_destroy);
    const size_t limit = kWorkspaceBytes;
    check_lt(lt().pref_set(raw, CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, &limit, sizeof(limit)), "workspace limit");
    const auto bytes = static_cast<uint32_t>(alignment);
    for (const auto attribute : {CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
                                 CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES})
      check_lt(lt().pref_set(raw, attribute, &bytes, sizeof(bytes)), "alignment");
    cublasLtMatmulHeuristicResult_t results[kCandidates] = {};
    int count = 0;
    check_lt(lt().heuristic(handle(), plan.desc, plan.a, plan.b, plan.c, plan.d, raw, kCandidates, results, &count),
             "cublasLtMatmulAlgoGetHeuristic");
    if (count == 0) throw std::runtime_error("the heuristic offers no algorithm");
    const bool tune = call.tune && !capturing(stream);
    int best = -1;
    float best_us = 0.0f, first_us = 0.0f;
    std::string why;
    for (int i = 0; i < count; ++i) {
      if (results[i].state != CUBLAS_STATUS_SUCCESS) continue;
      if (!tune) {
        best = i;
        break;
      }
      try {
        const float us = time_us(plan, results[i], call, stream);
        if (i == 0) first_us = us;
        if (best < 0 || us < best_us) best = i, best_us = us;
      } catch (const std::runtime_error& error) {
        why = error.what();
      }
    }
    if (best < 0) throw std::runtime_error("every algorithm offered failed: " + why);
    plan.algo = results[best].algo;
    plan.workspace_bytes = results[best].workspaceSize;
    if (verbose())
      std::fprintf(stderr,
                   "qexport fp8 M=%lld N=%lld K=%lld%s%s%s%s%s: plan %d, rows %lld, algorithm %d of %d, %.1f us "
                   "(first offered %.1f us), workspace %zu bytes, cublasLt %zu\n",
                   static_cast<long long>(call.M), static_cast<long long>(call.N), static_cast<long long>(call.K),
                   call.per_channel ? " per-channel" : "", call.bias != nullptr ? " bias" : "", call.gelu ? " gelu" : "",
                   call.out_fp8 ? " fp8-out" : "", call.fast_accum ? " fast-accum" : "", plan.level,
                   static_cast<long long>(plan.rows), best, count, static_cast<double>(best_us),
                   static_cast<double>(first_us), plan.workspace_bytes, lt().version());
  }

  float time_us(const Plan& plan, const cublasLtMatmulHeuristicResult_t& candidate, const GemmCall& call,
                cudaStream_t stream) {
    struct Event {
      cudaEvent_t value = nullptr;
      Event() { check_cuda(cudaEventCreate(&value), "cudaEventCreate"); }
      ~Event() { cudaEventDestroy(value); }
    } start, stop;
    launch(plan, candidate.algo, candidate.workspaceSize, call, stream);
    check_cuda(cudaEventRecord(start.value, stream), "cudaEventRecord");
    for (int i = 0; i < kTuneRepeats; ++i) launch(plan, candidate.algo, candidate.workspaceSize, call, stream);
    check_cuda(cudaEventRecord(stop.value, stream), "cudaEventRecord");
    check_cuda(cudaEventSynchronize(stop.value), "cudaEventSynchronize");
    float elapsed_ms = 0.0f;
    check_cuda(cudaEventElapsedTime(&elapsed_ms, start.value, stop.value), "cudaEventElapsedTime");
    return elapsed_ms * 1000.0f / kTuneRepeats;
  }
};

}  // namespace qexport
