#!/usr/bin/env python3
"""Times PyTorch, Transformers and PEFT on the training step of `cargo bench --bench train_step`.

    python benches/peers/torch_train_step.py --threads 2 [--with-rust] [--repeats 15] [--rounds 5]

The same LLaMA-style model (batch, length, width, layers, FFN, vocabulary, rank), f32, random ids; a step is forward,
backward and AdamW. Methods: full, LoRA, DoRA on the seven projections, interleaved so that a change of the machine's
speed meets all of them. Each row: median and quartiles of the repeats after two warm-up rounds, and the ratio to
LoRA's median. --with-rust runs the Rust bench with the same sizes afterwards and prints its medians and the ratio
(time here over time there) beside. With --rounds both take turns: medians and ratios are those of each round, and the
table has the middle round's with the least and greatest ratio, so that a busy neighbour of one round shows as such.
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
SIZES = {"batch": 8, "length": 256, "width": 256, "heads": 8, "inner": 688, "layers": 6, "vocab": 256, "rank": 8}


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
    spec = LoraConfig(r=args.rank, lora_alpha=2 * args.rank, target_modules=TARGETS, use_dora=method == "dora")
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
            sys.exit(f"the loss of an untrained model is {loss}, expected about {math.log(vocabulary):.3f}")
        changed = False
        for name, p in self.model.named_parameters():
            same = torch.equal(p, before[name])
            changed |= p.requires_grad and not same
            if not p.requires_grad and not same:
                sys.exit(f"{name} is frozen and changed")
        if not changed:
            sys.exit("a step changed nothing")


def rust_medians(args):
    """Milliseconds by method that the Rust bench prints."""
    flags = [part for name in SIZES for part in (f"--{name}", str(getattr(args, name)))]
    command = ["cargo", "bench", "--bench", "train_step", "--", *flags, "--repeats", str(args.repeats)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    rows = re.findall(r"^\| ([a-z0-9 ]+?) \| (\d+) \| ([0-9.]+) \| ([0-9.]+ to [0-9.]+) \|", done.stdout, re.M)
    return {name: (int(trained), float(median), spread) for name, trained, median, spread in rows}


def summary(rounds):
    """Middle of the rounds' medians, with the quartiles of that round."""
    rounds = sorted(rounds)
    return rounds[(len(rounds) - 1) // 2]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=0, help="threads of PyTorch and of the Rust bench; 0: all")
    parser.add_argument("--repeats", type=int, default=15, help="timed steps of each round")
    parser.add_argument("--rounds", type=int, default=1, help="turns of PyTorch and the Rust bench; odd")
    parser.add_argument("--with-rust", action="store_true", help="run the Rust bench too")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error("--repeats must be at least 2")
    if args.rounds < 1 or args.rounds % 2 == 0:
        parser.error("--rounds must be odd")
    if args.threads:
        torch.set_num_threads(args.threads)
        os.environ["RAYON_NUM_THREADS"] = str(args.threads)
    ids = torch.randint(0, args.vocab, (args.batch, args.length), generator=torch.Generator().manual_seed(7))

    methods = ["full", "lora", "dora"]
    contenders = {method: Contender(args, method) for method in methods}
    for contender in contenders.values():
        contender.check(ids, args.vocab)
    here, there, ratios, trained = {}, {}, {}, {}
    for _ in range(args.rounds):
        for contender in contenders.values():
            contender.seconds.clear()
        for repeat in range(WARM_UP + args.repeats):
            for contender in contenders.values():
                start = time.perf_counter()
                contender.step(ids)
                if repeat >= WARM_UP:
                    contender.seconds.append(time.perf_counter() - start)
        medians = {}
        for method, c in contenders.items():
            low, middle, high = statistics.quantiles(c.seconds, n=4, method="inclusive")
            medians[method] = 1e3 * middle
            here.setdefault(method, []).append((1e3 * middle, f"{1e3 * low:.1f} to {1e3 * high:.1f}"))
        for name, (count, median, spread) in (rust_medians(args) if args.with_rust else {}).items():
            trained[name] = count
            there.setdefault(name, []).append((median, spread))
            if name in medians:
                ratios.setdefault(name, []).append(medians[name] / median)

    sizes = ", ".join(f"{name} {getattr(args, name)}" for name in SIZES)
    rounds = f", {args.rounds} rounds" if args.rounds > 1 else ""
    print(f"torch {torch.__version__}, f32, {torch.get_num_threads()} threads; {sizes}; {args.repeats} repeats{rounds}")
    print("| method | trainable | PyTorch ms (median) | quartiles | ms / LoRA | peft-limits ms | quartiles | PyTorch / peft-limits |")
    print("|---|---|---|---|---|---|---|---|")
    lora = summary(here["lora"])[0]
    for method in methods:
        count = sum(p.numel() for p in contenders[method].trained)
        middle, spread = summary(here[method])
        ours = "| | | |"
        if method in there:
            if trained[method] != count:
                sys.exit(f"{method}: {count} trained numbers here, {trained[method]} there")
            median, their_spread = summary(there[method])
            ratio = f"{statistics.median(ratios[method]):.2f}"
            if args.rounds > 1:
                ratio += f" ({min(ratios[method]):.2f} to {max(ratios[method]):.2f})"
            ours = f"| {median:.1f} | {their_spread} | {ratio} |"
        print(f"| {method} | {count} | {middle:.1f} | {spread} | {middle / lora:.3f} {ours}")
    for name in there:
        if name not in methods:
            median, spread = summary(there[name])
            print(f"| {name} | {trained[name]} | | | | {median:.1f} | {spread} | |")


if __name__ == "__main__":
    main()
