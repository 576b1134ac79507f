//! A file whose bytes are read when they are asked for, from any thread.
//!
//! Reading into a buffer, not mapping: a mapped file that is cut short ends the process, a read
//! that comes up short is an error.

use crate::error::{Error, Result};
use std::fs::File;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

/// An open file and what it was when it was opened.
#[derive(Debug)]
pub struct DiskFile {
    path: PathBuf,
    file: File,
    length: u64,
    modified: Option<SystemTime>,
}

impl DiskFile {
    /// Opens a file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref().to_path_buf();
        let io = |e| Error::io(&path, e);
        let file = File::open(&path).map_err(io)?;
        let about = file.metadata().map_err(io)?;
        if about.is_dir() {
            return Err(Error::format(&path, "file", "a file", "a folder"));
        }
        let (length, modified) = (about.len(), about.modified().ok());
        Ok(Self { path, file, length, modified })
    }

    /// Bytes it had when it was opened.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Fills a buffer from an offset.
    ///
    /// # Errors
    /// [`Error::Io`]; [`Error::Format`] for a file that ends before, or is another than when it was
    /// opened.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<()> {
        let end = offset + buffer.len() as u64;
        let outcome = read_exact_at(&self.file, buffer, offset);
        let about = self.file.metadata().map_err(|e| Error::io(&self.path, e))?;
        if about.len() != self.length {
            let (expected, found) =
                (format!("{} bytes, as when it was opened", self.length), about.len().to_string());
            return Err(Error::format(&self.path, "file", expected, found));
        }
        match outcome {
            Ok(()) => {}
            Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => {
                return Err(Error::format(
                    &self.path,
                    "file",
                    format!("at least {end} bytes"),
                    self.length.to_string(),
                ));
            }
            Err(e) => return Err(Error::io(&self.path, e)),
        }
        if about.modified().ok() != self.modified {
            return Err(Error::format(
                &self.path,
                "file",
                "no change while it is read",
                "a newer modification time",
            ));
        }
        Ok(())
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, buffer: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, buffer, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut buffer: &mut [u8], mut offset: u64) -> std::io::Result<()> {
    while !buffer.is_empty() {
        match std::os::windows::fs::FileExt::seek_read(file, buffer, offset)? {
            0 => return Err(std::io::ErrorKind::UnexpectedEof.into()),
            n => {
                buffer = &mut buffer[n..];
                offset += n as u64;
            }
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::io::Write;

    #[test]
    fn what_changes_under_a_reader_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bytes");
        std::fs::write(&path, [1, 2, 3, 4, 5]).unwrap();
        let file = DiskFile::open(&path).unwrap();
        let mut two = [0; 2];
        file.read(3, &mut two).unwrap();
        assert_eq!((two, file.length()), ([4, 5], 5));
        let text = file.read(4, &mut two).unwrap_err().to_string();
        assert!(text.contains("bytes") && text.contains("at least 6 bytes"), "{text}");
        // Cut short, also where the part that is read is still there; the same length with other
        // contents.
        File::options().write(true).open(&path).unwrap().set_len(2).unwrap();
        let text = file.read(0, &mut two).unwrap_err().to_string();
        assert!(text.contains("5 bytes, as when it was opened"), "{text}");
        let later = SystemTime::now() + std::time::Duration::from_secs(5);
        let mut again = File::create(&path).unwrap();
        again.write_all(&[5, 4, 3, 2, 1]).unwrap();
        again.set_modified(later).unwrap();
        let text = file.read(0, &mut two).unwrap_err().to_string();
        assert!(text.contains("no change while it is read"), "{text}");
        assert!(matches!(DiskFile::open(folder.path().join("none")), Err(Error::Io { .. })));
        assert!(DiskFile::open(folder.path()).is_err());
    }
}
