//! The predicted peak of a training step against a counting allocator, for every method.

use peak_alloc::PeakAlloc;
use peft_limits::cost::Cost;
use peft_limits::model::{Batch, Model, ModelConfig, StepOptions};
use peft_limits::streams::generator;
use peft_limits::train::memory::pytorch::{Kernel, TrainerShape, saved_tensors};
use peft_limits::train::memory::{Memory, StepShape, ledger, predict};
use peft_limits::train::method::{MethodName, MethodParams};
use peft_limits::train::optimizer::OptimizerParams;
use std::path::Path;

#[global_allocator]
static COUNTED: PeakAlloc = PeakAlloc;

fn config() -> ModelConfig {
    ModelConfig {
        vocab_size: 259,
        hidden_size: 128,
        intermediate_size: 344,
        num_hidden_layers: 4,
        num_attention_heads: 8,
        num_key_value_heads: 4,
        head_dim: 16,
        max_position_embeddings: 512,
        rms_norm_eps: 1e-5,
        rope_theta: 1e4,
        tie_word_embeddings: false,
        options: Default::default(),
    }
}

/// Largest peak of four settled steps over what was live before the model, and the ledger of the
/// next.
fn measured(config: &ModelConfig, method: &MethodParams, shape: &StepShape) -> (usize, Memory) {
    let before = COUNTED.current_usage();
    let mut model: Model<f32> =
        Model::random(config.clone(), &mut generator(1, "init/model", 0)).unwrap();
    method.apply(&mut model, None, 1).unwrap();
    let ids = ndarray::Array2::from_shape_fn((shape.batch, shape.length), |(b, t)| {
        ((b * 31 + t * 7) % 256) as u32
    });
    let labels = ids.mapv(i64::from);
    let batch = Batch::new(ids, labels).unwrap();
    let extra = batch.input_ids.len() * 4 + batch.labels.len() * 8;
    let mut gradients = model.zero_gradients();
    let mut optimizer = OptimizerParams::default().check::<f32>().unwrap();
    let options = StepOptions { divisor: None, checkpointing: shape.checkpointing };
    let mut peak = 0;
    for step in 0..6 {
        COUNTED.reset_peak_usage();
        model.loss_and_gradients(&batch, &options, &mut gradients, &mut Cost::default()).unwrap();
        // Buffers settle in two steps.
        peak = if step < 2 { 0 } else { peak.max(COUNTED.peak_usage()) };
        optimizer.begin_step();
        model
            .update(&gradients, &mut |t| {
                let (p, g) = (t.values.as_slice_mut().unwrap(), t.gradient.as_slice().unwrap());
                optimizer.update(t.name, p, g, 1e-3, 1.0)
            })
            .unwrap();
        gradients.fill_zero();
    }
    let ledger = ledger::measure(&model, &optimizer, &mut gradients, &batch, &options).unwrap();
    (peak - before - extra, ledger)
}

/// One test, so that nothing else allocates meanwhile.
#[test]
fn the_prediction_is_within_one_percent_for_every_method() {
    // Both pools live to the end: what the threads of a dropped one free later would be missed in a
    // count.
    let pools =
        [1, 2].map(|threads| rayon::ThreadPoolBuilder::new().num_threads(threads).build().unwrap());
    pools.iter().for_each(|pool| pool.install(every_method));
    pools[1].install(every_family);

    // S2FT's share of all layers together: which layers get how many is chance, their total is not.
    let method = MethodParams::named(MethodName::S2ft);
    let shape = StepShape { batch: 2, length: 32, bytes: 4, state: 2, checkpointing: false };
    let (_, ledger) = measured(&config(), &method, &shape);
    let memory = predict(&config(), &method, &shape).unwrap();
    assert_eq!(
        (memory.weights, memory.adapters, memory.gradients, memory.optimizer, memory.trained),
        (ledger.weights, ledger.adapters, ledger.gradients, ledger.optimizer, ledger.trained)
    );
}

