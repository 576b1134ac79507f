#!/usr/bin/env python3
"""Compiles for CUDA, on a machine without a card, every kernel that the GPU commands launch.

    pip install nvidia-cuda-nvrtc nvidia-cuda-runtime nvidia-cuda-cccl nvidia-cuda-crt nvidia-cuda-nvcc   # any folder
    cargo build --release --features cuda --bin peft-limits
    python tests/nvrtc/compile.py --program target/release/peft-limits --out nvrtc-out [--jobs few|all] [--also COMMAND]

The program runs on `driver.c`, a CUDA driver that answers as a Hopper card and holds nothing: the engine generates the same
CUDA C++ as on the card, the real NVRTC compiles it for sm_90a with the engine's own options, and the PTX is kept. `ptxas`,
where its wheel is installed, assembles each kernel, which a card's driver would do, and tells registers, spills and shared
memory. What the kernels compute is not seen: nothing runs.

Writes kernels.csv: kernel, architecture, PTX bytes, registers, spilled bytes, shared memory, how many variants. Exit code:
0 all compiled; 1 a kernel does not; 3 NVRTC is not installed here, which is said and nothing else is done. Needs a C compiler.
"""

import argparse
import csv
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
HEADS = ["small", "medium", "causal", "large_logits", "softmax_one"]
SPECS = [
    "taylor:degree=1", "taylor:degree=3", "taylor:degree=2,center=both", "chebyshev:degree=3,check=scan,center=both",
    "fitted:degree=2", "positive-features:rank=48", "tensor-sketch:degree=2,rank=64", "nystrom:rank=24",
    "support-basis:degree=2,threshold=50", "truncated-svd:rank=12",
]  # fmt: skip
METHODS = ["full", "lora", "dora", "moslora", "paca", "s2ft"]


def nvidia_folders():
    """Folders of NVIDIA's wheels: one for CUDA 13, one a package for CUDA 12."""
    found = importlib.util.find_spec("nvidia")
    for top in found.submodule_search_locations if found else []:
        yield from sorted(p for p in Path(top).iterdir() if p.is_dir())


def toolkit(folder):
    """(library folders, toolkit folder with all headers in include, ptxas or None), or None without NVRTC."""
    folders = list(nvidia_folders())
    nvrtc = [f / "lib" for f in folders if list(f.glob("lib/libnvrtc.so*"))]
    headers = [f / "include" for f in folders if (f / "include").is_dir()]
    if not nvrtc or not any((h / "cuda_runtime.h").exists() for h in headers):
        return None
    include = Path(folder) / "toolkit" / "include"
    include.mkdir(parents=True)
    for part in headers:
        for entry in part.iterdir():
            if not (include / entry.name).exists():
                (include / entry.name).symlink_to(entry)
    assembler = next((f / "bin" / "ptxas" for f in folders if (f / "bin" / "ptxas").exists()), None)
    return nvrtc, include.parent, assembler


def commands(program, scratch, jobs):
    """Command lines that together launch what the engine can launch here."""
    few = jobs == "few"
    for head in HEADS[:1] if few else HEADS:
        path = str(DATA / f"attention_{head}.safetensors")
        for products in ["f32", "tf32", "bf16", "f16"]:
            yield [
                program,
                "gradient",
                path,
                "--device",
                "cuda",
                "--products",
                products,
                "-o",
                f"{scratch}/out.safetensors",
            ]
        specs = SPECS[:3] if few else SPECS
        features = [part for spec in specs for part in ("--features", spec)]
        yield [program, "probe", path, "--device", "cuda", *features]
    for case in ["llama_full", "llama_full_mha_tied", "llama_lora", "llama_dora"]:
        adapter = DATA / case / "adapter"
        batch = DATA / case / "reference.safetensors"
        extra = ["--adapter", str(adapter)] if adapter.exists() else []
        yield [
            program,
            "validate",
            "--model",
            str(DATA / case),
            *extra,
            "--reference",
            str(batch),
            "--trainer",
            "cuda",
        ]
    for method in METHODS[:2] if few else METHODS:
        for kind in ["adamw", "sgd"]:
            config = Path(scratch) / f"{method}-{kind}.toml"
            # An adapter starts from a trained model: the first run's.
            source = (
                'preset = "pico"'
                if method == "full"
                else f'path = "{scratch}/run-full-adamw/model"'
            )
            text = f'[model]\n{source}\n[method]\nname = "{method}"\n[optimizer]\nkind = "{kind}"\n'
            text += '[train]\nsteps = 2\nbatch = 2\nlength = 48\ntruncate = true\neval_rows = 0\n[[data]]\ntask = "lists"\n'
            config.write_text(text)
            yield [
                program,
                "train",
                str(config),
                "--device",
                "cuda",
                "--out",
                f"{scratch}/run-{method}-{kind}",
            ]


