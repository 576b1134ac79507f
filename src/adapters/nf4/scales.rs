//! The sixteen levels, and scales of blocks: single, or quantized again to the dynamic eight-bit
//! type.

use std::sync::{Arc, LazyLock};

/// Scales that share one second-level scale.
pub const SCALE_BLOCK: usize = 256;

/// The sixteen levels, ascending from -1 to 1, with an exact zero at position 7 (\[QLoRA\] appendix
/// E).
///
/// They are quantiles of a normal law, rounded on the way: `Phi^-1(p) / Phi^-1(p_max)` to 2e-6.
pub const LEVELS: [f32; 16] = [
    -1.0,
    -0.696_192_8,
    -0.525_073_05,
    -0.394_917_5,
    -0.284_441_38,
    -0.184_773_43,
    -0.091_050_036,
    0.0,
    0.079_580_3,
    0.160_930_2,
    0.246_112_3,
    0.337_915_24,
    0.440_709_83,
    0.562_617,
    0.722_956_84,
    1.0,
];

/// Code of the level nearest to `x`, for x in [-1, 1]; ties go to the smaller level.
///
/// ```
/// use peft_limits::adapters::nf4::nearest;
/// assert_eq!((nearest(-1.0), nearest(0.0), nearest(0.99)), (0, 7, 15));
/// ```
pub fn nearest(x: f32) -> u8 {
    static MIDPOINTS: LazyLock<[f32; 15]> =
        LazyLock::new(|| std::array::from_fn(|i| (LEVELS[i] + LEVELS[i + 1]) / 2.0));
    MIDPOINTS.partition_point(|&m| m < x) as u8
}

/// The 256 values of the dynamic eight-bit type, ascending: 0, 1 and, for each exponent i from -6
/// to 0, 2^(i + 6) means of even steps of [0.1, 1] times 10^i, with both signs.
pub fn dynamic_values() -> &'static [f32; 256] {
    static VALUES: LazyLock<[f32; 256]> = LazyLock::new(|| {
        let mut values = vec![0.0, 1.0];
        for i in 0..7 {
            let steps = 1usize << i;
            // PyTorch's linspace counts from either end up to the middle, in f32.
            let step = (1.0f32 - 0.1) / steps as f32;
            let boundary = |k: usize| {
                if 2 * k < steps + 1 {
                    step.mul_add(k as f32, 0.1)
                } else {
                    (-step).mul_add((steps - k) as f32, 1.0)
                }
            };
            // The power is an f64 that a product with an f32 tensor rounds.
            let power = 10f64.powi(i - 6) as f32;
            values.extend((0..steps).flat_map(|k| {
                let value = power * ((boundary(k) + boundary(k + 1)) / 2.0);
                [value, -value]
            }));
        }
        values.sort_unstable_by(f32::total_cmp);
        std::array::from_fn(|k| values[k])
    });
    &VALUES
}

/// Eight-bit code of x in [-1, 1], by the nearest of 65536 even steps.
fn dynamic_code(x: f32) -> u8 {
    const HALF: f32 = 32767.5;
    static TABLE: LazyLock<Vec<u8>> = LazyLock::new(|| {
        let d = dynamic_values();
        let code = |step: usize| {
            let x = step as f32 / HALF - 1.0;
            d.windows(2).filter(|pair| (pair[0] + pair[1]) / 2.0 < x).count() as u8
        };
        (0..1 << 16).map(code).collect()
    });
    TABLE[(((x + 1.0) * HALF + 0.5).floor().clamp(0.0, 65535.0)) as usize]
}

/// How the scales of the blocks are stored.
#[derive(Debug, Clone, PartialEq)]
pub enum Scales {
    /// One f32 for each block.
    Single(Vec<f32>),
    /// Quantized again.
    Double {
        /// One for each block.
        bytes: Vec<u8>,
        /// Second-level scales, one for each `block` bytes.
        second: Vec<f32>,
        /// Value of each byte.
        values: Arc<[f32; 256]>,
        /// Mean of the scales.
        mean: f32,
        /// Bytes that share a second-level scale.
        block: usize,
    },
}

impl Scales {
    /// Scales of blocks, quantized again.
    pub(super) fn double(scales: &[f32]) -> Self {
        static VALUES: LazyLock<Arc<[f32; 256]>> = LazyLock::new(|| Arc::new(*dynamic_values()));
        let mean =
            (scales.iter().map(|&c| f64::from(c)).sum::<f64>() / scales.len().max(1) as f64) as f32;
        let (mut bytes, mut second) = (Vec::with_capacity(scales.len()), Vec::new());
        for group in scales.chunks(SCALE_BLOCK) {
            let s = group.iter().fold(0.0f32, |m, c| m.max((c - mean).abs()));
            second.push(s);
            let inverse = 1.0 / s;
            bytes.extend(
                group.iter().map(|c| if s > 0.0 { dynamic_code((c - mean) * inverse) } else { 0 }),
            );
        }
        Self::Double { bytes, second, values: VALUES.clone(), mean, block: SCALE_BLOCK }
    }

    /// Restored scale of a block.
    pub(super) fn of(&self, index: usize) -> f32 {
        match self {
            Self::Single(scales) => scales[index],
            Self::Double { bytes, second, values, mean, block } => {
                values[usize::from(bytes[index])] * second[index / block] + mean
            }
        }
    }

    pub(super) fn len(&self) -> usize {
        match self {
            Self::Single(scales) => scales.len(),
            Self::Double { bytes, .. } => bytes.len(),
        }
    }

    /// Bytes stored, without the table of values, which all matrices share.
    pub(super) fn bytes(&self) -> usize {
        match self {
            Self::Single(scales) => 4 * scales.len(),
            Self::Double { bytes, second, .. } => bytes.len() + 4 * second.len() + 4,
        }
    }

    /// Most by which the restored scale of a block can differ from the true one.
    pub(super) fn error_bound(&self, index: usize) -> f64 {
        match self {
            Self::Single(_) => 0.0,
            Self::Double { second, values, mean, block, .. } => {
                let s = f64::from(second[index / block]);
                let ends = [1.0 + values[0], 1.0 - values[255]];
                let gaps = values.windows(2).map(|pair| (pair[1] - pair[0]) / 2.0).chain(ends);
                let half_gap = f64::from(gaps.fold(0.0, f32::max));
                s * (half_gap + 1.0 / 65535.0)
                    + 4.0 * f64::from(f32::EPSILON) * (s + f64::from(mean.abs()))
            }
        }
    }
}
