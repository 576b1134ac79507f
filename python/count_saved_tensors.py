#!/usr/bin/env python3
"""Bytes that autograd keeps between forward and backward, counted: python python/count_saved_tensors.py OUT.csv [--large]

A hook sees every tensor that an operation saves; what is still held when forward has ended is counted by storage, once each,
without parameters and buffers. Transformers models with PEFT adapters on the CPU: families x methods x attention x formats x
batches; bases in bitsandbytes' NF4, as loaded and as prepare_model_for_kbit_training leaves them. --large adds one pair of
layers of LLaMA-2-7B's width. Needs torch, transformers, peft and bitsandbytes.
`peft-limits memory --trainer pytorch` predicts these numbers (tests/memory.rs).
"""

import argparse
import collections
import csv
import itertools
import re
import sys
import tempfile
import weakref

import peft
import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM

SMALL = dict(
    vocab_size=97,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=3,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=64,
)
LARGE = dict(
    vocab_size=32000,
    hidden_size=4096,
    intermediate_size=11008,
    num_hidden_layers=2,
    num_attention_heads=32,
    num_key_value_heads=32,
    head_dim=128,
    max_position_embeddings=4096,
)
COLUMNS = [
    "family",
    "size",
    "base",
    "method",
    "rank",
    "targets",
    "attention",
    "dtype",
    "adapter_dtype",
    "checkpointing",
    "batch",
    "length",
    "first_layer",
    "other_layer",
    "outside",
]
LAYER = re.compile(r"(?:^|\.)layers\.(\d+)$")


class Holder:
    """Lives as long as autograd keeps the tensor in it."""

    def __init__(self, tensor):
        self.tensor = tensor


def build(row):
    sizes = LARGE if row["size"] == "large" else SMALL
    config = AutoConfig.for_model(row["family"], **sizes, pad_token_id=None)
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(
        config, dtype=getattr(torch, row["dtype"]), attn_implementation=row["attention"]
    )
    if row["method"] == "full":
        return model
    if row["base"] != "plain":
        settings = transformers.BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=getattr(torch, row["dtype"]),
        )
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            model = AutoModelForCausalLM.from_pretrained(
                folder,
                quantization_config=settings,
                dtype=getattr(torch, row["dtype"]),
                attn_implementation=row["attention"],
            )
        if row["base"] == "nf4-prepared":
            model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    targets = row["targets"] if row["targets"] == "all-linear" else row["targets"].split("+")
    adapter = peft.LoraConfig(
        r=row["rank"],
        target_modules=targets,
        use_dora=row["method"] == "dora",
        task_type="CAUSAL_LM",
    )
    return peft.get_peft_model(
        model, adapter, autocast_adapter_dtype=row["adapter_dtype"] == "float32"
    )


def count(row):
    model = build(row).train()
    if row["checkpointing"]:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    own = {t.untyped_storage()._cdata for t in itertools.chain(model.parameters(), model.buffers())}
    place, saved = ["outside"], []
    for name, module in model.named_modules():
        match = LAYER.search(name)
        if match:
            module.register_forward_pre_hook(lambda *_, index=match[1]: place.append(index))
            module.register_forward_hook(lambda *_: place.pop() and None)

    def pack(tensor):
        holder = Holder(tensor)
        saved.append((place[-1], weakref.ref(holder)))
        return holder

    vocabulary = model.config.vocab_size
    ids = torch.randint(0, vocabulary, (row["batch"], row["length"]))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda holder: holder.tensor):
        output = model(input_ids=ids, labels=ids)
    found, sums = set(own), collections.Counter()
    for where, reference in saved:
        holder = reference()
        if holder is None:
            continue
        storage = holder.tensor.untyped_storage()
        if storage._cdata not in found:
            found.add(storage._cdata)
            sums[where] += storage.nbytes()
    assert output.loss.requires_grad
    return {"first_layer": sums["0"], "other_layer": sums["1"], "outside": sums["outside"]}


def rows(large):
    plain = dict(
        size="small",
        base="plain",
        method="lora",
        rank=4,
        targets="all-linear",
        attention="sdpa",
        dtype="bfloat16",
        adapter_dtype="bfloat16",
        checkpointing=0,
        batch=2,
        length=8,
    )
    families = ["llama", "qwen2", "qwen3", "mistral", "phi3", "granite", "olmo2", "gemma3_text"]
    for family in families + ["gemma2"]:
        kernels = ["eager"] if family == "gemma2" else ["sdpa", "eager"]
        for attention, method in itertools.product(kernels, ["lora", "dora", "full"]):
            yield plain | dict(family=family, attention=attention, method=method)
    for family, method in itertools.product(
        ["llama", "qwen3", "gemma3_text"], ["lora", "dora", "full"]
    ):
        yield plain | dict(family=family, method=method, dtype="float32", adapter_dtype="float32")
        yield plain | dict(family=family, method=method, checkpointing=1)
        yield plain | dict(family=family, method=method, batch=1, length=24)
    for method in ["lora", "dora"]:
        yield plain | dict(family="llama", method=method, adapter_dtype="float32")
        yield plain | dict(
            family="llama",
            method=method,
            adapter_dtype="float32",
            attention="eager",
            batch=3,
            length=16,
        )
        for base, adapter in itertools.product(["nf4", "nf4-prepared"], ["bfloat16", "float32"]):
            yield plain | dict(family="llama", method=method, base=base, adapter_dtype=adapter)
        for targets in ["q_proj+v_proj", "down_proj", "o_proj+gate_proj"]:
            yield plain | dict(family="llama", method=method, targets=targets)
        if large:
            yield plain | dict(
                family="llama", method=method, size="large", rank=8, batch=1, length=512
            )


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out")
    parser.add_argument("--large", action="store_true")
    arguments = parser.parse_args()
    transformers.logging.set_verbosity_error()
    with open(arguments.out, "w", newline="") as file:
        versions = f"torch {torch.__version__.split('+')[0]}, transformers {transformers.__version__}, peft {peft.__version__}"
        file.write(
            f"# bytes; {versions}; python python/count_saved_tensors.py{' --large' if arguments.large else ''}\n"
        )
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        for row in rows(arguments.large):
            row = row | count(row)
            writer.writerow(row)
            print(*(row[c] for c in COLUMNS), file=sys.stderr)


if __name__ == "__main__":
    main()
