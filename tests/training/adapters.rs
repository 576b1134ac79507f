//! Every adaptation method: its gradients, its start, merging, files, and what it must not touch.

use crate::common::*;
use ndarray::{Array2, Axis};
use peft_limits::Error;
use peft_limits::adapters::paca::{Paca, PacaSpec};
use peft_limits::adapters::selection::{ColumnRule, Order, Score};
use peft_limits::adapters::spft::SpftSpec;
use peft_limits::adapters::{BaseWeight, Method, PackedWeight};
use peft_limits::check::compare::{assert_close, gap};
use peft_limits::check::finite_differences::{central_differences, observed_order};
use peft_limits::cost::Cost;
use peft_limits::model::s2ft::{S2ftSpec, Scope};
use peft_limits::model::{AdapterPlan, Gradients, MethodSpec, Model, Projection, StepOptions};
use peft_limits::precision::Precision;
use rand::RngExt;
use std::collections::HashMap;
use std::sync::Arc;

/// (derivative along a random direction from the gradients, central differences of the loss along
/// it); tensors whose name does not end in `suffix` are left alone.
fn directional(model: &Model<f64>, suffix: &str, seed: u64, h: f64) -> (f64, [f64; 3]) {
    let data = batch();
    let (_, gradients, _) = step(model, &data, &StepOptions::default());
    let mut rng = rng(seed);
    let directions: HashMap<String, Array2<f64>> = gradients
        .named()
        .into_iter()
        .filter(|(name, _)| name.ends_with(suffix))
        .map(|(name, g)| (name, g.mapv(|_| rng.random::<f64>() - 0.5)))
        .collect();
    assert!(!directions.is_empty(), "no tensor ends in {suffix}");
    let exact = gradients
        .named()
        .iter()
        .filter_map(|(name, g)| Some((directions.get(name)? * g).sum()))
        .sum();
    let estimates = central_differences(
        |t| {
            let mut moved = model.clone();
            moved
                .for_each_trainable(&mut |name, values| {
                    if let Some(direction) = directions.get(name) {
                        values.scaled_add(t, direction);
                    }
                    Ok(())
                })
                .unwrap();
            moved.loss(&data, &mut Cost::default()).unwrap()
        },
        h,
    );
    (exact, estimates)
}

#[test]
fn gradients_of_every_method_are_derivatives() {
    for (name, model) in every_method::<f64>() {
        // PEFT's DoRA holds the norm constant, so only its magnitudes have true derivatives.
        let suffix = if name == "dora" { "lora_magnitude_vector" } else { "" };
        let (exact, estimates) = directional(&model, suffix, 21, 2e-3);
        let order = observed_order(&estimates, exact);
        assert!((order - 2.0).abs() < 0.2, "{name}: order {order}, {estimates:?} against {exact}");
        let error = (estimates[2] - exact).abs();
        assert!(error < 1e-4 * exact.abs().max(1e-3), "{name}: {estimates:?} against {exact}");
    }
}

/// The constant norm is an approximation; were it the true derivative this test would say so.
#[test]
fn the_constant_norm_of_dora_is_not_a_derivative() {
    let models = every_method::<f64>();
    let dora = &models.iter().find(|(name, _)| *name == "dora").unwrap().1;
    let (exact, estimates) = directional(dora, "lora_B", 22, 1e-3);
    assert!((estimates[2] - exact).abs() > 1e-3 * exact.abs(), "{estimates:?} against {exact}");
}

fn full_gradients(model: &Model<f64>) -> Gradients<f64> {
    let mut full = model.clone();
    let plan = AdapterPlan::everywhere(&Projection::ALL, MethodSpec::Full);
    full.attach(&plan, &mut rng(0)).unwrap();
    step(&full, &batch(), &StepOptions::default()).1
}

