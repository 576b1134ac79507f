#!/usr/bin/env python3
"""Writes attention heads of a Hugging Face model as inputs of `peft-limits gradient`, `probe` and `real_heads`.

    python python/dump_heads.py --model sentence-transformers/all-MiniLM-L6-v2 --text essay.txt \\
        --layers 0,3 --heads 0,7 --max-length 512 --rank 4 --out heads/

One safetensors file per (layer, head): <name>_l<layer>_h<head>.safetensors.

Encoders with separate query, key and value layers (BERT, RoBERTa, ELECTRA, ...): X is the layer's input with a
constant 1 appended, so that biases are the last row of W; random adapters of the given rank; not causal.
Rotary decoders (LLaMA, Mistral, Qwen, Gemma, ... grouped-query attention too): Q, K, V as they enter the softmax,
after the rotary embedding, and of the group of keys that the head reads; causal.

The objective is a target Y, the head's own output plus noise (--objective target), or the gradient G of the model's own
next-token loss with respect to the head's output (--objective loss, decoders with a language-model head).
O, the head's output, is stored too (--no-output leaves it out), and `gradient` must agree with it: for decoders the one
that the model itself computed, for encoders that of the head with its adapters, after a check of the one without.

Needs torch, transformers and safetensors. The text is a file, or - for standard input.
"""

import argparse
import math
import os
import re
import sys

import torch
import transformers
from safetensors.torch import save_file
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

CAPTURE = "capture"


def integers(text):
    """'0,3,5-7' as a list, 'all' as None."""
    if text == "all":
        return None
    numbers = []
    for part in text.split(","):
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", part.strip())
        if not match:
            raise argparse.ArgumentTypeError(f"{text!r} is not a list such as 0,3,5-7, nor 'all'")
        first, last = int(match[1]), int(match[2] or match[1])
        numbers.extend(range(first, last + 1))
    return numbers


