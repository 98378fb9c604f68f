#!/usr/bin/env bash
# Everything that waits for a GPU, in one go: kernels against their definitions, the tests that need CUDA and those that
# are most likely to find something there, what a step costs at the shape of OLMoE-1B-7B, and inference.
#
#     bash examples/on_a_gpu.sh [FOLDER]     # from the repository's folder; python is PYTHON, or python3
#
# Each part writes its own file into FOLDER (default: on-a-gpu) and a failing one does not stop the others.
set -uo pipefail
out=${1:-on-a-gpu} python=${PYTHON:-python3}
mkdir -p "$out"
part() {
    local name=$1 began=$SECONDS
    shift
    "$@" > "$out/$name.txt" 2> "$out/$name.err"
    echo "$name: exit code $?, $((SECONDS - began)) s"
}
part kernels "$python" examples/check_kernels.py
part kernels-fp32 "$python" examples/check_kernels.py --dtype float32
part tests-gpu "$python" -m pytest -q -m gpu
part tests-cuda "$python" -m pytest -q --device cuda tests/ops tests/adapter/test_dispatch.py tests/adapter/test_bits.py \
    tests/settling/test_gradients.py tests/gates/test_generation.py tests/architectures/test_implementations.py
part step "$python" examples/benchmark.py --shape olmoe --device cuda --profile sweep direct spawn LoRA --maps 4 --json
part inference "$python" examples/inference.py --shape olmoe --shares 0.12 --deepened 0.12 --device cuda --batch 4 --length 1024 \
    --turns 3 --packed int8 nf4 --json
