//! TensorBoard event files: `Event` protobufs (tensorflow/core/util/event.proto) in TFRecord frames
//! (tensorflow/core/lib/io/record_writer.h): length, masked CRC-32C of the length, bytes, masked CRC-32C of the bytes.

use std::fs::{self, File, OpenOptions};
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use prost::Message;

use super::{Result, io_error};

#[derive(Clone, PartialEq, Message)]
struct Event {
    #[prost(double, tag = "1")]
    wall_time: f64,
    #[prost(int64, tag = "2")]
    step: i64,
    #[prost(oneof = "What", tags = "3, 5, 7")]
    what: Option<What>,
}

#[derive(Clone, PartialEq, prost::Oneof)]
enum What {
    #[prost(string, tag = "3")]
    FileVersion(String),
    #[prost(message, tag = "5")]
    Summary(Summary),
    #[prost(message, tag = "7")]
    SessionLog(SessionLog),
}

#[derive(Clone, PartialEq, Message)]
struct SessionLog {
    /// 1 is START: readers drop earlier events of this or a later step.
    #[prost(int32, tag = "1")]
    status: i32,
}

#[derive(Clone, PartialEq, Message)]
struct Summary {
    #[prost(message, repeated, tag = "1")]
    value: Vec<SummaryValue>,
}

#[derive(Clone, PartialEq, Message)]
struct SummaryValue {
    #[prost(string, tag = "1")]
    tag: String,
    #[prost(float, optional, tag = "2")]
    simple_value: Option<f32>,
    #[prost(message, optional, tag = "8")]
    tensor: Option<TensorProto>,
    #[prost(message, optional, tag = "9")]
    metadata: Option<SummaryMetadata>,
}

#[derive(Clone, PartialEq, Message)]
struct SummaryMetadata {
    #[prost(message, optional, tag = "1")]
    plugin_data: Option<PluginData>,
}

#[derive(Clone, PartialEq, Message)]
struct PluginData {
    #[prost(string, tag = "1")]
    plugin_name: String,
}

#[derive(Clone, PartialEq, Message)]
struct TensorProto {
    /// 7 is DT_STRING.
    #[prost(int32, tag = "1")]
    dtype: i32,
    #[prost(message, optional, tag = "2")]
    tensor_shape: Option<TensorShape>,
    #[prost(bytes = "vec", repeated, tag = "8")]
    string_val: Vec<Vec<u8>>,
}

#[derive(Clone, PartialEq, Message)]
struct TensorShape {
    #[prost(message, repeated, tag = "2")]
    dim: Vec<Dim>,
}

#[derive(Clone, PartialEq, Message)]
struct Dim {
    #[prost(int64, tag = "1")]
    size: i64,
}

/// Writes one event file. Each call hands whole records to the system before it returns.
#[derive(Debug)]
pub struct EventWriter {
    path: PathBuf,
    file: File,
}

impl EventWriter {
    /// Starts a new event file in `dir` (made if it is missing), named `events.out.tfevents.SECONDS.HOST.PID.N` so that
    /// readers take a folder's files in order. `resume_step` is the last step that the run keeps: TensorBoard then
    /// drops what earlier files say about later steps.
    ///
    /// # Errors
    /// The folder or file cannot be made.
    pub fn create(dir: &Path, resume_step: Option<u64>) -> Result<Self> {
        fs::create_dir_all(dir).map_err(io_error(dir))?;
        let seconds = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |d| d.as_secs());
        let (host, pid) = (host_name(), std::process::id());
        let mut n = 0u32;
        let (path, file) = loop {
            let path = dir.join(format!("events.out.tfevents.{seconds:010}.{host}.{pid}.{n}"));
            match OpenOptions::new().write(true).create_new(true).open(&path) {
                Ok(file) => break (path, file),
                Err(e) if e.kind() == io::ErrorKind::AlreadyExists && n < 10_000 => n += 1,
                Err(e) => return Err(io_error(&path)(e)),
            }
        };
        let mut writer = Self { path, file };
        writer.write(0, What::FileVersion("brain.Event:2".to_owned()))?;
        if let Some(step) = resume_step {
            writer.write(step.saturating_add(1), What::SessionLog(SessionLog { status: 1 }))?;
        }
        Ok(writer)
    }

    /// The event file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Writes scalars of one step as one record.
    ///
    /// # Errors
    /// The write failed.
    pub fn scalars(&mut self, step: u64, scalars: &[(&str, f64)]) -> Result<()> {
        let value = scalars
            .iter()
            .map(|(tag, v)| SummaryValue {
                tag: (*tag).to_owned(),
                simple_value: Some(*v as f32),
                ..Default::default()
            })
            .collect();
        self.write(step, What::Summary(Summary { value }))
    }

    /// Writes Markdown for TensorBoard's text tab.
    ///
    /// # Errors
    /// The write failed.
    pub fn text(&mut self, tag: &str, step: u64, markdown: &str) -> Result<()> {
        let tensor = TensorProto {
            dtype: 7,
            tensor_shape: Some(TensorShape { dim: vec![Dim { size: 1 }] }),
            string_val: vec![markdown.as_bytes().to_vec()],
        };
        let plugin_data = Some(PluginData { plugin_name: "text".to_owned() });
        let value = SummaryValue {
            tag: format!("{tag}/text_summary"),
            simple_value: None,
            tensor: Some(tensor),
            metadata: Some(SummaryMetadata { plugin_data }),
        };
        self.write(step, What::Summary(Summary { value: vec![value] }))
    }

    /// Makes the events survive a power cut.
    ///
    /// # Errors
    /// The system refused.
    pub fn sync(&mut self) -> Result<()> {
        self.file.sync_data().map_err(io_error(&self.path))
    }

    fn write(&mut self, step: u64, what: What) -> Result<()> {
        let wall_time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |d| d.as_secs_f64());
        let step = i64::try_from(step).unwrap_or(i64::MAX);
        let event = Event { wall_time, step, what: Some(what) };
        self.file.write_all(&frame(&event.encode_to_vec())).map_err(io_error(&self.path))
    }
}

