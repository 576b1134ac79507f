"""Records steps of PyTorch trainers and judges them with `peft-limits validate`.

| name | what | file |
|---|---|---|
| dump_step | records a step into a folder | recorder.py |
| check_step | backward against differences of the trainer's own forward | differences.py |
| validate | runs the program on a recorded step | report.py |
| ValidateCallback | all of it in one line of a Transformers or TRL trainer; needs transformers | callback.py |
"""

from .differences import CheckResult, check_step
from .recorder import dump_step, trainable_snapshot
from .report import NotJudged, Report, validate

__all__ = ["CheckResult", "NotJudged", "Report", "ValidateCallback", "check_step", "dump_step", "trainable_snapshot", "validate"]


def __getattr__(name):
    # Transformers is imported only by those who use it.
    if name == "ValidateCallback":
        from .callback import ValidateCallback
        return ValidateCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
