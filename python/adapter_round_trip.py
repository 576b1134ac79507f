#!/usr/bin/env python3
"""Checks `peft-limits adapter` against PEFT itself, and writes the folders of tests/data/adapters.

    cargo build --bin peft-limits
    python python/adapter_round_trip.py --peft-limits target/debug/peft-limits --out tests/data/adapters

On the base model of tests/data/llama_lora, in float64:
  lora, dora  made by PEFT (rank and alpha patterns, rank-stabilized scaling); written again by peft-limits; same
              configuration to the byte, same tensors, same logits in PEFT
  paca, s2ft  written here in the formats of src/model/adapter_folder.rs, with the logits of a Transformers model whose
              weights were changed directly; exported as low-rank factors; PEFT's logits with those must be the same
  fused       0.5 lora - 0.25 s2ft by peft-limits against weights summed directly; and two plain LoRA adapters against
              PEFT's own add_weighted_adapter("cat") (which keeps the first one's rank-stabilized flag, so that its
              sums of rank-stabilized adapters have another scaling)
  saved       made by PEFT with modules_to_save (norms, a projection, the output head); merged into a checkpoint by
              peft-limits; same logits in Transformers

Needs torch, transformers, peft and safetensors. Exit code 1 if anything differs.
"""

import argparse
import filecmp
import json
import pathlib
import shutil
import subprocess
import sys

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm, LlamaRotaryEmbedding

PREFIX = "base_model.model.model.layers"
FAILED = []


def norm_in_double(self, x):
    """Transformers' RMSNorm rounds to float32, which would hide differences."""
    return self.weight * x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)


def rotary_in_double(self, x, position_ids):
    """Its rotary angles are float32 too (and its eager softmax; `sdpa` keeps float64)."""
    width = 2 * self.inv_freq.shape[0]
    theta = self.config.rope_parameters["rope_theta"]
    frequencies = theta ** (-torch.arange(0, width, 2, dtype=torch.float64) / width)
    angles = position_ids[:, :, None].double() * frequencies
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


LlamaRMSNorm.forward = norm_in_double
LlamaRotaryEmbedding.forward = rotary_in_double


def gap(name, got, want):
    relative = ((got - want).norm() / want.norm()).item()
    print(f"{name:<44} relative gap of logits {relative:.1e}")
    if not relative < 1e-12:
        FAILED.append(name)


def check(name, condition):
    print(f"{name:<44} {'yes' if condition else 'NO'}")
    if not condition:
        FAILED.append(name)


def base_model(folder):
    return LlamaForCausalLM.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="sdpa"
    ).eval()


def logits(model, ids):
    with torch.no_grad():
        return model(ids).logits


def peft_logits(base, adapter, ids):
    return logits(PeftModel.from_pretrained(base_model(base), adapter).eval(), ids)


