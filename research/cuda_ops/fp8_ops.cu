// ONNX Runtime custom operators (domain qexport.research, CUDA execution provider) for static per-tensor fp8.
//
//   Fp8Linear               x fp16 [.., K]  -> y fp16 [.., N]
//   Fp8LinearToFp8          x fp16 [.., K]  -> y e4m3 [.., N]
//   Fp8LinearFromFp8        x e4m3 [.., K]  -> y fp16 [.., N]
//   Fp8LinearFromFp8ToFp8   x e4m3 [.., K]  -> y e4m3 [.., N]
//     y = act(x_scale * w_scale * (q(x) . W^T) + bias), q(x) = e4m3(x * fl32(1 / x_scale)); e4m3 outputs hold y / y_scale.
//     inputs: x, W e4m3 [N, K], w_scale float [1] or [N], optional bias fp16 [N]
//     attributes: x_scale float, y_scale float (e4m3 outputs), act "none" | "gelu_tanh", fast_accum 0 | 1, tune 1 | 0
//   ModulatedNormFp8        x fp16 [B, T, D] -> e4m3 [B, T, D]
//     y = e4m3((LayerNorm(x) * (1 + scale) + shift) * fl32(1 / y_scale))
//     inputs: x, scale fp16 [B or 1, (1,) D], shift the same; attributes: y_scale float, epsilon float (1e-6)
//
// K, N and D are multiples of 16, D at most 4096. Every failure comes back as an OrtStatus with its text.
// Only the C API is used, so the library runs with any ONNX Runtime at least as new as the headers.
#include <onnxruntime_c_api.h>

#include <cmath>
#include <mutex>
#include <vector>

#include "fp8_gemm.h"

