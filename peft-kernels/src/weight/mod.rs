//! A frozen weight matrix: how it is stored, and the two products that training needs of it.

mod products;

use std::borrow::Cow;
use std::sync::{Arc, OnceLock};

use candle_core::quantized::QTensor;
use candle_core::{DType, Device, Result, Tensor};

use crate::cpu;
use crate::deferred::Deferred;
use crate::diff_op::is_cpu_f32;
use crate::frozen_gemm::Addend;
use crate::stored::Stored;

/// A weight matrix `[out, in]` that never gets a gradient, as it lies in its file: dense in `f32`, `f16` or `bf16`, or
/// in GGUF blocks. Products with it are made in `f32` on a CPU whatever the storage, widening elements on their way into a
/// GEMM's order (`frozen_gemm`; a panel of rows at a time where the processor has no kernel there), or a few rows in the
/// first-level cache for the few tokens of a decoding step (`thin.rs`), and in the activations' type elsewhere.
///
/// Cloning shares the storage.
#[derive(Debug, Clone)]
pub struct FrozenWeight {
    storage: WeightStorage,
    out_features: usize,
    in_features: usize,
    /// Whether products may round the activations to `bf16`.
    narrow_products: bool,
    square_norms: Arc<OnceLock<Tensor>>,
}

/// The kinds of storage of a [`FrozenWeight`].
#[derive(Debug, Clone)]
pub enum WeightStorage {
    /// A contiguous float matrix `[out, in]`.
    Dense(Tensor),
    /// Rows of GGUF blocks.
    Gguf(Arc<QTensor>),
    /// Nothing in memory: read from its file for every use.
    Deferred(Deferred),
}

impl FrozenWeight {
    /// A dense weight `[out, in]` of type `f32`, `f16` or `bf16`.
    ///
    /// # Errors
    /// When `weight` is not a float matrix.
    pub fn dense(weight: &Tensor) -> Result<Self> {
        let (out_features, in_features) = weight.dims2()?;
        if !matches!(weight.dtype(), DType::F32 | DType::F16 | DType::BF16) {
            candle_core::bail!("a frozen weight is f32, f16 or bf16, not {:?}", weight.dtype());
        }
        let storage = WeightStorage::Dense(weight.detach().contiguous()?);
        Ok(Self { storage, out_features, in_features, narrow_products: false, square_norms: Arc::default() })
    }

    /// A weight `[out, in]` in GGUF blocks, whose rows are whole blocks.
    ///
    /// # Errors
    /// When `weight` is not a matrix or a row is not a whole number of blocks.
    pub fn gguf(weight: Arc<QTensor>) -> Result<Self> {
        let (out_features, in_features) = weight.shape().dims2()?;
        if !in_features.is_multiple_of(weight.dtype().block_size()) {
            candle_core::bail!("rows of {in_features} elements are not whole {:?} blocks", weight.dtype());
        }
        Ok(Self {
            storage: WeightStorage::Gguf(weight),
            out_features,
            in_features,
            narrow_products: false,
            square_norms: Arc::default(),
        })
    }

    /// A weight `[out, in]` that stays in its file.
    #[must_use]
    pub fn deferred(out_features: usize, in_features: usize, weight: Deferred) -> Self {
        Self {
            storage: WeightStorage::Deferred(weight),
            out_features,
            in_features,
            narrow_products: false,
            square_norms: Arc::default(),
        }
    }

    /// The same weight, whose products round the activations to `bf16` and add in `f32` where it is `bf16` and the
    /// processor has instructions for that (AVX512-BF16), as PyTorch does with a `bf16` model. Elsewhere nothing changes.
    #[must_use]
    pub fn with_narrow_products(self) -> Self {
        Self { narrow_products: true, ..self }
    }

    /// The transpose `[in, out]`; of GGUF blocks, whose rows cannot be turned, in `f32`.
    ///
    /// # Errors
    /// When the weight cannot be read.
    pub fn transposed(&self) -> Result<Self> {
        let turned = match &self.storage {
            WeightStorage::Dense(w) => Self::dense(&w.t()?.contiguous()?)?,
            WeightStorage::Gguf(_) => Self::dense(&self.to_dense(DType::F32)?.t()?.contiguous()?)?,
            WeightStorage::Deferred(d) => {
                let this = self.clone();
                let read = move || this.resident()?.transposed();
                let turned = Deferred::new(d.device().clone(), read);
                Self::deferred(self.in_features, self.out_features, turned)
            }
        };
        Ok(Self { narrow_products: self.narrow_products, ..turned })
    }

