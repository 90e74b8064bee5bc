// The Python module irlfast._native: the only file that includes pybind11.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <string>
#include <vector>

#include "irlfast/isa.h"

namespace py = pybind11;

namespace {

std::vector<std::string> split(const std::string& text) {
  std::vector<std::string> parts;
  size_t begin = 0;
  while (begin < text.size()) {
    size_t end = text.find(',', begin);
    if (end == std::string::npos) end = text.size();
    parts.push_back(text.substr(begin, end - begin));
    begin = end + 1;
  }
  return parts;
}

std::string compiler() {
#if defined(__clang__)
  return "clang " __clang_version__;
#elif defined(__GNUC__)
  return "gcc " __VERSION__;
#else
  return "unknown";
#endif
}

py::dict build_info() {
  py::list built, usable;
  for (irlfast::Isa isa : irlfast::built_isas()) {
    built.append(irlfast::isa_name(isa));
    if (irlfast::isa_runs_here(isa)) usable.append(irlfast::isa_name(isa));
  }
  py::dict info;
  info["version"] = IRLFAST_VERSION;
  info["compiler"] = compiler();
  info["isas_built"] = built;
  info["isas_usable"] = usable;
  info["isa"] = irlfast::isa_name(irlfast::best_isa());
  info["cuda_built"] = bool(IRLFAST_CUDA_BUILT);
  info["cuda_compiler"] = IRLFAST_CUDA_COMPILER;
  info["cuda_architectures"] = split(IRLFAST_CUDA_ARCHITECTURES);
  info["sanitizers"] = split(IRLFAST_SANITIZERS);
  return info;
}

}  // namespace

PYBIND11_MODULE(_native, m, py::mod_gil_not_used()) {
  m.def("build_info", &build_info);
}
