"""Quantized base weights of bitsandbytes in a dump: the checkpoint's own form, so that the reference restores them itself.

NF4 (`Linear4bit`) and int8 (`Linear8bitLt`, on the CPU only: on a GPU its forward also quantizes the activations, which
the reference does not imitate) are written; anything else is refused by name.
"""

import torch

from .calls import dtype_name


def is_quantized(tensor):
    return tensor.dtype in (torch.uint8, torch.int8)


def coarser(a, b):
    return a if torch.finfo(a).eps >= torch.finfo(b).eps else b


def restored(packed, state):
    """What the stored parts say, in f32: each entry by the scale of its block."""
    absmax = state.absmax
    if state.nested:
        nested = state.state2
        second = nested.absmax.repeat_interleave(nested.blocksize)[: absmax.numel()]
        absmax = nested.code[absmax.long()] * second + state.offset
    bytes_ = packed.reshape(-1).long()
    codes = torch.stack([bytes_ >> 4, bytes_ & 15], 1).reshape(-1)[: state.shape.numel()]
    scales = absmax.float().repeat_interleave(state.blocksize)[: codes.numel()]
    return (state.code.to(packed.device)[codes] * scales).reshape(state.shape)


class QuantizedBase:
    """The quantized modules of a model, and the formats in which they compute."""

    def __init__(self, model, full):
        self.full, self.modules, self.inputs = full, {}, {}
        for name, module in model.named_modules():
            # An adapter's wrapper shows the weight of the module inside it.
            weight = module._parameters.get("weight")
            if weight is not None and is_quantized(weight):
                self.modules[name] = module

    def hooks(self):
        """Remembers the format of each module's inputs."""

        def keep(name):
            def hook(module, args):
                if args and isinstance(args[0], torch.Tensor):
                    self.inputs[name] = args[0].dtype

            return hook

        return [
            module.register_forward_pre_hook(keep(name)) for name, module in self.modules.items()
        ]

    def tensors(self, raw, tensor, name):
        """A weight's tensors as a checkpoint has them, by their names; `raw` is its name in the model."""
        if getattr(tensor, "quant_state", None) is not None:
            return self.nf4(raw, tensor, name)
        module = self.modules.get(raw.removesuffix(".weight"))
        scales = getattr(tensor, "SCB", None)
        scales = getattr(getattr(module, "state", None), "SCB", None) if scales is None else scales
        if tensor.dtype != torch.int8 or scales is None:
            raise ValueError(
                f"dump_step: {raw} is quantized ({dtype_name(tensor.dtype)}), and not by bitsandbytes in NF4 or "
                "int8: that is not supported"
            )
        if tensor.device.type not in ("cpu", "xpu"):
            raise ValueError(
                f"dump_step: {raw} is in int8 on {tensor.device.type}, where the forward pass quantizes the activations "
                "as well, which the reference cannot imitate: record NF4, or int8 on the CPU"
            )
        module_name = name.removesuffix(".weight")
        return {
            name: self.full(tensor),
            f"{module_name}.SCB": self.full(scales).float(),
            f"{module_name}.weight_format": torch.tensor(0, dtype=torch.uint8),
        }

    def nf4(self, raw, tensor, name):
        state = tensor.quant_state
        if state.quant_type != "nf4" or tensor.dtype != torch.uint8:
            raise ValueError(
                f"dump_step: {raw} is in {state.quant_type} ({dtype_name(tensor.dtype)}), not in NF4 stored as uint8: that "
                "is not supported"
            )
        if getattr(state, "packing_format_for_cpu", False):
            raise ValueError(
                f"dump_step: {raw} was packed again for inference on the CPU: call model.train() before anything runs"
            )
        if tensor.device.type == "cpu":
            import bitsandbytes.functional as functional

            kernel = functional.dequantize_4bit(tensor.data, state)
            if not torch.equal(kernel, restored(tensor.data, state).to(kernel.dtype)):
                raise ValueError(
                    f"dump_step: bitsandbytes restores {raw} of shape {tuple(state.shape)} wrongly on this CPU: rows that are no "
                    f"whole number of blocks of {state.blocksize} get their neighbours' scales. Record on a GPU, or leave "
                    "the module out with llm_int8_skip_modules"
                )
        parts = state.as_dict(packed=True)
        return {name: self.full(tensor.data)} | {
            f"{name}.{key}": self.full(value) for key, value in parts.items()
        }

    def formats(self):
        """Of the products, and of the weights restored for forward and for backward; None without quantized weights."""
        found = set()
        for name, module in self.modules.items():
            if name not in self.inputs:
                continue
            state = getattr(module.weight, "quant_state", None)
            compute = (state is not None and getattr(module, "compute_dtype", None)) or self.inputs[
                name
            ]
            if state is None:
                found.add((compute, compute, compute))
                continue
            # Since 0.50 the forward pass restores in the format of the products; backward, and all before, in the weight's.
            fused = hasattr(torch.ops.bitsandbytes, "gemm_4bit")
            twice = coarser(state.dtype, compute)
            found.add((compute, compute if fused else twice, twice))
        if len(found) > 1:
            all_ = sorted("/".join(map(dtype_name, formats)) for formats in found)
            raise ValueError(
                f"dump_step: quantized modules compute in several formats ({', '.join(all_)}), which is not supported"
            )
        if not found:
            return None
        return dict(zip(("compute", "forward", "backward"), map(dtype_name, found.pop())))
