//! Weights that stay on the disk, steps that are run in part, searches that may cost only so much.

use super::{FAULTS, case, common, dumps, folders};
use ndarray::s;
use peft_limits::tensor_file::TensorFile;
use peft_limits::validate::diagnosis::budget::Effort;
use peft_limits::validate::dump::{Case, DumpPaths, PlainSettings};
use peft_limits::validate::reference::{Evidence, Part, Variant};
use peft_limits::validate::{Precision, Report, Silent, validate};
use std::path::{Path, PathBuf};

/// The case with its weights on the disk and activations computed again.
fn open(path: &Path) -> Case {
    let (paths, manifest) = DumpPaths::of_folder(path).unwrap();
    let name = path.file_name().unwrap().to_str().unwrap();
    let mut case = Case::open(name, &paths, Some(&manifest), &PlainSettings::default()).unwrap();
    case.recompute = true;
    case
}

/// Largest difference of two results, relative to the largest entry of each tensor.
fn gap(a: &Evidence, b: &Evidence) -> f64 {
    assert_eq!(a.gradients.keys().collect::<Vec<_>>(), b.gradients.keys().collect::<Vec<_>>());
    assert_eq!(a.hidden.keys().collect::<Vec<_>>(), b.hidden.keys().collect::<Vec<_>>());
    assert_eq!(a.logits.is_some(), b.logits.is_some());
    let tensors = |e: &Evidence| -> Vec<ndarray::Array2<f64>> {
        e.gradients.values().chain(e.hidden.values()).chain(&e.logits).cloned().collect()
    };
    let mut most = (a.loss / b.loss - 1.0).abs();
    for (a, b) in tensors(a).iter().zip(&tensors(b)) {
        let unit = a.iter().fold(f64::MIN_POSITIVE, |m, x| m.max(x.abs()));
        most = a.iter().zip(b).fold(most, |m, (a, b)| m.max((a - b).abs() / unit));
    }
    most
}

/// Every method, number format and shape of the clean dumps, exact and rounded: the same numbers,
/// up to the order in which the gradient of the hidden rows adds up over blocks of the vocabulary,
/// which here is one.
#[test]
fn weights_on_the_disk_give_the_same_step() {
    for path in folders("clean") {
        let (resident, open) = (case(&path), open(&path));
        for rounding in [None, Some(resident.rounding)] {
            let variant = Variant { rounding, ..Variant::default() };
            let gap = gap(&resident.run(&variant).unwrap(), &open.run(&variant).unwrap());
            assert!(gap <= 1e-14, "{} rounded {}: {gap:e}", path.display(), rounding.is_some());
        }
    }
}

/// The same for every family, whose checkpoints hold weights transposed, fused, in halves and in
/// stacks.
#[test]
fn families_on_the_disk_give_the_same_step() {
    let families = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data/families");
    for entry in std::fs::read_dir(families).unwrap() {
        let path = entry.unwrap().path();
        for full in [false, true] {
            let Some(dump) = common::family_dump(&path, full, false) else { continue };
            let (resident, open) = (case(dump.path()), open(dump.path()));
            let run = |case: &Case| case.run(&Variant::default()).unwrap();
            let gap = gap(&run(&resident), &run(&open));
            assert!(gap <= 1e-14, "{} full {full}: {gap:e}", path.display());
            assert!(validate(&open, &Silent).unwrap().passed, "{} full {full}", path.display());
        }
    }
}

/// Faults whose hypotheses change weights, columns, slices or the order of heads.
#[test]
fn faults_are_named_with_weights_on_the_disk() {
    let changing = [
        "adapter-input-gradient",
        "adapter-twice",
        "dora-norm",
        "frozen-input-gradient",
        "grouped-heads",
        "norm-backward",
        "paca-column-order",
        "paca-rows-for-columns",
        "rope-theta",
        "s2ft-checkpoint-order",
        "stale-merged-weight",
        "stale-weight",
    ];
    for (folder, fault) in FAULTS.into_iter().filter(|(folder, _)| changing.contains(folder)) {
        let report = validate(&open(&dumps("faults").join(folder)), &Silent).unwrap();
        let named: Vec<&str> = report.diagnoses.iter().map(|d| d.fault.as_str()).collect();
        assert!(!report.passed);
        assert_eq!(named, [fault], "{folder}: {:?}", report.diagnoses);
    }
}

