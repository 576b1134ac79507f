//! Blocks against naive loops, closed forms and finite differences.

use crate::common::rng;
use ndarray::{Array2, array, s};
use peft_limits::Error;
use peft_limits::blocks::causal_attention::{
    AttentionCache, AttentionShape, Visibility, causal_attention_backward, causal_attention_forward,
};
use peft_limits::blocks::cross_entropy::{
    CrossEntropySinks, LOGIT_ROWS, cross_entropy, prediction_targets,
};
use peft_limits::blocks::embedding::{embedding_backward, embedding_forward};
use peft_limits::blocks::linear::{linear_backward_input, linear_backward_weight, linear_forward};
use peft_limits::blocks::rms_norm::{rms_norm_backward, rms_norm_forward};
use peft_limits::blocks::rope::{RopeTable, rope_backward, rope_forward};
use peft_limits::blocks::swiglu::{swiglu_backward, swiglu_forward};
use peft_limits::check::compare::assert_close;
use peft_limits::check::finite_differences::{central_differences, observed_order};
use peft_limits::cost::Cost;
use peft_limits::linalg::{Real, Scratch};
use rand::RngExt;

fn random<T: Real>(seed: u64, shape: (usize, usize), scale: f64) -> Array2<T> {
    let mut rng = rng(seed);
    Array2::from_shape_simple_fn(shape, || T::of(scale * (2.0 * rng.random::<f64>() - 1.0)))
}

/// `f` along a direction against <gradient, direction>.
fn check_derivative(
    what: &str,
    x: &Array2<f64>,
    gradient: &Array2<f64>,
    f: impl Fn(&Array2<f64>) -> f64,
) {
    let direction: Array2<f64> = random(77, x.dim(), 1.0);
    let exact = (gradient * &direction).sum();
    let estimates = central_differences(|t| f(&(x + &(&direction * t))), 4e-3);
    let order = observed_order(&estimates, exact);
    assert!((order - 2.0).abs() < 0.1, "{what}: order {order}, {estimates:?} against {exact}");
    assert!(
        (estimates[2] - exact).abs() < 1e-4 * exact.abs(),
        "{what}: {estimates:?} against {exact}"
    );
}

#[test]
fn linear_against_loops_and_slices() {
    let (x, w): (Array2<f64>, Array2<f64>) = (random(1, (7, 5), 1.0), random(2, (3, 5), 1.0));
    let mut cost = Cost::default();
    let y = linear_forward(x.view(), w.view(), &mut cost).unwrap();
    assert!((y[[6, 2]] - (0..5).map(|k| x[[6, k]] * w[[2, k]]).sum::<f64>()).abs() < 1e-15);
    let dy: Array2<f64> = random(3, (7, 3), 1.0);
    let (mut dx, mut dw) = (Array2::ones((7, 5)), Array2::ones((3, 5)));
    linear_backward_input(dy.view(), w.view(), &mut dx.view_mut(), &mut cost).unwrap();
    linear_backward_weight(2.0, dy.view(), x.view(), &mut dw.view_mut(), &mut cost).unwrap();
    assert_close("dx accumulates", &dx.view(), &(dy.dot(&w) + 1.0).view(), 1e-14);
    assert_close("dW accumulates", &dw.view(), &(dy.t().dot(&x) * 2.0 + 1.0).view(), 1e-14);
    assert_eq!(cost.multiply_adds, 3 * 7 * 5 * 3);
    let mut part = Array2::zeros((2, 5));
    linear_backward_weight(1.0, dy.slice(s![.., 1..3]), x.view(), &mut part.view_mut(), &mut cost)
        .unwrap();
    assert_close("slice", &part.view(), &dy.t().dot(&x).slice(s![1..3, ..]), 1e-14);
    match linear_forward(x.view(), random::<f64>(2, (3, 4), 1.0).view(), &mut cost) {
        Err(Error::ShapeMismatch { op, arg, expected, got }) => {
            assert_eq!((op, arg.as_str()), ("linear_forward", "weight"));
            assert_eq!((expected.as_str(), got.as_str()), ("(3, 5)", "(3, 4)"));
        }
        other => panic!("{other:?}"),
    }
}

