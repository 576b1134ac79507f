#!/usr/bin/env python3
"""Times PyTorch's scaled_dot_product_attention with autograd, and this crate, on one GPU and the same heads.

    python benches/peers/torch_gpu_attention.py --device cuda --with-rust target/release/peft-limits [--csv FILE]

The heads are those of torch_attention.py, with the rank of `gpu_crossover`. --with-rust writes each one up to
--rust-longest tokens to a file and has `peft-limits probe` compute its streaming gradient on --rust-device (default: cuda
for cuda, gpu otherwise), and each --features SPEC as a chained one; both report their error against the processor's f64,
whose time is why longer heads are left to `gpu_crossover`. f32 throughout: TF32 is off in PyTorch as it is in this crate.
PyTorch's time is the median of the repeats after a warm-up, with the device waited for; the crate's is one run after a
warm-up and includes sending the head and fetching the gradients. Run `benches/gpu_table.sh` for the whole table.
"""

import argparse
import csv
import json
import os
import subprocess
import sys
import tempfile

import torch
from torch_attention import Head, quartiles

# L, d, r, repeats
CASES = [
    (1024, 64, 4, 15),
    (4096, 64, 4, 15),
    (16384, 64, 4, 5),
    (65536, 64, 4, 3),
    (65536, 8, 4, 3),
]
COLUMNS = [
    "tokens",
    "head_dim",
    "rank",
    "method",
    "time (s)",
    "first quartile (s)",
    "third quartile (s)",
]
COLUMNS += ["gradient error", "device", "torch"]


def write_head(head, path):
    """The head as an input file of `peft-limits`."""
    from safetensors.torch import save_file

    tensors = {"X": head.x, "Y": head.y}
    for letter, w, a, b in zip("QKV", head.weights, head.a, head.b):
        tensors |= {f"W{letter}": w, f"A{letter}": a, f"B{letter}": b}
    rank = head.a[0].shape[0]
    metadata = {"beta": repr(1 / head.width), "alpha": repr(head.scaling * rank), "r": str(rank)}
    save_file(
        {name: t.detach().cpu().contiguous() for name, t in tensors.items()},
        path,
        metadata=metadata,
    )


def rust_times(binary, device, specs, head):
    """(name, seconds, error against f64) of the streaming and the chained gradients."""
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "head.safetensors")
        write_head(head, path)
        features = [part for spec in specs for part in ("--features", spec)]
        command = [binary, "probe", path, "--device", device, "--json", *features]
        found = json.loads(
            subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
        )
    rows = [
        (
            f"streaming on {found['device']}",
            found["streaming"]["seconds"],
            found["streaming"]["gradient_error"],
        )
    ]
    for method in found["methods"]:
        if "error" in method:
            print(f"  {method['features']}: {method['error']}")
        else:
            rows.append((method["features"], method["seconds"], method["gradient_error"]))
    return rows


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--device", default="cuda", help="PyTorch's device: cuda, mps or cpu")
    parser.add_argument(
        "--with-rust", metavar="BINARY", help="peft-limits, built with --features cuda"
    )
    parser.add_argument("--rust-device", help="what `peft-limits devices` calls the same device")
    parser.add_argument(
        "--features", action="append", metavar="SPEC", help="may be given several times"
    )
    parser.add_argument("--longest", type=int, default=65536, help="leave out longer sequences")
    parser.add_argument(
        "--rust-longest", type=int, default=16384, help="longest head given to --with-rust"
    )
    parser.add_argument("--csv", help="append rows to this file as they are measured")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.manual_seed(args.seed)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.set_default_device(args.device)
    rust_device = args.rust_device or ("cuda" if args.device.startswith("cuda") else "gpu")
    specs = args.features or ["taylor:degree=1", "taylor:degree=2,center=both"]
    wait = {"cuda": torch.cuda.synchronize, "mps": torch.mps.synchronize}.get(
        args.device.split(":")[0], lambda: None
    )

    head = Head(257, 24, 5)
    for got, want in zip(head.gradients(), head.explicit()):
        gap = float((got - want).norm() / want.norm())
        if not gap < 1e-4:
            sys.exit(f"PyTorch's gradients are off by {gap:.1e}; nothing is timed")

    file = open(args.csv, "a", newline="") if args.csv else None
    out = csv.writer(file, lineterminator="\n") if file else None
    if out and file.tell() == 0:
        out.writerow(COLUMNS)
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else args.device
    print(f"PyTorch {torch.__version__} on {name}, f32; median [quartiles]")
    for tokens, width, rank, repeats in CASES:
        if tokens > args.longest:
            continue
        head = Head(tokens, width, rank)

        def work():
            head.gradients()
            wait()

        low, middle, high = quartiles(repeats, work)
        print(f"L={tokens:6} d={width:3} r={rank}")
        print(
            f"  torch SDPA + autograd: {1e3 * middle:.2f} ms [{1e3 * low:.2f}, {1e3 * high:.2f}]",
            flush=True,
        )
        rows = [("torch SDPA + autograd", middle, low, high, "")]
        if args.with_rust and tokens <= args.rust_longest:
            for label, seconds, error in rust_times(args.with_rust, rust_device, specs, head):
                ratio = middle / seconds
                print(
                    f"  {label}: {1e3 * seconds:.2f} ms, torch / ours {ratio:.2f}, gradient error {error:.1e}",
                    flush=True,
                )
                rows.append((label, seconds, "", "", error))
        if out:
            out.writerows([tokens, width, rank, *row, name, torch.__version__] for row in rows)
            file.flush()


if __name__ == "__main__":
    main()