def parse(arguments=None):
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", required=True, help="folder of a checkpoint, or a model's name")
    parser.add_argument("--text", help="text file, or - for standard input")
    parser.add_argument(
        "--random-tokens",
        type=int,
        metavar="N",
        help="N random token ids in place of a text (no tokenizer needed)",
    )
    parser.add_argument(
        "--layers", type=integers, default=None, help="such as 0,3,5-7 (default: all)"
    )
    parser.add_argument("--heads", type=integers, default=None, help="such as 0,7 (default: all)")
    parser.add_argument("--max-length", type=int, default=512, help="tokens kept (default 512)")
    parser.add_argument(
        "--rank", type=int, default=4, help="rank of the random adapters of encoders (default 4)"
    )
    parser.add_argument("--alpha", type=float, default=None, help="alpha (default 2 rank)")
    parser.add_argument("--objective", choices=["target", "loss"], default="target")
    parser.add_argument(
        "--noise", type=float, default=0.1, help="Y = O + noise * std(O) * normal (default 0.1)"
    )
    parser.add_argument(
        "--dtype",
        choices=["float32", "float64"],
        default="float32",
        help="of the files; the model runs in float64",
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--no-output", action="store_true", help="leave out O")
    parser.add_argument(
        "--gradients",
        action="store_true",
        help="add the gradients by PyTorch autograd, to compare with `gradient`",
    )
    parser.add_argument("--out", required=True, help="folder for the files")
    args = parser.parse_args(arguments)
    if (args.text is None) == (args.random_tokens is None):
        parser.error("give exactly one of --text and --random-tokens")
    if args.rank < 1 or args.max_length < 1:
        parser.error("--rank and --max-length must be at least 1")
    return args


def token_ids(args, config):
    if args.random_tokens is not None:
        generator = torch.Generator().manual_seed(args.seed)
        return torch.randint(
            0, config.vocab_size, (1, min(args.random_tokens, args.max_length)), generator=generator
        )
    text = sys.stdin.read() if args.text == "-" else open(args.text, encoding="utf-8").read()
    tokenizer = transformers.AutoTokenizer.from_pretrained(args.model)
    return tokenizer(
        text, truncation=True, max_length=args.max_length, return_tensors="pt"
    ).input_ids


def load(args, config):
    """The model in float64, with a language-model head where the objective needs one."""
    auto = transformers.AutoModelForCausalLM if args.objective == "loss" else transformers.AutoModel
    model = auto.from_pretrained(args.model, attn_implementation="sdpa").double().eval()
    if args.objective == "loss" and is_encoder(model):
        sys.exit("dump_heads: --objective loss needs a decoder; this model is an encoder")
    return model


def is_encoder(model):
    return any(
        hasattr(m, "query") and hasattr(m, "key") and hasattr(m, "value") for m in model.modules()
    )


def is_attention(module):
    """A self-attention with one layer for each of query, key and value."""
    return all(hasattr(module, name) for name in ("query", "key", "value")) or all(
        hasattr(module, name) for name in ("q_proj", "k_proj", "v_proj")
    )


def attention_layers(model):
    layers = [(name, m) for name, m in model.named_modules() if is_attention(m)]
    if not layers:
        sys.exit(
            "dump_heads: no attention with separate query, key and value layers was found in this model"
        )
    return layers


def run(model, ids, objective):
    """What entered and left the softmax attention of every layer: a list of dictionaries in the order of layers."""
    records = {}

    def capture(module, query, key, value, attention_mask, **rest):
        """The model's own attention (PyTorch's), with what goes in and what comes out written down."""
        for name in ("softcap", "s_aux"):
            if rest.get(name) is not None:
                sys.exit(
                    f"dump_heads: this model's attention uses {name}, which the file format cannot express"
                )
        output, weights = ALL_ATTENTION_FUNCTIONS["sdpa"](
            module, query, key, value, attention_mask, **rest
        )
        if output.requires_grad:
            output.retain_grad()
        groups = query.shape[1] // key.shape[1]
        records[module] |= dict(
            query=query.detach()[0],
            key=key.detach()[0].repeat_interleave(groups, 0),
            value=value.detach()[0].repeat_interleave(groups, 0),
            output=output,
            scaling=query.shape[-1] ** -0.5
            if rest.get("scaling") is None
            else float(rest["scaling"]),
            causal=bool(getattr(module, "is_causal", False)),
        )
        return output, weights

    def before(module, args, kwargs):
        hidden = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        records[module] = dict(hidden=hidden.detach())

    layers = attention_layers(model)
    ALL_ATTENTION_FUNCTIONS.register(CAPTURE, capture)
    ALL_MASK_ATTENTION_FUNCTIONS.register(CAPTURE, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    model.set_attn_implementation(CAPTURE)
    hooks = [module.register_forward_pre_hook(before, with_kwargs=True) for _, module in layers]
    try:
        if objective == "loss":
            model(ids, labels=ids, use_cache=False).loss.backward()
        else:
            with torch.no_grad():
                model(ids)
    finally:
        for hook in hooks:
            hook.remove()
    missing = [name for name, module in layers if "output" not in records.get(module, {})]
    if missing:
        sys.exit(
            f"dump_heads: the attention of {missing[0]} does not go through the common attention interface"
        )
    return [records[module] | dict(module=module) for _, module in layers]


def attention(query, key, value, beta, causal):
    """O of the file format: softmax(beta Q K^T) V, row i seeing the keys up to i when causal."""
    scores = beta * query @ key.T
    if causal:
        scores = scores.masked_fill(torch.ones_like(scores, dtype=torch.bool).triu(1), -math.inf)
    return torch.softmax(scores, 1) @ value


def require_same(ours, own, what):
    gap = float((ours - own).norm() / own.norm())
    if not gap < 1e-9:
        sys.exit(
            f"dump_heads: {what} do not reproduce the model's own attention output (relative gap {gap:.1e})"
        )


def encoder_inputs(record, head, args, generator):
    """X, W, A, B of one head; the bias is the last row of W."""
    module, hidden = record["module"], record["hidden"][0]
    ones = torch.ones(hidden.shape[0], 1, dtype=hidden.dtype)
    tensors = {"X": torch.cat([hidden, ones], 1)}
    width = record["query"].shape[-1]
    rows = slice(head * width, (head + 1) * width)
    for letter, linear in (("Q", module.query), ("K", module.key), ("V", module.value)):
        weight = linear.weight.detach()[rows].T
        bias = (
            torch.zeros(width, dtype=weight.dtype)
            if linear.bias is None
            else linear.bias.detach()[rows]
        )
        tensors["W" + letter] = torch.cat([weight, bias[None]], 0)
    inputs = tensors["X"].shape[1]
    if args.rank > min(inputs, width):
        sys.exit(f"dump_heads: --rank {args.rank} exceeds the head's width {width}")

    def normal(rows, columns):
        # Small and random: with B = 0 the gradient of A would be zero.
        return 0.05 * torch.randn(rows, columns, generator=generator, dtype=hidden.dtype)

    for letter in "QKV":
        tensors["A" + letter] = normal(args.rank, width) / math.sqrt(width)
        tensors["B" + letter] = normal(inputs, args.rank) / math.sqrt(inputs)
    return tensors


def head_tensors(record, head, args, generator):
    """The tensors and the metadata of one head's file."""
    beta, causal = record["scaling"], record["causal"]
    meta = dict(beta=repr(beta), causal=str(causal), softmax_one="False")
    output = record["output"].detach()[0, :, head]
    query, key, value = (record[name][head] for name in ("query", "key", "value"))
    require_same(attention(query, key, value, beta, causal), output, "Q, K and V")
    if hasattr(record["module"], "query"):
        tensors = encoder_inputs(record, head, args, generator)
        project = lambda letter: tensors["X"] @ tensors["W" + letter]
        require_same(attention(*map(project, "QKV"), beta, causal), output, "X and W")
        # The file's head has adapters, the model's has none: its O moves a little.
        alpha = 2.0 * args.rank if args.alpha is None else args.alpha
        meta |= dict(alpha=repr(alpha), r=str(args.rank))
        update = lambda letter: (
            alpha / args.rank * tensors["X"] @ tensors["B" + letter] @ tensors["A" + letter]
        )
        output = attention(*(project(letter) + update(letter) for letter in "QKV"), beta, causal)
    else:
        tensors = {"Q": query, "K": key, "V": value}
    if args.objective == "loss":
        tensors["G"] = record["output"].grad[0, :, head]
    else:
        noise = torch.randn(output.shape, generator=generator, dtype=output.dtype)
        tensors["Y"] = output + args.noise * output.std(correction=0) * noise
    references = autograd_references(tensors, beta, causal, meta) if args.gradients else {}
    if not args.no_output:
        tensors["O"] = output
    return tensors | references, meta


def autograd_references(tensors, beta, causal, meta):
    """loss, and dQ, dK, dV or every dW, dA, dB, by autograd through the attention of the file format."""
    leaves = {
        name: t.detach().clone().requires_grad_(name not in "XYG") for name, t in tensors.items()
    }
    if "Q" in leaves:
        query, key, value = (leaves[letter] for letter in "QKV")
    else:
        scaling = float(meta["alpha"]) / int(meta["r"])
        weight = lambda letter: (
            leaves["W" + letter] + scaling * leaves["B" + letter] @ leaves["A" + letter]
        )
        query, key, value = (leaves["X"] @ weight(letter) for letter in "QKV")
    output = attention(query, key, value, beta, causal)
    target = "Y" in leaves
    loss = 0.5 * (output - leaves["Y"]).square().sum() if target else (leaves["G"] * output).sum()
    loss.backward()
    references = {"d" + name: leaf.grad for name, leaf in leaves.items() if leaf.requires_grad}
    return references | ({"loss": loss.detach().reshape(1)} if target else {})


def chosen(wanted, count, what):
    numbers = list(range(count)) if wanted is None else wanted
    wrong = [n for n in numbers if n >= count]
    if wrong:
        sys.exit(f"dump_heads: there is no {what} {wrong[0]}; the model has {count}")
    return numbers


def main():
    args = parse()
    config = transformers.AutoConfig.from_pretrained(args.model)
    ids = token_ids(args, config)
    model = load(args, config)
    records = run(model, ids, args.objective)
    os.makedirs(args.out, exist_ok=True)
    generator = torch.Generator().manual_seed(args.seed)
    dtype = getattr(torch, args.dtype)
    stem = re.sub(r"[^A-Za-z0-9.]+", "-", os.path.basename(os.path.normpath(args.model))).lower()
    for layer in chosen(args.layers, len(records), "layer"):
        record = records[layer]
        for head in chosen(args.heads, record["query"].shape[0], "head"):
            tensors, meta = head_tensors(record, head, args, generator)
            meta["source"] = (
                f"{os.path.basename(os.path.normpath(args.model))}, layer {layer}, head {head}, {ids.shape[1]} tokens"
            )
            path = os.path.join(args.out, f"{stem}_l{layer}_h{head}.safetensors")
            save_file(
                {k: v.to(dtype).contiguous().clone() for k, v in tensors.items()},
                path + ".partial",
                metadata=meta,
            )
            os.chmod(path + ".partial", 0o644)
            os.replace(path + ".partial", path)
            q, k = record["query"][head], record["key"][head]
            largest = (q @ k.T).abs().max() * record["scaling"]
            print(
                f"{path}  L={ids.shape[1]} d={q.shape[-1]}  max|Q| {q.abs().max():.3g}  max|K| {k.abs().max():.3g}  max|logit| {largest:.3g}"
            )


if __name__ == "__main__":
    main()