#[test]
fn rms_norm_derivative_and_extreme_rows() {
    // 71 columns: a full set of lanes twice and a remainder; 130 rows: three tasks.
    let (x, gain): (Array2<f64>, Array2<f64>) =
        (random(1, (130, 71), 1.0), random(2, (1, 71), 1.0));
    let g: Array2<f64> = random(3, (130, 71), 1.0);
    let mut cost = Cost::default();
    let gain_row = gain.row(0).to_vec();
    let (y, inverse) =
        rms_norm_forward(x.view(), &gain_row, 1e-5, &mut Scratch::default(), &mut cost).unwrap();
    let naive = |i: usize, j: usize| {
        let mean = x.row(i).iter().map(|x| x * x).sum::<f64>() / 71.0;
        gain_row[j] * x[[i, j]] / (mean + 1e-5).sqrt()
    };
    assert_close(
        "y",
        &y.view(),
        &Array2::from_shape_fn((130, 71), |(i, j)| naive(i, j)).view(),
        1e-14,
    );
    let (mut dx, mut dgain) = (Array2::zeros((130, 71)), vec![0.0; 71]);
    rms_norm_backward(
        g.view(),
        x.view(),
        &inverse,
        &gain_row,
        Some(&mut dgain),
        Some(&mut dx.view_mut()),
        &mut cost,
    )
    .unwrap();
    let loss = |x: &Array2<f64>, gain: &Array2<f64>| {
        let y = rms_norm_forward(
            x.view(),
            &gain.row(0).to_vec(),
            1e-5,
            &mut Scratch::default(),
            &mut Cost::default(),
        )
        .unwrap()
        .0;
        (y * &g).sum()
    };
    check_derivative("dx", &x, &dx, |x| loss(x, &gain));
    let dgain = Array2::from_shape_vec((1, 71), dgain).unwrap();
    let direct = Array2::<f64>::from_shape_fn((1, 71), |(_, j)| {
        (0..130).map(|i| g[[i, j]] * x[[i, j]] * inverse[i]).sum::<f64>()
    });
    assert_close("dgain", &dgain.view(), &direct.view(), 1e-13);
    for scale in [1e-12f32, 1e12] {
        let (y, _) = rms_norm_forward(
            (random::<f32>(4, (2, 9), 1.0) * scale).view(),
            &[1.0; 9],
            1e-30,
            &mut Scratch::default(),
            &mut cost,
        )
        .unwrap();
        let mean = y.row(1).iter().map(|x| x * x).sum::<f32>() / 9.0;
        assert!((mean - 1.0).abs() < 1e-5, "scale {scale}: mean square {mean}");
    }
    assert!(
        rms_norm_forward(x.view(), &gain_row, f64::NAN, &mut Scratch::default(), &mut cost)
            .unwrap_err()
            .to_string()
            .contains("NaN")
    );
    assert!(matches!(
        rms_norm_forward(x.view(), &[1.0], 1e-5, &mut Scratch::default(), &mut cost),
        Err(Error::ShapeMismatch { .. })
    ));
}