/// Hypotheses that are first run in part: what was named stays named.
#[test]
fn parts_of_steps_rule_out_no_fault_that_is_there() {
    let mut ruled_out = 0;
    for (folder, fault) in FAULTS {
        let mut case = case(&dumps("faults").join(folder));
        case.effort = Effort { steps: f64::INFINITY, parts_first: true };
        let report = validate(&case, &Silent).unwrap();
        let named: Vec<&str> = report.diagnoses.iter().map(|d| d.fault.as_str()).collect();
        assert_eq!(named, [fault], "{folder}: {:?}", report.diagnoses);
        ruled_out += report.ruled_out;
    }
    assert!(ruled_out > 20, "{ruled_out}");
}

/// A search for what explains wild gradients ends with its budget, and the report says what was not
/// tried.
#[test]
fn a_search_ends_when_it_has_cost_what_it_may() {
    for folder in ["lora-bf16", "lora-f32", "dora-bf16"] {
        let mut case = case(&dumps("clean").join(folder));
        case.effort = Effort { steps: 3.0, parts_first: false };
        case.trainer.after.clear();
        for (k, gradient) in case.trainer.gradients.values_mut().enumerate() {
            let wild = |((i, j), x): ((usize, usize), &mut f64)| {
                *x = 0.01 * ((i * 31 + j * 17 + k * 7) as f64).sin()
            };
            gradient.values.indexed_iter_mut().for_each(wild);
        }
        let report = validate(&case, &Silent).unwrap();
        assert!(!report.passed && report.diagnoses.iter().all(|d| !d.complete), "{folder}");
        // Two of every validation, two more roundings, three of the search.
        assert!(
            report.reference_steps <= 7 && !report.left_out.is_empty(),
            "{folder}: {}",
            report.reference_steps
        );
        case.effort = Effort { steps: 8.0, parts_first: true };
        let screened = validate(&case, &Silent).unwrap();
        assert!(
            screened.ruled_out > 0 && screened.left_out.len() < report.left_out.len(),
            "{:?}",
            screened.left_out
        );
    }
}

/// A step that begins at a layer's input has the gradients of the whole step from there on, to the
/// bit, and no others.
#[test]
fn a_part_of_a_step_is_the_step_from_there_on() {
    let case = case(&dumps("clean/lora-f32"));
    let whole = case.run(&Variant { hidden: vec![0], ..Variant::default() }).unwrap();
    let input = &whole.hidden[&0];
    for part in
        [Part { from: Some((1, input)), ..Part::default() }, Part { lowest: 1, ..Part::default() }]
    {
        let found = case.run(&Variant { part, ..Variant::default() }).unwrap();
        assert_eq!(found.loss.to_bits(), whole.loss.to_bits());
        let above: Vec<&String> =
            whole.gradients.keys().filter(|name| name.contains("layers.1.")).collect();
        assert_eq!(found.gradients.keys().collect::<Vec<_>>(), above);
        for (name, gradient) in &found.gradients {
            assert!(
                gradient
                    .iter()
                    .zip(&whole.gradients[name])
                    .all(|(a, b)| a.to_bits() == b.to_bits()),
                "{name}"
            );
        }
    }
    let forward = case
        .run(&Variant {
            part: Part { forward_only: true, ..Part::default() },
            ..Variant::default()
        })
        .unwrap();
    assert!(forward.gradients.is_empty());
    assert_eq!(forward.loss.to_bits(), whole.loss.to_bits());
    assert_eq!(forward.logits, whole.logits);
    let part = Part { forward_only: true, until: Some(0), ..Part::default() };
    let first = case.run(&Variant { part, hidden: vec![0], ..Variant::default() }).unwrap();
    assert_eq!(first.hidden.keys().collect::<Vec<_>>(), [&0]);
    assert_eq!(first.hidden[&0], whole.hidden[&0]);
    assert!(first.logits.is_none());
}

