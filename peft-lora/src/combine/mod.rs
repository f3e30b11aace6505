/*!
Several adapters made into one LoRA, `ΔW = Σ wᵢ ΔWᵢ`, and an adapter of any method that changes weights made into a LoRA.

What PEFT's `add_weighted_adapter` (`peft/tuners/lora/model.py`, 0.21) calls [`CombineType`] acts on the changes `ΔW` themselves here.
Sums of low rank are never made whole: with `A = [Aᵢ]` and `B = [wᵢsᵢBᵢ]` the sum is `B·A`, and a QR factorisation of either
side leaves a small matrix to decompose. What looks at single elements (TIES, DARE, pruning) makes one site's changes at a
time. In PEFT some types act on A and on B apart, whose product then has terms `AᵢBⱼ` of no adapter;
[`CombineOptions::peft_compatible`] asks for that.

DoRA's change, `(g − 1) ⊙ W + g ⊙ sBA` with `g = m / ‖W + sBA‖`, is of full rank, and sums of them are a DoRA again: with
`G = 1 + Σ wᵢ (gᵢ − 1)` and `C = Σ wᵢ gᵢ ⊙ sᵢBᵢAᵢ` the weight is `G ⊙ (W + C / G)`, so that the magnitude is `G ⊙ ‖W + C / G‖`.
*/

mod change;
mod config;
mod elementwise;
mod source;
#[cfg(test)]
mod tests;

use std::collections::{BTreeMap, BTreeSet};

use candle_core::{DType, Device, Tensor};
use peft_core::combine::{Combined, CombinedSite, WholeTensors, combine_whole};
use peft_core::kernels::Stream;
use peft_core::suggest::did_you_mean;
use peft_core::{BaseModel, Context, Error, Result, check_finite, parameter_name};

pub use change::RankRule;
use change::{Change, Reduced, Update};
pub use elementwise::MajoritySign;
use elementwise::{Elementwise, Prune};
use source::Place;
pub use source::Source;

/// How adapters are combined, by PEFT's names.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum CombineType {
    /// All factors, one after another: exact, of the sum of the ranks.
    Cat,
    /// The exact sum, of the smallest rank that holds it.
    Linear,
    /// The best approximation of the exact sum that has a given rank.
    Svd,
    /// The largest elements of each, those of the majority's sign averaged.
    Ties {
        /// Whether PEFT too makes it of whole changes (`ties_svd`).
        of_whole: bool,
    },
    /// Random elements of each, added.
    DareLinear {
        /// As above.
        of_whole: bool,
    },
    /// Random elements of each, those of the majority's sign averaged.
    DareTies {
        /// As above.
        of_whole: bool,
    },
    /// The largest elements of each, added.
    MagnitudePrune {
        /// As above.
        of_whole: bool,
    },
}

impl CombineType {
    /// Every type with its name.
    pub const ALL: [(&'static str, Self); 11] = [
        ("cat", Self::Cat),
        ("linear", Self::Linear),
        ("svd", Self::Svd),
        ("ties", Self::Ties { of_whole: false }),
        ("ties_svd", Self::Ties { of_whole: true }),
        ("dare_linear", Self::DareLinear { of_whole: false }),
        ("dare_linear_svd", Self::DareLinear { of_whole: true }),
        ("dare_ties", Self::DareTies { of_whole: false }),
        ("dare_ties_svd", Self::DareTies { of_whole: true }),
        ("magnitude_prune", Self::MagnitudePrune { of_whole: false }),
        ("magnitude_prune_svd", Self::MagnitudePrune { of_whole: true }),
    ];

    /// The type called `name`.
    ///
    /// # Errors
    /// There is none; the message names the nearest and all.
    pub fn from_name(name: &str) -> Result<Self> {
        let names = || Self::ALL.iter().map(|(n, _)| *n);
        Self::ALL.iter().find(|(n, _)| *n == name).map(|(_, kind)| *kind).ok_or_else(|| {
            let known = names().collect::<Vec<_>>().join(", ");
            Error::msg(format!(
                "`{name}` is not a way to combine adapters{}; known: {known}",
                did_you_mean(name, names())
            ))
        })
    }

    /// The name.
    #[must_use]
    pub fn name(self) -> &'static str {
        Self::ALL.iter().find(|(_, kind)| *kind == self).map_or("", |(name, _)| name)
    }

