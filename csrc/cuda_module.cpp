// llmkern._cuda: the CUDA kernels on raw pointers. Python has checked every argument.
//
// Importing it touches no driver, so that it can say what it was built for on any machine.

#include <cuda_runtime.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

#include "bindings.h"
#include "cuda/common/launch.h"
#include "cuda/kernels.h"

namespace py = pybind11;
using namespace llmkern;

#ifndef LLMKERN_CUDA_MODULE
#define LLMKERN_CUDA_MODULE _cuda  // the emulator is built from this file under another name
#endif
#ifndef LLMKERN_CUDA_ARCHS
#define LLMKERN_CUDA_ARCHS ""  // e.g. "sm_80:compute_90"
#endif

namespace {

// Makes `device` current until the end of the scope.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) {
    cuda::check(cudaGetDevice(&previous_), "cudaGetDevice");
    if (device != previous_) cuda::check(cudaSetDevice(device), "cudaSetDevice");
  }
  ~DeviceGuard() { cudaSetDevice(previous_); }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int previous_ = 0;
};

struct Queue {
  int device;
  void* stream;
};
LLMKERN_FIELDS(Queue, device, stream)

// Makes the launch function kLaunch, which takes these structs, the function `name` of m.
template <auto kLaunch, typename... Structs>
void def(py::module_& m, const char* name) {
  bindings::def(
      m, name, +[](const Structs&... params, const Queue& queue) {
        const DeviceGuard guard(queue.device);
        kLaunch(params..., queue.stream);
      });
}

std::vector<std::string> archs() {
  std::vector<std::string> names;
  std::istringstream list(LLMKERN_CUDA_ARCHS);
  for (std::string name; std::getline(list, name, ':');) names.push_back(name);
  return names;
}

}  // namespace

PYBIND11_MODULE(LLMKERN_CUDA_MODULE, m) {
  m.def("archs", archs,
        "What this module holds code for: sm_XX (machine code), compute_XX (PTX, which the driver "
        "compiles for newer GPUs).");
  bindings::export_enums(m);
  def<cuda::w4a16_gemm, W4A16GemmParams, cuda::ChunkConfig>(m, "w4a16_gemm");
  def<cuda::dequantize_int4, DequantizeInt4Params>(m, "dequantize_int4");
  def<cuda::lut4_gemm, Lut4GemmParams, cuda::ChunkConfig>(m, "lut4_gemm");
  def<cuda::dequantize_lut4, DequantizeLut4Params>(m, "dequantize_lut4");
  def<cuda::pack_chunks, cuda::PackChunksParams>(m, "pack_chunks");
  def<cuda::unpack_chunks, cuda::PackChunksParams>(m, "unpack_chunks");
  def<cuda::sparse24_gemm, Sparse24GemmParams, cuda::ChunkConfig>(m, "sparse24_gemm");
  def<cuda::sparse24_w4a16_gemm, Sparse24W4A16GemmParams, cuda::ChunkConfig>(m,
                                                                             "sparse24_w4a16_gemm");
  def<cuda::hessian_update, HessianUpdateParams>(m, "hessian_update");
  def<cuda::obs_block, ObsBlockParams>(m, "obs_block");
  def<cuda::obs_select, ObsSelectParams>(m, "obs_select");
  m.def("obs_select_counts", cuda::obs_select_counts);
#ifdef LLMKERN_EMU
  m.def("set_reverse_order", [](bool reverse) {
    emu::set_order(reverse ? emu::Order::kReverse : emu::Order::kForward);
  });
#endif
}
