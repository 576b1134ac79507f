"""Checks a backward pass against central differences of the trainer's own forward. Needs torch, nothing else.

    from peft_limits import check_step

    with check_step(model) as check:
        loss = model(**batch).loss
        loss.backward()
    print(check.result)

No architecture, adapter or loss has to be known. With G the gradients that the model's outputs got, the recorded gradient of
a parameter p must be the derivative of phi(p) = sum <G, output(p)>. Each trainable tensor is moved along its own gradient
and along random directions; every forward is repeated with its arguments, random numbers (so its dropout masks), autocast
and training flags. It finds faults of the backward pass only: a wrong forward with its right derivative passes, and so does
a wrong gradient of a loss that is computed outside the model, unless `loss` computes it again.

Errors are shares of a gradient's norm. Rounding of phi is measured by fourth differences along joint directions, that of the
gradients by repeating backward at weights that are moved by about one rounding. Steps run down from half of a
parameter's norm; of all the one is taken where truncation (Richardson's difference) and rounding together are least.

    check_step(model, *,
        loss=None            function that computes the whole step's loss again, to check a loss outside the model as well
        directions=3         random directions of each tensor, beside its gradient's
        seconds=120          stop then, with as many tensors as were looked at (they are taken in random order)
        seed=0
    )

Leaves parameters, gradients, buffers, training flags and random states bit for bit as they were. Whatever goes wrong inside
is told in the result, never raised. Holds two copies of the trainable parameters and one of the gradients meanwhile.
"""

import math
import time

import torch

from .calls import Calls, RandomState, plain, product, unwrap

LEVELS = 12  # step sizes tried, each half of the one before
SIGMAS = 6.0  # deviations of rounding that count as an error
# Errors below these are not told from rounding and truncation that the measurements miss.
FLOORS = {torch.float64: 1e-6, torch.float32: 2e-3, torch.bfloat16: 3e-2, torch.float16: 1e-2}
BLIND = 0.5  # a tensor whose error could not be seen below this was not checked
EPS = {
    torch.float64: 2.0**-40,
    torch.float32: 2.0**-14,
    torch.bfloat16: 2.0**-7,
    torch.float16: 2.0**-9,
}


class CheckResult(dict):
    """The verdict as it stands in a dump's manifest: `status` (passed, failed, not_checked), `why`, `tensors`, ..."""

    @property
    def passed(self):
        """True, False, or None where nothing could be said."""
        return {"passed": True, "failed": False}.get(self["status"])

    def wrong(self):
        return [t for t in self["tensors"] if t["status"] == "wrong"]

    def __str__(self):
        return f"own forward: {self['status'].replace('_', ' ')}: {self['why']}"


def not_checked(why):
    return CheckResult(
        status="not_checked", why=why, tensors=[], forwards=0, seconds=0.0, noise=0.0
    )


