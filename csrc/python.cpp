// The Python module randlora._C: loading it registers torch.ops.randlora.*; what is not a tensor op lives here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "build_info.h"
#include "packed_update.h"

PYBIND11_MODULE(_C, m) {
  m.doc() = "randlora's compiled half: importing it registers torch.ops.randlora.*";
  m.def("build_info", &randlora::build_info, "What this binary was built from and found on this machine.");
  m.attr("UNPACKED_BYTES") = randlora::kUnpackedBytes;  // for randlora's cost model
}
