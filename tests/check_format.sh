#!/usr/bin/env bash
# Fails and names the places where a C++ or CUDA file is not formatted as .clang-format says.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
find kernels parallel models runtime deploy tests -name .venv -prune -o \
  \( -name '*.cc' -o -name '*.h' -o -name '*.cu' -o -name '*.cuh' \) -print0 |
  xargs -0 clang-format --dry-run -Werror
