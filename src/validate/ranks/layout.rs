//! What a process held of a step: key `parallel` of its manifest.

use super::merge::parameter;
use crate::validate::names::canonical_name;
use serde::{Deserialize, Serialize};
use std::collections::BTreeMap;
use std::ops::Range;

/// How the processes divide the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Cut {
    /// Each has rows of its own.
    Rows,
    /// All have the same rows.
    Same,
    /// Each has a part of every row.
    Sequence,
}

/// How the gradients of the processes' data are put together.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Reduce {
    /// Averaged.
    Mean,
    /// Added.
    Sum,
}

/// By which tokens the loss is divided.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Across {
    /// Each process by its own: the step's loss is the mean of the processes' means.
    RankMean,
    /// By those of all.
    GlobalMean,
}

/// A process among those that divide the data.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DataPlace {
    /// How the data are divided.
    pub cut: Cut,
    /// Number of this part.
    pub index: usize,
    /// Number of parts.
    pub of: usize,
}

/// A process among those that hold parts of tensors.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Place {
    /// Its number.
    pub index: usize,
    /// How many there are.
    pub of: usize,
}

/// The part of a tensor that a process holds.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Deserialize)]
#[serde(untagged)]
pub enum Part {
    /// A block.
    Block {
        /// Shape of the whole tensor.
        shape: Vec<usize>,
        /// First index of the block along each axis.
        offset: Vec<usize>,
        /// Its lengths.
        size: Vec<usize>,
        /// Of a sum that is still open: which of how many summands it is.
        #[serde(default)]
        summand: Option<[usize; 2]>,
    },
    /// Entries `flat[0]..flat[1]` of the flattened tensor.
    Flat {
        /// Shape of the whole tensor.
        shape: Vec<usize>,
        /// First entry and end.
        flat: [usize; 2],
    },
}

impl Part {
    /// Shape of the whole tensor.
    pub fn shape(&self) -> &[usize] {
        match self {
            Self::Block { shape, .. } | Self::Flat { shape, .. } => shape,
        }
    }

    /// Number of entries of the part.
    pub fn entries(&self) -> usize {
        match self {
            Self::Block { size, .. } => size.iter().product(),
            Self::Flat { flat, .. } => flat[1].saturating_sub(flat[0]),
        }
    }

    /// What is wrong with it by itself.
    pub fn defect(&self) -> Option<String> {
        match self {
            Self::Block { shape, offset, size, summand } => {
                if let Some([index, of]) = summand.filter(|[index, of]| index >= of) {
                    return Some(format!("summand {index} of {of}"));
                }
                let axes = offset.len() == shape.len() && size.len() == shape.len();
                let inside =
                    |i: usize| offset[i].checked_add(size[i]).is_some_and(|end| end <= shape[i]);
                (!axes || !(0..shape.len()).all(inside))
                    .then(|| format!("offset {offset:?} and size {size:?} in shape {shape:?}"))
            }
            Self::Flat { shape, flat } => (flat[0] > flat[1] || flat[1] > shape.iter().product())
                .then(|| format!("entries {}..{} of shape {shape:?}", flat[0], flat[1])),
        }
    }

    /// How many processes hold summands of these entries.
    pub fn summands(&self) -> usize {
        match self {
            Self::Block { summand: Some([_, of]), .. } => *of,
            _ => 1,
        }
    }

    /// Runs of entries that lie together in the part and in the whole: first entry there, first
    /// here, length.
    pub fn runs(&self) -> Vec<(usize, usize, usize)> {
        match self {
            Self::Flat { flat, .. } if flat[1] > flat[0] => vec![(flat[0], 0, flat[1] - flat[0])],
            Self::Flat { .. } => Vec::new(),
            Self::Block { .. } if self.entries() == 0 => Vec::new(),
            Self::Block { shape, offset, size, .. } => {
                let Some((&length, outer)) = size.split_last() else { return vec![(0, 0, 1)] };
                let lines: usize = outer.iter().product();
                let start = |line: usize| {
                    let (mut rest, mut at, mut stride) =
                        (line, offset[outer.len()], shape[outer.len()]);
                    for axis in (0..outer.len()).rev() {
                        at += (offset[axis] + rest % outer[axis]) * stride;
                        rest /= outer[axis];
                        stride *= shape[axis];
                    }
                    at
                };
                (0..lines).map(|line| (start(line), line * length, length)).collect()
            }
        }
    }

