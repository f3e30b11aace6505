//! The header of a safetensors file, read without trust and written in the order of the reference library.
//!
//! Format: 8 bytes little-endian header length, a JSON table name → {dtype, shape, data_offsets} (and
//! `__metadata__`), then the data without gaps (safetensors' README). Parsed here rather than by the safetensors
//! crate because messages must name the tensor, and because the crate accepts names that occur twice.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::Range;

use safetensors::Dtype;
use safetensors::tensor::TensorInfo;
use serde::de::{self, Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::{Map, Value, json};

/// Limit of the reference library; a longer header is a lie.
const MAX_HEADER: usize = 100_000_000;
const LENGTH_BYTES: usize = 8;

/// One tensor of a file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TensorMeta {
    /// Type on disk.
    pub dtype: Dtype,
    /// Shape, outermost dimension first.
    pub shape: Vec<usize>,
    /// Where its bytes lie in the file.
    pub bytes: Range<usize>,
}

/// A parsed and checked header: every range lies inside the file, has the size of its shape, and overlaps no other.
#[derive(Debug, Clone, Default)]
pub(crate) struct Header {
    pub(crate) metadata: BTreeMap<String, String>,
    pub(crate) tensors: BTreeMap<String, TensorMeta>,
}

#[derive(Default)]
struct Raw {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, TensorInfo)>,
}

impl<'de> Deserialize<'de> for Raw {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Table;
        impl<'de> Visitor<'de> for Table {
            type Value = Raw;
            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("a table of tensors")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Raw, A::Error> {
                let mut raw = Raw::default();
                let mut seen = HashSet::new();
                while let Some(name) = map.next_key::<String>()? {
                    let place = |error: A::Error| de::Error::custom(format!("tensor `{}`: {error}", printable(&name)));
                    if name == "__metadata__" {
                        raw.metadata = map.next_value().map_err(place)?;
                        continue;
                    }
                    let info = map.next_value::<TensorInfo>().map_err(place)?;
                    if !seen.insert(name.clone()) {
                        return Err(de::Error::custom(format!("tensor `{}` is there twice", printable(&name))));
                    }
                    raw.tensors.push((name, info));
                }
                Ok(raw)
            }
        }
        deserializer.deserialize_map(Table)
    }
}

/// A name from a file, cut and escaped for a message.
pub(crate) fn printable(name: &str) -> String {
    let cut: String = name.chars().take(160).flat_map(char::escape_debug).collect();
    if name.chars().nth(160).is_some() { format!("{cut}…") } else { cut }
}

/// Reads and checks the header of a whole file; the error is a message without the path.
pub(crate) fn parse(file: &[u8]) -> Result<Header, String> {
    let length = file.first_chunk::<LENGTH_BYTES>().ok_or_else(|| {
        format!("is not a safetensors file: it has only {} bytes; download it again or export it again", file.len())
    })?;
    let length = u64::from_le_bytes(*length);
    let header_len = usize::try_from(length)
        .ok()
        .filter(|length| *length <= MAX_HEADER)
        .ok_or_else(|| format!("is not a safetensors file: its header claims {length} bytes{}", what_it_is(file)))?;
    let data_start = LENGTH_BYTES + header_len;
    let header = file.get(LENGTH_BYTES..data_start).ok_or_else(|| {
        format!(
            "is cut off: the header claims {header_len} bytes and the file has {}{}; download it again",
            file.len(),
            what_it_is(file)
        )
    })?;
    let text = std::str::from_utf8(header).map_err(|error| format!("has a header that is not UTF-8: {error}"))?;
    let raw: Raw = serde_json::from_str(text).map_err(|error| format!("has a header that cannot be read: {error}"))?;

    let data_len = file.len() - data_start;
    let mut tensors = raw.tensors;
    tensors.sort_by(|a, b| (a.1.data_offsets, &a.0).cmp(&(b.1.data_offsets, &b.0)));
    let end = tensors.iter().map(|(_, info)| info.data_offsets.1).max().unwrap_or(0);
    if end > data_len {
        let name =
            tensors.iter().find(|(_, info)| info.data_offsets.1 > data_len).map_or("", |(name, _)| name.as_str());
        return Err(format!(
            "is cut off: its header describes {end} bytes of data and {data_len} are there (tensor `{}` lies beyond the \
             end); download it again",
            printable(name)
        ));
    }
    let mut next = 0;
    let mut out = Header { metadata: raw.metadata, tensors: BTreeMap::new() };
    for (name, info) in tensors {
        let (start, stop) = info.data_offsets;
        let shown = printable(&name);
        if stop < start {
            return Err(format!("has wrong offsets: tensor `{shown}` ends ({stop}) before it starts ({start})"));
        }
        if start != next {
            let what = if start < next { "overlaps the tensor before it" } else { "leaves a gap before it" };
            return Err(format!(
                "has wrong offsets: tensor `{shown}` starts at byte {start} of the data and {what} ({next})"
            ));
        }
        let size = byte_size(info.dtype, &info.shape)
            .ok_or_else(|| format!("describes a tensor of impossible size: `{shown}` {:?}", info.shape))?;
        if stop - start != size {
            return Err(format!(
                "contradicts itself: tensor `{shown}` of shape {:?} and type {:?} needs {size} bytes and has {}",
                info.shape,
                info.dtype,
                stop - start
            ));
        }
        next = stop;
        let bytes = data_start + start..data_start + stop;
        out.tensors.insert(name, TensorMeta { dtype: info.dtype, shape: info.shape, bytes });
    }
    if next != data_len {
        return Err(format!(
            "has {} bytes after its last tensor; it is damaged or was not written completely",
            data_len - next
        ));
    }
    Ok(out)
}

