#!/usr/bin/env bash
# Checks, then measures a GPU in one run, on a machine that needs no more than a driver, bash and Python with PyTorch:
#
#     OUT=results bash benches/gpu_table.sh 1            # checks and the first measurements, within 10 minutes
#     OUT=results2 EARLIER=results bash benches/gpu_table.sh 2   # what was left, within 10 more
#     OUT=results DEVICE=gpu bash benches/gpu_table.sh rehearse  # every step at tiny sizes, on a software device
#
# Binaries come from gpu-pack/gpu.tar.xz (`benches/gpu_pack.sh` makes it) or from BIN, a folder with peft-limits, gpu_crossover,
# gpu_peft_cost and gpu_tests. Each step has its own time limit (four times as long without CUDA) and none starts when BUDGET seconds (570) are spent. OUT
# holds at most eight files, written as the run goes: log.txt, steps.csv (limit, seconds, exit code of each step),
# tests.csv, attention.csv and training.csv (PyTorch, and this crate beside it), experiments.tar.gz (folders of
# gpu_crossover and gpu_peft_cost), machine.txt. What it means: paper-notes/gpu-runs.md.
set -uo pipefail
began=$SECONDS
part=${1:?part: 1, 2 or rehearse}
root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$root" || exit 2
device=${DEVICE:-cuda} python=${PYTHON:-python3}
# A software device takes its time; only a card's is short.
slow=1 && [ "$device" = cuda ] || slow=4
budget=${BUDGET:-$((slow == 1 ? 570 : 3600))}
mkdir -p "${OUT:?folder for the results}" && out=$(cd "$OUT" && pwd) || exit 2
log=$out/log.txt steps=$out/steps.csv
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
say() { printf '%s\n' "$*" | tee -a "$log"; }

# Binaries and the kernels compiled beforehand.
bin=${BIN:-}
if [ -z "$bin" ]; then
    archive=$root/gpu-pack/gpu.tar.xz
    [ -f "$archive" ] || { say "no $archive: run benches/gpu_pack.sh, or give BIN"; exit 2; }
    tar -xJf "$archive" -C "$work" 2>/dev/null ||
        "$python" -c 'import sys, tarfile; tarfile.open(sys.argv[1]).extractall(sys.argv[2])' "$archive" "$work" || exit 2
    bin=$work/bin
fi
if [ "$device" = cuda ] && [ -d "$work/ptx" ]; then
    printf '[compilation]\ncache = { file = "%s" }\n' "$work/ptx" >"$work/cubecl.toml"
fi
# The tests and PyTorch's scripts find their files by these.
export CARGO_MANIFEST_DIR=$root PEFT_LIMITS_PROGRAM=$bin/peft-limits PEFT_LIMITS_DEVICE=$device PYTHONUNBUFFERED=1
export HF_HUB_OFFLINE=1 XDG_RUNTIME_DIR=${XDG_RUNTIME_DIR:-$work}

# CUDA's run-time compiler and headers: the toolkit's, else those of NVIDIA's Python packages.
if [ "$device" = cuda ]; then
    packages=$("$python" -c 'import importlib.util as u; s = u.find_spec("nvidia"); print(*(s.submodule_search_locations if s else []))' 2>/dev/null)
    for folder in ${CUDA_PATH:-} /usr/local/cuda $(ls -d $(printf '%s/* ' ${packages:-/nowhere}) 2>/dev/null); do
        [ -z "${CUDA_PATH:-}" ] && [ -f "$folder/include/cuda_runtime.h" ] && export CUDA_PATH=$folder
        for library in "$folder/lib64" "$folder/lib"; do
            ls "$library"/libnvrtc.so* >/dev/null 2>&1 && LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$library
        done
    done
    for library in /usr/local/nvidia/lib64 /usr/local/nvidia/lib; do
        [ -d "$library" ] && LD_LIBRARY_PATH=${LD_LIBRARY_PATH:+$LD_LIBRARY_PATH:}$library
    done
    export LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}
fi

keep() { # what the experiments have so far, their unfinished rows too
    [ -d "$work/experiments" ] && tar -czf "$work/kept.tar.gz" -C "$work/experiments" . 2>/dev/null &&
        mv "$work/kept.tar.gz" "$out/experiments.tar.gz"
}

# step NAME LIMIT COMMAND...: runs it in $work; its output goes to the log, its outcome to steps.csv.
[ -s "$steps" ] || echo "part,step,limit (s),seconds,exit code" >"$steps"
failures=0
step() {
    local name=$1 limit=$2 start=$SECONDS code
    shift 2
    local left=$((budget - (SECONDS - began)))
    if ((left < 5)); then
        say "== $name: skipped, the time is spent =="
        echo "$part,$name,$limit,0,skipped" >>"$steps"
        return 1
    fi
    limit=$((limit * slow))
    ((limit > left)) && limit=$left
    say "== $name (at $((SECONDS - began)) s, at most $limit s) =="
    (cd "$work" && timeout -s INT -k 5 "$limit" "$@") >>"$log" 2>&1
    code=$?
    say "   exit code $code after $((SECONDS - start)) s"
    echo "$part,$name,$limit,$((SECONDS - start)),$code" >>"$steps"
    ((code == 0)) || failures=$((failures + 1))
    keep
    return $code
}