/// Some layers alone, from the trainer's own hidden state on: right ones pass, a wrong one of
/// theirs is seen, and one elsewhere is not.
#[test]
fn some_layers_are_judged_alone() {
    for folder in ["lora-f32", "lora-bf16", "full-f32"] {
        let all = case(&dumps("clean").join(folder));
        let top = all.model.layers.len() - 1;
        let wrong = |layer: usize| {
            let mut case = all.clone();
            let prefix = format!("model.layers.{layer}.");
            let of_layer =
                case.trainer.gradients.iter_mut().filter(|(name, _)| name.starts_with(&prefix));
            of_layer.for_each(|(_, g)| g.values.mapv_inplace(|x| -x));
            case
        };
        let passes = |case: Case, layers| {
            let report = validate(&case.only_layers(layers).unwrap(), &Silent).unwrap();
            assert!(report.gradients().len() > 1 && report.rungs.len() >= 8, "{folder}");
            report.passed
        };
        assert!(
            passes(all.clone(), top..top + 1)
                && passes(all.clone(), 0..1)
                && passes(all.clone(), 0..top + 1)
        );
        assert!(!passes(wrong(top), top..top + 1) && passes(wrong(top), 0..1), "{folder}");
        assert!(!passes(wrong(0), 0..1) && passes(wrong(0), top..top + 1), "{folder}");
        for layers in [top..top, top..top + 2] {
            assert!(all.clone().only_layers(layers).is_err());
        }
    }
}

/// Rows, and first tokens, are judged alone: by their forward pass, and by the gradients where
/// nothing else counts.
#[test]
fn a_part_of_the_batch_is_judged_alone() {
    let mut all = case(&dumps("clean/lora-right-f32"));
    let exact = all.run(&Variant { hidden: vec![0, 1], ..Variant::default() }).unwrap();
    let (rows, length) = all.batch.input_ids.dim();
    let observed = |values: &ndarray::Array2<f64>| {
        let shape = vec![rows, length, values.ncols()];
        peft_limits::validate::dump::Observed {
            values: values.clone(),
            precision: Precision::F32,
            shape,
        }
    };
    all.trainer.hidden =
        exact.hidden.iter().map(|(layer, values)| (*layer, observed(values))).collect();
    let judged = |case: &Case, rows: std::ops::Range<usize>, tokens| {
        validate(&case.clone().only_rows(rows, tokens).unwrap(), &Silent).unwrap()
    };
    let checked = |report: &Report| -> Vec<&str> {
        report.rungs.iter().filter(|r| !r.tensors.is_empty()).map(|r| r.name.name()).collect()
    };
    for (part, tokens) in [(0..1, None), (1..rows, None), (0..rows, Some(length - 2))] {
        let report = judged(&all, part, tokens);
        assert!(
            report.passed && checked(&report) == ["logits", "hidden states"],
            "{:?}",
            checked(&report)
        );
    }
    // One row is wrong: the others pass, and what is wrong with it is found in it alone.
    let scaled =
        all.run(&Variant { scale: Some(1.0), hidden: vec![0, 1], ..Variant::default() }).unwrap();
    let mut wrong = all.clone();
    for (layer, values) in &mut wrong.trainer.hidden {
        values
            .values
            .slice_mut(s![length.., ..])
            .assign(&scaled.hidden[layer].slice(s![length.., ..]));
    }
    let logits = &mut wrong.trainer.logits.as_mut().unwrap().values;
    logits.slice_mut(s![length.., ..]).assign(&scaled.logits.unwrap().slice(s![length.., ..]));
    assert!(judged(&wrong, 0..1, None).passed);
    let report = judged(&wrong, 1..rows, None);
    assert!(
        !report.passed && report.diagnoses[0].fault == "attention-scale",
        "{:?}",
        report.diagnoses
    );
    // The only row that counts: its gradients are the step's.
    let mut one = all.clone();
    one.batch.labels.slice_mut(s![1.., ..]).fill(-100);
    one.trainer.after.clear();
    one.trainer.applied.clear();
    let evidence = one.run(&Variant::default()).unwrap();
    one.trainer.loss = Some(evidence.loss);
    for (name, gradient) in evidence.gradients {
        one.trainer.gradients.get_mut(&name).unwrap().values = gradient;
    }
    one.trainer.upstream = None;
    let report = judged(&one, 0..1, None);
    assert!(
        report.passed && checked(&report).contains(&"gradients"),
        "{:?}",
        report.first_failure()
    );
    let gradient = one.trainer.gradients.values_mut().next().unwrap();
    gradient.values.mapv_inplace(|x| 1.1 * x);
    assert!(!judged(&one, 0..1, None).passed);
    for (rows, tokens) in
        [(0..0, None), (0..rows + 1, None), (1..2, None), (0..1, Some(length + 1)), (0..1, Some(1))]
    {
        assert!(one.clone().only_rows(rows, tokens).is_err());
    }
}

