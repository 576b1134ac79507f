//! By what the losses of several processes' micro-batches are divided.

use super::batch::Counted;
use super::layout::{Across, Cut, Reduce};
use super::read::Ranks;
use crate::validate::manifest::Reduction;

impl Ranks {
    /// By how much the loss of one of `parts` parts of the data counts in the step's.
    pub(super) fn weight(&self, parts: usize) -> f64 {
        if self.ranks[0].parallel.reduce == Reduce::Mean { 1.0 / parts as f64 } else { 1.0 }
    }

    /// Divisors of the micro-batches' losses in the merged step.
    pub(super) fn divisors(
        &self,
        speakers: &[usize],
        counted: &[Vec<Counted>],
        across: Across,
    ) -> Vec<f64> {
        let loss = &self.ranks[0].manifest.loss;
        let ranks = 1.0 / self.weight(speakers.len());
        let of = |part: &[Counted]| part.iter().map(|m| m.1).sum::<usize>() as f64;
        let total: f64 = counted.iter().map(|part| of(part)).sum();
        let micros: usize = counted.iter().map(Vec::len).sum();
        let cut = self.ranks[0].parallel.data.cut == Cut::Sequence;
        let divisor = |part: &Vec<Counted>, tokens: usize| match (loss.reduction, across) {
            (Reduction::Sum, Across::RankMean) => ranks,
            (Reduction::Sum, Across::GlobalMean) => 1.0,
            (Reduction::Mean, _) if let Some(divisor) = loss.divisor => {
                divisor * if across == Across::RankMean { ranks } else { 1.0 }
            }
            (Reduction::Mean, _) if cut => total,
            (Reduction::Mean, Across::RankMean) => of(part) * ranks,
            (Reduction::Mean, Across::GlobalMean) => total,
            (Reduction::MicroMean, Across::RankMean) => {
                (tokens * part.len()) as f64 * if cut { 1.0 } else { ranks }
            }
            (Reduction::MicroMean, Across::GlobalMean) => (tokens * micros) as f64,
        };
        counted.iter().flat_map(|part| part.iter().map(|m| divisor(part, m.1))).collect()
    }

    /// Divisors as the gradient of the loss at the logits tells them: 1 - p of the label over minus
    /// its entry.
    pub(super) fn observed_divisors(&self, speakers: &[usize]) -> Option<Vec<f64>> {
        let mut all = Vec::new();
        let weight = self.weight(speakers.len());
        for number in speakers {
            let rank = &self.ranks[*number];
            let read = |name: &str| {
                let (shape, values) =
                    rank.step.raw_tensor::<f64>(name, "the gradient of the loss").ok()?;
                (shape.len() == 3).then_some((shape, values))
            };
            let loss = &rank.manifest.loss;
            if !rank.step.contains("logits")
                || !rank.step.contains("dlogits")
                || loss.label_smoothing > 0.0
            {
                return None;
            }
            let (shape, logits) = read("logits")?;
            let (other, gradient) = read("dlogits")?;
            let (_, labels) =
                rank.step.raw_tensor::<f64>("labels", "what this process predicts").ok()?;
            let (length, width) = (shape[1], shape[2]);
            if shape != other || labels.len() != shape[0] * length || length == 0 {
                return None;
            }
            let micro = &loss.micro_batch_rows;
            let micro = if micro.is_empty() { vec![shape[0]] } else { micro.clone() };
            let mut row = 0;
            for rows in micro {
                let (mut want, mut got) = (0.0, 0.0);
                for b in row..row + rows {
                    for t in 0..length - 1 {
                        let label = labels[b * length + t + 1];
                        if label < 0.0 || label as usize >= width {
                            continue;
                        }
                        let line = (b * length + t) * width;
                        let z = &logits[line..line + width];
                        let most = z.iter().fold(f64::NEG_INFINITY, |m, x| m.max(*x));
                        let sum: f64 = z.iter().map(|x| (x - most).exp()).sum();
                        want += 1.0 - (z[label as usize] - most).exp() / sum;
                        got -= gradient[line + label as usize] / loss.scale * weight;
                    }
                }
                row += rows;
                all.push(want / got);
            }
        }
        all.iter().all(|d| d.is_finite() && *d > 0.0).then_some(all)
    }
}

/// Which of two lists of divisors the observed ones are nearer to.
pub(super) fn nearer(seen: &[f64], of: [&Vec<f64>; 2]) -> Across {
    let far = |want: &Vec<f64>| seen.iter().zip(want).map(|(a, b)| (a / b).ln().abs()).sum::<f64>();
    if far(of[0]) <= far(of[1]) { Across::RankMean } else { Across::GlobalMean }
}
