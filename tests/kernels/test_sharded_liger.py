"""A model with Liger's norms on two processes under FSDP2, which gives modules classes of its own."""

from tests.processes import on_two_processes


def test_sharded_norms_are_those_of_one_process():
    differences = on_two_processes("kernels/sharded_liger_worker.py")
    assert set(differences) == {"Llama's norms", "Gemma's norms"} and max(differences.values()) < 1e-5
