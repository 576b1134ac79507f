//! GPU attention gradients against the processor's f64; a software device counts.
use crate::chosen::{choice, data, device};
use ndarray::Array2;
use peft_limits::attention::chained::gradients as cpu_chained;
use peft_limits::attention::exact::dense;
use peft_limits::attention::factorization::build;
use peft_limits::attention::factorization::spec::METHODS;
use peft_limits::attention::problem::Source;
use peft_limits::attention::synthetic::{Entries, SyntheticHead};
use peft_limits::attention::{AttentionProblem, Mask, Objective, Qkv, Request, SoftmaxKind, file};
use peft_limits::check::compare::assert_close;
use peft_limits::device::DeviceChoice;
use peft_limits::gpu::attention::{chained, streaming};
use peft_limits::gpu::{Device, Engine, Opened, Precision, Work};
use peft_limits::linalg::norms::relative_frobenius;
use peft_limits::tensor_file::TensorFile;
use peft_limits::{Error, Result};

struct ThereAndBack(Array2<f32>);

impl Work for ThereAndBack {
    type Output = Array2<f32>;
    fn run<B: Engine>(self, on: &Opened<B>) -> Result<Array2<f32>> {
        let a = on.upload("A", self.0.view())?;
        let product = B::product(a.clone(), a.transpose(), Precision::F32);
        on.download(product)
    }
}

#[test]
fn arrays_go_there_and_back() {
    let device = device();
    eprintln!("{}", device.info());
    let a = Array2::from_shape_fn((5, 3), |(i, j)| (i * 3 + j) as f32);
    assert_eq!(device.run("product", ThereAndBack(a.t().to_owned())).unwrap(), a.t().dot(&a));
    assert!(matches!(
        device.run("product", ThereAndBack(Array2::zeros((0, 3)))),
        Err(Error::InvalidParam { .. })
    ));
}

struct TooLarge(u64);

impl Work for TooLarge {
    type Output = ();
    fn run<B: Engine>(self, on: &Opened<B>) -> Result<()> {
        on.check_buffer("A", (self.0 / 4 + 1) as usize)
    }
}

#[test]
fn what_cannot_be_done_is_an_error_with_names_and_sizes() {
    let device = device();
    let limit = device.info().max_buffer_bytes;
    let error = device.run("product", TooLarge(limit)).unwrap_err();
    assert!(
        matches!(&error, Error::TooLarge { needed, limit: l, .. } if *needed > *l && *l == u128::from(limit)),
        "{error}"
    );
    let error = Device::open(DeviceChoice::Gpu(99)).unwrap_err();
    assert!(
        matches!(&error, Error::NoDevice { wanted, found }
            if wanted == "gpu:99" && (found.contains("gpu:0") || choice() != DeviceChoice::Gpu(0))),
        "{error}"
    );
    assert!(matches!(Device::open(DeviceChoice::Cpu), Err(Error::NoDevice { .. })));
    assert!(matches!(Device::open(DeviceChoice::Cuda(99)), Err(Error::NoDevice { .. })));
}

struct Panics;

impl Work for Panics {
    type Output = ();
    fn run<B: Engine>(self, on: &Opened<B>) -> Result<()> {
        let a = on.upload("A", Array2::<f32>::zeros((2, 3)).view())?;
        on.download(B::product(a.clone(), a, Precision::F32)).map(|_| ())
    }
}

#[test]
fn a_panic_inside_the_engine_is_an_error_that_names_the_device_and_the_work() {
    let device = device();
    let error = device.run("a wrong product", Panics).unwrap_err();
    assert!(matches!(&error, Error::Device { op: "a wrong product", .. }), "{error}");
    let a = Array2::from_shape_fn((2, 2), |(i, j)| (i + j) as f32);
    assert_eq!(
        device.run("product", ThereAndBack(a.clone())).unwrap(),
        a.dot(&a.t()),
        "the device still works"
    );
}

const CASES: [&str; 5] = ["small", "medium", "causal", "large_logits", "softmax_one"];

fn open(case: &str) -> TensorFile {
    TensorFile::open(data(&format!("attention_{case}.safetensors"))).unwrap()
}

/// 1e-4, or 8 eps max|logit| where that is larger: a logit s carries a rounding error of about eps
/// |s|, which the exponential turns into a relative error of the same size.
fn tolerance(problem: &AttentionProblem<f64>) -> f64 {
    let projected = problem.project(&mut Default::default());
    let scores = dense::matrices(problem, &projected.qkv).S;
    let largest = scores.iter().filter(|s| s.is_finite()).fold(0.0f64, |m, s| m.max(s.abs()));
    (8.0 * f64::from(f32::EPSILON) * largest).max(1e-4)
}

/// Score tiles of at most this many numbers.
fn small_tiles(elements: u64) -> streaming::Options {
    streaming::Options { tile_bytes: 12 * elements, ..Default::default() }
}

