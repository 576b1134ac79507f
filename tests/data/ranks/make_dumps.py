"""Makes the dumps of this folder with torch.distributed (gloo, processes on this machine):

    python tests/data/ranks/make_dumps.py [NAME ...]

Needs torch, transformers, peft and safetensors. clean/ holds steps that are right, faults/ one planted fault of distribution
each. Base weights are those of tests/data/dumps/models.
"""

import contextlib
import os
import shutil
import sys
import tempfile

import peft
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import transformers
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel as DDP

HERE = os.path.dirname(os.path.abspath(__file__))
MODELS = os.path.normpath(os.path.join(HERE, "../dumps/models"))
sys.path.append(os.path.join(HERE, "../../../python"))
from peft_limits import dump_step, trainable_snapshot  # noqa: E402

TARGETS = ["q_proj", "down_proj"]
RANK, ALPHA = 2, 6.0
DTYPES = {"f32": torch.float32, "bf16": torch.bfloat16}


def base_model(dtype):
    # Each process reads the same weights, as a launcher's processes do.
    return transformers.AutoModelForCausalLM.from_pretrained(
        os.path.join(MODELS, dtype), dtype=DTYPES[dtype]
    )


def model(dtype, seed=11, **settings):
    lora = peft.LoraConfig(task_type="CAUSAL_LM", r=RANK, lora_alpha=ALPHA, target_modules=TARGETS)
    out = peft.get_peft_model(base_model(dtype), lora, **settings)
    fill(out, seed)
    return out


def fill(m, seed):
    g = torch.Generator().manual_seed(seed)
    for p in m.parameters():
        if p.requires_grad:
            p.data.copy_(0.3 * torch.randn(p.shape, generator=g))


def rows(rank, lengths, seed=3):
    """A micro-batch of ragged rows, padded on the right."""
    g = torch.Generator().manual_seed(100 * seed + rank)
    length = max(lengths)
    ids = torch.randint(1, 31, (len(lengths), length), generator=g)
    mask = (torch.arange(length)[None] < torch.tensor(lengths)[:, None]).long()
    return {
        "input_ids": ids * mask,
        "attention_mask": mask,
        "labels": torch.where(mask == 1, ids, -100),
    }


# Rows of each process's two micro-batches.
RAGGED = [[[9, 6], [8]], [[7, 4], [5]], [[6, 6], [9]], [[5, 9], [4]]]


def adamw(m):
    return torch.optim.AdamW(
        [p for p in m.parameters() if p.requires_grad], lr=1e-2, weight_decay=0.1
    )


def finish(step, optimizer, fault):
    """The update; faults are recorded without it, to be small."""
    if fault is None:
        optimizer.step()
    else:
        step.reduced()


def ddp(rank, size, folder, dtype, fault=None, mean="rank_mean", clip=None):
    m = model(dtype)
    wrapped = DDP(m)
    if fault == "replicas-differ" and rank == 1:
        fill(m, 12)
    optimizer = adamw(m)
    previous = None
    if fault == "stale-rank":
        previous = trainable_snapshot(m)
        before = [p.detach().clone() for p in m.parameters()]
        wrapped(**rows(rank, [6], seed=9)).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if rank == 1:
            for p, old in zip(m.parameters(), before):
                p.data.copy_(old)
    batches = [
        rows(0 if fault == "same-rows" else rank, lengths)
        for lengths in RAGGED[0 if fault == "same-rows" else rank]
    ]
    own = sum((b["labels"][:, 1:] != -100).sum() for b in batches)
    counted = sum(
        (b["labels"][:, 1:] != -100).sum()
        for r in range(size)
        for b in [rows(r, part) for part in RAGGED[r]]
    )
    with dump_step(
        wrapped,
        folder,
        model_path=weights(folder, dtype),
        reduction="micro_mean" if mean == "rank_mean" else "mean",
        logits=fault is None,
        hidden=False,
        previous=previous,
        parallel={"loss": mean} if fault else None,
    ) as step:
        for i, b in enumerate(batches):
            last = i + 1 == len(batches)
            alone = not last or fault == "data-parallel-not-reduced"
            with wrapped.no_sync() if alone else contextlib.nullcontext():
                if fault == "rank-mean":
                    loss = wrapped(**b, num_items_in_batch=own).loss
                elif mean == "global_mean":
                    loss = wrapped(**b, num_items_in_batch=counted).loss * size
                else:
                    loss = wrapped(**b).loss / len(batches)
                if fault == "averaged-twice":
                    loss = loss / size
                loss.backward()
        finish(step, optimizer, fault)


