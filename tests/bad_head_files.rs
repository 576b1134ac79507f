//! Every way in which a head's file can be wrong: a typed error that names file, tensor, expected
//! and found.
//!
//! Files are written byte by byte here, not by the crate's writer, so that they can be wrong in any
//! way.

use peft_limits::attention::file::read_problem;
use peft_limits::attention::{AttentionProblem, Mask, Request, SoftmaxKind, exact};
use peft_limits::{Error, Result};
use proptest::prelude::*;
use proptest::test_runner::FileFailurePersistence;
use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

/// The system's allocator, remembering the largest single request of each thread.
struct Watching;

thread_local! {
    static LARGEST: Cell<usize> = const { Cell::new(0) };
}

fn remember(size: usize) {
    LARGEST.set(LARGEST.get().max(size));
}

// SAFETY: every call is passed on unchanged to the system's allocator.
#[allow(unsafe_code)]
unsafe impl GlobalAlloc for Watching {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        remember(layout.size());
        unsafe { System.alloc(layout) }
    }
    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        remember(layout.size());
        unsafe { System.alloc_zeroed(layout) }
    }
    unsafe fn realloc(&self, pointer: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        remember(size);
        unsafe { System.realloc(pointer, layout, size) }
    }
    unsafe fn dealloc(&self, pointer: *mut u8, layout: Layout) {
        unsafe { System.dealloc(pointer, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Watching = Watching;

/// No test here may ask for more at once: the files have a few kilobytes.
const ALLOWED: usize = 1 << 20;

#[derive(Clone)]
struct Tensor {
    dtype: &'static str,
    shape: Vec<usize>,
    data: Vec<u8>,
}

/// A head's file that can be spoiled.
#[derive(Clone)]
struct HeadFile {
    tensors: BTreeMap<&'static str, Tensor>,
    metadata: BTreeMap<&'static str, String>,
}

fn matrix(rows: usize, columns: usize) -> Tensor {
    let values = (0..rows * columns).map(|i| ((i * 7 + rows) % 11) as f64 / 10.0 - 0.5);
    Tensor {
        dtype: "F64",
        shape: vec![rows, columns],
        data: values.flat_map(f64::to_le_bytes).collect(),
    }
}

const L: usize = 9;
const D_IN: usize = 6;
const D_H: usize = 4;
const R: usize = 2;

impl HeadFile {
    /// A correct head: L = 9, d_in = 6, d_h = 4, d_v = 5, r = 2, with a target.
    fn valid() -> Self {
        let mut file = HeadFile { tensors: BTreeMap::new(), metadata: BTreeMap::new() };
        for (name, rows, columns) in [
            ("X", L, D_IN),
            ("WQ", D_IN, D_H),
            ("WK", D_IN, D_H),
            ("WV", D_IN, 5),
            ("AQ", R, D_H),
            ("BQ", D_IN, R),
            ("AV", R, 5),
            ("BV", D_IN, R),
            ("Y", L, 5),
        ] {
            file.tensors.insert(name, matrix(rows, columns));
        }
        for (key, value) in [
            ("alpha", "3.0"),
            ("r", "2"),
            ("beta", "0.5"),
            ("causal", "True"),
            ("softmax_one", "False"),
        ] {
            file.metadata.insert(key, value.to_string());
        }
        file
    }

    /// Q, K, V and G in place of hidden states.
    fn projected() -> Self {
        let mut file = HeadFile { tensors: BTreeMap::new(), metadata: BTreeMap::new() };
        for (name, rows, columns) in [("Q", 7, D_H), ("K", L, D_H), ("V", L, 5), ("G", 7, 5)] {
            file.tensors.insert(name, matrix(rows, columns));
        }
        file.metadata.insert("beta", "0.5".into());
        file
    }

    fn set(mut self, name: &'static str, tensor: Tensor) -> Self {
        self.tensors.insert(name, tensor);
        self
    }

    fn without(mut self, name: &str) -> Self {
        assert!(
            self.tensors.remove(name).is_some() || self.metadata.remove(name).is_some(),
            "{name}"
        );
        self
    }

    fn meta(mut self, key: &'static str, value: &str) -> Self {
        self.metadata.insert(key, value.to_string());
        self
    }

    /// Replaces one entry of an F64 tensor.
    fn entry(mut self, name: &'static str, index: usize, value: f64) -> Self {
        let tensor = self.tensors.get_mut(name).unwrap();
        tensor.data[8 * index..8 * index + 8].copy_from_slice(&value.to_le_bytes());
        self
    }

    fn bytes(&self) -> Vec<u8> {
        let pairs: Vec<String> =
            self.metadata.iter().map(|(k, v)| format!("{k:?}:{v:?}")).collect();
        let mut entries = vec![format!("\"__metadata__\":{{{}}}", pairs.join(","))];
        let mut data = Vec::new();
        for (name, tensor) in &self.tensors {
            let start = data.len();
            data.extend_from_slice(&tensor.data);
            let (dtype, shape, end) = (tensor.dtype, &tensor.shape, data.len());
            entries
                .push(format!("{name:?}:{{\"dtype\":{dtype:?},\"shape\":{shape:?},\"data_offsets\":[{start},{end}]}}"));
        }
        with_header(&format!("{{{}}}", entries.join(",")), &data)
    }
}

/// The length of the header, the header padded to a multiple of 8, and the data.
fn with_header(header: &str, data: &[u8]) -> Vec<u8> {
    let padded = header.len().next_multiple_of(8);
    let mut bytes = (padded as u64).to_le_bytes().to_vec();
    bytes.extend_from_slice(format!("{header:padded$}").as_bytes());
    bytes.extend_from_slice(data);
    bytes
}

/// Reads bytes as a file of a new folder.
fn read(bytes: &[u8]) -> (PathBuf, Result<AttentionProblem<f64>>) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("head.safetensors");
    std::fs::write(&path, bytes).unwrap();
    let outcome = read_problem(&path);
    (path, outcome)
}

/// The error of a bad file: field, expected, found of [`Error::Format`], with the path checked and
/// in the text.
#[track_caller]
fn refused(file: &HeadFile) -> (String, String, String) {
    match read(&file.bytes()) {
        (written, Err(error @ Error::Format { .. })) => {
            let text = error.to_string();
            let Error::Format { path, field, expected, found } = error else { unreachable!() };
            assert_eq!(path, written);
            for part in [&path.display().to_string(), &field, &expected, &found] {
                assert!(!part.is_empty() && text.contains(part), "{text}");
            }
            (field, expected, found)
        }
        (_, other) => panic!("expected a format error, got {:?}", other.map(|_| "a head")),
    }
}

#[track_caller]
fn assert_refused(file: HeadFile, field: &str, expected: &str, found: &str) {
    let got = refused(&file);
    assert!(
        got.0.contains(field) && got.1.contains(expected) && got.2.contains(found),
        "{got:?} is not about {field:?}, {expected:?}, {found:?}"
    );
}

#[track_caller]
fn assert_missing(file: HeadFile, tensor: &str, why: &str, there: &str) {
    match read(&file.bytes()) {
        (written, Err(error @ Error::MissingTensor { .. })) => {
            let text = error.to_string();
            let Error::MissingTensor { path, name, reason, found } = error else { unreachable!() };
            assert_eq!((path.as_path(), name.as_str()), (written.as_path(), tensor));
            assert!(reason.contains(why) && found.contains(there), "{text}");
            assert!(text.contains(&path.display().to_string()) && text.contains(tensor), "{text}");
        }
        (_, other) => panic!("expected a missing tensor, got {:?}", other.map(|_| "a head")),
    }
}

#[test]
fn the_files_are_good_before_they_are_spoiled() {
    let (_, head) = read(&HeadFile::valid().bytes());
    let head = head.unwrap();
    assert_eq!((head.num_queries(), head.head_dim(), head.value_dim()), (L, D_H, 5));
    assert_eq!((head.mask(), head.softmax()), (Mask::Causal, SoftmaxKind::Standard));
    assert!(
        (head.hidden().unwrap().scaling - 1.5).abs() < 1e-15 && (head.beta() - 0.5).abs() < 1e-15
    );
    exact::dense::gradients(&head, Request::Adapters).unwrap();
    let (_, head) = read(&HeadFile::projected().bytes());
    let head = head.unwrap();
    assert_eq!((head.num_queries(), head.num_keys(), head.value_dim()), (7, L, 5));
}

#[test]
fn a_file_cut_anywhere() {
    let bytes = HeadFile::valid().bytes();
    for cut in 0..bytes.len() {
        match read(&bytes[..cut]) {
            (written, Err(Error::Format { path, field, expected, found })) => {
                assert_eq!((path, field.as_str()), (written, "file"));
                assert!(expected.contains("complete safetensors file"), "{expected}");
                assert!(found.contains(&format!("{cut} bytes")), "{found}");
            }
            (_, other) => panic!("cut at {cut}: {:?}", other.map(|_| "a head")),
        }
    }
    let folder = tempfile::tempdir().unwrap();
    for path in [folder.path().join("none.safetensors"), folder.path().to_path_buf()] {
        let error = read_problem::<f64>(&path).unwrap_err();
        assert!(matches!(&error, Error::Io { path: p, .. } if *p == path), "{error:?}");
        assert!(error.to_string().contains(&path.display().to_string()));
    }
}

#[test]
fn missing_tensors() {
    for name in ["WQ", "WK", "WV"] {
        assert_missing(HeadFile::valid().without(name), name, "weight of this projection", "X");
    }
    assert_missing(HeadFile::valid().without("X"), "X", "XQ, XK, XV", "WQ");
    assert_missing(HeadFile::valid().without("Y"), "Y", "target Y or an upstream gradient G", "WV");
    assert_missing(HeadFile::valid().without("AQ"), "AQ", "AQ and BQ come together", "BQ");
    assert_missing(HeadFile::valid().without("BV"), "BV", "AV and BV come together", "AV");
    for name in ["Q", "K", "V"] {
        assert_missing(HeadFile::projected().without(name), name, "come together", "G");
    }
    let cross =
        HeadFile::valid().without("X").set("XQ", matrix(7, D_IN)).set("XK", matrix(L, D_IN));
    assert_missing(cross, "XV", "XQ, XK and XV come together", "XK");
    let empty = HeadFile { tensors: BTreeMap::new(), metadata: BTreeMap::new() };
    assert_missing(empty, "X", "needed", "no tensor");
}

#[test]
fn wrong_shapes() {
    let valid = HeadFile::valid;
    assert_refused(valid().set("WQ", matrix(5, D_H)), "tensor WQ", "(6, 4)", "(5, 4)");
    assert_refused(valid().set("WK", matrix(D_IN, 3)), "tensor WK", "(6, 4)", "(6, 3)");
    assert_refused(valid().set("WV", matrix(7, 5)), "tensor WV", "(6, 5)", "(7, 5)");
    assert_refused(valid().set("AQ", matrix(R, 5)), "tensor AQ", "(2, 4)", "(2, 5)");
    assert_refused(valid().set("BQ", matrix(D_IN, 3)), "tensor BQ", "(6, 2)", "(6, 3)");
    assert_refused(valid().set("BV", matrix(R, D_IN)), "tensor BV", "(6, 2)", "(2, 6)");
    assert_refused(valid().set("Y", matrix(5, L)), "tensor Y", "(9, 5)", "(5, 9)");
    assert_refused(valid().set("AV", matrix(3, 5)), "tensor AV", "2 rows, the rank of AQ", "3");
    let one_dimension = Tensor { shape: vec![L * D_IN], ..matrix(L, D_IN) };
    assert_refused(valid().set("X", one_dimension), "tensor X", "two dimensions", "[54]");
    let three_dimensions = Tensor { shape: vec![1, D_IN, D_H], ..matrix(D_IN, D_H) };
    assert_refused(valid().set("WK", three_dimensions), "tensor WK", "two dimensions", "[1, 6, 4]");
    let projected = HeadFile::projected;
    assert_refused(projected().set("K", matrix(L, 3)), "tensor K", "(9, 4)", "(9, 3)");
    assert_refused(projected().set("V", matrix(8, 5)), "tensor V", "(9, 5)", "(8, 5)");
    assert_refused(projected().set("G", matrix(L, 5)), "tensor G", "(7, 5)", "(9, 5)");
    let causal = projected().meta("causal", "true");
    assert_refused(causal, "causal", "as many keys as queries", "7 queries, 9 keys");
    let cross = valid()
        .without("X")
        .set("XQ", matrix(L, D_IN))
        .set("XK", matrix(L, D_IN))
        .set("XV", matrix(8, D_IN));
    assert_refused(cross, "tensor XV", "(9, 6)", "(8, 6)");
}

#[test]
fn ranks_out_of_range() {
    let valid = HeadFile::valid;
    let zero =
        valid().set("AQ", matrix(0, D_H)).set("BQ", matrix(D_IN, 0)).without("AV").without("BV");
    assert_refused(zero, "tensor AQ", "rank r of at least 1", "r = 0");
    // Above d_h = 4, the smaller side of W_Q.
    let above = valid()
        .set("AQ", matrix(5, D_H))
        .set("BQ", matrix(D_IN, 5))
        .without("AV")
        .without("BV")
        .without("r");
    assert_refused(above, "AQ, BQ", "between 1 and 4, the smaller side of WQ", "5");
    assert_refused(valid().meta("r", "3"), "metadata r", "2, the rows of", "3");
}

#[test]
fn entries_that_are_not_finite() {
    for value in [f64::NAN, f64::INFINITY, f64::NEG_INFINITY] {
        // Entry 20 of X is [3, 2]; of Y, [4, 0].
        let found = format!("{value} at");
        assert_refused(
            HeadFile::valid().entry("X", 20, value),
            "tensor X",
            "finite entries",
            &format!("{found} [3, 2]"),
        );
        assert_refused(
            HeadFile::valid().entry("Y", 20, value),
            "tensor Y",
            "finite entries",
            &format!("{found} [4, 0]"),
        );
        for name in ["WQ", "AQ", "BV"] {
            assert_refused(
                HeadFile::valid().entry(name, 3, value),
                &format!("tensor {name}"),
                "finite",
                &found,
            );
        }
        assert_refused(
            HeadFile::projected().entry("K", 0, value),
            "tensor K",
            "finite",
            &format!("{found} [0, 0]"),
        );
    }
    // A double beyond the range of f32 is an infinity there.
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("head.safetensors");
    std::fs::write(&path, HeadFile::valid().entry("X", 0, 1e39).bytes()).unwrap();
    assert!(read_problem::<f64>(&path).is_ok());
    let text = read_problem::<f32>(&path).unwrap_err().to_string();
    assert!(text.contains("tensor X") && text.contains("inf at [0, 0]"), "{text}");
}

#[test]
fn unsupported_types() {
    for (dtype, size) in [
        ("U8", 1),
        ("I8", 1),
        ("BOOL", 1),
        ("I16", 2),
        ("U16", 2),
        ("U32", 4),
        ("U64", 8),
        ("F8_E4M3", 1),
    ] {
        let tensor = Tensor { dtype, shape: vec![L, D_IN], data: vec![0; L * D_IN * size] };
        let (field, expected, found) = refused(&HeadFile::valid().set("X", tensor));
        assert_eq!((field.as_str(), found.as_str()), ("tensor X", dtype));
        assert!(expected.contains("F64, F32, F16 or BF16"), "{expected}");
    }
    let unknown = Tensor { dtype: "F128", shape: vec![L, D_IN], data: vec![0; L * D_IN * 16] };
    assert_refused(HeadFile::valid().set("X", unknown), "file", "safetensors", "F128");
}

#[test]
fn metadata_that_is_missing_or_wrong() {
    let valid = HeadFile::valid;
    assert_refused(valid().without("alpha"), "metadata alpha", "scaling is alpha / r", "nothing");
    assert_refused(valid().without("beta"), "metadata beta", "factor of Q K^T", "nothing");
    assert_refused(HeadFile::projected().without("beta"), "metadata beta", "a number", "nothing");
    for text in ["nan", "inf", "-inf", "one", "", "1,5"] {
        assert_refused(valid().meta("beta", text), "metadata beta", "a finite number", text);
        assert_refused(valid().meta("alpha", text), "metadata alpha", "a finite number", text);
    }
    for text in ["0", "-0.5"] {
        assert_refused(valid().meta("beta", text), "beta", "positive and finite", text);
    }
    assert_refused(valid().meta("causal", "maybe"), "metadata causal", "True or False", "maybe");
    assert_refused(valid().meta("softmax_one", "2"), "metadata softmax_one", "True or False", "2");
    // Without adapters, alpha means nothing and is not asked for.
    let plain = valid()
        .without("AQ")
        .without("BQ")
        .without("AV")
        .without("BV")
        .without("alpha")
        .without("r");
    assert!(read(&plain.bytes()).1.is_ok());
}

#[test]
fn empty_sequences() {
    let hidden = HeadFile::valid().set("X", matrix(0, D_IN)).set("Y", matrix(0, 5));
    assert_refused(hidden, "rows of X", "at least 1", "0");
    let no_query = HeadFile::projected().set("Q", matrix(0, D_H)).set("G", matrix(0, 5));
    assert_refused(no_query, "rows of Q", "at least 1", "0");
    let no_key = HeadFile::projected().set("K", matrix(0, D_H)).set("V", matrix(0, 5));
    assert_refused(no_key, "rows of K", "at least 1", "0");
    let no_width = HeadFile::projected().set("Q", matrix(7, 0)).set("K", matrix(L, 0));
    assert_refused(no_width, "columns of Q", "at least 1", "0");
    // One token is a sequence.
    let one = HeadFile::valid().set("X", matrix(1, D_IN)).set("Y", matrix(1, 5));
    let head = read(&one.bytes()).1.unwrap();
    exact::dense::gradients(&head, Request::All).unwrap();
    exact::streaming::gradients(&head, Request::All).unwrap();
}

#[test]
fn tensors_that_contradict_each_other() {
    let both = HeadFile::valid().set("G", matrix(L, 5));
    assert_refused(both, "tensors", "either Y or G", "both");
    let beside = HeadFile::projected().set("X", matrix(L, D_IN));
    assert_refused(beside, "tensors", "either Q, K, V or inputs", "X beside");
    let beside = HeadFile::valid().set("Q", matrix(L, D_H));
    assert_refused(beside, "tensors", "either Q, K, V or inputs", "X beside");
    let twice = HeadFile::valid().set("XQ", matrix(L, D_IN));
    assert_refused(twice, "tensors", "either X or XQ, XK, XV", "XQ beside X");
    let cross =
        HeadFile::valid().without("X").set("XQ", matrix(0, D_IN)).set("XK", matrix(L, D_IN));
    let cross = cross.set("XV", matrix(L, D_IN)).set("Y", matrix(0, 5)).meta("causal", "false");
    assert_refused(cross, "rows of XQ", "at least 1", "0");
    let unused = HeadFile::projected().set("AQ", matrix(R, D_H)).set("BQ", matrix(D_IN, R));
    assert_refused(unused, "tensors", "either Q, K, V or inputs", "AQ beside");
}

/// Sizes that a header claims are never allocated before they are compared with the file.
#[test]
fn headers_that_claim_huge_sizes() {
    let large = u64::MAX / 8;
    let mut files = vec![
        u64::MAX.to_le_bytes().to_vec(),
        (1u64 << 40).to_le_bytes().to_vec(),
        [&99_999_999u64.to_le_bytes()[..], b"{}"].concat(),
    ];
    for (shape, offsets) in [
        (vec![1u64 << 40, 1 << 10], [0u64, 1 << 53]),
        (vec![1 << 40, 1 << 40], [0, 1 << 53]),
        (vec![large, 8], [0, 16]),
        (vec![0, 1 << 60], [0, 0]),
        (vec![1 << 60, 0], [0, 0]),
        (vec![0, u64::MAX], [0, 0]),
    ] {
        for name in ["X", "Q", "XQ"] {
            files.push(with_header(
                &format!("{{\"{name}\":{{\"dtype\":\"F64\",\"shape\":{shape:?},\"data_offsets\":{offsets:?}}}}}"),
                &[0; 16],
            ));
            files.push(with_header(
                &format!("{{\"{name}\":{{\"dtype\":\"F64\",\"shape\":{shape:?},\"data_offsets\":{offsets:?}}}}}"),
                &[],
            ));
        }
    }
    // Empty tensors with a huge other side, in every role at once.
    for shape in [vec![0, 1usize << 60], vec![1 << 60, 0]] {
        let huge = Tensor { dtype: "F64", shape, data: Vec::new() };
        let all = |names: &[&'static str], file: HeadFile| {
            names.iter().fold(file, |file, name| file.set(name, huge.clone())).bytes()
        };
        files.push(all(&["X", "WQ", "WK", "WV", "AQ", "BQ", "AV", "BV", "Y"], HeadFile::valid()));
        files.push(all(&["X", "Y"], HeadFile::valid()));
        files.push(all(&["AQ", "BQ"], HeadFile::valid()));
        files.push(all(&["Q", "K", "V", "G"], HeadFile::projected()));
        files.push(all(&["V", "G"], HeadFile::projected()));
        files.push(all(&["Q", "K"], HeadFile::projected()));
    }
    for bytes in files {
        let (_, outcome) = read(&bytes);
        assert!(outcome.is_err());
    }
    let largest = LARGEST.get();
    assert!(largest < ALLOWED, "a single allocation of {largest} bytes");
}

fn quiet(cases: u32) -> ProptestConfig {
    let kept = FileFailurePersistence::WithSource("regressions");
    ProptestConfig { cases, failure_persistence: Some(Box::new(kept)), ..ProptestConfig::default() }
}

/// No panic; a file that is still accepted has gradients or an error, and no panic either.
fn survives(path: &Path, bytes: &[u8]) -> std::result::Result<(), TestCaseError> {
    std::fs::write(path, bytes).unwrap();
    match read_problem::<f64>(path) {
        Ok(head) => {
            exact::dense::gradients(&head, Request::All).unwrap();
            exact::streaming::gradients(&head, Request::All).unwrap();
        }
        Err(error) => {
            prop_assert!(error.to_string().contains(&path.display().to_string()), "{error}")
        }
    }
    let largest = LARGEST.get();
    prop_assert!(largest < ALLOWED, "a single allocation of {} bytes", largest);
    Ok(())
}

proptest! {
    #![proptest_config(quiet(256))]

    #[test]
    fn random_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..400)) {
        let folder = tempfile::tempdir().unwrap();
        survives(&folder.path().join("a.safetensors"), &bytes)?;
        // The same behind a plausible header length.
        let text: String = bytes.iter().map(|b| char::from(b % 95 + 32)).collect();
        survives(&folder.path().join("b.safetensors"), &with_header(&text, &bytes))?;
    }

    #[test]
    fn one_wrong_byte(at in any::<prop::sample::Index>(), value in any::<u8>(), projected in any::<bool>()) {
        let mut bytes = if projected { HeadFile::projected() } else { HeadFile::valid() }.bytes();
        let at = at.index(bytes.len());
        bytes[at] = value;
        let folder = tempfile::tempdir().unwrap();
        survives(&folder.path().join("a.safetensors"), &bytes)?;
    }
}

/// Every byte of the header, with the values that mean something to a parser.
#[test]
fn one_wrong_byte_anywhere_in_the_header() {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("a.safetensors");
    for file in [HeadFile::valid(), HeadFile::projected()] {
        let bytes = file.bytes();
        let header = 8 + u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        for at in 0..header {
            for value in [0, b'0', b'9', b'-', b'"', b'}', b',', 0xff] {
                let mut bytes = bytes.clone();
                bytes[at] = value;
                survives(&path, &bytes).unwrap();
            }
        }
    }
}
