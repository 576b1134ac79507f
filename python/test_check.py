#!/usr/bin/env python3
"""Tests of check_step: faults of a backward pass are found in a model that nothing here knows, right ones pass.

    python python/test_check.py

Needs torch; the installed package, or the one beside this file.
"""

import copy
import os
import random
import sys
import unittest

import torch

sys.path.append(os.path.dirname(os.path.abspath(__file__)))
from peft_limits import check_step  # noqa: E402


class Rotation(torch.autograd.Function):
    """Rotates pairs by position; `backward` drops the rotation, turns the wrong way, or is right."""

    @staticmethod
    def forward(ctx, x, cos, sin, fault):
        ctx.save_for_backward(cos, sin)
        ctx.fault = fault
        a, b = x.chunk(2, -1)
        return torch.cat([a * cos - b * sin, a * sin + b * cos], -1)

    @staticmethod
    def backward(ctx, dy):
        cos, sin = ctx.saved_tensors
        if ctx.fault == "dropped":
            return dy, None, None, None
        a, b = dy.chunk(2, -1)
        return torch.cat([a * cos + b * sin, b * cos - a * sin], -1), None, None, None


class FusedDropout(torch.autograd.Function):
    """x through dropout; `backward` may forget the mask."""

    @staticmethod
    def forward(ctx, x, rate, fault):
        mask = (torch.rand_like(x) >= rate).to(x.dtype) / (1 - rate)
        ctx.save_for_backward(mask)
        ctx.fault = fault
        return x * mask

    @staticmethod
    def backward(ctx, dy):
        return (dy if ctx.fault == "mask" else dy * ctx.saved_tensors[0]), None, None


class Adapted(torch.nn.Module):
    def __init__(self, width, out, fault=None):
        super().__init__()
        self.frozen = torch.nn.Parameter(torch.randn(out, width) / width**0.5, requires_grad=False)
        self.down = torch.nn.Parameter(torch.randn(3, width) / width**0.5)
        self.up = torch.nn.Parameter(torch.randn(out, 3) * 0.5)
        self.fault = fault

    def forward(self, x):
        dropped = FusedDropout.apply(x, 0.3, self.fault) if self.training else x
        delta = dropped @ self.down.T @ self.up.T
        return x @ self.frozen.T + (delta.detach() if self.fault == "detached" else delta)


class Model(torch.nn.Module):
    """One block of attention with rotations, a residual and a readout; returns logits of no particular loss."""

    def __init__(self, rotation=None, adapter=None, width=12, classes=7):
        super().__init__()
        torch.manual_seed(0)
        self.read = torch.nn.Parameter(torch.randn(classes, width) / width**0.5)
        self.first = Adapted(width, width)
        self.second = Adapted(width, 3 * width, adapter)
        self.rotation = rotation
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x):
        self.seen += 1.0  # state that a pass changes and that no result depends on
        x = x + torch.tanh(self.first(x))
        q, k, v = self.second(x).chunk(3, -1)
        angle = torch.arange(x.shape[1], dtype=x.dtype)[:, None] / 3.0 ** torch.arange(
            6, dtype=x.dtype
        )
        q, k = (Rotation.apply(t, angle.cos(), angle.sin(), self.rotation) for t in (q, k))
        causal = torch.full((x.shape[1], x.shape[1]), float("-inf"), dtype=x.dtype).triu(1)
        y = x + torch.softmax(q @ k.mT / q.shape[-1] ** 0.5 + causal, -1) @ v
        return (y @ self.read.to(y.dtype).T,)


def step(model, check=check_step, dtype=torch.float32, backward=None, **options):
    model = model.to(dtype)
    torch.manual_seed(5)
    x = torch.randn(3, 11, 12, dtype=dtype)
    with check(model, **options) as out:
        loss = (model(x)[0].float().logsumexp(-1) ** 2).mean()
        loss.backward()
    return out.result


