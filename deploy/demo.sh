#!/usr/bin/env bash
# The whole way of a prompt on this machine: four ranks under mpirun take a real document over gRPC, prefill it split by
# sequence and by head, dense and sparse, and transformers goes on from the KV caches that they stream out.
#
#   deploy/demo.sh [MODEL_DIR]
#
# MODEL_DIR: a Hugging Face directory of a Llama model with tokenizer; by default SmolLM2-135M-Instruct, made once below
# build/models. Exit 0 only if 32 greedy tokens from the dense KV cache are transformers' own, every checksum held and the
# sparse prefill's density is below 0.5. Leaves no process behind.
set -euo pipefail
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
if (($# > 1)) || [[ ${1:-} == -* ]]; then
  echo "usage: deploy/demo.sh [MODEL_DIR]" >&2
  exit 2
fi
model=${1:+$(realpath -- "$1")}
cd "$root"

say() { echo "demo: $*" >&2; }

deploy/setup.sh
python=.venv/bin/python
say "building (build/cpu/build.log)"
mkdir -p build/cpu
{ cmake --preset cpu && cmake --build --preset cpu --target longfill; } >build/cpu/build.log 2>&1 || {
  tail -n 40 build/cpu/build.log >&2
  say "the build failed"
  exit 1
}
"$python" deploy/python/generate_protos.py
if [[ -z $model ]]; then
  model=$root/build/models/SmolLM2-135M-Instruct
  "$python" deploy/model_from_gguf.py "$model"
fi

work=$(mktemp -d)
mpirun_pid=

# Rank 0 drains on SIGTERM and then ends the others; what is left after that is killed. Not through mpirun, which kills its
# ranks a second after it got the signal.
stop() {
  trap - EXIT INT TERM HUP
  if [[ -n $mpirun_pid ]]; then
    local ranks
    ranks=$(cat "/proc/$mpirun_pid/task/$mpirun_pid/children" 2>/dev/null) || ranks=
    # shellcheck disable=SC2086  # one word per process
    [[ -z $ranks ]] || kill -TERM $ranks 2>/dev/null || true
    for _ in {1..100}; do
      kill -0 "$mpirun_pid" 2>/dev/null || break
      sleep 0.1
    done
    kill -TERM "$mpirun_pid" 2>/dev/null || true
    wait "$mpirun_pid" 2>/dev/null || true
  fi
  rm -rf "$work"
  return 0
}
trap stop EXIT
trap 'stop; exit 130' INT TERM HUP

say "starting 4 ranks"
export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1
mpirun -np 4 --oversubscribe \
  build/cpu/bin/longfill serve --model "$model" --listen 127.0.0.1:0 --mesh sequence=2,head=2 \
  </dev/null >"$work/out" 2>"$work/err" &
mpirun_pid=$!
target=
for _ in {1..600}; do
  target=$(sed -n 's/.*longfill: serving on //p' "$work/out" | head -n 1)
  [[ -n $target ]] && break
  kill -0 "$mpirun_pid" 2>/dev/null || break
  sleep 0.1
done
if [[ -z $target ]]; then
  cat "$work/err" "$work/out" >&2
  say "the service did not start"
  exit 1
fi

code=0
PYTHONPATH=deploy/python/src "$python" deploy/demo.py --target "$target" --model "$model" || code=$?
if ((code != 0)); then
  say "the service wrote:"
  tail -n 20 "$work/err" >&2
fi
exit "$code"
