//! Reading and writing safetensors files, with errors that name file and tensor.

use crate::atomic_file::write_bytes;
use crate::disk_file::DiskFile;
use crate::error::{Error, Result};
use crate::linalg::Real;
use ndarray::{Array1, Array2, ArrayView2};
use rayon::prelude::*;
use safetensors::SafeTensorError;
use safetensors::tensor::{Dtype, Metadata, SafeTensors, TensorView};
use std::borrow::Cow;
use std::collections::{BTreeMap, HashMap};
use std::ops::Range;
use std::path::{Path, PathBuf};

/// A safetensors file, in memory or read tensor by tensor.
#[derive(Debug)]
pub struct TensorFile {
    path: PathBuf,
    bytes: Bytes,
    metadata: HashMap<String, String>,
    tensors: BTreeMap<String, Entry>,
}

/// Where the file's bytes are.
#[derive(Debug)]
enum Bytes {
    Memory(Vec<u8>),
    Disk(DiskFile),
}

/// Where a tensor lies in the file.
#[derive(Debug)]
struct Entry {
    dtype: Dtype,
    shape: Vec<usize>,
    range: Range<usize>,
}

/// Longest header that is read, as the format's own library has it.
const LONGEST_HEADER: u64 = 100_000_000;
/// Numbers that are read and converted at a time, by one thread.
const PIECE: usize = 1 << 17;

