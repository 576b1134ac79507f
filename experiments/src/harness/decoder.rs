//! The study on a trained decoder that is not ours: fine-tuned on some text, and what it forgets of
//! its own language.
//!
//! `--base DIR` is a checkpoint with its tokenizer (`python/convert_llama2c.py` converts the public
//! ones of llama2.c), `--text FILE` what it learns. Measured are losses in nats a token,
//!
//! - *in-domain*: held-out windows of the first nine tenths of the text, from which training rows
//!   come;
//! - *near*: windows of the last tenth;
//! - *far*: stories that we wrote (`experiments/data/stories.txt`), in the language of TinyStories;
//!
//! and *forgotten*, which is exact on what it is taken over: the mean of KL(base || tuned) of the
//! next token over positions of texts that the base itself samples.
//!
//! One such model is one base: seeds vary the rows, the selection and the start of the adapters.

use super::flags::trained_decoder;
use super::study::on_own_threads;
use ndarray::{Array2, Axis, s};
use peft_limits::cost::Cost;
use peft_limits::error::{Error, Result};
use peft_limits::model::{Batch, Model};
use peft_limits::report::Row;
use peft_limits::streams::generator;
use peft_limits::train::config::{ModelSource, TrainConfig};
use peft_limits::train::data::{Encoder, Example};
use peft_limits::train::method::MethodParams;
use peft_limits::train::optimizer::OptimizerParams;
use peft_limits::train::schedule::{Decay, ScheduleParams};
use peft_limits::train::tasks::mixture::{Part, TaskParams};
use peft_limits::train::tasks::text::TextParams;
use peft_limits::train::tokenizer::Tokenizer;
use peft_limits::train::trainer::Trainer;
use rand::RngExt;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of a row of text.
const WINDOW: usize = 256;
/// Rows of each evaluation.
const ROWS: usize = 48;
/// Sequences and tokens of the base's own samples.
const SAMPLES: (usize, usize) = (32, 96);
const STORIES: &str = include_str!("../../data/stories.txt");

/// The decoder with everything that is measured on it.
pub struct Decoder {
    folder: PathBuf,
    /// The part of the text that rows come from.
    text: PathBuf,
    /// The model itself, frozen.
    pub model: Model<f32>,
    near: Batch,
    far: Batch,
    samples: Array2<u32>,
    /// Log-probabilities of the next token at every position of the samples.
    log_probabilities: Array2<f64>,
    /// Holds `text`.
    _scratch: tempfile::TempDir,
}

/// Name of the decoder of `--base`: its folder's. None without one.
pub fn decoder_name() -> Option<String> {
    let (folder, _) = trained_decoder()?;
    Some(
        folder
            .file_name()
            .map_or_else(|| "decoder".into(), |name| name.to_string_lossy().into_owned()),
    )
}

/// The decoder of `--base`, opened once in a process.
///
/// # Errors
/// [`Error::InvalidParam`] without `--base` and `--text`; as [`Decoder::open`].
pub fn decoder() -> Result<Arc<Decoder>> {
    static OPENED: Mutex<Option<Arc<Decoder>>> = Mutex::new(None);
    let mut opened = OPENED.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some(decoder) = opened.as_ref() {
        return Ok(Arc::clone(decoder));
    }
    let (folder, text) = trained_decoder().ok_or_else(|| {
        Error::invalid("--base", "absent", "these points need --base DIR and --text FILE again")
    })?;
    let decoder = on_own_threads(1, || Decoder::open(&folder, &text))?;
    Ok(Arc::clone(opened.insert(Arc::new(decoder))))
}

