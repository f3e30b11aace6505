//! One safetensors file: mapped for reading, written atomically.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::path::{Path, PathBuf};

use candle_core::{DType, Device, Tensor};
use memmap2::Mmap;
use safetensors::Dtype;

use crate::atomic::write_file_with;
use crate::error::{Context, Error, Result};
use crate::mapping;
use crate::st_header::{self, Header, TensorMeta};
use crate::suggest::did_you_mean;
use crate::tensor_bytes::{candle_dtype, read_tensor, write_tensor};

/// A mapped safetensors file whose header was checked: every tensor lies inside the file.
///
/// The file must not be changed in place while it is open (replacing it by a rename, as all writers here do, is fine).
#[derive(Debug)]
pub struct SafetensorsFile {
    path: PathBuf,
    map: Mmap,
    header: Header,
}

impl SafetensorsFile {
    /// Maps `path` and checks its header; no tensor is read yet.
    ///
    /// # Errors
    /// The file cannot be read, is cut off, is something else (git-lfs pointer, PyTorch file, web page), or its
    /// header lies; the message names the file and the tensor.
    pub fn open(path: impl AsRef<Path>) -> Result<Self> {
        let path = path.as_ref();
        let file = File::open(path).map_err(|cause| Error::io(path, cause))?;
        let info = file.metadata().map_err(|cause| Error::io(path, cause))?;
        if !info.is_file() {
            return Err(Error::file(path, "is not a file"));
        }
        let map = mapping::map(&file).map_err(|cause| Error::io(path, cause))?;
        let header = st_header::parse(&map).map_err(|message| Error::file(path, message))?;
        Ok(Self { path: path.to_owned(), map, header })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The header's `__metadata__`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.header.metadata
    }

    /// Names of the tensors, sorted.
    pub fn names(&self) -> impl ExactSizeIterator<Item = &str> {
        self.header.tensors.keys().map(String::as_str)
    }

    /// Type, shape and place of a tensor, if it is there.
    pub fn get(&self, name: &str) -> Option<&TensorMeta> {
        self.header.tensors.get(name)
    }

    /// Type, shape and place of a tensor.
    ///
    /// # Errors
    /// It is not there; the message names the nearest ones.
    pub fn meta(&self, name: &str) -> Result<&TensorMeta> {
        self.get(name).ok_or_else(|| {
            let near = did_you_mean(name, self.names());
            Error::file(&self.path, format!("has no tensor `{}`{near}", st_header::printable(name)))
        })
    }

    /// The bytes of a tensor as they lie in the file (little-endian).
    ///
    /// # Errors
    /// There is no such tensor.
    pub fn raw(&self, name: &str) -> Result<&[u8]> {
        let bytes = self.meta(name)?.bytes.clone();
        self.map.get(bytes).ok_or_else(|| Error::file(&self.path, format!("tensor `{name}` lies outside of the file")))
    }

    /// candle's type of a tensor.
    ///
    /// # Errors
    /// There is no such tensor, or candle has no such type.
    pub fn dtype(&self, name: &str) -> Result<DType> {
        let dtype = self.meta(name)?.dtype;
        candle_dtype(dtype).ok_or_else(|| {
            let message =
                format!("tensor `{name}` has the type {dtype:?}, which cannot be used; convert the file first");
            Error::file(&self.path, message)
        })
    }

    /// Copies a tensor out in the type it has on disk and drops its pages from this process's memory.
    ///
    /// # Errors
    /// There is no such tensor, its type cannot be used, or the device has no room.
    pub fn tensor(&self, name: &str, device: &Device) -> Result<Tensor> {
        self.tensor_as(name, self.dtype(name)?, device)
    }

