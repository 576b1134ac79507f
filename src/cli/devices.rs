//! `peft-limits devices`, and the `--device` of other commands.

use crate::error::Result;
use clap::Args;
use std::process::ExitCode;

/// Help of every `--device`.
pub(super) const DEVICE_HELP: &str = "Where to compute: cpu, gpu or gpu:N (Vulkan, Metal, DirectX \
                                      12), cuda or cuda:N; `peft-limits devices` lists them";

/// Help of every `--products`.
pub(super) const PRODUCTS_HELP: &str = "What a GPU rounds the operands of products to, sums \
                                        staying f32: f32, tf32, bf16, f16; `peft-limits devices` \
                                        says what it has";

#[derive(Args)]
pub(super) struct DevicesArgs {}

#[cfg(feature = "gpu")]
pub(super) fn run(_: &DevicesArgs) -> Result<ExitCode> {
    use crate::gpu::{Device, Kind};
    use crate::report::{Row, Table};
    let gib = |bytes: u64| format!("{:.1} GiB", bytes as f64 / f64::from(1u32 << 30));
    let products = |choice| match Device::open(choice) {
        Ok(device) => {
            device.precisions().iter().map(ToString::to_string).collect::<Vec<_>>().join(" ")
        }
        Err(_) => "cannot be opened".into(),
    };
    let devices = Device::list();
    let mut table = Table::default();
    for d in &devices {
        table.push(
            &Row::new()
                .with("--device", d.choice.to_string().as_str())
                .with("name", d.name.as_str())
                .with("by", d.backend.as_str())
                .with("kind", d.kind.to_string().as_str())
                .with("driver", d.driver.as_str())
                .with("products", products(d.choice).as_str())
                .with("largest buffer", gib(d.max_buffer_bytes).as_str())
                .with("memory", d.memory_bytes.map_or("not told".into(), gib).as_str()),
        );
    }
    print!("{}", table.to_text(usize::MAX));
    if devices.is_empty() {
        println!(
            "no GPU was found; --device cpu always works. On Linux a Vulkan driver is needed, or \
             NVIDIA's for cuda"
        );
    }
    if devices.iter().any(|d| d.kind == Kind::Software) {
        println!(
            "a software device runs on the processor: its results are right, its times say nothing \
             about GPUs"
        );
    }
    if !cfg!(feature = "cuda") {
        println!(
            "this program was built without CUDA; build with `cargo build --release --features \
             cuda` for it"
        );
    }
    Ok(ExitCode::SUCCESS)
}

#[cfg(not(feature = "gpu"))]
pub(super) fn run(_: &DevicesArgs) -> Result<ExitCode> {
    println!("cpu only: this program was built without GPU support");
    println!("for Vulkan, Metal and DirectX 12:  cargo build --release --features gpu");
    println!("for NVIDIA's CUDA too:             cargo build --release --features cuda");
    println!("neither needs a toolkit to build");
    Ok(ExitCode::SUCCESS)
}
