//! The closed forms of `paper-notes/cost-and-memory.md`, sections 2 and 3, to the multiply-add and
//! to the byte.

use crate::common::{self, batch, model, rng, step};
use peft_limits::adapters::moslora::MixerInit;
use peft_limits::adapters::paca::PacaSpec;
use peft_limits::model::s2ft::{S2ftSpec, Scope};
use peft_limits::model::{AdapterPlan, MethodSpec, Model, ModelConfig, Projection, StepOptions};
use peft_limits::train::memory::{Memory, StepShape, predict};
use peft_limits::train::method::{MethodName, MethodParams};
use peft_limits::train::preset::{llama_2_7b, preset};

const SHAPE: StepShape =
    StepShape { batch: 8, length: 512, bytes: 2, state: 2, checkpointing: false };

/// Numbers saved for backward by a model of which something is trained in every layer, embedding
/// and gains frozen. `inputs`: every projection's input is kept whole. `slices`: numbers a row that
/// the method keeps of its own, all layers together. `first`: numbers a row that the first layer
/// does without.
fn saved_numbers(config: &ModelConfig, inputs: bool, slices: usize, first: usize) -> usize {
    let (d, f, h) = (config.hidden_size, config.intermediate_size, config.num_attention_heads);
    let (query, key) = (h * config.head_dim, config.num_key_value_heads * config.head_dim);
    let kept = 2 * d + 2 + 2 * query + 2 * key + h + 2 * f + if inputs { 2 * d + f } else { 0 };
    let last = 2 * d + 1;
    let rows = SHAPE.batch * SHAPE.length;
    rows * (config.num_hidden_layers * kept - first + slices + last)
        + SHAPE.length * config.head_dim
}

fn of(config: &ModelConfig, name: MethodName) -> Memory {
    predict(config, &MethodParams::named(name), &SHAPE).unwrap()
}

#[test]
fn saved_activations() {
    for config in [llama_2_7b(), preset("micro").unwrap()] {
        let d = config.hidden_size;
        // What the first layer's input norm would need: nothing is trained below it.
        let below = d + 1;
        let columns = config.num_hidden_layers * 7 * 8;
        for (name, inputs, slices, first) in [
            (MethodName::Lora, true, columns, below),
            (MethodName::Moslora, true, columns, below),
            (MethodName::Full, true, 0, 0),
            (MethodName::Dora, true, 0, below),
            (MethodName::Paca, false, columns, below),
            (MethodName::Qpaca, false, columns, below),
        ] {
            let want = 2 * saved_numbers(&config, inputs, slices, first);
            assert_eq!(of(&config, name).activation_bytes(), want, "{name:?}, {d} wide");
        }
    }
    // S2FT on o and down of every layer: the first one's attention has nothing trained before its
    // output.
    let config = llama_2_7b();
    let (d, columns) =
        (config.hidden_size, of(&config, MethodName::S2ft).trained / config.hidden_size);
    let first = d + 1 + 4 * d + config.num_attention_heads;
    let want = 2 * saved_numbers(&config, false, columns, first);
    assert_eq!(of(&config, MethodName::S2ft).activation_bytes(), want);
}

/// The worked example of the page.
#[test]
fn numbers_at_rest() {
    let config = llama_2_7b();
    let shapes = Projection::ALL.map(|p| config.projection_shape(p));
    let sums = shapes
        .iter()
        .fold((0, 0, 0), |(both, out, all), &(o, i)| (both + o + i, out + o, all + o * i));
    assert_eq!(sums, (78_080, 42_496, 202_375_168));
    let lora = of(&config, MethodName::Lora);
    assert_eq!(lora.trained, 32 * 8 * 78_080);
    assert_eq!(lora.weights, 2 * (2 * 32_000 * 4096 + 32 * (2 * 4096 + 202_375_168) + 4096));
    assert_eq!(
        [lora.adapters, lora.gradients, lora.optimizer],
        [1, 1, 2].map(|n| 2 * n * lora.trained)
    );
    let paca = of(&config, MethodName::Paca);
    assert_eq!(paca.trained, 32 * 8 * 42_496);
    assert_eq!(
        [paca.adapters, paca.gradients, paca.optimizer],
        [1, 1, 2].map(|n| 2 * n * paca.trained)
    );
    // 53 of 1024 heads of 128 columns, 7045 of 352256 channels.
    assert_eq!(of(&config, MethodName::S2ft).trained, 4096 * (53 * 128 + 7045));
}

/// The table of section 2: multiply-adds of a step beyond those of PaCA with one column.
#[test]
fn operations_of_a_step() {
    const N: u64 = 26;
    const LAYERS: u64 = 3;
    let cost = |spec: MethodSpec| {
        let mut model: Model<f64> = model(3);
        model.attach(&AdapterPlan::everywhere(&Projection::ALL, spec), &mut rng(4)).unwrap();
        step(&model, &batch(), &StepOptions::default()).2.multiply_adds
    };
    let paca = |rank| cost(MethodSpec::Paca(PacaSpec { rank, ..PacaSpec::default() }));
    let shapes = Projection::ALL.map(|p| common::config().projection_shape(p));
    let sum = |f: &dyn Fn(u64, u64) -> u64| {
        LAYERS * shapes.iter().map(|&(o, i)| f(o as u64, i as u64)).sum::<u64>()
    };
    // Without any method's own products.
    let frozen = paca(5) - sum(&|out, _| N * 5 * out);
    assert_eq!(paca(3), frozen + sum(&|out, _| N * 3 * out));
    // The first layer's q, k, v pass nothing on: no dx through A.
    let r = 5;
    let not_passed = 3 * N * r * 24;
    let lora = sum(&|out, input| 3 * N * r * (input + out)) - not_passed;
    assert_eq!(cost(MethodSpec::Full), frozen + sum(&|out, input| N * out * input));
    assert_eq!(cost(MethodSpec::Lora(common::lora(5))), frozen + lora);
    let moslora = MethodSpec::Moslora { spec: common::lora(5), mixer: MixerInit::Kaiming };
    assert_eq!(cost(moslora), frozen + lora + sum(&|out, _| 4 * r * r * out));
    let dora = MethodSpec::Dora { spec: common::lora(5), true_derivative: false };
    assert_eq!(cost(dora), frozen + sum(&|out, input| N * out * input + 4 * r * out * input));
}

/// S2FT: c columns of down cost N c out, c rows of up N c in; 7 more of 34 channels in each of 3
/// layers.
#[test]
fn operations_of_slices() {
    let cost = |up: f64, down: f64| {
        let ratios = [0.0, 0.0, 0.0, 0.34, 0.0, up, down];
        let mut model: Model<f64> = model(3);
        let spec = S2ftSpec { ratios, scope: Scope::EachLayer, ..S2ftSpec::default() };
        model.attach_s2ft(&spec, None, &mut rng(1)).unwrap();
        step(&model, &batch(), &StepOptions::default()).2.multiply_adds
    };
    let seven = 3 * 26 * 7 * 24;
    assert_eq!(cost(0.1, 0.3) - cost(0.1, 0.1), seven);
    assert_eq!(cost(0.3, 0.1) - cost(0.1, 0.1), seven);
}
