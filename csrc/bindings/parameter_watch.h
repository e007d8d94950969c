// Finds out, without a Python loop, whether a module's parameters are still the same objects.

#pragma once

#include <torch/extension.h>

#include <tuple>
#include <utility>
#include <vector>

namespace gradacc {

namespace py = pybind11;

// Tells whether a module still holds the parameter objects it had, which
// load_state_dict(assign=True) and plain assignment replace.
class ParameterWatch {
 public:
  // Entries (owner._parameters, name, parameter).
  explicit ParameterWatch(std::vector<std::tuple<py::dict, py::str, py::object>> entries)
      : entries_(std::move(entries)) {}

  bool is_changed() const {
    for (const auto& [dict, name, parameter] : entries_) {
      PyObject* found = PyDict_GetItemWithError(dict.ptr(), name.ptr());
      if (!found && PyErr_Occurred()) throw py::error_already_set();
      if (found != parameter.ptr()) return true;
    }
    return false;
  }

 private:
  std::vector<std::tuple<py::dict, py::str, py::object>> entries_;
};

}  // namespace gradacc
