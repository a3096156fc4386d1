#ifndef LONGFILL_TESTS_MULTIRANK_RANKS_H_
#define LONGFILL_TESTS_MULTIRANK_RANKS_H_

// One way to write a multi-rank test, two ways to run it: in_process_ranks.cc plays every rank as a thread,
// mpi_ranks.cc is the main program of a process under mpirun. In both, the body runs once for each rank.

#include <functional>
#include <vector>

#include "parallel/communicator.h"
#include "parallel/mesh.h"

namespace longfill {

// Group sizes that can be played: several in process, the one of mpirun under MPI.
std::vector<int> GroupSizes();

// Runs body(world) on every rank of a fresh group (in process) or of the world (MPI); returns when all here
// are done.
void OnEveryRank(int size, const std::function<void(Communicator& world)>& body);

// Every {sequence, head} with sequence * head == size.
inline std::vector<Mesh> Factorisations(int size) {
  std::vector<Mesh> meshes;
  for (int sequence = 1; sequence <= size; ++sequence) {
    if (size % sequence == 0) meshes.push_back({sequence, size / sequence});
  }
  return meshes;
}

}  // namespace longfill

#endif  // LONGFILL_TESTS_MULTIRANK_RANKS_H_
