//! One vector a text, as the folder of a sentence-transformers model says it is made.

use std::path::Path;

use candle_core::{DType, Tensor};
use peft_core::{AdapterSet, Ctx, Error, Result, Route, Segmented, TokenBatch, read_json_file};
use serde_json::{Map, Value};

/// What is taken of the hidden states of a text's tokens.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PoolingMode {
    /// That of the first token.
    Cls,
    /// The largest value of each channel.
    Max,
    /// Their mean.
    Mean,
    /// Their sum over the root of their number.
    MeanSqrtLength,
    /// Their mean, the `i`-th weighed `i` (from 1).
    WeightedMean,
    /// That of the last token.
    LastToken,
}

impl PoolingMode {
    /// Names, as sentence-transformers has them.
    pub const NAMES: [(&'static str, Self); 6] = [
        ("cls", Self::Cls),
        ("max", Self::Max),
        ("mean", Self::Mean),
        ("mean_sqrt_len_tokens", Self::MeanSqrtLength),
        ("weightedmean", Self::WeightedMean),
        ("lasttoken", Self::LastToken),
    ];
    /// Flags of `1_Pooling/config.json`, in the order in which several are put behind each other.
    const FLAGS: [(&'static str, Self); 6] = [
        ("pooling_mode_cls_token", Self::Cls),
        ("pooling_mode_max_tokens", Self::Max),
        ("pooling_mode_mean_tokens", Self::Mean),
        ("pooling_mode_mean_sqrt_len_tokens", Self::MeanSqrtLength),
        ("pooling_mode_weightedmean_tokens", Self::WeightedMean),
        ("pooling_mode_lasttoken", Self::LastToken),
    ];

    /// The mode of a name.
    ///
    /// # Errors
    /// When none is called so; the message lists them.
    pub fn of(name: &str) -> Result<Self> {
        Self::NAMES.iter().find(|(n, _)| *n == name).map(|(_, mode)| *mode).ok_or_else(|| {
            let known = Self::NAMES.map(|(n, _)| n).join(", ");
            Error::msg(format!("`{name}` is not a way of pooling; known: {known}"))
        })
    }
}

/// How texts become vectors.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Pooling {
    /// One or more, whose results stand behind each other.
    pub modes: Vec<PoolingMode>,
    /// Whether vectors have length 1.
    pub normalize: bool,
    /// Tokens of a text, at most, special ones among them.
    pub max_length: Option<usize>,
}

impl Default for Pooling {
    /// The normalised mean, which sentence-transformers takes where a folder says nothing, but for the norm.
    fn default() -> Self {
        Self { modes: vec![PoolingMode::Mean], normalize: true, max_length: None }
    }
}

impl Pooling {
    /// What `modules.json` and the folders that it names say; nothing where there is none.
    ///
    /// # Errors
    /// Files that cannot be read, and modules that are not there (a dense layer, a reranker): the message names them.
    pub fn of_folder(folder: &Path) -> Result<Option<Self>> {
        let file = folder.join("modules.json");
        let text = match std::fs::read_to_string(&file) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound || e.kind() == std::io::ErrorKind::NotADirectory => {
                return Ok(None);
            }
            Err(cause) => return Err(Error::io(&file, cause)),
        };
        let modules: Vec<Map<String, Value>> =
            serde_json::from_str(&text).map_err(|e| Error::file(&file, format!("is not a list of modules: {e}")))?;
        let mut made = Self { modes: vec![PoolingMode::Mean], normalize: false, max_length: None };
        for module in &modules {
            let text = |key: &str| module.get(key).and_then(Value::as_str).unwrap_or_default();
            match text("type").rsplit('.').next().unwrap_or_default() {
                "Transformer" => made.max_length = max_length(folder)?,
                "Pooling" => made.modes = modes(&folder.join(text("path")).join("config.json"))?,
                "Normalize" => made.normalize = true,
                other => {
                    let message = format!(
                        "names a module `{other}`, which is not supported; known: Transformer, Pooling, Normalize"
                    );
                    return Err(Error::file(&file, message));
                }
            }
        }
        Ok(Some(made))
    }

