//! `peft-limits gradient` under mpirun: every rank reads its rows' part of the work, rank 0 writes
//! and speaks.

use super::gradient::{Dtype, GradientArgs, Method, report};
use crate::attention::shards::{RowShards, together};
use crate::device::DeviceChoice;
use crate::distributed::rows::shard;
use crate::distributed::{Ranks, Scalar, chained, ring};
use crate::error::{Error, Result};
use std::process::ExitCode;
use std::time::Instant;

/// Every rank ends with the same exit code; the first that failed says why.
pub(super) fn run(args: &GradientArgs, ranks: &Ranks) -> ExitCode {
    let outcome = args.check().and_then(|()| match args.dtype {
        _ if args.device != DeviceChoice::Cpu => Err(Error::invalid(
            "--device",
            args.device.to_string(),
            "is for one process; under mpirun leave it out",
        )),
        Some(Dtype::F32) => compute::<f32>(args, ranks),
        _ => compute::<f64>(args, ranks),
    });
    let own = outcome.err().filter(|error| !matches!(error, Error::OtherRank { .. }));
    match RowShards::<f64>::agree(ranks, own.is_some()) {
        Ok(()) => ExitCode::SUCCESS,
        Err(Error::OtherRank { rank, .. }) if rank != ranks.rank() => ExitCode::from(2),
        Err(_) => {
            if let Some(error) = own {
                eprintln!("peft-limits: {error}");
            }
            ExitCode::from(2)
        }
    }
}

fn compute<T: Scalar>(args: &GradientArgs, ranks: &Ranks) -> Result<()> {
    let loaded = args.load::<T>().and_then(|task| {
        if args.method == Method::Dense {
            let why = "is the reference of one process; under mpirun use streaming or chained";
            return Err(Error::invalid("--method", "dense", why));
        }
        Ok((shard(&task.problem, ranks.rank(), ranks.size())?, task))
    });
    let (mine, task) = together::<T, _>(ranks, loaded)?;
    let request = task.request;
    let start = Instant::now();
    let (mut gradients, certificate) = match &task.factorization {
        Some(method) => {
            let done = chained::gradients(ranks, &mine, method.as_ref(), request)?;
            (done.gradients, Some(done.certificate))
        }
        None => (ring::gradients(ranks, &mine, request)?, None),
    };
    let seconds = start.elapsed().as_secs_f64();
    let traffic = ranks.traffic();
    // Rows of all ranks, for the one file.
    let output = ranks.gather_rows(&gradients.output);
    let projected = gradients
        .projected
        .try_map(|_, rows| Ok(rows.as_ref().and_then(|rows| ranks.gather_rows(rows))))?;
    let Some(output) = output else { return Ok(()) };
    (gradients.output, gradients.projected) = (output, projected);
    report(args, &gradients, certificate.as_ref(), "cpu", seconds)?;
    println!(
        "ranks            {}; rank 0 sent {:.3e} bytes, reduced {:.3e}, scanned {:.3e}",
        ranks.size(),
        traffic.sent as f64,
        traffic.reduced as f64,
        traffic.scanned as f64
    );
    Ok(())
}