impl TensorFile {
    /// Reads a file and checks its header against its length.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read; [`Error::Format`] if it is truncated or not a
    /// safetensors file.
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
            Error::format(
                &path,
                "file",
                "a complete safetensors file",
                format!("{e} ({length} bytes)"),
            )
        };
        let (header_bytes, header) = SafeTensors::read_metadata(&bytes).map_err(broken)?;
        Ok(Self::with_header(path, Bytes::Memory(bytes), header_bytes, &header))
    }

    /// Opens a file and checks its header against its length; tensors stay on the disk until they
    /// are asked for.
    ///
    /// # Errors
    /// As [`TensorFile::open`]. A later change of the file is an error of whatever reads it then.
    pub fn open_on_disk(path: impl AsRef<Path>) -> Result<Self> {
        let file = DiskFile::open(&path)?;
        let path = path.as_ref().to_path_buf();
        let length = file.length();
        let broken = |what: String| {
            Error::format(
                &path,
                "file",
                "a complete safetensors file",
                format!("{what} ({length} bytes)"),
            )
        };
        let mut size = [0; size_of::<u64>()];
        let start = size.len() as u64;
        if length < start {
            return Err(broken(SafeTensorError::HeaderTooSmall.to_string()));
        }
        file.read(0, &mut size)?;
        let header_bytes = u64::from_le_bytes(size);
        if header_bytes > LONGEST_HEADER {
            return Err(broken(SafeTensorError::HeaderTooLarge.to_string()));
        }
        if header_bytes > length - start {
            return Err(broken(SafeTensorError::InvalidHeaderLength.to_string()));
        }
        let mut header = vec![0; header_bytes as usize];
        file.read(start, &mut header)?;
        let parsed: Metadata =
            serde_json::from_slice(&header).map_err(|e| broken(e.to_string()))?;
        if start + header_bytes + parsed.data_len() as u64 != length {
            return Err(broken(SafeTensorError::MetadataIncompleteBuffer.to_string()));
        }
        Ok(Self::with_header(path, Bytes::Disk(file), header.len(), &parsed))
    }

    fn with_header(path: PathBuf, bytes: Bytes, header_bytes: usize, header: &Metadata) -> Self {
        let start = size_of::<u64>() + header_bytes;
        let tensors = header.tensors().into_iter().map(|(name, info)| {
            let range = start + info.data_offsets.0..start + info.data_offsets.1;
            (name, Entry { dtype: info.dtype, shape: info.shape.clone(), range })
        });
        let (tensors, metadata) =
            (tensors.collect(), header.metadata().clone().unwrap_or_default());
        Self { path, bytes, metadata, tensors }
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Tensor names in alphabetical order.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// Shape of a tensor, if present.
    pub fn shape(&self, name: &str) -> Option<&[usize]> {
        self.tensors.get(name).map(|entry| entry.shape.as_slice())
    }

    /// Whether a tensor is present.
    pub fn contains(&self, name: &str) -> bool {
        self.tensors.contains_key(name)
    }

    /// A metadata value, if present.
    pub fn metadata(&self, key: &str) -> Option<&str> {
        self.metadata.get(key).map(String::as_str)
    }

    /// A malformed-content error of this file.
    pub fn malformed(
        &self,
        field: impl Into<String>,
        expected: impl Into<String>,
        found: impl Into<String>,
    ) -> Error {
        Error::format(&self.path, field, expected, found)
    }

    /// The error for a tensor that is needed and absent.
    pub fn missing(&self, name: &str, reason: impl Into<String>) -> Error {
        let mut found = self.tensors.keys().take(24).cloned().collect::<Vec<_>>().join(", ");
        if self.tensors.len() > 24 {
            found += ", ...";
        }
        if found.is_empty() {
            found = "no tensor".into();
        }
        Error::MissingTensor {
            path: self.path.clone(),
            name: name.into(),
            reason: reason.into(),
            found,
        }
    }

    fn entry(&self, name: &str, reason: &str) -> Result<&Entry> {
        self.tensors.get(name).ok_or_else(|| self.missing(name, reason))
    }

    /// Precision and bytes of a tensor, as they are in the file.
    ///
    /// # Errors
    /// [`Error::MissingTensor`]; those of reading.
    pub fn bytes(&self, name: &str, reason: &str) -> Result<(Dtype, Cow<'_, [u8]>)> {
        let entry = self.entry(name, reason)?;
        Ok((entry.dtype, self.part(entry.range.clone())?))
    }

    /// Some of the file's bytes.
    fn part(&self, range: Range<usize>) -> Result<Cow<'_, [u8]>> {
        match &self.bytes {
            Bytes::Memory(bytes) => Ok(Cow::Borrowed(&bytes[range])),
            Bytes::Disk(file) => {
                let mut part = vec![0; range.len()];
                file.read(range.start as u64, &mut part)?;
                Ok(Cow::Owned(part))
            }
        }
    }

    /// As [`TensorFile::bytes`], to be changed in memory ([`TensorFile::write_back`] writes the
    /// file).
    ///
    /// # Errors
    /// [`Error::MissingTensor`]; [`Error::Format`] if the tensor does not hold floating-point
    /// numbers; those of reading.
    pub fn bytes_mut(&mut self, name: &str) -> Result<(Dtype, &mut [u8])> {
        let entry = self.entry(name, "it is to be changed")?;
        let (dtype, range) = (entry.dtype, entry.range.clone());
        if float_bytes(dtype) == 0 {
            return Err(self.malformed(
                format!("tensor {name}"),
                "dtype F64, F32, F16 or BF16",
                format!("{dtype:?}"),
            ));
        }
        Ok((dtype, &mut self.in_memory()?[range]))
    }

    /// All bytes, read now if they were not.
    fn in_memory(&mut self) -> Result<&mut Vec<u8>> {
        if let Bytes::Disk(file) = &self.bytes {
            let mut bytes = vec![0; file.length() as usize];
            file.read(0, &mut bytes)?;
            self.bytes = Bytes::Memory(bytes);
        }
        match &mut self.bytes {
            Bytes::Memory(bytes) => Ok(bytes),
            Bytes::Disk(_) => unreachable!("they have just been read"),
        }
    }

    /// Writes the bytes in memory to the file's path, whole or not at all.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write_back(&self) -> Result<()> {
        match &self.bytes {
            Bytes::Memory(bytes) => write_bytes(&self.path, bytes),
            // Nothing was changed.
            Bytes::Disk(_) => Ok(()),
        }
    }

    /// Precision of a tensor as the format names it (`F32`, `BF16`, ...), if present.
    pub fn dtype(&self, name: &str) -> Option<String> {
        self.tensors.get(name).map(|entry| format!("{:?}", entry.dtype))
    }

    /// All entries of a tensor in row-major order with its shape, converted to `T`; NaN and
    /// infinity pass.
    ///
    /// Integers and half precisions are accepted.
    ///
    /// # Errors
    /// [`Error::MissingTensor`], [`Error::Format`] for an unsupported dtype.
    pub fn raw_tensor<T: Real>(&self, name: &str, reason: &str) -> Result<(Vec<usize>, Vec<T>)> {
        let entry = self.entry(name, reason)?;
        let mut values = vec![T::zero(); entry.shape.iter().product()];
        self.decode(name, entry, 0, &mut values)?;
        Ok((entry.shape.clone(), values))
    }

    /// Numbers of a tensor from its entry `first` on, converted to `T`; NaN and infinity pass. What
    /// is not in memory is read in pieces, several at a time.
    fn decode<T: Real>(
        &self,
        name: &str,
        entry: &Entry,
        first: usize,
        values: &mut [T],
    ) -> Result<()> {
        let convert: fn(&[u8], &mut [T]) = match entry.dtype {
            Dtype::F64 => |data, to| decode(data, to, |b| T::of(f64::from_le_bytes(b))),
            Dtype::F32 => |data, to| decode(data, to, |b| T::of(f64::from(f32::from_le_bytes(b)))),
            Dtype::F16 => {
                |data, to| decode(data, to, |b| T::of(half::f16::from_le_bytes(b).to_f64()))
            }
            // Its bits are the upper half of those of f32.
            Dtype::BF16 => |data, to| {
                decode(data, to, |[a, b]| T::of(f64::from(f32::from_le_bytes([0, 0, a, b]))))
            },
            Dtype::I64 => |data, to| decode(data, to, |b| T::of(i64::from_le_bytes(b) as f64)),
            Dtype::I32 => |data, to| decode(data, to, |b| T::of(f64::from(i32::from_le_bytes(b)))),
            other => {
                return Err(self.malformed(
                    format!("tensor {name}"),
                    "dtype F64, F32, F16, BF16, I64 or I32",
                    format!("{other:?}"),
                ));
            }
        };
        let width = entry.dtype.bitsize() / 8;
        let start = entry.range.start + first * width;
        debug_assert!(start + values.len() * width <= entry.range.end);
        values.par_chunks_mut(PIECE).enumerate().try_for_each(|(k, piece)| {
            let from = start + k * PIECE * width;
            convert(&self.part(from..from + piece.len() * width)?, piece);
            Ok(())
        })
    }

    /// Rows of a tensor whose leading axes count as one, every entry being finite; `values` is as
    /// long as they are.
    ///
    /// # Errors
    /// As [`TensorFile::tensor`]; [`Error::Format`] for rows that the tensor does not have.
    pub fn rows<T: Real>(
        &self,
        name: &str,
        reason: &str,
        rows: Range<usize>,
        values: &mut [T],
    ) -> Result<()> {
        let entry = self.entry(name, reason)?;
        let columns = entry.shape.last().copied().unwrap_or(1);
        let all: usize = entry.shape.iter().rev().skip(1).product();
        if rows.end > all || rows.len() * columns != values.len() {
            let expected = format!("rows {rows:?}, {} numbers", values.len());
            return Err(self.malformed(
                format!("tensor {name}"),
                expected,
                format!("shape {:?}", entry.shape),
            ));
        }
        self.decode(name, entry, rows.start * columns, values)?;
        self.require_finite(name, &entry.shape, rows.start * columns, values)
    }

    /// Refuses numbers that are not finite, the first of which is entry `first` of the tensor.
    fn require_finite<T: Real>(
        &self,
        name: &str,
        shape: &[usize],
        first: usize,
        values: &[T],
    ) -> Result<()> {
        let fine = values.par_chunks(PIECE).all(|piece| piece.iter().all(|x| x.is_finite()));
        let Some(position) = (if fine { None } else { values.iter().position(|x| !x.is_finite()) })
        else {
            return Ok(());
        };
        let mut rest = first + position;
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
        let found = format!("{} at {index:?}", values[position]);
        Err(self.malformed(format!("tensor {name}"), "finite entries", found))
    }

    /// As [`TensorFile::raw_tensor`], every entry being finite.
    ///
    /// # Errors
    /// As there; [`Error::Format`] naming the first entry that is not finite.
    pub fn tensor<T: Real>(&self, name: &str, reason: &str) -> Result<(Vec<usize>, Vec<T>)> {
        let (shape, values) = self.raw_tensor::<T>(name, reason)?;
        self.require_finite(name, &shape, 0, &values)?;
        Ok((shape, values))
    }

    /// Refuses integers where real numbers belong: token ids or masks written under another
    /// tensor's name.
    ///
    /// # Errors
    /// [`Error::MissingTensor`]; [`Error::Format`] with the dtype.
    pub fn require_real(&self, name: &str, reason: &str) -> Result<()> {
        let dtype = self.entry(name, reason)?.dtype;
        if float_bytes(dtype) == 0 {
            let expected = "real numbers (dtype F64, F32, F16 or BF16)";
            return Err(self.malformed(format!("tensor {name}"), expected, format!("{dtype:?}")));
        }
        Ok(())
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
            _ => Err(self.malformed(
                format!("tensor {name}"),
                "two dimensions",
                format!("shape {shape:?}"),
            )),
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
            _ => Err(self.malformed(
                format!("tensor {name}"),
                "one dimension",
                format!("shape {shape:?}"),
            )),
        }
    }
}