namespace qexport {
namespace {

constexpr auto kHalf = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT16;
constexpr auto kFp8 = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT8E4M3FN;
constexpr auto kFloat = ONNX_TENSOR_ELEMENT_DATA_TYPE_FLOAT;

// Guards the plan cache, the scratch map and the descriptors, whose pointers change from node to node.
std::mutex& library_lock() {
  static std::mutex lock;
  return lock;
}

Fp8Gemm& shared_gemm() {
  static Fp8Gemm* gemm = new Fp8Gemm;  // Never destroyed: the CUDA driver may be gone when statics are.
  return *gemm;
}

// Runs body; an exception becomes an OrtStatus that starts with the operator's name.
template <typename Body>
OrtStatus* guarded(const OrtApi* api, const char* name, Body body) noexcept {
  try {
    body();
    return nullptr;
  } catch (const std::exception& error) {
    const std::string text = std::string(name) + ": " + error.what();
    return api->CreateStatus(ORT_FAIL, text.c_str());
  } catch (...) {
    return api->CreateStatus(ORT_FAIL, name);
  }
}

void check_ort(const OrtApi* api, OrtStatus* status) {
  if (status == nullptr) return;
  const std::string text = api->GetErrorMessage(status);
  api->ReleaseStatus(status);
  throw std::runtime_error(text);
}

void require(bool holds, const std::string& text) {
  if (!holds) throw std::runtime_error(text);
}

bool absent(const OrtApi* api, OrtStatus* status) {
  if (status == nullptr) return false;
  api->ReleaseStatus(status);
  return true;
}

float float_attribute(const OrtApi* api, const OrtKernelInfo* info, const char* name, const float* fallback) {
  float out = 0.0f;
  if (absent(api, api->KernelInfoGetAttribute_float(info, name, &out))) {
    require(fallback != nullptr, std::string("attribute ") + name + " is missing");
    return *fallback;
  }
  return out;
}

float scale_attribute(const OrtApi* api, const OrtKernelInfo* info, const char* name) {
  const float out = float_attribute(api, info, name, nullptr);
  require(std::isfinite(out) && out > 0.0f && std::isfinite(1.0f / out),
          std::string("attribute ") + name + " must be positive and finite, as must its reciprocal");
  return out;
}

int64_t int_attribute(const OrtApi* api, const OrtKernelInfo* info, const char* name, int64_t fallback) {
  int64_t out = 0;
  return absent(api, api->KernelInfoGetAttribute_int64(info, name, &out)) ? fallback : out;
}

std::string string_attribute(const OrtApi* api, const OrtKernelInfo* info, const char* name, const char* fallback) {
  size_t size = 0;  // with the closing zero
  if (absent(api, api->KernelInfoGetAttribute_string(info, name, nullptr, &size)) || size == 0) return fallback;
  std::string out(size, '\0');
  check_ort(api, api->KernelInfoGetAttribute_string(info, name, out.data(), &size));
  out.resize(size - 1);
  return out;
}

struct Input {
  const void* data = nullptr;  // null for an absent optional input
  std::vector<int64_t> shape;
  int64_t count = 0;
};

Input input_at(const OrtApi* api, const OrtKernelContext* context, size_t index) {
  Input out;
  size_t inputs = 0;
  check_ort(api, api->KernelContext_GetInputCount(context, &inputs));
  if (index >= inputs) return out;
  const OrtValue* value = nullptr;
  check_ort(api, api->KernelContext_GetInput(context, index, &value));
  if (value == nullptr) return out;
  OrtTensorTypeAndShapeInfo* info = nullptr;
  check_ort(api, api->GetTensorTypeAndShape(value, &info));
  const std::unique_ptr<OrtTensorTypeAndShapeInfo, decltype(api->ReleaseTensorTypeAndShapeInfo)> owned(
      info, api->ReleaseTensorTypeAndShapeInfo);
  size_t rank = 0;
  check_ort(api, api->GetDimensionsCount(info, &rank));
  out.shape.resize(rank);
  check_ort(api, api->GetDimensions(info, out.shape.data(), rank));
  out.count = 1;
  for (const int64_t dimension : out.shape) out.count *= dimension;
  void* data = nullptr;
  check_ort(api, api->GetTensorMutableData(const_cast<OrtValue*>(value), &data));
  out.data = data;
  return out;
}

void* output_at(const OrtApi* api, OrtKernelContext* context, const std::vector<int64_t>& shape) {
  OrtValue* value = nullptr;
  check_ort(api, api->KernelContext_GetOutput(context, 0, shape.data(), shape.size(), &value));
  void* data = nullptr;
  check_ort(api, api->GetTensorMutableData(value, &data));
  return data;
}

cudaStream_t stream_of(const OrtApi* api, const OrtKernelContext* context) {
  void* stream = nullptr;
  check_ort(api, api->KernelContext_GetGPUComputeStream(context, &stream));
  return static_cast<cudaStream_t>(stream);
}

void quantise(const void* x, void* q, float inverse_scale, int64_t count, cudaStream_t stream) {
  (void)alignment_of({x, q});
  const int64_t count16 = count / 16;
  quantise_kernel<<<static_cast<unsigned>((count16 + kThreads - 1) / kThreads), kThreads, 0, stream>>>(
      static_cast<const uint4*>(x), static_cast<uint4*>(q), inverse_scale, count16);
  check_cuda(cudaGetLastError(), "quantise_kernel");
}

struct Kernel {
  const OrtApi* api;
  const char* name;
  Kernel(const OrtApi* api_, const char* name_) : api(api_), name(name_) {}
  virtual ~Kernel() = default;
  virtual void compute(OrtKernelContext* context) = 0;
};

template <bool kInFp8, bool kOutFp8>
struct LinearKernel final : Kernel {
  float x_scale, y_scale = 1.0f;
  bool gelu, fast_accum, tune;
  float* d_scale = nullptr;  // [1] on the device, 1 / y_scale; allocated on the first run, kept until the process ends

  LinearKernel(const OrtApi* api, const char* name, const OrtKernelInfo* info) : Kernel(api, name) {
    x_scale = scale_attribute(api, info, "x_scale");
    if (kOutFp8) y_scale = scale_attribute(api, info, "y_scale");
    const std::string act = string_attribute(api, info, "act", "none");
    require(act == "none" || act == "gelu_tanh", "act must be none or gelu_tanh, not " + act);
    gelu = act == "gelu_tanh";
    fast_accum = int_attribute(api, info, "fast_accum", 0) != 0;
    tune = int_attribute(api, info, "tune", 1) != 0;
  }

