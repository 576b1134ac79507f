"""Writes model and adapter of a recorded step in Hugging Face's layout, as they are before it."""

import json
import os
import re
import shutil

from safetensors.torch import save_file

import torch

from .calls import dtype_name, plain, unwrap
from .quantized import is_quantized
from .ranks import digest, is_sharded, local, world
from .report import NotJudged, require_known

ADAPTER_TENSOR = re.compile(r"\.(lora_|paca_|s2ft_)")


def full(tensor, summand=False):
    """The tensor on the CPU: the whole of one that is sharded over one process, this process's part of one over several."""
    if world()[1] > 1:
        return local(tensor, summand)
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    return tensor.to("cpu", copy=True).contiguous()


def jsonable(value):
    if isinstance(value, dict):
        return {str(k): jsonable(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [jsonable(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(jsonable(v) for v in value)
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return (
        dtype_name(value) if isinstance(value, torch.dtype) else str(getattr(value, "value", value))
    )


def under_checkpoint_names(model, tensors):
    """Weights as files name them, where Transformers names and stacks them otherwise in memory (experts, GPT-NeoX's head)."""
    try:
        from transformers.core_model_loading import revert_weight_conversion
    except ImportError:
        return tensors
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    if not type(inner).__module__.startswith("transformers."):
        return tensors
    return {n: t.contiguous() for n, t in revert_weight_conversion(inner, tensors).items()}


def write_json(path, value, indent=1):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w") as file:
        json.dump(value, file, indent=indent)
        file.write("\n")


def without_paths(config):
    """The configuration without the folder that a model was loaded from: dumps are sent to others."""
    return {
        k: None if k.endswith("name_or_path") and isinstance(v, str) and os.path.isabs(v) else v
        for k, v in config.items()
    }


def write_checkpoint(folder, config, tensors):
    write_json(os.path.join(folder, "config.json"), config)
    try:
        require_known(os.path.join(folder, "config.json"))
    except NotJudged:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})


def without(config):
    """`exclude_modules` of an adapter's configuration with its `modules_to_save` in it, as one pattern."""
    patterns = [rf"(.*\.)?({name})(\..*)?" for name in config["modules_to_save"]]
    excluded = config.get("exclude_modules")
    if isinstance(excluded, str) and excluded:
        patterns.append(f"({excluded})")
    elif excluded:
        patterns += [rf"(.*\.)?{re.escape(name)}" for name in excluded]
    return "|".join(patterns)


def untied(step, model, base, config):
    """The config, not tied where embedding and head are two weights: `modules_to_save` copies one of them."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    ends = [getattr(inner, f"get_{end}_embeddings", lambda: None)() for end in ("input", "output")]
    weights = [getattr(end, "weight", None) for end in ends]
    if not config.get("tie_word_embeddings") or any(
        not isinstance(w, torch.Tensor) for w in weights
    ):
        return config
    # Parts of sharded weights have no address of their own.
    if (
        any(map(is_sharded, weights))
        or weights[0].data_ptr() == weights[1].data_ptr()
        or is_quantized(weights[1])
    ):
        return config
    # PEFT's wrapper hides the original that the other end still uses.
    names = {
        name: module
        for name, module in inner.named_modules(remove_duplicate=False)
        if module in ends
    }
    base |= {step.rename(name + ".weight"): full(module.weight) for name, module in names.items()}
    return config | {"tie_word_embeddings": False}


def write_model(step):
    """The weights before the step, in Hugging Face's layout."""
    step.writing = step.folder.rstrip("/") + ".writing"
    shutil.rmtree(step.writing, ignore_errors=True)
    os.makedirs(step.writing)
    model = unwrap(step.model)
    base, adapter, frozen = {}, {}, {}
    peft = getattr(model, "peft_config", None)
    active = step.active
    tensors = dict(step.model.named_parameters())
    tensors |= {n: b for n, b in step.model.named_buffers() if ADAPTER_TENSOR.search(n)}
    inactive = [n for n in (peft or {}) if n != active]
    copies, given = [], step.model_path is not None
    for raw, tensor in tensors.items():
        clean = plain(raw)
        if id(tensor) in step.official.names or ".paca_indices." in clean:
            continue
        # Adapters that do not run, and the originals of modules that modules_to_save copies.
        if ".original_module." in clean or any(
            re.search(rf"\.(lora_\w+|modules_to_save)\.{re.escape(n)}(\.|$)", clean)
            for n in inactive
        ):
            continue
        copied = ".modules_to_save." in clean
        clean = clean.replace(f".modules_to_save.{active}.", ".")
        name = step.rename(clean).replace(f".{active}", "")
        name = name.removeprefix("base_model.model.")
        # PEFT wraps a module once for each of its parameters that it trains; an adapter's own files keep that.
        bare = name
        while ".base_layer." in bare:
            bare = bare.replace(".base_layer.", ".")
        if is_quantized(tensor):
            base |= step.quantized.tensors(raw, tensor, bare)
        elif ADAPTER_TENSOR.search(name):
            name = name.removesuffix(".weight")
            # PEFT's files end in .weight for the factors, not for the magnitude.
            factor = name.endswith(("lora_A", "lora_B", "lora_mixer"))
            name = "base_model.model." + name + (".weight" if factor else "")
            adapter[name] = full(tensor)
            divide(step, name, raw, tensor)
        else:
            add_to_base(step, base, frozen, bare, raw, tensor)
            if copied:
                copies.append(bare)
    # The parts of a quantized weight are in formats of their own.
    plain_weights = (
        t
        for n, t in base.items()
        if t.is_floating_point() and ".weight." not in n and not n.endswith(".SCB")
    )
    step.weights = dtype_name(next(plain_weights).dtype)
    step.frozen = frozen
    if any(type(m).__module__.startswith("transformers.") for m in model.modules()):
        step.internals = step.internals or "float32"
    if not given:
        config = step.config or getattr(model, "config", None)
        config = config if isinstance(config, dict) else getattr(config, "to_dict", dict)()
        if not config:
            raise ValueError("dump_step: give config=, the model has none")
        # The copies of modules_to_save are written as the modules themselves.
        write_base(step, untied(step, model, base, without_paths(jsonable(config))), base)
    adapter |= {
        n: full(t) for n, t in (step.official.tensors | (step.adapter_tensors or {})).items()
    }
    if given:
        adapter |= {"base_model.model." + name: base[name] for name in copies if name in base}
    if step.adapter_path is None and adapter:
        config = step.adapter_config or step.official.config or (peft and peft[active].to_dict())
        if not config:
            raise ValueError("dump_step: give adapter_config=, the model is not a PEFT model")
        config = without_paths(jsonable(config))
        if copies and not given:
            # No adapter acts on the modules that they are written as.
            config |= {"modules_to_save": None, "exclude_modules": without(config)}
        write_json(os.path.join(step.writing, "adapter/adapter_config.json"), config)
        save_file(
            adapter,
            os.path.join(step.writing, "adapter/adapter_model.safetensors"),
            metadata={"format": "pt"},
        )
    step.has_adapter = step.adapter_path is not None or bool(adapter)


def divide(step, name, raw, tensor):
    part = step.ranks.place(raw, tensor) if step.ranks else None
    if part is not None:
        step.ranks.shards[name] = part
    return part


def add_to_base(step, base, frozen, name, raw, tensor):
    """Keeps a weight if this process writes it; the others tell whether theirs is the same."""
    if step.ranks and divide(step, name, raw, tensor) is None:
        frozen[name] = digest(full(tensor))
    # One weight at least says the format.
    if not step.ranks or step.ranks.rank == 0 or name in step.ranks.shards or not base:
        base[name] = full(tensor)


def write_base(step, config, base):
    """The base model; of what all processes share rank 0 writes the one copy, beside the ranks' folders."""
    if step.ranks and not any(name in step.ranks.shards for name in base):
        step.model_path = "model"
        if step.ranks.rank != 0:
            return
        writing = os.path.join(step.root, "model.writing")
        shutil.rmtree(writing, ignore_errors=True)
        write_checkpoint(writing, config, under_checkpoint_names(unwrap(step.model), base))
        os.replace(writing, os.path.join(step.root, "model"))
    else:
        names = base if step.ranks else under_checkpoint_names(unwrap(step.model), base)
        write_checkpoint(os.path.join(step.writing, "model"), config, names)
