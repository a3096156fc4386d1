#ifndef LONGFILL_DEPLOY_CLI_VERSION_H_
#define LONGFILL_DEPLOY_CLI_VERSION_H_

namespace longfill {

extern const char kVersion[];    // of the project, "0.1.0"
extern const char kGitCommit[];  // the commit that was built, 12 digits; "unknown" outside of a git checkout

}  // namespace longfill

#endif  // LONGFILL_DEPLOY_CLI_VERSION_H_
