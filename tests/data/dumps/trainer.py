"""A small LLaMA trainer in plain PyTorch with switches for the faults that real trainers have had.

Used by make_dumps.py. Every fault is in the forward or in a custom backward, as it would be in a trainer.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


class Sizes:
    vocab_size, hidden_size, intermediate_size, num_hidden_layers = 31, 16, 24, 2
    num_attention_heads, num_key_value_heads, head_dim = 4, 2, 4
    rms_norm_eps, rope_theta = 1e-5, 10000.0


def hf_config():
    names = [n for n in vars(Sizes) if not n.startswith("_")]
    return {
        "model_type": "llama",
        "hidden_act": "silu",
        "tie_word_embeddings": False,
        "max_position_embeddings": 64,
    } | {n: getattr(Sizes, n) for n in names}


class NoRotaryBackward(torch.autograd.Function):
    """Rotates forward, passes the gradient as it is."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, g):
        return g, None, None


class WrongRotaryBackward(torch.autograd.Function):
    """Rotates the gradient by the angle itself instead of its opposite."""

    @staticmethod
    def forward(ctx, x, cos, sin):
        ctx.save_for_backward(cos, sin)
        return rotate(x, cos, sin)

    @staticmethod
    def backward(ctx, g):
        return rotate(g, *ctx.saved_tensors), None, None


class ScoresWithoutScaleBackward(torch.autograd.Function):
    """scale Q K^T whose backward forgets scale."""

    @staticmethod
    def forward(ctx, q, k, scale):
        ctx.save_for_backward(q, k)
        return q @ k.transpose(-1, -2) * scale

    @staticmethod
    def backward(ctx, g):
        q, k = ctx.saved_tensors
        return g @ k, g.transpose(-1, -2) @ q, None


class NormWithConstantRms(torch.autograd.Function):
    """RMSNorm whose backward takes the root mean square for a constant."""

    @staticmethod
    def forward(ctx, x, gain, eps):
        inverse = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(inverse, gain)
        return x * inverse * gain

    @staticmethod
    def backward(ctx, g):
        inverse, gain = ctx.saved_tensors
        return g * gain * inverse, None, None


class LoraFunction(torch.autograd.Function):
    """x W^T + s x A^T B^T with a hand-written backward and its faults."""

    @staticmethod
    def forward(ctx, x, weight, a, b, scaling, fault):
        z = x @ a.T
        ctx.save_for_backward(x, weight, a, b, z)
        ctx.scaling, ctx.fault = scaling, fault
        return x @ weight.T + scaling * z @ b.T

    @staticmethod
    def backward(ctx, g):
        x, weight, a, b, z = ctx.saved_tensors
        s, flat = ctx.scaling, lambda t: t.reshape(-1, t.shape[-1])
        dz = s * g @ b
        dx = g @ weight + (0 if ctx.fault == "adapter-input-gradient" else dz @ a)
        if ctx.fault == "frozen-input-gradient":
            dx = dz @ a
        keep = 1 / s if ctx.fault == "scaling-in-backward" else 1
        da = keep * flat(dz).T @ flat(x)
        db = keep * s * flat(g).T @ flat(z)
        return dx, None, da, db, None, None


def rotate(x, cos, sin):
    half = x.shape[-1] // 2
    return x * cos + torch.cat([-x[..., half:], x[..., :half]], -1) * sin


def rotate_interleaved(x, cos, sin):
    half = x.shape[-1] // 2
    cos, sin = cos[..., :half], sin[..., :half]
    even, odd = x[..., 0::2], x[..., 1::2]
    return torch.stack([even * cos - odd * sin, odd * cos + even * sin], -1).flatten(-2)


