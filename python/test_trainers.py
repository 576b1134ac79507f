#!/usr/bin/env python3
"""Settings of Transformers' Trainer and TRL's SFTTrainer, recorded by the callback: right steps pass, or are refused in words.

    PEFT_LIMITS=target/release/peft-limits python python/test_trainers.py
    BASE=DECODER TEXT=FILE ...     the same on a trained decoder (with its tokenizer.json) and a text

Needs torch, transformers, peft, trl and datasets.
"""

import io
import os
import sys
import tempfile
import unittest

import datasets
import peft
import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer, SFTConfig, SFTTrainer

sys.path.append(os.path.dirname(os.path.abspath(__file__)))
from peft_limits import NotJudged, Report, ValidateCallback  # noqa: E402
from small_models import llama, lora, padded  # noqa: E402

BASE, TEXT = os.environ.get("BASE"), os.environ.get("TEXT")


def words():
    """Twenty-four texts: of the file, or numbers that a tokenizer of whole words takes."""
    if TEXT:
        with open(TEXT) as file:
            return [part for part in file.read().split("\n\n") if len(part) > 75][:24]
    numbers = [
        torch.randint(
            3, 61, (9 + 5 * (i % 4),), generator=torch.Generator().manual_seed(i)
        ).tolist()
        for i in range(24)
    ]
    return [" ".join(map(str, row)) for row in numbers]


def tokenizer():
    if BASE:
        return transformers.PreTrainedTokenizerFast(
            tokenizer_file=os.path.join(BASE, "tokenizer.json"), pad_token="<unk>", eos_token="</s>"
        )
    inner = Tokenizer(models.WordLevel({str(i): i for i in range(61)}, unk_token="0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="0", eos_token="1"
    )


def model(dtype=torch.float32):
    if BASE:
        return transformers.AutoModelForCausalLM.from_pretrained(BASE, dtype=dtype)
    return llama(dtype=dtype)


class TrainersTest(unittest.TestCase):
    def arguments(self, **settings):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        common = {
            "output_dir": folder.name,
            "max_steps": 2,
            "per_device_train_batch_size": 3,
            "report_to": [],
            "use_cpu": True,
            "learning_rate": 1e-3,
            "disable_tqdm": True,
            "save_strategy": "no",
            "logging_strategy": "no",
            "bf16": False,
        }
        return common | settings

    def run_with(self, make, **options):
        callback = ValidateCallback(out=io.StringIO(), **({"check": False} | options))
        make(callback).train()
        return callback.reports

    def trainer(self, dtype=torch.float32, dropout=0.0, **settings):
        encoded = [
            tokenizer()(text)["input_ids"][: 14 + 7 * (i % 4)] for i, text in enumerate(words())
        ]
        rows = [
            {"input_ids": r, "attention_mask": [1] * len(r), "labels": list(r)} for r in encoded
        ]
        return lambda callback: transformers.Trainer(
            peft.get_peft_model(model(dtype), lora(lora_dropout=dropout)),
            transformers.TrainingArguments(**self.arguments(**settings)),
            train_dataset=rows,
            data_collator=padded,
            callbacks=[callback],
        )

    def sft(self, dtype=torch.float32, dropout=0.0, **settings):
        data = datasets.Dataset.from_dict({"text": words()})
        return lambda callback: SFTTrainer(
            model(dtype),
            args=SFTConfig(**self.arguments(**({"max_length": 48} | settings))),
            train_dataset=data,
            processing_class=tokenizer(),
            peft_config=lora(lora_dropout=dropout),
            callbacks=[callback],
        )

    def passes(self, make, **options):
        reports = self.run_with(make, **options)
        self.assertEqual(len(reports), 2, reports)
        for report in reports:
            self.assertIsInstance(report, Report, report)
            self.assertTrue(report.passed, str(report))
        return reports

    def test_trainer(self):
        for settings in (
            {},
            {"bf16": True},
            {"dtype": torch.bfloat16},
            {"gradient_accumulation_steps": 3},
            {"gradient_checkpointing": True, "max_grad_norm": 0.05},
            {"dropout": 0.2, "gradient_accumulation_steps": 2},
            {"label_smoothing_factor": 0.1},
        ):
            with self.subTest(**settings):
                self.passes(self.trainer(**settings))

    def test_sft_trainer(self):
        for settings in (
            {"bf16": True},
            {"dropout": 0.1},
            {"packing": True, "gradient_accumulation_steps": 2},
            {"padding_free": True, "max_length": None},
        ):
            with self.subTest(**settings):
                self.passes(self.sft(**settings))

    def test_preference_losses(self):
        half = [len(text.split()) // 2 for text in words()]
        prompts = [" ".join(text.split()[:n]) + " " for text, n in zip(words(), half)]
        answers = [" ".join(text.split()[n:]) for text, n in zip(words(), half)]
        pairs = datasets.Dataset.from_dict(
            {"prompt": prompts, "chosen": answers, "rejected": answers[::-1]}
        )
        rated = datasets.Dataset.from_dict(
            {
                "prompt": prompts,
                "completion": answers,
                "label": [i % 2 == 0 for i in range(len(answers))],
            }
        )
        for trainer, config, data, settings in (
            (DPOTrainer, DPOConfig, pairs, {}),
            (DPOTrainer, DPOConfig, pairs, {"bf16": True, "gradient_accumulation_steps": 2}),
            (KTOTrainer, KTOConfig, rated, {}),
        ):
            with self.subTest(trainer=trainer.__name__, **settings):
                self.passes(
                    lambda callback: trainer(
                        model(),
                        args=config(**self.arguments(**settings)),
                        train_dataset=data,
                        processing_class=tokenizer(),
                        peft_config=lora(),
                        callbacks=[callback],
                    )
                )

    def test_the_own_forward_is_checked_by_default(self):
        for report in self.passes(
            self.trainer(dropout=0.2), check={"seconds": 15, "directions": 1}
        ):
            self.assertEqual(report.own_forward["status"], "passed", report.own_forward)

    def test_what_cannot_be_judged_stops_no_training(self):
        for make in (self.trainer(neftune_noise_alpha=5.0), self.sft(neftune_noise_alpha=5.0)):
            reports = self.run_with(make)
            self.assertEqual(len(reports), 2)
            for report in reports:
                self.assertIsInstance(report, (ValueError, NotJudged))
                self.assertIn("NEFTune", str(report))


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.utils.logging.set_verbosity_error()
    unittest.main()
