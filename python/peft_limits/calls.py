"""What a model was called with inside a block and the gradients of what it returned: enough to run the forward again."""

import contextlib
import random
import sys

import torch

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.", "module.")


def plain(name):
    """A parameter's name without the prefixes of wrappers."""
    for wrapper in WRAPPERS:
        while name.startswith(wrapper):
            name = name[len(wrapper) :]
        name = name.replace("." + wrapper, ".")
    return name


def unwrap(model):
    while True:
        inner = getattr(model, "_orig_mod", None) or getattr(model, "module", None)
        if not isinstance(inner, torch.nn.Module):
            return model
        model = inner


def dtype_name(dtype):
    return str(dtype).removeprefix("torch.")


def map_tensors(value, change):
    """The same structure with every tensor changed; what is no list, tuple or dict stays."""
    if isinstance(value, torch.Tensor):
        return change(value)
    if type(value) in (list, tuple):
        return type(value)(map_tensors(v, change) for v in value)
    if type(value) is dict:
        return {k: map_tensors(v, change) for k, v in value.items()}
    return value


def tensors_of(value, path=()):
    """(path, tensor) of every tensor in a model's output."""
    if isinstance(value, torch.Tensor):
        yield path, value
    elif isinstance(value, dict):
        for key, part in value.items():
            yield from tensors_of(part, (*path, key))
    elif isinstance(value, (list, tuple)):
        for index, part in enumerate(value):
            yield from tensors_of(part, (*path, index))
    elif hasattr(value, "__dict__") and not isinstance(value, (torch.nn.Module, type)):
        for key, part in vars(value).items():
            if isinstance(part, torch.Tensor):
                yield (*path, key), part


def replaced(value, path, tensor):
    """The output with another tensor at the path; containers that can be changed are."""
    if not path:
        return tensor
    key, rest = path[0], path[1:]
    if isinstance(value, tuple) and not isinstance(value, dict):
        parts = list(value)
        parts[key] = replaced(parts[key], rest, tensor)
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, (dict, list)):
        value[key] = replaced(value[key], rest, tensor)
    else:
        setattr(value, key, tensor)
    return value


class RandomState:
    """Every generator that a forward may draw from."""

    def __init__(self):
        self.torch = torch.get_rng_state()
        self.cuda = (
            torch.cuda.get_rng_state_all()
            if torch.cuda.is_available() and torch.cuda.is_initialized()
            else None
        )
        self.python = random.getstate()
        numpy = sys.modules.get("numpy")
        self.numpy = (
            numpy.random.get_state() if numpy is not None and hasattr(numpy, "random") else None
        )

    def restore(self):
        torch.set_rng_state(self.torch)
        if self.cuda is not None:
            torch.cuda.set_rng_state_all(self.cuda)
        random.setstate(self.python)
        if self.numpy is not None:
            sys.modules["numpy"].random.set_state(self.numpy)


class Autocast:
    """Autocast as it is now."""

    def __init__(self):
        devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
        self.states = [
            (d, torch.get_autocast_dtype(d), torch.is_autocast_enabled(d)) for d in devices
        ]

    @contextlib.contextmanager
    def again(self):
        with contextlib.ExitStack() as stack:
            for device, dtype, enabled in self.states:
                # Weights change between passes: their casts must not be kept.
                stack.enter_context(
                    torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False)
                )
            yield


class Call:
    """One forward pass with gradients."""

    def __init__(self, module, args, kwargs):
        copy = lambda t: t.detach().clone()  # noqa: E731
        self.args, self.kwargs = map_tensors(args, copy), map_tensors(kwargs, copy)
        self.random, self.autocast = RandomState(), Autocast()
        self.training = [(m, m.training) for m in module.modules()]
        self.gradients, self.value = {}, 0.0

    def returned(self, output):
        """The output as the caller gets it. A tensor that another output follows from (logits beside their loss) gets
        gradients from inside the model too: twins tell what comes from outside."""
        wanted = [
            (p, t) for p, t in tensors_of(output) if t.requires_grad and t.is_floating_point()
        ]
        for path, tensor in wanted:
            if len(wanted) > 1:
                # A trainer may scale its loss in place, which a view's hook does not survive.
                twin = tensor.clone() if tensor.numel() <= 1 << 16 else tensor.view_as(tensor)
                output = replaced(output, path, twin)
                tensor = twin
            tensor.register_hook(self.keep(path, tensor.detach()))
        return output

    def keep(self, path, output):
        def hook(gradient):
            # Fused losses overwrite their gradients in place.
            gradient = gradient.detach().clone()
            if path in self.gradients:  # backward ran twice through the same graph
                gradient = gradient + self.gradients[path]
            self.gradients[path] = gradient
            self.value += product(gradient, output)

        return hook

    def again(self, model):
        """The forward once more: same arguments, random numbers, autocast and training flags."""
        for module, flag in self.training:
            module.training = flag
        self.random.restore()
        with self.autocast.again():
            return dict(tensors_of(model(*self.args, **self.kwargs)))


def product(a, b):
    """Inner product in double precision, in pieces."""
    a, b, total = a.reshape(-1), b.reshape(-1), 0.0
    for start in range(0, a.numel(), 1 << 24):
        part = slice(start, start + (1 << 24))
        total += float(torch.dot(a[part].double(), b[part].double()))
    return total


class Calls:
    """Records the forward passes of a model until `stop`."""

    def __init__(self, model):
        self.model, self.all, self.open = model, [], []
        self.handles = [
            model.register_forward_pre_hook(self.called, with_kwargs=True),
            model.register_forward_hook(self.returned),
        ]

    def called(self, module, args, kwargs):
        self.open.clear()  # a pass that raised
        if torch.is_grad_enabled():
            self.open.append(Call(module, args, kwargs))
            self.all.append(self.open[-1])

    def returned(self, module, args, output):
        return self.open.pop().returned(output) if self.open else None

    def stop(self):
        for handle in self.handles:
            handle.remove()
        # A pass that nothing was differentiated through belongs to no step.
        self.all = [c for c in self.all if c.gradients]