class Lora(nn.Module):
    def __init__(self, weight, rank, alpha, generator, switch, dora=False):
        super().__init__()
        out, width = weight.shape
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.lora_A = nn.Parameter(0.3 * torch.randn(rank, width, generator=generator))
        self.lora_B = nn.Parameter(0.3 * torch.randn(out, rank, generator=generator))
        self.lora_magnitude_vector = (
            nn.Parameter(0.5 + torch.rand(out, generator=generator)) if dora else None
        )
        self.scaling, self.switch, self.name = alpha / rank, switch, ""
        self.merged = None

    def forward(self, x):
        fault, a, b, s = self.switch.fault, self.lora_A, self.lora_B, self.scaling
        if self.lora_magnitude_vector is not None:
            merged = self.weight + s * b @ a
            norm = merged.norm(dim=1)
            norm = norm if fault == "dora-norm" else norm.detach()
            return x @ (merged * (self.lora_magnitude_vector / norm)[:, None]).T
        if fault in ("adapter-input-gradient", "scaling-in-backward", "frozen-input-gradient"):
            return LoraFunction.apply(x, self.weight, a, b, s, fault)
        if fault == "stale-merged-weight":
            # The forward still multiplies by the merged weight of the step before; the factors get its gradient.
            w = self.weight + s * (b @ a - (b @ a).detach()) + s * self.merged
            return x @ w.T
        if fault == "alpha-over-root-r":
            s = s * math.sqrt(a.shape[0])
        if fault == "no-scaling":
            s = 1.0
        if fault == "adapter-twice":
            s = 2 * s
        if fault == "adapter-not-applied":
            s = 0.0
        if fault == "factor-reshaped":
            b = b.reshape(b.shape[1], b.shape[0]).T
        if fault == "outside-graph" and self.name.endswith(("q_proj", "v_proj")):
            a, b = a.detach(), b.detach()
        if fault == "layer-dropped" and ".1." in self.name:
            a, b = a.detach(), b.detach()
        return x @ self.weight.T + s * (x @ a.T) @ b.T


class Slice(nn.Module):
    """PaCA and S2FT: some rows or columns of the weight are trained in place."""

    def __init__(self, weight, axis, index, scaling=1.0, name="paca_columns"):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.axis, self.index, self.scaling, self.tensor = (
            axis,
            torch.as_tensor(index),
            scaling,
            name,
        )
        self.register_parameter(name, nn.Parameter(weight.index_select(axis, self.index) / scaling))

    def forward(self, x):
        values = getattr(self, self.tensor) * self.scaling
        return F.linear(
            x, self.weight.index_copy(self.axis, self.index, values.to(self.weight.dtype))
        )


class Frozen(nn.Module):
    def __init__(self, weight, trained=False):
        super().__init__()
        self.weight = nn.Parameter(weight, requires_grad=trained)

    def forward(self, x):
        return x @ self.weight.T


class Switch:
    """Which fault is on."""

    def __init__(self, fault):
        self.fault = fault


class Norm(nn.Module):
    def __init__(self, gain, switch):
        super().__init__()
        self.weight, self.switch = nn.Parameter(gain, requires_grad=False), switch

    def forward(self, x):
        eps = 1e-6 if self.switch.fault == "norm-eps" else Sizes.rms_norm_eps
        if self.switch.fault == "norm-backward":
            return NormWithConstantRms.apply(x, self.weight, eps)
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps) * self.weight