    /// Like [`Self::tensor`], converted to `dtype` (rounded to nearest even) while it is copied.
    ///
    /// # Errors
    /// As [`Self::tensor`].
    pub fn tensor_as(&self, name: &str, dtype: DType, device: &Device) -> Result<Tensor> {
        let meta = self.meta(name)?;
        let done = |range: Range<usize>| {
            mapping::forget(&self.map, meta.bytes.start + range.start..meta.bytes.start + range.end)
        };
        read_tensor(self.raw(name)?, &meta.shape, meta.dtype, dtype, device, done)
            .with_context(|| format!("{}: tensor `{name}`", self.path.display()))
    }

    /// Drops a tensor's pages from this process's memory; the next access reads them again. To be called after
    /// [`Self::raw`] when walking through a large file.
    pub fn release(&self, name: &str) {
        if let Some(meta) = self.get(name) {
            mapping::forget(&self.map, meta.bytes.clone());
        }
    }
}

/// Writes a safetensors file atomically, one tensor in memory at a time. Tensors lie in the reference library's order
/// (by falling alignment, then by name), so the bytes do not depend on the order of `tensors`.
///
/// # Errors
/// A name that occurs twice, a type that safetensors lacks, or [`Error::Write`].
pub fn write_safetensors<'a>(
    path: impl AsRef<Path>,
    tensors: impl IntoIterator<Item = (&'a str, &'a Tensor)>,
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let path = path.as_ref();
    let tensors: Vec<(&str, &Tensor)> = tensors.into_iter().collect();
    let plan: Vec<(&str, Dtype, &[usize])> =
        tensors.iter().map(|(name, tensor)| (*name, Dtype::from(tensor.dtype()), tensor.dims())).collect();
    let (head, places) = st_header::build(&plan, metadata).map_err(|message| Error::file(path, message))?;
    let mut order: Vec<(&(&str, &Tensor), Range<usize>)> = tensors.iter().zip(places).collect();
    order.sort_by_key(|(_, place)| (place.start, place.end));
    let mut failed = None;
    let written = write_file_with(path, |writer| {
        writer.write_all(&head)?;
        for ((name, tensor), _) in order {
            match write_tensor(tensor, |bytes| writer.write_all(bytes)) {
                Ok(result) => result?,
                Err(error) => {
                    failed = Some((name.to_owned(), error));
                    return Err(std::io::Error::other("stopped"));
                }
            }
        }
        Ok(())
    });
    match failed {
        Some((name, error)) => Err(error).with_context(|| format!("{}: tensor `{name}`", path.display())),
        None => written,
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;
    use proptest::prelude::*;

    fn no_metadata() -> BTreeMap<String, String> {
        BTreeMap::new()
    }

    #[test]
    fn what_cannot_be_read_says_why() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model.safetensors");
        let error = SafetensorsFile::open(&path).unwrap_err().to_string();
        assert!(error.contains("model.safetensors") && error.contains("No such file"), "{error}");
        std::fs::write(&path, b"").unwrap();
        let error = SafetensorsFile::open(&path).unwrap_err().to_string();
        assert!(error.contains("only 0 bytes"), "{error}");
        std::fs::write(&path, b"version https://git-lfs.github.com/spec/v1\noid sha256:1\nsize 1\n").unwrap();
        let error = SafetensorsFile::open(&path).unwrap_err().to_string();
        assert!(error.contains("git lfs pull"), "{error}");
        assert!(SafetensorsFile::open(dir.path()).unwrap_err().to_string().contains("is not a file"));

        let tensor = Tensor::ones((2, 3), DType::F32, &Device::Cpu).unwrap();
        write_safetensors(&path, [("model.norm.weight", &tensor)], &no_metadata()).unwrap();
        let file = SafetensorsFile::open(&path).unwrap();
        let error = file.tensor("model.norm.wieght", &Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("did you mean `model.norm.weight`"), "{error}");
        let whole = std::fs::read(&path).unwrap();
        std::fs::write(&path, &whole[..whole.len() - 1]).unwrap();
        let error = SafetensorsFile::open(&path).unwrap_err().to_string();
        assert!(error.contains("is cut off"), "{error}");
    }

    #[test]
    fn a_type_that_candle_lacks_is_an_error_only_when_used() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        let view = safetensors::tensor::TensorView::new(Dtype::BOOL, vec![2], &[1, 0]).unwrap();
        std::fs::write(&path, safetensors::serialize([("mask", view)], None).unwrap()).unwrap();
        let file = SafetensorsFile::open(&path).unwrap();
        assert_eq!(file.raw("mask").unwrap(), [1, 0]);
        let error = file.tensor("mask", &Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("`mask`") && error.contains("BOOL"), "{error}");
        let error = file.tensor_as("mask", DType::F32, &Device::Cpu).unwrap_err().to_string();
        assert!(error.contains("`mask`") && error.contains("BOOL"), "{error}");
    }

    #[test]
    fn releasing_pages_changes_nothing() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        let tensor = Tensor::arange(0f32, 300_000f32, &Device::Cpu).unwrap();
        let small = Tensor::new(&[7f32], &Device::Cpu).unwrap();
        write_safetensors(&path, [("big", &tensor), ("a", &small)], &no_metadata()).unwrap();
        let file = SafetensorsFile::open(&path).unwrap();
        for _ in 0..3 {
            let back = file.tensor("big", &Device::Cpu).unwrap();
            assert_eq!(back.to_vec1::<f32>().unwrap(), tensor.to_vec1::<f32>().unwrap());
            file.release("big");
            file.release("nothing");
            assert_eq!(file.raw("a").unwrap(), 7f32.to_le_bytes());
        }
    }

    fn any_tensor() -> impl Strategy<Value = Tensor> {
        let dtype =
            prop_oneof![Just(DType::F32), Just(DType::BF16), Just(DType::F16), Just(DType::I64), Just(DType::U8)];
        (prop::collection::vec(0usize..5, 0..4), dtype, any::<u32>()).prop_map(|(shape, dtype, seed)| {
            let count: usize = shape.iter().product();
            let values: Vec<f32> =
                (0..count).map(|i| ((i as u32).wrapping_mul(2_654_435_761) ^ seed) as u8 as f32).collect();
            Tensor::from_vec(values, shape, &Device::Cpu).unwrap().to_dtype(dtype).unwrap()
        })
    }

    proptest! {
        #[test]
        fn saved_tensors_come_back(tensors in prop::collection::btree_map("[a-z.\"ü]{1,8}", any_tensor(), 0..8), reverse: bool) {
            let dir = tempfile::tempdir().unwrap();
            let path = dir.path().join("t.safetensors");
            let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
            let mut list: Vec<_> = tensors.iter().map(|(name, tensor)| (name.as_str(), tensor)).collect();
            if reverse { list.reverse(); }
            write_safetensors(&path, list, &metadata).unwrap();
            let file = SafetensorsFile::open(&path).unwrap();
            prop_assert_eq!(file.metadata(), &metadata);
            prop_assert_eq!(file.names().collect::<Vec<_>>(), tensors.keys().map(String::as_str).collect::<Vec<_>>());
            for (name, tensor) in &tensors {
                let back = file.tensor(name, &Device::Cpu).unwrap();
                prop_assert_eq!(back.dims(), tensor.dims());
                prop_assert_eq!(back.dtype(), tensor.dtype());
                let flat = |t: &Tensor| t.flatten_all().unwrap().to_dtype(DType::F64).unwrap().to_vec1::<f64>().unwrap();
                prop_assert_eq!(flat(&back), flat(tensor));
            }
            // The reference library writes the same bytes.
            let theirs = safetensors::serialize(tensors.iter().map(|(n, t)| (n.as_str(), t)), Some(metadata.into_iter().collect()));
            prop_assert_eq!(std::fs::read(&path).unwrap(), theirs.unwrap());
        }
    }
}