#[test]
fn paca_gradients_are_columns_of_the_full_gradient() {
    let full = full_gradients(&model(3));
    for (name, model) in
        every_method::<f64>().into_iter().filter(|(name, _)| name.starts_with("paca"))
    {
        let (_, gradients, _) = step(&model, &batch(), &StepOptions::default());
        for (l, layer) in model.layers.iter().enumerate() {
            for p in Projection::ALL {
                let Method::Paca(paca) = &layer.projection(p).method else {
                    panic!("attached everywhere")
                };
                let want =
                    full.layers[l].projections[&p][0].select(Axis(1), &paca.index) * paca.scaling;
                let got = &gradients.layers[l].projections[&p][0];
                assert_close(&format!("{name} {l} {p:?}"), &got.view(), &want.view(), 1e-12);
            }
        }
    }
}

#[test]
fn spft_gradients_are_entries_of_the_full_gradient() {
    let full = full_gradients(&model(3));
    let (_, model) = every_method::<f64>().into_iter().find(|(name, _)| *name == "spft").unwrap();
    let (_, gradients, _) = step(&model, &batch(), &StepOptions::default());
    for (l, layer) in model.layers.iter().enumerate() {
        for p in Projection::ALL {
            let Method::Spft(spft) = &layer.projection(p).method else {
                panic!("attached everywhere")
            };
            let whole = &full.layers[l].projections[&p][0];
            let want: Vec<f64> =
                spft.index.iter().map(|i| whole[[i / whole.ncols(), i % whole.ncols()]]).collect();
            let want = Array2::from_shape_vec((1, want.len()), want).unwrap();
            assert!(spft.index.len() > 5 && spft.index.is_sorted());
            assert_close(
                &format!("{l} {p:?}"),
                &gradients.layers[l].projections[&p][0].view(),
                &want.view(),
                1e-12,
            );
        }
    }
}

#[test]
fn spft_refuses_shares_entries_and_packed_weights() {
    use peft_limits::adapters::spft::Spft;
    let text = |outcome: peft_limits::Result<()>| outcome.unwrap_err().to_string();
    for share in [0.0, -0.1, 1.5, f64::NAN] {
        let plan = AdapterPlan::everywhere(&Projection::ALL, MethodSpec::Spft(SpftSpec { share }));
        assert!(text(model::<f64>(3).attach(&plan, &mut rng(1))).contains("share"));
    }
    let mut weight = BaseWeight::Dense(Array2::<f64>::ones((3, 4)));
    assert!(text(Spft::from_index(vec![3, 12], &mut weight).map(drop)).contains("index[1]"));
    assert!(text(Spft::from_index(vec![7, 7], &mut weight).map(drop)).contains("twice"));
    let mut packed = BaseWeight::Packed(Arc::new(Quarters(Array2::ones((3, 4)))));
    assert!(text(Spft::from_index(vec![1], &mut packed).map(drop)).contains("packed"));
}

/// Positions in the checkpoint's order, worked out here from the definition of the order.
fn original_positions(p: Projection, order: &peft_limits::model::s2ft::LayerOrder) -> Vec<usize> {
    let (units, width) = match p {
        Projection::Query | Projection::Output => (&order.groups, 8),
        Projection::Key | Projection::Value => (&order.groups, 4),
        _ => (&order.channels, 1),
    };
    let mut positions = Vec::new();
    for &unit in units {
        for i in 0..width {
            positions.push(unit * width + i);
        }
    }
    positions
}

#[test]
fn s2ft_gradients_are_slices_of_the_full_gradient_and_the_function_is_unchanged() {
    let base: Model<f64> = model(3);
    let full = full_gradients(&base);
    let mut sliced = base.clone();
    let attached = sliced.attach_s2ft(&s2ft_everywhere(), None, &mut rng(5)).unwrap();
    assert_eq!(attached.len(), 3 * 7);
    // 0.4 and 0.5 of 3 groups, 0.2 and 0.3 of 34 channels.
    assert_eq!(
        attached[..7].iter().map(|(_, _, n)| *n).collect::<Vec<_>>(),
        [1, 1, 1, 2, 7, 7, 10]
    );
    assert_close("logits", &logits(&sliced).view(), &logits(&base).view(), 1e-13);
    assert!(
        sliced.layers.iter().any(|l| l.order.as_ref().unwrap().groups != [0, 1, 2]),
        "a permutation must have happened for this to be a test"
    );
    let (_, gradients, _) = step(&sliced, &batch(), &StepOptions::default());
    for (l, layer) in sliced.layers.iter().enumerate() {
        let order = layer.order.as_ref().unwrap();
        for p in Projection::ALL {
            let Method::S2ft(slice) = &layer.projection(p).method else {
                panic!("attached everywhere")
            };
            let positions = &original_positions(p, order)[slice.range.clone()];
            let axis =
                if matches!(p, Projection::Output | Projection::Down) { Axis(1) } else { Axis(0) };
            let mut want = full.layers[l].projections[&p][0].select(axis, positions);
            // The other side of o and down is the model width; of q, k, v, gate, up too: nothing
            // else moves.
            assert_eq!(want.len_of(Axis(1 - axis.index())), 24);
            want = want.as_standard_layout().to_owned();
            let got = &gradients.layers[l].projections[&p][0];
            assert_close(&format!("{l} {p:?}"), &got.view(), &want.view(), 1e-12);
        }
    }
}

