//! Updates against closed forms, recorded steps and bad input.

use super::*;

/// The module's equations in exact textbook form, in f64, independent of the loop above.
fn textbook_adamw(p: &mut f64, m: &mut f64, v: &mut f64, g: f64, t: i32, q: &OptimizerParams) {
    *p -= q.lr * q.weight_decay * *p;
    *m = q.beta1 * *m + (1.0 - q.beta1) * g;
    *v = q.beta2 * *v + (1.0 - q.beta2) * g.powi(2);
    let m_hat = *m / (1.0 - q.beta1.powi(t));
    let v_hat = *v / (1.0 - q.beta2.powi(t));
    *p -= q.lr * m_hat / (v_hat.sqrt() + q.eps);
}

#[test]
fn adamw_follows_the_textbook_for_many_steps() {
    let q = OptimizerParams {
        lr: 0.03,
        weight_decay: 0.1,
        beta1: 0.8,
        beta2: 0.95,
        ..Default::default()
    };
    let mut adam = q.check::<f64>().unwrap();
    let mut p = [0.7, -1.3, 2.0];
    let mut want = p.map(|p| (p, 0.0, 0.0));
    for t in 1..=50 {
        let g: [f64; 3] =
            std::array::from_fn(|i| p[i] - [3.0, 0.1, -2.0][i] + (t as f64 * 0.7).sin());
        adam.begin_step();
        adam.update("p", &mut p, &g, q.lr, 1.0).unwrap();
        for i in 0..3 {
            let (x, m, v) = &mut want[i];
            textbook_adamw(x, m, v, g[i], t, &q);
            assert!((p[i] - *x).abs() < 1e-13, "step {t}");
        }
    }
    assert_eq!(adam.bytes(), 3 * 2 * 8);
}

/// One step from p = 1, g = 2, worked by hand: decay 1 - 0.1 * 0.5 = 0.95, then - 0.1 * 2 / (2 +
/// 1).
#[test]
fn eps_is_outside_the_root_and_decay_is_decoupled() {
    let q = OptimizerParams { lr: 0.1, weight_decay: 0.5, eps: 1.0, ..Default::default() };
    let mut adam = q.check::<f64>().unwrap();
    let mut p = [1.0];
    adam.begin_step();
    adam.update("p", &mut p, &[2.0], 0.1, 1.0).unwrap();
    assert!((p[0] - (0.95 - 0.1 * 2.0 / 3.0)).abs() < 1e-14, "{}", p[0]);
}

/// SGD on 1/2 a x^2 with momentum: the recurrence x_{t+1} = (1 + mu - lr a) x_t - mu x_{t-1}.
#[test]
fn sgd_with_momentum_obeys_its_recurrence() {
    let (a, lr, mu) = (3.0, 0.05, 0.9);
    let mut sgd =
        OptimizerParams { kind: OptimizerKind::Sgd, lr, momentum: mu, ..Default::default() }
            .check::<f64>()
            .unwrap();
    let mut x = [1.0];
    let mut history = vec![1.0];
    for _ in 0..20 {
        let g = [a * x[0]];
        sgd.begin_step();
        sgd.update("x", &mut x, &g, lr, 1.0).unwrap();
        history.push(x[0]);
    }
    for t in 1..20 {
        let want = (1.0 + mu - lr * a) * history[t] - mu * history[t - 1];
        assert!((history[t + 1] - want).abs() < 1e-14);
    }
    let mut plain =
        OptimizerParams { kind: OptimizerKind::Sgd, lr, weight_decay: 0.5, ..Default::default() }
            .check::<f64>()
            .unwrap();
    let mut x = [2.0];
    plain.begin_step();
    plain.update("x", &mut x, &[4.0], 0.1, 0.5).unwrap();
    assert!((x[0] - (2.0 - 0.1 * (2.0 + 1.0))).abs() < 1e-15);
    assert_eq!(plain.bytes(), 0);
}

#[test]
fn restored_state_continues_bit_exactly() {
    let q = OptimizerParams { weight_decay: 0.01, ..Default::default() };
    let gradient = |x: f32, t: u32| (x * 3.1 + t as f32).cos();
    let run = |adam: &mut Optimizer<f32>, p: &mut [f32; 2], steps: std::ops::Range<u32>| {
        for t in steps {
            let g = p.map(|x| gradient(x, t));
            adam.begin_step();
            adam.update("w", p, &g, 1e-2, 1.0).unwrap();
        }
    };
    let mut whole = q.check::<f32>().unwrap();
    let mut p = [0.3, -0.4];
    run(&mut whole, &mut p, 0..9);
    let mut first = q.check::<f32>().unwrap();
    let mut r = [0.3, -0.4];
    run(&mut first, &mut r, 0..4);
    let saved: Vec<(String, Vec<f32>)> = first.state().map(|(n, x)| (n, x.to_vec())).collect();
    let mut second = q.check::<f32>().unwrap();
    second.restore(first.steps(), saved).unwrap();
    run(&mut second, &mut r, 4..9);
    assert_eq!(p.map(f32::to_bits), r.map(f32::to_bits));
    assert_eq!(whole, second);
}

#[test]
fn each_end_of_each_range_and_bad_lengths() {
    let ok = OptimizerParams::default();
    assert!(OptimizerParams { beta1: 0.0, clip: 0.0, ..ok }.check::<f32>().is_ok());
    let bad = [
        ("lr", OptimizerParams { lr: 0.0, ..ok }),
        ("lr", OptimizerParams { lr: f64::NAN, ..ok }),
        ("lr", OptimizerParams { lr: f64::INFINITY, ..ok }),
        ("beta1", OptimizerParams { beta1: 1.0, ..ok }),
        ("beta2", OptimizerParams { beta2: -0.1, ..ok }),
        ("eps", OptimizerParams { eps: 0.0, ..ok }),
        ("weight_decay", OptimizerParams { weight_decay: -1.0, ..ok }),
        ("momentum", OptimizerParams { momentum: 1.0, ..ok }),
        ("clip", OptimizerParams { clip: -1.0, ..ok }),
    ];
    for (key, params) in bad {
        match params.check::<f64>() {
            Err(Error::InvalidParam { name, .. }) => assert_eq!(name, format!("optimizer.{key}")),
            other => panic!("{other:?}"),
        }
    }
    let mut adam = ok.check::<f64>().unwrap();
    adam.begin_step();
    assert!(matches!(
        adam.update("w", &mut [0.0; 3], &[0.0; 2], 0.1, 1.0),
        Err(Error::ShapeMismatch { .. })
    ));
    adam.update("w", &mut [0.0; 3], &[0.0; 3], 0.1, 1.0).unwrap();
    assert!(matches!(
        adam.update("w", &mut [0.0; 4], &[0.0; 4], 0.1, 1.0),
        Err(Error::ShapeMismatch { .. })
    ));
    assert!(matches!(
        adam.restore(1, [("third.w".to_string(), vec![1.0])]),
        Err(Error::InvalidParam { .. })
    ));
    assert!(matches!(
        adam.restore(1, [("first.w".to_string(), vec![1.0])]),
        Err(Error::ShapeMismatch { .. })
    ));
}

#[test]
fn clipped_gradient_has_the_requested_norm() {
    let g = [3.0f32, 4.0, 12.0];
    let norm = squared_norm(&g).sqrt();
    assert!((norm - 13.0).abs() < 1e-12);
    let clipped = g.map(|g| g * clip_factor(norm, 2.0) as f32);
    assert!((squared_norm(&clipped).sqrt() - 2.0).abs() < 1e-6);
}
