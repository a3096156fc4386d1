"""Exchanges over NCCL between all GPUs: the Communicator contract, whole engines, attention in rounds and selections as ranks
under mpirun, ranks that do not come, and the contract as threads of one process."""

from section_contract import run_tests, run_under_mpi

# On every mesh; a group over NCCL takes most of a second to make, so these are few.
MESH_TESTS = ("EngineMesh.*", "ParallelAttentionTest.*Rounds*", "DistributedIndex.IsTheSameBitForBitOnEveryMesh")


def run(pack, checks, arguments):
    backend = "nccl" if pack.device == "cuda" else "guarded"
    may_skip = pack.device == "cpu"
    contract = f"*CommunicatorContract.*/{backend}"
    run_under_mpi(pack, checks, "mpi_multirank_test", contract, arguments.ranks, may_skip)
    meshes = ":".join(f"*{test}/{backend}" for test in MESH_TESTS)
    run_under_mpi(pack, checks, "mpi_multirank_test", meshes, arguments.ranks, may_skip)
    if pack.device == "cuda":
        run_tests(pack, checks, "engine_cuda_test", "NcclOnCuda.*:*NcclIsRefused*", "engine_cuda_test, NCCL", may_skip=False)
    run_tests(pack, checks, "multirank_test", contract, "multirank_test, ranks as threads", may_skip=may_skip)
