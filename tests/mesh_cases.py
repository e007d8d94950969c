"""Cases of tp_cases.py and fsdp_cases.py that 4 ranks are needed for: meshes of two dimensions."""

import fsdp_cases
import tp_cases
from rank_cases import case, main


@case
def hybrid_shards(ranks):
    fsdp_cases.hybrid_shards(ranks)


@case
def windows_are_exact(ranks):
    tp_cases.windows_are_exact(ranks)


@case
def a_gradient_that_is_partial_over_one_dimension_of_a_mesh(ranks):
    tp_cases.a_gradient_that_is_partial_over_one_dimension_of_a_mesh(ranks)


@case
def data_parallel_beside_tensor_parallel(ranks):
    tp_cases.data_parallel_beside_tensor_parallel(ranks)


@case
def fully_shard_over_tensor_parallel_is_refused(ranks):
    tp_cases.fully_shard_over_tensor_parallel_is_refused(ranks)


if __name__ == "__main__":
    main()