/// What the first bytes look like, when they are no safetensors header.
pub(crate) fn what_it_is(file: &[u8]) -> &'static str {
    let starts = |prefix: &[u8]| file.starts_with(prefix);
    if starts(b"version https://git-lfs") {
        "; it is a git-lfs pointer, not the file itself: run `git lfs pull` in that folder or download the file"
    } else if starts(b"PK\x03\x04") || starts(b"\x80\x02") || starts(b"\x80\x04") {
        "; it looks like a PyTorch file (pickle): save it as safetensors first"
    } else if starts(b"GGUF") {
        "; it is a GGUF file: give its path with the ending .gguf"
    } else if starts(b"<!DOCTYPE") || starts(b"<!doctype") || starts(b"<html") {
        "; it is a web page: the download went wrong"
    } else {
        ""
    }
}

/// Bytes of a tensor, or `None` if that overflows or is not a whole number of bytes.
pub(crate) fn byte_size(dtype: Dtype, shape: &[usize]) -> Option<usize> {
    let elements = shape.iter().try_fold(1usize, |product, dim| product.checked_mul(*dim))?;
    let bits = elements.checked_mul(dtype.bitsize())?;
    bits.is_multiple_of(8).then_some(bits / 8)
}

/// The bytes before the data (length and header), and where in the file each tensor of `plan` belongs (in the order
/// of `plan`). Tensors lie by falling alignment, then by name, as the reference library writes them.
pub(crate) fn build(
    plan: &[(&str, Dtype, &[usize])],
    metadata: &BTreeMap<String, String>,
) -> Result<(Vec<u8>, Vec<Range<usize>>), String> {
    let mut order: Vec<usize> = (0..plan.len()).collect();
    order.sort_by(|a, b| match (plan.get(*a), plan.get(*b)) {
        (Some(a), Some(b)) => b.1.cmp(&a.1).then_with(|| a.0.cmp(b.0)),
        _ => std::cmp::Ordering::Equal,
    });
    let mut table = Map::new();
    if !metadata.is_empty() {
        table.insert("__metadata__".to_owned(), json!(metadata));
    }
    let mut offset = 0usize;
    let mut places = vec![0..0; plan.len()];
    for index in order {
        let (Some((name, dtype, shape)), Some(place)) = (plan.get(index), places.get_mut(index)) else { continue };
        let end = byte_size(*dtype, shape)
            .and_then(|size| offset.checked_add(size))
            .ok_or_else(|| format!("tensor `{}` of shape {shape:?} is too large", printable(name)))?;
        let info = TensorInfo { dtype: *dtype, shape: shape.to_vec(), data_offsets: (offset, end) };
        let info = serde_json::to_value(info).map_err(|error| error.to_string())?;
        if *name == "__metadata__" || table.insert((*name).to_owned(), info).is_some() {
            return Err(format!("tensor `{}` is there twice", printable(name)));
        }
        *place = offset..end;
        offset = end;
    }
    let mut json = serde_json::to_vec(&Value::Object(table)).map_err(|error| error.to_string())?;
    json.resize(json.len().next_multiple_of(LENGTH_BYTES), b' ');
    if json.len() > MAX_HEADER {
        return Err("the header would be longer than 100 MB".to_owned());
    }
    let mut head = (json.len() as u64).to_le_bytes().to_vec();
    head.extend(json);
    let shift = head.len();
    Ok((head, places.into_iter().map(|place| place.start + shift..place.end + shift).collect()))
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn file(header: &str, data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend(header.as_bytes());
        bytes.extend(vec![0; data]);
        bytes
    }

    #[test]
    fn hostile_headers_are_refused_with_a_reason() {
        let t = |entry: &str, data| file(&format!("{{{entry}}}"), data);
        let huge = |length: u64| [&length.to_le_bytes()[..], b"{}"].concat();
        let mut not_utf8 = file(r#"{"aa":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#, 4);
        not_utf8[10] = 0xff;
        for (bytes, reason) in [
            (vec![], "only 0 bytes"),
            (vec![1, 2, 3], "only 3 bytes"),
            (huge(u64::MAX), "claims 18446744073709551615 bytes"),
            (huge(100_000_001), "claims 100000001 bytes"),
            (huge(99_999_999), "is cut off"),
            (b"version https://git-lfs.github.com/spec/v1\noid sha256:00".to_vec(), "git lfs pull"),
            (b"PK\x03\x04 and so on".to_vec(), "PyTorch file"),
            (b"<!DOCTYPE html><html>".to_vec(), "web page"),
            (file("", 0), "cannot be read"),
            (file("[1]", 0), "cannot be read"),
            (file("{", 0), "cannot be read"),
            (file(&"[".repeat(10_000), 0), "cannot be read"),
            (file(&format!("{{\"a\":{}", "[".repeat(100_000)), 0), "cannot be read"),
            (t(r#""a":{"dtype":"F31","shape":[1],"data_offsets":[0,4]}"#, 4), "tensor `a`"),
            (t(r#""a":{"dtype":"F32","shape":[-1],"data_offsets":[0,4]}"#, 4), "tensor `a`"),
            (t(r#""a":{"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}"#, 4), "tensor `a`"),
            (t(r#""a":{"dtype":"F32","shape":[1]}"#, 4), "tensor `a`"),
            (t(r#""a":{"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551616]}"#, 4), "tensor `a`"),
            (t(r#""a":{"dtype":"F32","shape":[1],"data_offsets":[0,18446744073709551615]}"#, 4), "is cut off"),
            (t(r#""a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}"#, 7), "is cut off"),
            (t(r#""a":{"dtype":"F32","shape":[1],"data_offsets":[4,0]}"#, 4), "ends (0) before"),
            (t(r#""a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#, 8), "4 bytes after"),
            (t(r#""a":{"dtype":"F32","shape":[1],"data_offsets":[4,8]}"#, 8), "leaves a gap"),
            (
                t(
                    r#""a":{"dtype":"F32","shape":[2],"data_offsets":[0,8]},"b":{"dtype":"F32","shape":[2],"data_offsets":[4,12]}"#,
                    12,
                ),
                "overlaps",
            ),
            (
                t(
                    r#""a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#,
                    4,
                ),
                "overlaps",
            ),
            (
                t(
                    r#""a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#,
                    4,
                ),
                "`a` is there twice",
            ),
            (t(r#""a":{"dtype":"F32","shape":[3],"data_offsets":[0,4]}"#, 4), "needs 12 bytes and has 4"),
            (
                t(r#""a":{"dtype":"F32","shape":[4294967296,4294967296,4294967296],"data_offsets":[0,4]}"#, 4),
                "impossible size",
            ),
            (t(r#""a":{"dtype":"F32","shape":[4611686018427387904],"data_offsets":[0,0]}"#, 0), "impossible size"),
            (t(r#""a":{"dtype":"F4","shape":[1],"data_offsets":[0,1]}"#, 1), "impossible size"),
            (t(r#""__metadata__":{"a":1}"#, 0), "`__metadata__`"),
            (not_utf8, "not UTF-8"),
        ] {
            let message = parse(&bytes).expect_err(reason);
            assert!(message.contains(reason), "{message}\nshould contain: {reason}");
            assert!(message.len() < 600, "{}", message.len());
        }
        let long = format!(r#"{{"{}":{{"dtype":"F32","shape":[2],"data_offsets":[0,4]}}}}"#, "n".repeat(50_000));
        assert!(parse(&file(&long, 4)).unwrap_err().len() < 600);
    }

    #[test]
    fn empty_and_scalar_tensors_are_fine() {
        let header = parse(&file(
            r#"{"__metadata__":{"format":"pt"},"a":{"dtype":"F32","shape":[0,3],"data_offsets":[0,0]},"b":{"dtype":"BF16","shape":[],"data_offsets":[0,2]},"c":{"dtype":"F32","shape":[0],"data_offsets":[2,2]}}  "#,
            2,
        ))
        .unwrap();
        assert_eq!(header.tensors.len(), 3);
        assert_eq!(header.metadata["format"], "pt");
        assert_eq!(header.tensors["b"].bytes.len(), 2);
        assert!(parse(&file("{}", 0)).unwrap().tensors.is_empty());
    }

    #[test]
    fn headers_equal_those_of_the_reference_library() {
        let data = [0u8; 64];
        let plan: Vec<(&str, Dtype, &[usize])> = vec![
            ("b", Dtype::BF16, &[2, 2]),
            ("a.lora_B.weight", Dtype::F32, &[3]),
            ("a.lora_A.weight", Dtype::F32, &[1, 2]),
            ("empty", Dtype::F16, &[0, 4]),
            ("long", Dtype::I64, &[2]),
            ("ü\"\\", Dtype::F32, &[]),
        ];
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let (head, places) = build(&plan, &metadata).unwrap();
        let views = plan.iter().map(|(name, dtype, shape)| {
            let size = byte_size(*dtype, shape).unwrap();
            (*name, safetensors::tensor::TensorView::new(*dtype, shape.to_vec(), &data[..size]).unwrap())
        });
        let theirs = safetensors::serialize(views, Some(metadata.into_iter().collect())).unwrap();
        assert_eq!(String::from_utf8_lossy(&head[8..]), String::from_utf8_lossy(&theirs[8..head.len()]));
        assert_eq!(head, theirs[..head.len()]);
        let parsed = parse(&theirs).unwrap();
        for ((name, _, _), place) in plan.iter().zip(places) {
            assert_eq!(parsed.tensors[*name].bytes, place);
        }
        assert!(build(&[("a", Dtype::F32, &[1]), ("a", Dtype::F32, &[1])], &BTreeMap::new()).is_err());
        assert!(build(&[("a", Dtype::F32, &[usize::MAX, 2])], &BTreeMap::new()).is_err());
        assert!(build(&[("__metadata__", Dtype::F32, &[1])], &BTreeMap::new()).is_err());
    }

    proptest::proptest! {
        #[test]
        fn damaged_files_never_panic(changes in proptest::collection::vec((0usize..180, proptest::num::u8::ANY), 1..6), cut in 0usize..190) {
            let header = r#"{"a":{"dtype":"F32","shape":[2,2],"data_offsets":[0,16]},"b":{"dtype":"BF16","shape":[3],"data_offsets":[16,22]}}"#;
            let mut bytes = file(header, 22);
            for (at, value) in changes {
                if let Some(byte) = bytes.get_mut(at) { *byte = value; }
            }
            bytes.truncate(cut);
            if let Ok(header) = parse(&bytes) {
                for meta in header.tensors.values() {
                    proptest::prop_assert!(bytes.get(meta.bytes.clone()).is_some());
                }
            }
        }

        #[test]
        fn offsets_are_checked(a in 0usize..24, b in 0usize..24, c in 0usize..24, d in 0usize..24, n in 0usize..8, m in 0usize..8) {
            let header = format!(r#"{{"a":{{"dtype":"F32","shape":[{n}],"data_offsets":[{a},{b}]}},"b":{{"dtype":"F16","shape":[{m},1],"data_offsets":[{c},{d}]}}}}"#);
            let bytes = file(&header, 16);
            let fits = |first: (usize, usize), second: (usize, usize)| first.0 == 0 && first.1 == second.0 && second.1 == 16;
            let sizes = b.checked_sub(a) == Some(4 * n) && d.checked_sub(c) == Some(2 * m);
            let ok = sizes && (fits((a, b), (c, d)) || fits((c, d), (a, b)));
            proptest::prop_assert_eq!(parse(&bytes).is_ok(), ok, "{}", header);
        }
    }
}