    /// The vectors `[sequences, modes · hidden]` of texts whose tokens have the last hidden states `[tokens, hidden]`; `bounds` say where each
    /// begins, as in [`TokenBatch`].
    ///
    /// # Errors
    /// When a text has no tokens, or a tensor operation fails.
    pub fn pool(&self, hidden: &Tensor, bounds: &[usize]) -> Result<Tensor> {
        let hidden = hidden.to_dtype(DType::F32)?;
        let mut vectors = Vec::with_capacity(bounds.len());
        for (&from, &to) in bounds.iter().zip(bounds.iter().skip(1)) {
            let n = to.saturating_sub(from);
            if n == 0 {
                return Err(Error::msg("a text without tokens has no vector"));
            }
            let tokens = hidden.narrow(0, from, n)?;
            let parts = self.modes.iter().map(|mode| pooled(&tokens, n, *mode)).collect::<Result<Vec<_>>>()?;
            vectors.push(Tensor::cat(&parts, 0)?);
        }
        let vectors = Tensor::stack(&vectors, 0)?;
        match self.normalize {
            false => Ok(vectors),
            // As torch.nn.functional.normalize: a vector of zeros stays one.
            true => Ok(vectors.broadcast_div(&vectors.sqr()?.sum_keepdim(1)?.sqrt()?.maximum(1e-12)?)?),
        }
    }
}

fn pooled(tokens: &Tensor, n: usize, mode: PoolingMode) -> Result<Tensor> {
    Ok(match mode {
        PoolingMode::Cls => tokens.get(0)?,
        PoolingMode::LastToken => tokens.get(n - 1)?,
        PoolingMode::Max => tokens.max(0)?,
        PoolingMode::Mean => tokens.mean(0)?,
        PoolingMode::MeanSqrtLength => (tokens.sum(0)? / (n as f64).sqrt())?,
        PoolingMode::WeightedMean => {
            let weights: Vec<f32> = (1..=n).map(|i| i as f32).collect();
            let weights = Tensor::from_vec(weights, (n, 1), tokens.device())?;
            (tokens.broadcast_mul(&weights)?.sum(0)? / (n * (n + 1) / 2) as f64)?
        }
    })
}

fn modes(file: &Path) -> Result<Vec<PoolingMode>> {
    let config =
        read_json_file(file)?.ok_or_else(|| Error::file(file, "does not exist, and modules.json names its folder"))?;
    if let Some(name) = config.get("pooling_mode").and_then(Value::as_str) {
        return Ok(vec![PoolingMode::of(name).map_err(|e| Error::file(file, e.to_string()))?]);
    }
    let on = |flag: &str| config.get(flag).and_then(Value::as_bool) == Some(true);
    let modes: Vec<PoolingMode> =
        PoolingMode::FLAGS.iter().filter(|(flag, _)| on(flag)).map(|(_, mode)| *mode).collect();
    if modes.is_empty() {
        return Err(Error::file(file, "names no way of pooling: none of its `pooling_mode_…` is true"));
    }
    Ok(modes)
}

/// `max_seq_length` of the transformer's own file.
fn max_length(folder: &Path) -> Result<Option<usize>> {
    let config = read_json_file(&folder.join("sentence_bert_config.json"))?.unwrap_or_default();
    Ok(config.get("max_seq_length").and_then(Value::as_u64).map(|n| n as usize))
}

