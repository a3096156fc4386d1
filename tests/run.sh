#!/usr/bin/env bash
# Builds longfill and runs every test that this machine can run; ends with ctest's summary. Usage:
#   tests/run.sh            format, clang-tidy, tests of the preset cpu, build of the CUDA backend and its kernel contract tests
#                           (needs nvcc; without a GPU its GPU tests skip), ASan+UBSan over unit and multi-rank tests, TSan
#                           over all tests without gRPC and MPI; those leave out tests that need a GPU
#   tests/run.sh --quick    the preset cpu alone
#   tests/run.sh --long     also the tests with the label long, which take an hour
# Environment: LONGFILL_SHARED_DIR, the folder with needle-20m and recorded data (default: `shared` beside the checkout);
# LONGFILL_TIDY_SECONDS, how long clang-tidy may look at files that it has not seen in this form (default 90).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

quick=false long=false
for argument in "$@"; do
  case $argument in
    --quick) quick=true ;;
    --long) long=true ;;
    *) echo "run.sh: unknown option $argument; usage: tests/run.sh [--quick] [--long]" >&2; exit 2 ;;
  esac
done

step() { printf '\n== %s (%d s)\n' "$*" "$SECONDS"; }

# Open MPI as root, with more ranks than cores, on this host alone.
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
export CMAKE_BUILD_PARALLEL_LEVEL=${CMAKE_BUILD_PARALLEL_LEVEL:-$(nproc)}
configure_options=()
[[ -n ${LONGFILL_SHARED_DIR:-} ]] && configure_options+=("-DLONGFILL_SHARED_DIR=$LONGFILL_SHARED_DIR")

build() {  # PRESET [TARGET...]
  local preset=$1
  shift
  step "build $preset${*:+: $*}"
  local log=build/configure-$preset.log
  mkdir -p build
  cmake --preset "$preset" "${configure_options[@]}" >"$log" 2>&1 || { cat "$log"; return 1; }
  cmake --build --preset "$preset" ${*:+--target "$@"} -- --quiet
}

step "setup"
deploy/setup.sh
.venv/bin/python deploy/python/generate_protos.py

if ! $quick; then
  step "clang-format"
  tests/check_format.sh
fi

build cpu
if ! $quick; then
  step "clang-tidy"
  .venv/bin/python tests/tidy.py --build build/cpu --seconds "${LONGFILL_TIDY_SECONDS:-90}"
fi
step "tests of the preset cpu"
ctest --preset cpu
if $long; then
  step "long tests"
  ctest --test-dir build/cpu --output-on-failure --no-tests=error -L long
fi
$quick && exit

if PATH=$PATH:/usr/local/cuda/bin command -v nvcc >/dev/null; then
  build cuda kernel_contract_test cuda_unit_test  # with the whole backend; the rest is compiled as for the preset cpu
  step "clang-tidy of the CUDA backend"
  find kernels/cuda tests/unit/cuda -name '*.cc' ! -name cuda_absent.cc -print0 |
    xargs -0 .venv/bin/python tests/tidy.py --build build/cuda --seconds "${LONGFILL_TIDY_SECONDS:-90}"
  step "kernel contract tests of the preset cuda"
  ctest --preset cuda -L contract -R '/cuda_'
else
  step "skipped: build and tests of the preset cuda, since there is no nvcc on PATH or in /usr/local/cuda/bin"
fi

gpu_tests='^Backends/.*/(cuda_|nccl)'
build asan longfill_tests_unit longfill_tests_multirank
step "unit and multi-rank tests under ASan and UBSan"
# Open MPI and its libraries leak at exit; nothing of ours is suppressed. Ranks of mpirun run the tests that
# ranks as threads do.
LSAN_OPTIONS=suppressions=$PWD/tests/testing/lsan_suppressions.txt:print_suppressions=0 \
  ctest --preset asan -L 'unit|multirank' -E "$gpu_tests|^Mpi[.][24]Ranks\$|^bench_kernels_smoke\$"

build tsan longfill_tests_unit longfill_tests_contract longfill_tests_multirank
step "all tests without gRPC and MPI under TSan"
# The TSan of GCC 12 cannot start where the kernel spreads mappings over more than 28 random bits.
without_aslr=()
setarch "$(uname -m)" -R true 2>/dev/null && without_aslr=(setarch "$(uname -m)" -R)
"${without_aslr[@]}" ctest --preset tsan -L 'unit|contract|multirank' -E "$gpu_tests|^bench_kernels_smoke\$"
