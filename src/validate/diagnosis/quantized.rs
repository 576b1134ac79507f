//! Faults of a quantized base: its stored parts are read in another way than they were written.

use super::{Context, Fault, Tested};
use crate::adapters::BaseWeight;
use crate::error::Result;
use crate::precision::Precision;
use crate::validate::reference::Variant;

/// (name, what, where to look).
const FAULTS: [(&str, &str, &str); 2] = [
    (
        "nf4-nibbles",
        "the two four-bit codes of each byte of the base are taken in the wrong order",
        "bitsandbytes keeps the earlier entry in the high half of a byte",
    ),
    (
        "nf4-offset",
        "the base's scales are restored without the mean that double quantization took out",
        "scale = value of the byte * nested_absmax + nested_offset",
    ),
];

pub(super) fn test(context: &Context<'_>, tested: &mut Tested<'_>) -> Result<()> {
    if context.case.quantized.is_empty() {
        return Ok(());
    }
    let format =
        context.case.rounding.quantized.map_or(Precision::F32, |restored| restored.forward);
    for (name, what, fix) in FAULTS {
        let mut model = context.case.model.clone();
        let mut any = false;
        for ((layer, p), packed) in &context.case.quantized {
            if let Some((_, misread)) =
                packed.misread().into_iter().find(|(mistake, _)| *mistake == name)
            {
                model.layers[*layer].projection_mut(*p).base =
                    BaseWeight::restored(misread, format);
                any = true;
            }
        }
        if any && !tested.settled() {
            let variant = Variant { forward: Some(&model), ..Variant::default() };
            context.test(Fault::new(name, what, fix), &variant, |_| (), tested)?;
        }
    }
    Ok(())
}
