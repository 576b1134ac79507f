//! Matrix products on a device, in a precision that is chosen and not left to the engine.
//!
//! Burn's own `matmul` multiplies f32 matrices on tensor cores where it finds them, which round
//! each operand to TF32: 10 bits, a relative error near 5e-4, five times what this crate promises.
//! Here f32 means f32; TF32 and the half formats are an option, and all of them add up in f32.

use super::device::Opened;
use crate::device::ProductPrecision as Precision;
use crate::error::{Error, Result};
use burn::tensor::backend::{Backend, DeviceOps};
use burn::tensor::{DType, Shape, Tensor, TensorPrimitive};
use burn_cubecl::tensor::CubeTensor;
use burn_cubecl::{BoolElement, CubeBackend, CubeRuntime};
use cubecl::prelude::CubePrimitive;
use cubek::matmul::definition::{MatmulElems, MatmulGlobalElems};
use cubek::matmul::launch::{Strategy, launch_ref};
use cubek::std::InputBinding;

/// A burn backend whose products this crate can launch itself.
pub trait Engine: Backend {
    /// Whether the device has products of this precision.
    fn has(device: &Self::Device, precision: Precision) -> bool;

    /// `a b` over the last two axes; leading axes must be equal. `[.., m, k]` by `[.., k, n]`.
    ///
    /// # Panics
    /// If shapes disagree or the device has no such product: within [`super::Device::run`] an
    /// [`Error::Device`].
    fn product<const D: usize>(
        a: Tensor<Self, D>,
        b: Tensor<Self, D>,
        precision: Precision,
    ) -> Tensor<Self, D>;
}

impl<R, BT> Engine for CubeBackend<R, f32, i32, BT>
where
    R: CubeRuntime,
    R::Device: DeviceOps,
    BT: BoolElement,
{
    fn has(device: &Self::Device, precision: Precision) -> bool {
        match precision {
            Precision::F32 => true,
            Precision::Tf32 => R::client(device)
                .properties()
                .supports_type(cubecl::tf32::as_type_native_unchecked().storage_type()),
            Precision::Bf16 => Self::supports_dtype(device, DType::BF16),
            Precision::F16 => Self::supports_dtype(device, DType::F16),
        }
    }

    fn product<const D: usize>(
        a: Tensor<Self, D>,
        b: Tensor<Self, D>,
        precision: Precision,
    ) -> Tensor<Self, D> {
        let mut shape = a.dims();
        let [m, n] = [a.dims()[D - 2], b.dims()[D - 1]];
        assert!(
            a.dims()[D - 1] == b.dims()[D - 2] && a.dims()[..D - 2] == b.dims()[..D - 2],
            "a product of {:?} and {:?}",
            a.dims(),
            b.dims()
        );
        (shape[D - 2], shape[D - 1]) = (m, n);
        let out: Tensor<Self, D> = Tensor::empty(Shape::from(shape), &a.device());
        let (dtype, strategy) = match precision {
            // Plain threads, no tensor cores.
            Precision::F32 => (DType::F32, Strategy::SimpleUnit(Default::default())),
            // Tensor cores where there are any: operands of type f32 are then rounded to TF32.
            Precision::Tf32 => (DType::F32, Strategy::Auto),
            Precision::Bf16 => (DType::BF16, Strategy::Auto),
            Precision::F16 => (DType::F16, Strategy::Auto),
        };
        let rounded = |t: Tensor<Self, D>| if dtype == DType::F32 { t } else { t.cast(dtype) };
        let (a, b) = (primitive(rounded(a)), primitive(rounded(b)));
        let out = primitive(out);
        let mut elements = MatmulElems::from_globals(&MatmulGlobalElems {
            lhs: dtype.into(),
            rhs: dtype.into(),
            out: DType::F32.into(),
        });
        let client = out.client.clone();
        let input = |t: CubeTensor<R>| InputBinding::new(t.binding(), dtype.into());
        launch_ref(&strategy, &client, input(a), input(b), out.clone().binding(), &mut elements)
            .unwrap_or_else(|e| panic!("a {precision} product: {e:?}"));
        Tensor::from_primitive(TensorPrimitive::Float(out))
    }
}

impl<B: Engine> Opened<B> {
    /// The precisions that the device has products of.
    pub fn precisions(&self) -> Vec<Precision> {
        Precision::ALL.into_iter().filter(|&p| B::has(&self.device, p)).collect()
    }

    /// Refuses a precision that the device has no products of.
    ///
    /// # Errors
    /// [`Error::InvalidParam`] with those it has.
    pub fn require(&self, precision: Precision) -> Result<()> {
        if B::has(&self.device, precision) {
            return Ok(());
        }
        let all = self.precisions().iter().map(Precision::to_string).collect::<Vec<_>>().join(", ");
        Err(Error::invalid(
            "products",
            precision,
            format!("must be one that {} has: {all}", self.info),
        ))
    }
}

fn primitive<R, BT, const D: usize>(t: Tensor<CubeBackend<R, f32, i32, BT>, D>) -> CubeTensor<R>
where
    R: CubeRuntime,
    R::Device: DeviceOps,
    BT: BoolElement,
{
    t.into_primitive().tensor()
}