impl Decoder {
    /// Reads the model, cuts the text, draws the model's own samples.
    ///
    /// # Errors
    /// As [`Model::read`] and [`Tokenizer::of_model`]; [`Error::Io`]; [`Error::Format`] for a text
    /// that is too short.
    pub fn open(folder: &Path, text: &Path) -> Result<Self> {
        let model = Model::<f32>::read(folder)?;
        let tokenizer = Tokenizer::of_model(folder, model.config.vocab_size)?;
        let whole = std::fs::read_to_string(text).map_err(|e| Error::io(text, e))?;
        let cut = whole.floor_char_boundary(whole.len() / 10 * 9);
        if whole.len() - cut < ROWS * WINDOW {
            let expected = format!("at least {} bytes", 10 * ROWS * WINDOW);
            return Err(Error::format(text, "text", expected, format!("{} bytes", whole.len())));
        }
        let scratch = tempfile::tempdir().map_err(|e| Error::io(std::env::temp_dir(), e))?;
        let rows = scratch.path().join("text.txt");
        std::fs::write(&rows, &whole[..cut]).map_err(|e| Error::io(&rows, e))?;
        let later = &whole[cut..];
        let windows = (0..ROWS).map(|i| {
            let from = later.floor_char_boundary(i * (later.len() / ROWS));
            &later[from..later.floor_char_boundary(from + WINDOW)]
        });
        let near = batch(&tokenizer, windows)?;
        let far = batch(
            &tokenizer,
            STORIES.split("\n\n").map(str::trim).filter(|story| !story.is_empty()),
        )?;
        let samples = sample(&model, &tokenizer, SAMPLES)?;
        let log_probabilities = log_softmax(&model.logits(samples.view(), &mut Cost::default())?);
        Ok(Self {
            folder: folder.to_path_buf(),
            text: rows,
            model,
            near,
            far,
            samples,
            log_probabilities,
            _scratch: scratch,
        })
    }

    /// A run that fine-tunes the decoder on the text.
    ///
    /// # Errors
    /// As [`Trainer::with_model`].
    pub fn trainer(
        &self,
        method: MethodParams,
        lr: f64,
        seed: u64,
        steps: u64,
    ) -> Result<Trainer<f32>> {
        let text = TextParams { path: self.text.clone(), window: WINDOW };
        let mut config = TrainConfig {
            seed,
            model: ModelSource::Path(self.folder.clone()),
            method,
            optimizer: OptimizerParams { lr, clip: 1.0, ..OptimizerParams::default() },
            schedule: ScheduleParams { decay: Decay::Linear, warmup: 10.min(steps), floor: 0.0 },
            data: vec![Part { weight: 1.0, task: TaskParams::Text(text) }],
            ..TrainConfig::default()
        };
        (config.train.steps, config.train.batch, config.train.length) = (steps, 8, WINDOW);
        config.train.truncate = true;
        config.train.eval_rows = ROWS;
        Trainer::with_model(config, self.model.clone())
    }

    /// Loss on the later text, on stories, and the divergence from the base, of a tuned model.
    ///
    /// # Errors
    /// As [`Model::loss`].
    pub fn measure(&self, tuned: &Model<f32>) -> Result<Row> {
        let mut cost = Cost::default();
        Ok(Row::new()
            .with("near loss (nats)", tuned.loss(&self.near, &mut cost)?)
            .with("far loss (nats)", tuned.loss(&self.far, &mut cost)?)
            .with("forgotten, KL (nats)", self.divergence(tuned)?))
    }

    /// Mean over positions of KL(base || tuned) of the next token, nats.
    ///
    /// # Errors
    /// As [`Model::logits`].
    pub fn divergence(&self, tuned: &Model<f32>) -> Result<f64> {
        let theirs = log_softmax(&tuned.logits(self.samples.view(), &mut Cost::default())?);
        let rows = self.log_probabilities.rows().into_iter().zip(theirs.rows());
        let each = rows.map(|(p, q)| p.iter().zip(q).map(|(p, q)| p.exp() * (p - q)).sum::<f64>());
        Ok(each.sum::<f64>() / theirs.nrows() as f64)
    }
}

/// One row a text, every token but the first counted.
fn batch<'a>(tokenizer: &Tokenizer, texts: impl Iterator<Item = &'a str>) -> Result<Batch> {
    let mut examples = Vec::new();
    for text in texts {
        let mut ids: Vec<u32> = tokenizer.begin.into_iter().collect();
        ids.extend(tokenizer.encode(text)?);
        ids.truncate(WINDOW);
        examples.push(Example { labels: ids.iter().map(|&id| i64::from(id)).collect(), ids });
    }
    Encoder { tokenizer, length: WINDOW, truncate: true }.batch(&examples, None)
}

