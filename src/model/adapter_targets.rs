//! Which modules an adapter acts on, by PEFT's rules.

use fancy_regex::{Regex, RegexBuilder};

/// Steps of a pattern that goes back on itself; names are short.
const BACKTRACK_LIMIT: usize = 100_000;
/// Bytes of a compiled pattern: some tens of thousands of characters.
const SIZE_LIMIT: usize = 8 << 20;

/// A pattern in Python's syntax, look-around included.
///
/// # Errors
/// Why it is none.
pub(super) fn pattern(text: &str) -> Result<Regex, String> {
    RegexBuilder::new(text)
        .backtrack_limit(BACKTRACK_LIMIT)
        .delegate_size_limit(SIZE_LIMIT)
        .build()
        .map_err(|e| e.to_string())
}

/// One that must match the whole name.
///
/// # Errors
/// As [`pattern`].
pub(super) fn whole(text: &str) -> Result<Regex, String> {
    pattern(&format!("^(?:{text})$"))
}

/// Whether a pattern matches. One that gives up does not: what it would have named is then left
/// over in the file.
fn matches(pattern: &Regex, name: &str) -> bool {
    pattern.is_match(name).unwrap_or(false)
}

/// Modules by name.
#[derive(Debug, Clone)]
pub(super) enum Names {
    /// Every linear layer but the output projection.
    AllLinear,
    /// Whole names, or their ends after a dot.
    List(Vec<String>),
    /// Matched against the whole name.
    Pattern(Regex),
}

impl Names {
    fn has(&self, name: &str) -> bool {
        match self {
            Names::AllLinear => true,
            Names::List(names) => names.iter().any(|target| ends_with(name, target)),
            Names::Pattern(pattern) => matches(pattern, name),
        }
    }
}

/// PEFT's rule for a name of a list: the whole name or its end after a dot.
pub(super) fn ends_with(name: &str, target: &str) -> bool {
    name == target || name.strip_suffix(target).is_some_and(|head| head.ends_with('.'))
}

/// `target_modules`, `exclude_modules`, `layers_to_transform`, `layers_pattern`,
/// `target_parameters`.
#[derive(Debug, Clone)]
pub(super) struct Targets {
    pub modules: Names,
    /// Never adapted, whatever the targets say.
    pub excluded: Option<Names>,
    /// `modules_to_save`, which are never adapted either.
    pub saved: Vec<Regex>,
    /// The only layers, for modules that a list names by their end.
    pub layers: Option<Vec<usize>>,
    /// How a name tells its layer, in the group `idx`.
    pub layer_patterns: Vec<Regex>,
    /// Parameters that are not a module's weight, as experts are. Of all the rules only their names
    /// act on them.
    pub parameters: Vec<String>,
}

impl Targets {
    /// Whether a module is adapted.
    pub fn module(&self, name: &str) -> bool {
        let excluded = self.excluded.as_ref().is_some_and(|names| names.has(name));
        if excluded
            || self.saved.iter().any(|saved| matches(saved, name))
            || !self.modules.has(name)
        {
            return false;
        }
        let Names::List(names) = &self.modules else { return true };
        let Some(layers) = &self.layers else { return true };
        // A list that gives the whole name means it whatever the layers are.
        names.iter().any(|target| target == name)
            || self.layer_of(name).is_some_and(|layer| layers.contains(&layer))
    }

    fn layer_of(&self, name: &str) -> Option<usize> {
        let found =
            self.layer_patterns.iter().find_map(|pattern| pattern.captures(name).ok().flatten())?;
        found.name("idx")?.as_str().parse().ok()
    }

    /// Whether a module outside the layers is adapted; `all-linear` leaves those out.
    pub fn outside(&self, name: &str) -> bool {
        !matches!(self.modules, Names::AllLinear) && self.module(name)
    }

    /// Whether a parameter is adapted.
    pub fn parameter(&self, name: &str) -> bool {
        self.parameters.iter().any(|target| ends_with(name, target))
    }
}

/// How names tell their layer: by `layers_pattern`, or by the first number after two parts.
///
/// # Errors
/// As [`pattern`].
pub(super) fn layer_patterns(names: &[String]) -> Result<Vec<Regex>, String> {
    if names.is_empty() {
        return Ok(vec![pattern(r"^.*?\.[^.]*\.(?P<idx>\d+)\.")?]);
    }
    names.iter().map(|name| pattern(&format!(r"^(?:|.*?\.)(?:{name})\.(?P<idx>\d+)\."))).collect()
}

