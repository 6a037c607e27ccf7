#!/bin/bash
# The benchmark on a machine without a network. Where there is one, in the checkout's root:
#     benchmarks/gpu/offline.sh pack      # wheels that such a machine lacks into .gpu, which git ignores
# and there, in a copy with .gpu in it:
#     benchmarks/gpu/offline.sh run [flags of run.py]
# PYTHON: one of that machine, which has torch, triton, transformers and the like (python3).
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
python=${PYTHON:-python3}
packages=(accelerate braceexpand datasets dill filelock fsspec ftfy hjson kornia kornia-rs multiprocess pydantic pydantic-core
  annotated-types typing-extensions typing-inspection pytest pytest-timeout pytest-xdist execnet pytorch-optimizer submitit
  tensorboard typer wcwidth webdataset xxhash)
peers=(memeff inf-cl siglip-kernel pykeops keopscore)

pack() {
  mkdir -p .gpu/wheels
  for name in "${packages[@]}" "${peers[@]}"; do
    "$python" -m pip download --quiet --no-deps --only-binary=:all: -c constraints.txt -d .gpu/wheels \
      --python-version "${TARGET:-3.12}" --implementation cp --platform manylinux_2_28_x86_64 \
      --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 "$name" ||
      "$python" -m pip wheel --quiet --no-deps -w .gpu/wheels "$name" || echo "not to be had: $name" >&2
  done
  du -sh .gpu/wheels
}

run() {
  site=$(mktemp -d)
  "$python" -m pip install --quiet --no-index --no-deps --no-compile --target "$site" .gpu/wheels/*.whl
  PYTHONPATH=$site GLOO_SOCKET_IFNAME=lo "$python" benchmarks/gpu/run.py "$@"
}

case ${1:-} in
  pack) pack ;;
  run) shift; run "$@" ;;
  *) sed -n '2,7s/^# \?//p' "$0"; exit 2 ;;
esac
