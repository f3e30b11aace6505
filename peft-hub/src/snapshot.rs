//! A hub id to a place on disk: which files of the repository are needed, and having them all.

use std::collections::BTreeSet;
use std::path::Path;

use crate::cache::{Cache, is_commit};
use crate::client::Client;
use crate::download::fetch;
use crate::error::{HubError, Result};
use crate::options::{Event, Options};
use crate::spec::{HubId, is_safe_file};
use crate::{Kind, Location};

const CONFIG: &str = "config.json";
const WEIGHTS: &str = "model.safetensors";
const INDEX: &str = "model.safetensors.index.json";
const ADAPTER_CONFIG: &str = "adapter_config.json";
/// PEFT's weights, AdapterHub's and mlx-lm's.
const ADAPTER_WEIGHTS: [&str; 3] = ["adapter_model.safetensors", "adapter.safetensors", "adapters.safetensors"];
/// Pickles in their place.
const ADAPTER_PICKLES: [&str; 2] = ["adapter_model.bin", "pytorch_adapter.bin"];

/// What an adapter may have beside its config: names of classes, and AdapterHub's head.
const BESIDE_ADAPTER: &[&str] = &["head_config.json", "labels.json", "model_head.safetensors"];

/// Small files that a model may have beside its config: tokenizers of all kinds, chat templates, generation defaults.
const BESIDE_CONFIG: &[&str] = &[
    "added_tokens.json",
    "chat_template.jinja",
    "chat_template.json",
    "generation_config.json",
    "merges.txt",
    "special_tokens_map.json",
    "spiece.model",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "vocab.json",
    "vocab.txt",
];

/// A model's index may name this many shards at most, and be this large.
const MAX_SHARDS: usize = 10_000;
const MAX_INDEX: u64 = 256 << 20;

/// Find a repository in the cache, or bring it there.
pub(crate) fn find(id: &HubId, kind: Kind, options: &Options) -> Result<Location> {
    if let (Some(file), Kind::Adapter) = (&id.file, kind) {
        return Err(HubError::Unsuitable {
            path: file.into(),
            why: "one file of a repository can be a model, not an adapter; give org/name".to_owned(),
        });
    }
    let cache = Cache::of(id, options)?;
    let cached = cached(&cache, id, kind);
    if options.offline {
        return cached.map_err(|missing| HubError::Offline {
            repo: id.repo.clone(),
            revision: id.revision.clone(),
            missing,
            cache: cache.root.clone(),
        });
    }
    // A commit never changes, so a complete copy of one needs no look at the hub. Other tools may have left the tokenizer.
    if is_commit(&id.revision)
        && let Ok(location) = &cached
        && (kind == Kind::Adapter || has_tokenizer(location))
    {
        return Ok(location.clone());
    }
    let client = Client::new(options)?;
    let listing = match client.listing(id) {
        Ok(listing) => listing,
        Err(error) if error.is_unreachable() => {
            let Ok(location) = cached else {
                return Err(error);
            };
            options.tell(Event::Note { message: &format!("{error}; using the copy of {} in the cache", id.repo) });
            return Ok(location);
        }
        Err(error) => return Err(error),
    };
    if !is_commit(&listing.sha) {
        return Err(HubError::Protocol {
            url: options.endpoint.clone(),
            why: "the repository's commit is not a hash".to_owned(),
        });
    }
    let commit = listing.sha.to_ascii_lowercase();
    let names: BTreeSet<&str> = listing.siblings.iter().map(|sibling| sibling.rfilename.as_str()).collect();
    let get = |file: &str| fetch(&client, &cache, id, &commit, file);
    let location = match plan(&names, id, kind)? {
        Plan::Gguf(file) => Location::Gguf(get(file)?),
        Plan::Files { small, weights } => {
            for file in small {
                get(file)?;
            }
            if weights == INDEX {
                for shard in shards(&get(INDEX)?)? {
                    get(&shard)?;
                }
            } else {
                get(weights)?;
            }
            Location::Folder(cache.snapshot(&commit))
        }
    };
    cache.set_commit(&id.revision, &commit)?;
    Ok(location)
}

fn has_tokenizer(location: &Location) -> bool {
    match location {
        Location::Gguf(_) => true,
        Location::Folder(folder) => ["tokenizer.json", "tokenizer.model", "spiece.model", "vocab.txt"]
            .iter()
            .any(|file| folder.join(file).is_file()),
    }
}

/// What to download.
enum Plan<'a> {
    Gguf(&'a str),
    /// The small files first, so that a broken download leaves the weights missing and not the tokenizer.
    Files {
        small: Vec<&'a str>,
        weights: &'static str,
    },
}

