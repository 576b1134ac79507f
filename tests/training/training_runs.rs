//! Training end to end: resume bit for bit, accumulation, checkpointing, stopping, errors.

use ndarray::Array2;
use peft_limits::Error;
use peft_limits::model::Projection;
use peft_limits::train::checkpoint;
use peft_limits::train::config::{ModelSource, TrainConfig};
use peft_limits::train::method::{MethodName, MethodParams};
use peft_limits::train::observe::{Event, Observe, StepRecord, StopReason};
use peft_limits::train::optimizer::OptimizerParams;
use peft_limits::train::tasks::TaskParams;
use peft_limits::train::tasks::mixture::Part;
use peft_limits::train::trainer::{StepOutcome, Trainer};
use std::path::Path;
use std::sync::atomic::{AtomicBool, Ordering};

/// A model of two small layers, a short run on lists.
fn config(folder: &Path) -> TrainConfig {
    let json = r#"{"vocab_size": 259, "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2,
        "num_attention_heads": 6, "num_key_value_heads": 3, "head_dim": 4, "rms_norm_eps": 1e-5}"#;
    let path = folder.join("tiny.json");
    std::fs::write(&path, json).unwrap();
    let mut config = TrainConfig { model: ModelSource::Config(path), ..TrainConfig::default() };
    config.train.steps = 6;
    config.train.batch = 5;
    config.train.length = 64;
    config.train.eval_rows = 0;
    config.optimizer =
        OptimizerParams { lr: 3e-3, weight_decay: 0.01, clip: 1.0, ..OptimizerParams::default() };
    config.data = vec![Part { weight: 1.0, task: TaskParams::named("lists").unwrap() }];
    config
}

/// A folder with a pretrained checkpoint, and a configuration that fine-tunes it.
fn fine_tuning(folder: &Path, method: MethodParams) -> TrainConfig {
    let mut config = config(folder);
    let base = folder.join("base");
    if !base.exists() {
        let mut trainer = Trainer::<f64>::new(config.clone()).unwrap();
        trainer.run(None, &mut [], &AtomicBool::new(false)).unwrap();
        trainer.model.write(&base).unwrap();
    }
    config.model = ModelSource::Path(base);
    config.method = method;
    config
}

fn every_method() -> Vec<MethodParams> {
    MethodName::ALL
        .into_iter()
        // alpha / rank = 7 / 3 is not a power of two: a stored PaCA tensor is not the weight
        // itself.
        .map(|name| MethodParams { rank: 3, alpha: Some(7.0), ..MethodParams::named(name) })
        .collect()
}

fn values(trainer: &Trainer<f32>) -> Vec<(String, Vec<u32>)> {
    let bits = |a: &Array2<f32>| a.iter().map(|x| x.to_bits()).collect();
    let mut all: Vec<(String, Vec<u32>)> =
        trainer.model.trainable_values().iter().map(|(name, a)| (name.clone(), bits(a))).collect();
    for (l, layer) in trainer.model.layers.iter().enumerate() {
        for p in Projection::ALL {
            all.push((
                format!("{l}.{}", p.path()),
                bits(&layer.projection(p).effective_weight().unwrap()),
            ));
        }
    }
    all
}

#[test]
fn resuming_equals_not_stopping_bit_for_bit_for_every_method() {
    let folder = tempfile::tempdir().unwrap();
    for method in every_method() {
        let name = method.name.name();
        let config = fine_tuning(folder.path(), method);
        let mut whole = Trainer::<f32>::new(config.clone()).unwrap();
        let start = values(&whole);
        (0..6).for_each(|_| assert!(matches!(whole.step().unwrap(), StepOutcome::Done(_))));
        assert_ne!(values(&whole), start, "{name} trains");

        let out = folder.path().join(format!("run-{name}"));
        let mut first = Trainer::<f32>::new(config.clone()).unwrap();
        (0..3).for_each(|_| drop(first.step().unwrap()));
        checkpoint::save(&first, &out).unwrap();
        let mut second = Trainer::<f32>::new(config).unwrap();
        checkpoint::resume(&mut second, &out).unwrap();
        assert_eq!(second.steps_done(), 3);
        (0..3).for_each(|_| drop(second.step().unwrap()));
        assert_eq!(values(&second), values(&whole), "{name}");
        assert!(second.optimizer == whole.optimizer, "{name}: moments differ");
    }
}

#[test]
fn frozen_weights_are_bit_identical_after_training() {
    let folder = tempfile::tempdir().unwrap();
    let method = MethodParams {
        rank: 3,
        targets: Some(vec!["v_proj".into()]),
        ..MethodParams::named(MethodName::Paca)
    };
    let mut trainer = Trainer::<f32>::new(fine_tuning(folder.path(), method)).unwrap();
    let before = values(&trainer);
    trainer.run(None, &mut [], &AtomicBool::new(false)).unwrap();
    for ((name, now), (_, then)) in values(&trainer).iter().zip(&before) {
        if name.contains("v_proj") {
            assert_ne!(now, then, "{name} is trained");
        } else {
            assert_eq!(now, then, "{name} is frozen");
        }
    }
}