def fsdp(rank, size, folder, dtype, fault=None, mesh=None, share=True, old=False):
    """fully_shard, with replicas of the shards where the mesh has two axes; or FullyShardedDataParallel."""
    # fully_shard wants one format of the trained parameters and their neighbours.
    m = model(dtype, autocast_adapter_dtype=dtype == "f32")
    axes = (
        dist.init_device_mesh("cpu", mesh, mesh_dim_names=("replicate", "shard")) if mesh else None
    )
    if fault == "data-parallel-not-reduced":
        axes = axes["shard"]  # the axis of replicas is forgotten
    if old:
        from torch.distributed.fsdp import FullyShardedDataParallel

        m = wrapped = FullyShardedDataParallel(
            m, use_orig_params=True, device_id=torch.device("cpu")
        )
    else:
        for layer in m.base_model.model.model.layers:
            fully_shard(layer, mesh=axes)
        wrapped = fully_shard(m, mesh=axes)
    if fault == "summed-not-averaged":
        for module in m.modules():
            if hasattr(module, "set_gradient_divide_factor"):
                module.set_force_sum_reduction_for_comms(True)  # gloo cannot scale while it sums
                module.set_gradient_divide_factor(1.0)
    optimizer = adamw(m)
    with dump_step(
        wrapped,
        folder,
        model_path=weights(folder, dtype) if share else None,
        reduction="micro_mean",
        logits=fault is None,
        hidden=False,
    ) as step:
        for lengths in RAGGED[rank]:
            (wrapped(**rows(rank, lengths)).loss / 2).backward()
        finish(step, optimizer, fault)


class Copied(torch.autograd.Function):
    """The same on every rank; the gradient is the sum of the ranks'."""

    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, g):
        g = g.contiguous().clone()
        dist.all_reduce(g)
        return g


class Summed(torch.autograd.Function):
    """The sum of the ranks' parts; the gradient is the same on every rank."""

    @staticmethod
    def forward(ctx, x):
        x = x.contiguous().clone()
        dist.all_reduce(x)
        return x

    @staticmethod
    def backward(ctx, g):
        return g


class Divided(torch.nn.Module):
    """A linear layer with LoRA whose outputs (column-parallel) or inputs (row-parallel) the ranks divide."""

    def __init__(self, linear, column, rank, size, generator, adapted, copied="both"):
        super().__init__()
        self.copied = copied
        weight = linear.weight.data
        a = 0.3 * torch.randn(RANK, weight.shape[1], generator=generator)
        b = 0.3 * torch.randn(weight.shape[0], RANK, generator=generator)
        part = lambda t, axis: t.chunk(size, axis)[rank].contiguous()  # noqa: E731
        self.column = column
        self.weight = torch.nn.Parameter(part(weight, 0 if column else 1), requires_grad=False)
        self.lora_A = torch.nn.Parameter(a if column else part(a, 1)) if adapted else None
        self.lora_B = torch.nn.Parameter(part(b, 0) if column else b) if adapted else None

    def forward(self, x):
        own = x
        if self.column:
            x, own = (
                Copied.apply(x) if self.copied in ("both", of) else x for of in ("base", "adapter")
            )
        y = x @ self.weight.T
        if self.lora_A is not None:
            y = (y + own.to(self.lora_A.dtype) @ self.lora_A.T @ self.lora_B.T * (ALPHA / RANK)).to(
                x.dtype
            )
        return y if self.column else Summed.apply(y)


COLUMN, ROW = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"), ("o_proj", "down_proj")
ADAPTED = ("q_proj", "up_proj", "o_proj", "down_proj")


def copies(fault, in_mlp):
    """Which branches of a column-parallel layer sum the gradient of their input over the ranks."""
    if not fault or not fault.startswith("column-input-not-reduced"):
        return "both"
    left = fault.removeprefix("column-input-not-reduced")
    return {
        "": "none",
        "-alone": "none",
        "-adapter": "base",
        "-mlp": "none" if in_mlp else "both",
        "-attention": "both" if in_mlp else "none",
    }[left]