#[test]
fn streaming_agrees_with_pytorch_on_every_fixture_and_tile() {
    let device = device();
    for case in CASES {
        let file = open(case);
        let problem: AttentionProblem<f64> = file::problem_from(&file).unwrap();
        let tolerance = tolerance(&problem);
        // The whole head in one tile, and tiles that divide neither side.
        let pairs = (problem.num_queries() * problem.num_keys()) as u64;
        for (options, request, count) in [
            (streaming::Options::default(), Request::All, 9),
            (small_tiles(pairs * 10 / 47), Request::Adapters, 6),
        ] {
            let got = streaming::gradients(&device, &problem, request, &options).unwrap();
            let want: Array2<f64> = file.matrix("O", "reference").unwrap();
            assert_close(&format!("{case}: O"), &got.output.view(), &want.view(), tolerance);
            let loss = file.vector::<f64>("loss", "reference").unwrap()[0];
            assert!((got.loss.unwrap() - loss).abs() <= tolerance * loss, "{case}");
            let named = got.named();
            assert_eq!(named.len(), count, "{case}");
            let mut worst = 0.0f64;
            for (name, gradient) in named {
                let want: Array2<f64> = file.matrix(&name, "reference").unwrap();
                worst = worst.max(relative_frobenius(&gradient.view(), &want.view()));
                assert_close(&format!("{case}: {name}"), &gradient.view(), &want.view(), tolerance);
            }
            eprintln!(
                "{case} {request:?} {options:?}: worst tensor {worst:.1e}, allowed {tolerance:.1e}"
            );
        }
    }
}

/// At least one spec of every method, and whether it is made of products; it must be refused if
/// not.
const SPECS: [(&str, bool); 12] = [
    ("taylor:degree=3", true),
    ("taylor:degree=2,center=both", true),
    ("chebyshev:degree=3,check=scan,center=both", true),
    ("fitted:degree=2", true),
    ("positive-features:rank=48", true),
    ("tensor-sketch:degree=2,rank=64", true),
    ("nystrom:rank=24", true),
    ("support-basis:degree=2,threshold=1.5", true),
    ("support-basis:degree=1,threshold=0.2", false),
    ("sparse:threshold=0.01", false),
    ("auto:eps=0.1", true),
    ("truncated-svd:rank=12", true),
];

#[test]
fn every_method_of_the_table_is_tried() {
    for (name, _) in METHODS {
        assert!(SPECS.iter().any(|(spec, _)| spec.starts_with(name)), "{name}");
    }
}

#[test]
fn chained_agrees_with_the_processor_for_every_factorization() {
    let device = device();
    for (mask, softmax) in [(Mask::Full, SoftmaxKind::Standard), (Mask::Causal, SoftmaxKind::One)] {
        // Two whole chunks of the causal scan and a shorter one.
        let head = SyntheticHead { rank: 2, mask, softmax, ..SyntheticHead::new(530, 3) };
        let problem: AttentionProblem<f64> = head.at_threshold_ratio(0.4).draw().unwrap();
        for (spec, works) in SPECS {
            let method = build::<f64>(spec).unwrap();
            // Everything once; the adapters alone for one method made on the device and one made on
            // the processor.
            let adapters =
                ["taylor:degree=3", "nystrom:rank=24"].contains(&spec).then_some(Request::Adapters);
            for request in [Request::All].into_iter().chain(adapters) {
                // Small tiles: several blocks of rows or chunks.
                let options = streaming::Options { tile_bytes: 2 << 20, ..Default::default() };
                let got = chained::gradients(&device, &problem, method.as_ref(), request, &options);
                if !works {
                    let error = got.err().unwrap();
                    assert!(
                        matches!(&error, Error::InvalidParam { requirement, .. } if requirement.contains("one by one"))
                    );
                    continue;
                }
                let got = got.unwrap_or_else(|e| panic!("{spec} {mask:?}: {e}"));
                let want = cpu_chained(&problem, method.as_ref(), request).unwrap().gradients;
                assert_close(
                    &format!("{spec} {mask:?}: O"),
                    &got.gradients.output.view(),
                    &want.output.view(),
                    1e-4,
                );
                let mut worst = 0.0f64;
                assert_eq!(got.gradients.named().len(), want.named().len());
                for ((name, ours), (_, theirs)) in
                    got.gradients.named().into_iter().zip(want.named())
                {
                    worst = worst.max(relative_frobenius(&ours.view(), &theirs.view()));
                    assert_close(
                        &format!("{spec} {mask:?} {request:?}: {name}"),
                        &ours.view(),
                        &theirs.view(),
                        1e-4,
                    );
                }
                eprintln!("{spec} {mask:?} {request:?}: worst tensor {worst:.1e}");
            }
        }
    }
}

