#!/usr/bin/env python3
"""Right steps of every family in every setting: none may fail, and none may be given a fault.

    PEFT_LIMITS=target/release/peft-limits python python/test_corpus.py [FAMILY ...]

Tiny models with random weights, made by Transformers and PEFT. Needs torch, transformers, peft and safetensors.
"""

import itertools
import json
import os
import subprocess
import sys
import tempfile
import warnings

import peft
import torch
import transformers

sys.path.append(os.path.dirname(os.path.abspath(__file__)))
from peft_limits import dump_step  # noqa: E402

BINARY = os.environ.get("PEFT_LIMITS", "target/release/peft-limits")
SIZES = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
MIXTURE = {"num_experts_per_tok": 2}
FAMILIES = {
    "llama": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 500000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "mistral": {"sliding_window": 5},
    "qwen2": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 5, "query_pre_attn_scalar": 12},
    "gemma3_text": {"head_dim": 16, "sliding_window": 5, "num_hidden_layers": 3},
    "phi3": {"original_max_position_embeddings": 64},
    "olmo2": {},
    "granite": {
        "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5,
        "attention_multiplier": 0.2,
        "logits_scaling": 3.0,
    },
    "smollm3": {"num_hidden_layers": 4},
    "gpt2": {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": 4,
        "n_inner": 48,
        "resid_pdrop": 0.0,
        "embd_pdrop": 0.0,
        "attn_pdrop": 0.0,
    },
    "opt": {"ffn_dim": 48, "dropout": 0.0, "word_embed_proj_dim": 32},
    "gpt_neox": {"hidden_dropout": 0.0, "attention_dropout": 0.0},
    "mixtral": {**MIXTURE, "num_local_experts": 3},
    "qwen3_moe": {**MIXTURE, "num_experts": 3, "moe_intermediate_size": 16, "head_dim": 16},
    "gpt_oss": {**MIXTURE, "num_local_experts": 3, "head_dim": 16, "sliding_window": 5},
}
# Methods on whatever linear layers there are, and what happens in the step.
METHODS = {
    "lora": {},
    "rslora": {"use_rslora": True},
    "dora": {"use_dora": True},
    "head": {"modules_to_save": ["lm_head"]},
    "full": None,
}
FORMATS = ("f32", "bf16", "autocast")
EVENTS = (
    "plain",
    "padded",
    "accumulated",
    "clipped",
    "checkpointed",
    "smoothed",
    "dropout",
    "first",
)


def built(family, method, dtype, event):
    torch.manual_seed(3)
    config = transformers.AutoConfig.for_model(family, **{**SIZES, **FAMILIES[family]})
    model = transformers.AutoModelForCausalLM.from_config(config).to(dtype)
    for p in model.parameters():
        if p.dim() == 2:
            p.data.normal_(0, 0.15)
    if METHODS[method] is not None:
        settings = {
            "r": 4,
            "lora_alpha": 8,
            "target_modules": "all-linear",
            "init_lora_weights": event == "first",
            "lora_dropout": 0.1 if event == "dropout" else 0.0,
            "fan_in_fan_out": family == "gpt2",
        }
        if (event == "dropout" or method == "dora") and "num_experts_per_tok" in FAMILIES[family]:
            # PEFT's wrappers of experts have neither dropout nor DoRA.
            settings["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj"]
        model = peft.get_peft_model(
            model, peft.LoraConfig(task_type="CAUSAL_LM", **{**settings, **METHODS[method]})
        )
    if event == "checkpointed":
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.train()


def rows(count, length, padded, seed):
    ids = torch.randint(3, 61, (count, length), generator=torch.Generator().manual_seed(seed))
    labels, mask = ids.clone(), torch.ones_like(ids)
    labels[0, :3] = -100
    if padded:
        mask[1, -4:], labels[1, -4:], ids[1, -4:] = 0, -100, 0
    return {"input_ids": ids, "labels": labels} | ({"attention_mask": mask} if padded else {})


def step(folder, family, method, form, event):
    model = built(family, method, torch.bfloat16 if form == "bf16" else torch.float32, event)
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.01)
    parts = (
        [rows(2, 9, False, 1), rows(3, 12, True, 2)]
        if event == "accumulated"
        else [rows(3, 12, event == "padded", 1)]
    )
    counted = sum(int((p["labels"][:, 1:] != -100).sum()) for p in parts)
    with dump_step(model, folder, label_smoothing=0.1 if event == "smoothed" else 0.0) as recorded:
        total = 0.0
        for part in parts:
            with torch.autocast("cpu", dtype=torch.bfloat16, enabled=form == "autocast"):
                out = model(**part, use_cache=False, num_items_in_batch=counted)
                loss = out.loss
                if event == "smoothed":
                    logits = out.logits[:, :-1].float().flatten(0, 1)
                    loss = torch.nn.functional.cross_entropy(
                        logits, part["labels"][:, 1:].flatten(), label_smoothing=0.1
                    )
            loss.backward()
            total += float(loss.detach())
        recorded.set_loss(total)
        if event == "clipped":
            torch.nn.utils.clip_grad_norm_(trained, 0.1)
        optimizer.step()


def chosen(families):
    """Every family in every format and with every event and method, each of these at least once."""
    for number, family in enumerate(families):
        for turn, form in itertools.product(range(3), FORMATS):
            method = list(METHODS)[(number + turn + FORMATS.index(form)) % len(METHODS)]
            event = EVENTS[(number + 3 * turn + FORMATS.index(form)) % len(EVENTS)]
            if event in ("dropout", "first") and method in ("full", "dora"):
                method = "lora"
            yield family, method, form, event


def main():
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    count, wrong = 0, []
    for case in chosen(sys.argv[1:] or list(FAMILIES)):
        with tempfile.TemporaryDirectory() as folder:
            dump = os.path.join(folder, "dump")
            step(dump, *case)
            done = subprocess.run(
                [BINARY, "validate", dump, "--json"], capture_output=True, text=True
            )
        count += 1
        if done.returncode != 0:
            report = json.loads(done.stdout) if done.stdout else {}
            failed = [r["name"] for r in report.get("rungs", []) if r["status"] == "fail"]
            wrong.append(
                f"{' '.join(case)}: exit {done.returncode} {failed} {[d['fault'] for d in report.get('diagnoses', [])]} "
                f"{done.stderr.strip()}"
            )
            print(wrong[-1], flush=True)
    print(f"{count} right steps, {len(wrong)} not passed")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