def tensor(rank, size, folder, dtype, fault=None):
    """Tensor-parallel attention and feed-forward, written by hand."""
    m = base_model(dtype).requires_grad_(False)
    g = torch.Generator().manual_seed(5)
    for layer in m.model.layers:
        for parent in (layer.self_attn, layer.mlp):
            for name in COLUMN + ROW:
                if hasattr(parent, name):
                    copied = copies(fault, parent is layer.mlp)
                    setattr(
                        parent,
                        name,
                        Divided(
                            getattr(parent, name),
                            name in COLUMN,
                            rank,
                            size,
                            g,
                            name in ADAPTED,
                            copied,
                        ),
                    )
    optimizer = adamw(m)
    config = {
        "peft_type": "LORA",
        "r": RANK,
        "lora_alpha": ALPHA,
        "target_modules": list(ADAPTED),
        "bias": "none",
    }
    parallel = {
        "shards": {
            rf"({'|'.join(COLUMN)})\.(weight|lora_B)": 0,
            rf"({'|'.join(ROW)})\.(weight|lora_A)": 1,
        }
    }
    replicated = [
        p
        for n, p in m.named_parameters()
        if n.endswith(tuple(f"{c}.lora_A" for c in COLUMN) + tuple(f"{r}.lora_B" for r in ROW))
    ]
    with dump_step(
        m,
        folder,
        model_path=weights(folder, dtype),
        adapter_config=config,
        parallel=parallel,
        logits=fault is None,
        hidden=False,
    ) as step:
        m(**rows(0, [9, 6, 8])).loss.backward()
        alone = ("replicated-factor-not-summed", "column-input-not-reduced-alone")
        for p in replicated if fault not in alone else []:
            dist.all_reduce(p.grad)
            if fault == "replicated-factor-averaged":
                p.grad /= size
        finish(step, optimizer, fault)


def dtensor(rank, size, folder, dtype, fault=None):
    """Tensor- and sequence-parallel by PyTorch's own plans: gradients of norms, which see a part of each sequence, stay open sums."""
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.parallel import (
        ColwiseParallel,
        PrepareModuleInput,
        RowwiseParallel,
        SequenceParallel,
        parallelize_module,
    )

    m = base_model(dtype).requires_grad_(False)
    mesh = dist.init_device_mesh("cpu", (size,))
    # Transformers takes positions and mask from the embedded rows, which must be whole.
    first = PrepareModuleInput(input_layouts=(Replicate(),), desired_input_layouts=(Shard(1),))
    plan = {"layers.0": first, "norm": SequenceParallel()}
    for i, layer in enumerate(m.model.layers):
        plan |= {
            f"layers.{i}.{name}": ColwiseParallel()
            for name in (
                "self_attn.q_proj",
                "self_attn.k_proj",
                "self_attn.v_proj",
                "mlp.gate_proj",
                "mlp.up_proj",
            )
        }
        plan |= {
            f"layers.{i}.{name}": RowwiseParallel(output_layouts=Shard(1), use_local_output=False)
            for name in ("self_attn.o_proj", "mlp.down_proj")
        }
        plan |= {
            f"layers.{i}.{name}": SequenceParallel()
            for name in ("input_layernorm", "post_attention_layernorm")
        }
        plan[f"layers.{i}.self_attn"] = PrepareModuleInput(
            input_kwarg_layouts={"hidden_states": Shard(1)},
            desired_input_kwarg_layouts={"hidden_states": Replicate()},
        )
        plan[f"layers.{i}.mlp"] = PrepareModuleInput(
            input_layouts=(Shard(1),), desired_input_layouts=(Replicate(),)
        )
    parallelize_module(m.model, mesh, plan)
    parallelize_module(
        m, mesh, {"lm_head": ColwiseParallel(input_layouts=Shard(1), output_layouts=Replicate())}
    )
    for name, p in m.named_parameters():
        p.requires_grad_("norm" in name or "down_proj" in name)
    optimizer = adamw(m)
    with dump_step(
        m,
        folder,
        model_path=weights(folder, dtype),
        parallel={"data": "same"},
        logits=fault is None,
        hidden=False,
    ) as step:
        m(**{k: v for k, v in rows(0, [8, 8]).items() if k != "attention_mask"}).loss.backward()
        if fault == "open-sum-dropped":
            # Each rank takes its summand for the gradient.
            for p in m.parameters():
                if p.grad is not None and any(q.is_partial() for q in p.grad.placements):
                    p.grad = torch.distributed.tensor.DTensor.from_local(
                        p.grad.to_local(), mesh, [Replicate()]
                    )
        finish(step, optimizer, fault)