    /// Rows or columns of a matrix that a block holds, if it cuts that axis alone.
    pub fn along(&self, axis: usize) -> Option<Range<usize>> {
        match self {
            Self::Block { shape, offset, size, .. }
                if shape.len() == 2 && size[1 - axis] == shape[1 - axis] =>
            {
                Some(offset[axis]..offset[axis] + size[axis])
            }
            _ => None,
        }
    }
}

/// Key `parallel` of a manifest.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Parallel {
    /// Number of the process.
    pub rank: usize,
    /// Number of processes.
    pub world_size: usize,
    /// Its part of the data.
    pub data: DataPlace,
    /// Its place among those over which tensors are divided.
    #[serde(default)]
    pub tensor: Option<Place>,
    /// How gradients are put together.
    pub reduce: Reduce,
    /// By which tokens the loss is divided; as the gradient of the loss tells, when absent.
    #[serde(default)]
    pub loss: Option<Across>,
    /// What reduces the gradients, if something wraps the model.
    #[serde(default)]
    pub wrapper: Option<String>,
    /// Parts of the tensors that are not whole here, by the names of the dump's files.
    #[serde(default)]
    pub shards: BTreeMap<String, Part>,
    /// Digests of the base weights that are whole here.
    #[serde(default)]
    pub frozen: BTreeMap<String, String>,
}

impl Parallel {
    /// Parts by the reference's names, behind that of their group where they are a gradient's own.
    pub(super) fn parts(&self) -> BTreeMap<String, Part> {
        let own = |raw: &String| {
            let parameter = parameter(raw);
            format!("{}{}", &raw[..raw.len() - parameter.len()], canonical_name(parameter))
        };
        self.shards.iter().map(|(raw, part)| (own(raw), part.clone())).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_of_a_part_are_its_entries() {
        let shape = [3usize, 4, 5];
        let (offset, size) = ([1usize, 1, 2], [2usize, 3, 2]);
        let block = Part::Block {
            shape: shape.to_vec(),
            offset: offset.to_vec(),
            size: size.to_vec(),
            summand: None,
        };
        let mut want = Vec::new();
        for i in 0..size[0] {
            for j in 0..size[1] {
                for k in 0..size[2] {
                    want.push(
                        ((i + offset[0]) * shape[1] + j + offset[1]) * shape[2] + k + offset[2],
                    );
                }
            }
        }
        let runs = block.runs();
        let got: Vec<usize> = runs.iter().flat_map(|&(there, _, n)| there..there + n).collect();
        let here: Vec<usize> = runs.iter().flat_map(|&(_, here, n)| here..here + n).collect();
        assert_eq!(got, want);
        assert_eq!(here, (0..block.entries()).collect::<Vec<_>>());
        assert!(block.defect().is_none());
        let flat = Part::Flat { shape: vec![3, 4], flat: [5, 9] };
        assert_eq!((flat.runs(), flat.entries(), flat.defect()), (vec![(5, 0, 4)], 4, None));
        let outside = Part::Block { shape: vec![4], offset: vec![3], size: vec![2], summand: None };
        assert!(
            outside.defect().is_some()
                && Part::Flat { shape: vec![4], flat: [2, 5] }.defect().is_some()
        );
        let rows =
            Part::Block { shape: vec![6, 4], offset: vec![2, 0], size: vec![3, 4], summand: None };
        assert_eq!((rows.along(0), rows.along(1)), (Some(2..5), None));
    }
}
