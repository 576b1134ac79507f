//! Training steps on a device against the CPU's float64, for every method (a software device will
//! do).
use crate::chosen::{data as folder, on_device};
use ndarray::{Array2, s};
use peft_limits::adapters::Method;
use peft_limits::adapters::s2ft::Side;
use peft_limits::blocks::causal_attention::{AttentionCache, AttentionShape, Visibility};
use peft_limits::blocks::causal_attention::{causal_attention_backward, causal_attention_forward};
use peft_limits::check::compare::assert_close;
use peft_limits::cost::Cost;
use peft_limits::gpu::train::blocks::causal_attention as tiled;
use peft_limits::gpu::train::{DeviceGradients, DeviceModel, DeviceOptimizer, train_on};
use peft_limits::gpu::{Engine, Opened, Precision};
use peft_limits::linalg::Scratch;
use peft_limits::model::{Batch, Model, Projection, StepOptions};
use peft_limits::tensor_file::TensorFile;
use peft_limits::train::checkpoint;
use peft_limits::train::config::TrainConfig;
use peft_limits::train::method::{MethodName, MethodParams};
use peft_limits::train::optimizer::{Optimizer, OptimizerKind, OptimizerParams, update_model};
use peft_limits::train::preset::preset;
use peft_limits::train::trainer::Trainer;
use rand::{RngExt, SeedableRng};
use std::sync::atomic::AtomicBool;

/// Agreement asked of losses and gradients, relative (Frobenius) per tensor.
const TOLERANCE: f64 = 1e-4;
/// Agreement of weights after AdamW. It divides each entry by its own size, so where a gradient is
/// as small as its rounding error the update has that error's sign: single entries move by up to 2
/// lr. The CPU's own f32 is held to the same 1e-3 in `tests/training/llama_fixtures.rs`.
const AFTER_ADAMW: f64 = 1e-3;

fn batch(name: &str) -> Batch {
    let file = TensorFile::open(folder(name).join("reference.safetensors")).unwrap();
    let ids = file.matrix::<f64>("input_ids", "test").unwrap().mapv(|x| x as u32);
    let labels = file.matrix::<f64>("labels", "test").unwrap().mapv(|x| x as i64);
    Batch::new(ids, labels).unwrap()
}

fn full(name: &str) -> Model<f64> {
    let mut model = Model::read(&folder(name)).unwrap();
    model.train_fully();
    model
}

fn of_peft(name: &str) -> Model<f64> {
    let mut model = Model::read(&folder(name)).unwrap();
    model.read_adapter(&folder(name).join("adapter")).unwrap();
    model
}

/// A method on the checkpoint of `llama_full`; a factor that starts at zero is moved away from it,
/// so that every gradient is there to be compared.
fn adapted(params: &MethodParams) -> Model<f64> {
    let mut model: Model<f64> = Model::read(&folder("llama_full")).unwrap();
    params.apply(&mut model, None, 5).unwrap();
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(11);
    model
        .for_each_trainable(&mut |_, values| {
            if values.iter().all(|x| x.abs() < 1e-300) {
                values.mapv_inplace(|_| 0.2 * (rng.random::<f64>() - 0.5));
            }
            Ok(())
        })
        .unwrap();
    model
}

fn method(name: MethodName) -> MethodParams {
    MethodParams { rank: 3, ..MethodParams::named(name) }
}

fn device_step<B: Engine>(
    model: &DeviceModel<B>,
    batch: &Batch,
    options: &StepOptions,
) -> (f64, DeviceGradients<B>) {
    let mut gradients = model.zero_gradients();
    let loss = model.loss_and_gradients(batch, options, &mut gradients, None).unwrap();
    (loss.read(model.on()).unwrap(), gradients)
}

/// Loss, every gradient, `steps` updates, and the frozen weights afterwards.
fn check(model: Model<f64>, batch: &Batch, params: OptimizerParams, steps: usize) {
    on_device!(on => check_on(on, model, batch, params, steps));
}

