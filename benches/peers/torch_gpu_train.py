#!/usr/bin/env python3
"""Times PyTorch, Transformers and PEFT on the work of `experiments/src/gpu_peft_cost.rs`, on the same card.

    python benches/peers/torch_gpu_train.py --device cuda [--batch 8] [--length 512] [--repeats 10]

The sizes are those of the preset `mini` unless given; f32 without TF32 (as the Rust step computes), SDPA attention, random
ids; a step is forward, backward and AdamW, with the device synchronised before the clock is read. Methods: full, LoRA, DoRA
on the seven projections, interleaved. Each row: median and quartiles in milliseconds, tokens a second, bytes that the
allocator holds between forward and backward (above what it held before the model), and its peak. On `--device cpu` no
allocator is read. Needs torch, transformers and peft; no other part of the project does.
"""

import argparse
import statistics
import sys
import time

import torch
from torch_train_step import WARM_UP, model

METHODS = ["full", "lora", "dora"]
MIB = 1 << 20


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def held(device):
    synchronise(device)
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


class Contender:
    def __init__(self, args, method):
        self.device = torch.device(args.device)
        before = held(self.device)
        self.model = model(args, method).to(self.device).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        self.rest = held(self.device) - before
        self.between = 0
        self.peak = 0
        self.seconds = []

    def step(self, ids, record):
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        synchronise(self.device)
        start = time.perf_counter()
        self.optimizer.zero_grad(set_to_none=True)
        others = held(self.device) if not record else 0
        loss = self.model(input_ids=ids, labels=ids).loss
        if not record:
            self.between = held(self.device) - others + self.rest
        loss.backward()
        self.optimizer.step()
        value = loss.item()
        synchronise(self.device)
        if record:
            self.seconds.append(time.perf_counter() - start)
        elif self.device.type == "cuda":
            self.peak = torch.cuda.max_memory_allocated(self.device) - others + self.rest
        return value


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--repeats", type=int, default=10)
    sizes = {"batch": 8, "length": 512, "width": 512, "heads": 8, "kv_heads": 4, "inner": 1376, "layers": 8}
    sizes |= {"vocab": 259, "rank": 8}
    for name, default in sizes.items():
        parser.add_argument("--" + name.replace("_", "-"), type=int, default=default)
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error("--repeats must be at least 2")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch finds no CUDA device")
    torch.backends.cuda.matmul.allow_tf32 = False
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(0, args.vocab, (args.batch, args.length), generator=generator).to(args.device)

    contenders = {method: Contender(args, method) for method in METHODS}
    for repeat in range(WARM_UP + args.repeats):
        for method, contender in contenders.items():
            loss = contender.step(ids, repeat >= WARM_UP)
            if not loss == loss:
                sys.exit(f"{method}: the loss is not a number")
    name = torch.cuda.get_device_name() if args.device.startswith("cuda") else "processor"
    settings = ", ".join(f"{key} {getattr(args, key)}" for key in sizes)
    print(f"torch {torch.__version__} on {name}, f32; {settings}; {args.repeats} repeats")
    print("| method | trainable | step ms (median) | quartiles | tokens/s | held after forward MiB | peak MiB |")
    print("|---|---|---|---|---|---|---|")
    for method, c in contenders.items():
        low, middle, high = statistics.quantiles(c.seconds, n=4, method="inclusive")
        trained = sum(p.numel() for p in c.trained)
        memory = f"{c.between / MIB:.1f} | {c.peak / MIB:.1f}" if c.between else "- | -"
        rate = args.batch * args.length / middle
        print(f"| {method} | {trained} | {1e3 * middle:.1f} | {1e3 * low:.1f} to {1e3 * high:.1f} | {rate:.0f} | {memory} |")


if __name__ == "__main__":
    main()
