// The Python module gradacc_kernels._C.

#include <torch/extension.h>

#include "../autograd/fused_module.h"
#include "../autograd/hook.h"
#include "../autograd/uses.h"
#include "embedding.h"
#include "ops.h"
#include "parameter_watch.h"
#include "wgrad.h"
#ifdef GRADACC_WITH_CUDA
#include "../cuda/wgrad_cutlass.h"
#include "cublaslt.h"
#include "wgrad_choice.h"
#endif

#include <functional>
#include <memory>
#include <utility>

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

// For the hook in Python: what uses.h does, of parameters.
std::vector<int64_t> count_uses_of(const std::vector<at::Tensor>& params) {
  std::vector<decltype(torch::autograd::impl::grad_accumulator(at::Tensor()))> nodes;
  std::vector<const torch::autograd::Node*> leaves;
  for (const at::Tensor& param : params) {
    nodes.push_back(torch::autograd::impl::try_get_grad_accumulator(param));
    leaves.push_back(nodes.back().get());
  }
  return count_uses(leaves);
}

void deliver_to(const at::Tensor& param, std::optional<at::ScalarType> dtype) {
  if (const auto leaf = torch::autograd::impl::try_get_grad_accumulator(param))
    deliver_in(*leaf, dtype);
}

// A call of a Python object by a thread that does not hold the GIL, which may also drop it.
template <typename... Arguments>
std::function<void(Arguments...)> with_gil(pybind11::object call) {
  const std::shared_ptr<pybind11::object> shared(new pybind11::object(std::move(call)),
                                                 [](pybind11::object* object) {
                                                   const pybind11::gil_scoped_acquire gil;
                                                   delete object;
                                                 });
  return [shared](Arguments... arguments) {
    const pybind11::gil_scoped_acquire gil;
    (*shared)(arguments...);
  };
}

}  // namespace
}  // namespace gradacc