/// Texts drawn from the model, token by token, at temperature 1.
fn sample(
    model: &Model<f32>,
    tokenizer: &Tokenizer,
    (rows, length): (usize, usize),
) -> Result<Array2<u32>> {
    let mut rng = generator(0, "decoder/samples", 0);
    let mut ids = Array2::from_elem((rows, length), tokenizer.begin.unwrap_or(tokenizer.end));
    for t in 1..length {
        let logits = log_softmax(&model.logits(ids.slice(s![.., ..t]), &mut Cost::default())?);
        for (i, row) in logits.axis_chunks_iter(Axis(0), t).enumerate() {
            let last = row.row(t - 1);
            let mut left = rng.random::<f64>();
            let drawn = last.iter().position(|p| {
                left -= p.exp();
                left < 0.0
            });
            ids[[i, t]] = drawn.unwrap_or(last.len() - 1) as u32;
        }
    }
    Ok(ids)
}

fn log_softmax(logits: &Array2<f32>) -> Array2<f64> {
    let mut out = logits.mapv(f64::from);
    for mut row in out.rows_mut() {
        let largest = row.iter().copied().fold(f64::NEG_INFINITY, f64::max);
        let total = largest + row.iter().map(|x| (x - largest).exp()).sum::<f64>().ln();
        row.mapv_inplace(|x| x - total);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::harness::study::{Study, train};
    use peft_limits::train::method::MethodName;

    /// A decoder made here: a random model over bytes, and a text of digits.
    fn decoder() -> (tempfile::TempDir, Decoder) {
        let folder = tempfile::tempdir().unwrap();
        let model =
            Model::<f32>::random(Study::sizes().unwrap(), &mut generator(3, "init/model", 0))
                .unwrap();
        model.write(&folder.path().join("model")).unwrap();
        let text: String = (0..30_000).map(|i| format!("{i} ")).collect();
        std::fs::write(folder.path().join("text"), text).unwrap();
        let opened =
            Decoder::open(&folder.path().join("model"), &folder.path().join("text")).unwrap();
        (folder, opened)
    }

    #[test]
    fn divergence_is_zero_at_the_base_and_rises_with_training() {
        let (_folder, decoder) = decoder();
        assert!(decoder.divergence(&decoder.model).unwrap().abs() < 1e-12);
        let mut trainer =
            decoder.trainer(MethodParams::named(MethodName::Full), 3e-3, 1, 4).unwrap();
        let before = decoder.measure(&decoder.model).unwrap();
        train(&mut trainer, |_| Ok(())).unwrap();
        let after = decoder.measure(&trainer.model).unwrap();
        let of = |row: &Row, column: &str| row.get(column).and_then(|c| c.as_f64()).unwrap();
        assert!(of(&after, "forgotten, KL (nats)") > 1e-3);
        assert!(of(&after, "near loss (nats)") < of(&before, "near loss (nats)") - 0.1);
    }

    #[test]
    fn samples_follow_the_model() {
        let (_folder, decoder) = decoder();
        assert!(
            decoder
                .log_probabilities
                .rows()
                .into_iter()
                .all(|r| (r.mapv(f64::exp).sum() - 1.0).abs() < 1e-9)
        );
        // Mean log-probability of the sampled tokens against minus the mean entropy: equal in
        // expectation.
        let (rows, length) = decoder.samples.dim();
        let (mut drawn, mut entropy) = (Vec::new(), 0.0);
        for i in 0..rows {
            for t in 1..length {
                let p = decoder.log_probabilities.row(i * length + t - 1);
                drawn.push(p[decoder.samples[[i, t]] as usize]);
                entropy -= p.iter().map(|x| x.exp() * x).sum::<f64>();
            }
        }
        let n = drawn.len() as f64;
        let mean = drawn.iter().sum::<f64>() / n;
        let deviation = (drawn.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / n / n).sqrt();
        assert!((mean + entropy / n).abs() < 5.0 * deviation, "{mean} against {}", -entropy / n);
    }

    #[test]
    fn a_short_text_is_refused() {
        let (folder, _) = decoder();
        let short = folder.path().join("short");
        std::fs::write(&short, "once upon a time").unwrap();
        let error = Decoder::open(&folder.path().join("model"), &short).err().unwrap();
        assert!(
            matches!(error, Error::Format { .. }) && error.to_string().contains("16 bytes"),
            "{error}"
        );
    }
}
