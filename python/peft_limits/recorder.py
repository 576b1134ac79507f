"""Dumps one training step of a PyTorch model for `peft-limits validate`. Needs torch and safetensors, nothing else.

    from peft_limits import dump_step

    with dump_step(model, "dump"):
        loss = model(input_ids=ids, labels=labels).loss
        loss.backward()
        optimizer.step()

    $ peft-limits validate dump

Inside the block everything is recorded as it happens: what the model is called with, its loss, logits and hidden
states, the gradients as backward leaves them (before clipping), the optimizer's settings, state and result. Several
forward passes are the micro-batches of one accumulated step; passes without gradients (evaluation) and after the update are left out. Works with Transformers and PEFT models on any device, under autocast,
DistributedDataParallel, torch.compile, FSDP on one process, on a base that bitsandbytes quantized (NF4, and int8 on the
CPU: written as the checkpoint holds it, and restored by the reference), and with other models whose names `rename` maps to those
of a Hugging Face LLaMA checkpoint. paper-notes/dump-format.md describes the files.

    dump_step(model, folder, *,
        labels=None          labels (B, T), where the model is not called with them
        reduction="mean"     what the loss should be: "mean" over all counted tokens of the step, "sum", or
                             "micro_mean", the mean of the micro-batches' means
        rename=None          function from a parameter's name to its name in a checkpoint (see paper-notes)
        config=None          the model's config.json as a dict, where model.config does not give it
        model_path=None      checkpoint folder whose weights are those of the model: it is referred to, not written again
        adapter_path=None    adapter folder, likewise
        adapter_config=None  adapter_config.json as a dict, where the model is not a PEFT model
        adapter_tensors=None tensors of the adapter by their names in adapter_model.safetensors, likewise
        previous=None        trainable_snapshot(model) from before the step before: makes stale weights recognisable
        scaler=None          the GradScaler, whose scale the gradients carry
        autocast=None        "bfloat16" or "float16"; found out by itself when the model is called inside autocast
        internals=None       precision of norms, rotary angles, softmax and loss: "float32" in Transformers whatever the weights
        logits=True, hidden=True    whether to keep them
        label_smoothing=0, z_loss=0, token_weights=None, divisor=None
                             the loss, where it is not the plain mean cross-entropy: part of each label that is spread over
                             the vocabulary, factor of the squared log-sum-exp, weights of the labels (B, T), what the sum is
                             divided by. Any other loss needs no word: its gradient is recorded, and all below is judged from there
        check=False          True, or options of check_step as a dict: backward against differences of the step's own forward
        parallel=None        several processes, below; False records this process as if it were alone
    )

Where torch.distributed runs several processes, each enters the block and writes its own part, `folder`/rank-N; the weights that
all share are written once, by rank 0. No process waits for another, and none raises: what keeps one from recording is said on
stderr, in `error` and in `folder`/rank-N.failed. DistributedDataParallel, fully_shard and FullyShardedDataParallel with
use_orig_params are seen by themselves. The rest is declared as a dict:

    data       what a process is given: "rows" of its own (the default), the "same" rows as the others (the default with
               shards), or a part of every row, "sequence"; with a process group beside it where not all processes divide the
               data: ("rows", group)
    shards     which tensors a process holds a part of: {pattern of names: axis}, for instance
               {r"(q|up)_proj.*(weight|lora_B)": 0}; an axis, or (axis, first, whole length) where parts differ in length
    tensor     process group over which shards lie, where that is not all
    reduce     "mean" (default) or "sum": how gradients of the processes' data are put together
    loss       "rank_mean" or "global_mean": whether each process divides by its own tokens or by those of all (default: as the
               gradients of the loss tell)
    reduced    "backward" or "by_hand": when (default: in backward where something wraps the model, else before the update;
               step.reduced() inside the block says when, before clipping)

`check` is left out then: repeating the forward would have to happen in all processes at once.
"""

import contextlib
import inspect
import os
import re
import shutil
import sys

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook
from safetensors.torch import save_file

from .calls import dtype_name, plain, unwrap
from . import masks
from .differences import check_step
from .official import Official
from .quantized import QuantizedBase
from .ranks import Ranks, failed, world
from .writing import full, jsonable, write_json, write_model