    /// Weights of one width, one below the other; GGUF blocks, which lie apart, in `f32`.
    ///
    /// # Errors
    /// When there are none, their widths differ, or one cannot be read.
    pub fn stacked(parts: &[Self]) -> Result<Self> {
        let Some(first) = parts.first() else { candle_core::bail!("no weights to put together") };
        if let Some(other) = parts.iter().find(|part| part.in_features != first.in_features) {
            candle_core::bail!("weights of {} and of {} inputs", first.in_features, other.in_features);
        }
        if let WeightStorage::Deferred(d) = &first.storage {
            let rows = parts.iter().map(|part| part.out_features).sum();
            let all = parts.to_vec();
            let read = move || {
                let resident = all.iter().map(|part| Ok(part.resident()?.into_owned())).collect::<Result<Vec<_>>>()?;
                Self::stacked(&resident)
            };
            return Ok(Self::deferred(rows, first.in_features, Deferred::new(d.device().clone(), read)));
        }
        let dtype = match &first.storage {
            WeightStorage::Dense(w) => w.dtype(),
            _ => DType::F32,
        };
        let dense = parts.iter().map(|part| part.to_dense(dtype)).collect::<Result<Vec<_>>>()?;
        Ok(Self { narrow_products: first.narrow_products, ..Self::dense(&Tensor::cat(&dense, 0)?)? })
    }

