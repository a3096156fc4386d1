#ifndef LONGFILL_DEPLOY_DOCTOR_GROUP_CHECKS_H_
#define LONGFILL_DEPLOY_DOCTOR_GROUP_CHECKS_H_

// From what was read or measured of a group of ranks to findings. Pure.

#include <string>
#include <string_view>
#include <vector>

#include "deploy/doctor/exchange_probe.h"
#include "deploy/doctor/finding.h"

namespace longfill {

// build.version: "0.1.0 (commit abc)" by rank.
Finding JudgeBuilds(const std::vector<std::string>& builds);

// mpi.library, of one rank: "Open MPI 4.1.4" that longfill was compiled with against "Open MPI v4.1.4" that
// is loaded. Both empty: a build without MPI.
Finding JudgeMpiLibrary(std::string_view compiled_with, std::string_view library);
// mpi.equal: the libraries of all ranks.
Finding JudgeMpiAgreement(const std::vector<std::string>& libraries);
// mpi.threads: the level that MPI gives; empty: it was not started.
Finding JudgeThreadLevel(std::string_view level);

// exchange.reduction: `wrong` says what came out wrong; empty: nothing.
Finding JudgeReduction(std::string_view wrong, int num_ranks);
// exchange.latency: median seconds of a reduction of one number over all ranks.
Finding JudgeLatency(double seconds, bool several_hosts);
// exchange.bandwidth: one finding for links inside hosts, one for those between hosts, where there are any.
// `hosts` by rank.
std::vector<Finding> JudgeLinks(const std::vector<LinkRate>& links, const std::vector<std::string>& hosts);

// clock.offset, of a host against rank 0's.
Finding JudgeClock(const ClockOffset& offset);

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_DOCTOR_GROUP_CHECKS_H_
