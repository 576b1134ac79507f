//! Reading and writing safetensors files, with errors that name file and tensor.

use crate::atomic_file::write_bytes;
use crate::error::{Error, Result};
use crate::linalg::Real;
use ndarray::{Array1, Array2, ArrayView2};
use safetensors::tensor::{Dtype, SafeTensors, TensorView};
use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

/// A safetensors file in memory.
pub struct TensorFile {
    path: PathBuf,
    bytes: Vec<u8>,
    metadata: HashMap<String, String>,
    shapes: BTreeMap<String, Vec<usize>>,
}

impl TensorFile {
    /// Reads a file and checks its header against its length.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read; [`Error::Format`] if it is truncated or not a safetensors file.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let bytes = std::fs::read(path).map_err(|e| Error::io(path, e))?;
        Self::from_bytes(path, bytes)
    }

    /// As [`TensorFile::open`] for bytes already in memory; `path` only serves messages.
    ///
    /// # Errors
    /// [`Error::Format`].
    pub fn from_bytes(path: impl AsRef<Path>, bytes: Vec<u8>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let length = bytes.len();
        let broken = |e: safetensors::SafeTensorError| {
            Error::format(&path, "file", "a complete safetensors file", format!("{e} ({length} bytes)"))
        };
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(broken)?;
        let metadata = header.metadata().clone().unwrap_or_default();
        let tensors = SafeTensors::deserialize(&bytes).map_err(broken)?;
        let shapes = tensors.iter().map(|(name, view)| (name.to_string(), view.shape().to_vec())).collect();
        Ok(Self { path, bytes, metadata, shapes })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tensor names in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.shapes.keys().map(String::as_str)
    }

    /// Shape of a tensor, if present.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.shapes.get(name).map(Vec::as_slice)
    }

    /// Whether a tensor is present.
    pub fn contains(&self, name: &str) -> bool {
        self.shapes.contains_key(name)
    }

    /// A metadata value, if present.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// A malformed-content error of this file.
    pub fn malformed(&self, field: impl Into<String>, expected: impl Into<String>, found: impl Into<String>) -> Error {
        Error::format(&self.path, field, expected, found)
    }

    /// The error for a tensor that is needed and absent.
    pub fn missing(&self, name: &str, reason: impl Into<String>) -> Error {
        let mut found = self.shapes.keys().take(24).cloned().collect::<Vec<_>>().join(", ");
        if self.shapes.len() > 24 {
            found += ", ...";
        }
        if found.is_empty() {
            found = "no tensor".into();
        }
        Error::MissingTensor { path: self.path.clone(), name: name.into(), reason: reason.into(), found }
    }

    fn view<'a>(&'a self, tensors: &'a SafeTensors<'a>, name: &str, reason: &str) -> Result<TensorView<'a>> {
        tensors.tensor(name).map_err(|_| self.missing(name, reason))
    }

    /// All entries of a tensor in row-major order with its shape, converted to `T`.
    ///
    /// Integers and half precisions are accepted; every entry must be finite.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::Format`] for an unsupported dtype, [`Error::NonFinite`].
    pub fn tensor<T: Real>(&self, name: &str, reason: &str) -> Result<(Vec<usize>, Vec<T>)> {
        let tensors =
            SafeTensors::deserialize(&self.bytes).map_err(|e| self.malformed("file", "safetensors", e.to_string()))?;
        let view = self.view(&tensors, name, reason)?;
        let data = view.data();
        let values: Vec<T> = match view.dtype() {
            Dtype::F64 => decode(data, |b| T::of(f64::from_le_bytes(b))),
            Dtype::F32 => decode(data, |b| T::of(f64::from(f32::from_le_bytes(b)))),
            Dtype::F16 => decode(data, |b| T::of(half::f16::from_le_bytes(b).to_f64())),
            Dtype::BF16 => decode(data, |b| T::of(half::bf16::from_le_bytes(b).to_f64())),
            Dtype::I64 => decode(data, |b| T::of(i64::from_le_bytes(b) as f64)),
            Dtype::I32 => decode(data, |b| T::of(f64::from(i32::from_le_bytes(b)))),
            other => {
                return Err(self.malformed(
                    format!("tensor {name}"),
                    "dtype F64, F32, F16, BF16, I64 or I32",
                    format!("{other:?}"),
                ));
            }
        };
        let shape = view.shape().to_vec();
        if let Some(position) = values.iter().position(|x| !x.is_finite()) {
            let mut rest = position;
            let mut index: Vec<usize> = shape
                .iter()
                .rev()
                .map(|&size| {
                    let i = rest % size.max(1);
                    rest /= size.max(1);
                    i
                })
                .collect();
            index.reverse();
            return Err(self.malformed(
                format!("tensor {name}"),
                "finite entries",
                format!("{} at {index:?}", values[position]),
            ));
        }
        Ok((shape, values))
    }

    /// A matrix.
    ///
    /// # Errors
    /// As [`TensorFile::tensor`]; [`Error::Format`] if it does not have two dimensions.
    pub fn matrix<T: Real>(&self, name: &str, reason: &str) -> Result<Array2<T>> {
        let (shape, values) = self.tensor::<T>(name, reason)?;
        match shape[..] {
            [rows, columns] => Array2::from_shape_vec((rows, columns), values)
                .map_err(|e| self.malformed(format!("tensor {name}"), "a matrix", e.to_string())),
            _ => Err(self.malformed(format!("tensor {name}"), "two dimensions", format!("shape {shape:?}"))),
        }
    }

    /// A vector.
    ///
    /// # Errors
    /// As [`TensorFile::tensor`]; [`Error::Format`] if it does not have one dimension.
    pub fn vector<T: Real>(&self, name: &str, reason: &str) -> Result<Array1<T>> {
        let (shape, values) = self.tensor::<T>(name, reason)?;
        match shape[..] {
            [_] => Ok(values.into()),
            _ => Err(self.malformed(format!("tensor {name}"), "one dimension", format!("shape {shape:?}"))),
        }
    }
}