#[test]
fn rope_preserves_norms_depends_on_distance_and_is_undone() {
    let table: RopeTable<f64> = RopeTable::new(11, 6, 1e4).unwrap();
    let x: Array2<f64> = random(5, (22, 18), 1.0);
    let (mut y, mut cost) = (x.clone(), Cost::default());
    rope_forward(&mut y.view_mut(), &table, &mut cost).unwrap();
    for (before, after) in x.rows().into_iter().zip(y.rows()) {
        for h in 0..3 {
            let norm = |r: &ndarray::ArrayView1<f64>| {
                r.slice(s![6 * h..6 * h + 6]).iter().map(|x| x * x).sum::<f64>()
            };
            assert!((norm(&before) - norm(&after)).abs() < 1e-14);
        }
    }
    assert_eq!(y.row(0), x.row(0), "position 0 of each sequence is not turned");
    assert_eq!(y.row(11), x.row(11));
    assert!((&y.row(1) - &x.row(1)).iter().any(|d| d.abs() > 1e-2));
    // Half-split layout: entries 0 and 3 of a head turn by t.
    let want = x[[4, 0]] * 4f64.cos() - x[[4, 3]] * 4f64.sin();
    assert!((y[[4, 0]] - want).abs() < 1e-15);
    // Scores of the same two vectors depend on the distance of their positions alone.
    let mut same = Array2::from_shape_fn((11, 12), |(_, j)| x[[0, j]]);
    rope_forward(&mut same.view_mut(), &table, &mut cost).unwrap();
    let score = |i: usize, j: usize| same.slice(s![i, ..6]).dot(&same.slice(s![j, 6..]));
    assert!((score(3, 1) - score(9, 7)).abs() < 1e-14);
    assert!((score(3, 1) - score(3, 2)).abs() > 1e-4);
    rope_backward(&mut y.view_mut(), &table, &mut cost).unwrap();
    assert_close("undone", &y.view(), &x.view(), 1e-15);
    assert!(
        RopeTable::<f64>::new(4, 5, 1e4).is_err() && RopeTable::<f64>::new(4, 4, f64::NAN).is_err()
    );
    assert!(
        rope_forward(&mut random::<f64>(1, (12, 18), 1.0).view_mut(), &table, &mut cost).is_err()
    );
}

/// 2 sequences of 300 tokens (five query tiles, two key tiles), 4 heads of 6 in 2 groups, by plain
/// loops.
#[test]
fn attention_against_dense_loops_over_several_tiles() {
    let shape = AttentionShape { batch: 2, length: 300, heads: 4, kv_heads: 2, head_dim: 6 };
    let (q, k, v): (Array2<f64>, Array2<f64>, Array2<f64>) =
        (random(1, (600, 24), 2.0), random(2, (600, 12), 2.0), random(3, (600, 12), 1.0));
    let g: Array2<f64> = random(4, (600, 24), 1.0);
    let mut cost = Cost::default();
    let (o, lse) = causal_attention_forward(
        q.view(),
        k.view(),
        v.view(),
        shape,
        Visibility::default(),
        0.7,
        &mut Scratch::default(),
        &mut cost,
    )
    .unwrap();
    let cache = AttentionCache {
        query: q.view(),
        key: k.view(),
        value: v.view(),
        output: o.view(),
        log_sum_exp: lse.view(),
    };
    let (dq, dk, dv) = causal_attention_backward(
        g.view(),
        &cache,
        shape,
        Visibility::default(),
        0.7,
        &mut Scratch::default(),
        &mut cost,
    )
    .unwrap();
    assert!(cost.largest_buffer < 300 * 300, "no T x T buffer");
    let (mut want_o, mut want_dq) = (Array2::zeros((600, 24)), Array2::zeros((600, 24)));
    let (mut want_dk, mut want_dv) =
        (Array2::<f64>::zeros((600, 12)), Array2::<f64>::zeros((600, 12)));
    for b in 0..2 {
        for h in 0..4 {
            let rows = s![300 * b..300 * b + 300, 6 * h..6 * h + 6];
            let kv = s![300 * b..300 * b + 300, 6 * (h / 2)..6 * (h / 2) + 6];
            let (q, k, v, g) = (q.slice(rows), k.slice(kv), v.slice(kv), g.slice(rows));
            let mut p = q.dot(&k.t()) * 0.7;
            for i in 0..300 {
                for j in i + 1..300 {
                    p[[i, j]] = f64::NEG_INFINITY;
                }
                let mut row = p.row_mut(i);
                let max = row.fold(f64::NEG_INFINITY, |m, &x| m.max(x));
                row.mapv_inplace(|x| (x - max).exp());
                let sum = row.sum();
                row.mapv_inplace(|x| x / sum);
                assert!((lse[[4 * b + h, i]] - (max + sum.ln())).abs() < 1e-12);
            }
            want_o.slice_mut(rows).assign(&p.dot(&v));
            let t = g.dot(&v.t());
            let delta = (&p * &t).sum_axis(ndarray::Axis(1)).insert_axis(ndarray::Axis(1));
            let ds = &p * &(t - delta) * 0.7;
            want_dq.slice_mut(rows).assign(&ds.dot(&k));
            let mut dk = want_dk.slice_mut(kv);
            dk += &ds.t().dot(&q);
            let mut dv = want_dv.slice_mut(kv);
            dv += &p.t().dot(&g);
        }
    }
    for (name, got, want) in
        [("O", &o, &want_o), ("dQ", &dq, &want_dq), ("dK", &dk, &want_dk), ("dV", &dv, &want_dv)]
    {
        assert_close(name, &got.view(), &want.view(), 1e-13);
    }
    let single = |a: &Array2<f64>| a.mapv(|x| x as f32);
    let (o32, _) = causal_attention_forward(
        single(&q).view(),
        single(&k).view(),
        single(&v).view(),
        shape,
        Visibility::default(),
        0.7,
        &mut Scratch::default(),
        &mut cost,
    )
    .unwrap();
    assert_close("O in f32", &o32.view(), &want_o.view(), 1e-6);
    let wrong = AttentionShape { kv_heads: 3, ..shape };
    let refused = causal_attention_forward(
        q.view(),
        k.view(),
        v.view(),
        wrong,
        Visibility::default(),
        0.7,
        &mut Scratch::default(),
        &mut cost,
    )
    .unwrap_err();
    assert!(refused.to_string().contains("num_key_value_heads = 3"), "{refused}");
}

