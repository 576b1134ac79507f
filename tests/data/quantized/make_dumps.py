"""Steps of PEFT on bases that bitsandbytes quantized, on the CPU:  python tests/data/quantized/make_dumps.py

clean/ holds right steps, faults/ wrong ones, named by their folder. Needs torch, transformers, peft and bitsandbytes.
Rows of 24 and 40 entries are no whole number of blocks, so a block's scale spans rows.
"""

import os
import shutil
import sys
import tempfile

import peft
import torch
import transformers
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "../../../python"))
from peft_limits import dump_step  # noqa: E402

F32, BF16 = torch.float32, torch.bfloat16


def base(kind, dtype, compute, double):
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=37,
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=32,
    )
    model = LlamaForCausalLM(config)
    for p in model.parameters():
        if p.dim() == 2:
            p.data.normal_(0, 0.3)
    if kind == "int8":
        settings = BitsAndBytesConfig(load_in_8bit=True)
    else:
        settings = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=double,
            bnb_4bit_compute_dtype=compute,
        )
    with tempfile.TemporaryDirectory() as folder:
        model.to(dtype).save_pretrained(folder)
        return LlamaForCausalLM.from_pretrained(folder, quantization_config=settings, dtype=dtype)


def linears(model):
    return [m for m in model.modules() if hasattr(m._parameters.get("weight"), "quant_state")]


def swap_nibbles(model):
    for module in linears(model):
        codes = module.weight.data
        codes.copy_((codes << 4) | (codes >> 4))


def drop_offset(model):
    for module in linears(model):
        module.weight.quant_state.offset.zero_()


def drop_scaling(model):
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] = 1.0


def step(
    name, kind="nf4", dtype=BF16, compute=BF16, double=True, prepared=False, dora=False, fault=None
):
    model = base(kind, dtype, compute, double)
    if prepared:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    model = peft.get_peft_model(
        model,
        peft.LoraConfig(
            r=2,
            lora_alpha=6,
            target_modules="all-linear",
            use_dora=dora,
            task_type="CAUSAL_LM",
            init_lora_weights=False,
        ),
    )
    model.train()
    ids = torch.randint(0, 37, (2, 9), generator=torch.Generator().manual_seed(1))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    with dump_step(model, os.path.join(HERE, "faults" if fault else "clean", name)):
        if fault:
            fault(model)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()


def main():
    for kind in ("clean", "faults"):
        shutil.rmtree(os.path.join(HERE, kind), ignore_errors=True)
        os.makedirs(os.path.join(HERE, kind))
    transformers.logging.set_verbosity_error()
    step("qlora-bf16")
    step("qlora-f32-single", dtype=F32, compute=F32, double=False)
    step("qlora-prepared-bf16", prepared=True)
    step("qlora-bf16-compute-f32", compute=F32)
    step("qdora-f32", dtype=F32, compute=F32, dora=True)
    step("qdora-bf16-compute-f32", compute=F32, dora=True)
    step("int8-bf16", kind="int8")
    step("int8-f32", kind="int8", dtype=F32)
    step("nf4-nibbles", fault=swap_nibbles)
    step("nf4-offset", fault=drop_offset)
    step("adapter-scaling", fault=drop_scaling)


if __name__ == "__main__":
    main()