fn decode<T, const N: usize>(data: &[u8], convert: impl Fn([u8; N]) -> T) -> Vec<T> {
    data.as_chunks::<N>().0.iter().map(|&b| convert(b)).collect()
}

/// Tensors and metadata to be written as one safetensors file.
#[derive(Default)]
pub struct TensorWriter {
    tensors: BTreeMap<String, (Dtype, Vec<usize>, Vec<u8>)>,
    metadata: HashMap<String, String>,
}

impl TensorWriter {
    /// An empty file.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds metadata.
    pub fn metadata(&mut self, key: &str, value: impl ToString) -> &mut Self {
        self.metadata.insert(key.into(), value.to_string());
        self
    }

    /// Adds a tensor of any shape, given in row-major order, in the precision of `T`.
    pub fn tensor<T: Real>(&mut self, name: &str, shape: &[usize], values: impl IntoIterator<Item = T>) -> &mut Self {
        let single = T::NAME == f32::NAME;
        let mut bytes = Vec::with_capacity(shape.iter().product::<usize>() * if single { 4 } else { 8 });
        for x in values {
            if single {
                bytes.extend_from_slice(&(x.widen() as f32).to_le_bytes());
            } else {
                bytes.extend_from_slice(&x.widen().to_le_bytes());
            }
        }
        let dtype = if single { Dtype::F32 } else { Dtype::F64 };
        self.tensors.insert(name.into(), (dtype, shape.to_vec(), bytes));
        self
    }

    /// Adds a matrix.
    pub fn matrix<T: Real>(&mut self, name: &str, a: ArrayView2<T>) -> &mut Self {
        self.tensor(name, &[a.nrows(), a.ncols()], a.iter().copied())
    }

    /// Writes the file, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] if a tensor's data does not match its shape.
    pub fn write(&self, path: &Path) -> Result<()> {
        let mut views = Vec::with_capacity(self.tensors.len());
        for (name, (dtype, shape, bytes)) in &self.tensors {
            let view = TensorView::new(*dtype, shape.clone(), bytes).map_err(|e| {
                Error::format(path, format!("tensor {name}"), "data that fill the shape", e.to_string())
            })?;
            views.push((name.as_str(), view));
        }
        let metadata = (!self.metadata.is_empty()).then(|| self.metadata.clone());
        let bytes = safetensors::serialize(views, metadata)
            .map_err(|e| Error::format(path, "file", "serializable tensors", e.to_string()))?;
        write_bytes(path, &bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use ndarray::array;

    #[test]
    fn round_trip_and_every_refusal() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("a.safetensors");
        let mut writer = TensorWriter::new();
        writer.matrix("X", array![[1.0f64, 2.0, 3.0], [4.0, 5.0, 6.5]].view()).metadata("alpha", 3.5);
        writer.tensor("v", &[2], [0.5f32, f32::INFINITY]);
        writer.write(&path).unwrap();
        let file = TensorFile::open(&path).unwrap();
        assert_eq!(file.metadata("alpha"), Some("3.5"));
        assert_eq!(file.matrix::<f32>("X", "test").unwrap(), array![[1.0f32, 2.0, 3.0], [4.0, 5.0, 6.5]]);
        let text = file.vector::<f64>("v", "test").unwrap_err().to_string();
        assert!(text.contains("tensor v") && text.contains("[1]") && text.contains("inf"), "{text}");
        let text = file.matrix::<f64>("Z", "the test needs it").unwrap_err().to_string();
        assert!(text.contains("no tensor named Z (the test needs it)") && text.contains("X, v"), "{text}");
        let text = file.vector::<f64>("X", "test").unwrap_err().to_string();
        assert!(text.contains("one dimension") && text.contains("[2, 3]"), "{text}");
        let bytes = std::fs::read(&path).unwrap();
        for cut in [0, 4, 20, bytes.len() - 1] {
            let outcome = TensorFile::from_bytes(&path, bytes[..cut].to_vec());
            assert!(matches!(outcome, Err(Error::Format { .. })), "cut at {cut}");
        }
        assert!(matches!(TensorFile::open(folder.path().join("none")), Err(Error::Io { .. })));
    }
}