VERSION = 1
DROPOUT = re.compile(r"(.*)\.lora_dropout\.[^.]+$")
OTHER_KINDS = (
    "ADALORA",
    "IA3",
    "LOHA",
    "LOKR",
    "OFT",
    "BOFT",
    "VERA",
    "HRA",
    "LN_TUNING",
    "XLORA",
    "FOURIERFT",
    "VBLORA",
    "RANDLORA",
    "PREFIX_TUNING",
    "PROMPT_TUNING",
    "P_TUNING",
    "MULTITASK_PROMPT_TUNING",
    "ADAPTION_PROMPT",
    "CPT",
    "POLY",
    "BONE",
    "MISS",
    "TRAINABLE_TOKENS",
    "SHIRA",
    "C3A",
    "WAVEFT",
    "ROAD",
    "OSF",
    "DELORA",
    "GRALORA",
)
LAST_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")
LAYER = re.compile(r"(?:^|\.)(?:layers|h)\.(\d+)$")


def trainable_snapshot(model):
    """Copies of the trainable parameters, to be given as `previous` to a later dump_step."""
    with whole(model):
        return {plain(n): full(p) for n, p in model.named_parameters() if p.requires_grad}


def whole(model):
    """Makes the parameters of a FullyShardedDataParallel model whole inside the context, where one process has all of them."""
    if world()[1] > 1:
        return contextlib.nullcontext()
    try:
        from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    except ImportError:
        return contextlib.nullcontext()
    if any(isinstance(m, FSDP) for m in model.modules()):
        return FSDP.summon_full_params(model, with_grads=False, writeback=False)
    return contextlib.nullcontext()


def ends(model):
    """The output projection and the last norm, where the model has them under a known name."""
    head = None
    with contextlib.suppress(AttributeError, NotImplementedError, TypeError):
        head = unwrap(model).get_output_embeddings()
    norm = None
    for name, module in model.named_modules():
        parts = plain(name).split(".")
        if head is None and parts[-1] in ("lm_head", "embed_out"):
            head = module
        if parts[-1] in LAST_NORMS and not any(p.isdigit() for p in parts):
            norm = module
    return head, norm


