#!/usr/bin/env bash
# Every GPU measurement of attention in one run, on the device that DEVICE names (default cuda) for PyTorch and this crate;
# the experiment takes the best device and writes to OUT:
#     PYTHON=python3 DEVICE=cuda OUT=figures/gpu_crossover bash benches/gpu_table.sh
# Needs PyTorch with safetensors, and a GPU; nothing else should run on it.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} device=${DEVICE:-cuda} out=${OUT:-figures/gpu_crossover}

cargo build --locked --release --features cuda --bin peft-limits --bin gpu_crossover
target/release/peft-limits devices
"$python" benches/peers/torch_gpu_attention.py --device "$device" --with-rust target/release/peft-limits
target/release/gpu_crossover --profile full --resume --out "$out"
