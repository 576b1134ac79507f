"""Makes the dumps of this folder:  python tests/data/dumps/make_dumps.py

Needs torch, transformers, peft and safetensors. clean/ holds steps that are right, in several methods, precisions and
shapes, most from Transformers and PEFT; faults/ holds one planted fault each (trainer.py), named by its folder. All are
made from random weights of models/.
"""

import copy
import json
import os
import shutil
import sys

import peft
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file

HERE = os.path.dirname(os.path.abspath(__file__))
sys.path.insert(0, os.path.join(HERE, "../../../python"))
sys.path.insert(0, HERE)
from peft_limits import dump_step, trainable_snapshot  # noqa: E402
from trainer import Frozen, Lora, Sizes, Slice, Trainer, hf_config, losses  # noqa: E402

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
RANK, ALPHA = 2, 6.0
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16, "f16": torch.float16, "f64": torch.float64}


# Dumps of the same adapter refer to the first one's.
adapters = {}


def shared_adapter(key, folder, name):
    if key in adapters:
        return {"adapter_path": os.path.relpath(adapters[key], place(folder, name))}
    adapters[key] = place(folder, name, "adapter")
    return {}


def place(*parts):
    return os.path.join(HERE, *parts)


def base_model(dtype):
    config = transformers.LlamaConfig(
        **{k: v for k, v in hf_config().items() if k not in ("model_type", "rope_theta")},
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    torch.manual_seed(7)
    model = transformers.LlamaForCausalLM(config)
    for p in model.parameters():
        if p.dim() == 2:
            p.data.normal_(0, 0.3)
        else:
            p.data.uniform_(0.5, 1.5)
    return model.to(DTYPES[dtype])


def save_base(dtype):
    folder = place("models", dtype)
    os.makedirs(folder)
    tensors = {n: p.detach().contiguous() for n, p in base_model(dtype).named_parameters()}
    save_file(tensors, os.path.join(folder, "model.safetensors"), metadata={"format": "pt"})
    with open(os.path.join(folder, "config.json"), "w") as file:
        json.dump(hf_config(), file, indent=1)
        file.write("\n")


def batch(shape="plain", seed=3):
    """Ids, labels and, with padding, mask and positions."""
    rows, length = {"single": (1, 17), "long": (2, 40)}.get(shape, (3, 10))
    g = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, Sizes.vocab_size, (rows, length), generator=g)
    labels = ids.clone()
    labels[0, :4] = -100
    given = {"input_ids": ids}
    if shape in ("right", "left", "left-default-positions"):
        mask = torch.ones_like(ids)
        for row, pad in ((1, 3), (2, 5)):
            part = slice(length - pad, length) if shape == "right" else slice(0, pad)
            mask[row, part] = 0
            ids[row, part] = 0
            labels[row, part] = -100
            if shape != "right":
                labels[row, pad] = -100  # padding does not predict
        given["attention_mask"] = mask
        if shape == "left":
            given["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return given, labels


def optimizer_of(model, kind="adamw", **settings):
    trained = [p for p in model.parameters() if p.requires_grad]
    if kind == "sgd":
        return torch.optim.SGD(trained, lr=0.05, momentum=0.9)
    return torch.optim.AdamW(trained, **({"lr": 1e-2, "weight_decay": 0.1} | settings))


def peft_model(dtype, **settings):
    keep = settings.pop("keep_dtype", False)
    settings = {"r": RANK, "lora_alpha": ALPHA, "target_modules": ALL} | settings
    key = (dtype, keep, str(sorted(settings.items())))
    model = peft.get_peft_model(
        base_model(dtype),
        peft.LoraConfig(task_type="CAUSAL_LM", lora_dropout=0.0, **settings),
        autocast_adapter_dtype=not keep,
    )
    g = torch.Generator().manual_seed(11)
    for name, p in model.named_parameters():
        if p.requires_grad and "magnitude" not in name:
            p.data.copy_(0.3 * torch.randn(p.shape, generator=g))
    model.key = key
    return model


def autocast_to(dtype):
    return torch.autocast("cpu", dtype=DTYPES[dtype or "bf16"], enabled=dtype is not None)


def transformers_dump(
    name,
    model,
    dtype,
    shape="plain",
    autocast=None,
    optimizer=None,
    rows=None,
    hidden=False,
    **options,
):
    """A step of a Transformers model, of one micro-batch or several."""
    given, labels = batch(shape)
    opt = optimizer_of(model, optimizer) if optimizer else None
    context = autocast_to(autocast)
    if hasattr(model, "key"):
        options |= shared_adapter(model.key, "clean", name)
    options |= {"model_path": f"../../models/{dtype}", "hidden": hidden}
    with dump_step(model, place("clean", name), **options) as step:
        if rows is None:
            with context:
                loss = model(**given, labels=labels).loss
            loss.backward()
        else:
            counted = (labels[:, 1:] != -100).sum()
            total = 0.0
            for part in torch.arange(len(labels)).split(rows):
                with context:
                    out = model(
                        **{n: t[part] for n, t in given.items()},
                        labels=labels[part],
                        num_items_in_batch=counted,
                    )
                out.loss.backward()
                total += float(out.loss.detach())
            step.set_loss(total)
        if opt:
            opt.step()


def custom(make, dtype, fault=None):
    weights = load_file(place("models", dtype, "model.safetensors"))
    return Trainer(weights, make, fault).to(DTYPES[dtype])


def lora_maker(dora=False, targets=ALL):
    g = torch.Generator().manual_seed(5)

    def make(name, weight, switch):
        return (
            Lora(weight, RANK, ALPHA, g, switch, dora)
            if name.split(".")[-1] in targets
            else Frozen(weight)
        )

    return make


def lora_config(kind="LORA", targets=ALL, **more):
    return {
        "peft_type": kind,
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": targets,
        "bias": "none",
    } | more


class Moslora(torch.nn.Module):
    def __init__(self, weight, g):
        super().__init__()
        out, width = weight.shape
        self.weight = torch.nn.Parameter(weight, requires_grad=False)
        new = lambda *shape: torch.nn.Parameter(0.3 * torch.randn(*shape, generator=g))
        self.lora_A, self.lora_mixer, self.lora_B = (
            new(RANK, width),
            new(RANK, RANK),
            new(out, RANK),
        )

    def forward(self, x):
        z = F.linear(F.linear(x, self.lora_A), self.lora_mixer)
        return F.linear(x, self.weight) + F.linear(z, self.lora_B) * (ALPHA / RANK)


def moslora_maker():
    g = torch.Generator().manual_seed(5)
    return lambda name, weight, switch: Moslora(weight, g)


INDEX = {16: [2, 5, 11], 24: [1, 13, 20]}


def paca_maker(scaling):
    return lambda name, weight, switch: Slice(weight, 1, INDEX[weight.shape[1]], scaling)


def paca_tensors(model, scaling):
    out = {}
    for name, module in model.named_modules():
        if isinstance(module, Slice):
            prefix = f"base_model.model.{name}."
            out |= {
                prefix + "paca_index": module.index.double(),
                prefix + "paca_columns": module.paca_columns * scaling,
                prefix + "paca_scaling": torch.tensor([scaling], dtype=torch.float64),
            }
    return out


GROUPS, CHANNELS = [1, 0], [7, 3, 12, 0, 22] + [c for c in range(24) if c not in (7, 3, 12, 0, 22)]
RANGES = {
    "q_proj": (0, 8),
    "v_proj": (0, 4),
    "o_proj": (0, 8),
    "up_proj": (0, 3),
    "down_proj": (1, 5),
}


def co_permuted(name, weight):
    """Head groups and channels in the order of GROUPS and CHANNELS."""
    part = name.split(".")[-1]
    if part in ("gate_proj", "up_proj"):
        return weight[CHANNELS]
    if part == "down_proj":
        return weight[:, CHANNELS]
    width = 4 if part in ("k_proj", "v_proj") else 8
    order = [g * width + i for g in GROUPS for i in range(width)]
    return weight[:, order] if part == "o_proj" else weight[order]


def s2ft_maker():
    def make(name, weight, switch):
        weight, part = co_permuted(name, weight).contiguous(), name.split(".")[-1]
        if part not in RANGES:
            return Frozen(weight)
        return Slice(
            weight,
            1 if part in ("o_proj", "down_proj") else 0,
            range(*RANGES[part]),
            name="s2ft_slice",
        )

    return make


def s2ft_tensors(model):
    out = {}
    for name, module in model.named_modules():
        if isinstance(module, Slice):
            prefix = f"base_model.model.{name}."
            out[prefix + "s2ft_range"] = torch.tensor(RANGES[name.split(".")[-1]]).double()
            out[prefix + "s2ft_slice"] = module.s2ft_slice
    for l in range(Sizes.num_hidden_layers):
        prefix = f"base_model.model.model.layers.{l}."
        out |= {
            prefix + "s2ft_groups": torch.tensor(GROUPS).double(),
            prefix + "s2ft_channels": torch.tensor(CHANNELS).double(),
        }
    return out


def custom_dump(
    name,
    model,
    dtype,
    shape="plain",
    autocast=None,
    optimizer=None,
    folder="clean",
    loss_of=None,
    backward=None,
    edit=None,
    given=None,
    **options,
):
    """A step of trainer.py. `loss_of(logits, labels)` and `edit(model)`, which changes gradients, plant faults."""
    inputs, labels = given or batch(shape)
    opt = (
        optimizer_of(model, optimizer)
        if isinstance(optimizer, str)
        else optimizer and optimizer(model)
    )
    out = place(folder, name)
    if options.pop("shared", False):
        options |= shared_adapter(("custom", str(options["adapter_config"])), folder, name)
    with dump_step(
        model, out, labels=labels, model_path=f"../../models/{dtype}", config=hf_config(), **options
    ) as step:
        with autocast_to(autocast):
            logits = model(**inputs)
        total, counted = losses(logits, labels)
        loss = loss_of(logits, labels) if loss_of else total / counted
        step.set_loss(loss)
        (backward or (lambda loss: loss.backward()))(loss)
        if edit:
            edit(model)
            step.gradients.clear()
        if opt:
            opt.step()


def clean():
    for dtype in ("f32", "bf16", "f16", "f64"):
        transformers_dump(f"lora-{dtype}", peft_model(dtype), dtype, optimizer="adamw", hidden=True)
        transformers_dump(
            f"dora-{dtype}",
            peft_model(dtype, use_dora=True),
            dtype,
            optimizer="adamw" if dtype == "f32" else None,
        )
        if dtype != "f64":
            transformers_dump(f"full-{dtype}", base_model(dtype), dtype)
    for dtype in ("bf16", "f16"):
        transformers_dump(
            f"lora-pure-{dtype}",
            peft_model(dtype, keep_dtype=True),
            dtype,
            optimizer="adamw" if dtype == "bf16" else "sgd",
        )
        transformers_dump(
            f"lora-autocast-{dtype}",
            peft_model("f32"),
            "f32",
            autocast=dtype,
            optimizer="adamw",
            hidden=True,
        )
        transformers_dump(
            f"dora-autocast-{dtype}", peft_model("f32", use_dora=True), "f32", autocast=dtype
        )
        transformers_dump(f"full-autocast-{dtype}", base_model("f32"), "f32", autocast=dtype)
    transformers_dump(
        "rslora-f32", peft_model("f32", use_rslora=True, target_modules=["q_proj", "v_proj"]), "f32"
    )
    transformers_dump("lora-sgd-f32", peft_model("f32"), "f32", optimizer="sgd")
    for shape in ("right", "left", "left-default-positions", "single", "long"):
        transformers_dump(f"lora-{shape}-f32", peft_model("f32"), "f32", shape)
        transformers_dump(f"lora-{shape}-bf16", peft_model("bf16"), "bf16", shape)
    transformers_dump("lora-accumulated-f32", peft_model("f32"), "f32", "right", rows=2)
    # A step that is not the first, under clipping, with activation checkpointing.
    model = peft_model("f32")
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    opt = optimizer_of(model)
    given, labels = batch()
    for _ in range(2):
        model(**given, labels=labels).loss.backward()
        opt.step()
        opt.zero_grad()
    with dump_step(
        model,
        place("clean", "lora-third-clipped-checkpointed-f32"),
        model_path="../../models/f32",
        hidden=False,
    ):
        model(**given, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        opt.step()
    for dtype, autocast in (("f32", None), ("bf16", None), ("f32", "bf16"), ("f16", None)):
        tail = f"autocast-{autocast}" if autocast else dtype
        model = custom(moslora_maker(), dtype)
        custom_dump(
            f"moslora-{tail}",
            model,
            dtype,
            autocast=autocast,
            adapter_config=lora_config("MOSLORA"),
            hidden=False,
        )
        model = custom(paca_maker(ALPHA / 3), dtype)
        steps = {"optimizer": "adamw" if tail in ("f32", "bf16") else None, "hidden": False}
        custom_dump(
            f"paca-{tail}",
            model,
            dtype,
            autocast=autocast,
            **steps,
            adapter_config={"peft_type": "PACA", "target_modules": ALL},
            adapter_tensors=paca_tensors(model, ALPHA / 3),
        )
        model = custom(s2ft_maker(), dtype)
        custom_dump(
            f"s2ft-{tail}",
            model,
            dtype,
            autocast=autocast,
            **steps,
            adapter_tensors=s2ft_tensors(model),
            adapter_config={"peft_type": "S2FT", "target_modules": sorted(RANGES)},
        )
    custom_dump(
        "lora-summed-f32",
        custom(lora_maker(), "f32"),
        "f32",
        adapter_config=lora_config(),
        reduction="sum",
        loss_of=lambda logits, labels: losses(logits, labels)[0],
        hidden=False,
    )


def trained(model):
    return [(n, p) for n, p in model.named_parameters() if p.requires_grad]


def swap(model, one, other):
    named = dict(trained(model))
    for name in list(named):
        if one in name:
            a, b = named[name], named[name.replace(one, other)]
            a.grad, b.grad = b.grad, a.grad


def stale_columns(paca):
    """The columns of the step before, 7% of the gradient: below the tolerance of every single tensor in bfloat16."""
    model = custom(paca_maker(2.0), "bf16")
    given, labels = batch()
    opt = optimizer_of(model, lr=1e-3, weight_decay=0.0)
    previous, stale = trainable_snapshot(model), copy.deepcopy(model)
    torch.div(*losses(model(**given), labels)).backward()
    opt.step()
    opt.zero_grad()
    torch.div(*losses(stale(**given), labels)).backward()

    def replace(m):
        for (_, p), (_, q) in zip(trained(m), trained(stale)):
            p.grad = q.grad.clone()

    custom_dump(
        "half-precision-stale-columns",
        model,
        "bf16",
        previous=previous,
        edit=replace,
        adapter_tensors=paca_tensors(model, 2.0),
        **paca,
    )


def faults():
    plain = {"adapter_config": lora_config(), "folder": "faults", "hidden": False, "shared": True}

    def fault(name, shape="plain", **more):
        custom_dump(name, custom(lora_maker(), "f32", name), "f32", shape, **(plain | more))

    for name in (
        "outside-graph",
        "layer-dropped",
        "graph-cut",
        "no-scaling",
        "alpha-over-root-r",
        "adapter-twice",
        "adapter-not-applied",
        "scaling-in-backward",
        "adapter-input-gradient",
        "frozen-input-gradient",
        "factor-reshaped",
        "no-attention-scale",
        "attention-scale-backward",
        "rotary-missing",
        "rotary-interleaved",
        "rotary-backward-missing",
        "rotary-backward-wrong",
        "rope-theta",
        "causal-leak",
        "causal-off-by-one",
        "grouped-heads",
        "norm-backward",
        "norm-eps",
    ):
        fault(name)
    fault("padding-attended", "left")
    for name, planted in (
        ("half-precision-rotary-backward", "rotary-backward-missing"),
        ("half-precision-causal-off-by-one", "causal-off-by-one"),
    ):
        custom_dump(name, custom(lora_maker(), "f32", planted), "f32", autocast="bf16", **plain)
    unmasked = lambda logits, labels: losses(logits, batch("right")[0]["input_ids"])
    fault(
        "padding-counted",
        "right",
        loss_of=lambda logits, labels: torch.div(*unmasked(logits, labels)),
    )
    fault(
        "loss-per-token", loss_of=lambda logits, labels: losses(logits, labels)[0] / labels.numel()
    )
    fault("loss-summed", loss_of=lambda logits, labels: losses(logits, labels)[0])
    fault(
        "sequence-mean",
        loss_of=lambda logits, labels: (
            sum(torch.div(*losses(logits[i : i + 1], labels[i : i + 1])) for i in range(3)) / 3
        ),
    )
    unshifted = lambda logits, labels: F.cross_entropy(
        logits.flatten(0, 1), labels.flatten(), ignore_index=-100
    )
    fault("labels-not-shifted", loss_of=unshifted)
    fault(
        "labels-shifted-twice",
        loss_of=lambda logits, labels: torch.div(
            *losses(logits, torch.cat([labels[:, 1:], torch.full((3, 1), -100)], 1))
        ),
    )
    fault("loss-scale-left", backward=lambda loss: (loss * 1024).backward())
    fault("sign-flipped", backward=lambda loss: (-loss).backward())
    fault("overflow", edit=lambda m: trained(m)[3][1].grad.__setitem__((1, 1), float("nan")))
    fault("swapped-tensors", edit=lambda m: swap(m, "gate_proj", "up_proj"))
    fault(
        "one-row-lost",
        edit=lambda m: dict(trained(m))["model.layers.1.mlp.up_proj.lora_B"].grad[7].zero_(),
    )

    # Two micro-batches whose gradients are added without dividing, and averaged per micro-batch.
    for name, weight in (("accumulation-not-divided", 1.0), ("micro-batch-mean", 0.5)):
        given, labels = batch()
        if name == "accumulation-not-divided":
            given, labels = {"input_ids": given["input_ids"][1:]}, labels[1:]
        model = custom(lora_maker(), "f32", name)
        half = [slice(0, 1), slice(1, None)]
        with dump_step(
            model,
            place("faults", name),
            labels=labels,
            model_path="../../models/f32",
            config=hf_config(),
            adapter_config=lora_config(),
            hidden=False,
            **shared_adapter(("custom", str(lora_config())), "faults", name),
        ) as step:
            total = 0.0
            for rows in half:
                loss = weight * torch.div(*losses(model(given["input_ids"][rows]), labels[rows]))
                loss.backward()
                total += float(loss.detach())
            step.set_loss(total)

    # Stale weights: the step before changed the adapters.
    for name in ("stale-weight", "stale-merged-weight"):
        model = custom(lora_maker(), "f32", None)
        given, labels = batch()
        opt = optimizer_of(model, lr=0.05)
        previous = trainable_snapshot(model)
        for module in model.modules():
            if isinstance(module, Lora):
                module.merged = (module.lora_B @ module.lora_A).detach().clone()
        stale = copy.deepcopy(model)
        torch.div(*losses(model(**given), labels)).backward()
        opt.step()
        opt.zero_grad()
        if name == "stale-merged-weight":
            model.switch.fault = name
            custom_dump(name, model, "f32", previous=previous, **(plain | {"shared": False}))
        else:
            torch.div(*losses(stale(**given), labels)).backward()

            def replace(m):
                for (_, p), (_, q) in zip(trained(m), trained(stale)):
                    p.grad = q.grad.clone()

            custom_dump(
                name, model, "f32", previous=previous, edit=replace, **(plain | {"shared": False})
            )

    # Slices.
    paca = {
        "adapter_config": {"peft_type": "PACA", "target_modules": ALL},
        "folder": "faults",
        "hidden": False,
    }
    stale_columns(paca)
    model = custom(paca_maker(2.0), "f32")

    def reverse_columns(m):
        for _, p in trained(m):
            p.grad = p.grad.flip(1).clone()

    custom_dump(
        "paca-column-order",
        model,
        "f32",
        adapter_tensors=paca_tensors(model, 2.0),
        edit=reverse_columns,
        **paca,
    )
    model = custom(paca_maker(2.0), "f32")
    full = custom(lambda name, weight, switch: Frozen(weight, trained=True), "f32")
    given, labels = batch()
    torch.div(*losses(full(**given), labels)).backward()
    whole = {n: p.grad for n, p in trained(full)}

    def rows_for_columns(m):
        for n, p in trained(m):
            g = whole[n.replace("paca_columns", "weight")]
            if g.shape[0] == g.shape[1]:
                p.grad = 2.0 * g[INDEX[16]].T.clone()

    custom_dump(
        "paca-rows-for-columns",
        model,
        "f32",
        adapter_tensors=paca_tensors(model, 2.0),
        edit=rows_for_columns,
        **paca,
    )
    s2ft = paca | {"adapter_config": {"peft_type": "S2FT", "target_modules": sorted(RANGES)}}
    model = custom(s2ft_maker(), "f32")

    def checkpoint_order(m):
        for n, p in trained(m):
            g, part = whole[n.replace("s2ft_slice", "weight")], n.split(".")[-2]
            rows = slice(*RANGES[part])
            p.grad = (g[:, rows] if part in ("o_proj", "down_proj") else g[rows]).clone()

    custom_dump(
        "s2ft-checkpoint-order",
        model,
        "f32",
        adapter_tensors=s2ft_tensors(model),
        edit=checkpoint_order,
        **s2ft,
    )

    custom_dump(
        "dora-norm",
        custom(lora_maker(dora=True), "f32", "dora-norm"),
        "f32",
        **(plain | {"adapter_config": lora_config(use_dora=True), "shared": False}),
    )

    # Full fine-tuning of q and o, square here: the gradient stored transposed.
    model = custom(
        lambda name, weight, switch: Frozen(weight, trained=name.endswith(("q_proj", "o_proj"))),
        "f32",
    )

    def transpose(m):
        for _, p in trained(m):
            p.grad = p.grad.T.clone()

    custom_dump("transposed", model, "f32", folder="faults", hidden=False, edit=transpose)

    class Scale:
        def get_scale(self):
            return 2.0**-16

    model = peft_model("f16", keep_dtype=True)
    given, labels = batch()
    with dump_step(
        model,
        place("faults", "underflow"),
        model_path="../../models/f16",
        scaler=Scale(),
        hidden=False,
    ):
        (model(**given, labels=labels).loss * 2.0**-16).backward()

    # AdamW's default eps is zero in float16. A token that does not occur leaves zeros in the embedding's gradient.
    model = base_model("f16")
    for name, p in model.named_parameters():
        p.requires_grad_(name == "model.embed_tokens.weight")
    opt = optimizer_of(model)
    with dump_step(
        model,
        place("faults", "eps-zero-in-float16"),
        model_path="../../models/f16",
        hidden=False,
        logits=False,
    ):
        model(**given, labels=labels).loss.backward()
        opt.step()

    # Updates.
    update = plain | {"logits": False}
    fault(
        "decay-coupled",
        **(
            update
            | {
                "optimizer": lambda m: Relabelled(
                    torch.optim.Adam([p for _, p in trained(m)], lr=1e-2, weight_decay=0.5)
                )
            }
        ),
    )
    fault(
        "update-dropped",
        **(
            update
            | {
                "optimizer": lambda m: Dropping(
                    [p for _, p in trained(m)], lr=1e-2, weight_decay=0.1
                )
            }
        ),
    )
    fault(
        "bias-correction",
        **(update | {"optimizer": lambda m: Uncorrected([p for _, p in trained(m)], lr=1e-2)}),
    )


def Relabelled(optimizer):
    """Adam that takes itself for AdamW."""
    optimizer.__class__ = type("AdamW", (type(optimizer),), {})
    return optimizer


class Dropping(torch.optim.AdamW):
    """Loses the update of every second parameter."""

    def step(self):
        kept = [p.detach().clone() for p in self.param_groups[0]["params"]]
        super().step()
        for p, old in list(zip(self.param_groups[0]["params"], kept))[::2]:
            p.data.copy_(old)


Dropping.__name__ = "AdamW"


class Uncorrected(torch.optim.Optimizer):
    """AdamW without bias correction."""

    def __init__(self, params, lr):
        super().__init__(
            params, {"lr": lr, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.0}
        )

    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            m, v = 0.1 * p.grad, 0.001 * p.grad**2
            p.data.sub_(self.param_groups[0]["lr"] * m / (v.sqrt() + 1e-8))


Uncorrected.__name__ = "AdamW"


def main():
    for folder in ("models", "clean", "faults"):
        shutil.rmtree(place(folder), ignore_errors=True)
        os.makedirs(place(folder))
    for dtype in DTYPES:
        save_base(dtype)
    torch.set_num_threads(1)
    clean()
    faults()


if __name__ == "__main__":
    main()
