// llmkern._cuda: the CUDA kernels on raw pointers. Python has checked every argument.
//
// Importing it touches no driver, so that it can say what it was built for on any machine.

#include <cuda_runtime.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <sstream>
#include <string>
#include <vector>

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

template <typename T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

std::vector<std::string> archs() {
  std::vector<std::string> names;
  std::istringstream list(LLMKERN_CUDA_ARCHS);
  for (std::string name; std::getline(list, name, ':');) names.push_back(name);
  return names;
}

Int4Weight int4_weight(uintptr_t qweight, uintptr_t scales, uintptr_t zeros, int64_t N, int64_t K,
                       int64_t group_size, int scales_dtype, int layout) {
  return {pointer<void>(qweight), pointer<void>(scales), pointer<void>(zeros), N, K, group_size,
          DType(scales_dtype),    Int4Layout(layout)};
}

Lut4Weight lut4_weight(uintptr_t qweight, uintptr_t codebook, uintptr_t scales, int64_t N,
                       int64_t K, int64_t group_size, int books, int scales_dtype, int layout) {
  const int64_t groups = K / group_size;
  return {pointer<void>(qweight),
          pointer<float>(codebook),
          pointer<void>(scales),
          N,
          K,
          group_size,
          books == 2   ? groups * 16
          : books == 1 ? 16
                       : 0,
          books == 2 ? 16 : 0,
          DType(scales_dtype),
          Lut4Layout(layout)};
}

}  // namespace