#[test]
fn adapters_start_at_the_base_model_and_a_zero_b_gives_a_zero_a_gradient() {
    let base = logits(&model::<f64>(3));
    for spec in [
        MethodSpec::Lora(lora(5)),
        MethodSpec::Dora { spec: lora(5), true_derivative: false },
        MethodSpec::Moslora { spec: lora(5), mixer: Default::default() },
        MethodSpec::Paca(PacaSpec::default()),
    ] {
        let mut adapted: Model<f64> = model(3);
        adapted.attach(&AdapterPlan::everywhere(&Projection::ALL, spec), &mut rng(8)).unwrap();
        assert_close("logits", &logits(&adapted).view(), &base.view(), 1e-14);
        let (_, gradients, _) = step(&adapted, &batch(), &StepOptions::default());
        for (name, g) in gradients.named() {
            let zero = g.iter().all(|x| x.to_bits() << 1 == 0);
            assert_eq!(zero, name.ends_with("lora_A") || name.ends_with("lora_mixer"), "{name}");
        }
    }
}

/// Plain descent, enough to move every trainable tensor.
fn train(model: &mut Model<f64>, steps: usize) {
    for _ in 0..steps {
        let (_, gradients, _) = step(model, &batch(), &StepOptions::default());
        model
            .update(&gradients, &mut |t| {
                t.values.scaled_add(-0.05, t.gradient);
                Ok(())
            })
            .unwrap();
    }
}

#[test]
fn merged_unmerged_and_reloaded_models_agree() {
    let base: Model<f64> = model(3);
    let base_logits = logits(&base);
    for (name, mut adapted) in every_method::<f64>() {
        train(&mut adapted, 2);
        let trained = logits(&adapted);
        assert!(
            gap(&trained.view(), &base_logits.view()).relative_frobenius > 1e-3,
            "{name} changed nothing"
        );
        let folder = tempfile::tempdir().unwrap();
        adapted.write(folder.path()).unwrap();
        let whole: Model<f64> = Model::read(folder.path()).unwrap();
        assert_close(
            &format!("{name}: checkpoint"),
            &logits(&whole).view(),
            &trained.view(),
            1e-12,
        );
        if name == "full" || name == "everything" {
            assert!(matches!(
                adapted.write_adapter(folder.path()),
                Err(Error::InvalidParam { .. })
            ));
            assert!(matches!(adapted.unmerge(), Err(Error::InvalidParam { .. })));
            continue;
        }
        adapted.write_adapter(&folder.path().join("adapter")).unwrap();
        let mut reloaded = base.clone();
        reloaded.read_adapter(&folder.path().join("adapter")).unwrap();
        assert_eq!(logits(&reloaded), trained, "{name}: reloaded, bit for bit");
        let (_, got, _) = step(&reloaded, &batch(), &StepOptions::default());
        let (_, want, _) = step(&adapted, &batch(), &StepOptions::default());
        for ((tensor, got), (_, want)) in got.named().iter().zip(want.named()) {
            assert_eq!(got, &want, "{name}: {tensor}");
        }
        adapted.merge().unwrap();
        assert_close(&format!("{name}: merged"), &logits(&adapted).view(), &trained.view(), 1e-12);
        if name.contains("lora") || name.contains("dora") {
            let (mut gradients, mut cost) = (adapted.zero_gradients(), Cost::default());
            let refused = adapted
                .loss_and_gradients(&batch(), &StepOptions::default(), &mut gradients, &mut cost)
                .unwrap_err();
            assert!(refused.to_string().contains("unmerge"), "{refused}");
            adapted.unmerge().unwrap();
            assert_eq!(logits(&adapted), trained, "{name}: unmerged");
        } else {
            // In place methods: unmerging leaves the base function, merging brings the training
            // back.
            adapted.unmerge().unwrap();
            assert_close(
                &format!("{name}: out of effect"),
                &logits(&adapted).view(),
                &base_logits.view(),
                1e-13,
            );
            adapted.merge().unwrap();
            assert_eq!(logits(&adapted), trained, "{name}: merged again");
        }
    }
}

