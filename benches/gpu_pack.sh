#!/usr/bin/env bash
# Packs what benches/gpu_table.sh needs on a machine without Rust into gpu-pack/gpu.tar.xz, and measures it:
#
#     bash benches/gpu_pack.sh [--no-build] [--no-kernels | --quick-kernels]
#
# In it: the program, the two GPU experiments and the GPU tests, built for release with the features cuda and gpu (so one set
# of binaries serves CUDA, Vulkan and software devices), stripped; and, where NVRTC is installed for PYTHON (default python3),
# the kernels of the run's own commands compiled for sm_90a on a driver without a card (tests/nvrtc/compile.py), so that a
# card need not wait for the compiler; --quick-kernels takes those of the quick profiles alone, which a slow machine has
# sooner. The project's files and the archive together must stay within LIMIT MiB (64).
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-python3} limit=${LIMIT:-64} pack=gpu-pack
target=${CARGO_TARGET_DIR:-target} build=1 kernels=full
for flag in "$@"; do
    case $flag in
    --no-build) build=0 ;;
    --no-kernels) kernels= ;;
    --quick-kernels) kernels=quick ;;
    *) echo "$flag: --no-build, --no-kernels or --quick-kernels" >&2 && exit 2 ;;
    esac
done

if ((build)); then
    cargo build --release --locked --features cuda -p peft-limits -p peft-limits-experiments \
        --bin peft-limits --bin gpu_crossover --bin gpu_peft_cost --test gpu
fi
rm -rf "$pack" && mkdir -p "$pack/bin"
cp "$target"/release/{peft-limits,gpu_crossover,gpu_peft_cost} "$pack/bin/"
# The newest of the test's builds.
cp "$(find "$target/release/deps" -maxdepth 1 -name 'gpu-*' -type f -perm -u+x -printf '%T@ %p\n' | sort -n | tail -1 | cut -d' ' -f2-)" "$pack/bin/gpu_tests"
strip "$pack"/bin/*

bin=$PWD/$pack/bin
if [ -n "$kernels" ]; then
    export CARGO_MANIFEST_DIR=$PWD PEFT_LIMITS_PROGRAM=$bin/peft-limits PEFT_LIMITS_DEVICE=cuda
    scratch=$(mktemp -d)
    trap 'rm -rf "$scratch"' EXIT
    code=0
    "$python" tests/nvrtc/compile.py --program "$bin/peft-limits" --out "$pack/nvrtc" --cache "$pack/ptx" \
        --also "$bin/gpu_tests --test-threads 1" \
        --also "$bin/gpu_peft_cost --profile $kernels --force --out $scratch/peft" \
        --also "$bin/gpu_crossover --profile $kernels --force --out $scratch/crossover" || code=$?
    # 3: no NVRTC here. The run compiles on its own machine then.
    ((code == 0 || code == 3)) || exit "$code"
fi

parts=(bin)
[ -d "$pack/ptx" ] && parts+=(ptx)
tar -cf - -C "$pack" "${parts[@]}" | xz --x86 --lzma2=preset=6,dict=192MiB >"$pack/gpu.tar.xz"
size() { awk -v b="$1" 'BEGIN { printf "%.1f MiB", b / 1048576 }'; }
tree=$(git ls-files -z --cached --others --exclude-standard | xargs -0 stat -c %s 2>/dev/null | awk '{ s += $1 } END { print s }')
archive=$(stat -c %s "$pack/gpu.tar.xz")
for file in "$pack"/bin/*; do echo "$(size "$(stat -c %s "$file")")  $file"; done
[ -d "$pack/ptx" ] && echo "$(size "$(du -sb "$pack/ptx" | cut -f1)")  $pack/ptx"
echo "$(size "$archive")  $pack/gpu.tar.xz; $(size "$tree") the project's files; together $(size $((tree + archive))) of $limit MiB"
glibc=$(objdump -T "$pack"/bin/* 2>/dev/null | grep -o 'GLIBC_[0-9.]*' | sort -uV | tail -1)
echo "needs x86-64 and glibc of ${glibc#GLIBC_} or newer"
((tree + archive <= limit << 20)) || { echo "too large" >&2; exit 1; }