#[test]
fn a_denominator_that_is_not_positive_is_named() {
    let device = device();
    // Degree 1 on large logits: 1 + s is negative for most pairs of some row.
    let problem: AttentionProblem<f64> =
        SyntheticHead { gamma: 12.0, entries: Entries::Normal, ..SyntheticHead::new(40, 2) }
            .draw()
            .unwrap();
    let method = build::<f64>("taylor:degree=1").unwrap();
    let options = streaming::Options::default();
    let error = chained::gradients(&device, &problem, method.as_ref(), Request::Adapters, &options)
        .err()
        .unwrap();
    assert!(
        matches!(&error, Error::NonPositiveDenominator { value, .. } if *value <= 0.0),
        "{error}"
    );
}

/// Cross-attention with given Q, K, V of unequal lengths and widths, upstream gradient given.
fn cross_head(upstream_factor: f64) -> AttentionProblem<f64> {
    let matrix = |rows: usize, columns: usize, salt: f64| {
        Array2::from_shape_fn((rows, columns), |(i, j)| {
            ((i * 7 + j * 3) as f64 * 0.37 + salt).sin()
        })
    };
    let qkv = Qkv { query: matrix(23, 5, 0.1), key: matrix(37, 5, 0.2), value: matrix(37, 3, 0.3) };
    let upstream = Objective::UpstreamGradient(matrix(23, 3, 0.4) * upstream_factor);
    AttentionProblem::new(Source::Projected(qkv), upstream, Mask::Full, SoftmaxKind::Standard, 0.8)
        .unwrap()
}

#[test]
fn cross_attention_agrees_and_is_linear_in_the_upstream_gradient() {
    let device = device();
    let gradients = |factor| {
        let options = small_tiles(100);
        streaming::gradients(&device, &cross_head(factor), Request::All, &options).unwrap()
    };
    let (once, twice) = (gradients(1.0), gradients(-2.0));
    let want = dense::gradients(&cross_head(1.0), Request::All).unwrap();
    for (((name, a), (_, b)), (_, want)) in
        once.named().into_iter().zip(twice.named()).zip(want.named())
    {
        assert_close(&name, &a.view(), &want.view(), 1e-5);
        // Powers of two and signs do not round.
        assert_eq!(b, &(a * -2.0), "{name}");
    }
    let adapters = streaming::gradients(
        &device,
        &cross_head(1.0),
        Request::Adapters,
        &streaming::Options::default(),
    );
    assert!(matches!(adapters, Err(Error::InvalidParam { .. })));
}

#[test]
fn no_tile_is_larger_than_its_budget_and_one_score_must_fit() {
    for (queries, keys, mask) in
        [(5000, 70_000, Mask::Full), (9000, 9000, Mask::Causal), (3, 2, Mask::Full)]
    {
        for elements in [1u64, 17, 5000, 1 << 22] {
            let tile = small_tiles(elements).tile(queries, keys, mask, u64::MAX).unwrap();
            assert!(
                tile.queries >= 1 && tile.keys >= 1 && tile.queries <= queries && tile.keys <= keys
            );
            assert!((tile.queries * tile.keys) as u64 <= elements, "{tile:?} {elements}");
        }
    }
    let tile = streaming::Options::default().tile(40_000, 40_000, Mask::Full, 1 << 20).unwrap();
    assert!(tile.queries * tile.keys * 4 <= 1 << 20, "the device's largest buffer counts too");
    assert!(matches!(small_tiles(0).tile(3, 3, Mask::Full, 1 << 20), Err(Error::TooLarge { .. })));
}

/// What rounding the operands costs, for the precisions that this device has.
#[test]
fn half_precision_products_cost_what_their_bits_say() {
    let device = device();
    let problem: AttentionProblem<f64> =
        SyntheticHead { gamma: 1.0, ..SyntheticHead::new(64, 8) }.draw().unwrap();
    let want = dense::gradients(&problem, Request::Adapters).unwrap();
    for precision in Precision::ALL {
        let options = streaming::Options { precision, ..Default::default() };
        let (least, most) = match precision {
            Precision::F32 => (0.0, 1e-5),
            Precision::Tf32 | Precision::F16 => (1e-6, 2e-2),
            Precision::Bf16 => (1e-5, 2e-1),
        };
        match streaming::gradients(&device, &problem, Request::Adapters, &options) {
            Ok(got) => {
                let gap = got.relative_gap(&want);
                eprintln!("{precision} products: gradient error {gap:.1e}");
                assert!(gap >= least && gap <= most, "{precision}: {gap:e}");
            }
            Err(Error::InvalidParam { name, value, requirement })
                if precision != Precision::F32 =>
            {
                eprintln!("{precision} products: not on this device ({requirement})");
                assert!(name == "products" && value == precision.to_string());
            }
            Err(error) => panic!("{precision}: {error}"),
        }
    }
}
