#!/usr/bin/env python3
"""Times PyTorch, Transformers and PEFT on the training step of `cargo bench --bench train_step`.

    python benches/peers/torch_train_step.py --threads 2 [--with-rust] [--repeats 15]

The same LLaMA-style model (batch, length, width, layers, FFN, vocabulary, rank), f32, random ids; a step is forward,
backward and AdamW. Methods: full, LoRA, DoRA on the seven projections, interleaved so that a change of the machine's
speed meets all of them. Each row: median and quartiles of the repeats after two warm-up rounds, and the ratio to
LoRA's median. With --with-rust the Rust bench takes turns with PyTorch, step by step, and its times stand beside, with
the ratio of the two steps of a turn (time here over time there): the ratio in the middle and its quartiles. A change of
the machine's speed is slower than a turn, so the ratio says more than the two medians.
Nothing else should run at the same time.

Before anything is timed, the loss of the untrained model must be near log(vocabulary), and a step must change what is
trained and nothing else. Needs torch, transformers and peft; no other part of the project does.
"""

import argparse
import math
import os
import re
import statistics
import subprocess
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
WARM_UP = 2
PAUSE = 0.05  # seconds
SIZES = {
    "batch": 8,
    "length": 256,
    "width": 256,
    "heads": 8,
    "inner": 688,
    "layers": 6,
    "vocab": 256,
    "rank": 8,
}


def model(args, method):
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=args.vocab,
        hidden_size=args.width,
        intermediate_size=args.inner,
        num_hidden_layers=args.layers,
        num_attention_heads=args.heads,
        # Only the script for cards has grouped heads.
        num_key_value_heads=getattr(args, "kv_heads", args.heads),
        max_position_embeddings=args.length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_cache=False,
    )
    base = LlamaForCausalLM(config).float()
    if method == "full":
        return base
    spec = LoraConfig(
        r=args.rank, lora_alpha=2 * args.rank, target_modules=TARGETS, use_dora=method == "dora"
    )
    return get_peft_model(base, spec)


class Contender:
    def __init__(self, args, method):
        self.model = model(args, method)
        self.model.train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4, weight_decay=0.01)
        self.seconds = []

    def step(self, ids):
        self.optimizer.zero_grad(set_to_none=False)
        loss = self.model(input_ids=ids, labels=ids).loss
        loss.backward()
        self.optimizer.step()
        return loss.item()

    def check(self, ids, vocabulary):
        """One step: a sensible loss, trained tensors changed, frozen ones untouched."""
        before = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        loss = self.step(ids)
        if not abs(loss - math.log(vocabulary)) < 0.5:
            sys.exit(
                f"the loss of an untrained model is {loss}, expected about {math.log(vocabulary):.3f}"
            )
        changed = False
        for name, p in self.model.named_parameters():
            same = torch.equal(p, before[name])
            changed |= p.requires_grad and not same
            if not p.requires_grad and not same:
                sys.exit(f"{name} is frozen and changed")
        if not changed:
            sys.exit("a step changed nothing")


class RustBench:
    """`cargo bench --bench train_step -- --on-request`, which does a step when asked."""

    def __init__(self, args, methods):
        flags = [part for name in SIZES for part in (f"--{name}", str(getattr(args, name)))]
        command = [
            "cargo",
            "bench",
            "--bench",
            "train_step",
            "--",
            *flags,
            "--only",
            ",".join(methods),
            "--on-request",
        ]
        pipe = subprocess.PIPE
        self.process = subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True, bufsize=1)

    def step(self, method):
        self.process.stdin.write(f"{method}\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        if not line:
            sys.exit("the Rust bench has stopped; its own message stands above")
        return float(line)

    def trained(self):
        """Trained numbers by method, from the table at the end."""
        table, _ = self.process.communicate()
        return {
            name: int(count)
            for name, count in re.findall(r"^\| ([a-z0-9]+) \| (\d+) \|", table, re.M)
        }


def spread(values):
    """Quartiles and middle."""
    return statistics.quantiles(values, n=4, method="inclusive")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--threads", type=int, default=0, help="threads of PyTorch and of the Rust bench; 0: all"
    )
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each method")
    parser.add_argument("--with-rust", action="store_true", help="take turns with the Rust bench")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error("--repeats must be at least 2")
    if args.threads:
        torch.set_num_threads(args.threads)
        os.environ["RAYON_NUM_THREADS"] = str(args.threads)
    ids = torch.randint(
        0, args.vocab, (args.batch, args.length), generator=torch.Generator().manual_seed(7)
    )

    methods = ["full", "lora", "dora"]
    contenders = {method: Contender(args, method) for method in methods}
    for contender in contenders.values():
        contender.check(ids, args.vocab)
    rust = RustBench(args, methods) if args.with_rust else None
    there = {method: [] for method in methods}
    for repeat in range(WARM_UP + args.repeats):
        for method, contender in contenders.items():
            # After a pause, in which the threads of the one before have stopped waiting for more work.
            time.sleep(PAUSE)
            start = time.perf_counter()
            contender.step(ids)
            seconds = time.perf_counter() - start
            if rust:
                time.sleep(PAUSE)
                theirs = rust.step(method)
            if repeat >= WARM_UP:
                contender.seconds.append(seconds)
                if rust:
                    there[method].append(theirs)
    trained = rust.trained() if rust else {}

    sizes = ", ".join(f"{name} {getattr(args, name)}" for name in SIZES)
    print(
        f"torch {torch.__version__}, f32, {torch.get_num_threads()} threads; {sizes}; {args.repeats} repeats"
    )
    print(
        "| method | trainable | PyTorch ms (median) | quartiles | ms / LoRA | peft-limits ms | quartiles | PyTorch / peft-limits |"
    )
    print("|---|---|---|---|---|---|---|---|")
    lora = spread(contenders["lora"].seconds)[1]
    for method, contender in contenders.items():
        count = sum(p.numel() for p in contender.trained)
        low, middle, high = spread(contender.seconds)
        ours = "| | |"
        if rust:
            if trained.get(method) != count:
                sys.exit(f"{method}: {count} trained numbers here, {trained.get(method)} there")
            first, second, third = spread(there[method])
            ratio = spread(
                [here / theirs for here, theirs in zip(contender.seconds, there[method])]
            )
            ours = f"{1e3 * second:.1f} | {1e3 * first:.1f} to {1e3 * third:.1f} "
            ours += f"| {ratio[1]:.2f} ({ratio[0]:.2f} to {ratio[2]:.2f})"
        print(
            f"| {method} | {count} | {1e3 * middle:.1f} | {1e3 * low:.1f} to {1e3 * high:.1f} | {middle / lora:.3f} | {ours} |"
        )


if __name__ == "__main__":
    main()
