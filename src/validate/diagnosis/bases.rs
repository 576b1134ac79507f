//! Base weights that are not those of the dump: an adapter merged into them, or an initialisation
//! taken away.

use super::{Context, Fault, Tested};
use crate::adapters::Method;
use crate::error::Result;
use crate::linalg::decompositions;
use crate::validate::reference::Variant;
use ndarray::{Array2, ArrayView2, s};

/// Adapters inside the base weight already, or taken out of it, and applied besides with the
/// declared factor.
pub(super) fn merged(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    for (sign, name, what, fix) in [
        (
            1.0,
            "adapter-twice",
            "the adapter is merged into the base weight and applied besides",
            "unmerge the base weight before training, or start from the original checkpoint",
        ),
        (
            -1.0,
            "wrong-base",
            "the base weight is the dumped one minus the adapter's product (PiSSA's residual, or \
             another initialisation that changes the base); the dump declares the original",
            "give the base model that the trainer multiplies by: model_path= of the residual \
             weights",
        ),
    ] {
        let mut model = context.case.model.clone();
        let mut any = false;
        for layer in &mut model.layers {
            for (_, projection) in layer.projections_mut() {
                let method = projection.method.clone();
                any |= projection.add_update_to_base(&method, sign)?;
            }
        }
        if any && !tested.settled() {
            context.test(
                Fault::new(name, what, fix),
                &Variant { forward: Some(&model), ..Variant::default() },
                |_| (),
                tested,
            )?;
        }
    }
    Ok(())
}

/// Widest weight whose decomposition is tried.
const LARGEST_DECOMPOSED: usize = 1024;

/// Base weights from which an initialisation took its product away, after the adapter has moved on:
/// the largest singular values (PiSSA), or the first rows of a QR decomposition (OLoRA).
pub(super) fn initial_products(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    let model = &context.case.model;
    if model.config.hidden_size.max(model.config.intermediate_size) > LARGEST_DECOMPOSED {
        return Ok(());
    }
    for (name, product) in [
        ("PiSSA", largest_singular as fn(ArrayView2<f64>, usize, f64) -> Result<Array2<f64>>),
        ("OLoRA", first_of_qr),
    ] {
        if tested.settled() {
            return Ok(());
        }
        let mut changed = model.clone();
        let mut any = false;
        for layer in &mut changed.layers {
            for (_, projection) in layer.projections_mut() {
                if let Method::Lora(m) = &projection.method {
                    let (rank, scaling) = (m.spec.rank, m.scaling);
                    let taken = product(projection.base.dense().view(), rank, scaling)?;
                    projection.base.change("base", move |weight| *weight -= &taken)?;
                    any = true;
                }
            }
        }
        if !any {
            return Ok(());
        }
        let what = format!(
            "the base weight is the dumped one without the product that {name} starts its adapters \
             from; the dump declares the original"
        );
        let fix = "give the base model that the trainer multiplies by: model_path= of the residual \
                   weights";
        let variant = Variant { forward: Some(&changed), ..Variant::default() };
        context.test(Fault::new("wrong-base", what, fix), &variant, |_| (), tested)?;
    }
    Ok(())
}

/// The best approximation of rank r.
fn largest_singular(weight: ArrayView2<f64>, rank: usize, _scaling: f64) -> Result<Array2<f64>> {
    let svd = decompositions::svd(weight)?;
    let rank = rank.min(svd.s.len());
    let left = &svd.u.slice(s![.., ..rank]) * &svd.s.slice(s![..rank]);
    Ok(left.dot(&svd.vt.slice(s![..rank, ..])))
}

/// The first r columns of Q times the first r rows of R, times the scaling.
fn first_of_qr(weight: ArrayView2<f64>, rank: usize, scaling: f64) -> Result<Array2<f64>> {
    let rank = rank.min(weight.nrows()).min(weight.ncols());
    let q = decompositions::orthonormal_columns(weight.slice(s![.., ..rank]))?;
    Ok(q.dot(&q.t().dot(&weight)) * scaling)
}
