"""Adapters under the names that their papers' own code gives them, brought to those of a dump.

PaCA      paca_w, paca_indices, scaling     (github.com/WooSunghyeon/paca)
S2FT      s2, start, end beside a weight    (github.com/Infini-AI-Lab/S2FT)
MosLoRA   lora_AB, lora_use_mixer           (github.com/wutaiqiang/MoSLoRA)
"""

import torch

from .calls import plain, unwrap


def of_adapter(collection, active):
    """The entry of the active adapter in a ParameterDict, ModuleDict or dict; the thing itself where it is no collection."""
    if isinstance(collection, torch.Tensor):
        return collection
    try:
        return collection[active]
    except (KeyError, TypeError):
        return None


class Official:
    """What a model trains under other names.

    names    {id(parameter): name of the tensor in a dump}
    tensors  {name in adapter_model.safetensors: tensor}
    shifts   {id(parameter): what is added to it}, for S2FT, which trains the change of a slice
    config   adapter_config.json, or None where nothing of this kind is there
    """

    def __init__(self, model, active):
        self.names, self.tensors, self.shifts, self.config = {}, {}, {}, None
        inner, paths = unwrap(model), set()
        for raw, module in inner.named_modules():
            path = plain(raw).removeprefix("base_model.model.")
            kind = (
                self.paca(path, module, active)
                or self.s2ft(path, module)
                or self.moslora(path, module, active)
            )
            if kind:
                paths.add(path)
                self.config = {"peft_type": kind, "target_modules": sorted(paths)}
        if self.config and self.config["peft_type"] == "S2FT":
            self.orders(inner)
        if self.config and self.config["peft_type"] == "MOSLORA":
            settings = inner.peft_config[active].to_dict()
            self.config |= {
                key: settings[key] for key in ("r", "lora_alpha", "use_rslora") if key in settings
            }

    def paca(self, path, module, active):
        columns = of_adapter(getattr(module, "paca_w", None), active)
        index = of_adapter(getattr(module, "paca_indices", None), active)
        if not isinstance(columns, torch.Tensor) or not isinstance(index, torch.Tensor):
            return None
        scaling = float(
            module.scaling[active] if isinstance(module.scaling, dict) else module.scaling
        )
        self.names[id(columns)] = path + ".paca_columns"
        prefix = "base_model.model." + path + "."
        self.tensors |= {
            prefix + "paca_columns": columns.detach() * scaling,
            prefix + "paca_index": index.double(),
            prefix + "paca_scaling": torch.tensor([scaling], dtype=torch.float64),
        }
        return "PACA"

    def s2ft(self, path, module):
        change, start, end = (getattr(module, name, None) for name in ("s2", "start", "end"))
        if not isinstance(change, torch.Tensor) or start is None or end is None:
            return None
        if getattr(module, "fused", False):
            raise ValueError(
                f"dump_step: the slice of {path} is fused into its weight, so it cannot be trained: unfuse it first"
            )
        weight = module.weight.detach()
        part = (
            weight[start:end] if change.shape == weight[start:end].shape else weight[:, start:end]
        )
        if part.shape != change.shape:
            raise ValueError(
                f"dump_step: {path}.s2 is {tuple(change.shape)}, a slice {start}:{end} of {tuple(weight.shape)} expected"
            )
        self.names[id(change)] = path + ".s2ft_slice"
        self.shifts[id(change)] = part.float()
        prefix = "base_model.model." + path + "."
        self.tensors |= {
            prefix + "s2ft_slice": part.float() + change.detach().float(),
            prefix + "s2ft_range": torch.tensor([start, end], dtype=torch.float64),
        }
        return "S2FT"

    def orders(self, model):
        """Heads and channels are in the weights' own order: that code permutes the weights themselves."""
        config = model.config
        layers = {
            path.split(".layers.")[1].split(".")[0]
            for path in self.config["target_modules"]
            if ".layers." in path
        }
        for layer in layers:
            prefix = f"base_model.model.model.layers.{layer}."
            self.tensors |= {
                prefix + "s2ft_groups": torch.arange(config.num_key_value_heads).double(),
                prefix + "s2ft_channels": torch.arange(config.intermediate_size).double(),
            }

    def moslora(self, path, module, active):
        mixer = of_adapter(getattr(module, "lora_AB", None), active)
        factors = [of_adapter(getattr(module, name, None), active) for name in ("lora_A", "lora_B")]
        if mixer is None or any(f is None for f in factors):
            return None
        weight = getattr(mixer, "weight", mixer)
        self.names[id(weight)] = path + ".lora_mixer"
        self.tensors["base_model.model." + path + ".lora_mixer.weight"] = weight.detach()
        return "MOSLORA"