class check_step:
    """See the module's text."""

    def __init__(self, model, *, loss=None, directions=3, seconds=120.0, seed=0):
        self.model, self.loss, self.directions, self.seconds, self.seed = (
            model,
            loss,
            directions,
            seconds,
            seed,
        )
        self.result = not_checked("the block has not ended")

    def __enter__(self):
        self.parameters = {
            plain(n): p for n, p in self.model.named_parameters() if p.requires_grad and p.is_leaf
        }
        self.refusal, self.gradients, self.handles = self.refused(), {}, []
        self.calls = Calls(self.model)
        if self.refusal is None:
            self.before = {n: p.detach().clone() for n, p in self.parameters.items()}
            self.grads = {
                n: p.grad.detach().clone() for n, p in self.parameters.items() if p.grad is not None
            }
            # What backward sends, whatever lay in .grad before or is zeroed, clipped and reduced afterwards.
            self.handles = [p.register_hook(self.arrived(n)) for n, p in self.parameters.items()]
        return self

    def refused(self):
        if not self.parameters:
            return "no parameter is trainable"
        for name, p in self.parameters.items():
            if (
                type(p) is not torch.nn.Parameter
                and hasattr(p, "full_tensor")
                or not p.is_floating_point()
            ):
                return f"{name} is sharded or no floating-point tensor"
        if any(type(m).__name__ == "FullyShardedDataParallel" for m in self.model.modules()):
            return "the parameters are sharded"
        return None

    def arrived(self, name):
        def hook(gradient):
            gradient = gradient.detach()
            wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32), copy=True)
            self.gradients[name] = (
                wide if name not in self.gradients else wide.add_(self.gradients[name])
            )

        return hook

    def __exit__(self, kind, error, trace):
        self.stop()
        if kind is None:
            self.compare()

    def stop(self):
        for handle in self.handles:
            handle.remove()
        self.calls.stop()

    def compare(self):
        """The verdict; everything is as it was afterwards."""
        began = time.monotonic()
        if self.refusal:
            self.result = not_checked(self.refusal)
            return self.result
        now = {n: p.detach().clone() for n, p in self.parameters.items()}
        buffers = [(b, b.detach().clone()) for b in self.model.buffers()]
        flags = [(m, m.training) for m in self.model.modules()]
        grads = [(p, p.grad) for p in self.model.parameters()]
        states = RandomState()
        try:
            for name, value in self.before.items():
                self.set(name, value)
            self.result = self.verdict(began)
        except Exception as error:  # noqa: BLE001  watching may never break training
            self.result = not_checked(f"{type(error).__name__}: {error}")
        finally:
            for name, value in now.items():
                self.set(name, value)
            with torch.no_grad():
                for buffer, value in buffers:
                    buffer.copy_(value)
            for module, flag in flags:
                module.training = flag
            for parameter, grad in grads:
                parameter.grad = grad
            states.restore()
            self.calls.all, self.before, self.gradients = [], {}, {}
        self.result["seconds"] = round(time.monotonic() - began, 2)
        return self.result

    # Evaluations.

    def set(self, name, value):
        # `.data` leaves the version counter alone: graphs that are still alive may need it.
        self.parameters[name].data.copy_(value)

    def callee(self):
        model = self.model
        return (
            model.module if isinstance(model, torch.nn.parallel.DistributedDataParallel) else model
        )

    def phi(self):
        """The step's outputs against their gradients, at the parameters as they are."""
        self.forwards += 1
        with torch.no_grad():
            if self.loss is not None:
                self.calls.all[0].random.restore()
                return float(self.loss())
            total = 0.0
            for call in self.calls.all:
                outputs = call.again(self.callee())
                for path, gradient in call.gradients.items():
                    total += product(gradient, outputs[path])
            return total

    def backward(self):
        """The gradients once more, without touching any parameter's own."""
        self.forwards += 1
        names = list(self.parameters)
        sums = {n: None for n in names}
        for call in self.calls.all:
            with torch.enable_grad():
                outputs = call.again(self.callee())
                paths = [p for p in call.gradients if outputs[p].requires_grad]
                found = torch.autograd.grad(
                    [outputs[p] for p in paths],
                    [self.parameters[n] for n in names],
                    [call.gradients[p] for p in paths],
                    allow_unused=True,
                )
            for name, gradient in zip(names, found):
                if gradient is not None:
                    sums[name] = (
                        gradient.detach().double()
                        if sums[name] is None
                        else sums[name] + gradient.double()
                    )
        return sums

    # The verdict.

    def verdict(self, began):
        self.forwards = 0
        if not self.calls.all:
            return not_checked("the model returned nothing in the block that backward went through")
        if not self.gradients and all(p.grad is None for p in self.parameters.values()):
            return not_checked(
                "no gradient reached any parameter: backward was not called in the block"
            )
        self.generator = torch.Generator().manual_seed(self.seed)
        self.format = self.coarsest()
        recorded = sum(c.value for c in self.calls.all)
        base, again = self.phi(), self.phi()
        if not math.isfinite(base):
            return not_checked(f"the step's outputs are {base}")
        self.measure_noise()
        scale = max(abs(base), 1e-30)
        allowed = 20 * self.noise + 1e-5 * scale
        if abs(base - again) > allowed or (self.loss is None and abs(base - recorded) > allowed):
            return not_checked(
                f"the forward does not repeat: {recorded:.6g} in the step, {base:.6g} and {again:.6g} afterwards "
                "(random numbers that are not torch's, a cache, or state that a pass changes)"
            )
        blur, tensors = self.backward_noise(), []
        order = torch.randperm(len(self.parameters), generator=self.generator).tolist()
        names = list(self.parameters)
        for index in order:
            if time.monotonic() - began > self.seconds and tensors:
                break
            tensors.append(self.tensor(names[index], blur.get(names[index], (0.0, 0.0))))
        tensors.sort(key=lambda t: names.index(t["name"]))
        return self.summary(tensors, len(names))

    def coarsest(self):
        formats = {p.dtype for p in self.model.parameters() if p.is_floating_point()}
        for call in self.calls.all:
            devices = {p.device.type for p in self.parameters.values()}
            formats |= {
                dtype for device, dtype, on in call.autocast.states if on and device in devices
            }
            formats |= {g.dtype for g in call.gradients.values()}
        return max(formats & set(EPS), key=EPS.get, default=torch.float32)

    def random_like(self, value):
        noise = torch.randn(value.shape, generator=self.generator, dtype=torch.float64)
        return noise.to(value.device)

    def size(self, value):
        """Norm of a step that is as large as the parameter, or as usual for one that starts at zero."""
        norm = float(torch.linalg.vector_norm(value.double()))
        usual = 0.1 * math.sqrt(value.numel() / max(value.shape[-1] if value.dim() else 1, 1))
        return norm if norm > 1e-3 * usual else usual

    def measure_noise(self, lines=2, points=12):
        """Deviation of phi from a smooth function: fourth differences of points a few roundings apart."""
        fourth = []
        for _ in range(lines):
            steps = {
                n: self.random_like(v) * (self.size(v) * EPS[self.format] / math.sqrt(v.numel()))
                for n, v in self.before.items()
            }
            values = []
            for k in range(points):
                for name, value in self.before.items():
                    self.set(
                        name, (value.double() + (k - points / 2) * steps[name]).to(value.dtype)
                    )
                values.append(self.phi())
            for _ in range(4):
                values = [b - a for a, b in zip(values, values[1:])]
            fourth += values
        for name, value in self.before.items():
            self.set(name, value)
        # Sum of the squared binomials 1, 4, 6, 4, 1.
        self.noise = math.sqrt(sum(x * x for x in fourth) / len(fourth) / 70.0)

    def gradient(self, name):
        """Backward's, in double precision; None where there is none."""
        p, gradient = self.parameters[name], self.gradients.get(name)
        if gradient is None and p.grad is not None:
            # Fused backward passes write into .grad past autograd.
            old = self.grads.get(name)
            gradient = p.grad.double() if old is None else p.grad.double() - old.double()
            gradient = gradient if bool(gradient.any()) else None
        return None if gradient is None or gradient.shape != p.shape else gradient.double()

    def backward_noise(self, repeats=3):
        """(share along the gradient, share of its norm) by which rounding moves each tensor's gradient."""
        if self.format in (torch.float64, torch.float32) or self.loss is not None:
            return {}
        try:
            all_gradients = []
            for _ in range(repeats):
                for name, value in self.before.items():
                    noise = self.random_like(value) * value.double().abs() * EPS[self.format] / 2
                    self.set(name, (value.double() + noise).to(value.dtype))
                all_gradients.append(self.backward())
        finally:
            for name, value in self.before.items():
                self.set(name, value)
        out = {}
        for name in self.parameters:
            g = self.gradient(name)
            norm = 0.0 if g is None else float(torch.linalg.vector_norm(g))
            gaps = (
                [r[name].to(g.device) - g for r in all_gradients if r[name] is not None]
                if norm > 0
                else []
            )
            if gaps:
                along = max(abs(float((d * g).sum())) / norm**2 for d in gaps)
                out[name] = (along, max(float(torch.linalg.vector_norm(d)) / norm for d in gaps))
        return out

    def along(self, name, value, direction, expected_of):
        """(error of the derivative along a direction as long as a whole step, its deviation): Richardson at the best step."""
        errors, kept, best = [], [], (math.nan, math.inf)
        for level in range(LEVELS):
            r = 0.5 ** (level + 1)
            plus, minus = ((value.double() + s * direction).to(value.dtype) for s in (r, -r))
            self.set(name, plus)
            high = self.phi()
            self.set(name, minus)
            low = self.phi()
            self.set(name, value)
            # In half formats the step that was made is not the one that was asked for.
            errors.append((high - low - expected_of(plus.double() - minus.double())) / (2 * r))
            noise = 1.35 * self.noise / (math.sqrt(2) * r)
            if level > 0:
                kept.append(((4 * errors[-1] - errors[-2]) / 3, noise))
            if level < 2 or not math.isfinite(kept[-1][0]):
                continue
            # A step is good only if the smaller ones agree with it, as far as rounding lets them.
            totals = []
            for i, (e, own) in enumerate(kept[1:], 1):
                later = [abs(e - x) - 2 * n for x, n in kept[i + 1 :]]
                totals.append((math.hypot(own, max(abs(e - kept[i - 1][0]), *later, 0.0)), e))
            deviation, e = min(t for t in totals if math.isfinite(t[0]))
            best = (e, deviation)
            if noise > 2 * deviation:
                break
        return best

    def look(self, name, blur):
        """One measurement of a tensor: (kind of error or None, error, smallest error that could be seen)."""
        value, g = self.before[name], self.gradient(name)
        n, size = value.numel(), self.size(self.before[name])
        norm = 0.0 if g is None else float(torch.linalg.vector_norm(g))
        if not math.isfinite(norm):
            return "not finite", math.inf, 0.0
        expected = (lambda step: float((g * step).sum())) if norm > 0 else (lambda step: 0.0)
        floor = FLOORS[self.format]
        kind, error, seen = None, 0.0, math.inf
        if norm > 0:
            e, s = self.along(name, value, g * (size / norm), expected)
            scale = norm * size
            error, seen = abs(e) / scale, SIGMAS * s / scale + 4 * blur[0] + floor
            if error > seen:
                kind = f"{1 + e / scale:.3g} times what backward says, along its gradient"
        squares, deviations = 0.0, 0.0
        for _ in range(self.directions):
            direction = self.random_like(value)
            direction *= size / float(torch.linalg.vector_norm(direction))
            e, s = self.along(name, value, direction, expected)
            squares, deviations = squares + e * e, deviations + s * s
        # A random direction sees a share 1 / sqrt(n) of a gradient's norm.
        root = math.sqrt(n / max(self.directions, 1)) / size
        absolute, absolute_noise = root * math.sqrt(squares), root * math.sqrt(deviations)
        if norm > 0:
            random_error, random_seen = (
                absolute / norm,
                (SIGMAS * absolute_noise / norm + 4 * blur[1] + floor),
            )
            if random_error > random_seen and kind is None:
                kind, error = "another direction than backward says", random_error
            seen = min(seen, random_seen)
            return kind, error, seen
        if absolute > SIGMAS * absolute_noise and absolute > 1e-7 * self.typical():
            word = "no gradient" if g is None else "a gradient of zero"
            return f"{word}, though the outputs depend on it", math.inf, 0.0
        return None, 0.0, 0.0

    def typical(self):
        norms = [
            float(torch.linalg.vector_norm(g))
            for g in map(self.gradient, self.parameters)
            if g is not None
        ]
        return max(norms, default=0.0)

    def tensor(self, name, blur):
        kind, error, seen = self.look(name, blur)
        if kind is not None and math.isfinite(error):
            # Once more along other directions: chance does not repeat.
            again, error_again, _ = self.look(name, blur)
            kind, error = (
                (kind, min(error, error_again)) if again is not None else (None, error_again)
            )
        status = "wrong" if kind is not None else "blind" if seen > BLIND else "right"
        finite = lambda x: round(x, 9) if math.isfinite(x) else None  # noqa: E731
        return {
            "name": name,
            "status": status,
            "error": finite(error),
            "resolution": finite(seen),
            "what": kind or "",
        }

    def summary(self, tensors, count):
        wrong = [t for t in tensors if t["status"] == "wrong"]
        seen = [t for t in tensors if t["status"] == "right"]
        blind = [t for t in tensors if t["status"] == "blind"]
        resolution = sorted(t["resolution"] for t in seen)
        part = (
            ""
            if len(tensors) == count
            else f" ({count - len(tensors)} more were not looked at in {self.seconds:g} s)"
        )
        if wrong:
            status = "failed"
            why = f"{len(wrong)} of {len(tensors)} gradients are not the derivative of the step's own forward{part}; {wrong[0]['name']}: {wrong[0]['what']}"
        elif not seen:
            status, why = (
                "not_checked",
                f"rounding of {str(self.format).removeprefix('torch.')} hides every gradient{part}",
            )
        else:
            status = "passed"
            why = (
                f"{len(seen)} of {len(tensors)} gradients are the derivative of the step's own forward, "
                f"to {resolution[len(resolution) // 2]:.1e} of their norm{part}"
            )
            if blind:
                why += f"; {len(blind)} are hidden by rounding"
        return CheckResult(
            status=status,
            why=why + ". A wrong forward is not seen this way",
            tensors=tensors,
            forwards=self.forwards,
            seconds=0.0,
            noise=self.noise,
        )