fn every_method() {
    rayon_warm();
    let mut failures = Vec::new();
    for name in MethodName::ALL {
        for checkpointing in [false, true] {
            let method =
                MethodParams { each_layer: name == MethodName::S2ft, ..MethodParams::named(name) };
            let shape = StepShape { batch: 6, length: 256, bytes: 4, state: 2, checkpointing };
            let (got, ledger) = measured(&config(), &method, &shape);
            let memory = predict(&config(), &method, &shape).unwrap();
            let gap = memory.total() as f64 / got as f64 - 1.0;
            println!(
                "{:<8} checkpointing {checkpointing:<5}: predicted {:>10}, counted {got:>10}, \
                 {:+.2}%  ({} w {} a {} g {} o {} act {} ws)",
                name.name(),
                memory.total(),
                100.0 * gap,
                memory.weights,
                memory.adapters,
                memory.gradients,
                memory.optimizer,
                memory.activation_bytes(),
                memory.workspace
            );
            let read = ledger.total() as f64 / got as f64 - 1.0;
            println!("         ledger {:+.2}%", 100.0 * read);
            // What is at rest, and what is saved for backward, is predicted to the byte.
            assert_eq!(
                (memory.weights, memory.adapters, memory.gradients, memory.optimizer),
                (ledger.weights, ledger.adapters, ledger.gradients, ledger.optimizer),
                "{}",
                name.name()
            );
            assert_eq!(memory.trained, ledger.trained);
            assert_eq!(memory.activation_bytes(), ledger.activation_bytes(), "{}", name.name());
            // Elsewhere than on x86-64 each thread's packed blocks, (64 + inner) x width, come and
            // go with a product.
            let packed = if cfg!(target_arch = "x86_64") {
                0
            } else {
                rayon::current_num_threads() * 4 * 128 * (64 + 344)
            };
            let within = |total: usize| {
                let gap = total as f64 - got as f64;
                gap > -0.01 * got as f64 - packed as f64 && gap < 0.01 * got as f64
            };
            if !within(memory.total()) || !within(ledger.total()) {
                failures.push((name.name(), checkpointing, gap));
            }
        }
    }
    assert!(failures.is_empty(), "{failures:?}");
}

/// The sizes of [`config`] in another family.
fn family(model_type: &str, more: &str) -> ModelConfig {
    let text = format!(
        "{{\"model_type\": \"{model_type}\", \"vocab_size\": 259, \"hidden_size\": \
         128, \"intermediate_size\": 344,
        \"num_hidden_layers\": 4, \"num_attention_heads\": 8, \"num_key_value_heads\": \
        4, \"head_dim\": 16{more}}}"
    );
    ModelConfig::from_json(std::path::Path::new(model_type), &text).unwrap()
}

/// What a family adds to the step, it adds to the prediction.
fn every_family() {
    let families = [
        family("qwen2", ""),
        family("qwen3", ""),
        family("mistral", ", \"sliding_window\": 100"),
        family("gemma", ""),
        family("gemma2", ", \"sliding_window\": 100"),
        family("gemma3_text", ", \"sliding_window\": 100"),
        family("olmo2", ""),
        family("granite", ", \"residual_multiplier\": 0.5, \"embedding_multiplier\": 3.0"),
        family("smollm3", ""),
        family("phi3", ", \"partial_rotary_factor\": 0.5"),
        family("gpt_neox", ""),
        family("opt", ", \"ffn_dim\": 344"),
        family("gpt2", ", \"n_embd\": 128, \"n_head\": 4, \"n_layer\": 3"),
        family("mixtral", ", \"num_local_experts\": 4"),
        family(
            "qwen3_moe",
            ", \"num_experts\": 4, \"num_experts_per_tok\": 2, \"moe_intermediate_size\": 96",
        ),
        family("gpt_oss", ", \"num_local_experts\": 4, \"num_experts_per_tok\": 2"),
    ];
    let mut failures = Vec::new();
    for config in families {
        for name in [MethodName::Full, MethodName::Lora] {
            let method = MethodParams::named(name);
            let shape =
                StepShape { batch: 6, length: 256, bytes: 4, state: 2, checkpointing: false };
            let (got, ledger) = measured(&config, &method, &shape);
            let memory = predict(&config, &method, &shape).unwrap();
            let what = (config.options.family, name.name());
            println!("{what:?}: predicted {}, counted {got}", memory.total());
            assert_eq!(
                (memory.weights, memory.adapters),
                (ledger.weights, ledger.adapters),
                "{what:?}"
            );
            assert_eq!(
                (memory.gradients, memory.trained),
                (ledger.gradients, ledger.trained),
                "{what:?}"
            );
            assert_eq!(memory.activations, ledger.activations, "{what:?}");
            let gap = memory.total() as f64 / got as f64 - 1.0;
            // A batch does not send every expert the same number of rows, which the prediction
            // takes for granted.
            let allowed = if config.options.experts.is_some() { 0.04 } else { 0.01 };
            if gap.abs() >= allowed {
                failures.push((what, gap));
            }
        }
    }
    assert!(failures.is_empty(), "{failures:?}");
}

