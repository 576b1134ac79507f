//! The ladder on a device's own step: a clean step passes, planted faults are caught and named; and
//! the memory account. One test after another, since the allocator of a device is shared.
use crate::chosen::{data as folder, on_device};
use ndarray::Array2;
use peft_limits::blocks::rope::RopeTable;
use peft_limits::device::DeviceChoice;
use peft_limits::gpu::train::blocks::Matrix;
use peft_limits::gpu::train::blocks::rope::{RotaryAngles, rope_forward};
use peft_limits::gpu::train::{DeviceCase, DeviceTap, StepMemory};
use peft_limits::gpu::{Engine, Opened};
use peft_limits::model::{Batch, Model, ModelConfig, Place, Point};
use peft_limits::tensor_file::TensorFile;
use peft_limits::train::method::{MethodName, MethodParams};
use peft_limits::train::preset::preset;
use peft_limits::validate::dump::read_batch;
use peft_limits::validate::{Report, Silent, validate};
use rand::{RngExt, SeedableRng};
use std::sync::{Mutex, MutexGuard, PoisonError};

static DEVICE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    DEVICE.lock().unwrap_or_else(PoisonError::into_inner)
}

fn batch(name: &str) -> Batch {
    read_batch(&TensorFile::open(folder(name).join("reference.safetensors")).unwrap()).unwrap()
}

fn case(name: &str) -> DeviceCase {
    let mut model = Model::<f64>::read(&folder(name)).unwrap();
    let kind = match name {
        "llama_full" => {
            model.train_fully();
            None
        }
        _ => Some(model.read_adapter(&folder(name).join("adapter")).unwrap()),
    };
    DeviceCase { name: name.into(), model, kind, batch: batch(name) }
}

fn report<B: Engine>(name: &str, on: &Opened<B>, tap: Option<DeviceTap<B>>) -> Report {
    let case = case(name).run_with(on, tap).unwrap();
    validate(&case, &Silent).unwrap()
}

#[test]
fn a_clean_step_climbs_the_whole_ladder() {
    let _alone = alone();
    for name in ["llama_full", "llama_lora", "llama_dora"] {
        let report = on_device!(on => report(name, on, None));
        let shares: Vec<String> =
            report.rungs.iter().map(|r| format!("{} {:.2}", r.name.name(), r.share())).collect();
        println!("{name}: {}", shares.join(", "));
        assert!(report.passed, "{name}: {:?}", report.first_failure());
    }
}

#[test]
fn a_missing_rotary_backward_is_caught_and_named() {
    let _alone = alone();
    let shape = case("llama_lora");
    let length = shape.batch.input_ids.ncols();
    let table =
        RopeTable::<f64>::new(length, shape.model.config.head_dim, shape.model.config.rope_theta)
            .unwrap();
    let report = on_device!(on => {
        let angles = RotaryAngles::upload(&table, &on.device);
        // Rotating forward again undoes the rotation back.
        let fault = |place: Place, x| match (place.point, place.gradient) {
            (Point::Query | Point::Key, true) => rope_forward(x, &angles),
            _ => x,
        };
        report("llama_lora", on, Some(&fault))
    });
    assert!(!report.passed);
    let named = report.diagnoses.first().map(|d| (d.fault.as_str(), d.complete));
    assert_eq!(named, Some(("rotary-backward-missing", true)), "{:?}", report.diagnoses);
}

#[test]
fn a_wrong_forward_is_caught_where_it_happens() {
    let _alone = alone();
    let report = on_device!(on => {
        let fault = |place: Place, x: Matrix<_>| match (place.point, place.layer, place.gradient) {
            (Point::Gated, Some(1), false) => x.mul_scalar(1.01),
            _ => x,
        };
        report("llama_lora", on, Some(&fault))
    });
    assert!(!report.passed);
    assert!(report.first_failure().is_some());
}

/// Between forward and backward the allocator holds what was predicted, for every method: nothing
/// else is kept alive, by a view of a larger buffer for instance. 5% covers index tensors. CUDA's
/// engine pads rows to 512 bytes, so the widths of the model there are multiples of that.
#[test]
fn the_allocator_holds_what_is_predicted() {
    let (device, _alone) = (crate::chosen::device(), alone());
    let (pico, mut rng) = (preset("pico").unwrap(), rand_chacha::ChaCha8Rng::seed_from_u64(4));
    let config = match device.info().choice {
        DeviceChoice::Cuda(_) => {
            let (hidden_size, intermediate_size, num_attention_heads, head_dim) = (128, 384, 2, 64);
            ModelConfig { hidden_size, intermediate_size, num_attention_heads, head_dim, ..pico }
        }
        _ => pico,
    };
    let base = Model::<f64>::random(config.clone(), &mut rng).unwrap();
    let ids =
        Array2::from_shape_simple_fn((4, 64), || rng.random_range(0..config.vocab_size as u32));
    let batch = Batch::new(ids.clone(), ids.mapv(i64::from)).unwrap();
    let methods = [
        MethodName::Full,
        MethodName::Lora,
        MethodName::Dora,
        MethodName::Moslora,
        MethodName::Paca,
        MethodName::S2ft,
    ];
    for name in methods {
        let mut model = base.clone();
        MethodParams { rank: 3, ..MethodParams::named(name) }.apply(&mut model, None, 5).unwrap();
        // The first step compiles kernels, whose constants stay.
        StepMemory::measure(&device, &model, &batch).unwrap();
        let memory = StepMemory::measure(&device, &model, &batch).unwrap();
        println!("{}: {memory:?}", name.name());
        for (what, predicted, measured) in [
            ("at rest", memory.at_rest, memory.measured_at_rest),
            ("after forward", memory.after_forward, memory.measured_after_forward),
        ] {
            let ratio = measured as f64 / predicted as f64;
            assert!(
                (0.95..1.05).contains(&ratio),
                "{} {what}: {predicted} predicted, {measured}",
                name.name()
            );
        }
    }
}