fn decode<T, const N: usize>(data: &[u8], values: &mut [T], convert: impl Fn([u8; N]) -> T) {
    values
        .iter_mut()
        .zip(data.as_chunks::<N>().0)
        .for_each(|(value, &bytes)| *value = convert(bytes));
}

/// Bytes of one floating-point number; 0 for a dtype that holds none.
pub fn float_bytes(dtype: Dtype) -> usize {
    match dtype {
        Dtype::F64 => 8,
        Dtype::F32 => 4,
        Dtype::F16 | Dtype::BF16 => 2,
        _ => 0,
    }
}

/// Rounds a number once to the dtype and writes it to `to`, [`float_bytes`] long.
pub fn write_float(dtype: Dtype, value: f64, to: &mut [u8]) {
    match dtype {
        Dtype::F64 => to.copy_from_slice(&value.to_le_bytes()),
        Dtype::F32 => to.copy_from_slice(&(value as f32).to_le_bytes()),
        Dtype::F16 => to.copy_from_slice(&half::f16::from_f64(value).to_le_bytes()),
        Dtype::BF16 => to.copy_from_slice(&half::bf16::from_f64(value).to_le_bytes()),
        _ => {}
    }
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
    pub fn tensor<T: Real>(
        &mut self,
        name: &str,
        shape: &[usize],
        values: impl IntoIterator<Item = T>,
    ) -> &mut Self {
        let single = T::NAME == f32::NAME;
        let mut bytes =
            Vec::with_capacity(shape.iter().product::<usize>() * if single { 4 } else { 8 });
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

    /// Adds a tensor given by its bytes.
    pub fn raw(&mut self, name: &str, dtype: Dtype, shape: &[usize], bytes: Vec<u8>) -> &mut Self {
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
                Error::format(
                    path,
                    format!("tensor {name}"),
                    "data that fill the shape",
                    e.to_string(),
                )
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
        writer
            .matrix("X", array![[1.0f64, 2.0, 3.0], [4.0, 5.0, 6.5]].view())
            .metadata("alpha", 3.5);
        writer.tensor("v", &[2], [0.5f32, f32::INFINITY]);
        writer.write(&path).unwrap();
        let file = TensorFile::open(&path).unwrap();
        assert_eq!(file.metadata("alpha"), Some("3.5"));
        assert_eq!(
            file.matrix::<f32>("X", "test").unwrap(),
            array![[1.0f32, 2.0, 3.0], [4.0, 5.0, 6.5]]
        );
        let text = file.vector::<f64>("v", "test").unwrap_err().to_string();
        assert!(
            text.contains("tensor v") && text.contains("[1]") && text.contains("inf"),
            "{text}"
        );
        let text = file.matrix::<f64>("Z", "the test needs it").unwrap_err().to_string();
        assert!(
            text.contains("no tensor named Z (the test needs it)") && text.contains("X, v"),
            "{text}"
        );
        let text = file.vector::<f64>("X", "test").unwrap_err().to_string();
        assert!(text.contains("one dimension") && text.contains("[2, 3]"), "{text}");
        let bytes = std::fs::read(&path).unwrap();
        for cut in [0, 4, 20, bytes.len() - 1] {
            let outcome = TensorFile::from_bytes(&path, bytes[..cut].to_vec());
            assert!(matches!(outcome, Err(Error::Format { .. })), "cut at {cut}");
            std::fs::write(&path, &bytes[..cut]).unwrap();
            let outcome = TensorFile::open_on_disk(&path);
            assert!(matches!(outcome, Err(Error::Format { .. })), "cut at {cut} on the disk");
        }
        std::fs::write(&path, &bytes).unwrap();
        let mut lazy = TensorFile::open_on_disk(&path).unwrap();
        let mut row = [0.0f64; 3];
        lazy.rows("X", "test", 1..2, &mut row).unwrap();
        assert_eq!(row.map(f64::to_bits), [4.0f64, 5.0, 6.5].map(f64::to_bits));
        assert!(
            lazy.rows("X", "test", 1..3, &mut row).unwrap_err().to_string().contains("rows 1..3")
        );
        assert_eq!(lazy.bytes("X", "test").unwrap(), file.bytes("X", "test").unwrap());
        let text = lazy.vector::<f64>("v", "test").unwrap_err().to_string();
        assert!(text.contains("[1]") && text.contains("inf"), "{text}");
        lazy.bytes_mut("X").unwrap().1.fill(0);
        lazy.write_back().unwrap();
        assert!(
            TensorFile::open(&path)
                .unwrap()
                .matrix::<f64>("X", "test")
                .unwrap()
                .iter()
                .all(|x| x.to_bits() == 0)
        );
        // The half format by its bits, as the crate of half formats converts it.
        let all: Vec<u8> =
            (0..=u16::MAX).filter(|b| b & 0x7f80 != 0x7f80).flat_map(u16::to_le_bytes).collect();
        let mut writer = TensorWriter::new();
        writer.raw("h", Dtype::BF16, &[all.len() / 2], all.clone());
        writer.write(&path).unwrap();
        let values = TensorFile::open_on_disk(&path).unwrap().vector::<f64>("h", "test").unwrap();
        for (bytes, value) in all.as_chunks::<2>().0.iter().zip(values) {
            assert_eq!(half::bf16::from_le_bytes(*bytes).to_f64().to_bits(), value.to_bits());
        }
        assert!(matches!(TensorFile::open(folder.path().join("none")), Err(Error::Io { .. })));
    }
}
