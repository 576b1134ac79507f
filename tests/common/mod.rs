//! Models and batches that several tests share. Sizes are pairwise distinct where the architecture
//! allows.
#![allow(dead_code)] // each test binary uses a part

use ndarray::Array2;
use peft_limits::adapters::lora::LoraSpec;
use peft_limits::adapters::moslora::MixerInit;
use peft_limits::adapters::paca::PacaSpec;
use peft_limits::adapters::spft::SpftSpec;
use peft_limits::cost::Cost;
use peft_limits::linalg::Real;
use peft_limits::model::s2ft::{S2ftSpec, Scope};
use peft_limits::model::{
    AdapterPlan, Batch, Gradients, MethodSpec, Model, ModelConfig, Projection, StepOptions,
    StepOutput,
};
use peft_limits::tensor_file::{TensorFile, TensorWriter};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use std::path::Path;

pub fn rng(seed: u64) -> ChaCha8Rng {
    ChaCha8Rng::seed_from_u64(seed)
}

/// 3 layers, width 24, 6 heads of 4 in 3 groups of 2, 34 channels, 31 tokens.
pub fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: 31,
        hidden_size: 24,
        intermediate_size: 34,
        num_hidden_layers: 3,
        num_attention_heads: 6,
        num_key_value_heads: 3,
        head_dim: 4,
        max_position_embeddings: 64,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        tie_word_embeddings: false,
        options: Default::default(),
    }
}

/// Weights large enough that every nonlinearity is felt.
pub fn model<T: Real>(seed: u64) -> Model<T> {
    let mut rng = rng(seed);
    let mut model: Model<T> = Model::random(config(), &mut rng).unwrap();
    model.train_fully();
    model
        .for_each_trainable(&mut |name, values| {
            let gain = name.contains("norm");
            values.mapv_inplace(|x| {
                T::of(if gain { 0.5 + rng.random::<f64>() } else { x.widen() * 12.0 })
            });
            Ok(())
        })
        .unwrap();
    let everything = AdapterPlan::everywhere(&Projection::ALL, MethodSpec::Frozen);
    model.attach(&everything, &mut rng).unwrap();
    model.trainable = Default::default();
    model
}

/// 2 sequences of 13 tokens with a masked prompt and padding.
pub fn batch() -> Batch {
    let mut rng = rng(99);
    let ids = Array2::from_shape_simple_fn((2, 13), || rng.random_range(0..31u32));
    let mut labels = ids.mapv(i64::from);
    labels.slice_mut(ndarray::s![0, ..5]).fill(-100);
    labels.slice_mut(ndarray::s![1, 10..]).fill(-100);
    Batch::new(ids, labels).unwrap()
}

pub fn lora(rank: usize) -> LoraSpec {
    LoraSpec { rank, alpha: 7.0, rank_stabilized: false }
}

