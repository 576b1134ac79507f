//! Regenerates every figure: the default run of the project.
//!
//! `cargo run --release` runs the quick profile of all experiments into `figures/quick/`;
//! `cargo run --release -- --profile full` the full one into `figures/<claim>/`.

fn main() -> std::process::ExitCode {
    peft_limits_experiments::harness::reproduce(&peft_limits_experiments::ALL)
}