def make_peft(base, folder, generator, **settings):
    model = get_peft_model(base_model(base), LoraConfig(task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_" in name:
                noise = torch.randn(p.shape, generator=generator, dtype=torch.float64)
                p.copy_(p + 0.1 * noise if "magnitude" in name else 0.3 * noise)
            elif p.requires_grad:
                p.add_(torch.randn(p.shape, generator=generator, dtype=torch.float64), alpha=0.1)
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    return model.eval()


def projection(model, layer, path):
    module = model.model.layers[layer]
    for part in path.split("."):
        module = getattr(module, part)
    return module.weight


def write_folder(folder, kind, targets, tensors):
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "adapter_model.safetensors")
    config = {
        "peft_type": kind,
        "task_type": "CAUSAL_LM",
        "target_modules": targets,
        "bias": "none",
        "inference_mode": True,
    }
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")


def make_paca(base, folder, generator):
    model, tensors = base_model(base), {}
    for layer in range(2):
        for path in ["self_attn.q_proj", "mlp.down_proj"]:
            weight = projection(model, layer, path)
            index = torch.randperm(weight.shape[1], generator=generator)[:3].sort().values
            with torch.no_grad():
                weight[:, index] += 0.2 * torch.randn(
                    weight.shape[0], 3, generator=generator, dtype=torch.float64
                )
            name = f"{PREFIX}.{layer}.{path}"
            tensors[f"{name}.paca_index"] = index.double()
            tensors[f"{name}.paca_columns"] = weight.detach()[:, index]
            tensors[f"{name}.paca_scaling"] = torch.tensor([2.0], dtype=torch.float64)
    write_folder(folder, "PACA", ["q_proj", "down_proj"], tensors)
    return model


def make_s2ft(base, folder, generator):
    """Rows of up and v, columns of down and o, of units that a co-permutation has brought together."""
    model, tensors = base_model(base), {}
    config = model.config
    group = config.num_attention_heads // config.num_key_value_heads * config.head_dim
    for layer in range(2):
        channels = torch.randperm(config.intermediate_size, generator=generator)
        groups = torch.randperm(config.num_key_value_heads, generator=generator)
        tensors[f"{PREFIX}.{layer}.s2ft_groups"] = groups.double()
        tensors[f"{PREFIX}.{layer}.s2ft_channels"] = channels.double()
        wide = torch.cat([torch.arange(group) + g * group for g in groups])
        narrow = torch.cat([torch.arange(config.head_dim) + g * config.head_dim for g in groups])
        for path, order, start, end, rows in [
            ("mlp.up_proj", channels, 0, 4, True),
            ("mlp.down_proj", channels, 2, 7, False),
            ("self_attn.v_proj", narrow, 0, config.head_dim, True),
            ("self_attn.o_proj", wide, 0, group, False),
        ]:
            weight, chosen = projection(model, layer, path), order[start:end]
            with torch.no_grad():
                part = weight[chosen] if rows else weight[:, chosen]
                part = part + 0.2 * torch.randn(
                    part.shape, generator=generator, dtype=torch.float64
                )
                if rows:
                    weight[chosen] = part
                else:
                    weight[:, chosen] = part
            name = f"{PREFIX}.{layer}.{path}"
            tensors[f"{name}.s2ft_range"] = torch.tensor([start, end], dtype=torch.float64)
            tensors[f"{name}.s2ft_slice"] = part.detach()
    write_folder(folder, "S2FT", ["up_proj", "down_proj", "v_proj", "o_proj"], tensors)
    return model


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--peft-limits", required=True, help="the binary")
    parser.add_argument("--base", type=pathlib.Path, default=pathlib.Path("tests/data/llama_lora"))
    parser.add_argument("--out", type=pathlib.Path, required=True, help="folder to fill")
    options = parser.parse_args()
    base, out = options.base, options.out
    ids = load_file(base / "reference.safetensors")["input_ids"]
    generator = torch.Generator().manual_seed(11)

    def run(*arguments):
        command = [options.peft_limits, "adapter", *map(str, arguments)]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)

    def fresh(name):
        shutil.rmtree(out / name, ignore_errors=True)
        return out / name

    reference, scratch = {}, out / "scratch"
    shutil.rmtree(scratch, ignore_errors=True)
    patterns = dict(
        rank_pattern={"layers.1.mlp.down_proj": 2}, alpha_pattern={"layers.0.self_attn.q_proj": 7}
    )
    settings = {
        "lora": dict(
            r=3,
            lora_alpha=5,
            use_rslora=True,
            target_modules=["q_proj", "v_proj", "down_proj"],
            **patterns,
        ),
        "dora": dict(
            r=2,
            lora_alpha=3,
            use_dora=True,
            target_modules=["k_proj", "o_proj"],
            layers_to_transform=[1],
        ),
        "lora2": dict(r=2, lora_alpha=8, target_modules=["q_proj", "gate_proj"]),
        "lora3": dict(r=3, lora_alpha=4, target_modules=["q_proj", "gate_proj"]),
    }
    plain = logits(base_model(base), ids)
    for name, keys in settings.items():
        folder = scratch / name if name in ("lora2", "lora3") else fresh(name)
        made = logits(make_peft(base, folder, generator, **keys), ids)
        check(f"{name}: changes the logits", (made - plain).norm() > 0.01 * plain.norm())
        if name in ("lora2", "lora3"):
            continue
        reference[name] = made
        again = scratch / f"{name}-again"
        run("export", "--model", base, "--adapter", folder, "--f64", "-o", again)
        gap(
            f"{name}: exported, in PEFT or as a slice",
            (peft_logits(base, again, ids) if name == "lora" else slice_logits(base, again, ids)),
            reference[name],
        )
        if name == "lora":
            check(
                "lora: same configuration, to the byte",
                filecmp.cmp(
                    folder / "adapter_config.json", again / "adapter_config.json", shallow=False
                ),
            )
            ours, theirs = (load_file(f / "adapter_model.safetensors") for f in (again, folder))
            check(
                "lora: same tensors",
                ours.keys() == theirs.keys() and all(torch.equal(ours[k], theirs[k]) for k in ours),
            )
    changed = {}
    for name, make in [("paca", make_paca), ("s2ft", make_s2ft)]:
        folder = fresh(name)
        changed[name] = make(base, folder, generator)
        reference[name] = logits(changed[name], ids)
        run(
            "export",
            "--model",
            base,
            "--adapter",
            folder,
            "--low-rank",
            "--f64",
            "-o",
            scratch / name,
        )
        gap(
            f"{name}: as low-rank factors, in PEFT",
            peft_logits(base, scratch / name, ids),
            reference[name],
        )
        run(
            "export", "--model", base, "--adapter", folder, "--f64", "-o", scratch / f"{name}-slice"
        )
        gap(
            f"{name}: as a slice",
            slice_logits(base, scratch / f"{name}-slice", ids),
            reference[name],
        )

    run(
        "fuse",
        "--model",
        base,
        f"{out / 'lora'}=0.5",
        f"{out / 's2ft'}=-0.25",
        "--f64",
        "-o",
        scratch / "fused",
    )
    want, original = base_model(base), base_model(base)
    lora = PeftModel.from_pretrained(base_model(base), out / "lora").merge_and_unload()
    with torch.no_grad():
        for p, b, l, s in zip(
            want.parameters(),
            original.parameters(),
            lora.parameters(),
            changed["s2ft"].parameters(),
        ):
            p.copy_(b + 0.5 * (l - b) - 0.25 * (s - b))
    reference["fused"] = logits(want, ids)
    gap(
        "0.5 lora - 0.25 s2ft, fused, in PEFT",
        peft_logits(base, scratch / "fused", ids),
        reference["fused"],
    )
    both = PeftModel.from_pretrained(base_model(base), scratch / "lora2", adapter_name="a")
    both.load_adapter(scratch / "lora3", adapter_name="b")
    both.add_weighted_adapter(["a", "b"], [0.7, 0.3], "sum", combination_type="cat")
    both.set_adapter("sum")
    run(
        "fuse",
        "--model",
        base,
        f"{scratch / 'lora2'}=0.7",
        f"{scratch / 'lora3'}=0.3",
        "--f64",
        "-o",
        scratch / "sum",
    )
    gap(
        "0.7 lora2 + 0.3 lora3 against PEFT's cat",
        peft_logits(base, scratch / "sum", ids),
        logits(both.eval(), ids),
    )

    saved = make_peft(
        base,
        fresh("saved"),
        generator,
        r=2,
        lora_alpha=6,
        target_modules=["q_proj", "v_proj"],
        modules_to_save=["norm", "layers.1.self_attn.o_proj", "lm_head"],
    )
    reference["saved"] = logits(saved, ids)
    run("merge", "--model", base, out / "saved", "--f64", "-o", scratch / "merged")
    gap(
        "saved: merged, in Transformers",
        logits(base_model(scratch / "merged"), ids),
        reference["saved"],
    )

    save_file({**reference, "input_ids": ids}, out / "logits.safetensors")
    shutil.rmtree(scratch)
    return 1 if FAILED else 0


def slice_logits(base, folder, ids):
    """Logits with a SLICE folder added to the weights here."""
    model = base_model(base)
    tensors = load_file(folder / "adapter_model.safetensors")
    with torch.no_grad():
        for name, delta in tensors.items():
            if not name.endswith(".slice_delta"):
                continue
            prefix = name.removesuffix(".slice_delta")
            layer, path = prefix.removeprefix(PREFIX + ".").split(".", 1)
            weight = projection(model, int(layer), path)
            if f"{prefix}.slice_rows" in tensors:
                weight[tensors[f"{prefix}.slice_rows"].long()] += delta
            else:
                weight[:, tensors[f"{prefix}.slice_columns"].long()] += delta
    return logits(model, ids)


if __name__ == "__main__":
    sys.exit(main())