/// Starts the thread pool and multiplies on each thread by either kernel: its memory and the matrix
/// libraries' are not a step's.
fn rayon_warm() {
    rayon::broadcast(|_| {
        let a = ndarray::Array2::<f32>::ones((512, 512));
        for b in [a.view(), a.t()] {
            let c = peft_limits::linalg::gemm::product(a.view(), b, &mut Cost::default());
            assert!(c.iter().all(|x| (x - 512.0).abs() < 1e-3));
        }
    });
}

/// What autograd keeps in PyTorch, counted by hooks (`python/count_saved_tensors.py`), against the
/// prediction: equal to the byte in each part of each row.
#[test]
fn saved_tensors_of_pytorch_are_predicted() {
    let text = include_str!("data/memory/saved_tensors.csv");
    let mut lines = text.lines().filter(|line| !line.starts_with('#'));
    let names: Vec<&str> = lines.next().unwrap().split(',').collect();
    let (mut rows, mut wrong) = (0, Vec::new());
    for line in lines {
        let values: Vec<&str> = line.split(',').collect();
        let get = |name: &str| values[names.iter().position(|n| *n == name).unwrap()];
        let number = |name: &str| get(name).parse::<usize>().unwrap();
        let sizes = if get("size") == "large" {
            [32000, 4096, 11008, 2, 32, 32, 128]
        } else {
            [97, 64, 96, 3, 4, 2, 16]
        };
        let keys = [
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
        ];
        let mut json: serde_json::Map<String, serde_json::Value> =
            keys.into_iter().zip(sizes).map(|(key, size)| (key.to_string(), size.into())).collect();
        json.insert("model_type".into(), get("family").into());
        let config =
            ModelConfig::from_json(Path::new("row"), &serde_json::Value::Object(json).to_string())
                .unwrap();
        let method = match get("method") {
            "full" => MethodName::Full,
            "lora" => MethodName::Lora,
            "dora" => MethodName::Dora,
            other => panic!("{other}"),
        };
        let targets: Vec<String> = get("targets").split('+').map(String::from).collect();
        let targets = (method != MethodName::Full).then_some(targets);
        let method = MethodParams { rank: number("rank"), targets, ..MethodParams::named(method) };
        let bytes = |name: &str| if get(name) == "float32" { 4 } else { 2 };
        let shape = TrainerShape {
            batch: number("batch"),
            length: number("length"),
            bytes: bytes("dtype"),
            adapter_bytes: bytes("adapter_dtype"),
            kernel: if get("attention") == "eager" { Kernel::Eager } else { Kernel::Sdpa },
            checkpointing: get("checkpointing") == "1",
            prepared: get("base") == "nf4-prepared",
            ..TrainerShape::default()
        };
        let parts = saved_tensors(&config, &method, &shape).unwrap();
        let sum = |saved: &std::collections::BTreeMap<String, usize>| saved.values().sum::<usize>();
        let found = [sum(&parts.layers[0]), sum(&parts.layers[1]), sum(&parts.outside)];
        for (part, found) in ["first_layer", "other_layer", "outside"].into_iter().zip(found) {
            let counted = number(part);
            if found != counted {
                wrong.push(format!("{line}\n    {part}: predicted {found}, counted {counted}"));
            }
        }
        rows += 1;
    }
    assert!(rows >= 80 && wrong.is_empty(), "{rows} rows, wrong:\n{}", wrong.join("\n"));
}
