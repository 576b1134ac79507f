"""What a process is among those that train together: its part of the data and of each tensor.

Nothing here communicates: a process that fails, or that records nothing, cannot hold the others up.
"""

import hashlib
import os
import re
import time

import torch

from .calls import plain

KEYS = {"data", "tensor", "shards", "reduce", "loss", "reduced"}
CUTS = ("rows", "same", "sequence")


def world():
    """(rank, number of processes) of this one."""
    dist = torch.distributed
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def place_in(group):
    """(index, size) of this process in a process group, or as given."""
    if isinstance(group, (tuple, list)):
        return int(group[0]), int(group[1])
    return torch.distributed.get_rank(group), torch.distributed.get_world_size(group)


def is_sharded(tensor):
    return hasattr(tensor, "to_local") and hasattr(tensor, "placements")


def open_sum(tensor):
    """(index, number) of this process among those whose parts of a DTensor still have to be added; None without such a sum."""
    axes = (
        [axis for axis, p in enumerate(tensor.placements) if p.is_partial()]
        if is_sharded(tensor)
        else []
    )
    if not axes:
        return None
    if any(tensor.placements[axis].reduce_op != "sum" for axis in axes):
        raise ValueError(
            f"a DTensor of which ranks hold parts of other than a sum ({tensor.placements}) cannot be recorded"
        )
    index, of = 0, 1
    for axis in axes:
        size = tensor.device_mesh.size(axis)
        index, of = index * size + tensor.device_mesh.get_coordinate()[axis], of * size
    return index, of


def local(tensor, summand=False):
    """A tensor as this process holds it, copied to the CPU; its part of an open sum only where that is asked for."""
    tensor = tensor.detach()
    if is_sharded(tensor):
        if open_sum(tensor) and not summand:
            raise ValueError(
                f"a DTensor whose sum over ranks is still open ({tensor.placements}) cannot be recorded"
            )
        tensor = tensor.to_local()
    return tensor.to("cpu", copy=True).contiguous()


def digest(tensor):
    """Tells whether two processes hold the same bits."""
    flat = tensor.detach().to("cpu").contiguous().reshape(-1).view(torch.uint8)
    return hashlib.blake2b(flat.numpy().tobytes(), digest_size=8).hexdigest()


def flat_shards(model):
    """Parts of the parameters of FullyShardedDataParallel with use_orig_params, by id: entries of the flattened tensor."""
    try:
        from torch.distributed.fsdp import FullyShardedDataParallel as FSDP
    except ImportError:
        return {}
    found = {}
    for module in model.modules():
        flat = (
            getattr(getattr(module, "_handle", None), "flat_param", None)
            if isinstance(module, FSDP)
            else None
        )
        if flat is None:
            continue
        if flat._params is None:
            raise ValueError(
                "FullyShardedDataParallel must be built with use_orig_params=True: one flat parameter has no names"
            )
        for p, shape, info in zip(flat._params, flat._shapes, flat._shard_param_infos):
            part = (
                [info.intra_param_start_idx, info.intra_param_end_idx + 1]
                if info.in_shard
                else [0, 0]
            )
            found[id(p)] = {"shape": list(shape), "flat": part}
    return found


