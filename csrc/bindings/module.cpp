// The Python module gradacc_kernels._C.

#include <torch/extension.h>

#include "../autograd/hook.h"
#include "ops.h"
#include "parameter_watch.h"

namespace gradacc {
namespace {

namespace py = pybind11;

// Undoes an explicit grad_dtype: it is the tensor's own dtype again, also when that changes.
void follow_own_dtype(const at::Tensor& tensor) {
  if (auto* meta = torch::autograd::impl::get_autograd_meta(tensor)) {
    meta->grad_dtype_.reset();
    meta->allow_grad_dtype_mismatch_ = false;
  }
}

// Whether the parameter's AccumulateGrad node has hooks that run after accumulation.
bool has_post_hooks(const at::Tensor& tensor) {
  const auto node = torch::autograd::impl::try_get_grad_accumulator(tensor);
  return node && !node->post_hooks().empty();
}

}  // namespace
}  // namespace gradacc

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  using gradacc::GradHooks;
  using gradacc::ParameterWatch;
  using NoGil = py::call_guard<py::gil_scoped_release>;

  m.attr("CHUNK_SIZE") = gradacc::kChunkSize;
#ifdef GRADACC_WITH_CUDA
  m.attr("HAS_CUDA") = true;
  m.attr("CUDA_ARCHITECTURES") = GRADACC_CUDA_ARCHITECTURES;
#else
  m.attr("HAS_CUDA") = false;
  m.attr("CUDA_ARCHITECTURES") = "";
#endif

  m.def("accumulate_", &gradacc::accumulate_, NoGil());
  m.def("multi_accumulate_", &gradacc::multi_accumulate_, NoGil());
  m.def("grad_stats", &gradacc::grad_stats, NoGil());
  m.def("scale_", &gradacc::scale_, NoGil());
  m.def("has_post_hooks", &gradacc::has_post_hooks);
  m.def("follow_own_dtype", &gradacc::follow_own_dtype);
  m.def("cpu_isa", &gradacc::cpu::isa);
  m.def("select_cpu_isa", &gradacc::cpu::select_isa);

  py::class_<GradHooks, std::shared_ptr<GradHooks>>(m, "GradHooks")
      .def(py::init<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>,
                    double, at::Tensor, int64_t, int64_t>())
      .def("refresh", &GradHooks::refresh, NoGil())
      .def("remove", &GradHooks::remove, NoGil())
      .def("expose", &GradHooks::expose, NoGil())
      .def("invalidate", &GradHooks::invalidate, NoGil())
      .def("statistics_valid", &GradHooks::statistics_valid, NoGil())
      .def("current", &GradHooks::current, NoGil());

  py::class_<ParameterWatch>(m, "ParameterWatch")
      .def(py::init<std::vector<std::tuple<py::dict, py::str, py::object>>>())
      .def("is_changed", &ParameterWatch::is_changed);
}