fn check_on<B: Engine>(
    on: &Opened<B>,
    mut model: Model<f64>,
    batch: &Batch,
    params: OptimizerParams,
    steps: usize,
) {
    let mut there = DeviceModel::upload(&model, on).unwrap();
    let before = weights(&there, &model);
    let mut gradients = model.zero_gradients();
    let (options, mut cost) = (StepOptions::default(), Cost::default());
    let mut optimizer: Optimizer<f64> = params.check().unwrap();
    let mut device_optimizer = DeviceOptimizer::upload(&optimizer);
    let mut worst: (f64, String) = (0.0, String::new());
    for step in 0..steps.max(1) {
        gradients.fill_zero();
        let want =
            model.loss_and_gradients(batch, &options, &mut gradients, &mut cost).unwrap().loss;
        let (loss, found) = device_step(&there, batch, &options);
        assert!((loss - want).abs() <= TOLERANCE * want, "loss {loss} against {want}");
        if step == 0 {
            let found = found.download(on).unwrap();
            let (names, want): (Vec<_>, Vec<_>) = gradients.named().into_iter().unzip();
            assert_eq!(found.iter().map(|(name, _)| name.clone()).collect::<Vec<_>>(), names);
            for ((name, found), want) in found.iter().zip(want) {
                let found = found.mapv(f64::from);
                let gap = (&found - &want).mapv(|x| x * x).sum().sqrt()
                    / want.mapv(|x| x * x).sum().sqrt();
                if gap > worst.0 {
                    worst = (gap, name.clone());
                }
                assert_close(name, &found.view(), &want, TOLERANCE);
            }
            let norm = device_step(&there, batch, &options).1.norm(on).unwrap();
            assert!((norm / gradients.norm() - 1.0).abs() < TOLERANCE);
        }
        if steps > 0 {
            update_model(&mut optimizer, &mut model, &gradients, params.lr, 0.9, |_| ()).unwrap();
            device_optimizer.update(&mut there, found, params.lr, 0.9).unwrap();
        }
    }
    println!("worst gradient: {:.1e} of {} ({})", worst.0, worst.1, on.info);
    let mut back = model.clone();
    there.download(&mut back).unwrap();
    for ((name, found), (_, want)) in back.acting_values().iter().zip(model.acting_values()) {
        assert_close(name, &found.view(), &want.view(), AFTER_ADAMW);
    }
    check_frozen(&before, &weights(&there, &model), &model);
}

fn weights<B: Engine>(there: &DeviceModel<B>, model: &Model<f64>) -> Vec<[Array2<f32>; 7]> {
    let layers = 0..model.layers.len();
    layers.map(|l| Projection::ALL.map(|p| there.projection_weight(l, p).unwrap())).collect()
}

/// What a method does not train has the same bits as before.
fn check_frozen(before: &[[Array2<f32>; 7]], after: &[[Array2<f32>; 7]], model: &Model<f64>) {
    for (l, layer) in model.layers.iter().enumerate() {
        for (at, p) in Projection::ALL.into_iter().enumerate() {
            let (before, after) = (&before[l][at], &after[l][at]);
            for ((i, j), x) in before.indexed_iter() {
                let trained = match &layer.projection(p).method {
                    Method::Full => true,
                    Method::Paca(paca) => paca.index.contains(&j),
                    Method::S2ft(slice) => {
                        slice.range.contains(if slice.side == Side::Output { &i } else { &j })
                    }
                    _ => false,
                };
                assert!(
                    trained || x.to_bits() == after[[i, j]].to_bits(),
                    "layer {l} {} [{i}, {j}]",
                    p.module()
                );
            }
        }
    }
}

fn adamw() -> OptimizerParams {
    OptimizerParams { lr: 1e-2, weight_decay: 0.01, ..OptimizerParams::default() }
}

#[test]
fn full_fine_tuning() {
    check(full("llama_full"), &batch("llama_full"), adamw(), 3);
}