def assemble(assembler, path):
    """(entry, registers, spilled bytes, shared bytes, error) of one PTX file."""
    text = path.read_text(errors="replace")
    entry = re.search(r"\.entry\s+(\w+)", text)
    name = entry.group(1) if entry else path.stem
    if not assembler:
        return name, "", "", "", None
    done = subprocess.run(
        [str(assembler), "-arch=sm_90a", "-v", "-o", "/dev/null", str(path)],
        capture_output=True,
        text=True,
    )
    if done.returncode != 0:
        return name, "", "", "", (done.stderr or done.stdout).strip().splitlines()[:3]
    said = done.stderr + done.stdout
    number = lambda pattern: sum(int(n) for n in re.findall(pattern, said)) or 0  # noqa: E731
    spilled = number(r"(\d+) bytes spill stores")
    return name, number(r"Used (\d+) registers"), spilled, number(r"(\d+) bytes smem"), None


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--program", required=True, help="peft-limits, built with --features cuda")
    parser.add_argument("--out", required=True, help="folder for kernels.csv, the PTX and the log")
    parser.add_argument(
        "--jobs", choices=["few", "all"], default="all", help="few: the checks' smallest part"
    )
    parser.add_argument(
        "--also",
        action="append",
        default=[],
        metavar="COMMAND",
        help="a further command line to run",
    )
    parser.add_argument(
        "--only-also", action="store_true", help="nothing but the commands of --also"
    )
    parser.add_argument(
        "--cache", help="folder in which the engine keeps what it compiled, for a card of this kind"
    )
    args = parser.parse_args()
    out = Path(args.out).resolve()
    (out / "ptx").mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory() as scratch:
        found = toolkit(scratch)
        if not found:
            print(
                "NVRTC and CUDA's headers are not installed for this Python (see --help): no kernel was compiled"
            )
            sys.exit(3)
        libraries, root, assembler = found
        stub = Path(scratch) / "driver"
        stub.mkdir()
        source = str(Path(__file__).with_name("driver.c"))
        subprocess.run(
            ["cc", "-shared", "-fPIC", "-O1", "-o", str(stub / "libcuda.so"), source, "-lpthread"],
            check=True,
        )
        cache = (
            f'[compilation]\ncache = {{ file = "{Path(args.cache).resolve()}" }}\n'
            if args.cache
            else ""
        )
        (Path(scratch) / "cubecl.toml").write_text(cache)
        environment = os.environ | {
            "LD_LIBRARY_PATH": os.pathsep.join(map(str, [stub, *libraries])),
            "CUDA_PATH": str(root),
            "CUDA_STUB_OUT": str(out / "ptx"),
        }
        lines = (
            []
            if args.only_also
            else list(commands(str(Path(args.program).resolve()), scratch, args.jobs))
        )
        lines += [shlex.split(text) for text in args.also]
        errors, began = [], time.monotonic()
        with open(out / "log.txt", "w") as log:
            for line in lines:
                start = time.monotonic()
                done = subprocess.run(
                    line, cwd=scratch, env=environment, capture_output=True, text=True
                )
                said = done.stdout + done.stderr
                shown = " ".join(line).replace(str(ROOT) + "/", "").replace(scratch, "scratch")
                log.write(
                    f"$ {shown}\n{said}\n[exit {done.returncode}, {time.monotonic() - start:.1f} s]\n\n"
                )
                log.flush()
                # Numbers are wrong here and checks fail; a kernel that does not compile says so.
                failed = (
                    r"Compilation Error|CompilationError|Unable to load the PTX|is not known here"
                )
                if re.search(failed, said) or ("panicked" in said and "test result:" not in said):
                    errors.append((shown, said.strip()[:1500]))
        seconds = time.monotonic() - began
        files = sorted((out / "ptx").glob("*.ptx"))
        with ThreadPoolExecutor(os.cpu_count()) as pool:
            rows = list(pool.map(lambda path: (path, *assemble(assembler, path)), files))

    errors += [(f"ptxas: {name}", "\n".join(error)) for _, name, _, _, _, error in rows if error]
    kernels = {}
    for path, name, registers, spilled, shared, error in rows:
        if not error:
            kernels.setdefault(name, []).append((path.stat().st_size, registers, spilled, shared))
    with open(out / "kernels.csv", "w", newline="") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(
            [
                "kernel",
                "architecture",
                "variants",
                "ptx bytes",
                "registers",
                "spilled bytes",
                "shared bytes",
            ]
        )
        for name, variants in sorted(kernels.items()):
            table.writerow(
                [name, "sm_90a", len(variants), *(max(v[i] for v in variants) for i in range(4))]
            )
    nvrtc = sorted(p.name for folder in libraries for p in folder.glob("libnvrtc.so*"))
    print(
        f"{len(lines)} commands in {seconds:.0f} s; NVRTC: {', '.join(nvrtc)}; assembled: {'yes' if assembler else 'no'}"
    )
    print(
        f"{sum(map(len, kernels.values()))} kernels of {len(kernels)} names compiled for sm_90a -> {out / 'kernels.csv'}"
    )
    spilling = sorted(
        {name for name, variants in kernels.items() if any(v[2] for v in variants if v[2] != "")}
    )
    if spilling:
        print(f"spill registers: {', '.join(spilling)}")
    for where, error in errors:
        print(f"FAILED {where}\n{error}\n")
    sys.exit(1 if errors or not kernels else 0)


if __name__ == "__main__":
    main()
