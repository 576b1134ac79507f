#!/usr/bin/env python3
"""Turns a checkpoint of llama2.c into a Hugging Face folder that `dump_heads.py` and `peft-limits train` read.

    python python/convert_llama2c.py stories260K.bin --tokenizer tok512.bin --out stories260k/

Reads the first binary format of https://github.com/karpathy/llama2.c (seven integers, then float32 weights, as run.c
does); public checkpoints: https://huggingface.co/karpathy/tinyllamas (stories260K, stories15M, ...), MIT.
llama2.c rotates neighbouring coordinates (0, 1), (2, 3), ... of a head, Hugging Face the halves (0, d/2), (1, d/2 + 1),
...: the rows of the query and key projections are put in that order. Scores do not change by it.

Needs numpy and safetensors.
"""

import argparse
import json
import os
import struct
import sys

import numpy as np
from safetensors.numpy import save_file

HEADER = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")
SPACE = "\u2581"


def fail(path, what):
    sys.exit(f"convert_llama2c: {path}: {what}")


def read_checkpoint(path):
    """The header as a dictionary and the weights by their names in Hugging Face's layout."""
    data = open(path, "rb").read()
    if len(data) < 28:
        fail(path, f"{len(data)} bytes; a llama2.c checkpoint begins with seven integers")
    config = dict(zip(HEADER, struct.unpack("<7i", data[:28])))
    # A negative vocabulary size marks an output layer of its own.
    shared = config["vocab_size"] > 0
    config["vocab_size"] = abs(config["vocab_size"])
    dim, hidden, layers, heads, kv_heads, vocab, length = (config[key] for key in HEADER)
    if min(config.values()) <= 0 or dim % heads or heads % kv_heads or (dim // heads) % 2:
        fail(
            path,
            f"the header {config} is none of llama2.c's first format (a newer one begins with 'ak42')",
        )
    width = dim // heads
    kv = width * kv_heads
    shapes = [
        ("embedding", (vocab, dim)),
        ("attention_norm", (layers, dim)),
        ("wq", (layers, dim, dim)),
        ("wk", (layers, kv, dim)),
        ("wv", (layers, kv, dim)),
        ("wo", (layers, dim, dim)),
        ("ffn_norm", (layers, dim)),
        ("w1", (layers, hidden, dim)),
        ("w2", (layers, dim, hidden)),
        ("w3", (layers, hidden, dim)),
        ("norm", (dim,)),
        # Angles of the rotation, which readers compute themselves.
        ("cosines", (length, width // 2)),
        ("sines", (length, width // 2)),
    ] + ([] if shared else [("output", (vocab, dim))])
    expected = 28 + 4 * sum(int(np.prod(shape)) for _, shape in shapes)
    if len(data) != expected:
        fail(path, f"{len(data)} bytes, {expected} expected for {config}")
    w, at = {}, 28
    for name, shape in shapes:
        count = int(np.prod(shape))
        w[name] = np.frombuffer(data, "<f4", count, at).reshape(shape)
        at += 4 * count

    def halves(rows, count):
        """Rows (head, pair, 2) as (head, 2, pair)."""
        return rows.reshape(count, width // 2, 2, dim).swapaxes(1, 2).reshape(count * width, dim)

    tensors = {"model.embed_tokens.weight": w["embedding"], "model.norm.weight": w["norm"]}
    if not shared:
        tensors["lm_head.weight"] = w["output"]
    for i in range(layers):
        layer = {
            "input_layernorm": w["attention_norm"][i],
            "self_attn.q_proj": halves(w["wq"][i], heads),
            "self_attn.k_proj": halves(w["wk"][i], kv_heads),
            "self_attn.v_proj": w["wv"][i],
            "self_attn.o_proj": w["wo"][i],
            "post_attention_layernorm": w["ffn_norm"][i],
            "mlp.gate_proj": w["w1"][i],
            "mlp.down_proj": w["w2"][i],
            "mlp.up_proj": w["w3"][i],
        }
        tensors |= {f"model.layers.{i}.{name}.weight": value for name, value in layer.items()}
    return config | {"shared": shared}, {
        name: np.ascontiguousarray(value) for name, value in tensors.items()
    }


def model_config(c):
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "hidden_size": c["dim"],
        "intermediate_size": c["hidden_dim"],
        "num_hidden_layers": c["n_layers"],
        "num_attention_heads": c["n_heads"],
        "num_key_value_heads": c["n_kv_heads"],
        "vocab_size": c["vocab_size"],
        "max_position_embeddings": c["max_seq_len"],
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": c["shared"],
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attention_bias": False,
        "torch_dtype": "float32",
    }


def read_tokenizer(path, vocab_size):
    """Pieces with their scores, as the exporter of llama2.c wrote them."""
    data = open(path, "rb").read()
    pieces, at = [], 4
    for i in range(vocab_size):
        if at + 8 > len(data):
            fail(path, f"ends after {i} pieces, {vocab_size} expected")
        score, size = struct.unpack_from("<fi", data, at)
        text = data[at + 8 : at + 8 + size]
        pieces.append((text.decode("utf-8"), score))
        at += 8 + size
    return pieces


def tokenizer_json(pieces):
    """A byte-pair tokenizer with byte fallback: neighbours are merged in the order of the merged piece's score."""
    special = ["<unk>", "<s>", "</s>"]
    names = special + [text.replace(" ", SPACE) for text, _ in pieces[3:]]
    vocab = {name: i for i, name in enumerate(names)}
    merges = []
    for i, name in enumerate(names[3:], 3):
        if name.startswith("<0x") and len(name) == 6:
            continue
        splits = [(name[:k], name[k:]) for k in range(1, len(name))]
        known = sorted((vocab[a], vocab[b], a, b) for a, b in splits if a in vocab and b in vocab)
        merges += [(-pieces[i][1], i, [a, b]) for _, _, a, b in known]
    # Stable: splits of one piece stay in their order.
    merges.sort(key=lambda merge: merge[:2])
    replace = lambda pattern, content: {
        "type": "Replace",
        "pattern": {"String": pattern},
        "content": content,
    }
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            dict(
                id=i,
                content=name,
                single_word=False,
                lstrip=False,
                rstrip=False,
                normalized=False,
                special=True,
            )
            for i, name in enumerate(special)
        ],
        "normalizer": {
            "type": "Sequence",
            "normalizers": [{"type": "Prepend", "prepend": SPACE}, replace(" ", SPACE)],
        },
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                start,
                {"Sequence": {"id": "A", "type_id": 0}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {
            "type": "Sequence",
            "decoders": [
                replace(SPACE, " "),
                {"type": "ByteFallback"},
                {"type": "Fuse"},
                {"type": "Strip", "content": " ", "start": 1, "stop": 0},
            ],
        },
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": True,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocab,
            "merges": [pair for *_, pair in merges],
        },
    }


def write_json(folder, name, value):
    with open(os.path.join(folder, name), "w", encoding="utf-8") as file:
        json.dump(value, file, ensure_ascii=False, indent=1)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("checkpoint", help="a .bin file of llama2.c")
    parser.add_argument("--tokenizer", help="its tokenizer as a .bin file of llama2.c")
    parser.add_argument(
        "--out", required=True, help="folder for config.json, model.safetensors and tokenizer.json"
    )
    args = parser.parse_args()
    config, tensors = read_checkpoint(args.checkpoint)
    tokenizer = args.tokenizer and tokenizer_json(
        read_tokenizer(args.tokenizer, config["vocab_size"])
    )
    os.makedirs(args.out, exist_ok=True)
    save_file(tensors, os.path.join(args.out, "model.safetensors"), metadata={"format": "pt"})
    write_json(args.out, "config.json", model_config(config))
    if tokenizer:
        write_json(args.out, "tokenizer.json", tokenizer)
    print(f"{args.out}: {config}")


if __name__ == "__main__":
    main()