  void compute(OrtKernelContext* context) override {
    const Input x = input_at(api, context, 0), w = input_at(api, context, 1);
    const Input w_scale = input_at(api, context, 2), bias = input_at(api, context, 3);
    require(w.shape.size() == 2, "W must be [N, K]");
    const int64_t N = w.shape[0], K = w.shape[1];
    require(N > 0 && K > 0 && N % 16 == 0 && K % 16 == 0, "N and K of W must be positive multiples of 16");
    require(!x.shape.empty() && x.shape.back() == K, "the last dimension of x must be K of W");
    require(w_scale.count == 1 || w_scale.count == N, "w_scale must have 1 or N elements");
    require(bias.data == nullptr || bias.count == N, "bias must have N elements");
    std::vector<int64_t> shape = x.shape;
    shape.back() = N;
    void* y = output_at(api, context, shape);
    const int64_t M = x.count / K;
    if (M == 0) return;
    const cudaStream_t stream = stream_of(api, context);
    const std::lock_guard<std::mutex> hold(library_lock());
    const void* q = x.data;
    if (!kInFp8) {
      void* scratch = scratch_of(stream).get(Slot::kActivations, static_cast<size_t>(x.count));
      quantise(x.data, scratch, 1.0f / x_scale, x.count, stream);
      q = scratch;
    }
    if (kOutFp8 && d_scale == nullptr) {
      auto* fresh = static_cast<float*>(device_alloc(sizeof(float), stream));
      fill(fresh, 1.0f / y_scale, 1, stream);
      d_scale = fresh;
    }
    GemmCall call{};
    call.x = q, call.w = w.data, call.y = y;
    call.w_scale = static_cast<const float*>(w_scale.data);
    call.bias = static_cast<const __half*>(bias.data);
    call.d_scale = d_scale;
    call.alpha = x_scale;
    call.inverse_y_scale = 1.0f / y_scale;
    call.M = M, call.N = N, call.K = K;
    call.per_channel = w_scale.count != 1;
    call.gelu = gelu, call.out_fp8 = kOutFp8, call.fast_accum = fast_accum, call.tune = tune;
    shared_gemm().run(call, stream);
  }
};

struct NormKernel final : Kernel {
  float y_scale, epsilon;

  NormKernel(const OrtApi* api, const char* name, const OrtKernelInfo* info) : Kernel(api, name) {
    const float usual = 1e-6f;
    y_scale = scale_attribute(api, info, "y_scale");
    epsilon = float_attribute(api, info, "epsilon", &usual);
  }

  void compute(OrtKernelContext* context) override {
    const Input x = input_at(api, context, 0);
    const Input scale = input_at(api, context, 1), shift = input_at(api, context, 2);
    require(x.shape.size() == 3, "x must be [B, T, D]");
    const int64_t B = x.shape[0], T = x.shape[1], D = x.shape[2];
    require(D > 0 && D % 16 == 0 && D <= 256 * kNormMaxSteps, "D must be a multiple of 16, at most 4096");
    for (const Input* m : {&scale, &shift}) {
      require(!m->shape.empty() && m->shape.back() == D && (m->count == D || m->count == B * D),
              "scale and shift must be [B or 1, 1, D]");
      require(m->shape.front() == m->count / D, "scale and shift must have their batch first");
    }
    require(scale.count == shift.count, "scale and shift must have one shape");
    void* y = output_at(api, context, x.shape);
    if (x.count == 0) return;
    (void)alignment_of({x.data, scale.data, shift.data, y});
    launch(x.data, scale.data, shift.data, y, B * T, T, D, scale.count == D ? 0 : D, stream_of(api, context));
  }

  template <int kSteps>
  void launch_steps(const void* x, const void* scale, const void* shift, void* y, int64_t rows, int64_t rows_per_batch,
                    int64_t D, int64_t stride, cudaStream_t stream) const {
    const auto blocks = static_cast<unsigned>((rows + kNormWarps - 1) / kNormWarps);
    modulated_norm_kernel<kSteps><<<blocks, 32 * kNormWarps, 0, stream>>>(
        static_cast<const __half*>(x), static_cast<const __half*>(scale), static_cast<const __half*>(shift),
        static_cast<uint2*>(y), rows, static_cast<int>(D / 8), rows_per_batch, stride, epsilon, 1.0f / y_scale);
    check_cuda(cudaGetLastError(), "modulated_norm_kernel");
  }

  template <typename... Arguments>
  void launch(const void* x, const void* scale, const void* shift, void* y, int64_t rows, int64_t rows_per_batch,
              int64_t D, Arguments... rest) const {
    const int64_t steps = (D + 255) / 256;
    const auto with = [&](auto tag) {
      launch_steps<decltype(tag)::value>(x, scale, shift, y, rows, rows_per_batch, D, rest...);
    };
    if (steps <= 2) return with(std::integral_constant<int, 2>{});
    if (steps <= 4) return with(std::integral_constant<int, 4>{});
    if (steps <= 5) return with(std::integral_constant<int, 5>{});
    if (steps <= 8) return with(std::integral_constant<int, 8>{});
    return with(std::integral_constant<int, kNormMaxSteps>{});
  }
};

using Type = ONNXTensorElementDataType;

// One operator's entry for ONNX Runtime: K is the kernel, the rest its signature; inputs past `required` are optional.
template <typename K>
struct Op final : OrtCustomOp {
  const char* name;
  std::vector<Type> inputs;
  size_t required;
  Type output;