def packed(rank, size, folder, dtype, fault=None):
    """Documents packed into the rows of rank 0, told by positions; padded rows on the other."""
    m = model(dtype)
    wrapped = DDP(m)
    batch = rows(rank, [9, 9] if rank == 0 else [9, 6])
    if rank == 0:
        batch.pop("attention_mask")
        batch["position_ids"] = torch.tensor(
            [[0, 1, 2, 3, 0, 1, 2, 3, 4], [0, 1, 0, 1, 2, 3, 4, 5, 6]]
        )
        batch["labels"][:, 0] = -100
    optimizer = adamw(m)
    with dump_step(
        wrapped, folder, model_path=weights(folder, dtype), logits=fault is None, hidden=False
    ) as step:
        wrapped(**batch, use_cache=False).loss.backward()
        finish(step, optimizer, fault)


class Gathered(torch.autograd.Function):
    """Every rank's positions, in order; the gradient of the own ones is the sum of the ranks'."""

    @staticmethod
    def forward(ctx, x):
        parts = [torch.empty_like(x) for _ in range(dist.get_world_size())]
        dist.all_gather(parts, x.contiguous())
        return torch.cat(parts, 2)

    @staticmethod
    def backward(ctx, g):
        g = g.contiguous().clone()
        dist.all_reduce(g)
        return g.chunk(dist.get_world_size(), 2)[dist.get_rank()]