    /// What is done to single elements, if anything.
    fn elementwise(self, options: &CombineOptions) -> Option<Elementwise> {
        let (prune, elects) = match self {
            Self::Cat | Self::Linear | Self::Svd => return None,
            Self::Ties { .. } => (Prune::Magnitude, true),
            Self::DareLinear { .. } => (Prune::Random, false),
            Self::DareTies { .. } => (Prune::Random, true),
            Self::MagnitudePrune { .. } => (Prune::Magnitude, false),
        };
        Some(Elementwise { prune, elects_sign: elects.then_some(options.majority_sign), density: options.density })
    }

    /// What PEFT does to A and to B apart, where it does that.
    fn of_factors(self, options: &CombineOptions) -> Option<Elementwise> {
        match self {
            Self::Linear => Some(Elementwise { prune: Prune::Nothing, elects_sign: None, density: 1.0 }),
            Self::Ties { of_whole }
            | Self::DareLinear { of_whole }
            | Self::DareTies { of_whole }
            | Self::MagnitudePrune { of_whole } => self.elementwise(options).filter(|_| !of_whole),
            Self::Cat | Self::Svd => None,
        }
    }
}

/// How to combine adapters.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct CombineOptions {
    /// Which combination.
    pub kind: CombineType,
    /// The result's rank. Left out, it is the smallest that holds the sum for `linear`, and the largest of the adapters' for
    /// the others; `cat` has its own.
    pub rank: Option<RankRule>,
    /// The share of elements that TIES, DARE and pruning keep, in (0, 1].
    pub density: f64,
    /// How TIES elects signs.
    pub majority_sign: MajoritySign,
    /// Seed of DARE's choices.
    pub seed: u64,
    /// Combine A and B apart where PEFT does.
    pub peft_compatible: bool,
    /// Put DoRA's scaling of the base into the factors, which become an approximation, instead of keeping a magnitude.
    pub plain: bool,
}

impl CombineOptions {
    /// PEFT's defaults (`svd`) and half of the elements.
    #[must_use]
    pub fn new(kind: CombineType) -> Self {
        Self {
            kind,
            rank: None,
            density: 0.5,
            majority_sign: MajoritySign::Total,
            seed: 0,
            peft_compatible: false,
            plain: false,
        }
    }

    fn check(&self) -> Result<()> {
        if !(self.density > 0.0 && self.density <= 1.0) {
            return Err(Error::config("density", format!("{} is not a share above 0 and up to 1", self.density)));
        }
        match self.rank {
            Some(RankRule::Fixed(0 | 65_537..)) => Err(Error::config("rank", "is not from 1 to 65536")),
            Some(RankRule::WithinError(e)) if !(0.0..1.0).contains(&e) => {
                Err(Error::config("max_error", format!("{e} is not a share from 0 to below 1")))
            }
            Some(_) if self.kind == CombineType::Cat => {
                let message =
                    "cat keeps all ranks; take svd for a given one, or linear for the smallest that holds the sum";
                Err(Error::config("rank", message))
            }
            _ => Ok(()),
        }
    }
}

