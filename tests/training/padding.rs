//! Attention masks and position ids: padding on either side changes nothing for the tokens that are
//! there.

use crate::common::*;
use ndarray::{Array2, s};
use peft_limits::check::compare::assert_close;
use peft_limits::cost::Cost;
use peft_limits::linalg::Real;
use peft_limits::model::{Batch, Instruments, Model, StepOptions};

/// Sequences of 13 and 9 tokens, padded to 17 on one side; labels of padding ignored.
fn padded(left: bool) -> (Batch, [Batch; 2]) {
    let whole = batch();
    let lengths = [13usize, 9];
    let (mut ids, mut labels) =
        (Array2::from_elem((2, 17), 5u32), Array2::from_elem((2, 17), -100i64));
    let (mut mask, mut positions) = (Array2::from_elem((2, 17), false), Array2::zeros((2, 17)));
    let mut single = Vec::new();
    for (b, &length) in lengths.iter().enumerate() {
        let start = if left { 17 - length } else { 0 };
        let place = s![b, start..start + length];
        ids.slice_mut(place).assign(&whole.input_ids.slice(s![b, ..length]));
        labels.slice_mut(place).assign(&whole.labels.slice(s![b, ..length]));
        // Nothing in a sequence predicts its first token; after padding on the left, padding would.
        labels[[b, start]] = -100;
        mask.slice_mut(place).fill(true);
        (0..length).for_each(|t| positions[[b, start + t]] = t as u32);
        let rows = s![b..b + 1, ..length];
        single.push(
            Batch::new(whole.input_ids.slice(rows).to_owned(), whole.labels.slice(rows).to_owned())
                .unwrap(),
        );
    }
    let batch = Batch::new(ids, labels).unwrap().with_attention_mask(mask).unwrap();
    let batch = if left { batch.with_position_ids(positions).unwrap() } else { batch };
    (batch, single.try_into().unwrap())
}

fn padding_changes_nothing<T: Real>(tolerance: f64) {
    for (name, model) in every_method::<T>() {
        for left in [false, true] {
            let (batch, single) = padded(left);
            // The mean over both sequences, one after the other.
            let options =
                StepOptions { divisor: Some(batch.counted() as f64), checkpointing: false };
            let (mut want, mut cost) = (model.zero_gradients(), Cost::default());
            let mut loss = 0.0;
            for one in &single {
                loss += model.loss_and_gradients(one, &options, &mut want, &mut cost).unwrap().loss;
            }
            for checkpointing in [false, true] {
                let (out, got, _) = step(&model, &batch, &StepOptions { checkpointing, ..options });
                assert!(
                    (out.loss - loss).abs() < tolerance * loss,
                    "{name}: {} against {loss}",
                    out.loss
                );
                for ((tensor, got), (_, want)) in got.named().iter().zip(want.named()) {
                    assert_close(&format!("{name} left={left} {tensor}"), got, &want, tolerance);
                }
            }
        }
    }
}

#[test]
fn padding_on_either_side_changes_no_gradient() {
    padding_changes_nothing::<f64>(1e-11);
    padding_changes_nothing::<f32>(3e-5);
}

#[test]
fn rotary_angles_depend_on_distances_alone_and_default_to_counting() {
    let model: Model<f64> = model(3);
    let plain =
        model.batch_logits(&batch(), &Instruments::default(), &mut Cost::default()).unwrap();
    for shift in [0u32, 7] {
        let positions = Array2::from_shape_fn((2, 13), |(_, t)| t as u32 + shift);
        let shifted = batch().with_position_ids(positions).unwrap();
        let logits =
            model.batch_logits(&shifted, &Instruments::default(), &mut Cost::default()).unwrap();
        assert_close("logits", &logits.view(), &plain.view(), 1e-12);
    }
    let spread =
        batch().with_position_ids(Array2::from_shape_fn((2, 13), |(_, t)| 3 * t as u32)).unwrap();
    let logits =
        model.batch_logits(&spread, &Instruments::default(), &mut Cost::default()).unwrap();
    assert!((&logits - &plain).iter().any(|x| x.abs() > 1e-3), "positions must matter");
}

/// With every token visible ahead, the first position depends on the last token; causally it must
/// not.
#[test]
fn looking_ahead_is_what_it_says() {
    let model: Model<f64> = model(3);
    let first_row = |ahead: usize, last: u32| {
        let mut batch = batch();
        batch.input_ids[[0, 12]] = last;
        let instruments = Instruments { ahead, ..Instruments::default() };
        let logits = model.batch_logits(&batch, &instruments, &mut Cost::default()).unwrap();
        logits.row(0).to_owned()
    };
    assert_eq!(first_row(0, 3), first_row(0, 4));
    assert!((first_row(12, 3) - first_row(12, 4)).iter().any(|x| x.abs() > 1e-6));
    // One layer further per step: three layers that see one token ahead reach three tokens.
    assert_eq!(first_row(1, 3), first_row(1, 4));
}

#[test]
fn wrong_shapes_are_refused() {
    let refused =
        batch().with_attention_mask(Array2::from_elem((2, 12), true)).unwrap_err().to_string();
    assert!(refused.contains("attention_mask") && refused.contains("(2, 12)"), "{refused}");
    let refused = batch().with_position_ids(Array2::zeros((3, 13))).unwrap_err().to_string();
    assert!(refused.contains("position_ids") && refused.contains("(3, 13)"), "{refused}");
}