#[test]
fn tied_embeddings_without_grouped_queries() {
    check(full("llama_full_mha_tied"), &batch("llama_full_mha_tied"), adamw(), 3);
}

#[test]
fn lora_of_peft() {
    check(of_peft("llama_lora"), &batch("llama_lora"), adamw(), 3);
}

#[test]
fn dora_of_peft_with_its_constant_norm() {
    check(of_peft("llama_dora"), &batch("llama_dora"), adamw(), 3);
}

#[test]
fn dora_with_its_true_derivative() {
    let mut model = of_peft("llama_dora");
    for layer in &mut model.layers {
        for p in Projection::ALL {
            if let Method::Dora(dora) = &mut layer.projection_mut(p).method {
                dora.true_derivative = true;
            }
        }
    }
    check(model, &batch("llama_dora"), adamw(), 0);
}

#[test]
fn moslora_paca_and_s2ft() {
    let batch = batch("llama_full");
    check(adapted(&method(MethodName::Moslora)), &batch, adamw(), 3);
    check(
        adapted(&MethodParams { alpha: Some(6.0), ..method(MethodName::Paca) }),
        &batch,
        adamw(),
        3,
    );
    // Both sides of slices: rows of q, v, gate and up, columns of o and down.
    let ratios = ["q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
        .map(|p| (p.to_string(), 0.3));
    let s2ft =
        MethodParams { ratios: Some(ratios.into()), ..MethodParams::named(MethodName::S2ft) };
    check(adapted(&s2ft), &batch, adamw(), 3);
}

#[test]
fn descent_with_and_without_momentum() {
    let batch = batch("llama_lora");
    for momentum in [0.0, 0.9] {
        let sgd = OptimizerParams {
            kind: OptimizerKind::Sgd,
            lr: 0.05,
            momentum,
            weight_decay: 0.1,
            ..adamw()
        };
        check(of_peft("llama_lora"), &batch, sgd, 2);
    }
}

/// Only the upper layer's projections are adapted: what lies below has no backward.
#[test]
fn nothing_is_kept_below_the_first_trainable_tensor() {
    let mut model = adapted(&MethodParams {
        targets: Some(vec!["down_proj".into()]),
        ..method(MethodName::Lora)
    });
    model.layers[0].projection_mut(Projection::Down).method = Method::Frozen;
    let batch = batch("llama_full");
    on_device!(on => {
        let there = DeviceModel::upload(&model, on).unwrap();
        let pass = there.forward(&batch, &StepOptions::default(), &mut there.zero_gradients(), None).unwrap();
        let saved = pass.saved_bytes_by_name();
        assert!(saved.iter().all(|(name, _)| !name.starts_with("model.layers.0")), "{saved:?}");
    });
    check(model, &batch, adamw(), 1);
}

/// The device keeps the tensors that the CPU's ledger names, of the same sizes in numbers.
#[test]
fn the_saved_tensors_are_those_of_the_cpu() {
    let batch = batch("llama_full");
    for name in
        [MethodName::Full, MethodName::Lora, MethodName::Dora, MethodName::Paca, MethodName::S2ft]
    {
        let model = adapted(&method(name));
        for checkpointing in [false, true] {
            let options = StepOptions { checkpointing, ..StepOptions::default() };
            let mut found = on_device!(on => {
                let there = DeviceModel::upload(&model, on).unwrap();
                let pass = there.forward(&batch, &options, &mut there.zero_gradients(), None).unwrap();
                pass.saved_bytes_by_name()
            });
            let mut cost = Cost::default();
            let pass =
                model.forward(&batch, &options, &mut model.zero_gradients(), &mut cost).unwrap();
            let mut want = pass.saved_bytes_by_name();
            want.iter_mut().for_each(|(_, bytes)| *bytes /= 2);
            found.sort();
            want.sort();
            assert_eq!(found, want, "{}", name.name());
        }
    }
}

#[test]
fn checkpointing_changes_no_bit() {
    let batch = batch("llama_lora");
    on_device!(on => {
        let there = DeviceModel::upload(&of_peft("llama_lora"), on).unwrap();
        let gradients = |checkpointing| {
            let options = StepOptions { checkpointing, ..StepOptions::default() };
            device_step(&there, &batch, &options).1.download(on).unwrap()
        };
        assert_eq!(gradients(false), gradients(true));
    });
}

#[test]
fn partial_gradients_are_slices_of_the_full_one() {
    let batch = batch("llama_full");
    for name in [MethodName::Paca, MethodName::S2ft] {
        let model = adapted(&method(name));
        let mut whole = model.clone();
        for layer in &mut whole.layers {
            for p in Projection::ALL {
                layer.projection_mut(p).method = Method::Full;
            }
        }
        let gradients = |model: &Model<f64>| {
            on_device!(on => {
                let there = DeviceModel::upload(model, on).unwrap();
                device_step(&there, &batch, &StepOptions::default()).1.download(on).unwrap()
            })
        };
        let (part, whole) = (gradients(&model), gradients(&whole));
        let mut seen = 0;
        for (l, layer) in model.layers.iter().enumerate() {
            for p in Projection::ALL {
                let path = format!("model.layers.{l}.{}", p.path());
                let of = |all: &[(String, Array2<f32>)], tensor: &str| {
                    let name = format!("{path}.{tensor}");
                    all.iter().find(|(n, _)| *n == name).map(|(_, g)| g.mapv(f64::from)).unwrap()
                };
                let (found, want) = match &layer.projection(p).method {
                    Method::Paca(paca) => {
                        let whole = of(&whole, "weight").select(ndarray::Axis(1), &paca.index);
                        (of(&part, "paca_columns"), whole * paca.scaling)
                    }
                    Method::S2ft(slice) => {
                        let whole = of(&whole, "weight");
                        let range = slice.range.clone();
                        let want = match slice.side {
                            Side::Output => whole.slice(s![range, ..]).to_owned(),
                            Side::Input => whole.slice(s![.., range]).to_owned(),
                        };
                        (of(&part, "s2ft_slice"), want)
                    }
                    _ => continue,
                };
                assert_close(&path, &found.view(), &want.view(), 1e-6);
                seen += 1;
            }
        }
        assert!(seen > 0);
    }
}

/// What rounding the operands of every product costs a whole step, for the precisions that the
/// device has.
#[test]
fn steps_with_rounded_products_cost_what_their_bits_say() {
    let (model, batch) = (of_peft("llama_lora"), batch("llama_lora"));
    let mut want = model.zero_gradients();
    let exact = model
        .loss_and_gradients(&batch, &StepOptions::default(), &mut want, &mut Cost::default())
        .unwrap()
        .loss;
    let squares = |all: &[Array2<f64>]| all.iter().map(|g| g.mapv(|x| x * x).sum()).sum::<f64>();
    let want: Vec<Array2<f64>> = want.named().into_iter().map(|(_, g)| g.to_owned()).collect();
    for products in Precision::ALL {
        let (least, most) = match products {
            Precision::F32 => (0.0, TOLERANCE),
            // 11 bits of significand; a dozen products stand between a gradient and the ids.
            Precision::Tf32 | Precision::F16 => (1e-5, 2e-2),
            Precision::Bf16 => (1e-4, 1e-1),
        };
        on_device!(on => {
            let there = match DeviceModel::upload(&model, on).unwrap().with_products(products) {
                Ok(there) => there,
                Err(error) => {
                    assert!(products != Precision::F32 && error.to_string().contains(&products.to_string()), "{error}");
                    continue;
                }
            };
            let (loss, found) = device_step(&there, &batch, &StepOptions::default());
            let found = found.download(on).unwrap().into_iter().map(|(_, g)| g.mapv(f64::from));
            let gaps: Vec<Array2<f64>> = found.zip(&want).map(|(found, want)| found - want).collect();
            let gap = (squares(&gaps) / squares(&want)).sqrt();
            println!("{products} products: gradients off by {gap:.1e}, loss by \
                      {:.1e}", (loss - exact).abs() / exact);
            assert!((least..=most).contains(&gap), "{products}: {gap:e}");
            assert!((loss - exact).abs() <= most * exact, "{products}: {loss} against {exact}");
        });
    }
}

#[test]
fn padding_and_given_positions() {
    let (ids, labels) = (batch("llama_lora").input_ids, batch("llama_lora").labels);
    let (rows, length) = ids.dim();
    // Padding on the left of one row and on the right of the next.
    let mask =
        Array2::from_shape_fn(
            (rows, length),
            |(b, t)| if b % 2 == 0 { t >= 3 } else { t + 2 < length },
        );
    let labels =
        Array2::from_shape_fn((rows, length), |at| if mask[at] { labels[at] } else { -100 });
    let positions = Array2::from_shape_fn(
        (rows, length),
        |(b, t)| if b % 2 == 0 { t.saturating_sub(3) } else { t } as u32,
    );
    let padded = Batch::new(ids, labels).unwrap().with_attention_mask(mask).unwrap();
    check(of_peft("llama_lora"), &padded.with_position_ids(positions).unwrap(), adamw(), 1);
}

#[test]
fn several_attention_tiles_agree_with_the_cpu() {
    on_device!(on => check_attention_tiles(on));
}

fn check_attention_tiles<B: Engine>(on: &Opened<B>) {
    let shape = AttentionShape { batch: 2, length: 13, heads: 6, kv_heads: 2, head_dim: 4 };
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(3);
    let mut random = |heads: usize| {
        Array2::from_shape_simple_fn((26, heads * 4), || rng.random::<f64>() * 2.0 - 1.0)
    };
    let (query, key, value, upstream) = (random(6), random(2), random(2), random(6));
    let exact = Precision::F32;
    let keys = Array2::from_shape_fn((2, 13), |(b, t)| b == 1 || t != 0 && t != 7);
    for mask in [None, Some(keys.view())] {
        let visible = Visibility { keys: mask, ..Visibility::default() };
        let (scratch, cost) = (&mut Scratch::default(), &mut Cost::default());
        let (output, lse) = causal_attention_forward(
            query.view(),
            key.view(),
            value.view(),
            shape,
            visible,
            0.5,
            scratch,
            cost,
        )
        .unwrap();
        let cache = AttentionCache {
            query: query.view(),
            key: key.view(),
            value: value.view(),
            output: output.view(),
            log_sum_exp: lse.view(),
        };
        let want =
            causal_attention_backward(upstream.view(), &cache, shape, visible, 0.5, scratch, cost)
                .unwrap();
        let padding = mask.map(|mask| tiled::Padding::upload(mask, &shape, &on.device));
        for tile in [1, 4, 13] {
            let queries =
                |x: &Array2<f64>| tiled::split_queries(on.upload("x", x.view()).unwrap(), &shape);
            let keys =
                |x: &Array2<f64>| tiled::split_keys(on.upload("x", x.view()).unwrap(), &shape);
            let (q, k, v) = (queries(&query), keys(&key), keys(&value));
            let (o, lse) = tiled::causal_attention_forward(
                &q,
                &k,
                &v,
                &shape,
                padding.as_ref(),
                0.5,
                tile,
                exact,
            );
            let saved = tiled::AttentionSaved { query: q, key: k, value: v, log_sum_exp: lse };
            let g = queries(&upstream);
            let (dq, dk, dv) = tiled::causal_attention_backward(
                g,
                saved,
                o.clone(),
                &shape,
                padding.as_ref(),
                0.5,
                tile,
                exact,
            );
            let found = [
                ("output", tiled::join_queries(o, &shape), &output),
                ("dquery", tiled::join_queries(dq, &shape), &want.0),
                ("dkey", tiled::join_keys(dk, &shape), &want.1),
                ("dvalue", tiled::join_keys(dv, &shape), &want.2),
            ];
            for (name, found, want) in found {
                let found = on.download(found).unwrap().mapv(f64::from);
                assert_close(name, &found.view(), &want.view(), 1e-5);
            }
        }
    }
}

#[test]
fn bad_batches_are_refused_before_anything_is_sent() {
    let good = batch("llama_full");
    let mut bad = good.clone();
    bad.input_ids[[0, 1]] = 1_000_000;
    let refused = |batch: &Batch| {
        on_device!(on => {
            let there = DeviceModel::upload(&full("llama_full"), on).unwrap();
            let outcome = there.forward(batch, &StepOptions::default(), &mut there.zero_gradients(), None);
            outcome.err().unwrap().to_string()
        })
    };
    assert!(refused(&bad).contains("input_ids[1] = 1000000"), "{}", refused(&bad));
    let mut ignored = good;
    ignored.labels.fill(-100);
    assert!(refused(&ignored).contains("at least one position"), "{}", refused(&ignored));
}

/// A run on the device follows the CPU's, and continues from a checkpoint with the same bits.
#[test]
fn a_resumed_run_continues_bit_for_bit() {
    let folder = tempfile::tempdir().unwrap();
    let (base, runs) = (folder.path().join("base"), folder.path().join("runs"));
    let mut rng = rand_chacha::ChaCha8Rng::seed_from_u64(2);
    Model::<f32>::random(preset("pico").unwrap(), &mut rng).unwrap().write(&base).unwrap();
    let text = format!(
        "[model]\npath = {base:?}\n[method]\nname = \"paca\"\nrank = 4\nalpha = \
         6.0\n[optimizer]\nclip = 1.0\n[train]\nsteps = 4\nbatch = 2\nlength = 48\ntruncate = \
         true\neval_rows = 0\nsave_every = 2\n[[data]]\ntask = \"lists\"\n"
    );
    let config = TrainConfig::from_toml("run.toml", &text).unwrap();
    let device = crate::chosen::device();
    let stop = AtomicBool::new(false);
    let run = |resume: bool, there: bool| {
        let mut trainer = Trainer::<f32>::new(config.clone()).unwrap();
        if resume {
            checkpoint::resume(&mut trainer, &runs).unwrap();
        }
        if there {
            train_on(&mut trainer, &device, Precision::F32).unwrap();
        }
        trainer.run(there.then_some(runs.as_path()), &mut [], &stop).unwrap();
        assert_eq!((trainer.steps_done(), trainer.optimizer.steps()), (4, 4));
        trainer.model.acting_values()
    };
    let whole = run(false, true);
    std::fs::remove_dir_all(runs.join("step-00000004")).unwrap();
    assert_eq!(run(true, true), whole);
    for ((name, found), (_, want)) in whole.iter().zip(run(false, false)) {
        let (found, want) = (found.mapv(f64::from), want.mapv(f64::from));
        assert_close(name, &found.view(), &want.view(), AFTER_ADAMW);
    }
}

#[test]
fn what_a_device_cannot_do_is_refused() {
    let text = "[model]\npreset = \"pico\"\n[train]\nbf16_storage = true\n";
    let device = crate::chosen::device();
    let config = TrainConfig::from_toml("run.toml", text).unwrap();
    let mut trainer = Trainer::<f32>::new(config.clone()).unwrap();
    assert!(
        train_on(&mut trainer, &device, Precision::F32)
            .unwrap_err()
            .to_string()
            .contains("bf16_storage")
    );
    let mut trainer = Trainer::<f64>::new(config).unwrap();
    assert!(
        train_on(&mut trainer, &device, Precision::F32).unwrap_err().to_string().contains("f32")
    );
    let model = adapted(&MethodParams { rank: 3, ..MethodParams::named(MethodName::Qlora) });
    let refused = on_device!(on => DeviceModel::upload(&model, on).err().unwrap().to_string());
    assert!(refused.contains("packed"), "{refused}");
}