/// Combines adapters into one LoRA. `base` is only read where a change depends on it, and for tensors that are stored whole
/// and differ.
///
/// # Errors
/// Adapters of different models, types that their changes do not allow, tensors stored whole that differ, NaN or infinity; the
/// message names the adapters and the site.
pub fn combine(sources: &[Source<'_>], options: &CombineOptions, base: Option<&dyn BaseModel>) -> Result<Combined> {
    options.check()?;
    let places = places(sources)?;
    let factors = options.peft_compatible.then(|| options.kind.of_factors(options)).flatten();
    let is_dora = sources.iter().any(Source::has_gain);
    if is_dora && factors.is_some() {
        let message =
            "PEFT combines A and B without the magnitudes, which makes another adapter; leave --peft-compatible out";
        return Err(Error::config("use_dora", message));
    }
    let keeps_gain = is_dora && !options.plain && options.kind.elementwise(options).is_none();
    let job = Job { options, base, keeps_gain, factors, rank: default_rank(sources, options)? };

    let mut out = Results::default();
    for (path, place) in &places {
        job.site(path, place, sources, &mut out).with_context(|| path.clone())?;
    }
    let has_bias = !out.biases.is_empty();
    if has_bias {
        out.fill_biases(&places)?;
    }
    for (key, tensor) in &out.tensors {
        check_finite(key, tensor)?;
    }
    let parts: Vec<WholeTensors<'_>> =
        sources.iter().map(|s| WholeTensors { name: &s.name, weight: s.weight, tensors: &s.whole }).collect();
    let whole = combine_whole(&parts, base)?;
    let made = config::Made { places: &places, sites: &out.sites, has_bias, has_gain: keeps_gain, whole: &whole };
    let config = config::config(sources, &made, base)?;
    out.tensors.extend(whole.into_iter().map(|(key, tensor)| (config::stored_key(key, &places), tensor)));
    Ok(Combined { config, tensors: out.tensors, sites: out.sites, notes: config::notes(sources) })
}

/// The sites of all adapters, which have to agree in their shapes.
fn places(sources: &[Source<'_>]) -> Result<BTreeMap<String, Place>> {
    let mut all: BTreeMap<String, (&str, Place)> = BTreeMap::new();
    for source in sources {
        for (path, place) in &source.places {
            let (first, known) = all.entry(path.clone()).or_insert((&source.name, *place));
            if (known.embedding, known.out, known.inp) != (place.embedding, place.out, place.inp) {
                let message = format!(
                    "{first} changes a matrix of [{}, {}] and {} one of [{}, {}]: they are adapters of different models",
                    known.out, known.inp, source.name, place.out, place.inp
                );
                return Err(Error::site(path, message));
            }
        }
    }
    for (i, one) in sources.iter().enumerate() {
        sources.iter().skip(i + 1).try_for_each(|other| same_names(one, other))?;
    }
    Ok(all.into_iter().map(|(path, (_, place))| (path, place)).collect())
}

/// Refuses adapters that name the modules of one model in two ways, or of two models.
fn same_names(one: &Source<'_>, other: &Source<'_>) -> Result<()> {
    fn container(path: &str) -> Option<&str> {
        let is_number = |part: &str| !part.is_empty() && part.bytes().all(|b| b.is_ascii_digit());
        let mut end = 0usize;
        for part in path.split('.') {
            if is_number(part) {
                return path.get(..end.checked_sub(1)?);
            }
            end += part.len() + 1;
        }
        None
    }
    let containers = |s: &Source<'_>| -> BTreeSet<String> {
        s.places.keys().filter_map(|path| container(path)).map(str::to_owned).collect()
    };
    let (ours, theirs) = (containers(one), containers(other));
    if ours.is_empty() || theirs.is_empty() || !ours.is_disjoint(&theirs) {
        return Ok(());
    }
    // One may adapt an encoder and the other a decoder.
    let stack = |c: &String| c.split('.').any(|part| part == "encoder" || part == "decoder");
    let same_root = |a: &String, b: &String| a.split('.').next() == b.split('.').next();
    if ours.iter().chain(&theirs).all(stack) || ours.iter().any(|a| theirs.iter().any(|b| same_root(a, b))) {
        return Ok(());
    }
    let first = |s: &Source<'_>| s.places.keys().next().cloned().unwrap_or_default();
    Err(Error::msg(format!(
        "{} adapts `{}` and {} adapts `{}`: they name no layers alike, so they are adapters of different models, or one was \
         saved from a model without its head",
        one.name,
        first(one),
        other.name,
        first(other)
    )))
}

/// The rank where the options do not say it.
fn default_rank(sources: &[Source<'_>], options: &CombineOptions) -> Result<RankRule> {
    match (options.rank, options.kind) {
        (Some(rank), _) => Ok(rank),
        (None, CombineType::Linear | CombineType::Cat) => Ok(RankRule::EXACT),
        (None, _) => sources
            .iter()
            .filter_map(Source::rank)
            .max()
            .map(RankRule::Fixed)
            .ok_or_else(|| Error::config("rank", "is not given, and none of the adapters has one")),
    }
}

/// Where random numbers of a site begin: a function of its path alone (FNV-1a).
fn stream(seed: u64, path: &str) -> Stream {
    let site = path.bytes().fold(0x811c_9dc5u32, |hash, byte| (hash ^ u32::from(byte)).wrapping_mul(0x0100_0193));
    Stream { seed, step: 0, site }
}

struct Job<'a> {
    options: &'a CombineOptions,
    base: Option<&'a dyn BaseModel>,
    /// Whether DoRA's scaling of the base stays a magnitude.
    keeps_gain: bool,
    /// What is done to A and to B apart.
    factors: Option<Elementwise>,
    rank: RankRule,
}

#[derive(Default)]
struct Results {
    tensors: Vec<(String, Tensor)>,
    sites: Vec<CombinedSite>,
    biases: BTreeMap<String, Tensor>,
}

impl Job<'_> {
    fn site(&self, path: &str, place: &Place, sources: &[Source<'_>], out: &mut Results) -> Result<()> {
        let mut parts = Vec::new();
        for source in sources {
            if let Some(place) = source.places.get(path) {
                parts.push((source.weight, source.change(path, place)?));
            }
        }
        if let Some(bias) = Change::added_bias(&parts)? {
            out.biases.insert(path.to_owned(), bias.to_dtype(DType::F32)?);
        }
        let mut reduced = self.reduce(path, &parts)?;
        let gain = if self.keeps_gain { Some(Change::added_gain(&parts)?) } else { None };
        if let Some(gain) = gain {
            let base = self.base.ok_or_else(|| Error::msg("DoRA needs the base"))?;
            let magnitude = magnitude(path, place, gain, &mut reduced, base)?;
            out.tensors.push((parameter_name(path, "lora_magnitude_vector"), magnitude));
        }
        let (a, b) = match place.embedding {
            true => ("lora_embedding_A", "lora_embedding_B"),
            false => ("lora_A.weight", "lora_B.weight"),
        };
        let (rank, norm, error) = (reduced.rank(), reduced.norm, reduced.error);
        out.sites.push(CombinedSite { path: path.to_owned(), rank, norm, error });
        out.tensors.push((parameter_name(path, a), reduced.a));
        out.tensors.push((parameter_name(path, b), reduced.b));
        Ok(())
    }

    fn reduce(&self, path: &str, parts: &[(f64, Change)]) -> Result<Reduced> {
        let stream = stream(self.options.seed, path);
        // The random start of a decomposition is another purpose than DARE's choices.
        let start = Stream { step: u32::MAX, ..stream };
        if let Some(rule) = self.factors {
            return apart(parts, rule, stream);
        }
        if let Some(rule) = self.options.kind.elementwise(self.options) {
            let changes = self.dense(path, parts)?;
            let shape =
                changes.first().map(|(_, c)| c.shape().clone()).ok_or_else(|| Error::msg("nothing to combine"))?;
            let changes = changes.into_iter().map(|(w, c)| Ok((w, c.flatten_all()?.to_vec1()?)));
            let combined = rule.combine(changes.collect::<Result<_>>()?, stream)?;
            return change::reduced_dense(&Tensor::from_vec(combined, shape, &Device::Cpu)?, self.rank, start);
        }
        let whole = parts.iter().any(|(_, c)| matches!(c.update, Update::Dense(_)));
        let sums_gain = !self.keeps_gain && parts.iter().any(|(_, c)| c.gain.is_some());
        if (whole || sums_gain)
            && self.options.rank.is_none()
            && matches!(self.options.kind, CombineType::Cat | CombineType::Linear)
        {
            let message = format!(
                "the change is no product of factors, so that {} would need as many ranks as the weight has; take svd with a rank",
                self.options.kind.name()
            );
            return Err(Error::msg(message));
        }
        if sums_gain {
            let parts = self.dense(path, parts)?.into_iter();
            let parts: Vec<_> =
                parts.map(|(w, c)| (w, Change { gain: None, update: Update::Dense(c), bias: None })).collect();
            return change::reduced(&parts, self.rank, start);
        }
        if self.options.kind == CombineType::Cat {
            return change::concatenated(parts)?.ok_or_else(|| Error::msg("has no factors"));
        }
        change::reduced(parts, self.rank, start)
    }

    /// The changes, whole.
    fn dense(&self, path: &str, parts: &[(f64, Change)]) -> Result<Vec<(f64, Tensor)>> {
        let weight = match (parts.iter().any(|(_, c)| c.gain.is_some()), self.base) {
            (true, Some(base)) => Some(source::weight_of(base, path)?),
            _ => None,
        };
        parts.iter().map(|(w, change)| Ok((*w, change.dense(weight.as_ref())?))).collect()
    }
}

/// What PEFT does: A and B apart, each scaled by the root of weight times scale, whose sign goes into A.
fn apart(parts: &[(f64, Change)], rule: Elementwise, stream: Stream) -> Result<Reduced> {
    let (mut all_a, mut all_b) = (Vec::new(), Vec::new());
    let mut shapes: Option<(candle_core::Shape, candle_core::Shape)> = None;
    for (weight, change) in parts {
        let Update::LowRank { a, b, scale } = &change.update else {
            return Err(Error::msg(
                "PEFT combines A and B apart, and this adapter has none; leave --peft-compatible out",
            ));
        };
        let here = (a.shape().clone(), b.shape().clone());
        if shapes.get_or_insert_with(|| here.clone()) != &here {
            return Err(Error::msg(
                "PEFT combines A and B apart, which needs equal ranks; leave --peft-compatible out",
            ));
        }
        let (root, sign) = ((weight * scale).abs().sqrt(), if weight * scale < 0.0 { -1.0 } else { 1.0 });
        let values = |t: &Tensor| -> Result<Vec<f32>> { Ok(t.to_dtype(DType::F32)?.flatten_all()?.to_vec1()?) };
        all_a.push((sign * root, values(a)?));
        all_b.push((root, values(b)?));
    }
    let (of_a, of_b) = shapes.ok_or_else(|| Error::msg("nothing to combine"))?;
    let count = parts.len() as u32;
    let a = Tensor::from_vec(rule.combine(all_a, stream)?, of_a, &Device::Cpu)?;
    let b = Tensor::from_vec(rule.combine(all_b, Stream { step: count, ..stream })?, of_b, &Device::Cpu)?;
    let norm = crate::linalg::product_norm(&a, &b)?;
    Ok(Reduced { a, b, norm, error: 0.0 })
}

/// The magnitude of a DoRA whose base's weight is scaled by `1 + gain` in all, and B divided by that.
fn magnitude(
    path: &str,
    place: &Place,
    gain: Option<Tensor>,
    reduced: &mut Reduced,
    base: &dyn BaseModel,
) -> Result<Tensor> {
    let scale = match gain {
        Some(gain) => (gain + 1.0)?,
        None => Tensor::ones(place.out, DType::F64, &Device::Cpu)?,
    };
    let least = scale.abs()?.min_all()?.to_scalar::<f64>()?;
    if least < 1e-6 {
        return Err(Error::msg(
            "the weights take away an output of the base altogether, which no DoRA does; combine with other weights, or merge \
             the adapters one after another",
        ));
    }
    let b = reduced.b.to_dtype(DType::F64)?.broadcast_div(&scale.unsqueeze(1)?)?;
    reduced.b = b.to_dtype(DType::F32)?;
    let norm = source::norm_with(base, path, &reduced.a, &reduced.b)?.to_dtype(DType::F64)?;
    Ok((norm * scale)?.to_dtype(DType::F32)?)
}

impl Results {
    /// With `lora_bias`, every B has a bias.
    fn fill_biases(&mut self, places: &BTreeMap<String, Place>) -> Result<()> {
        if let Some((path, _)) = places.iter().find(|(_, place)| place.embedding) {
            let message =
                "the biases of other layers change (lora_bias), which PEFT does not load beside an adapted embedding";
            return Err(Error::site(path, message));
        }
        if self.tensors.iter().any(|(key, _)| key.ends_with(".lora_magnitude_vector")) {
            let message = "does not go with use_dora, and one of the adapters has the one and another the other";
            return Err(Error::config("lora_bias", message));
        }
        for (path, place) in places {
            let bias = match self.biases.remove(path) {
                Some(bias) => bias,
                None => Tensor::zeros(place.out, DType::F32, &Device::Cpu)?,
            };
            self.tensors.push((parameter_name(path, "lora_B.bias"), bias));
        }
        Ok(())
    }
}
