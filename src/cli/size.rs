//! Sizes in bytes as flags name them.

/// Largest size a flag can name: above it sums of predicted bytes could overflow.
const LARGEST: f64 = (1u64 << 60) as f64;

/// For help pages.
pub(super) const SIZE_HELP: &str = "Sizes have a unit: GiB (or G) is 2^30 bytes, GB is 10^9; \
                                    likewise KiB, MiB, TiB and kB, MB, TB.";

/// A size in bytes: a number with a unit. `G` is `GiB`, as in other memory tools; `GB` is 10^9.
pub(super) fn parse_size(text: &str) -> Result<usize, String> {
    let text = text.trim();
    let at = text.find(|c: char| !c.is_ascii_digit() && c != '.').unwrap_or(text.len());
    let (number, unit) = (text[..at].parse::<f64>(), text[at..].trim());
    let Some(number) = number.ok().filter(|n| *n > 0.0) else {
        return Err("expected a positive number with a unit, for instance 24GiB".into());
    };
    let factor = match unit.to_ascii_lowercase().as_str() {
        // 80 bytes is never what is meant.
        "" => return Err(format!("has no unit; did you mean {text}GiB? ({text}B for bytes)")),
        "b" => 1.0,
        "kb" => 1e3,
        "mb" => 1e6,
        "gb" => 1e9,
        "tb" => 1e12,
        "k" | "kib" => 1024.0,
        "m" | "mib" => f64::from(1 << 20),
        "g" | "gib" => f64::from(1 << 30),
        "t" | "tib" => 1024.0 * f64::from(1 << 30),
        _ => {
            return Err(format!(
                "unknown unit `{unit}`: use GiB or G, GB, MiB or M, MB, KiB or K, kB, TiB or T, \
                 TB, B"
            ));
        }
    };
    let bytes = number * factor;
    if !(1.0..=LARGEST).contains(&bytes) {
        return Err("expected 1 byte to 2^60 bytes".into());
    }
    Ok(bytes as usize)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_have_units() {
        for (text, bytes) in [
            ("24GiB", 24 << 30),
            ("80G", 80 << 30),
            ("80g", 80 << 30),
            ("80GB", 80_000_000_000),
            ("512MiB", 512 << 20),
            ("512M", 512 << 20),
            ("1.5 MB", 1_500_000),
            ("3KiB", 3072),
            ("3kB", 3000),
            ("2T", 2 << 40),
            ("100B", 100),
        ] {
            assert_eq!(parse_size(text), Ok(bytes), "{text}");
        }
        for (text, why) in [
            ("80", "did you mean 80GiB?"),
            ("1.5", "did you mean 1.5GiB?"),
            ("", "positive number"),
            ("GiB", "positive number"),
            ("-1GiB", "positive number"),
            ("0GiB", "positive number"),
            ("nan", "positive number"),
            ("3 furlongs", "unknown unit `furlongs`"),
            ("0.1B", "2^60"),
            ("9999999999TiB", "2^60"),
        ] {
            let message = parse_size(text).unwrap_err();
            assert!(message.contains(why), "{text:?}: {message}");
        }
    }
}
