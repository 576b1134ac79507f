#!/usr/bin/env python3
"""Times PyTorch's scaled_dot_product_attention with autograd on the work of `cargo bench --bench attention`.

    python benches/peers/torch_attention.py --threads 2 [--with-rust]

One head: Q, K, V = X (W + alpha/r B A) with X of L x d and adapters of rank r on all three, loss 1/2 ||O - Y||^2,
gradients of every A and B; f32. Median [quartiles] of the repeats after a warm-up. Beside each time: the rate of
PyTorch's own matrix product in the same run, and the time over the counted floor, that is over the multiply-adds of
the contracted gradient divided by that rate. --with-rust runs the Rust bench too and prints both in one table.
Nothing else should run at the same time. Gradients are compared with explicit formulas before anything is timed.
"""

import argparse
import os
import re
import statistics
import subprocess
import sys
import time

import torch

CASES = [(4096, 64, 8, 15), (16384, 64, 8, 5)]  # L, d, r, repeats


def quartiles(repeats, work):
    """First quartile, median, third quartile of the seconds, after one warm-up."""
    work()
    seconds = []
    for _ in range(repeats):
        start = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - start)
    low, middle, high = statistics.quantiles(seconds, n=4, method="inclusive")
    return low, middle, high


def matrix_rate(n=2048, repeats=9):
    """Multiply-adds a second of an n x n product in f32."""
    a, b = torch.randn(n, n), torch.randn(n, n)
    return n**3 / quartiles(repeats, lambda: a @ b)[1]


class Head:
    """One head with LoRA adapters on Q, K and V; entries of a tenth of a weight's, beta = 1/d."""

    def __init__(self, tokens, width, rank, dtype=torch.float32):
        normal = lambda *shape: torch.randn(*shape, dtype=dtype)
        self.width, self.scaling = width, 2.0
        self.x, self.y = torch.rand(tokens, width, dtype=dtype) * 2 - 1, normal(tokens, width)
        self.weights = [torch.eye(width, dtype=dtype)[torch.randperm(width)] for _ in range(3)]
        self.a = [(0.1 * normal(rank, width) / width**0.5).requires_grad_() for _ in range(3)]
        self.b = [(normal(width, rank) / rank**0.5).requires_grad_() for _ in range(3)]

    def gradients(self):
        q, k, v = (
            (self.x @ w + self.scaling * (self.x @ b) @ a)[None, None]
            for w, a, b in zip(self.weights, self.a, self.b)
        )
        output = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=1 / self.width)[
            0, 0
        ]
        loss = 0.5 * (output - self.y).square().sum()
        return torch.autograd.grad(loss, self.a + self.b)

    @torch.no_grad()
    def explicit(self):
        """The same gradients from the formulas, with L x L matrices."""
        q, k, v = (
            self.x @ (w + self.scaling * b @ a) for w, a, b in zip(self.weights, self.a, self.b)
        )
        p = torch.softmax(q @ k.T / self.width, 1)
        g = p @ v - self.y
        ds = p * (g @ v.T - (g * (p @ v)).sum(1, keepdim=True))
        d = [
            self.x.T @ (ds @ k) / self.width,
            self.x.T @ (ds.T @ q) / self.width,
            self.x.T @ (p.T @ g),
        ]
        da = [self.scaling * b.T @ dw for b, dw in zip(self.b, d)]
        db = [self.scaling * dw @ a.T for a, dw in zip(self.a, d)]
        return da + db


def counted(tokens, width, rank):
    """Multiply-adds of the contracted gradient: scores twice, P V, G V^T and 6 r columns for each pair of tokens."""
    pairs = tokens**2 * (4 * width + 6 * rank)
    return pairs + 3 * tokens * width * (width + 2 * rank) + 9 * tokens * width * rank


def rust_lines(threads):
    """Seconds (quartiles), ratio to the floor and GEMM rate of the f32 adapter cases of the Rust bench."""
    root = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..", "..")
    command = ["cargo", "bench", "--bench", "attention", "--", "streaming"]
    env = dict(os.environ, RAYON_NUM_THREADS=str(threads))
    text = subprocess.run(
        command, cwd=root, env=env, check=True, stdout=subprocess.PIPE, text=True
    ).stdout
    pattern = (
        r"streaming f32 L=\s*(\d+) d=\s*(\d+) r=\s*(\d+) Adapters:\s*([\d.]+) ms \[([\d.]+), ([\d.]+)\]"
        r".*?ratio ([\d.]+)\s+GEMM ([\d.]+) GFLOP/s"
    )
    found = {}
    for m in re.finditer(pattern, text):
        case = tuple(int(m[i]) for i in (1, 2, 3))
        found[case] = [float(m[i]) / 1e3 for i in (5, 4, 6)] + [float(m[7]), float(m[8])]
    return found


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument(
        "--with-rust", action="store_true", help="run `cargo bench --bench attention` too"
    )
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)

    head = Head(257, 24, 5, torch.float64)
    for got, want in zip(head.gradients(), head.explicit()):
        gap = float((got - want).norm() / want.norm())
        if not gap < 1e-12:
            sys.exit(f"the gradients are off by {gap:.1e}; nothing is timed")

    rust = rust_lines(args.threads) if args.with_rust else {}
    print(f"PyTorch {torch.__version__}, {args.threads} threads, f32; median [quartiles]")
    for tokens, width, rank, repeats in CASES:
        head = Head(tokens, width, rank)
        rate = matrix_rate()
        low, middle, high = quartiles(repeats, head.gradients)
        floor = counted(tokens, width, rank) / rate
        case = f"L={tokens:6} d={width:3} r={rank}"
        print(
            f"torch SDPA + autograd  {case}: {1e3 * middle:9.1f} ms [{1e3 * low:.1f}, {1e3 * high:.1f}]  "
            f"GEMM {2e-9 * rate:4.0f} GFLOP/s  ratio to its floor {middle / floor:.2f}"
        )
        if (tokens, width, rank) in rust:
            low, own, high, ratio, gflops = rust[tokens, width, rank]
            print(
                f"peft-limits streaming  {case}: {1e3 * own:9.1f} ms [{1e3 * low:.1f}, {1e3 * high:.1f}]  "
                f"GEMM {gflops:4.0f} GFLOP/s  ratio to its floor {ratio:.2f}  torch / ours {middle / own:.2f}"
            )
        elif args.with_rust:
            print(f"peft-limits streaming  {case}: not among the lines of the Rust bench")


if __name__ == "__main__":
    main()
