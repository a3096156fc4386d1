#!/usr/bin/env bash
# Builds longfill and runs every test that this machine can run; ends with ctest's summary. Usage:
#   tests/run.sh            format, clang-tidy, tests of the preset cpu, build of the CUDA backend and its kernel contract tests
#                           (needs nvcc; without a GPU its GPU tests skip), ASan+UBSan over unit and multi-rank tests, TSan
#                           over all tests without gRPC and MPI; those leave out tests that need a GPU
#   tests/run.sh --quick    the preset cpu alone
#   tests/run.sh --long     also the tests with the label long, which take an hour
# Environment: LONGFILL_SHARED_DIR, the folder with needle-20m and recorded data (default: `shared` beside the checkout);
# LONGFILL_TIDY_SECONDS, how long clang-tidy may look at files that it has not seen in this form (default 90);
# LONGFILL_SECONDS, how long all of it may take (default 4800): the sanitizers stop there and say what they have left out.
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

# ctest, whose summary is printed once more at the end: its lists of skipped tests are long.
summary=$(mktemp)
trap 'rm -f "$summary"' EXIT
run_tests() {  # TITLE COMMAND...
  local title=$1 log status=0
  shift
  log=$(mktemp)
  "$@" | tee "$log" || status=$?
  sed -n "s/^[0-9]*% tests passed, .*/& ($title)/p" "$log" >>"$summary"
  rm -f "$log"
  return "$status"
}
end() {
  step "summary"
  cat "$summary"
}

build_limit=  # seconds, where there is one: 124 once they have passed
build() {  # PRESET [TARGET...]
  local preset=$1
  shift
  step "build $preset${*:+: $*}"
  local log=build/configure-$preset.log
  mkdir -p build
  cmake --preset "$preset" "${configure_options[@]}" >"$log" 2>&1 || { cat "$log"; return 1; }
  ${build_limit:+timeout "$build_limit"} cmake --build --preset "$preset" ${*:+--target "$@"} -- --quiet
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
run_tests "preset cpu" ctest --preset cpu
if $long; then
  step "long tests"
  run_tests "preset cpu, long" ctest --test-dir build/cpu --output-on-failure --no-tests=error -L long
fi
if $quick; then
  end
  exit
fi

if PATH=$PATH:/usr/local/cuda/bin command -v nvcc >/dev/null; then
  # With the whole backend; the rest is compiled as for the preset cpu.
  build cuda kernel_contract_test cuda_unit_test fake_nccl_ranks nccl_communicator_test
  step "clang-tidy of the CUDA backend"
  find kernels/cuda tests/unit/cuda -name '*.cc' ! -name cuda_absent.cc -print0 |
    xargs -0 .venv/bin/python tests/tidy.py --build build/cuda --seconds "${LONGFILL_TIDY_SECONDS:-90}"
  step "kernel contract tests of the preset cuda"
  run_tests "preset cuda, kernel contract" ctest --preset cuda -L contract -R '/cuda_'
  step "tests of ranks over a stand-in for NCCL"
  run_tests "preset cuda, stand-in for NCCL" ctest --preset cuda -R '^(Fake[.]|NcclCommunicator)'
else
  step "skipped: build and tests of the preset cuda, since there is no nvcc on PATH or in /usr/local/cuda/bin"
fi

# The sanitizers take what is left of the time; what they do not reach is named. Tests are dealt to slices, so that those that
# run are of all kinds.
seconds_left() { echo $((${LONGFILL_SECONDS:-4800} - SECONDS)); }
slices=8
# Of whole prompts of 32,768 tokens a sanitizer makes minutes each.
left_out='^Backends/.*/(cuda_|nccl)|^BalanceAt32K|^bench_kernels_smoke$'

sanitizer_build() {  # PRESET TARGET...
  (($(seconds_left) > 60)) || { step "left out: tests of the preset $1, no time is left"; return 1; }
  local status=0
  build_limit=$(seconds_left)
  build "$@" || status=$?
  ((status != 124)) || { step "left out: tests of the preset $1, its build was not done in time"; return 1; }
  ((status == 0)) || exit "$status"
}

sanitizer_tests() {  # PRESET CTEST-ARGUMENT...
  local preset=$1 slice
  shift
  for ((slice = 1; slice <= slices; ++slice)); do
    (($(seconds_left) > 0)) || { step "left out: $((slices - slice + 1)) of $slices slices of the tests of the preset $preset"; return 0; }
    run_tests "preset $preset, slice $slice of $slices" "${runner[@]}" ctest --preset "$preset" "$@" -I "$slice,,$slices"
  done
}

runner=()
if sanitizer_build asan longfill_tests_unit longfill_tests_multirank; then
  step "unit and multi-rank tests under ASan and UBSan"
  # Open MPI and its libraries leak at exit; nothing of ours is suppressed. Ranks of mpirun run the tests that
  # ranks as threads do.
  export LSAN_OPTIONS=suppressions=$PWD/tests/testing/lsan_suppressions.txt:print_suppressions=0
  sanitizer_tests asan -L 'unit|multirank' -E "$left_out|^Mpi[.][24]Ranks\$"
  unset LSAN_OPTIONS
fi

if sanitizer_build tsan longfill_tests_unit longfill_tests_contract longfill_tests_multirank; then
  step "all tests without gRPC and MPI under TSan"
  # The TSan of GCC 12 cannot start where the kernel spreads mappings over more than 28 random bits.
  setarch "$(uname -m)" -R true 2>/dev/null && runner=(setarch "$(uname -m)" -R)
  sanitizer_tests tsan -L 'unit|contract|multirank' -E "$left_out"
fi
end