class Ranks:
    """This process among the others; see `parallel` in recorder.py."""

    def __init__(self, model, declared):
        unknown = set(declared or {}) - KEYS
        if unknown:
            raise ValueError(f"dump_step: parallel knows {sorted(KEYS)}, not {sorted(unknown)}")
        declared = dict(declared or {})
        self.rank, self.size = world()
        self.declared = [
            (re.compile(pattern), cut) for pattern, cut in (declared.get("shards") or {}).items()
        ]
        self.reduce, self.loss = declared.get("reduce", "mean"), declared.get("loss")
        if self.reduce not in ("mean", "sum") or self.loss not in (
            None,
            "rank_mean",
            "global_mean",
        ):
            raise ValueError(
                "dump_step: parallel's reduce is mean or sum, its loss rank_mean or global_mean"
            )
        self.cut = declared.get("data")
        group = None
        if isinstance(self.cut, (tuple, list)):
            self.cut, group = self.cut
        self.data = place_in(group) if group is not None else None
        self.tensor = place_in(declared["tensor"]) if declared.get("tensor") is not None else None
        self.wrapper, self.reduced = None, declared.get("reduced")
        if self.reduced not in (None, "backward", "by_hand"):
            raise ValueError("dump_step: parallel's reduced is backward or by_hand")
        self.flat, self.shards, self.open = flat_shards(model), {}, {}
        for module in model.modules():
            self.look_at(module)
        if self.cut is None:
            self.cut = "same" if self.declared and self.data is None else "rows"
        if self.cut not in CUTS:
            raise ValueError(
                f"dump_step: parallel's data is one of {CUTS}, perhaps with a group, not {self.cut!r}"
            )
        if self.declared and self.tensor is None:
            self.tensor = (self.rank, self.size)
        if self.data is None:
            self.data = (0, 1) if self.cut == "same" else (self.rank, self.size)

    def look_at(self, module):
        """Finds what shards or reduces."""
        kinds = [k.__name__ for k in type(module).__mro__]
        for name, found in (
            ("FSDPModule", "fully_shard"),
            ("FullyShardedDataParallel",) * 2,
            ("DistributedDataParallel",) * 2,
        ):
            if name in kinds and self.wrapper is None:
                self.wrapper = found

    def running(self):
        """Looks whether DistributedDataParallel runs a model that was given to the recorder without it."""
        active = torch.nn.parallel.DistributedDataParallel._get_active_ddp_module()
        if active is not None and self.wrapper is None:
            self.wrapper = "DistributedDataParallel"

    def by_hand(self):
        """Whether gradients are reduced between backward and the update, by the training loop."""
        return self.reduced == "by_hand" if self.reduced else self.wrapper is None

    def place(self, raw, tensor):
        """Which part of a tensor this process holds; None for all of it."""
        if is_sharded(tensor):
            from torch.distributed.tensor._utils import (
                compute_local_shape_and_global_offset as place,
            )

            if all(p.is_replicate() for p in tensor.placements):
                return None
            size, offset = place(tensor.shape, tensor.device_mesh, tensor.placements)
            # An empty part says where its neighbour would begin, which may be behind the end.
            offset = [min(o, n) for o, n in zip(offset, tensor.shape)]
            part = {"shape": list(tensor.shape), "offset": offset, "size": list(size)}
            return part | ({"summand": list(open_sum(tensor))} if open_sum(tensor) else {})
        if id(tensor) in self.flat:
            return self.flat[id(tensor)]
        name = plain(raw)
        for pattern, dim in self.declared:
            if pattern.search(name):
                index, ranks = self.tensor
                dim, start, total = dim if isinstance(dim, (tuple, list)) else (dim, None, None)
                shape, offset, size = list(tensor.shape), [0] * tensor.dim(), list(tensor.shape)
                shape[dim] = total or size[dim] * ranks
                offset[dim] = index * size[dim] if start is None else start
                return {"shape": shape, "offset": offset, "size": size}
        return None

    def note_gradient(self, group, parameter):
        """Notes which part of a gradient this process holds where that is a summand."""
        key, gradient = (group, id(parameter)), parameter.grad
        self.open.pop(key, None)
        if open_sum(gradient):
            self.open[key] = self.place("", gradient)

    def name_gradients(self, name, key, recorded):
        """Says in the manifest which of a parameter's gradients are summands."""
        for group, of in (("grad", recorded), ("applied", "applied")):
            if (of, key) in self.open:
                self.shards[f"{group}.{name}"] = self.open[of, key]

    def manifest(self):
        return {
            "rank": self.rank,
            "world_size": self.size,
            "data": {"cut": self.cut, "index": self.data[0], "of": self.data[1]},
            "tensor": {"index": self.tensor[0], "of": self.tensor[1]} if self.tensor else None,
            "reduce": self.reduce,
            "loss": self.loss,
            "wrapper": self.wrapper,
            "shards": self.shards,
        }


def finished(folder, size, seconds):
    """Whether every process has left its part, or a word why not, within some seconds."""
    names = [os.path.join(folder, f"rank-{rank}") for rank in range(size)]
    end = time.monotonic() + seconds
    while not all(os.path.exists(name) or os.path.exists(name + ".failed") for name in names):
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def failed(folder, rank, error):
    """Leaves a word where a process could not record its part."""
    try:
        os.makedirs(os.path.dirname(folder) or ".", exist_ok=True)
        with open(folder + ".failed", "w") as file:
            file.write(f"{type(error).__name__}: {error}\n")
    except OSError:
        pass