# Tests one after another, each group with its outcome in tests.csv.
[ -s "$out/tests.csv" ] || echo "device,test,outcome" >"$out/tests.csv"
tests() {
    local group=$1 limit=$2 code
    local from=$(($(wc -l <"$log") + 1))
    step "tests: $group" "$limit" "$bin/gpu_tests" "$group" --test-threads 1 --show-output
    code=$?
    tail -n "+$from" "$log" | awk -v d="$PEFT_LIMITS_DEVICE" '/^test .* \.\.\. / { print d "," $2 "," ($4 ~ /^(ok|FAILED|ignored)/ ? $4 : "cut") }' >>"$out/tests.csv"
    return $code
}

data=$root/tests/data
validate() { # CASE LIMIT
    local adapter=()
    [ -d "$data/$1/adapter" ] && adapter=(--adapter "$data/$1/adapter")
    step "validate $1" "$2" "$bin/peft-limits" validate --model "$data/$1" "${adapter[@]}" \
        --reference "$data/$1/reference.safetensors" --trainer "$device"
}
have_torch() { "$python" -c 'import torch' >/dev/null 2>&1; }
torch_device=$([ "$device" = cuda ] && echo cuda || echo cpu)

machine() {
    date -u
    uname -srm
    nvidia-smi --query-gpu=name,driver_version,memory.total,clocks.sm,clocks.mem --format=csv 2>&1 || true
    "$python" -c 'import sys, torch; print(sys.version.split()[0], "torch", torch.__version__, "cuda", torch.version.cuda)' 2>&1 || true
    "$python" -c 'import peft, transformers; print("peft", peft.__version__, "transformers", transformers.__version__)' 2>&1 | tail -1
    echo "CUDA_PATH=${CUDA_PATH:-} LD_LIBRARY_PATH=${LD_LIBRARY_PATH:-}"
    "$bin/peft-limits" --version
}

say "part $part on $device, $budget s"
timeout 60 bash -c "$(declare -f machine); bin='$bin' python='$python' machine" >"$out/machine.txt" 2>&1
cat "$out/machine.txt" >>"$log"
mkdir -p "$work/experiments"
if [ -n "${EARLIER:-}" ] && [ -f "$EARLIER/experiments.tar.gz" ]; then
    tar -xzf "$EARLIER/experiments.tar.gz" -C "$work/experiments"
fi

# Without these nothing else means anything.
step "devices" 30 "$bin/peft-limits" devices || { say "the program does not run here"; exit 1; }
smoke() {
    step "first gradient$1" 60 "$bin/peft-limits" gradient "$data/attention_small.safetensors" --device "$device" -o "$work/first.safetensors"
}
if ! smoke ""; then
    # The kernels carried along may not suit this driver: let it compile its own.
    rm -rf "$work/cubecl.toml" "$work/ptx"
    smoke ", kernels compiled here" || { say "no gradient on $device: nothing is measured"; exit 1; }
fi

experiment() { # NAME LIMIT PROFILE
    step "$1" "$2" "$bin/$1" --profile "$3" --resume --out "$work/experiments/$1"
}
checks() { # against the processor's f64
    tests attention:: 70
    tests training:: 70
    tests validation:: 60
    tests commands:: 30
    for case in llama_full llama_lora llama_dora; do validate $case 25; done
}
case $part in
1)
    checks
    if have_torch; then
        step "PyTorch attention" 75 "$python" "$root/benches/peers/torch_gpu_attention.py" --device cuda --with-rust "$bin/peft-limits" \
            --csv "$out/attention.csv"
    else
        say "no PyTorch here: no peer is timed"
    fi
    experiment gpu_crossover 130 full
    have_torch && step "PyTorch training" 90 "$python" "$root/benches/peers/torch_gpu_train.py" --csv "$out/training.csv"
    experiment gpu_peft_cost 170 full
    ;;
2)
    experiment gpu_peft_cost 300 full
    experiment gpu_crossover 170 full
    # The engine's own compilation on this machine, without the kernels carried along.
    rm -rf "$work/cubecl.toml" "$work/ptx"
    smoke ", kernels compiled here"
    # The same card by Vulkan, if it is there.
    if "$bin/peft-limits" devices | grep -q 'gpu:0'; then
        export PEFT_LIMITS_DEVICE=gpu
        tests attention:: 60
        tests training:: 60
    fi
    ;;
rehearse)
    checks
    if have_torch; then
        step "PyTorch attention" 75 "$python" "$root/benches/peers/torch_gpu_attention.py" --device "$torch_device" --longest 1024 --features taylor:degree=1 \
            --with-rust "$bin/peft-limits" --rust-device "$device" --csv "$out/attention.csv"
        step "PyTorch training" 90 "$python" "$root/benches/peers/torch_gpu_train.py" --device "$torch_device" --size tiny --repeats 2 \
            --csv "$out/training.csv"
    else
        say "no PyTorch here: no peer is timed"
    fi
    experiment gpu_crossover 130 quick
    experiment gpu_peft_cost 170 quick
    ;;
*)
    say "part: 1, 2 or rehearse"
    exit 2
    ;;
esac
keep
say "done in $((SECONDS - began)) s; $failures steps failed or were cut"
grep -c ',ok$' "$out/tests.csv" | sed 's/^/tests passed: /' | tee -a "$log"
grep -v ',ok$' "$out/tests.csv" | tail -n +2 | tee -a "$log"
((failures == 0))
