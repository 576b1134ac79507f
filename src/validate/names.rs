//! Parameter names of trainers, reduced to those of the reference model.

/// Prefixes that wrappers put before or between the parts of a name.
const WRAPPERS: [&str; 5] = [
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
    "_orig_mod.",
    "module.",
    "base_model.model.",
];

/// Prefixes of an adapter's own tensors.
const ADAPTER: [&str; 3] = ["lora_", "paca_", "s2ft_"];

/// The reference model's name of a tensor: without wrappers, `base_layer` and adapter names.
///
/// ```
/// use peft_limits::validate::canonical_name;
/// let raw = "module.base_model.model.model.layers.3.mlp.up_proj.lora_A.default.weight";
/// assert_eq!(canonical_name(raw), "model.layers.3.mlp.up_proj.lora_A");
/// let raw = "base_model.model.model.layers.0.self_attn.q_proj.base_layer.weight";
/// assert_eq!(canonical_name(raw), "model.layers.0.self_attn.q_proj.weight");
/// assert_eq!(canonical_name("model.layers.1.mlp.up_proj.lora_B.default.bias"), "model.layers.1.mlp.up_proj.lora_B_bias");
/// assert_eq!(canonical_name("model.norm.weight"), "model.norm.weight");
/// assert_eq!(canonical_name("base_model.model.lm_head.modules_to_save.default.weight"), "lm_head.weight");
/// ```
pub fn canonical_name(raw: &str) -> String {
    let mut name = raw.to_string();
    loop {
        let before = name.len();
        for wrapper in WRAPPERS {
            if let Some(rest) = name.strip_prefix(wrapper) {
                name = rest.to_string();
            }
            name = name.replace(&format!(".{wrapper}"), ".");
        }
        if name.len() == before {
            break;
        }
    }
    name = name.replace(".base_layer.", ".");
    // The copy that PEFT's modules_to_save trains in place of the module.
    if let Some((module, copy)) = name.split_once(".modules_to_save.") {
        let tensor = copy.split_once('.').map_or(copy, |(_, tensor)| tensor);
        name = format!("{module}.{tensor}");
    }
    let parts: Vec<&str> = name.split('.').collect();
    match parts.iter().position(|part| ADAPTER.iter().any(|prefix| part.starts_with(prefix))) {
        // `lora_bias`: the update's own bias.
        Some(at) if parts.last() == Some(&"bias") => format!("{}_bias", parts[..=at].join(".")),
        Some(at) => parts[..=at].join("."),
        None => name,
    }
}

/// (layer, projection or norm, tensor) of a reference model's name, for tables and heat maps.
///
/// ```
/// use peft_limits::validate::place_of;
/// let place = place_of("model.layers.3.mlp.up_proj.lora_A");
/// assert_eq!(place, (Some(3), "up_proj".to_string(), "lora_A".to_string()));
/// assert_eq!(place_of("transformer.h.1.attn.c_attn.lora_B").0, Some(1));
/// assert_eq!(place_of("lm_head.weight"), (None, "lm_head".to_string(), "weight".to_string()));
/// ```
pub fn place_of(name: &str) -> (Option<usize>, String, String) {
    let parts: Vec<&str> = name.split('.').collect();
    // GPT-2 calls its layers h.
    let layer = parts
        .iter()
        .position(|p| ["layers", "h"].contains(p))
        .and_then(|i| parts.get(i + 1)?.parse().ok());
    let tensor = parts.last().copied().unwrap_or_default();
    let module = parts.len().checked_sub(2).map_or("", |i| parts[i]);
    (layer, module.to_string(), tensor.to_string())
}