class CheckTest(unittest.TestCase):
    def test_right_steps_pass_in_every_format(self):
        for dtype in (torch.float64, torch.float32, torch.bfloat16):
            result = step(Model(), dtype=dtype)
            self.assertTrue(result.passed, result)
            seen = [t for t in result["tensors"] if t["status"] == "right"]
            self.assertGreaterEqual(len(seen), 4 if dtype is torch.bfloat16 else 5, result)
            worst = max(t["resolution"] for t in seen)
            self.assertLess(worst, {torch.float64: 1e-4, torch.float32: 0.02}.get(dtype, 0.5))

    def test_faults_are_found_where_they_are(self):
        below = {"first.down", "first.up", "second.down", "second.up"}
        for model, wrong in (
            (Model(rotation="dropped"), below),
            (Model(adapter="mask"), {"first.down", "first.up"}),
            (Model(adapter="detached"), below),
        ):
            result = step(model)
            self.assertIs(result.passed, False, result)
            self.assertLessEqual({t["name"] for t in result.wrong()}, wrong, result)
            self.assertNotIn("read", {t["name"] for t in result.wrong()})
        detached = [
            t for t in step(Model(adapter="detached"))["tensors"] if t["name"] == "second.up"
        ]
        self.assertIn("no gradient", detached[0]["what"])

    def test_faults_are_found_in_bf16_where_rounding_leaves_them(self):
        self.assertIs(step(Model(rotation="dropped"), dtype=torch.bfloat16).passed, False)

    def test_a_factor_is_read_off(self):
        model = Model()
        model.first.up.register_hook(lambda g: g * 2)
        result = step(model)
        (wrong,) = result.wrong()
        self.assertEqual(wrong["name"], "first.up")
        self.assertIn("0.5 times what backward says", wrong["what"])

    def test_micro_batches_and_a_loss_outside(self):
        model = Model()
        torch.manual_seed(5)
        parts = [torch.randn(2, n, 12) for n in (9, 13)]

        def losses():
            return [(model(x)[0] ** 2).mean() / 2 for x in parts]

        with check_step(model) as check:
            for loss in losses():
                loss.backward()
        self.assertTrue(check.result.passed, check.result)

        class Wrong(torch.autograd.Function):
            @staticmethod
            def forward(ctx, y):
                ctx.save_for_backward(y)
                return (y**2).mean()

            @staticmethod
            def backward(ctx, d):
                return 3 * d * ctx.saved_tensors[0] / ctx.saved_tensors[0].numel()

        # The loss is outside the model: only a function that computes it again shows its fault.
        for again, passed in ((None, True), (lambda: Wrong.apply(model(parts[0])[0]), False)):
            with check_step(model, loss=again) as check:
                Wrong.apply(model(parts[0])[0]).backward()
            self.assertIs(check.result.passed, passed, check.result)

    def test_everything_is_left_as_it_was(self):
        model = Model().train()
        model.first.eval()
        model.second.down.grad = torch.ones_like(model.second.down)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
        torch.manual_seed(5)
        x = torch.randn(3, 11, 12)
        state = torch.get_rng_state(), random.getstate()

        def run(watch):
            torch.set_rng_state(state[0])
            random.setstate(state[1])
            m = copy.deepcopy(model)
            o = torch.optim.SGD([p for p in m.parameters() if p.requires_grad], lr=0.1)
            o.zero_grad()
            watched = check_step(m)
            with watched if watch else torch.enable_grad():
                loss = (m(x)[0] ** 2).mean()
                kept = loss * 1.0
                loss.backward(retain_graph=True)
                o.step()
            if watch:
                self.assertTrue(watched.result.passed, watched.result)
            tensors = (
                [p for p in m.parameters()]
                + [b for b in m.buffers()]
                + [p.grad for p in m.parameters() if p.grad is not None]
            )
            flags = [module.training for module in m.modules()]
            return (
                [t.detach().clone() for t in tensors],
                flags,
                torch.get_rng_state(),
                random.getstate(),
            )

        plain, watched = run(False), run(True)
        self.assertTrue(all(torch.equal(a, b) for a, b in zip(plain[0], watched[0], strict=True)))
        self.assertTrue(torch.equal(plain[2], watched[2]))
        self.assertEqual((plain[1], plain[3]), (watched[1], watched[3]))
        self.assertFalse(optimizer.state)

    def test_what_cannot_be_checked_is_said_and_never_raised(self):
        class Restless(Model):
            count = 0

            def forward(self, x):
                self.count += 1
                return (super().forward(x)[0] * self.count,)

        self.assertIn("does not repeat", step(Restless())["why"])

        class Breaks(Model):
            def forward(self, x):
                if not torch.is_grad_enabled():
                    raise KeyError("no second pass")
                return super().forward(x)

        result = step(Breaks())
        self.assertIsNone(result.passed)
        self.assertIn("no second pass", result["why"])
        model = Model()
        with check_step(model) as check:
            pass
        self.assertIn("returned nothing", check.result["why"])
        with self.assertRaisesRegex(RuntimeError, "boom"), check_step(model):
            raise RuntimeError("boom")
        self.assertFalse(
            model._forward_hooks or model._forward_pre_hooks or model.read._backward_hooks
        )
        frozen = Model().requires_grad_(False)
        with check_step(frozen) as check:
            frozen(torch.randn(1, 4, 12))
        self.assertIn("no parameter is trainable", check.result["why"])


if __name__ == "__main__":
    torch.set_num_threads(1)
    unittest.main()
