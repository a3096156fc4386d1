#ifndef LONGFILL_DEPLOY_CLI_SCALING_REPORT_H_
#define LONGFILL_DEPLOY_CLI_SCALING_REPORT_H_

// What `longfill bench scaling` prints.

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "kernels/base/dtype.h"
#include "parallel/mesh.h"
#include "runtime/scaling/link_model.h"
#include "runtime/scaling/link_traffic.h"
#include "runtime/scaling/referenced_keys.h"
#include "runtime/scaling/scaling_figures.h"

namespace longfill {

struct ScalingRun {
  Mesh mesh;
  bool peer_copies = false;  // keys and values are read by copy engines, not exchanged
  ScalingFigures figures;
  LinkTraffic::Figures copied;               // beside the work of all ranks
  std::optional<ReferencedKeys> referenced;  // by sequence, of our coverage
  double recording_seconds = 0;              // that all ranks took one after the other
};

struct ScalingReport {
  std::string geometry;
  int64_t num_tokens = 0;
  int64_t num_layers = 0;
  int64_t executed_layers = 0;  // the others are taken to be like one of these
  std::string attention;        // the patterns, as they were asked for
  std::string indices;          // the file that is replayed; empty: none
  uint64_t seed = 0;
  std::string device;
  DType compute_dtype = DType::kFloat32;
  LinkRates links;
  std::vector<ScalingRun> runs;

  // Seconds of the run on one rank over ranks times seconds; empty: there is none.
  std::optional<double> Efficiency(const ScalingRun& run) const;

  std::string ToJson() const;
  // In two parts, so that runs can be printed as they end.
  std::string HeadText() const;
  std::string RunText(const ScalingRun& run) const;
};

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_CLI_SCALING_REPORT_H_
