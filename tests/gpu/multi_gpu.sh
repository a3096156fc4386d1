#!/usr/bin/env bash
# What must hold on several GPUs of one machine, in one go of at most 8 minutes that needs no network:
#   tests/gpu/multi_gpu.sh [OPTION...] PACK       PACK: the folder that pack.sh made, with programs of the preset cuda
#   --ranks N             GPUs and ranks (default: all of nvidia-smi)
#   --out FILE            every check as JSON (default: multi_gpu.json)
#   --python PROGRAM      with torch, transformers and grpcio (default: python3)
#   --small               small sizes on CPU ranks: a test of these scripts
#   --sections A,B,...    some of: nccl meshes scaling readers ranklost (default: these, in this order)
# Prints a line for every check and a short table last. Exit code 0: every check passed.
# Torch and transformers are for the section meshes alone, grpcio for readers and ranklost. NVLink multicast stays off.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
usage() { sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2; exit 2; }

ranks=
out=multi_gpu.json
python=python3
sections=nccl,meshes,scaling,readers,ranklost
options=(--device cuda)
while (($# > 0)) && [[ $1 == --* ]]; do
  case $1 in
    --small)
      options=(--device cpu --small --allow-not-run)
      for section in nccl meshes scaling readers ranklost; do options+=(--limit "$section=500"); done  # few cores
      shift; continue ;;
    --ranks | --out | --python | --sections) (($# > 1)) || usage ;;
    *) usage ;;
  esac
  case $1 in
    --ranks) ranks=$2 ;;
    --out) out=$2 ;;
    --python) python=$2 ;;
    --sections) sections=$2 ;;
  esac
  shift 2
done
(($# == 1)) || usage
if [[ -z $ranks && ${options[1]} == cpu ]]; then
  ranks=2
elif [[ -z $ranks ]]; then
  gpus=$(nvidia-smi --list-gpus) || { echo "multi_gpu.sh: nvidia-smi fails; --ranks N says how many GPUs there are" >&2; exit 2; }
  ranks=$(grep -c . <<<"$gpus" || true)
fi
[[ $ranks =~ ^[0-9]+$ ]] || { echo "multi_gpu.sh: --ranks $ranks is no number" >&2; exit 2; }
((ranks >= 2)) || { echo "multi_gpu.sh: needs two GPUs, there are $ranks" >&2; exit 2; }

export NCCL_NVLS_ENABLE=0
status=0
rm -f -- "$out"  # a table of an earlier run would be printed if verify.py failed before it wrote one
"$python" "$here/verify.py" --pack "$1" --ranks "$ranks" --sections "$sections" --out "$out" "${options[@]}" || status=$?
[[ ! -f $out ]] || "$python" "$here/ranks_table.py" "$out"
exit $status