/// The vectors `[texts, width]` of token sequences through the first adapter of `set`, or the base where there is none.
///
/// # Errors
/// When a text is empty or too long for the model, or a tensor operation fails.
pub fn embed<M: Segmented>(model: &M, set: &AdapterSet, texts: &[Vec<u32>], pooling: &Pooling) -> Result<Tensor> {
    let route = if set.names().next().is_some() { Route::Uniform(0) } else { Route::Base };
    let ctx = Ctx::eval(set, &route);
    let ids: Vec<u32> = texts.concat();
    let positions: Vec<u32> = texts.iter().flat_map(|text| 0..text.len() as u32).collect();
    let ends = texts.iter().scan(0, |end, text| {
        *end += text.len();
        Some(*end)
    });
    let bounds: Vec<usize> = std::iter::once(0).chain(ends).collect();
    let batch = TokenBatch { ids: &ids, positions: &positions, bounds: &bounds, types: &[] };
    let input = model.prepare(batch, &ctx)?;
    let mut hidden = model.embed(batch, &ctx)?;
    for i in 0..model.num_blocks() {
        hidden = model.block(i, &hidden, &input, &ctx)?;
    }
    pooling.pool(&model.last_hidden_state(&hidden, &ctx)?, &bounds)
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::Device;

    use super::*;

    fn pooled(mode: PoolingMode, normalize: bool) -> Vec<Vec<f32>> {
        let hidden = Tensor::new(&[[1f32, 2.0], [3.0, -4.0], [8.0, 6.0], [0.0, 0.0]], &Device::Cpu).unwrap();
        let pooling = Pooling { modes: vec![mode], normalize, max_length: None };
        pooling.pool(&hidden, &[0, 2, 3, 4]).unwrap().to_vec2().unwrap()
    }

    #[test]
    fn each_mode_is_what_it_says() {
        let root = 2f32.sqrt();
        for (mode, first) in [
            (PoolingMode::Cls, [1.0, 2.0]),
            (PoolingMode::LastToken, [3.0, -4.0]),
            (PoolingMode::Max, [3.0, 2.0]),
            (PoolingMode::Mean, [2.0, -1.0]),
            (PoolingMode::MeanSqrtLength, [4.0 / root, -2.0 / root]),
            (PoolingMode::WeightedMean, [7.0 / 3.0, -2.0]),
        ] {
            let found = pooled(mode, false);
            assert!(found[0].iter().zip(first).all(|(a, b)| (a - b).abs() < 1e-6), "{mode:?}: {:?}", found[0]);
            assert_eq!(found[1], [8.0, 6.0], "{mode:?} of one token");
        }
        let unit = pooled(PoolingMode::Mean, true);
        assert!((unit[1][0] - 0.8).abs() < 1e-6 && (unit[1][1] - 0.6).abs() < 1e-6);
        assert_eq!(unit[2], [0.0, 0.0]);
        let both = Pooling { modes: vec![PoolingMode::Cls, PoolingMode::Max], normalize: false, max_length: None };
        let hidden = Tensor::new(&[[1f32, 2.0], [3.0, -4.0]], &Device::Cpu).unwrap();
        assert_eq!(both.pool(&hidden, &[0, 2]).unwrap().to_vec2::<f32>().unwrap(), [[1.0, 2.0, 3.0, 2.0]]);
        assert!(both.pool(&hidden, &[0, 0]).unwrap_err().to_string().contains("without tokens"));
    }

    #[test]
    fn a_folder_says_how() {
        let dir = tempfile::tempdir().unwrap();
        let write = |name: &str, text: &str| {
            let path = dir.path().join(name);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        };
        assert_eq!(Pooling::of_folder(dir.path()).unwrap(), None);
        let module =
            |kind: &str, path: &str| format!(r#"{{"type": "sentence_transformers.models.{kind}", "path": "{path}"}}"#);
        let list = |all: &[String]| write("modules.json", &format!("[{}]", all.join(",")));
        list(&[module("Transformer", ""), module("Pooling", "1_Pooling"), module("Normalize", "2_Normalize")]);
        write("sentence_bert_config.json", r#"{"max_seq_length": 256}"#);
        let missing = Pooling::of_folder(dir.path()).unwrap_err().to_string();
        assert!(missing.contains("1_Pooling"), "{missing}");
        write("1_Pooling/config.json", r#"{"pooling_mode_cls_token": true, "pooling_mode_mean_tokens": true}"#);
        let both = Pooling { modes: vec![PoolingMode::Cls, PoolingMode::Mean], normalize: true, max_length: Some(256) };
        assert_eq!(Pooling::of_folder(dir.path()).unwrap(), Some(both));
        write("1_Pooling/config.json", r#"{"pooling_mode": "lasttoken"}"#);
        assert_eq!(Pooling::of_folder(dir.path()).unwrap().unwrap().modes, [PoolingMode::LastToken]);
        for (file, text, says) in [
            ("1_Pooling/config.json", r#"{"pooling_mode": "middle"}"#, "middle"),
            ("1_Pooling/config.json", "{}", "names no way"),
            ("modules.json", &format!("[{}]", module("Dense", "2_Dense")), "Dense"),
            ("modules.json", "{", "not a list"),
        ] {
            write(file, text);
            let message = Pooling::of_folder(dir.path()).unwrap_err().to_string();
            assert!(message.contains(says), "{message}");
        }
    }
}
