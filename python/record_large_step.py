#!/usr/bin/env python3
"""Records a step of a model of any size with random bf16 weights, to see what validating it costs.

    python python/record_large_step.py --config examples/configs/llama-3.1-8b.json --tokens 256 --out step
    /usr/bin/time -v peft-limits validate step --memory 8GiB

Weights are written to OUT-model in shards of 4 GB and used from the disk, so that 8 billion of them
train beside 8 GB of memory: LoRA of rank 8 on all linear layers, checkpointing, one AdamW step, one
row. With --wrong the recorded gradients are random numbers of the same size. An existing OUT-model
is used again. Needs torch, transformers and peft, and the size of the weights on the disk.
"""

import argparse
import glob
import json
import os
import time

import peft
import torch
import transformers
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import peft_limits

SHARD = 4_000_000_000  # bytes


def write_weights(model, config, folder):
    """Normal numbers of deviation 0.02, norms 1; in the order of the model's own names."""
    os.makedirs(folder)
    generator = torch.Generator().manual_seed(0)
    index, shard, size = {}, {}, 0

    def flush():
        name = f"model-{len(set(index.values())) + 1:05d}.safetensors"
        save_file(shard, os.path.join(folder, name), metadata={"format": "pt"})
        index.update(dict.fromkeys(shard, name))
        shard.clear()

    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        values = torch.ones(tensor.shape, dtype=torch.bfloat16)
        if tensor.dim() > 1:
            values.normal_(0, 0.02, generator=generator)
        shard[name], size = values, size + values.nbytes
        if size > SHARD:
            flush()
            size = 0
    if shard:
        flush()
    with open(os.path.join(folder, "model.safetensors.index.json"), "w") as file:
        json.dump({"metadata": {}, "weight_map": index}, file)
    config.save_pretrained(folder)


def from_disk(model, folder):
    """Puts tensors in place that the system reads from the files when they are used."""
    weights = {}
    for path in sorted(glob.glob(os.path.join(folder, "*.safetensors"))):
        with safe_open(path, "pt") as file:
            weights |= {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    model.load_state_dict(weights, assign=True, strict=False)
    model.tie_weights()
    # Not in the checkpoint: made again, off the meta device.
    model.model.rotary_emb = type(model.model.rotary_emb)(model.config)
    left = [name for name, tensor in model.state_dict().items() if tensor.is_meta]
    if left:
        raise SystemExit(f"{folder} lacks {left[0]}")


def spoil(folder):
    """Random gradients of the recorded sizes."""
    path = os.path.join(folder, "step.safetensors")
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    tensors = load_file(path)
    torch.manual_seed(1)
    for name, tensor in tensors.items():
        if name.startswith("grad."):
            values = tensor.float()
            tensors[name] = (torch.randn_like(values) * values.std()).to(tensor.dtype)
    save_file(tensors, path, metadata=metadata)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--config", required=True, help="a config.json of Hugging Face")
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--out", required=True, help="the dump; the weights go to OUT-model")
    parser.add_argument("--wrong", action="store_true", help="random gradients")
    given = parser.parse_args()
    config = transformers.AutoConfig.from_pretrained(given.config)
    with torch.device("meta"):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    folder = os.path.abspath(given.out + "-model")
    if not os.path.isdir(folder):
        write_weights(model, config, folder)
    from_disk(model, folder)
    torch.manual_seed(0)
    settings = peft.LoraConfig(
        r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM"
    )
    model = peft.get_peft_model(model, settings, autocast_adapter_dtype=False)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.01)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    ids = torch.randint(0, config.vocab_size, (1, given.tokens))
    began = time.monotonic()
    with peft_limits.dump_step(model, given.out, model_path=folder):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
    if given.wrong:
        spoil(given.out)
    seconds = time.monotonic() - began
    print(
        f"{sum(p.numel() for p in model.parameters()):,} numbers, loss {loss.item():.4f}, {seconds:.0f} s"
    )


if __name__ == "__main__":
    main()