/// One token attends to itself; equal scores give running means of the values.
#[test]
fn attention_closed_forms() {
    let shape = AttentionShape { batch: 1, length: 5, heads: 1, kv_heads: 1, head_dim: 2 };
    let (q, k) = (Array2::<f64>::zeros((5, 2)), random(2, (5, 2), 1e3));
    let v = Array2::from_shape_fn((5, 2), |(i, j)| (i + 3 * j) as f64);
    let (o, lse) = causal_attention_forward(
        q.view(),
        k.view(),
        v.view(),
        shape,
        Visibility::default(),
        1.0,
        &mut Scratch::default(),
        &mut Cost::default(),
    )
    .unwrap();
    for i in 0..5 {
        assert!(
            (o[[i, 0]] - i as f64 / 2.0).abs() < 1e-14
                && (o[[i, 1]] - 3.0 - i as f64 / 2.0).abs() < 1e-14
        );
        assert!((lse[[0, i]] - ((i + 1) as f64).ln()).abs() < 1e-15);
    }
    // Logits of +-1e6: the largest key wins, nothing overflows.
    let big = random::<f64>(3, (5, 2), 1.0) * 1e3;
    let (o, _) = causal_attention_forward(
        big.view(),
        k.view(),
        v.view(),
        shape,
        Visibility::default(),
        1.0,
        &mut Scratch::default(),
        &mut Cost::default(),
    )
    .unwrap();
    assert!(o.iter().all(|x| x.is_finite()));
}

#[test]
fn swiglu_derivative() {
    let (gate, up): (Array2<f64>, Array2<f64>) =
        (random(1, (70, 13), 4.0), random(2, (70, 13), 1.0));
    let da: Array2<f64> = random(3, (70, 13), 1.0);
    let (mut dgate, mut dup) = (gate.clone(), up.clone());
    swiglu_backward(da.view(), &mut dgate, &mut dup, &mut Cost::default()).unwrap();
    let loss = |g: &Array2<f64>, u: &Array2<f64>| {
        (swiglu_forward(g.view(), u.view(), &mut Scratch::default(), &mut Cost::default()).unwrap()
            * &da)
            .sum()
    };
    check_derivative("dgate", &gate, &dgate, |g| loss(g, &up));
    let silu = gate.mapv(|g| g / (1.0 + (-g).exp()));
    assert_close("dup", &dup.view(), &(&da * &silu).view(), 1e-14);
    let extreme = swiglu_forward(
        array![[-1e4f32, 1e4]].view(),
        array![[1.0, 1.0]].view(),
        &mut Scratch::default(),
        &mut Cost::default(),
    )
    .unwrap();
    assert_eq!(extreme.mapv(f32::abs), array![[0.0, 1e4]]);
}

