//! What can be said of several processes without the reference: rows given twice, weights that
//! differ.

use super::layout::Cut;
use super::of_ranks;
use super::read::{Rank, Ranks};
use crate::error::Result;
use crate::tensor_file::TensorFile;
use crate::validate::diagnosis::Fault;
use crate::validate::names::canonical_name;
use std::collections::BTreeMap;

/// What was found.
#[derive(Debug, Default)]
pub(super) struct Found {
    pub faults: Vec<Fault>,
    /// The process that lacks the last update.
    pub stale: Option<usize>,
}

pub(super) fn look(ranks: &Ranks) -> Result<Found> {
    let mut found = Found::default();
    rows(ranks, &mut found)?;
    frozen(ranks, &mut found);
    trained(ranks, &mut found)?;
    Ok(found)
}

fn same_bytes(a: &TensorFile, b: &TensorFile, name: &str, other: &str) -> Result<bool> {
    if !a.contains(name) || !b.contains(other) || a.shape(name) != b.shape(other) {
        return Ok(false);
    }
    Ok(a.bytes(name, "to be compared")? == b.bytes(other, "to be compared")?)
}

fn rows(ranks: &Ranks, found: &mut Found) -> Result<()> {
    let cut = ranks.ranks[0].parallel.data.cut;
    for (i, a) in ranks.ranks.iter().enumerate() {
        for (j, b) in ranks.ranks.iter().enumerate().skip(i + 1) {
            let same = same_bytes(&a.step, &b.step, "input_ids", "input_ids")?;
            let one = a.parallel.data.index == b.parallel.data.index;
            if one && !same {
                let what = format!("{} should have the same rows and do not", of_ranks(&[i, j]));
                let fix = "give every rank of a tensor-parallel group the same batch: seed its \
                           sampler by the data-parallel index";
                found.faults.push(Fault::new("rows-differ", what, fix));
                return Ok(());
            }
            if !one && same && cut == Cut::Rows && same_bytes(&a.step, &b.step, "labels", "labels")?
            {
                let what = format!(
                    "{} were given the same rows: the data are not divided",
                    of_ranks(&[i, j])
                );
                let fix = "give each rank its own rows: a DistributedSampler (or Accelerate's \
                           prepare) with the rank's number";
                found.faults.push(Fault::new("same-rows", what, fix));
                return Ok(());
            }
        }
    }
    Ok(())
}

/// Base weights whose digests differ.
fn frozen(ranks: &Ranks, found: &mut Found) {
    let mut of: BTreeMap<&str, Vec<(usize, &str)>> = BTreeMap::new();
    for (number, rank) in ranks.ranks.iter().enumerate() {
        rank.parallel
            .frozen
            .iter()
            .for_each(|(name, digest)| of.entry(name).or_default().push((number, digest)));
    }
    let differs = |all: &Vec<(usize, &str)>| {
        all.iter().find(|(_, digest)| *digest != all[0].1).map(|(n, _)| *n)
    };
    let wrong: Vec<(&str, usize)> =
        of.iter().filter_map(|(name, all)| Some((*name, differs(all)?))).collect();
    if let Some((name, rank)) = wrong.first() {
        let what = format!(
            "rank {rank} has other weights of the base model than rank 0: {} tensors, {name} for \
             instance",
            wrong.len()
        );
        let fix =
            "load the same checkpoint on every rank, or broadcast rank 0's weights after loading";
        found.faults.push(Fault::new("replicas-differ", what, fix));
    }
}

/// Trained tensors before the step that should be copies and are not.
fn trained(ranks: &Ranks, found: &mut Found) -> Result<()> {
    let mut differing: BTreeMap<usize, Vec<String>> = BTreeMap::new();
    let (mut compared, first) = (0, &ranks.ranks[0]);
    let Some(own) = &first.adapter else { return Ok(()) };
    for name in own.names() {
        for (number, rank) in ranks.ranks.iter().enumerate().skip(1) {
            let Some(theirs) = &rank.adapter else { continue };
            let part = |r: &Rank| r.parts.get(&canonical_name(name)).cloned();
            if part(first) == part(rank) && theirs.contains(name) {
                compared += usize::from(number == 1);
                if !same_bytes(own, theirs, name, name)? {
                    differing.entry(number).or_default().push(name.to_string());
                }
            }
        }
    }
    if differing.is_empty() {
        return Ok(());
    }
    let stale = stale(ranks, &differing)?;
    if let Some(rank) = stale {
        let what = format!(
            "rank {rank} has the trained weights of the step before: it lacks the last update"
        );
        let fix = "update on every rank, or broadcast the weights after the update; look at what \
                   skips or undoes it on this rank";
        found.faults.push(Fault::new("stale-rank", what, fix));
        found.stale = stale;
        return Ok(());
    }
    let who: Vec<usize> = differing.keys().copied().collect();
    let most = differing.values().map(Vec::len).max().unwrap_or(0);
    let what = format!(
        "{} before the step: {most} of {compared} trained tensors differ from rank 0's: each \
         trains an adapter of its own",
        of_ranks(&who)
    );
    let fix = "make the adapter before DistributedDataParallel (or broadcast it): it copies rank \
               0's weights when it wraps the model";
    found.faults.push(Fault::new("replicas-differ", what, fix));
    Ok(())
}

/// The process whose trained tensors are those that another had before the step before.
fn stale(ranks: &Ranks, differing: &BTreeMap<usize, Vec<String>>) -> Result<Option<usize>> {
    let previous = |rank: &Rank, name: &str| {
        let own = canonical_name(name);
        rank.step
            .names()
            .find(|n| n.strip_prefix("previous.").is_some_and(|n| canonical_name(n) == own))
            .map(str::to_string)
    };
    for (&other, names) in differing {
        for (behind, ahead) in [(other, 0), (0, other)] {
            let (behind_at, ahead_at) = (&ranks.ranks[behind], &ranks.ranks[ahead]);
            let mut all = true;
            for name in names {
                let before = previous(ahead_at, name);
                let same = match (&behind_at.adapter, before) {
                    (Some(adapter), Some(before)) => {
                        same_bytes(adapter, &ahead_at.step, name, &before)?
                    }
                    _ => false,
                };
                all &= same;
            }
            if all {
                return Ok(Some(behind));
            }
        }
    }
    Ok(None)
}