/// A copy of a dump whose model can be damaged.
fn copy(folder: &Path) -> PathBuf {
    let from = dumps("clean/lora-bf16");
    let model = dumps("models/bf16");
    for (source, target) in
        [(from.clone(), "dump"), (from.join("adapter"), "dump/adapter"), (model, "models/bf16")]
    {
        let to = folder.join(target);
        std::fs::create_dir_all(&to).unwrap();
        for entry in
            std::fs::read_dir(source).unwrap().map(|e| e.unwrap().path()).filter(|p| p.is_file())
        {
            std::fs::copy(&entry, to.join(entry.file_name().unwrap())).unwrap();
        }
    }
    let text = std::fs::read_to_string(folder.join("dump/manifest.json")).unwrap();
    std::fs::write(
        folder.join("dump/manifest.json"),
        text.replace("../../models/bf16", "../models/bf16"),
    )
    .unwrap();
    folder.join("dump")
}

/// A checkpoint that is cut short, changed, or made to hold NaN while it is read: an error that
/// names it.
#[test]
fn a_checkpoint_that_changes_under_the_reader_is_refused() {
    let temporary = tempfile::tempdir().unwrap();
    let dump = copy(temporary.path());
    let weights = temporary.path().join("models/bf16/model.safetensors");
    let whole = std::fs::read(&weights).unwrap();
    let refusal = |case: &Case| match validate(case, &Silent) {
        Err(error) => error.to_string(),
        Ok(report) => panic!("passed {}", report.passed),
    };
    let said = |text: &str, what: &str| {
        assert!(text.contains("model.safetensors") && text.contains(what), "{text}")
    };
    // Before it is opened.
    std::fs::write(&weights, &whole[..whole.len() / 2]).unwrap();
    let (paths, manifest) = DumpPaths::of_folder(&dump).unwrap();
    let read = || Case::open("x", &paths, Some(&manifest), &PlainSettings::default());
    said(&read().unwrap_err().to_string(), "a complete safetensors file");
    std::fs::write(&weights, &whole).unwrap();
    // After.
    let case = open(&dump);
    assert!(validate(&case, &Silent).unwrap().passed);
    std::fs::OpenOptions::new()
        .write(true)
        .open(&weights)
        .unwrap()
        .set_len(whole.len() as u64 / 2)
        .unwrap();
    said(&refusal(&case), "as when it was opened");
    std::fs::write(&weights, &whole).unwrap();
    let mut other = TensorFile::open(&weights).unwrap();
    let (_, bytes) = other.bytes_mut("model.layers.1.mlp.down_proj.weight").unwrap();
    bytes[..2].copy_from_slice(&0x7fc0u16.to_le_bytes());
    other.write_back().unwrap();
    said(&refusal(&open(&dump)), "finite entries");
    let case = open_at_an_earlier_time(&dump, &weights, &whole);
    said(&refusal(&case), "no change while it is read");
    std::fs::remove_file(&weights).unwrap();
    said(&read().unwrap_err().to_string(), "model.safetensors");
    // In shards, one of which is missing.
    let index =
        r#"{"weight_map": {"model.embed_tokens.weight": "model-00001-of-00001.safetensors"}}"#;
    std::fs::write(weights.with_file_name("model.safetensors.index.json"), index).unwrap();
    let text = read().unwrap_err().to_string();
    assert!(text.contains("model-00001-of-00001.safetensors"), "{text}");
}

/// A case opened before its weights were written again with the same bytes.
fn open_at_an_earlier_time(dump: &Path, weights: &Path, whole: &[u8]) -> Case {
    std::fs::write(weights, whole).unwrap();
    let case = open(dump);
    let later = std::time::SystemTime::now() + std::time::Duration::from_secs(5);
    std::fs::OpenOptions::new().write(true).open(weights).unwrap().set_modified(later).unwrap();
    case
}