/// One TFRecord.
fn frame(data: &[u8]) -> Vec<u8> {
    let len = (data.len() as u64).to_le_bytes();
    let mut out = Vec::with_capacity(data.len() + 16);
    out.extend_from_slice(&len);
    out.extend_from_slice(&masked_crc(&len).to_le_bytes());
    out.extend_from_slice(data);
    out.extend_from_slice(&masked_crc(data).to_le_bytes());
    out
}

/// CRC-32C, rotated and offset so that a CRC over data that holds CRCs stays useful (leveldb's `crc32c::Mask`).
fn masked_crc(data: &[u8]) -> u32 {
    crc32c::crc32c(data).rotate_right(15).wrapping_add(0xa282_ead8)
}

fn host_name() -> String {
    let name = fs::read_to_string("/proc/sys/kernel/hostname")
        .ok()
        .or_else(|| std::env::var("HOSTNAME").ok())
        .or_else(|| std::env::var("COMPUTERNAME").ok())
        .unwrap_or_default();
    let name: String = name.trim().chars().filter(|c| c.is_ascii_alphanumeric() || *c == '-').take(64).collect();
    if name.is_empty() { "localhost".to_owned() } else { name }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, clippy::expect_used, clippy::panic)]
    use super::*;

    fn read(path: &Path) -> Vec<Event> {
        let bytes = fs::read(path).unwrap();
        let (mut at, mut out) = (0, Vec::new());
        while at < bytes.len() {
            let len = u64::from_le_bytes(bytes[at..at + 8].try_into().unwrap()) as usize;
            let data = &bytes[at + 12..at + 12 + len];
            assert_eq!(bytes[at + 8..at + 12], masked_crc(&bytes[at..at + 8]).to_le_bytes());
            assert_eq!(bytes[at + 12 + len..at + 16 + len], masked_crc(data).to_le_bytes());
            out.push(Event::decode(data).unwrap());
            at += 16 + len;
        }
        out
    }

    #[test]
    fn known_frame() {
        // b"hello" framed with tensorboard's own masked_crc32c.
        assert_eq!(
            frame(b"hello"),
            [5, 0, 0, 0, 0, 0, 0, 0, 0xea, 0xb2, 0x04, 0x3e, b'h', b'e', b'l', b'l', b'o', 0xbb, 0x1f, 0x1c, 0x19]
        );
    }

    #[test]
    fn file_starts_with_its_version_and_keeps_all_events() {
        let dir = tempfile::tempdir().unwrap();
        let mut w = EventWriter::create(dir.path(), None).unwrap();
        w.scalars(1, &[("train/loss", 2.5), ("train/grad_norm", f64::NAN)]).unwrap();
        w.text("recipe", 0, "# T").unwrap();
        let name = w.path().file_name().unwrap().to_str().unwrap();
        assert!(name.starts_with("events.out.tfevents."), "{name}");
        let events = read(w.path());
        assert_eq!(events[0].what, Some(What::FileVersion("brain.Event:2".into())));
        let Some(What::Summary(s)) = &events[1].what else { panic!() };
        assert_eq!((events[1].step, s.value[0].tag.as_str(), s.value[0].simple_value), (1, "train/loss", Some(2.5)));
        assert!(s.value[1].simple_value.unwrap().is_nan());
        assert_eq!(events.len(), 3);
    }

    #[test]
    fn a_resumed_run_gets_its_own_file_that_purges() {
        let dir = tempfile::tempdir().unwrap();
        let a = EventWriter::create(dir.path(), None).unwrap();
        let b = EventWriter::create(dir.path(), Some(7)).unwrap();
        assert_ne!(a.path(), b.path());
        let events = read(b.path());
        assert_eq!((events[1].step, &events[1].what), (8, &Some(What::SessionLog(SessionLog { status: 1 }))));
        assert!(EventWriter::create(Path::new("/proc/none"), None).is_err());
    }
}