class Attention(nn.Module):
    def __init__(self, switch):
        super().__init__()
        self.switch = switch

    def forward(self, x, mask, positions):
        fault, size = self.switch.fault, Sizes
        rows, length, _ = x.shape
        split = lambda t: t.view(rows, length, -1, size.head_dim).transpose(1, 2)
        q, k, v = split(self.q_proj(x)), split(self.k_proj(x)), split(self.v_proj(x))
        theta = 1e6 if fault == "rope-theta" else size.rope_theta
        angles = positions[..., None] * theta ** (
            -torch.arange(0, size.head_dim, 2) / size.head_dim
        )
        cos, sin = (
            torch.cat([f(angles)] * 2, -1)[:, None].to(x.dtype) for f in (torch.cos, torch.sin)
        )
        turn = {
            "rotary-backward-missing": NoRotaryBackward.apply,
            "rotary-backward-wrong": WrongRotaryBackward.apply,
            "rotary-interleaved": rotate_interleaved,
            "rotary-missing": lambda x, c, s: x,
        }.get(fault, rotate)
        q, k = turn(q, cos, sin), turn(k, cos, sin)
        group = size.num_attention_heads // size.num_key_value_heads
        spread = (
            (lambda t: t.repeat(1, group, 1, 1))
            if fault == "grouped-heads"
            else (lambda t: t.repeat_interleave(group, 1))
        )
        k, v = spread(k), spread(v)
        scale = 1.0 if fault == "no-attention-scale" else 1 / math.sqrt(size.head_dim)
        if fault == "attention-scale-backward":
            scores = ScoresWithoutScaleBackward.apply(q, k, scale)
        else:
            scores = q @ k.transpose(-1, -2) * scale
        ahead = {"causal-leak": length, "causal-off-by-one": 1}.get(fault, 0)
        hidden = torch.ones(length, length, dtype=torch.bool).triu(1 + ahead)[None, None]
        if mask is not None and fault != "padding-attended":
            hidden = hidden | ~mask[:, None, None, :].bool()
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
        out = torch.softmax(scores, -1) @ v
        return self.o_proj(out.transpose(1, 2).reshape(rows, length, -1))


class Mlp(nn.Module):
    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def forward(self, x, mask, positions):
        x = x + self.self_attn(self.input_layernorm(x), mask, positions)
        return x + self.mlp(self.post_attention_layernorm(x))


class Trainer(nn.Module):
    """`weights` are those of a Hugging Face checkpoint; `make(name, weight, switch)` makes each projection's module."""

    def __init__(self, weights, make, fault=None):
        super().__init__()
        switch = self.switch = Switch(fault)
        self.model = nn.Module()
        table = nn.Embedding.from_pretrained(
            weights["model.embed_tokens.weight"].clone(), freeze=True
        )
        self.model.embed_tokens = table
        self.model.layers = nn.ModuleList()
        for l in range(Sizes.num_hidden_layers):
            layer = Layer()
            layer.self_attn, layer.mlp = Attention(switch), Mlp()
            for part, names in ((layer.self_attn, "qkvo"), (layer.mlp, ("gate", "up", "down"))):
                path = f"model.layers.{l}." + ("self_attn" if part is layer.self_attn else "mlp")
                for name in names:
                    name = f"{path}.{name}_proj"
                    module = make(name, weights[name + ".weight"].clone(), switch)
                    if isinstance(module, Lora):
                        module.name = name
                    setattr(part, name.split(".")[-1], module)
            for norm in ("input_layernorm", "post_attention_layernorm"):
                setattr(
                    layer, norm, Norm(weights[f"model.layers.{l}.{norm}.weight"].clone(), switch)
                )
            self.model.layers.append(layer)
        self.model.norm = Norm(weights["model.norm.weight"].clone(), switch)
        self.lm_head = Frozen(weights["lm_head.weight"].clone())

    def forward(self, input_ids, attention_mask=None, position_ids=None):
        x = self.model.embed_tokens(input_ids)
        if position_ids is None:
            position_ids = torch.arange(input_ids.shape[1])[None].expand_as(input_ids)
        for l, layer in enumerate(self.model.layers):
            if l == 1 and self.switch.fault == "graph-cut":
                x = x.detach()
            x = layer(x, attention_mask, position_ids)
        return self.lm_head(self.model.norm(x))


def losses(logits, labels):
    """Loss of every counted position, summed, and their number."""
    shifted = labels[:, 1:].reshape(-1)
    total = F.cross_entropy(
        logits[:, :-1].reshape(-1, logits.shape[-1]).float(),
        shifted,
        ignore_index=-100,
        reduction="sum",
    )
    return total, int((shifted != -100).sum())
