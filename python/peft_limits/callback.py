"""A callback of Transformers' Trainer and what derives from it (TRL, Axolotl): records steps and prints their verdicts.

from peft_limits import ValidateCallback
trainer = Trainer(..., callbacks=[ValidateCallback()])
"""

import os
import sys

from transformers import TrainerCallback

from .ranks import finished, world
from .recorder import dump_step
from .report import NotJudged, validate


def smoothed(step, factor):
    """Lets the recorder see the labels that Trainer keeps from the model when it smooths them; returns what undoes it."""
    from transformers.trainer_pt_utils import LabelSmoother

    original = LabelSmoother.__call__

    def call(self, model_output, labels, *args, **kwargs):
        step.add_labels(labels)
        return original(self, model_output, labels, *args, **kwargs)

    def undo():
        LabelSmoother.__call__ = original

    LabelSmoother.__call__ = call
    step.declared["label_smoothing"] = float(factor)
    # The mean of each micro-batch by itself, as Trainer's smoother takes it.
    step.reduction = "micro_mean"
    return undo


class ValidateCallback(TrainerCallback):
    """Records `steps` optimizer steps from number `at` on (0 is the first), with all their micro-batches.

    Two by default: in the first, LoRA's B is zero, so the gradients of A are zero and tell nothing. Dumps go to
    `folder`/step-N (default: peft-limits in the trainer's output_dir). `check` is that of dump_step; further options are
    dump_step's. Of several processes each records its part, and the first judges. `reports` holds a Report for each step, or the exception that kept it from being judged: nothing that goes wrong here
    reaches the training.
    """

    def __init__(self, folder=None, *, at=0, steps=2, check=None, out=None, **options):
        self.folder, self.at, self.steps = folder, at, steps
        self.check = {"seconds": 30} if check is None else check
        self.options, self.out = options, out
        self.step, self.smoothing, self.reports = None, None, []
        # Seconds for which the first process waits for the others' files.
        self.patience = 60

    def say(self, text):
        print(text, file=self.out or sys.stderr, flush=True)

    def failed(self, number, error):
        self.reports.append(error)
        self.say(f"peft-limits: step {number} was not judged: {error}")

    def on_step_begin(self, args, state, control, model=None, **kwargs):
        number = state.global_step
        records = state.is_world_process_zero or world()[1] > 1
        if not self.at <= number < self.at + self.steps or not records or self.step:
            return
        folder = self.folder or os.path.join(args.output_dir, "peft-limits")
        try:
            os.makedirs(folder, exist_ok=True)
            step = dump_step(
                model, os.path.join(folder, f"step-{number}"), check=self.check, **self.options
            )
            self.step = step.__enter__()
            if args.label_smoothing_factor > 0 and "label_smoothing" not in self.options:
                self.smoothing = smoothed(step, args.label_smoothing_factor)
        except Exception as error:  # noqa: BLE001
            self.failed(number, error)

    def on_optimizer_step(self, args, state, control, **kwargs):
        if self.step is None:
            return
        step, self.step = self.step, None
        if self.smoothing:
            self.smoothing = self.smoothing()
        try:
            step.__exit__(None, None, None)
            rank, size = world()
            if rank > 0:
                return
            if size > 1 and not finished(step.root, size, self.patience):
                raise NotJudged(
                    f"not every rank had recorded its part within {self.patience} s; judge it later: "
                    f"peft-limits validate {step.root}"
                )
            report = validate(step.root)
            self.reports.append(report)
            self.say(report)
        except Exception as error:  # noqa: BLE001
            self.failed(state.global_step, error)