#[test]
fn embedding_gathers_and_scatters() {
    let table: Array2<f64> = random(1, (5, 3), 1.0);
    let x = embedding_forward(&[4, 0, 4], table.view()).unwrap();
    assert_eq!(x.row(2), table.row(4));
    let mut sink = Array2::zeros((5, 3));
    embedding_backward(&[4, 0, 4], x.view(), &mut sink.view_mut()).unwrap();
    assert_eq!(sink.row(4), (&table.row(4) * 2.0).view());
    assert!(sink.row(1).iter().all(|x| x.abs() < f64::MIN_POSITIVE));
    let refused = embedding_forward(&[1, 5], table.view()).unwrap_err().to_string();
    assert!(refused.contains("input_ids[1] = 5") && refused.contains('5'), "{refused}");
}

#[test]
fn cross_entropy_closed_form_chunks_and_derivative() {
    // Zero weights: every token has probability 1/V.
    let hidden: Array2<f64> = random(1, (4, 3), 1.0);
    let uniform = cross_entropy(
        hidden.view(),
        Array2::zeros((7, 3)).view(),
        &[(0, 1), (3, 6)],
        2.0,
        None,
        &mut Cost::default(),
    );
    assert!((uniform.unwrap() - 7f64.ln()).abs() < 1e-15);
    // More targets than a chunk of logits; some rows do not count.
    let rows = 2 * LOGIT_ROWS + 37;
    let (hidden, weight): (Array2<f64>, Array2<f64>) =
        (random(2, (rows, 5), 2.0), random(3, (11, 5), 2.0));
    let targets: Vec<(usize, usize)> =
        (0..rows).filter(|i| i % 13 != 4).map(|i| (i, i % 11)).collect();
    let divisor = targets.len() as f64;
    let (mut dhidden, mut dweight) = (Array2::zeros((rows, 5)), Array2::zeros((11, 5)));
    let mut cost = Cost::default();
    let mut view = dhidden.view_mut();
    let sinks = CrossEntropySinks { dhidden: &mut view, dweight: Some(dweight.view_mut()) };
    let loss =
        cross_entropy(hidden.view(), weight.view(), &targets, divisor, Some(sinks), &mut cost)
            .unwrap();
    let naive: f64 = targets
        .iter()
        .map(|&(i, y)| {
            let z = weight.dot(&hidden.row(i));
            z.iter().map(|z| z.exp()).sum::<f64>().ln() - z[y]
        })
        .sum();
    assert!((loss - naive / divisor).abs() < 1e-13 * loss);
    assert!(cost.largest_buffer <= (LOGIT_ROWS * 11) as u64, "logits exist one chunk at a time");
    assert!(
        dhidden.row(4).iter().all(|x| x.to_bits() == 0),
        "a row that does not count has no gradient"
    );
    let f = |h: &Array2<f64>, w: &Array2<f64>| {
        cross_entropy(h.view(), w.view(), &targets, divisor, None, &mut Cost::default()).unwrap()
    };
    check_derivative("dhidden", &hidden, &dhidden, |h| f(h, &weight));
    check_derivative("dweight", &weight, &dweight, |w| f(&hidden, w));
    let broken = cross_entropy(
        array![[f64::NAN]].view(),
        array![[1.0], [2.0]].view(),
        &[(0, 1)],
        1.0,
        None,
        &mut cost,
    );
    assert!(matches!(broken, Err(Error::NonFinite { op: "cross_entropy", .. })));
    for bad in [-1, 11, -99] {
        let refused = prediction_targets(array![[0, bad]].view(), 11).unwrap_err().to_string();
        assert!(refused.contains("labels[0, 1]") && refused.contains("0..11"), "{refused}");
    }
}
