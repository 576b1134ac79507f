#!/usr/bin/env python3
"""Settings of Transformers' Trainer and TRL's SFTTrainer, recorded by the callback: right steps pass, or are refused in words.

    PEFT_LIMITS=target/release/peft-limits python python/test_trainers.py

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
from trl import SFTConfig, SFTTrainer

sys.path.append(os.path.dirname(os.path.abspath(__file__)))
from peft_limits import NotJudged, Report, ValidateCallback  # noqa: E402

ROWS = [torch.randint(3, 61, (9 + 5 * (i % 4),), generator=torch.Generator().manual_seed(i)).tolist() for i in range(24)]


def model(dtype=torch.float32):
    torch.manual_seed(0)
    config = transformers.LlamaConfig(vocab_size=61, hidden_size=32, intermediate_size=56, num_hidden_layers=3,
                                      num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=128)
    out = transformers.LlamaForCausalLM(config).to(dtype)
    for p in out.parameters():
        if p.dim() == 2:
            p.data.normal_(0, 0.2)
    return out


def lora(**settings):
    return peft.LoraConfig(**({"r": 4, "lora_alpha": 8, "task_type": "CAUSAL_LM", "target_modules": "all-linear"} | settings))


def padded(rows):
    length = max(len(r["input_ids"]) for r in rows)
    fill = lambda key, value: torch.tensor([r[key] + [value] * (length - len(r[key])) for r in rows])  # noqa: E731
    return {"input_ids": fill("input_ids", 0), "attention_mask": fill("attention_mask", 0), "labels": fill("labels", -100)}


class TrainersTest(unittest.TestCase):
    def arguments(self, **settings):
        folder = tempfile.TemporaryDirectory()
        self.addCleanup(folder.cleanup)
        common = {"output_dir": folder.name, "max_steps": 2, "per_device_train_batch_size": 3, "report_to": [], "use_cpu": True,
                  "learning_rate": 1e-3, "disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "bf16": False}
        return common | settings

    def run_with(self, make, **options):
        callback = ValidateCallback(out=io.StringIO(), **({"check": False} | options))
        make(callback).train()
        return callback.reports

    def trainer(self, dtype=torch.float32, dropout=0.0, **settings):
        rows = [{"input_ids": r, "attention_mask": [1] * len(r), "labels": list(r)} for r in ROWS]
        return lambda callback: transformers.Trainer(
            peft.get_peft_model(model(dtype), lora(lora_dropout=dropout)), transformers.TrainingArguments(**self.arguments(**settings)),
            train_dataset=rows, data_collator=padded, callbacks=[callback])

    def sft(self, dtype=torch.float32, dropout=0.0, **settings):
        words = {str(i): i for i in range(61)}
        from tokenizers import Tokenizer, models, pre_tokenizers
        inner = Tokenizer(models.WordLevel(words, unk_token="0"))
        inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=inner, pad_token="0", eos_token="1")
        data = datasets.Dataset.from_dict({"text": [" ".join(map(str, r)) for r in ROWS]})
        return lambda callback: SFTTrainer(model(dtype), args=SFTConfig(**self.arguments(**({"max_length": 48} | settings))),
                                           train_dataset=data, processing_class=tokenizer, peft_config=lora(lora_dropout=dropout),
                                           callbacks=[callback])

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

    def test_the_own_forward_is_checked_by_default(self):
        for report in self.passes(self.trainer(dropout=0.2), check={"seconds": 15, "directions": 1}):
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
