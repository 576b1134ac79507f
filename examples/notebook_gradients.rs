//! The cells of `notebooks/rust_gradients.ipynb`, so that they are compiled and run by the tests,
//! which compare the two.
//!
//! `cargo run --release --example notebook_gradients`

pub(crate) fn main() -> Result<(), Box<dyn std::error::Error>> {
    // cell: a head
    use peft_limits::attention::factorization::build;
    use peft_limits::attention::synthetic::SyntheticHead;
    use peft_limits::attention::{AttentionProblem, Request, chained, exact::streaming};
    use peft_limits::cost::Cost;
    use peft_limits::limits::threshold::Threshold;

    let head: AttentionProblem<f64> = SyntheticHead::new(1024, 6).at_threshold_ratio(0.5).draw()?;
    let projected = head.project(&mut Cost::default());
    let threshold = Threshold::measure(&head, &projected, &mut Cost::default());
    println!(
        "Gamma = {:.3}, sqrt(ln L) = {:.3}, c = {:.3}",
        threshold.gamma, threshold.sqrt_log_tokens, threshold.ratio
    );
    println!(
        "largest logit {:.3}, its bound Gamma^2 {:.3}",
        threshold.largest_logit,
        threshold.gamma.powi(2)
    );

    // cell: the exact gradient
    let exact = streaming::gradients(&head, Request::Adapters)?;
    for (name, gradient) in exact.named() {
        println!(
            "{name}: {} x {}, norm {:.4}",
            gradient.nrows(),
            gradient.ncols(),
            gradient.pow2().sum().sqrt()
        );
    }
    println!(
        "loss {:.3}; {:.1} million operations",
        exact.loss.unwrap_or(f64::NAN),
        exact.cost.flops() as f64 / 1e6
    );

    // cell: the chained gradient
    println!("degree  columns  gradient error  operations / exact");
    for degree in 1..=5 {
        let method = build::<f64>(&format!("taylor:degree={degree}"))?;
        let fast = chained::gradients(&head, method.as_ref(), Request::Adapters)?;
        let error = fast.gradients.relative_gap(&exact);
        let share = fast.gradients.cost.flops() as f64 / exact.cost.flops() as f64;
        println!("{degree:>6}  {:>7}  {error:>14.2e}  {share:>18.2}", fast.certificate.rank);
        assert!(degree < 3 || error < 0.01, "degree {degree} at half the threshold: error {error}");
    }

    // cell: the threshold
    println!("     c  error of degree 4");
    let mut errors = Vec::new();
    for c in [0.25, 0.5, 1.0, 2.0] {
        let head: AttentionProblem<f64> =
            SyntheticHead::new(1024, 6).at_threshold_ratio(c).draw()?;
        let exact = streaming::gradients(&head, Request::Adapters)?;
        let method = build::<f64>("taylor:degree=4")?;
        // Above the threshold a polynomial may make a softmax denominator negative: that is
        // refused, not hidden.
        match chained::gradients(&head, method.as_ref(), Request::Adapters) {
            Ok(fast) => errors.push(fast.gradients.relative_gap(&exact)),
            Err(refused) => println!("{refused}"),
        }
        println!("{c:>6}  {:.2e}", errors.last().copied().unwrap_or(f64::NAN));
    }
    assert!(
        errors.windows(2).all(|pair| pair[0] < pair[1]),
        "the error must grow with c: {errors:?}"
    );
    // end
    Ok(())
}
