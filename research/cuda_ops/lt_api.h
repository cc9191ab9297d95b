// The few cublasLt functions that are used, resolved on first use with dlopen.
//
// Linking against cublasLt would make the library fail to load wherever it is not on the linker's path (a CPU-only
// machine, a pip wheel's private folder). `libcublasLt.so.13` is found by its soname when torch or
// `onnxruntime.preload_dlls()` has already loaded it; QEXPORT_CUBLASLT names a file to load instead.
#pragma once
#include <cublasLt.h>
#include <dlfcn.h>

#include <cstdlib>
#include <stdexcept>
#include <string>

namespace qexport {

struct LtApi {
  decltype(&cublasLtCreate) create;
  decltype(&cublasLtGetStatusString) status_string;
  decltype(&cublasLtGetVersion) version;
  decltype(&cublasLtMatmul) matmul;
  decltype(&cublasLtMatmulAlgoGetHeuristic) heuristic;
  decltype(&cublasLtMatmulDescCreate) desc_create;
  decltype(&cublasLtMatmulDescDestroy) desc_destroy;
  decltype(&cublasLtMatmulDescSetAttribute) desc_set;
  decltype(&cublasLtMatmulPreferenceCreate) pref_create;
  decltype(&cublasLtMatmulPreferenceDestroy) pref_destroy;
  decltype(&cublasLtMatmulPreferenceSetAttribute) pref_set;
  decltype(&cublasLtMatrixLayoutCreate) layout_create;
  decltype(&cublasLtMatrixLayoutDestroy) layout_destroy;
};

template <typename F>
void resolve(void* library, const char* name, F& out) {
  out = reinterpret_cast<F>(dlsym(library, name));
  if (out == nullptr) throw std::runtime_error(std::string("libcublasLt lacks ") + name);
}

// The loaded table; throws std::runtime_error with the loader's text when the library can not be had.
inline const LtApi& lt() {
  static const LtApi api = [] {
    const char* named = std::getenv("QEXPORT_CUBLASLT");
    const char* file = named != nullptr ? named : "libcublasLt.so.13";
    void* library = dlopen(file, RTLD_NOW | RTLD_LOCAL);
    if (library == nullptr) {
      const char* why = dlerror();
      throw std::runtime_error(std::string("can not load ") + file + ": " + (why != nullptr ? why : "no reason given"));
    }
    LtApi t{};
    resolve(library, "cublasLtCreate", t.create);
    resolve(library, "cublasLtGetStatusString", t.status_string);
    resolve(library, "cublasLtGetVersion", t.version);
    resolve(library, "cublasLtMatmul", t.matmul);
    resolve(library, "cublasLtMatmulAlgoGetHeuristic", t.heuristic);
    resolve(library, "cublasLtMatmulDescCreate", t.desc_create);
    resolve(library, "cublasLtMatmulDescDestroy", t.desc_destroy);
    resolve(library, "cublasLtMatmulDescSetAttribute", t.desc_set);
    resolve(library, "cublasLtMatmulPreferenceCreate", t.pref_create);
    resolve(library, "cublasLtMatmulPreferenceDestroy", t.pref_destroy);
    resolve(library, "cublasLtMatmulPreferenceSetAttribute", t.pref_set);
    resolve(library, "cublasLtMatrixLayoutCreate", t.layout_create);
    resolve(library, "cublasLtMatrixLayoutDestroy", t.layout_destroy);
    return t;
  }();
  return api;
}

inline void check_lt(cublasStatus_t status, const char* what) {
  if (status == CUBLAS_STATUS_SUCCESS) return;
  throw std::runtime_error(std::string(what) + ": " + lt().status_string(status) + " (" +
                           std::to_string(static_cast<int>(status)) + ")");
}

inline void check_cuda(cudaError_t error, const char* what) {
  if (error == cudaSuccess) return;
  (void)cudaGetLastError();  // Clears a non-sticky error, so that the next call is not blamed for this one.
  throw std::runtime_error(std::string(what) + ": " + cudaGetErrorString(error));
}

}  // namespace qexport