fn plan<'a>(names: &BTreeSet<&'a str>, id: &HubId, kind: Kind) -> Result<Plan<'a>> {
    let has = |file: &str| names.contains(file);
    if let Some(file) = &id.file {
        return match names.get(file.as_str()) {
            Some(file) => Ok(Plan::Gguf(file)),
            None => Err(missing_file(id, file, &gguf_hint(names))),
        };
    }
    let small = |needed: &'static str, beside: &[&str]| {
        names.iter().copied().filter(|name| *name == needed || beside.contains(name)).collect()
    };
    if kind == Kind::Adapter {
        let weights = ADAPTER_WEIGHTS.into_iter().find(|file| has(file));
        return match (has(ADAPTER_CONFIG), weights) {
            (true, Some(weights)) => Ok(Plan::Files { small: small(ADAPTER_CONFIG, BESIDE_ADAPTER), weights }),
            (false, _) if has(CONFIG) => Err(missing_file(id, ADAPTER_CONFIG, "; it is a model, give it with --model")),
            (false, _) => Err(missing_file(id, ADAPTER_CONFIG, "")),
            (true, None) => {
                let both = ADAPTER_PICKLES.into_iter().zip(ADAPTER_WEIGHTS);
                let (pickle, wanted) = both.clone().find(|(pickle, _)| has(pickle)).unwrap_or(("", ADAPTER_WEIGHTS[0]));
                let hint = match pickle {
                    "" => String::new(),
                    pickle => format!(", only a pickled {pickle}; download it and save its tensors as {wanted}"),
                };
                Err(missing_file(id, wanted, &hint))
            }
        };
    }
    let mut gguf = names.iter().filter(|name| is_gguf(name));
    let weights = [WEIGHTS, INDEX].into_iter().find(|file| has(file));
    match (has(CONFIG), weights, gguf.next(), gguf.next()) {
        (true, Some(weights), _, _) => Ok(Plan::Files { small: small(CONFIG, BESIDE_CONFIG), weights }),
        (_, _, Some(only), None) => Ok(Plan::Gguf(only)),
        (_, _, Some(_), Some(_)) => Err(missing_file(id, WEIGHTS, &gguf_hint(names))),
        (false, ..) if has(ADAPTER_CONFIG) => {
            Err(missing_file(id, CONFIG, "; it is an adapter, give it with --adapter and its base with --model"))
        }
        (false, ..) => Err(missing_file(id, CONFIG, "")),
        (true, None, ..) if names.iter().any(|name| name.ends_with(".bin")) => Err(missing_file(
            id,
            WEIGHTS,
            ", only pickled weights (.bin); convert them with transformers' save_pretrained",
        )),
        (true, None, ..) => Err(missing_file(id, WEIGHTS, "")),
    }
}

fn is_gguf(name: &str) -> bool {
    name.to_ascii_lowercase().ends_with(".gguf")
}

/// `; name one of its GGUF files: …`.
fn gguf_hint(names: &BTreeSet<&str>) -> String {
    let mut files: Vec<&str> = names.iter().copied().filter(|name| is_gguf(name)).collect();
    if files.is_empty() {
        return String::new();
    }
    let more = files.len() > 5;
    files.truncate(5);
    format!("; name one of its GGUF files, as org/name/FILE: {}{}", files.join(", "), if more { ", …" } else { "" })
}

fn missing_file(id: &HubId, file: &str, hint: &str) -> HubError {
    HubError::MissingFile {
        repo: id.repo.clone(),
        revision: id.revision.clone(),
        file: file.to_owned(),
        hint: hint.to_owned(),
    }
}

/// The shards that an index names.
fn shards(index: &Path) -> Result<BTreeSet<String>> {
    let bad = |why: &str| HubError::Unsuitable {
        path: index.to_owned(),
        why: format!("not an index of safetensors shards: {why}"),
    };
    let size = std::fs::metadata(index).map_err(|source| HubError::io(index, source))?;
    if size.len() > MAX_INDEX {
        return Err(bad("too large"));
    }
    let text = std::fs::read_to_string(index).map_err(|source| HubError::io(index, source))?;
    let json: serde_json::Value = serde_json::from_str(&text).map_err(|error| bad(&error.to_string()))?;
    let map = json.get("weight_map").and_then(serde_json::Value::as_object).ok_or_else(|| bad("no weight_map"))?;
    let mut shards = BTreeSet::new();
    for shard in map.values() {
        let shard = shard
            .as_str()
            .filter(|shard| is_safe_file(shard) && shard.ends_with(".safetensors"))
            .ok_or_else(|| bad(&format!("{shard} is no safetensors file beside it")))?;
        shards.insert(shard.to_owned());
    }
    if shards.is_empty() || shards.len() > MAX_SHARDS {
        return Err(bad(&format!("it names {} shards", shards.len())));
    }
    Ok(shards)
}

/// A complete earlier download, or the name of what is missing for one.
fn cached(cache: &Cache, id: &HubId, kind: Kind) -> std::result::Result<Location, String> {
    let commit = cache.commit_of(&id.revision).ok_or_else(|| format!("copy of this {}", kind.noun()))?;
    let folder = cache.snapshot(&commit);
    let need = |file: &str| match folder.join(file).is_file() {
        true => Ok(folder.join(file)),
        false => Err(file.to_owned()),
    };
    if let Some(file) = &id.file {
        return need(file).map(Location::Gguf);
    }
    if kind == Kind::Adapter {
        need(ADAPTER_CONFIG)?;
        let [peft, others @ ..] = ADAPTER_WEIGHTS;
        need(peft).or_else(|missing| others.into_iter().find_map(|file| need(file).ok()).ok_or(missing))?;
        return Ok(Location::Folder(folder));
    }
    if need(CONFIG).is_err()
        && let Ok(Location::Gguf(file)) = crate::local::check(&folder, kind)
    {
        return Ok(Location::Gguf(file));
    }
    need(CONFIG)?;
    if need(WEIGHTS).is_err() {
        let index = need(INDEX).map_err(|_| WEIGHTS.to_owned())?;
        for shard in shards(&index).map_err(|error| error.to_string())? {
            need(&shard)?;
        }
    }
    Ok(Location::Folder(folder))
}