    /// The weight in memory.
    fn resident(&self) -> Result<Cow<'_, Self>> {
        match &self.storage {
            WeightStorage::Deferred(d) => d.read(self.out_features, self.in_features).map(Cow::Owned),
            _ => Ok(Cow::Borrowed(self)),
        }
    }

    /// Rows of the matrix: the size of the output.
    #[must_use]
    pub fn out_features(&self) -> usize {
        self.out_features
    }

    /// Columns of the matrix: the size of the input.
    #[must_use]
    pub fn in_features(&self) -> usize {
        self.in_features
    }

    /// How the weight is stored.
    #[must_use]
    pub fn storage(&self) -> &WeightStorage {
        &self.storage
    }

    /// The device that holds it.
    #[must_use]
    pub fn device(&self) -> Device {
        match &self.storage {
            WeightStorage::Dense(w) => w.device().clone(),
            WeightStorage::Gguf(q) => q.device(),
            WeightStorage::Deferred(d) => d.device().clone(),
        }
    }

    /// Bytes of storage in memory.
    #[must_use]
    pub fn nbytes(&self) -> usize {
        match &self.storage {
            WeightStorage::Dense(w) => w.elem_count() * w.dtype().size_in_bytes(),
            WeightStorage::Gguf(q) => q.storage_size_in_bytes(),
            WeightStorage::Deferred(_) => 0,
        }
    }

    /// A name for the storage: `f32`, `bf16`, `q4_1` and so on, `deferred` where nothing is in memory.
    #[must_use]
    pub fn dtype_name(&self) -> String {
        match &self.storage {
            WeightStorage::Dense(w) => w.dtype().as_str().to_string(),
            WeightStorage::Gguf(q) => format!("{:?}", q.dtype()).to_lowercase(),
            WeightStorage::Deferred(_) => "deferred".to_string(),
        }
    }

    /// The whole matrix as a dense tensor `[out, in]`.
    ///
    /// # Errors
    /// When the conversion fails.
    pub fn to_dense(&self, dtype: DType) -> Result<Tensor> {
        match &self.storage {
            WeightStorage::Dense(w) => w.to_dtype(dtype),
            WeightStorage::Gguf(q) => q.dequantize(&q.device())?.to_dtype(dtype),
            WeightStorage::Deferred(d) => d.read(self.out_features, self.in_features)?.to_dense(dtype),
        }
    }

    /// Rows `ids` as a tensor `[ids.len(), in]`, in `f32` on a CPU and in the storage's float type elsewhere.
    ///
    /// # Errors
    /// When an id is not a row; the message names it.
    pub fn rows(&self, ids: &[u32]) -> Result<Tensor> {
        if let Some(bad) = ids.iter().find(|&&i| i as usize >= self.out_features) {
            candle_core::bail!("token id {bad} is outside the vocabulary of {}", self.out_features);
        }
        if !self.device().is_cpu() {
            let index = Tensor::new(ids, &self.device())?;
            return match &self.storage {
                WeightStorage::Dense(w) => w.index_select(&index, 0),
                WeightStorage::Gguf(q) => q.embedding(&index),
                WeightStorage::Deferred(_) => self.resident()?.rows(ids),
            };
        }
        let (weight, mut out) = (self.resident()?, vec![0f32; ids.len() * self.in_features]);
        if self.in_features > 0 {
            let mut rows = out.chunks_mut(self.in_features).zip(ids);
            rows.try_for_each(|(row, &id)| weight.widen(id as usize, row))?;
        }
        cpu::tensor(out, (ids.len(), self.in_features))
    }

    /// `x · Wᵀ`: `[tokens, in]` to `[tokens, out]`, untracked.
    ///
    /// # Errors
    /// When `x` has another width.
    pub fn matmul_t(&self, x: &Tensor) -> Result<Tensor> {
        self.check(x, self.in_features, "input")?;
        if is_cpu_f32(x) {
            let x = x.contiguous()?;
            let tokens = x.dim(0)?;
            let out = cpu::with(&x, |x| self.matmul_t_cpu(x.data, tokens, Addend::default()))?;
            return cpu::tensor(out, (tokens, self.out_features));
        }
        x.detach().matmul(&self.to_dense(x.dtype())?.t()?)
    }

    /// `dy · W`: `[tokens, out]` to `[tokens, in]`, untracked.
    ///
    /// # Errors
    /// When `dy` has another width.
    pub fn matmul(&self, dy: &Tensor) -> Result<Tensor> {
        self.check(dy, self.out_features, "gradient")?;
        if is_cpu_f32(dy) {
            let dy = dy.contiguous()?;
            let tokens = dy.dim(0)?;
            let out = cpu::with(&dy, |dy| self.matmul_cpu(dy.data, tokens, Addend::default()))?;
            return cpu::tensor(out, (tokens, self.in_features));
        }
        dy.detach().matmul(&self.to_dense(dy.dtype())?)
    }

    /// `Σ_j W[i, j]²` for every row `i`, as `[out]` in `f32`. Computed on first use and kept: the weight never changes.
    ///
    /// # Errors
    /// When the weight cannot be read.
    pub fn row_square_norms(&self) -> Result<Tensor> {
        if let Some(norms) = self.square_norms.get() {
            return Ok(norms.clone());
        }
        let norms = self.compute_row_square_norms()?.detach();
        Ok(self.square_norms.get_or_init(|| norms).clone())
    }

    fn compute_row_square_norms(&self) -> Result<Tensor> {
        if !self.device().is_cpu() {
            return self.to_dense(DType::F32)?.sqr()?.sum(1);
        }
        let mut out = Vec::with_capacity(self.out_features);
        self.for_panels(|_, panel| {
            out.extend(panel.chunks(self.in_features.max(1)).map(|row| {
                // Partial sums in f64: a row of many thousand squares keeps its last digits.
                row.iter().map(|&w| f64::from(w) * f64::from(w)).sum::<f64>() as f32
            }));
            Ok(())
        })?;
        out.resize(self.out_features, 0.0);
        cpu::tensor(out, self.out_features)
    }

    fn check(&self, x: &Tensor, width: usize, what: &str) -> Result<()> {
        match x.dims2() {
            Ok((_, w)) if w == width => Ok(()),
            _ => candle_core::bail!(
                "a frozen weight [{}, {}] takes an {what} of [tokens, {width}], not {:?}",
                self.out_features,
                self.in_features,
                x.shape()
            ),
        }
    }

    /// Writes the rows from `first` on, as many as `out` holds, in `f32`.
    fn widen(&self, first: usize, out: &mut [f32]) -> Result<()> {
        self.with_stored(|stored| stored.widen(first * self.in_features, out))
    }

    /// Calls `f` on the elements as they lie in memory, row by row.
    pub(crate) fn with_stored<R>(&self, f: impl FnOnce(Stored<'_>) -> Result<R>) -> Result<R> {
        match &self.storage {
            WeightStorage::Dense(w) => {
                let (storage, layout) = w.storage_and_layout();
                let candle_core::Storage::Cpu(s) = &*storage else {
                    candle_core::bail!("a CPU kernel got a weight on {:?}", w.device().location())
                };
                let start = layout.start_offset();
                f(match w.dtype() {
                    DType::F32 => Stored::F32(s.as_slice()?.get(start..).unwrap_or_default()),
                    DType::F16 => Stored::F16(s.as_slice()?.get(start..).unwrap_or_default()),
                    _ => Stored::Bf16(s.as_slice()?.get(start..).unwrap_or_default()),
                })
            }
            WeightStorage::Gguf(q) => f(Stored::Blocks(&q.data()?, q.dtype())),
            WeightStorage::Deferred(_) => self.resident()?.with_stored(f),
        }
    }
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used)]
    use candle_core::quantized::GgmlDType;

    use super::*;
    use crate::testing::{close, randn};

    fn kinds(out: usize, inp: usize) -> Vec<FrozenWeight> {
        let w = randn(1, (out, inp), 0.5).unwrap();
        let mut all: Vec<FrozenWeight> = [DType::F32, DType::F16, DType::BF16]
            .iter()
            .map(|d| FrozenWeight::dense(&w.to_dtype(*d).unwrap()).unwrap())
            .collect();
        for dtype in [GgmlDType::Q4_0, GgmlDType::Q4_1, GgmlDType::Q8_0, GgmlDType::Q5_0, GgmlDType::F16] {
            all.push(FrozenWeight::gguf(Arc::new(QTensor::quantize(&w, dtype).unwrap())).unwrap());
        }
        let on_disk = all[2].clone();
        let deferred = Deferred::new(Device::Cpu, move || Ok(on_disk.clone()));
        all.push(FrozenWeight::deferred(out, inp, deferred));
        all
    }

    #[test]
    fn products_equal_the_dense_ones_in_every_storage() {
        for (out, inp) in [(1, 32), (33, 64), (700, 512)] {
            for w in kinds(out, inp) {
                let dense = w.to_dense(DType::F32).unwrap();
                let twice = FrozenWeight::stacked(&[w.clone(), w.clone()]).unwrap();
                assert_eq!((twice.out_features(), twice.in_features()), (2 * out, inp));
                let both = Tensor::cat(&[&dense, &dense], 0).unwrap();
                close("stacked", &twice.to_dense(DType::F32).unwrap(), &both, 0.0).unwrap();
                let turned = w.transposed().unwrap().to_dense(DType::F32).unwrap();
                close("transposed", &turned, &dense.t().unwrap(), 0.0).unwrap();
                for tokens in [1, 5, 17] {
                    let x = randn(2, (tokens, inp), 1.0).unwrap();
                    let dy = randn(3, (tokens, out), 1.0).unwrap();
                    let name = format!("{} [{out}, {inp}] × {tokens}", w.dtype_name());
                    close(&name, &w.matmul_t(&x).unwrap(), &x.matmul(&dense.t().unwrap()).unwrap(), 1e-4).unwrap();
                    close(&name, &w.matmul(&dy).unwrap(), &dy.matmul(&dense).unwrap(), 1e-4).unwrap();
                }
                let norms = dense.sqr().unwrap().sum(1).unwrap();
                let first = w.row_square_norms().unwrap();
                close("norms", &first, &norms, 1e-5).unwrap();
                // Kept, and shared with clones: DoRA asks for them in every forward pass.
                assert_eq!(w.clone().row_square_norms().unwrap().id(), first.id());
                close("kept norms", &first, &w.compute_row_square_norms().unwrap(), 0.0).unwrap();
                let ids = [0, out as u32 - 1, out as u32 / 2];
                let index = Tensor::new(&ids[..], &Device::Cpu).unwrap();
                close("rows", &w.rows(&ids).unwrap(), &dense.index_select(&index, 0).unwrap(), 0.0).unwrap();
            }
        }
    }

    #[test]
    fn wrong_shapes_are_named() {
        let w = FrozenWeight::dense(&randn(1, (3, 4), 1.0).unwrap()).unwrap();
        let e = w.matmul_t(&randn(1, (2, 5), 1.0).unwrap()).unwrap_err().to_string();
        assert!(e.contains("[tokens, 4]"), "{e}");
        assert!(w.rows(&[3]).unwrap_err().to_string().contains("token id 3"));
    }
}