  static const Op* of(const OrtCustomOp* op) { return static_cast<const Op*>(op); }

  Op(const char* name_, std::vector<Type> inputs_, size_t required_, Type output_)
      : OrtCustomOp{}, name(name_), inputs(std::move(inputs_)), required(required_), output(output_) {
    version = ORT_API_VERSION;
    GetName = [](const OrtCustomOp* op) { return of(op)->name; };
    GetExecutionProviderType = [](const OrtCustomOp*) { return "CUDAExecutionProvider"; };
    GetInputTypeCount = [](const OrtCustomOp* op) { return of(op)->inputs.size(); };
    GetInputType = [](const OrtCustomOp* op, size_t index) { return of(op)->inputs[index]; };
    GetOutputTypeCount = [](const OrtCustomOp*) { return size_t{1}; };
    GetOutputType = [](const OrtCustomOp* op, size_t) { return of(op)->output; };
    GetInputCharacteristic = [](const OrtCustomOp* op, size_t index) {
      return index < of(op)->required ? INPUT_OUTPUT_REQUIRED : INPUT_OUTPUT_OPTIONAL;
    };
    GetOutputCharacteristic = [](const OrtCustomOp*, size_t) { return INPUT_OUTPUT_REQUIRED; };
    GetInputMemoryType = [](const OrtCustomOp*, size_t) { return OrtMemTypeDefault; };
    GetVariadicInputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicInputHomogeneity = [](const OrtCustomOp*) { return 1; };
    GetVariadicOutputMinArity = [](const OrtCustomOp*) { return 1; };
    GetVariadicOutputHomogeneity = [](const OrtCustomOp*) { return 1; };
    GetStartVersion = [](const OrtCustomOp*) { return 1; };
    GetEndVersion = [](const OrtCustomOp*) { return 1; };
    CreateKernelV2 = [](const OrtCustomOp* op, const OrtApi* api, const OrtKernelInfo* info, void** kernel) {
      return guarded(api, of(op)->name, [&] { *kernel = static_cast<Kernel*>(new K(api, of(op)->name, info)); });
    };
    KernelComputeV2 = [](void* kernel, OrtKernelContext* context) {
      auto* typed = static_cast<Kernel*>(kernel);
      return guarded(typed->api, typed->name, [&] { typed->compute(context); });
    };
    KernelDestroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  }
};

// The domain with its operators, made once; ONNX Runtime needs it for as long as any session lives.
OrtCustomOpDomain* domain(const OrtApi* api) {
  static OrtCustomOpDomain* const made = [api] {
    const std::vector<Type> from_half{kHalf, kFp8, kFloat, kHalf}, from_fp8{kFp8, kFp8, kFloat, kHalf};
    static const Op<LinearKernel<false, false>> half_half("Fp8Linear", from_half, 3, kHalf);
    static const Op<LinearKernel<false, true>> half_fp8("Fp8LinearToFp8", from_half, 3, kFp8);
    static const Op<LinearKernel<true, false>> fp8_half("Fp8LinearFromFp8", from_fp8, 3, kHalf);
    static const Op<LinearKernel<true, true>> fp8_fp8("Fp8LinearFromFp8ToFp8", from_fp8, 3, kFp8);
    static const Op<NormKernel> norm("ModulatedNormFp8", {kHalf, kHalf, kHalf}, 3, kFp8);
    OrtCustomOpDomain* out = nullptr;
    check_ort(api, api->CreateCustomOpDomain("qexport.research", &out));
    for (const OrtCustomOp* op : std::initializer_list<const OrtCustomOp*>{&half_half, &half_fp8, &fp8_half, &fp8_fp8, &norm})
      check_ort(api, api->CustomOpDomain_Add(out, op));
    return out;
  }();
  return made;
}

}  // namespace
}  // namespace qexport

extern "C" __attribute__((visibility("default"))) OrtStatus* RegisterCustomOps(OrtSessionOptions* options,
                                                                               const OrtApiBase* base) {
  const OrtApi* api = base->GetApi(ORT_API_VERSION);
  if (api == nullptr) {
    const OrtApi* oldest = base->GetApi(1);  // present in every runtime
    return oldest->CreateStatus(ORT_FAIL, "qexport.research needs a newer ONNX Runtime than this one");
  }
  return qexport::guarded(api, "RegisterCustomOps",
                          [&] { qexport::check_ort(api, api->AddCustomOpDomain(options, qexport::domain(api))); });
}