/// Three micro-batches of two rows give the update of one batch of six; so does activation
/// checkpointing.
#[test]
fn accumulation_and_checkpointing_change_nothing_but_roundoff() {
    let folder = tempfile::tempdir().unwrap();
    for method in every_method() {
        let mut one = fine_tuning(folder.path(), method);
        one.train.batch = 6;
        let mut three = one.clone();
        (three.train.batch, three.train.accumulation) = (2, 3);
        let mut checkpointed = one.clone();
        checkpointed.train.checkpointing = true;
        let run = |config: &TrainConfig| {
            let mut trainer = Trainer::<f64>::new(config.clone()).unwrap();
            let losses: Vec<f64> = (0..3)
                .map(|_| match trainer.step().unwrap() {
                    StepOutcome::Done(record) => record.loss,
                    other => panic!("{other:?}"),
                })
                .collect();
            losses
        };
        let want = run(&one);
        for (other, what) in [(&three, "accumulation"), (&checkpointed, "checkpointing")] {
            for (a, b) in run(other).iter().zip(&want) {
                // Adam divides by the gradient's size, so a roundoff of a tiny gradient moves its
                // entry by up to lr; three steps at lr 3e-3 leave 1e-8 on the loss.
                assert!(
                    (a - b).abs() < 1e-8,
                    "{what} with {}: {a} against {b}",
                    one.method.name.name()
                );
            }
        }
    }
}

/// Keeps the records; optionally raises the stop flag after some steps.
#[derive(Default)]
struct Recorder<'a> {
    records: Vec<StepRecord>,
    saved: usize,
    stop_after: Option<(usize, &'a AtomicBool)>,
}

impl Observe for Recorder<'_> {
    fn observe(&mut self, event: &Event<'_>) -> peft_limits::Result<()> {
        match event {
            Event::Step(record) => {
                self.records.push(**record);
                if let Some((n, flag)) = self.stop_after
                    && self.records.len() == n
                {
                    flag.store(true, Ordering::Relaxed);
                }
            }
            Event::Saved(_) => self.saved += 1,
            _ => {}
        }
        Ok(())
    }
}

#[test]
fn an_interrupt_saves_and_the_continued_run_sees_the_same_losses() {
    let folder = tempfile::tempdir().unwrap();
    let config = config(folder.path());
    let quiet = AtomicBool::new(false);
    let mut whole = Recorder::default();
    Trainer::<f32>::new(config.clone()).unwrap().run(None, &mut [&mut whole], &quiet).unwrap();
    let (out, flag) = (folder.path().join("run"), AtomicBool::new(false));
    let mut first = Recorder { stop_after: Some((2, &flag)), ..Recorder::default() };
    let mut trainer = Trainer::<f32>::new(config.clone()).unwrap();
    let reason = trainer.run(Some(&out), &mut [&mut first], &flag).unwrap();
    assert_eq!((reason, first.saved), (StopReason::Interrupted { step: 2 }, 1));
    let mut trainer = Trainer::<f32>::new(config).unwrap();
    checkpoint::resume(&mut trainer, &out).unwrap();
    let mut second = Recorder::default();
    assert_eq!(trainer.run(Some(&out), &mut [&mut second], &quiet).unwrap(), StopReason::StepsDone);
    let losses = |r: &Recorder<'_>| r.records.iter().map(|r| r.loss.to_bits()).collect::<Vec<_>>();
    assert_eq!([losses(&first), losses(&second)].concat(), losses(&whole));
}

#[test]
fn nan_stops_names_the_step_and_keeps_the_last_good_checkpoint() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let mut config = config(folder.path());
    config.train.save_every = 1;
    let mut trainer = Trainer::<f32>::new(config.clone()).unwrap();
    (0..2).for_each(|_| drop(trainer.step().unwrap()));
    checkpoint::save(&trainer, &out).unwrap();
    trainer.model.final_norm.gain[3] = f32::NAN;
    match trainer.run(Some(&out), &mut [], &AtomicBool::new(false)).unwrap() {
        StopReason::NonFinite { step, tensor } => {
            assert_eq!((step, tensor.as_str()), (3, "logits"))
        }
        other => panic!("{other:?}"),
    }
    // An update that overflows a weight is noticed before it is saved.
    let mut wild = config.clone();
    wild.optimizer = OptimizerParams { lr: 1e30, weight_decay: 1e30, ..OptimizerParams::default() };
    let mut trainer = Trainer::<f32>::new(wild).unwrap();
    match trainer.run(Some(&out), &mut [], &AtomicBool::new(false)).unwrap() {
        StopReason::NonFinite { step, tensor } => {
            assert_eq!((step, tensor.as_str()), (1, "model.embed_tokens.weight"))
        }
        other => panic!("{other:?}"),
    }
    let kept = checkpoint::list(&out).unwrap();
    assert_eq!(kept.iter().map(|c| c.0).collect::<Vec<_>>(), [2]);
    let mut again = Trainer::<f32>::new(config).unwrap();
    checkpoint::resume(&mut again, &out).unwrap();
    assert!(matches!(again.step().unwrap(), StepOutcome::Done(_)));
}