#[test]
fn frozen_weights_keep_every_bit() {
    for (name, mut adapted) in every_method::<f64>() {
        let before = adapted.clone();
        train(&mut adapted, 3);
        let mut changed = 0;
        for (old, new) in before.layers.iter().zip(&adapted.layers) {
            for p in Projection::ALL {
                let (was, is) = (old.projection(p).base.dense(), new.projection(p).base.dense());
                let free = |i: usize, j: usize| match &new.projection(p).method {
                    Method::Full => true,
                    Method::Paca(paca) => paca.index.contains(&j),
                    Method::Spft(entries) => entries.index.contains(&(i * is.ncols() + j)),
                    Method::S2ft(slice) => match slice.side {
                        peft_limits::adapters::s2ft::Side::Output => slice.range.contains(&i),
                        peft_limits::adapters::s2ft::Side::Input => slice.range.contains(&j),
                    },
                    _ => false,
                };
                for ((i, j), x) in was.indexed_iter() {
                    let same = x.to_bits() == is[[i, j]].to_bits();
                    assert!(same || free(i, j), "{name}: {p:?} [{i}, {j}] is frozen and changed");
                    changed += usize::from(!same);
                }
            }
        }
        assert_eq!(
            changed > 0,
            matches!(name, "full" | "everything" | "paca" | "paca-scaled" | "s2ft" | "spft"),
            "{name}"
        );
        if name != "everything" {
            assert_eq!(before.embedding, adapted.embedding);
            assert_eq!(before.lm_head, adapted.lm_head);
            assert_eq!(before.final_norm, adapted.final_norm);
        }
    }
}

#[test]
fn selection_follows_its_scores() {
    let base: Model<f64> = model(3);
    let calibration = base.calibrate(&[batch()], &mut Cost::default()).unwrap();
    let full = full_gradients(&base);
    for (score, order) in [
        (Score::Weight, Order::Largest),
        (Score::Activation, Order::Smallest),
        (Score::WeightActivation, Order::Largest),
        (Score::Gradient, Order::Smallest),
    ] {
        let mut adapted = base.clone();
        let rule = ColumnRule { score, order };
        let plan = AdapterPlan::everywhere(
            &[Projection::Down],
            MethodSpec::Paca(PacaSpec { rank: 4, alpha: None, rule }),
        );
        let outcome = adapted.attach(&plan, &mut rng(1));
        assert_eq!(outcome.is_err(), rule.needs_calibration(), "{score:?}");
        adapted.attach_with_scores(&plan, Some(&calibration), &mut rng(1)).unwrap();
        for (l, layer) in adapted.layers.iter().enumerate() {
            let Method::Paca(paca) = &layer.projection(Projection::Down).method else { panic!() };
            let norm = |a: ndarray::ArrayView2<f64>, j: usize| a.column(j).dot(&a.column(j)).sqrt();
            let weight = base.layers[l].projection(Projection::Down).base.dense();
            let gradient = full.layers[l].projections[&Projection::Down][0].view();
            let input = &calibration.layers[l][&Projection::Down].input;
            let value = |j: usize| match score {
                Score::Weight => norm(weight.view(), j),
                Score::Activation => input[j],
                Score::WeightActivation => norm(weight.view(), j) * input[j],
                _ => norm(gradient, j),
            };
            let chosen = paca.index.iter().map(|&j| value(j));
            let others = (0..34).filter(|j| !paca.index.contains(j)).map(value);
            let (low, high) = (f64::min as fn(f64, f64) -> f64, f64::max as fn(f64, f64) -> f64);
            match order {
                Order::Largest => {
                    assert!(chosen.fold(f64::MAX, low) >= others.fold(0.0, high), "{score:?}")
                }
                Order::Smallest => {
                    assert!(chosen.fold(0.0, high) <= others.fold(f64::MAX, low), "{score:?}")
                }
            }
        }
    }
}

