//! Vector registers behind the scalar types, for the few kernels that name their registers.

use pulp::Simd;

/// A scalar with a vector type on every instruction set that pulp knows.
///
/// [`super::Real`] requires it. Loops that a compiler vectorizes by itself do not need it
/// ([`super::elementwise::Kernel`]); a product that must keep its accumulators in registers does.
pub trait Lanes: Copy {
    /// One register.
    type Vector<S: Simd>: Copy + std::fmt::Debug;

    /// Scalars of one register.
    fn lanes<S: Simd>() -> usize;
    /// Whole registers, and the scalars left over.
    fn split<S: Simd>(slice: &[Self]) -> (&[Self::Vector<S>], &[Self]);
    /// As [`Lanes::split`], mutable.
    fn split_mut<S: Simd>(slice: &mut [Self]) -> (&mut [Self::Vector<S>], &mut [Self]);
    /// The first scalars of a slice shorter than a register, zeros behind them.
    fn load_part<S: Simd>(simd: S, slice: &[Self]) -> Self::Vector<S>;
    /// Writes the first scalars of a register over a slice shorter than it.
    fn store_part<S: Simd>(simd: S, slice: &mut [Self], vector: Self::Vector<S>);
    /// The scalar in every lane.
    fn splat<S: Simd>(simd: S, value: Self) -> Self::Vector<S>;
    /// a b + c.
    fn fused_multiply_add<S: Simd>(
        simd: S,
        a: Self::Vector<S>,
        b: Self::Vector<S>,
        c: Self::Vector<S>,
    ) -> Self::Vector<S>;
}

/// The methods of pulp that do for one scalar what [`Lanes`] names.
macro_rules! lanes {
    ($scalar:ty, $vector:ident, $count:ident, $split:ident, $split_mut:ident, $load:ident, $store:ident, $splat:ident, $fused:ident) => {
        impl Lanes for $scalar {
            type Vector<S: Simd> = S::$vector;

            #[inline(always)]
            fn lanes<S: Simd>() -> usize {
                S::$count
            }
            #[inline(always)]
            fn split<S: Simd>(slice: &[Self]) -> (&[Self::Vector<S>], &[Self]) {
                S::$split(slice)
            }
            #[inline(always)]
            fn split_mut<S: Simd>(slice: &mut [Self]) -> (&mut [Self::Vector<S>], &mut [Self]) {
                S::$split_mut(slice)
            }
            #[inline(always)]
            fn load_part<S: Simd>(simd: S, slice: &[Self]) -> Self::Vector<S> {
                simd.$load(slice)
            }
            #[inline(always)]
            fn store_part<S: Simd>(simd: S, slice: &mut [Self], vector: Self::Vector<S>) {
                simd.$store(slice, vector);
            }
            #[inline(always)]
            fn splat<S: Simd>(simd: S, value: Self) -> Self::Vector<S> {
                simd.$splat(value)
            }
            #[inline(always)]
            fn fused_multiply_add<S: Simd>(
                simd: S,
                a: Self::Vector<S>,
                b: Self::Vector<S>,
                c: Self::Vector<S>,
            ) -> Self::Vector<S> {
                simd.$fused(a, b, c)
            }
        }
    };
}
lanes!(
    f32,
    f32s,
    F32_LANES,
    as_simd_f32s,
    as_mut_simd_f32s,
    partial_load_f32s,
    partial_store_f32s,
    splat_f32s,
    mul_add_f32s
);
lanes!(
    f64,
    f64s,
    F64_LANES,
    as_simd_f64s,
    as_mut_simd_f64s,
    partial_load_f64s,
    partial_store_f64s,
    splat_f64s,
    mul_add_f64s
);