#[test]
fn target_loss_stops_early_and_two_checkpoints_are_kept() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let mut config = config(folder.path());
    config.train.save_every = 1;
    Trainer::<f32>::new(config.clone())
        .unwrap()
        .run(Some(&out), &mut [], &AtomicBool::new(false))
        .unwrap();
    assert_eq!(checkpoint::list(&out).unwrap().iter().map(|c| c.0).collect::<Vec<_>>(), [5, 6]);
    assert_eq!(std::fs::read_dir(&out).unwrap().count(), 2, "nothing temporary is left");
    config.train.target_loss = 1e9;
    let reason =
        Trainer::<f32>::new(config).unwrap().run(None, &mut [], &AtomicBool::new(false)).unwrap();
    assert!(matches!(reason, StopReason::TargetLoss { step: 1, .. }), "{reason:?}");
}

#[test]
fn a_run_cannot_continue_with_other_settings_another_base_or_broken_files() {
    let folder = tempfile::tempdir().unwrap();
    let out = folder.path().join("run");
    let config = fine_tuning(
        folder.path(),
        MethodParams { rank: 3, ..MethodParams::named(MethodName::Lora) },
    );
    let mut trainer = Trainer::<f32>::new(config.clone()).unwrap();
    trainer.step().unwrap();
    let refused = |config: &TrainConfig| {
        let mut trainer = Trainer::<f32>::new(config.clone()).unwrap();
        checkpoint::resume(&mut trainer, &out).unwrap_err()
    };
    assert!(refused(&config).to_string().contains("start without --resume"));
    let saved = checkpoint::save(&trainer, &out).unwrap();
    let mut other = config.clone();
    other.optimizer.lr = 0.5;
    match refused(&other) {
        Error::Format { field, expected, found, .. } => {
            assert_eq!((field.as_str(), found.as_str()), ("key optimizer.lr", "0.5"));
            assert!(expected.contains("0.003"), "{expected}");
        }
        other => panic!("{other:?}"),
    }
    // The base changes under the run.
    let mut changed = trainer.model.clone();
    changed.embedding[[0, 0]] += 1.0;
    changed.write(&folder.path().join("base")).unwrap();
    assert!(refused(&config).to_string().contains("base weights changed"));
    // A torn state file.
    trainer.model.write(&folder.path().join("base")).unwrap();
    let state = saved.join("state.safetensors");
    let bytes = std::fs::read(&state).unwrap();
    std::fs::write(&state, &bytes[..bytes.len() / 2]).unwrap();
    assert!(matches!(refused(&config), Error::Format { .. }));
}

/// The target of a save is a file: the error names it, and nothing is left behind.
#[test]
fn a_failed_save_is_an_io_error_that_names_the_path() {
    let folder = tempfile::tempdir().unwrap();
    let trainer = Trainer::<f32>::new(config(folder.path())).unwrap();
    let blocked = folder.path().join("blocked");
    std::fs::write(&blocked, b"x").unwrap();
    match checkpoint::save(&trainer, &blocked) {
        Err(Error::Io { path, .. }) => assert_eq!(path, blocked),
        other => panic!("{other:?}"),
    }
    assert_eq!(std::fs::read(&blocked).unwrap(), b"x");
}

#[test]
fn training_learns_a_small_task() {
    let folder = tempfile::tempdir().unwrap();
    let mut config = config(folder.path());
    config.train.steps = 120;
    config.train.batch = 16;
    let mut recorder = Recorder::default();
    Trainer::<f32>::new(config)
        .unwrap()
        .run(None, &mut [&mut recorder], &AtomicBool::new(false))
        .unwrap();
    let mean = |r: &[StepRecord]| r.iter().map(|r| r.loss).sum::<f64>() / r.len() as f64;
    let (first, last) = (mean(&recorder.records[..5]), mean(&recorder.records[115..]));
    // From ln 259 = 5.6 nats at random to the entropy of digits, spaces and ends.
    assert!(first > 4.0 && last < 1.8, "{first} to {last}");
}