def over_all_positions(module, query, key, value, attention_mask, scaling, dropout=0.0, **kwargs):
    key, value = Gathered.apply(key), Gathered.apply(value)
    key, value = (t.repeat_interleave(query.shape[1] // t.shape[1], 1) for t in (key, value))
    here, all_ = query.shape[2], key.shape[2]
    seen = torch.arange(all_)[None] <= (dist.get_rank() * here + torch.arange(here))[:, None]
    scores = (query @ key.transpose(2, 3) * scaling).masked_fill(~seen, float("-inf"))
    weights = torch.softmax(scores, -1, dtype=torch.float32).to(query.dtype)
    return (weights @ value).transpose(1, 2).contiguous(), weights


def sequence(rank, size, folder, dtype, fault=None):
    """Each rank has a part of every row; keys and values are gathered."""
    m = model(dtype)
    transformers.AttentionInterface.register("over_all_positions", over_all_positions)
    m.config._attn_implementation = m.base_model.model.config._attn_implementation = (
        "over_all_positions"
    )
    optimizer = adamw(m)
    ids = rows(0, [12, 12, 12])["input_ids"]
    labels = ids.clone()
    labels[0, :4] = -100
    targets = torch.nn.functional.pad(labels[:, 1:], (0, 1), value=-100)
    part = lambda t: t.chunk(size, 1)[rank].contiguous()  # noqa: E731
    positions = part(torch.arange(12)[None]).expand(3, -1)
    with dump_step(
        m,
        folder,
        labels=part(labels),
        model_path=weights(folder, dtype),
        hidden=False,
        logits=fault is None,
        parallel={"data": "sequence", "reduce": "sum", "loss": "global_mean"},
    ) as step:
        logits = m(input_ids=part(ids), position_ids=positions, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), part(targets).flatten(), reduction="sum"
        )
        loss = loss / (targets != -100).sum()
        loss.backward()
        step.set_loss(loss)
        for p in m.parameters() if fault is None else []:
            if p.grad is not None:
                dist.all_reduce(p.grad)
        finish(step, optimizer, fault)


def weights(folder, dtype):
    """The base weights as a dump names them."""
    return os.path.relpath(os.path.join(MODELS, dtype), folder)


def write(rank, size, port_file, wanted, out):
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    dist.init_process_group("gloo", init_method=f"file://{port_file}", rank=rank, world_size=size)
    for name in wanted:
        processes, step, options = DUMPS[name]
        if processes == size:
            step(rank, size, os.path.join(out, name), **options)
            dist.barrier()
    dist.destroy_process_group()


DUMPS = {}
for dtype in DTYPES:
    DUMPS |= {
        f"clean/ddp-{dtype}": (2, ddp, {}),
        f"clean/fsdp-{dtype}": (2, fsdp, {}),
        f"clean/tensor-{dtype}": (2, tensor, {}),
        f"clean/sequence-{dtype}": (2, sequence, {}),
        f"faults/data-parallel-not-reduced-{dtype}": (
            2,
            ddp,
            {"fault": "data-parallel-not-reduced"},
        ),
        f"faults/averaged-twice-{dtype}": (2, ddp, {"fault": "averaged-twice"}),
        f"faults/replicas-differ-{dtype}": (2, ddp, {"fault": "replicas-differ"}),
        f"faults/replicated-factor-not-summed-{dtype}": (
            2,
            tensor,
            {"fault": "replicated-factor-not-summed"},
        ),
        f"faults/column-input-not-reduced-{dtype}": (
            2,
            tensor,
            {"fault": "column-input-not-reduced"},
        ),
        f"faults/column-input-not-reduced-adapter-{dtype}": (
            2,
            tensor,
            {"fault": "column-input-not-reduced-adapter"},
        ),
        f"faults/sequence-shard-only-{dtype}": (2, sequence, {"fault": "sequence-shard-only"}),
        f"faults/summed-not-averaged-{dtype}": (2, fsdp, {"fault": "summed-not-averaged"}),
    }
    DUMPS = {
        name: (size, make, {"dtype": dtype} | options)
        for name, (size, make, options) in DUMPS.items()
    }
f32 = {"dtype": "f32"}
DUMPS |= {
    "clean/ddp-global-f32": (2, ddp, f32 | {"mean": "global_mean"}),
    "clean/fsdp-base-f32": (3, fsdp, f32 | {"share": False}),
    "clean/fsdp-flat-f32": (2, fsdp, f32 | {"old": True}),
    "clean/fsdp-replicas-f32": (4, fsdp, f32 | {"mesh": (2, 2)}),
    "faults/data-parallel-not-reduced-replicas-f32": (
        4,
        fsdp,
        f32 | {"mesh": (2, 2), "fault": "data-parallel-not-reduced"},
    ),
    "faults/rank-mean-f32": (2, ddp, f32 | {"fault": "rank-mean", "mean": "global_mean"}),
    "faults/replicated-factor-averaged-f32": (
        2,
        tensor,
        f32 | {"fault": "replicated-factor-averaged"},
    ),
    "faults/column-input-not-reduced-mlp-f32": (
        2,
        tensor,
        f32 | {"fault": "column-input-not-reduced-mlp"},
    ),
    "faults/column-input-not-reduced-attention-f32": (
        2,
        tensor,
        f32 | {"fault": "column-input-not-reduced-attention"},
    ),
    "faults/column-input-not-reduced-alone-f32": (
        2,
        tensor,
        f32 | {"fault": "column-input-not-reduced-alone"},
    ),
    "clean/dtensor-f32": (2, dtensor, f32),
    "clean/packed-f32": (2, packed, f32),
    "faults/same-rows-f32": (2, ddp, f32 | {"fault": "same-rows"}),
    "faults/stale-rank-f32": (2, ddp, f32 | {"fault": "stale-rank"}),
}


def make(wanted, out=HERE):
    """Makes dumps by name; each number of processes starts once."""
    for name in wanted:
        shutil.rmtree(os.path.join(out, name), ignore_errors=True)
    for size in sorted({DUMPS[name][0] for name in wanted}):
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(write, args=(size, os.path.join(folder, "meeting"), wanted, out), nprocs=size)


# Those that lie here; python/test_ranks.py makes and judges all.
LEFT_OUT = [
    f"faults/{fault}-bf16"
    for fault in (
        "averaged-twice",
        "replicas-differ",
        "sequence-shard-only",
        "summed-not-averaged",
        "column-input-not-reduced",
        "column-input-not-reduced-adapter",
    )
] + [
    f"faults/column-input-not-reduced-{where}-f32"
    for where in ("adapter", "mlp", "attention", "alone")
]

if __name__ == "__main__":
    wanted = [name for name in DUMPS if name not in LEFT_OUT]
    make(
        [name for name in wanted if not sys.argv[1:] or any(part in name for part in sys.argv[1:])]
    )