PYBIND11_MODULE(LLMKERN_CUDA_MODULE, m) {
  const auto unlocked = py::call_guard<py::gil_scoped_release>();
  m.def("archs", archs,
        "What this module holds code for: sm_XX (machine code), compute_XX (PTX, which the driver "
        "compiles for newer GPUs).");
  m.def(
      "w4a16_gemm",
      [](uintptr_t x, uintptr_t qweight, uintptr_t scales, uintptr_t zeros, uintptr_t bias,
         uintptr_t out, int64_t M, int64_t N, int64_t K, int64_t x_stride, int64_t group_size,
         int dtype, int scales_dtype, int layout, int rows, int split, int stages, bool bulk,
         uintptr_t workspace, int device, uintptr_t stream) {
        const DeviceGuard guard(device);
        cuda::w4a16_gemm(
            {pointer<void>(x),
             int4_weight(qweight, scales, zeros, N, K, group_size, scales_dtype, layout),
             pointer<void>(bias), pointer<void>(out), M, x_stride, DType(dtype)},
            {rows, split, bulk, pointer<float>(workspace), stages}, pointer<void>(stream));
      },
      unlocked);
  m.def(
      "dequantize_int4",
      [](uintptr_t qweight, uintptr_t scales, uintptr_t zeros, uintptr_t out, int64_t N, int64_t K,
         int64_t group_size, int dtype, int scales_dtype, int layout, int device,
         uintptr_t stream) {
        const DeviceGuard guard(device);
        cuda::dequantize_int4(
            {int4_weight(qweight, scales, zeros, N, K, group_size, scales_dtype, layout),
             pointer<void>(out), DType(dtype)},
            pointer<void>(stream));
      },
      unlocked);
  m.def(
      "lut4_gemm",
      [](uintptr_t x, uintptr_t qweight, uintptr_t codebook, uintptr_t scales, uintptr_t bias,
         uintptr_t out, int64_t M, int64_t N, int64_t K, int64_t x_stride, int64_t group_size,
         int books, int dtype, int scales_dtype, int layout, int rows, int split, int stages,
         bool bulk, uintptr_t workspace, int device, uintptr_t stream) {
        const DeviceGuard guard(device);
        cuda::lut4_gemm(
            {pointer<void>(x),
             lut4_weight(qweight, codebook, scales, N, K, group_size, books, scales_dtype, layout),
             pointer<void>(bias), pointer<void>(out), M, x_stride, DType(dtype)},
            {rows, split, bulk, pointer<float>(workspace), stages}, pointer<void>(stream));
      },
      unlocked);
  m.def(
      "dequantize_lut4",
      [](uintptr_t qweight, uintptr_t codebook, uintptr_t scales, uintptr_t out, int64_t N,
         int64_t K, int64_t group_size, int books, int dtype, int scales_dtype, int layout,
         int device, uintptr_t stream) {
        const DeviceGuard guard(device);
        cuda::dequantize_lut4(
            {lut4_weight(qweight, codebook, scales, N, K, group_size, books, scales_dtype, layout),
             pointer<void>(out), DType(dtype)},
            pointer<void>(stream));
      },
      unlocked);
  for (const bool unpack : {false, true})
    m.def(
        unpack ? "unpack_chunks" : "pack_chunks",
        [unpack](uintptr_t qweight, uintptr_t scales, uintptr_t zeros, uintptr_t books,
                 uintptr_t chunks, int64_t N, int64_t K, int64_t group_size, int scale_bytes,
                 bool split_pairs, int device, uintptr_t stream) {
          const DeviceGuard guard(device);
          (unpack ? cuda::unpack_chunks : cuda::pack_chunks)(
              {pointer<uint32_t>(qweight), pointer<void>(scales), pointer<uint32_t>(zeros),
               pointer<float>(books), pointer<unsigned char>(chunks), N, K, group_size, scale_bytes,
               split_pairs},
              pointer<void>(stream));
        },
        unlocked);
  m.def(
      "sparse24_gemm",
      [](uintptr_t x, uintptr_t values, uintptr_t bias, uintptr_t out, int64_t M, int64_t N,
         int64_t K, int64_t x_stride, int dtype, int rows, int split, bool bulk,
         uintptr_t workspace, int device, uintptr_t stream) {
        const DeviceGuard guard(device);
        cuda::sparse24_gemm({pointer<void>(x), pointer<void>(values), pointer<void>(bias),
                             pointer<void>(out), M, N, K, x_stride},
                            DType(dtype), {rows, split, bulk, pointer<float>(workspace)},
                            pointer<void>(stream));
      },
      unlocked);
  m.def(
      "sparse24_w4a16_gemm",
      [](uintptr_t x, uintptr_t qvalues, uintptr_t bias, uintptr_t out, int64_t M, int64_t N,
         int64_t K, int64_t x_stride, int dtype, int64_t group_size, int scales_dtype, bool zeros,
         int rows, int split, bool bulk, uintptr_t workspace, int device, uintptr_t stream) {
        const DeviceGuard guard(device);
        cuda::sparse24_w4a16_gemm({pointer<void>(x), pointer<void>(qvalues), pointer<void>(bias),
                                   pointer<void>(out), M, N, K, x_stride},
                                  DType(dtype), {group_size, DType(scales_dtype), zeros},
                                  {rows, split, bulk, pointer<float>(workspace)},
                                  pointer<void>(stream));
      },
      unlocked);
  m.def(
      "hessian_update",
      [](uintptr_t H, uintptr_t x, uintptr_t offsets, int64_t E, int64_t T, int64_t K, double alpha,
         int dtype, int device, uintptr_t stream) {
        const DeviceGuard guard(device);
        cuda::hessian_update({pointer<float>(H), pointer<void>(x), T, K, alpha, DType(dtype), E,
                              pointer<int64_t>(offsets)},
                             pointer<void>(stream));
      },
      unlocked);
  m.def(
      "obs_block",
      [](const std::vector<uintptr_t>& tensors, const std::vector<int64_t>& sizes, int bits,
         int kept, int size, int device, uintptr_t stream) {
        const DeviceGuard guard(device);
        const auto float_at = [&](int i) { return pointer<float>(tensors.at(i)); };
        cuda::obs_block({float_at(0),
                         float_at(1),
                         float_at(2),
                         pointer<int32_t>(tensors.at(3)),
                         float_at(4),
                         float_at(5),
                         float_at(6),
                         pointer<uint8_t>(tensors.at(7)),
                         pointer<uint8_t>(tensors.at(8)),
                         float_at(9),
                         float_at(10),
                         float_at(11),
                         sizes.at(0),
                         sizes.at(1),
                         sizes.at(2),
                         sizes.at(3),
                         sizes.at(4),
                         sizes.at(5),
                         sizes.at(6),
                         sizes.at(7),
                         sizes.at(8),
                         sizes.at(9),
                         sizes.at(10),
                         sizes.at(11),
                         bits,
                         kept,
                         size},
                        pointer<void>(stream));
      },
      unlocked, "Tensors and sizes in the order of ObsBlockParams.");
  m.def(
      "obs_select",
      [](uintptr_t reached, uintptr_t d, uintptr_t mask, uintptr_t keys, uintptr_t counts,
         int64_t E, int64_t N, int64_t columns, int64_t d_stride, int64_t mask_stride,
         int64_t counts_stride, int64_t removed, bool per_row, int device, uintptr_t stream) {
        const DeviceGuard guard(device);
        cuda::obs_select({pointer<float>(reached), pointer<float>(d), pointer<uint8_t>(mask),
                          pointer<uint32_t>(keys), pointer<uint32_t>(counts), E, N, columns,
                          d_stride, mask_stride, counts_stride, removed, per_row},
                         pointer<void>(stream));
      },
      unlocked);
  m.def("obs_select_counts", cuda::obs_select_counts);
#ifdef LLMKERN_EMU
  m.def("set_reverse_order", [](bool reverse) {
    emu::set_order(reverse ? emu::Order::kReverse : emu::Order::kForward);
  });
#endif
}