#[test]
fn s2ft_counts_units_over_all_layers_or_in_each() {
    let base: Model<f64> = model(3);
    let mut spec = S2ftSpec { ratios: [0.0, 0.0, 0.0, 0.23, 0.0, 0.0, 0.1], ..S2ftSpec::default() };
    for scope in [Scope::AllLayers, Scope::EachLayer] {
        spec.scope = scope;
        let attached = base.clone().attach_s2ft(&spec, None, &mut rng(2)).unwrap();
        let units = |p: Projection| {
            attached.iter().filter(|(_, q, _)| *q == p).map(|(_, _, n)| n).sum::<usize>()
        };
        // 0.0.23 of 9 groups rounds to 2, of 3 groups to 1 per layer; 0.1 of 102 channels to 10, of
        // 0.34 to 3.
        let want = if scope == Scope::AllLayers { (2, 10) } else { (3, 9) };
        assert_eq!((units(Projection::Output), units(Projection::Down)), want);
    }
    for score in [Score::Weight, Score::Activation, Score::WeightActivation, Score::Gradient] {
        spec.rule = ColumnRule { score, order: Order::Largest };
        let calibration = base.calibrate(&[batch()], &mut Cost::default()).unwrap();
        let mut sliced = base.clone();
        sliced.attach_s2ft(&spec, Some(&calibration), &mut rng(2)).unwrap();
        assert_close("logits", &logits(&sliced).view(), &logits(&base).view(), 1e-13);
        let again = sliced.attach_s2ft(&spec, Some(&calibration), &mut rng(2)).unwrap_err();
        assert!(again.to_string().contains("already adapted"), "{again}");
    }
}

#[test]
fn bad_settings_are_refused_by_name() {
    let base: Model<f64> = model(3);
    let attach =
        |spec| base.clone().attach(&AdapterPlan::everywhere(&[Projection::Key], spec), &mut rng(1));
    let text = |outcome: peft_limits::Result<()>| match outcome.unwrap_err() {
        Error::InvalidParam { name, value, requirement } => {
            format!("{name} = {value}: {requirement}")
        }
        other => panic!("{other}"),
    };
    assert!(text(attach(MethodSpec::Lora(lora(0)))).contains("rank = 0: must be in 1..=65536"));
    assert!(
        text(attach(MethodSpec::Lora(lora(65_537)))).contains("rank = 65537: must be in 1..=65536")
    );
    let spec = peft_limits::adapters::lora::LoraSpec { alpha: f64::NAN, ..lora(2) };
    assert!(text(attach(MethodSpec::Lora(spec))).contains("alpha = NaN"));
    let spec = PacaSpec { rank: 25, ..PacaSpec::default() };
    assert!(text(attach(MethodSpec::Paca(spec))).contains("rank = 25: must be in 1..=24"));
    let spec = PacaSpec { alpha: Some(0.0), ..PacaSpec::default() };
    assert!(text(attach(MethodSpec::Paca(spec))).contains("scaling"));
    let weight = &base.layers[0].projection(Projection::Key).base;
    assert!(
        text(Paca::from_index(vec![3, 24], 1.0, &mut weight.clone()).map(drop))
            .contains("index[1] = 24: must be below 24")
    );
    assert!(
        text(Paca::from_index(vec![3, 7, 3], 1.0, &mut weight.clone()).map(drop))
            .contains("index[2] = 3: appears twice")
    );
    assert!(
        text("w_proj".parse::<Projection>().map(drop))
            .contains("target module = w_proj: must be one of q_proj")
    );
    let plan = AdapterPlan::default().and(1..4, &[Projection::Up], MethodSpec::Full);
    assert!(text(base.clone().attach(&plan, &mut rng(1))).contains("the model has 3 layers"));
    let s2ft = |ratios| {
        base.clone().attach_s2ft(&S2ftSpec { ratios, ..S2ftSpec::default() }, None, &mut rng(1))
    };
    assert!(text(s2ft([0.0; 7]).map(drop)).contains("at least one"));
    assert!(
        text(s2ft([0.1, 0.2, 0.0, 0.0, 0.0, 0.0, 0.0]).map(drop))
            .contains("share one set of heads")
    );
    assert!(
        text(s2ft([0.0, 0.0, 0.0, 1.5, 0.0, 0.0, 0.0]).map(drop)).contains("ratio of o_proj = 1.5")
    );
}