class dump_step:
    """See the module's text."""

    def __init__(
        self,
        model,
        folder,
        *,
        labels=None,
        reduction="mean",
        rename=None,
        config=None,
        model_path=None,
        adapter_path=None,
        adapter_config=None,
        adapter_tensors=None,
        previous=None,
        scaler=None,
        autocast=None,
        internals=None,
        logits=True,
        hidden=True,
        label_smoothing=0.0,
        z_loss=0.0,
        token_weights=None,
        divisor=None,
        check=False,
        parallel=None,
    ):
        if reduction not in ("mean", "sum", "micro_mean"):
            raise ValueError(f"reduction={reduction!r}: must be mean, sum or micro_mean")
        self.model, self.folder, self.reduction = model, str(folder), reduction
        self.several = parallel is not False and world()[1] > 1
        if parallel and not self.several:
            parallel = None
        self.parallel, self.ranks, self.error, self.at_end, self.said_reduced = (
            parallel,
            None,
            None,
            False,
            False,
        )
        self.root = self.folder
        if self.several:
            self.folder = os.path.join(self.root, f"rank-{world()[0]}")
            check = False
        elif os.path.exists(folder):
            raise FileExistsError(f"{folder} exists already")
        self.rename = rename or (lambda name: name)
        self.config, self.model_path = config, model_path
        self.adapter_path, self.adapter_config, self.adapter_tensors = (
            adapter_path,
            adapter_config,
            adapter_tensors,
        )
        self.previous, self.scaler, self.autocast, self.internals = (
            previous,
            scaler,
            autocast,
            internals,
        )
        self.given_labels, self.keep_logits, self.keep_hidden = labels, logits, hidden
        self.micro, self.inside, self.handles = [], False, []
        self.gradients, self.applied, self.before = {}, {}, {}
        self.optimizer, self.state, self.loss = None, {}, None
        self.declared = {
            "label_smoothing": float(label_smoothing),
            "z_loss": float(z_loss),
            "divisor": None if divisor is None else float(divisor),
        }
        self.token_weights = token_weights
        self.check = (
            check_step(model, **(check if isinstance(check, dict) else {}))
            if check or check == {}
            else None
        )

    # What the training loop may say by hand.

    def set_loss(self, loss):
        """The loss of the whole step, where the model does not return it."""
        self.loss = float(torch.as_tensor(loss).detach())

    def set_labels(self, labels):
        """Labels of all rows, where the model is not called with them; before the block ends."""
        self.given_labels = labels

    def add_labels(self, labels):
        """Labels of the forward pass that has just run, where the model was not called with them."""
        if self.micro and tuple(labels.shape) == tuple(self.micro[-1]["input_ids"].shape):
            self.micro[-1]["labels"] = full(labels).long()

    def reduced(self):
        """Says that the gradients are reduced over the processes now; before clipping and the update."""
        self.said_reduced = True
        self.guard(self.backward_ended)()

    # Recording.

    def refuse_what_is_not_known(self):
        """Before anything is written or watched."""
        inner = unwrap(self.model)
        inner = inner.get_base_model() if hasattr(inner, "get_base_model") else inner
        kind = type(inner).__name__
        if type(inner).__module__.startswith("transformers.") and re.search(
            r"For(?!CausalLM)[A-Z]", kind
        ):
            raise ValueError(
                f"dump_step: {kind} is no decoder that predicts the next token; check_step judges the backward of any model"
            )

    def guard(self, function):
        """A hook that never raises: what goes wrong is raised where the block ends, not inside the training step.

        With several processes it is not raised there either: the others would wait for this one forever.
        """

        def guarded(*args, **kwargs):
            if self.error is None:
                try:
                    return function(*args, **kwargs)
                except Exception as error:  # noqa: BLE001
                    self.error = error
                    if self.several:
                        self.give_up(error)
            return None

        return guarded

    def give_up(self, error):
        print(
            f"peft-limits: rank {world()[0]} is not recorded: {error}", file=sys.stderr, flush=True
        )
        shutil.rmtree(getattr(self, "writing", ""), ignore_errors=True)
        failed(self.folder, world()[0], error)

    def __enter__(self):
        if not self.several:
            return self.begin()
        self.guard(self.begin)()
        return self

    def begin(self):
        if self.several:
            if os.path.exists(self.folder):
                raise FileExistsError(f"{self.folder} exists already")
            self.ranks = Ranks(self.model, self.parallel)
        with contextlib.suppress(AttributeError, NotImplementedError, TypeError):
            embedding = unwrap(self.model).get_input_embeddings()
            if getattr(embedding, "neftune_noise_alpha", None):
                raise ValueError(
                    "dump_step: NEFTune adds noise to the embeddings, which the reference cannot know: record a step "
                    "with neftune_noise_alpha=None"
                )
        self.active = self.one_adapter()
        self.official = Official(self.model, self.active)
        self.refuse_what_is_not_known()
        self.names = {
            id(p): self.rename(self.official.names.get(id(p), plain(n)))
            for n, p in self.model.named_parameters()
        }
        if self.scaler is not None:
            self.scale = float(self.scaler.get_scale())
        else:
            self.scale = 1.0
        self.quantized = QuantizedBase(self.model, full)
        try:
            with whole(self.model):
                write_model(self)
        except Exception:
            shutil.rmtree(self.writing, ignore_errors=True)
            raise
        hook, w = self.handles.append, self.guard
        self.handles += self.quantized.hooks()
        hook(self.model.register_forward_pre_hook(w(self.called), with_kwargs=True))
        hook(self.model.register_forward_hook(w(self.returned)))
        # Accelerate starts autocast inside the wrapped forward: it shows in the layers only.
        for name, module in self.model.named_modules():
            if LAYER.search(plain(name)):
                hook(module.register_forward_pre_hook(w(self.entered)))
        if self.keep_hidden:
            for name, module in self.model.named_modules():
                match = LAYER.search(plain(name))
                if match:
                    hook(module.register_forward_hook(w(self.layer_returned(int(match[1])))))
        head, norm = ends(self.model)
        if head is not None and self.keep_logits:
            hook(head.register_forward_hook(w(self.left_behind("dlogits"))))
        if norm is not None:
            hook(norm.register_forward_hook(w(self.left_behind("dfinal"))))
        for name, module in self.model.named_modules():
            match = DROPOUT.match(plain(name))
            if match and isinstance(module, torch.nn.Dropout) and module.p > 0:
                hook(module.register_forward_hook(w(self.dropped(self.module_name(match[1])))))
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.is_leaf:
                hook(parameter.register_post_accumulate_grad_hook(w(self.accumulated)))
        hook(register_optimizer_step_pre_hook(w(self.before_update)))
        if self.check:
            self.check.__enter__()
        return self

    def __exit__(self, kind, error, trace):
        for handle in self.handles:
            handle.remove()
        if self.check:
            self.check.stop()
        if kind is not None:
            shutil.rmtree(getattr(self, "writing", ""), ignore_errors=True)
            return
        (self.guard(self.end) if self.several else self.end)()

    def end(self):
        try:
            if self.error is not None:
                raise self.error
            with whole(self.model):
                self.finish()
        finally:
            shutil.rmtree(self.writing, ignore_errors=True)

    def one_adapter(self):
        """Name of the adapter that acts; refuses what no dump can say."""
        model = unwrap(self.model)
        # Transformers models have these names without an adapter too.
        peft = getattr(model, "peft_config", None)
        active = (
            (getattr(model, "active_adapters", None) or getattr(model, "active_adapter", "default"))
            if peft
            else "default"
        )
        active = (
            [active]
            if isinstance(active, str)
            else list(active() if callable(active) else active) or ["default"]
        )
        if len(active) > 1:
            raise ValueError(
                f"dump_step: {len(active)} adapters act at once ({', '.join(active)}): record a step with one "
                "(set_adapter)"
            )
        merged = next(
            (n for n, m in model.named_modules() if getattr(m, "merged_adapters", None)), None
        )
        if merged:
            raise ValueError(
                f"dump_step: the adapter of {plain(merged)} is merged into its weight, where it does not train: unmerge "
                "it (unmerge_adapter)"
            )
        config = (getattr(model, "peft_config", None) or {}).get(active[0])
        kind = getattr(config, "peft_type", None)
        # Forks of PEFT have kinds of their own, which `official` knows.
        if kind is not None and str(getattr(kind, "value", kind)) in OTHER_KINDS:
            raise ValueError(
                f"dump_step: adapters of PEFT's kind {getattr(kind, 'value', kind)} are not known; LORA (with use_dora, "
                "use_rslora and so on) is; check_step judges the backward of any model"
            )
        for name, what in (
            ("trainable_token_indices", "single rows of the embedding"),
            ("layer_replication", "layers that share weights"),
        ):
            if getattr(config, name, None):
                raise ValueError(f"dump_step: {name} ({what}) is not known")
        return active[0]

    def called(self, module, args, kwargs):
        names = ("input_ids", "position_ids", "labels")
        if args:
            inner = unwrap(module)
            parameters = list(inspect.signature(inner.forward).parameters)
            if parameters[:1] == ["args"] and hasattr(inner, "get_base_model"):
                parameters = list(inspect.signature(inner.get_base_model().forward).parameters)
            kwargs = dict(zip(["input_ids", *parameters[1:]], args)) | kwargs
        given = {n: kwargs[n] for n in names if isinstance(kwargs.get(n), torch.Tensor)}
        if "input_ids" not in given:
            raise ValueError("dump_step: the model was not called with input_ids")
        if given["input_ids"].dim() != 2:
            raise ValueError("dump_step: input_ids must be (batch, length)")
        # Passes for evaluation, and those after the update, belong to no micro-batch.
        trains = torch.is_grad_enabled()
        if self.optimizer is not None or (not trains and any(m["trains"] for m in self.micro)):
            return
        if trains:
            self.micro = [m for m in self.micro if m["trains"]]
        self.device = given["input_ids"].device.type
        self.at_end = False
        self.look_for_autocast()
        record = {n: full(t).long() for n, t in given.items()} | {"hidden": {}, "trains": trains}
        if kwargs.get("attention_mask") is not None:
            rows, length = record["input_ids"].shape
            record |= masks.of_batch(
                kwargs["attention_mask"], rows, length, getattr(unwrap(self.model), "config", None)
            )
        self.micro.append(record)
        self.inside = True

    def look_for_autocast(self):
        if self.autocast is None and torch.is_autocast_enabled(self.device):
            self.autocast = dtype_name(torch.get_autocast_dtype(self.device))

    def entered(self, module, args):
        if self.inside:
            self.look_for_autocast()
            if self.ranks:
                self.ranks.running()

    def returned(self, module, args, output):
        if not self.inside:
            return
        self.inside = False
        record = self.micro[-1]
        get = output.get if isinstance(output, dict) else lambda n: getattr(output, n, None)
        logits = output if isinstance(output, torch.Tensor) else get("logits")
        loss = None if isinstance(output, torch.Tensor) else get("loss")
        if self.keep_logits and isinstance(logits, torch.Tensor):
            record["logits"] = full(logits)
        if isinstance(loss, torch.Tensor):
            record["loss"] = float(loss.detach())
            if loss.requires_grad and "labels" in record:
                loss.register_hook(
                    self.guard(lambda gradient: self.differentiated(record, gradient))
                )
                if (
                    isinstance(logits, torch.Tensor)
                    and logits.requires_grad
                    and isinstance(output, dict)
                ):
                    # A loss outside may use the logits as well: a view tells.
                    view = logits.view_as(logits)
                    view.register_hook(lambda gradient: record.update(outer_loss=True))
                    output["logits"] = view

    def differentiated(self, record, gradient):
        # DistributedDataParallel hands on None for outputs that the loss does not use.
        if gradient is None:
            return
        self.backward_runs()
        record.update(own_loss=True, factor=record.get("factor", 0.0) + float(gradient))

    def module_name(self, name):
        return (
            self.rename(name + ".weight").removesuffix(".weight").removeprefix("base_model.model.")
        )

    def dropped(self, name):
        """Keeps the mask of an adapter's dropout: what is left is multiplied by 1 / (1 - p)."""

        def hook(module, args, output):
            rows, length = self.micro[-1]["input_ids"].shape if self.inside else (0, 0)
            if (
                self.inside
                and module.training
                and output.numel() == rows * length * output.shape[-1]
            ):
                # Some families fold rows and positions into one axis. Where x is zero its mask shows neither here nor in
                # the forward.
                left = ((output != 0) | (args[0] == 0)).reshape(rows, length, -1)
                self.micro[-1].setdefault("masks", {})[name] = full(left).float() / (1.0 - module.p)

        return hook

    def left_behind(self, name):
        """Keeps the gradient that arrives at a module's output: of the logits, of the last norm's result."""

        def hook(module, args, output):
            if not self.inside or not isinstance(output, torch.Tensor) or not output.requires_grad:
                return
            record = self.micro[-1]
            # Called in pieces, or for some positions only, it tells nothing of the whole.
            whole = (
                tuple(output.shape[:2]) == tuple(record["input_ids"].shape) and output.dim() == 3
            )
            record.setdefault("calls", {})[name] = record.get("calls", {}).get(name, 0) + (
                1 if whole else 2
            )

            def arrived(gradient):
                if gradient is None:
                    return
                self.backward_runs()
                gradient = full(gradient)
                record[name] = gradient + record[name] if name in record else gradient

            output.register_hook(self.guard(arrived))

        return hook

    def layer_returned(self, index):
        def hook(module, args, output):
            # Activation checkpointing runs layers again outside the model's forward.
            if self.inside:
                value = output[0] if isinstance(output, (tuple, list)) else output
                self.micro[-1]["hidden"][index] = full(value)

        return hook

    def backward_runs(self):
        """Has the gradients recorded when backward has ended, after what reduces them then."""
        if self.several and not self.at_end:
            self.at_end = True
            engine = torch.autograd.Variable._execution_engine
            # What is queued now runs before the reducers' own end; what that queues runs after it.
            engine.queue_callback(lambda: engine.queue_callback(self.guard(self.backward_ended)))

    def backward_ended(self):
        self.at_end = False
        for parameter in self.model.parameters():
            if parameter.requires_grad and parameter.grad is not None:
                self.gradients[id(parameter)] = self.gradient("grad", parameter)

    def gradient(self, group, parameter):
        """A gradient as this process holds it: where the sum over processes is still open, its summand."""
        if self.ranks:
            self.ranks.note_gradient(group, parameter)
        return full(parameter.grad, summand=True)

    def accumulated(self, parameter):
        if self.several:
            # Not reduced yet.
            self.backward_runs()
            return
        # A custom function may return no gradient; nothing may be raised inside backward.
        if parameter.grad is not None:
            self.gradients[id(parameter)] = self.gradient("grad", parameter)

    def before_update(self, optimizer, args, kwargs):
        if self.optimizer is not None:
            return
        groups = []
        for group in optimizer.param_groups:
            members = [p for p in group["params"] if id(p) in self.names]
            group = {
                k: v.item() if isinstance(v, torch.Tensor) and v.numel() == 1 else v
                for k, v in group.items()
            }
            settings = {
                k: jsonable(v)
                for k, v in group.items()
                if k != "params" and isinstance(v, (bool, int, float, tuple, list, type(None)))
            }
            # One group for everything needs no names.
            names = [self.names[id(p)] for p in members] if len(optimizer.param_groups) > 1 else []
            groups.append({"parameters": names, **settings})
            for p in members:
                if p.grad is not None:
                    self.applied[id(p)] = self.gradient("applied", p)
                for key in ("exp_avg", "exp_avg_sq", "momentum_buffer"):
                    moment = optimizer.state.get(p, {}).get(key)
                    if isinstance(moment, torch.Tensor):
                        self.state[f"{key}.{self.names[id(p)]}"] = full(moment)
        steps = [int(s["step"]) for s in optimizer.state.values() if "step" in s]
        if self.ranks and self.ranks.by_hand() and not self.said_reduced:
            self.gradients = dict(self.applied)
        self.optimizer = {
            "kind": type(optimizer).__name__.lower(),
            "steps_before": max(steps, default=0),
            "groups": groups,
        }

    # Writing.

    def place(self, given, own):
        """A folder as the manifest names it: what the caller gives is relative to the dump."""
        if given is None:
            return own
        return os.path.join("..", given) if self.ranks and not os.path.isabs(given) else given

    def joined(self, name, fill=0):
        """One tensor of all micro-batches, padded on the right to the longest."""
        parts = [m[name] if name in m else None for m in self.micro]
        if all(p is None for p in parts):
            return None
        if any(p is None for p in parts):
            raise ValueError(f"dump_step: only some micro-batches have {name}")
        length = max(p.shape[1] for p in parts)
        out = []
        for p in parts:
            extra = torch.full((p.shape[0], length - p.shape[1], *p.shape[2:]), fill, dtype=p.dtype)
            out.append(torch.cat([p, extra], 1))
        return torch.cat(out).contiguous()

    def uses_dora(self):
        configs = getattr(unwrap(self.model), "peft_config", None) or {}
        return any(getattr(c, "use_dora", False) for c in configs.values())

    def finish(self):
        if not self.micro:
            raise ValueError("dump_step: the model was not called inside the block")
        if self.given_labels is not None:
            labels = full(self.given_labels).long()
            if labels.shape[0] != sum(m["input_ids"].shape[0] for m in self.micro):
                raise ValueError(
                    "dump_step: labels have another number of rows than the model's inputs"
                )
            for m, part in zip(
                self.micro, labels.split([m["input_ids"].shape[0] for m in self.micro])
            ):
                m["labels"] = part[:, : m["input_ids"].shape[1]]
        given = next(
            (
                n
                for n in ("dlogits", "dfinal")
                if all(n in m and m["calls"].get(n) == 1 for m in self.micro)
            ),
            None,
        )
        if any("labels" not in m for m in self.micro) and given is None:
            raise ValueError(
                "dump_step: give labels=, the model was not called with them (a trainer with label smoothing "
                "takes them out; set_labels() inside the block does as well)"
            )
        ragged = len({m["input_ids"].shape[1] for m in self.micro}) > 1

        # Packed documents are told by positions that start again and by no mask (a mask of ones would join them), or by a mask of
        # four axes.
        def starts_again(m):
            return (
                "attention_mask" not in m
                and "position_ids" in m
                and bool((m["position_ids"].diff(dim=1) != 1).any())
            )

        if any("documents" in m for m in self.micro):
            for m in self.micro:
                new = (
                    m["position_ids"].diff(dim=1) != 1
                    if starts_again(m)
                    else torch.zeros_like(m["input_ids"][:, 1:])
                )
                own = torch.nn.functional.pad(new.long().cumsum(1), (1, 0)).expand(
                    m["input_ids"].shape
                )
                m["documents"] = m.get("documents", own)
        packed = all("attention_mask" not in m for m in self.micro) and any(
            map(starts_again, self.micro)
        )
        if packed and ragged:
            for m in self.micro:
                m["row_lengths"] = torch.full((m["input_ids"].shape[0], 1), m["input_ids"].shape[1])
        elif ragged or any("attention_mask" in m for m in self.micro):
            for m in self.micro:
                m.setdefault("attention_mask", torch.ones_like(m["input_ids"]))
        if any("position_ids" in m for m in self.micro):
            for m in self.micro:
                rows, length = m["input_ids"].shape
                m["position_ids"] = m.get("position_ids", torch.arange(length)[None]).expand(
                    rows, length
                )
        tensors = {"input_ids": self.joined("input_ids")}
        if all("labels" in m for m in self.micro):
            tensors["labels"] = self.joined("labels", -100)
        if self.token_weights is not None:
            tensors["token_weights"] = full(self.token_weights).float()
        for name in ("attention_mask", "documents", "position_ids", "row_lengths", "logits", given):
            value = self.joined(name) if name else None
            if value is not None:
                tensors[name] = value
        for index in sorted(self.micro[0]["hidden"]):
            for m in self.micro:
                m[f"hidden.{index}"] = m["hidden"][index]
            tensors[f"hidden.{index}"] = self.joined(f"hidden.{index}")
        names = set().union(*(m.get("masks", {}) for m in self.micro))
        # DoRA drops the input of its frozen weight as well, which the reference does not imitate.
        for name in sorted(names if not self.uses_dora() else ()):
            for m in self.micro:
                if name in m.get("masks", {}):
                    m["dropout." + name] = m["masks"][name]
            tensors["dropout." + name] = self.joined("dropout." + name, 1.0)
        losses = [m["loss"] for m in self.micro if "loss" in m]
        if self.loss is None and len(losses) == 1 == len(self.micro) and not self.ranks:
            self.loss = losses[0]
        if (
            self.loss is None
            and self.ranks
            and all("factor" in m for m in self.micro)
            and len(losses) == len(self.micro)
        ):
            # What was differentiated, whoever divides and multiplies it.
            self.loss = sum(m["factor"] * m["loss"] for m in self.micro) / self.scale
        if self.loss is not None:
            tensors["loss"] = torch.tensor([self.loss], dtype=torch.float64)
        trained = []
        for parameter in self.model.parameters():
            if not parameter.requires_grad or id(parameter) not in self.names:
                continue
            name, key = self.names[id(parameter)], id(parameter)
            trained.append(name)
            gradient = self.gradients.get(key, self.applied.get(key))
            if gradient is None and parameter.grad is not None:
                gradient = self.gradient("grad", parameter)
            if self.ranks:
                self.ranks.name_gradients(
                    name,
                    key,
                    "grad" if key in self.gradients or key not in self.applied else "applied",
                )
            if gradient is not None:
                tensors["grad." + name] = gradient
            # After clipping or unscaling the optimizer sees another gradient than backward left.
            if (
                key in self.applied
                and gradient is not None
                and not torch.equal(self.applied[key], gradient)
            ):
                tensors["applied." + name] = self.applied[key]
            if self.optimizer is not None and key not in self.official.shifts:
                tensors["after." + name] = full(parameter)
            elif self.optimizer is not None and not any(
                g.get("weight_decay") for g in self.optimizer["groups"]
            ):
                # Decay of a slice's change is not decay of the slice; without it the update is the same.
                tensors["after." + name] = full(parameter).float() + full(self.official.shifts[key])
        tensors |= self.state
        tensors |= {"previous." + self.rename(n): t for n, t in (self.previous or {}).items()}
        own = all(m.get("own_loss") for m in self.micro)
        manifest = {
            "format": "peft-limits-dump",
            "version": VERSION,
            "made_by": f"peft_limits, torch {torch.__version__.split('+')[0]}",
            "model": self.place(self.model_path, "model"),
            "adapter": self.place(self.adapter_path, "adapter") if self.has_adapter else None,
            "trained": trained,
            "compute": {
                "weights": self.weights,
                "autocast": self.autocast,
                "internals": self.internals,
                "quantized": self.quantized.formats(),
            },
            "loss": {
                "reduction": self.reduction,
                "micro_batch_rows": [m["input_ids"].shape[0] for m in self.micro],
                "scale": self.scale,
                **self.declared,
                "kind": "cross_entropy"
                if own and not any(m.get("outer_loss") for m in self.micro)
                else None,
            },
            "optimizer": self.optimizer,
        }
        if self.ranks:
            manifest["parallel"] = self.ranks.manifest() | {"frozen": self.frozen}
        if self.check:
            manifest["check"] = self.check.compare()
        save_file(
            {n: t.contiguous() for n, t in tensors.items()},
            os.path.join(self.writing, "step.safetensors"),
        )
        # Parts of all tensors, one number a line, would be long.
        write_json(os.path.join(self.writing, "manifest.json"), manifest, None if self.ranks else 1)
        os.replace(self.writing, self.folder)
