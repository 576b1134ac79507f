"""Models and rows that several tests of this folder use."""

import torch


def llama(layers=3, dtype=torch.float32, positions=128):
    """A LLaMA of 61 tokens with weights large enough that its attention is not flat."""
    import transformers

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=61,
        hidden_size=32,
        intermediate_size=56,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=positions,
    )
    model = transformers.LlamaForCausalLM(config).to(dtype)
    for p in model.parameters():
        if p.dim() == 2:
            p.data.normal_(0, 0.2)
    return model


def lora(**settings):
    """LoRA on every linear layer, with PEFT's own start unless told otherwise."""
    import peft

    own = {"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": "all-linear"}
    return peft.LoraConfig(**(own | settings))


def padded(rows):
    """A batch of rows of several lengths, padded at the right."""
    length = max(len(row["input_ids"]) for row in rows)

    def fill(key, value):
        return torch.tensor([row[key] + [value] * (length - len(row[key])) for row in rows])

    return {
        "input_ids": fill("input_ids", 0),
        "attention_mask": fill("attention_mask", 0),
        "labels": fill("labels", -100),
    }