/// A codec that keeps quarters: stands for any packed base weight.
#[derive(Debug)]
struct Quarters(Array2<i16>);

impl PackedWeight<f64> for Quarters {
    fn shape(&self) -> (usize, usize) {
        self.0.dim()
    }
    fn decode_into(&self, dense: &mut ndarray::ArrayViewMut2<f64>) {
        self.decode_rows(Precision::F64, 0, dense);
    }
    fn decode_rows(&self, _: Precision, first: usize, dense: &mut ndarray::ArrayViewMut2<f64>) {
        let rows = self.0.slice(ndarray::s![first..first + dense.nrows(), ..]);
        dense.zip_mut_with(&rows, |d, &q| *d = f64::from(q) / 4.0);
    }
    fn bytes(&self) -> usize {
        2 * self.0.len()
    }
}

/// QLoRA, QDoRA, QPaCA: over a packed base weight every method computes what it does over the
/// decoded one.
#[test]
fn packed_base_weights_act_as_their_decoded_values() {
    let specs = [
        MethodSpec::Lora(lora(5)),
        MethodSpec::Dora { spec: lora(3), true_derivative: false },
        MethodSpec::Paca(PacaSpec { rank: 5, alpha: Some(7.0), ..PacaSpec::default() }),
    ];
    for spec in specs {
        let build = |packed: bool| {
            let mut model: Model<f64> = model(3);
            for layer in &mut model.layers {
                for p in Projection::ALL {
                    let quarters =
                        layer.projection(p).base.dense().mapv(|x| (x * 4.0).round() as i16);
                    let dense = quarters.mapv(|q| f64::from(q) / 4.0 + f64::from(q == 0) * 0.25);
                    let quarters = dense.mapv(|x| (x * 4.0) as i16);
                    layer.projection_mut(p).base = if packed {
                        BaseWeight::Packed(Arc::new(Quarters(quarters)))
                    } else {
                        BaseWeight::Dense(dense)
                    };
                }
            }
            model.attach(&AdapterPlan::everywhere(&Projection::ALL, spec), &mut rng(4)).unwrap();
            leave_the_start(&mut model);
            train(&mut model, 2);
            model
        };
        let (packed, dense) = (build(true), build(false));
        assert!(packed.weight_bytes().0 < dense.weight_bytes().0);
        assert_close("logits", &logits(&packed).view(), &logits(&dense).view(), 1e-13);
        let of = |m: &Model<f64>| step(m, &batch(), &StepOptions::default()).1;
        for ((name, got), (_, want)) in of(&packed).named().iter().zip(of(&dense).named()) {
            assert_close(name, got, &want, 1e-12);
        }
        let folder = tempfile::tempdir().unwrap();
        packed.write(folder.path()).unwrap();
        let whole: Model<f64> = Model::read(folder.path()).unwrap();
        assert_close("exported", &logits(&whole).view(), &logits(&dense).view(), 1e-12);
    }
    let mut packed: Model<f64> = model(3);
    packed.layers[0].projection_mut(Projection::Up).base =
        BaseWeight::Packed(Arc::new(Quarters(Array2::ones((34, 24)))));
    let plan = AdapterPlan::everywhere(&[Projection::Up], MethodSpec::Full);
    let refused = packed.attach(&plan, &mut rng(1)).unwrap_err().to_string();
    assert!(refused.contains("full") && refused.contains("packed"), "{refused}");
}