PYBIND11_MODULE(TORCH_EXTENSION_NAME, m) {
  namespace py = pybind11;
  using gradacc::FusedEmbedding;
  using gradacc::FusedLinear;
  using gradacc::FusedLookup;
  using gradacc::FusedWeight;
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

#ifdef GRADACC_WITH_CUDA
  m.def("set_weight_grad_choice", &gradacc::set_weight_grad_choice);
  m.def("cublaslt_version", &gradacc::cublaslt_version);
  m.def("clear_weight_grad_choices", &gradacc::clear_weight_grad_choices);
  m.def("force_weight_grad_choice", &gradacc::force_weight_grad_choice);
  m.def("weight_grad_choices", [] {
    std::vector<std::string> names;
    for (int i = 0; i < gradacc::cuda::wgrad_cutlass_count(); ++i)
      names.emplace_back(gradacc::cuda::wgrad_cutlass_name(i));
    names.emplace_back("cublaslt:pingpong");
    for (int i = 0; i < gradacc::kCublasLtAlgorithms; ++i)
      names.push_back("cublaslt:" + std::to_string(i));
    return names;
  });
#endif

  m.def("accumulate_", &gradacc::accumulate_, NoGil());
  m.def("multi_accumulate_", &gradacc::multi_accumulate_, NoGil());
  m.def("grad_stats", &gradacc::grad_stats, NoGil());
  m.def("scale_", &gradacc::scale_, NoGil());
  m.def("embedding_accumulate_", &gradacc::embedding_accumulate_, NoGil());
  m.def("wgrad_accumulate_", &gradacc::wgrad_accumulate_, NoGil());
  m.def("count_optimizer_step", [] { ++gradacc::optimizer_steps(); });
  m.def("has_post_hooks", &gradacc::has_post_hooks);
  m.def("follow_own_dtype", &gradacc::follow_own_dtype);
  m.def("check_not_reduced", &gradacc::check_not_reduced);
  m.def("count_uses", &gradacc::count_uses_of);
  m.def("deliver_in", &gradacc::deliver_to);
  m.def("cpu_isa", &gradacc::cpu::isa);
  m.def("select_cpu_isa", &gradacc::cpu::select_isa);

  py::class_<gradacc::Statistics>(m, "Statistics")
      .def_readonly("indices", &gradacc::Statistics::indices)
      .def_readonly("sums", &gradacc::Statistics::sums)
      .def_readonly("norm", &gradacc::Statistics::norm)
      .def_readonly("found_inf", &gradacc::Statistics::found_inf);
  py::class_<GradHooks, std::shared_ptr<GradHooks>>(m, "GradHooks")
      .def(py::init<std::vector<at::Tensor>, std::vector<at::Tensor>, std::vector<at::Tensor>,
                    double, at::Tensor, int64_t, int64_t, std::vector<at::Tensor>>())
      .def("refresh", &GradHooks::refresh, NoGil())
      .def("remove", &GradHooks::remove, NoGil())
      .def("expose", &GradHooks::expose, NoGil())
      .def("begin", &GradHooks::begin, NoGil())
      .def("added", &GradHooks::added, NoGil())
      .def("invalidate", &GradHooks::invalidate, NoGil())
      .def("use_inv_scale", &GradHooks::use_inv_scale, NoGil())
      .def("measure", &GradHooks::measure, NoGil())
      .def("scale", &GradHooks::scale, NoGil())
      .def("current", &GradHooks::current, NoGil())
      .def("micro_batches", &GradHooks::micro_batches, NoGil())
      .def("most_micro_batches", &GradHooks::most_micro_batches, NoGil())
      .def("end_window", &GradHooks::end_window, NoGil())
      .def("left_over", &GradHooks::left_over, NoGil())
      .def("tally",
           [](GradHooks& hooks) {
             const pybind11::gil_scoped_release no_gil;
             const gradacc::Tally tally = hooks.tally();
             return std::make_tuple(tally.window, tally.backwards, tally.unweighted);
           })
      .def("weigh", &GradHooks::weigh, NoGil())
      .def("main_grad", &GradHooks::main_grad, NoGil())
      .def("call_at_end",
           [](GradHooks& hooks, py::object call) {
             auto at_end = gradacc::with_gil<>(std::move(call));
             const py::gil_scoped_release no_gil;
             hooks.call_at_end(std::move(at_end));
           })
      .def("reduce_with",
           [](GradHooks& hooks, std::vector<int64_t> bucket_of, py::object call, bool overlaps) {
             auto launch = gradacc::with_gil<int64_t, int64_t>(std::move(call));
             const py::gil_scoped_release no_gil;
             hooks.reduce_with(std::move(bucket_of), std::move(launch), overlaps);
           })
      .def("set_reducing", &GradHooks::set_reducing, NoGil())
      .def("is_reducing", &GradHooks::is_reducing, NoGil())
      .def("is_reduced", &GradHooks::is_reduced, NoGil())
      .def("launch_rest", &GradHooks::launch_rest, NoGil())
      .def("end_reduction", &GradHooks::end_reduction, NoGil())
      .def("hold", &GradHooks::hold, NoGil())
      .def("held", &GradHooks::held, NoGil())
      .def("commit_held", &GradHooks::commit_held, NoGil())
      .def("drop_held", &GradHooks::drop_held, NoGil())
      .def("load", &GradHooks::load, NoGil());

  py::class_<ParameterWatch>(m, "ParameterWatch")
      .def(py::init<std::vector<std::tuple<py::dict, py::str, py::object>>>())
      .def("is_changed", &ParameterWatch::is_changed);

  py::class_<FusedWeight, std::shared_ptr<FusedWeight>>(m, "FusedWeight")
      .def(py::init<std::shared_ptr<GradHooks>, int64_t, at::Tensor, bool>())
      .def("batched", &FusedWeight::batched, NoGil())
      .def("grouped", &FusedWeight::grouped, NoGil())
      .def("expert", &FusedWeight::expert, NoGil());
  py::class_<FusedEmbedding, std::shared_ptr<FusedEmbedding>>(m, "FusedEmbedding")
      .def(py::init<std::shared_ptr<GradHooks>, int64_t, at::Tensor, int64_t, bool>());
  py::class_<FusedLinear>(m, "FusedLinear")
      .def(py::init<ParameterWatch, std::shared_ptr<FusedWeight>, std::optional<at::Tensor>>())
      .def("__call__", &FusedLinear::operator());
  py::class_<FusedLookup>(m, "FusedLookup")
      .def(py::init<ParameterWatch, std::shared_ptr<FusedEmbedding>>())
      .def("__call__", &FusedLookup::operator());
}
