#!/usr/bin/env python3
"""Times PyTorch, Transformers and PEFT on the work of `experiments/src/gpu_peft_cost.rs`, on the same card.

    python benches/peers/torch_gpu_train.py --device cuda [--size 25m,125m,1.1b] [--repeats 10] [--csv FILE]

The sizes, batches and lengths are those of the experiment; f32 without TF32 (as the Rust step computes) and, on a card, once
more with TF32 products; SDPA attention, random ids; a step is forward, backward and AdamW, with the device synchronised before the clock is read. Methods: full,
LoRA, DoRA on the seven projections, interleaved. Each row: median and quartiles in milliseconds, tokens a second, bytes
that the allocator holds between forward and backward (above what it held before the model), and its peak. On
`--device cpu` no allocator is read. Needs torch and transformers. Without peft, LoRA is a few lines here (`PlainLora`) and
DoRA is left out; the table says which it was. A size that does not run is told and the next one is tried.
"""

import argparse
import csv
import statistics
import sys
import time

import torch
from transformers import LlamaConfig, LlamaForCausalLM

try:
    import peft
except ImportError:
    peft = None

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
METHODS = ["full", "lora", "dora"] if peft else ["full", "lora"]
WARM_UP = 2
RANK = 8
MIB = 1 << 20
FIELDS = ["width", "layers", "inner", "heads", "kv_heads", "vocab", "batch", "length"]
SIZES = {
    "tiny": [64, 4, 176, 4, 2, 259, 2, 32],
    "25m": [512, 8, 1376, 8, 4, 259, 8, 512],
    "125m": [768, 12, 2048, 12, 4, 32000, 8, 512],
    "1.1b": [2048, 22, 5632, 32, 4, 32000, 4, 512],
}
COLUMNS = [
    "size", "batch", "length", "method", "products", "made by", "trainable", "step (ms)", "step lower quartile (ms)",
    "step upper quartile (ms)", "tokens per second", "held after forward (MiB)", "peak (MiB)", "device", "torch",
]  # fmt: skip


class PlainLora(torch.nn.Module):
    """y = x W^T + 2 (x A^T) B^T with W frozen."""

    def __init__(self, base, rank):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.a = torch.nn.Parameter(torch.randn(rank, base.in_features) / base.in_features**0.5)
        self.b = torch.nn.Parameter(torch.zeros(base.out_features, rank))

    def forward(self, x):
        return self.base(x) + 2.0 * (x @ self.a.T) @ self.b.T


def with_plain_lora(model):
    model.requires_grad_(False)
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if name in TARGETS:
                setattr(module, name, PlainLora(child, RANK))
    return model


def build(sizes, method):
    """The model in f32 on the default device."""
    torch.manual_seed(7)
    config = LlamaConfig(
        vocab_size=sizes["vocab"],
        hidden_size=sizes["width"],
        intermediate_size=sizes["inner"],
        num_hidden_layers=sizes["layers"],
        num_attention_heads=sizes["heads"],
        num_key_value_heads=sizes["kv_heads"],
        max_position_embeddings=sizes["length"],
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        use_cache=False,
    )
    base = LlamaForCausalLM(config).float()
    if method == "full":
        return base
    if not peft:
        return with_plain_lora(base)
    spec = peft.LoraConfig(
        r=RANK, lora_alpha=2 * RANK, target_modules=TARGETS, use_dora=method == "dora"
    )
    return peft.get_peft_model(base, spec)


def synchronise(device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def held(device):
    synchronise(device)
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else 0


class Contender:
    def __init__(self, device, sizes, method):
        self.device = device
        before = held(device)
        with device:
            self.model = build(sizes, method).to(device).train()
        self.trained = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-4)
        self.rest = held(device) - before
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


def measure(size, device, repeats, products, table):
    torch.backends.cuda.matmul.allow_tf32 = products == "tf32"
    sizes = dict(zip(FIELDS, SIZES[size]))
    generator = torch.Generator().manual_seed(7)
    ids = torch.randint(
        0, sizes["vocab"], (sizes["batch"], sizes["length"]), generator=generator
    ).to(device)
    contenders = {method: Contender(device, sizes, method) for method in METHODS}
    for repeat in range(WARM_UP + repeats):
        for method, contender in contenders.items():
            loss = contender.step(ids, repeat >= WARM_UP)
            if not loss == loss:
                sys.exit(f"{method}: the loss is not a number")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else "processor"
    for method, c in contenders.items():
        low, middle, high = statistics.quantiles(c.seconds, n=4, method="inclusive")
        trained = sum(p.numel() for p in c.trained)
        memory = [f"{c.between / MIB:.1f}", f"{c.peak / MIB:.1f}"] if c.between else ["", ""]
        made = (
            "torch"
            if method == "full"
            else f"peft {peft.__version__}"
            if peft
            else "plain LoRA of this script"
        )
        rate = sizes["batch"] * sizes["length"] / middle
        times = [f"{1e3 * t:.3f}" for t in (middle, low, high)]
        row = [
            size,
            sizes["batch"],
            sizes["length"],
            method,
            products,
            made,
            trained,
            *times,
            f"{rate:.0f}",
            *memory,
        ]
        table(row + [name, torch.__version__])


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument(
        "--size", default="25m,125m,1.1b", help=f"of {', '.join(SIZES)}; several with commas"
    )
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--csv", help="append rows to this file as they are measured")
    args = parser.parse_args()
    if args.repeats < 2:
        parser.error("--repeats must be at least 2")
    unknown = [size for size in args.size.split(",") if size not in SIZES]
    if unknown:
        parser.error(f"--size {unknown[0]}: known are {', '.join(SIZES)}")
    if args.device.startswith("cuda") and not torch.cuda.is_available():
        sys.exit("--device cuda: PyTorch finds no CUDA device")
    if not peft:
        print("peft is not installed: LoRA is this script's own, DoRA is left out")
    file = open(args.csv, "a", newline="") if args.csv else None
    out = csv.writer(file, lineterminator="\n") if file else None
    if out and file.tell() == 0:
        out.writerow(COLUMNS)
    print("| " + " | ".join(COLUMNS) + " |\n|" + "---|" * len(COLUMNS))

    def table(row):
        print("| " + " | ".join(map(str, row)) + " |", flush=True)
        if out:
            out.writerow(row)
            file.flush()

    failed = False
    card = args.device.startswith("cuda")
    for size, products in [
        (s, p) for s in args.size.split(",") for p in (["f32", "tf32"] if card else ["f32"])
    ]:
        try:
            measure(size, torch.device(args.device), args.repeats, products, table)
        except torch.OutOfMemoryError as error:
            failed = True
            print(f"{size}, {products}: {str(error).splitlines()[0]}", flush=True)
        if card:
            torch.cuda.empty_cache()
    sys.exit(1 if failed else 0)


if __name__ == "__main__":
    main()
