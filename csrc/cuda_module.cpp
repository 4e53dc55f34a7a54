// llmkern._cuda: the CUDA kernels on raw pointers. Python has checked every argument.

#include <pybind11/pybind11.h>

namespace py = pybind11;

PYBIND11_MODULE(_cuda, m) { m.doc() = "CUDA kernels of llmkern"; }