/// Values by pattern, of `rank_pattern` and `alpha_pattern`: the first that matches counts, in the
/// order of the file.
#[derive(Debug, Clone, Default)]
pub(super) struct ByPattern(Vec<(Regex, f64)>);

impl ByPattern {
    /// A key matches a whole name or its end after a dot.
    ///
    /// # Errors
    /// As [`pattern`].
    pub fn new<'a>(entries: impl Iterator<Item = (&'a str, f64)>) -> Result<Self, String> {
        let entries =
            entries.map(|(key, value)| Ok((pattern(&format!(r"^(?:.*\.)?(?:{key})$"))?, value)));
        Ok(Self(entries.collect::<Result<_, String>>()?))
    }

    /// The value of a name.
    pub fn of(&self, name: &str) -> Option<f64> {
        self.0.iter().find(|(key, _)| matches(key, name)).map(|(_, value)| *value)
    }

    /// All values.
    pub fn values(&self) -> impl Iterator<Item = f64> + '_ {
        self.0.iter().map(|(_, value)| *value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn targets(modules: Names) -> Targets {
        Targets {
            modules,
            excluded: None,
            saved: Vec::new(),
            layers: None,
            layer_patterns: layer_patterns(&[]).unwrap(),
            parameters: Vec::new(),
        }
    }

    fn list(names: &[&str]) -> Names {
        Names::List(names.iter().map(ToString::to_string).collect())
    }

    #[test]
    fn names_and_their_ends() {
        let t = targets(list(&["q_proj", "model.layers.1.mlp.up_proj"]));
        assert!(
            t.module("model.layers.0.self_attn.q_proj") && t.module("model.layers.1.mlp.up_proj")
        );
        assert!(
            !t.module("model.layers.0.mlp.up_proj")
                && !t.module("model.layers.0.self_attn.xq_proj")
        );
    }

    #[test]
    fn layers_limit_the_ends_only() {
        let mut t = targets(list(&["q_proj", "lm_head", "model.layers.2.mlp.up_proj"]));
        t.layers = Some(vec![1]);
        assert!(
            t.module("model.layers.1.self_attn.q_proj")
                && !t.module("model.layers.2.self_attn.q_proj")
        );
        assert!(t.outside("lm_head") && t.module("model.layers.2.mlp.up_proj"));
        t.layer_patterns = layer_patterns(&["blocks".into(), "layers".into()]).unwrap();
        assert!(t.module("model.layers.1.self_attn.q_proj"));
        t.layer_patterns = layer_patterns(&["blocks".into()]).unwrap();
        assert!(!t.module("model.layers.1.self_attn.q_proj"));
    }

    #[test]
    fn exclusions_come_first() {
        let mut t = targets(Names::AllLinear);
        t.excluded = Some(Names::Pattern(whole(r".*\.1\..*").unwrap()));
        t.saved = vec![whole(r"(?:.*\.)?down_proj(?:\..*)?").unwrap()];
        assert!(
            t.module("model.layers.0.self_attn.q_proj")
                && !t.module("model.layers.1.self_attn.q_proj")
        );
        assert!(!t.module("model.layers.0.mlp.down_proj") && !t.outside("lm_head"));
    }

    #[test]
    fn look_around_is_python_s() {
        let t = targets(Names::Pattern(
            whole(r"model(?=\.).*(?<!k)_proj(?!.)|(?!.*layers).*").unwrap(),
        ));
        assert!(
            t.module("model.layers.0.self_attn.v_proj")
                && !t.module("model.layers.0.self_attn.k_proj")
        );
        assert!(t.outside("lm_head"));
    }

    #[test]
    fn the_first_pattern_of_the_file_counts() {
        let ranks = ByPattern::new(
            [(r"layers\.1\..*", 2.0), ("q_proj", 6.0), ("^lm_head", 3.0)].into_iter(),
        )
        .unwrap();
        assert_eq!(ranks.of("model.layers.1.self_attn.q_proj"), Some(2.0));
        assert_eq!(ranks.of("model.layers.0.self_attn.q_proj"), Some(6.0));
        assert_eq!((ranks.of("lm_head"), ranks.of("model.embed_tokens")), (Some(3.0), None));
        assert!(ByPattern::new([("(", 1.0)].into_iter()).unwrap_err().contains("paren"));
        // Neither memory nor time grows with what a pattern asks for.
        assert!(pattern("((a{1000}){1000}){1000}").is_err());
        let back = targets(Names::Pattern(whole(r"(?=(a+)+$)(a|aa)+\1b").unwrap()));
        assert!(!back.module(&"a".repeat(60)));
    }
}
