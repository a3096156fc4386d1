#!/usr/bin/env bash
# Installs what longfill builds, tests and runs with on Debian 12: missing Debian packages, and the virtual environment
# `.venv` in the repository root with the packages pinned in deploy/python/requirements.txt on top of Debian's torch.
# Says nothing and changes nothing when all of it is there. Needs no terminal. Usage: deploy/setup.sh
# The CUDA toolkit is in no Debian package of the version needed: this script only says when there is none.
set -euo pipefail

packages=(
  # build
  build-essential cmake ninja-build ccache pkg-config git
  clang-format clang-tidy                                     # checked by CI
  # service
  libgrpc++-dev protobuf-compiler protobuf-compiler-grpc libprotobuf-dev
  libabsl-dev                                                 # Status, StrCat
  libspdlog-dev                                               # log
  libssl-dev                                                  # SHA-256
  libcli11-dev nlohmann-json3-dev                             # options, JSON
  # kernels
  libhwy-dev                                                  # SIMD with run-time dispatch
  libdnnl-dev                                                 # GEMM
  libisal-dev                                                 # CRC32C
  # ranks
  libopenmpi-dev openmpi-bin
  # tests
  libgtest-dev libgmock-dev
  # oracle, demo and Python client
  ca-certificates                                             # pip
  python3-venv python3-torch python3-numpy
  libopenblas0-pthread                                        # torch calls libblas.so.3; Debian's default is tens of times slower
)

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
requirements=$root/deploy/python/requirements.txt
venv=$root/.venv
minimum_cuda=12.8
python=/usr/bin/python3  # Debian's own, whatever comes first on PATH: python3-torch is built for no other

say() { echo "setup: $*" >&2; }
fail() { say "$*"; exit 1; }

# Prints the packages of the list that are not installed, one a line.
missing_packages() {
  local installed
  installed=$(dpkg-query -W -f '${db:Status-Status} ${Package}\n' "${packages[@]}" 2>/dev/null) || true
  installed=$(sed -n 's/^installed //p' <<<"$installed")
  comm -23 <(printf '%s\n' "${packages[@]}" | sort -u) <(sort -u <<<"$installed")
}

install_packages() {
  local missing as_root=()
  missing=$(missing_packages)
  [[ -z $missing ]] && return
  missing=${missing//$'\n'/ }
  if ((EUID != 0)); then
    command -v sudo >/dev/null ||
      fail "these Debian packages are missing, and neither root nor sudo is at hand to install them: $missing"
    as_root=(sudo)
  fi
  say "installing Debian packages: $missing"
  "${as_root[@]}" apt-get update -qq || fail "apt-get update failed"
  # shellcheck disable=SC2086  # one word per package
  "${as_root[@]}" env DEBIAN_FRONTEND=noninteractive \
    apt-get install -y -qq --no-install-recommends $missing </dev/null >/dev/null ||
    fail "apt-get could not install: $missing"
}

# Changes whenever the environment has to be made anew: other pins, other Python, checkout moved, other way to make it.
environment_stamp() {
  { echo "$root"; "$python" --version; cat "$requirements"; declare -f make_environment; } | sha256sum
}

make_environment() {
  local stamp
  stamp=$(environment_stamp)
  [[ -f $venv/setup-stamp && $(<"$venv/setup-stamp") == "$stamp" ]] && return
  say "making the Python environment $venv (about 150 MB of downloads)"
  unset PYTHONPATH PYTHONHOME PIP_TARGET PIP_PREFIX PIP_USER  # would send the packages elsewhere
  "$python" -m venv --clear "$venv"
  "$venv/bin/python" -m pip install --quiet --disable-pip-version-check --no-input --no-deps -r "$requirements" ||
    fail "pip could not install $requirements"
  # Debian's packages come after the pinned ones. --system-site-packages would let a user's own ~/.local in between.
  echo /usr/lib/python3/dist-packages >"$venv/lib/python3.11/site-packages/debian.pth"
  "$venv/bin/python" -c 'import torch, transformers, grpc_tools.protoc, google_crc32c, gguf, jinja2, matplotlib.pyplot, safetensors.torch
from transformers import LlamaForCausalLM' || fail "the Python environment does not import"
  echo "$stamp" >"$venv/setup-stamp"
}

# The GPU backend (CMake option LONGFILL_CUDA, preset cuda) is the only part that needs nvcc.
report_cuda() {
  local nvcc version
  nvcc=$(PATH=$PATH:/usr/local/cuda/bin command -v nvcc) || nvcc=
  if [[ -z $nvcc ]]; then
    say "no nvcc on PATH or in /usr/local/cuda/bin: all presets but cuda build; that one needs the CUDA toolkit" \
      "$minimum_cuda or newer (developer.nvidia.com/cuda-downloads)"
    return
  fi
  version=$("$nvcc" --version | sed -n 's/.*release \([0-9.]*\).*/\1/p')
  if [[ $(printf '%s\n' "$minimum_cuda" "$version" | sort -V | head -n 1) != "$minimum_cuda" ]]; then
    say "$nvcc is of CUDA $version: all presets but cuda build; that one needs $minimum_cuda or newer"
  fi
}

if ! command -v apt-get >/dev/null; then
  fail "this is no Debian system; install the counterparts of these Debian 12 packages by hand: ${packages[*]}"
fi
exec 9<"$root"
flock 9  # a second setup of the same checkout waits for the first
install_packages
make_environment
report_cuda