/// Every method with its name; S2FT trains all seven components.
pub fn every_method<T: Real>() -> Vec<(&'static str, Model<T>)> {
    let stabilized = LoraSpec { rank_stabilized: true, ..lora(3) };
    let specs = [
        ("full", MethodSpec::Full),
        ("lora", MethodSpec::Lora(lora(5))),
        ("rslora", MethodSpec::Lora(stabilized)),
        ("dora", MethodSpec::Dora { spec: lora(3), true_derivative: false }),
        ("dora-true", MethodSpec::Dora { spec: lora(3), true_derivative: true }),
        ("moslora", MethodSpec::Moslora { spec: lora(5), mixer: MixerInit::Kaiming }),
        ("paca", MethodSpec::Paca(PacaSpec { rank: 5, ..PacaSpec::default() })),
        ("spft", MethodSpec::Spft(SpftSpec { share: 0.05 })),
        (
            "paca-scaled",
            MethodSpec::Paca(PacaSpec { rank: 5, alpha: Some(7.0), ..PacaSpec::default() }),
        ),
    ];
    let mut all: Vec<(&'static str, Model<T>)> = specs
        .into_iter()
        .map(|(name, spec)| {
            let mut model = model(3);
            model.attach(&AdapterPlan::everywhere(&Projection::ALL, spec), &mut rng(4)).unwrap();
            (name, model)
        })
        .collect();
    let mut everything = model(3);
    everything.train_fully();
    all.push(("everything", everything));
    let mut s2ft = model(3);
    s2ft.attach_s2ft(&s2ft_everywhere(), None, &mut rng(5)).unwrap();
    all.push(("s2ft", s2ft));
    for (name, model) in &mut all {
        if name.contains("lora") || name.contains("dora") {
            leave_the_start(model);
        }
    }
    all
}

pub fn s2ft_everywhere() -> S2ftSpec {
    S2ftSpec {
        ratios: [0.4, 0.4, 0.4, 0.5, 0.2, 0.2, 0.3],
        scope: Scope::EachLayer,
        ..S2ftSpec::default()
    }
}

/// Moves adapters off their start, where B = 0 makes half of their gradients vanish.
pub fn leave_the_start<T: Real>(model: &mut Model<T>) {
    let mut rng = rng(17);
    model
        .for_each_trainable(&mut |_, values| {
            values.mapv_inplace(|x| x + T::of(0.3 * (rng.random::<f64>() - 0.5)));
            Ok(())
        })
        .unwrap();
}

pub fn step<T: Real>(
    model: &Model<T>,
    batch: &Batch,
    options: &StepOptions,
) -> (StepOutput, Gradients<T>, Cost) {
    let (mut gradients, mut cost) = (model.zero_gradients(), Cost::default());
    let out = model.loss_and_gradients(batch, options, &mut gradients, &mut cost).unwrap();
    (out, gradients, cost)
}

pub fn logits<T: Real>(model: &Model<T>) -> Array2<T> {
    model.logits(batch().input_ids.view(), &mut Cost::default()).unwrap()
}

/// One step of a family as a float64 dump, from the reference; `fault` multiplies one gradient by
/// 1.01.
pub fn family_dump(case: &Path, full: bool, fault: bool) -> Option<tempfile::TempDir> {
    let reference = TensorFile::open(case.join("reference.safetensors")).unwrap();
    let prefix = if full { "grad." } else { "lora.grad." };
    let mut gradients: Vec<&str> =
        reference.names().filter(|name| name.starts_with(prefix)).collect();
    gradients.sort_unstable();
    // One that is there: a key bias without rotary embedding has no gradient.
    let there = |name: &&&str| {
        reference.tensor::<f64>(name, "test").unwrap().1.iter().any(|x| x.abs() > 1e-9)
    };
    let spoilt =
        *gradients[gradients.len() / 2..].iter().find(there).or(gradients.iter().find(there))?;
    let mut writer = TensorWriter::new();
    for name in ["input_ids", "labels", "attention_mask", "position_ids"] {
        if reference.contains(name) {
            let (shape, values) = reference.raw_tensor::<f64>(name, "test").unwrap();
            writer.tensor(name, &shape, values);
        }
    }
    let loss = if full { "loss" } else { "lora.loss" };
    writer.tensor("loss", &[1], reference.vector::<f64>(loss, "test").unwrap());
    if !full {
        for name in reference.names().filter(|name| name.starts_with("lora.after.")) {
            let (shape, values) = reference.tensor::<f64>(name, "test").unwrap();
            writer.tensor(&name["lora.".len()..], &shape, values);
        }
    }
    for name in gradients {
        let (shape, values) = reference.tensor::<f64>(name, "test").unwrap();
        let factor = if fault && name == spoilt { 1.01 } else { 1.0 };
        let ours = format!("grad.{}", &name[prefix.len()..]);
        writer.tensor(&ours, &shape, values.into_iter().map(|x| x * factor));
    }
    let folder = tempfile::tempdir().unwrap();
    writer.write(&folder.path().join("step.safetensors")).unwrap();
    let mut manifest = serde_json::json!({
        "format": "peft-limits-dump", "version": 1, "made_by": "test", "model": case,
        "compute": {"weights": "float64", "internals": "float64"}, "loss": {"reduction": "mean"},
    });
    if !full {
        manifest["adapter"] = serde_json::json!(case.join("adapter"));
    }
    std::fs::write(folder.path().join("manifest.json"), manifest.to_string()).unwrap();
    Some(folder)
}
